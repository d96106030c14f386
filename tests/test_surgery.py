"""adapt(), its errors, target matching, counting, and that nothing is changed when something is wrong."""

import numpy as np
import pytest
from steps import training_step

from minilora import GPT, AdamW, GPTConfig, InputError, Tensor, adapt, count_parameters, methods
from minilora.backend import to_host
from minilora.engine import nodes_of
from minilora.nn import Linear, Module
from minilora.surgery import adapted_layers, host
from minilora.targets import match_targets

pytestmark = pytest.mark.quick


def tiny_model():
    return GPT(GPTConfig(vocab_size=17, n_positions=8, n_embd=16, n_layer=2, n_head=2))


def test_all_linear_matches_the_six_of_each_block_and_prints_the_count(capsys):
    model = adapt(tiny_model(), "lora", r=2)
    assert list(adapted_layers(model)) == [
        f"blocks.{i}.{n}" for i in range(2) for n in ("q", "k", "v", "o", "up", "down")
    ]
    trainable, total = count_parameters(model)
    assert trainable == 2 * 2 * (4 * (16 + 16) + 2 * (16 + 64))  # layers * r * (d_in + d_out), methods.md 5.1
    base = sum(p.data.size for _, p in tiny_model().named_parameters())
    assert total == base + trainable
    printed = capsys.readouterr().out
    assert "12 layers matched (q, k, v, o, up, down)" in printed
    assert f"trainable {trainable:,} of {total:,} ({100 * trainable / total:.2f} %)" in printed


@pytest.mark.parametrize(
    ("target", "matched"),
    [
        (("v", "q"), ["blocks.0.q", "blocks.0.v", "blocks.1.q", "blocks.1.v"]),
        (["blocks.1.up"], ["blocks.1.up"]),
        (r"blocks\.0\.(q|down)", ["blocks.0.q", "blocks.0.down"]),
    ],
)
def test_target_modules_by_name_path_and_expression(target, matched):
    assert list(adapted_layers(adapt(tiny_model(), "lora", target, verbose=False, r=2))) == matched


def test_a_name_matches_whole_parts_of_a_path_only():
    assert match_targets(["a.up", "a.warmup"], ["up"]) == ["a.up"]


def test_some_layers_may_have_a_rank_and_an_alpha_of_their_own():
    """PEFT's rule: a key is an expression for a path or for its end behind a dot, and the first that fits counts."""
    model = adapt(
        tiny_model(), "lora", ["q", "up", "down"], verbose=False, r=2,
        rank_pattern={"blocks.1.q": 5, "q": 3}, alpha_pattern={r"blocks\.0\..*": 4.0},
    )  # fmt: skip
    assert {path: (layer.method.r, layer.method.alpha) for path, layer in adapted_layers(model).items()} == {
        "blocks.0.q": (3, 4.0), "blocks.0.up": (2, 4.0), "blocks.0.down": (2, 4.0),
        "blocks.1.q": (5, 16.0), "blocks.1.up": (2, 16.0), "blocks.1.down": (2, 16.0),
    }  # fmt: skip
    assert model.blocks[1].q.p.A.shape == (5, 16)
    assert training_step(model, AdamW(model.trainable(), lr=0.1), np.ones((1, 3), int), np.ones((1, 3), int))


def test_a_part_of_a_shared_array_is_what_the_layer_sees():
    """Where one wide layer was cut in two, the second half sees the later rows of B, and nothing is copied."""
    model, d = tiny_model(), 16
    method = methods.create("vera", r=3)
    host(model, dict.fromkeys(["blocks.0.q", "blocks.0.k"], method), parts={"blocks.0.k": {"B": slice(d, 2 * d)}})
    q, k = model.blocks[0].q, model.blocks[0].k
    assert model.shared.B.shape == (2 * d, 3) and model.shared.A.shape == (3, d)
    assert (to_host(q.p.B[:d]) == to_host(model.shared.B.data[:d])).all()
    assert (to_host(k.p.B) == to_host(model.shared.B.data[d:])).all() and k.p.B.shape == (d, 3)
    assert "shared.B" in dict(model.named_parameters()) and not hasattr(k.arrays, "B")


