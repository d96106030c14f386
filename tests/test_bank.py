"""Several adapters on one base model: each is as if it were alone, the base is never touched, and a sum is a sum."""

import re
import sys

import numpy as np
import pages
import pytest
import standin_cupy

from minilora import AdamW, Adapters, InputError, adapt, merge, merge_and_unload, methods, unload, unmerge
from minilora.adapter import AdaptedLinear
from minilora.backend import to_host
from minilora.engine import no_grad
from minilora.files.base import fingerprint
from minilora.files.checkpoint import load_adapter, save_adapter
from minilora.files.peft import load_peft, save_peft
from minilora.gpt import GPT, GPTConfig
from minilora.surgery import adapted_layers, linear_layers
from minilora.training.trainer import train

METHODS = methods.names()
SUMMANDS = [n for n in METHODS if n not in ("full", "dora", "dora_detached", "pissa", "delta_lora")]

CONFIG = GPTConfig(vocab_size=11, n_positions=8, n_embd=16, n_layer=2, n_head=2)
IDS = np.random.default_rng(0).integers(0, 11, (2, 6))
QV = {"target_modules": ["q", "v"], "verbose": False}
PAGE = pages.read("adapters.md")


def base(dtype=np.float32, seed=0) -> GPT:
    """A model whose every array is random: gains and biases too."""
    model, rng = GPT(CONFIG, seed, dtype), np.random.default_rng(seed)
    for _, p in model.named_parameters():
        p.data[:] = rng.normal(0.0, 0.3, p.shape)
    return model


def options_of(name, **options):
    return {"verbose": False, **methods.known(name, **{"r": 2, **options})}


def optimizer_of(model):
    return AdamW(model.trainable(), lr=0.01)


def learn(model, optimizer=None, steps=2):
    train(model, optimizer or optimizer_of(model), [(IDS, IDS[:, ::-1])] * steps, steps, floor=1.0, progress=False)


def bank_of(adapters: dict, dtype=np.float64):
    """Adapters with random trained arrays: {name: (method, options)}."""
    bank = Adapters(base(dtype))
    for i, (name, (method, options)) in enumerate(adapters.items()):
        bank.add(name, method, **{"verbose": False, "seed": i, **options})
        rng = np.random.default_rng(i)
        for p in bank.model.trainable().values():
            p.data[:] = rng.standard_normal(p.shape)
    return bank


def logits(model):
    with no_grad():
        return np.array(to_host(model(IDS).data))


def assert_computes(model, expected, tolerance=0.0):
    np.testing.assert_allclose(logits(model), expected, rtol=tolerance, atol=tolerance)


def arrays_of(module) -> dict:
    """The bytes of each array, by name."""
    return {name: to_host(p.data).tobytes() for name, p in module.named_parameters()}


def state(bank):
    """All that a call that fails could have changed."""
    model = bank.model
    modules, shared = dict(model.named_modules()), vars(model).get("shared")
    return list(bank), bank.active, modules, list(model.trainable()), shared, arrays_of(model)


def merged_weights(model) -> dict:
    """The weight that each linear layer of the base model comes to, in float64."""
    weights = {path: to_host(linear.W.data) for path, linear in linear_layers(model).items() if ".base" not in path}
    for path, layer in adapted_layers(model).items():
        weights[path] = to_host(layer.method.merge(layer.base.W.data, layer.p))
    assert len(weights) == 12
    return {path: np.array(W, np.float64) for path, W in sorted(weights.items())}


# ------------------------------------------------------------------------------------------ switching, and the base


@pytest.mark.parametrize("name", METHODS)
def test_each_adapter_is_as_if_it_were_alone(name):
    """Three adapters trained in turns, each by an optimizer of its own: bit for bit a model that has one adapter."""
    bank, optimizers = Adapters(base()), {}
    adapters = {
        "first": (name, options_of(name, start_step=0)),
        "second": ("lora", {"r": 3, **QV}),
        "third": (name, {**options_of(name, r=3), **QV, "seed": 1}),
    }
    alone = {key: adapt(base(), method, **options) for key, (method, options) in adapters.items()}
    kept = {key: optimizer_of(model) for key, model in alone.items()}
    for key in (*adapters, "first", "second", "first"):
        if key not in bank:
            bank.add(key, adapters[key][0], **adapters[key][1])
            optimizers[key] = optimizer_of(bank.model)
        bank.use(key)
        learn(bank.model, optimizers[key], steps=1)
        learn(alone[key], kept[key], steps=1)
    for key, model in alone.items():
        bank.use(key)
        assert_computes(bank.model, logits(model))
    bank.use(None)
    assert arrays_of(bank.model) == arrays_of(base())


def test_the_base_weights_are_in_memory_once():
    model = base()
    before = {path: linear.W.data for path, linear in linear_layers(model).items()}
    bank = Adapters(model)
    for name in ("lora", "vera", "pissa"):
        bank.add(name, name, **options_of(name))
        for path, layer in adapted_layers(model).items():
            assert layer.original is before[path]
            assert (layer.base.W.data is before[path]) == (name != "pissa")  # PiSSA changes W, in a copy
    bank.use(None)
    assert all(linear.W.data is before[path] for path, linear in linear_layers(model).items())


def test_names_the_active_adapter_and_what_it_trains():
    bank = Adapters(base())
    assert list(bank) == [] and bank.active is None and not bank.model.trainable()
    for name, target in (("a", "q"), ("b", "v")):
        bank.add(name, "pissa", [target], verbose=False, r=2)
    assert list(bank) == ["a", "b"] and bank.active == "b" and "a" in bank and "c" not in bank
    assert set(bank.model.trainable()) == {f"blocks.{i}.v.arrays.{a}" for i in (0, 1) for a in "AB"}
    bank.use("a")
    assert bank.active == "a" and list(adapted_layers(bank.model)) == ["blocks.0.q", "blocks.1.q"]
    bank.remove("b")
    assert list(bank) == ["a"] and bank.active == "a"
    bank.remove("a")
    assert list(bank) == [] and bank.active is None and not adapted_layers(bank.model)
    with pytest.raises(InputError, match="nothing to train"):
        optimizer_of(bank.model)
    bank.add("a", "lora", r=2, **QV)  # the name is free again
    assert bank.active == "a"


def test_shared_arrays_go_with_their_adapter():
    bank = bank_of({f"key {key}": ("vera", {"r": 4, "projection_prng_key": key, **QV}) for key in (1, 2)})
    second = bank.model.shared
    bank.use("key 1")
    assert not np.array_equal(to_host(bank.model.shared.A.data), to_host(second.A.data))
    assert {f"shared.{a}" for a in "AB"} <= {name for name, _ in bank.model.named_parameters()}
    bank.use("key 2")
    assert bank.model.shared is second
    bank.use(None)
    assert not hasattr(bank.model, "shared")


@pytest.mark.parametrize("name", ["lora", "pissa", "vera", "full"])
def test_disabled_is_the_base_bit_for_bit_and_then_the_same_adapter_again(name):
    bank = bank_of({"a": (name, options_of(name))}, np.float32)
    with_adapter = logits(bank.model)
    assert not np.array_equal(with_adapter, logits(base()))
    with bank.disabled():
        with bank.disabled():
            assert bank.active is None
        assert_computes(bank.model, logits(base()))
    assert bank.active == "a"
    assert_computes(bank.model, with_adapter)
    with pytest.raises(ZeroDivisionError), bank.disabled():
        _ = 1 / 0
    assert_computes(bank.model, with_adapter)
    with bank.disabled():
        bank.add("b", "lora", r=2, **QV)
    assert bank.active == "a"
    with bank.disabled():
        bank.remove("a")
    assert bank.active is None


# --------------------------------------------------------------------------------------------------------- merging


def test_a_merged_adapter_comes_back_merged_and_the_others_are_not():
    bank = bank_of({name: ("lora", {"r": 2, **QV}) for name in "ab"}, np.float32)
    before = logits(bank.model)
    merge(bank.model)
    bank.use("a")
    learn(bank.model)  # a merged model would refuse
    bank.use("b")
    assert_computes(bank.model, before, 1e-4)
    with pytest.raises(RuntimeError, match="unmerge"):
        learn(bank.model)
    with bank.disabled():
        assert_computes(bank.model, logits(base()))
    unmerge(bank.model)
    assert_computes(bank.model, before)


@pytest.mark.parametrize("name", ["pissa", "delta_lora", "vera"])
@pytest.mark.parametrize("end", [unload, merge_and_unload])
def test_unloading_ends_the_bank(name, end):
    bank = Adapters(base())
    bank.add("other", "lora", r=2, **QV)
    bank.add("a", name, **options_of(name, start_step=0))
    learn(bank.model)
    expected, tolerance = (logits(base()), 0.0) if end is unload else (logits(bank.model), 1e-4)
    model = end(bank.model)
    for use in (lambda: bank.use("other"), lambda: bank.use(None), lambda: bank.add("c", "lora", r=2, **QV)):
        with pytest.raises(InputError, match=r"make a new Adapters\(model\)"):
            use()
    assert_computes(model, expected, tolerance)
    again = Adapters(model)
    again.add("a", "lora", r=2, **QV)
    with again.disabled():
        assert_computes(model, expected, tolerance)