BAD = {
    "unknown method": (("lorra",), {}, r'unknown method "lorra" \(did you mean "lora"\?\)'),
    "unknown option": (("lora",), {"rank": 4}, r'lora has no option "rank".*r, alpha'),
    "option of another method": (("full",), {"r": 4}, r'full has no option "r"; its options: none'),
    "target without a layer": (("lora", ["q", "qq"]), {}, 'is named "qq"; there are down, k, o, q, up, v'),
    "expression that matches nothing": (("lora", r"layers\..*"), {}, "matches no path"),
    "no target": (("lora", []), {}, "nothing is selected"),
    "rank 0": (("lora",), {"r": 0}, "r is 0; the rank must be an integer of at least 1"),
    "rank above the layer": (("lora",), {"r": 17}, r"r=17 is larger than blocks.0.q allows, \(16, 16\): at most 16"),
    "alpha nan": (("lora",), {"alpha": float("nan")}, "alpha is nan; it must be a finite number above 0"),
    "alpha 0": (("lora",), {"alpha": 0.0}, "alpha is 0"),
    "alpha text": (("lora",), {"alpha": "16"}, "alpha is '16'"),
    "pattern that matches nothing": (
        ("lora",),
        {"rank_pattern": {"x": 2}},
        'r: the pattern "x" matches no adapted layer',
    ),
    "pattern that is broken": (("lora",), {"alpha_pattern": {"q(": 2.0}}, r'the pattern "q\(" is not a regular expres'),
    "rank of one layer above it": (("lora",), {"rank_pattern": {"1.q": 17}}, r"r=17 is larger than blocks.1.q allows"),
    "pattern for shared arrays": (("vera",), {"rank_pattern": {"q": 2}}, "vera: its layers cannot have an r of their"),
    "pattern without the option": (("full",), {"alpha_pattern": {"q": 2.0}}, "full: its layers cannot have an alpha"),
}


@pytest.mark.parametrize(("args", "options", "message"), BAD.values(), ids=BAD)
def test_bad_input_gets_one_clear_error_and_changes_nothing(args, options, message):
    model = tiny_model()
    before = dict(model.named_parameters())
    with pytest.raises(InputError, match=message):
        adapt(model, *args, verbose=False, **options)
    assert dict(model.named_parameters()) == before
    assert all(p.requires_grad for p in before.values())


def test_a_second_adapt_and_a_model_without_linear_layers_are_refused():
    model = adapt(tiny_model(), "lora", verbose=False, r=2)
    with pytest.raises(InputError, match="adapted already"):
        adapt(model, "full", verbose=False)
    with pytest.raises(InputError, match="nothing is selected"):
        adapt(Module(), "lora", verbose=False)


def test_wrong_shape_dtype_and_rank_of_x_are_named():
    layer = adapt(tiny_model(), "lora", verbose=False, r=2).blocks[0].q
    for x in (np.ones((3, 15), np.float32), np.ones((3, 16)), np.ones((1, 3, 16), np.float32)):
        with pytest.raises(InputError, match=r"this layer takes float32 \(N, 16\)"):
            layer(Tensor(x))


def test_only_the_adapter_receives_gradients_and_nothing_below_it_is_recorded():
    """Only block 1 is adapted, so block 0 needs no backward and keeps nothing."""
    model = adapt(tiny_model(), "lora", ["blocks.1.o"], verbose=False, r=2)
    ids = np.arange(6).reshape(2, 3)
    names = [node.name for node in nodes_of(model.loss(ids, ids))]
    assert names.count("attention") == 0 and names.count("gelu") == 1 and names.count("lora") == 1
    training_step(model, AdamW(model.trainable(), 1e-3), ids, ids)
    assert {n for n, p in model.named_parameters() if p.grad is not None} == set(model.trainable())
    assert set(model.trainable()) == {f"blocks.1.o.arrays.{a}" for a in "AB"}


def test_registry_skips_underscores_and_wants_one_class(tmp_path, monkeypatch):
    (tmp_path / "_draft.py").write_text("")
    (tmp_path / "empty.py").write_text('"""Empty."""\n')
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])
    assert "_draft" not in methods.names() and "empty" in methods.names()
    with pytest.raises(InputError, match="defines 0 Adapter classes"):
        methods.get("empty")
    with pytest.raises(InputError, match='unknown method "_draft"'):
        methods.get("_draft")


def test_adapt_works_on_any_module_with_linears():
    class Two(Module):
        def __init__(self):
            rng = np.random.default_rng(0)
            self.first, self.second = Linear(rng.normal(size=(5, 4))), Linear(rng.normal(size=(3, 5)))

        def __call__(self, x):
            return self.second(self.first(x).tanh())

    model, x = Two(), Tensor(np.ones((2, 4)))
    before = model(x).data
    adapt(model, "lora", ["second"], verbose=False, r=2)
    assert np.array_equal(model(x).data, before)  # B = 0: it starts as the base model