# ------------------------------------------------------------------------------------------------------------- sums


def true_sum(bank, weights) -> dict:
    """W + Σ w (merged W − W) in float64, by path."""
    bank.use(None)
    W = merged_weights(bank.model)
    total = {path: array.copy() for path, array in W.items()}
    for name, w in weights.items():
        bank.use(name)
        for path, merged in merged_weights(bank.model).items():
            total[path] += w * (merged - W[path])
    return total


def assert_is_the_sum(bank, weights, tolerance=1e-12, expected=None, name="sum"):
    expected = expected or true_sum(bank, weights)
    bank.combine(name, weights)
    assert bank.active == name
    for path, found in merged_weights(bank.model).items():
        assert np.linalg.norm(found - expected[path]) <= tolerance * np.linalg.norm(expected[path]), path


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-12), (np.float32, 1e-6)], ids=["float64", "float32"])
@pytest.mark.parametrize("name", SUMMANDS)
def test_a_combination_is_the_weighted_sum_of_the_updates(name, dtype, tolerance):
    bank = bank_of({"a": (name, methods.known(name, r=3)), "b": ("lora", {"r": 4, "alpha": 5.0})}, dtype)
    assert_is_the_sum(bank, {"a": 0.7, "b": -0.3}, tolerance)
    assert all(p.dtype == dtype for p in bank.model.trainable().values())


def test_a_sum_over_different_layers_and_ranks_and_a_sum_of_sums():
    """Layers that one, two or none of the summands adapt, one of them merged; ranks, factors, all kinds of weights."""
    bank = bank_of(
        {
            "a": ("lora", {"r": 2, "alpha": 7.0, "target_modules": ["q", "up"]}),
            "b": ("rslora", {"r": 5, "target_modules": ["q", "v"]}),
            "c": ("lora", {"r": 1, "target_modules": ["blocks.1.q"]}),
            "unused": ("full", {"target_modules": ["o"]}),
            "d": ("vera", {"r": 3, "target_modules": ["up", "down"]}),
        }
    )
    bank.use("a")
    merge(bank.model)
    weights = {"a": 0.5, "b": -2, "c": np.float32(1.5), "d": 0}
    twice = true_sum(bank, {name: 2.0 * w + (name == "a") for name, w in weights.items()})
    assert_is_the_sum(bank, weights)
    layers = adapted_layers(bank.model)
    assert {path: layer.method.r for path, layer in layers.items()} == {
        **{"blocks.0.q": 7, "blocks.0.v": 5, "blocks.0.up": 5, "blocks.0.down": 3},
        **{"blocks.1.q": 8, "blocks.1.v": 5, "blocks.1.up": 5, "blocks.1.down": 3},
    }
    assert all(layer.method.scaling == 1.0 for layer in layers.values())
    assert_is_the_sum(bank, {"sum": 2.0, "a": 1.0}, expected=twice, name="again")


@pytest.mark.parametrize("ranks", [(8, 7), (8, 8), (8, 9), (16, 16)])
def test_ranks_above_the_layer_s_are_cut_to_it_and_the_sum_is_as_exact(ranks):
    """Every layer here is at least 16 wide and high: above that, the sum is stored as a product with the identity."""
    bank = bank_of({str(i): ("lora", {"r": r}) for i, r in enumerate(ranks)})
    assert_is_the_sum(bank, {"0": 0.7, "1": -0.3})
    assert {layer.method.r for layer in adapted_layers(bank.model).values()} == {min(16, sum(ranks))}


@pytest.mark.parametrize("r", [3, 12])
def test_a_combination_is_an_adapter_of_its_own(tmp_path, r):
    """It is saved, loaded and trained; its summands do not move with it, and may be removed."""
    bank = bank_of({"b": ("vera", {"r": 5, "target_modules": ["q"]}), "a": ("lora", {"r": r})}, np.float32)
    summand = bank.model.blocks[0].q
    before = arrays_of(summand)
    bank.combine("sum", {"a": 0.7, "b": -0.3})
    save_adapter(tmp_path / "sum.safetensors", bank.model, fingerprint(base()))
    expected = logits(bank.model)
    assert_computes(load_adapter(tmp_path / "sum.safetensors", base()), expected)
    learn(bank.model)
    assert not np.array_equal(logits(bank.model), expected) and arrays_of(summand) == before
    bank.load("loaded", tmp_path / "sum.safetensors")
    bank.remove("a")
    assert_computes(bank.model, expected)


@pytest.mark.parametrize("name", ["pissa", "delta_lora"])
def test_what_moves_the_base_is_added_up_as_the_lora_that_the_error_speaks_of(tmp_path, name):
    bank = bank_of({"a": (name, {"r": 2, "target_modules": ["q", "up"]})}, np.float32)
    learn(bank.model)
    expected = logits(bank.model)
    save_peft(tmp_path / "peft", bank.model, form="lora", names="minilora")
    save_adapter(tmp_path / "lora.safetensors", load_peft(tmp_path / "peft", base()), fingerprint(base()))
    bank.load("b", tmp_path / "lora.safetensors")
    bank.combine("sum", {"b": 1.0})
    assert_computes(bank.model, expected, 1e-4)


def test_weighing_a_and_b_apart_is_another_thing():
    """The formula of PEFT's combination_type="linear", A = Σ ±√|w s| A_i and B = Σ √|w s| B_i: (Σ B_i)(Σ A_j) has the
    cross terms B_i A_j. For two adapters that have nothing in common they are as large as the sum itself.
    """
    weights, bank = {"a": 0.7, "b": 0.3}, bank_of({n: ("lora", {"r": 4}) for n in "ab"})
    expected = true_sum(bank, weights)
    bank.use(None)
    W = merged_weights(bank.model)
    A, B = dict.fromkeys(W, 0.0), dict.fromkeys(W, 0.0)
    for name, w in weights.items():
        bank.use(name)
        for path, layer in adapted_layers(bank.model).items():
            root = np.sqrt(w * layer.method.scaling)
            A[path], B[path] = A[path] + root * to_host(layer.p.A), B[path] + root * to_host(layer.p.B)
    for path in W:
        update = expected[path] - W[path]
        assert 0.6 < np.linalg.norm(B[path] @ A[path] - update) / np.linalg.norm(update) < 1.2
    assert_is_the_sum(bank, weights, expected=expected)


# ------------------------------------------------------------------------------------------------------------ errors


def test_a_model_that_is_adapted_already():
    model = adapt(base(), "lora", r=2, **QV)
    before = arrays_of(model)
    with pytest.raises(InputError, match="adapted already; give the base model"):
        Adapters(model)
    assert arrays_of(model) == before and model.trainable()


CUT = r'"{}" \({}\) cannot be added up: its update is not a thin product'
MOVES = r'"{}" \({}\) cannot be added up: it moves the base weight too; make it a LoRA first'
FAILS = {
    "name taken, add": (lambda bank, _: bank.add("a", "lora", r=2), 'there is an adapter "a" already'),
    "name taken, load": (lambda bank, file: bank.load("a", file), 'there is an adapter "a" already'),
    "name taken, combine": (lambda bank, _: bank.combine("a", {"a": 1.0}), 'there is an adapter "a" already'),
    "empty name": (lambda bank, _: bank.add("", "lora", r=2), "the name '' cannot be used"),
    "no name": (lambda bank, _: bank.add(None, "lora", r=2), "the name None cannot be used"),
    "method": (lambda bank, _: bank.add("b", "lorra"), r'unknown method "lorra" \(did you mean "lora"\?\)'),
    "options twice": (lambda bank, _: bank.add("b", methods.create("lora", r=2), r=4), "r would be ignored"),
    "target": (lambda bank, _: bank.add("b", "lora", ["qq"], r=2), 'no linear layer is named "qq"'),
    "rank": (lambda bank, _: bank.add("b", "lora", r=17), "r=17 is larger than blocks.0.q allows"),
    "no file": (lambda bank, file: bank.load("b", file.parent / "none"), "none"),
    "another base": (lambda bank, file: bank.load("b", file), "was trained on another base model"),
    "use": (lambda bank, _: bank.use("pisa"), r'called "pisa" \(did you mean "pissa"\?\); there are a, p'),
    "use nothing": (lambda bank, _: bank.use(""), 'no adapter is called ""'),
    "remove": (lambda bank, _: bank.remove("A1"), 'no adapter is called "A1"'),
    "no weights": (lambda bank, _: bank.combine("b", {}), r"the weights must be a dict \{name: weight\}"),
    "no dict": (lambda bank, _: bank.combine("b", ["a"]), r"the weights must be a dict \{name: weight\}"),
    "unknown summand": (lambda bank, _: bank.combine("b", {"a": 1, "dorra": 1}), r'"dorra" \(did you mean "dora"'),
    "dora": (lambda bank, _: bank.combine("b", {"a": 1.0, "dora": 1.0}), CUT.format("dora", "dora")),
    "pissa": (lambda bank, _: bank.combine("b", {"pissa": 1.0}), MOVES.format("pissa", "pissa")),
    "delta": (lambda bank, _: bank.combine("b", {"a": 1.0, "delta": 1.0}), MOVES.format("delta", "delta_lora")),
    **{f"weight {w}": (lambda bank, _, w=w: bank.combine("b", {"a": w}),
                       re.escape(f'the weight of "a" is {w!r}; it must be a fin'))
       for w in (float("nan"), 10**400, 1e300, True, "1", None)},
}  # fmt: skip


@pytest.fixture(scope="module")
def full_bank():
    kinds = {"pissa": "pissa", "dora": "dora", "delta": "delta_lora"}
    return bank_of({"a": ("lora", {"r": 2}), **{n: (m, {"target_modules": ["q"]}) for n, m in kinds.items()}})


@pytest.fixture(scope="module")
def foreign_file(tmp_path_factory):
    """An adapter of another base model."""
    path, other = tmp_path_factory.mktemp("foreign") / "foreign.safetensors", base(seed=1)
    mark = fingerprint(other)
    save_adapter(path, adapt(other, "lora", r=2, **QV), mark)
    return path


@pytest.mark.parametrize("case", FAILS)
@pytest.mark.parametrize("active", ["pissa", None])
def test_what_fails_is_one_clear_error_and_changes_nothing(full_bank, foreign_file, case, active):
    call, message = FAILS[case]
    full_bank.use(active)
    before = state(full_bank)
    with pytest.raises(InputError, match=message):
        call(full_bank, foreign_file)
    assert state(full_bank) == before


@pytest.mark.parametrize("name", ["lora", "pissa", "vera"])
@pytest.mark.parametrize("active", ["a", None])
def test_an_adapter_that_is_interrupted_half_way_is_taken_out_again(monkeypatch, name, active):
    bank = bank_of({"a": ("pissa", {"r": 2})})
    bank.use(active)
    before, original = state(bank), AdaptedLinear.__init__

    def interrupted(self, *args):
        original(self, *args)
        if len(adapted_layers(bank.model)) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(AdaptedLinear, "__init__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bank.add("b", name, **options_of(name))
    assert state(bank) == before
    bank.use(None)
    assert_computes(bank.model, logits(base(np.float64)))


# ------------------------------------------------------------------------------------------------------------ device


@pytest.mark.parametrize("active", ["pissa", "vera", None])
def test_where_the_model_goes_its_adapters_follow(monkeypatch, active):
    """model.to() moves what is in the model; what rests comes when it is used, and one array stays one."""
    monkeypatch.setitem(sys.modules, "cupy", standin_cupy.module())
    bank = bank_of({"lora": ("lora", QV), "pissa": ("pissa", {"r": 2}), "vera": ("vera", QV)}, np.float32)
    expected = {}
    for name in (*bank, None):
        bank.use(name)
        expected[name] = logits(bank.model)
    bank.use(active)
    bank.model.to("cuda")
    bank.combine("sum", {"lora": 1.0, "vera": 1.0})
    bank.remove("sum")
    for name in (*bank, None):
        bank.use(name)
        assert_computes(bank.model, expected[name], 1e-5)
        for path, layer in adapted_layers(bank.model).items():
            there = [layer.original, layer.base.W.data, layer.base.b.data, *layer.p.values()]
            assert {type(array).__module__.partition(".")[0] for array in there} == {"cupy"}
            assert layer.original is bank.linears[path].W.data
            assert (layer.base.W.data is layer.original) == (name != "pissa")


# -------------------------------------------------------------------------------------------------------- the page


def test_the_page_s_code_prints_what_it_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pages.run(PAGE, "adapters.md")


def test_the_page_names_every_method_that_can_be_added_up():
    """The list on the page, from the methods themselves."""
    listed = re.search(r"<!-- summands -->(.*?)<!-- /summands -->", PAGE, re.DOTALL)[1]
    assert set(re.findall(r"`(\w+)`", listed)) == set(SUMMANDS)
    for name in set(METHODS) - set(SUMMANDS):  # the others are added up above
        bank = bank_of({"a": (name, methods.known(name, r=2))})
        with pytest.raises(InputError, match="cannot be added up"):
            bank.combine("sum", {"a": 1.0})
