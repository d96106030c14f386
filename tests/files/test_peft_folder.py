"""Adapters travel to PEFT's files and back as the same function, and a file that cannot be honoured is one clear error.

PEFT itself is the judge in oracle/test_peft_files.py; here its files are made by hand, and NumPy is all that is needed.
"""

import errno
import json
import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from untouched import assert_untouched, state

from minilora import methods
from minilora.cli import main
from minilora.engine import no_grad
from minilora.errors import AdapterFormatError, InputError
from minilora.files import tensorfile as files
from minilora.files.base import fingerprint, load_base, save_model
from minilora.files.checkpoint import load_adapter, save_adapter
from minilora.files.gpt2 import load_gpt2
from minilora.files.peft import load_peft, save_peft, short_names
from minilora.files.peft_config import endings
from minilora.gpt import GPT, GPTConfig
from minilora.nn import Linear, Module
from minilora.surgery import adapt, adapted_layers, host, merge_and_unload, plan, unload
from minilora.training.trainer import train
from minilora.training.optim import AdamW

TINY = GPTConfig(vocab_size=11, n_positions=8, n_embd=16, n_layer=2, n_head=2)
IDS = np.random.default_rng(0).integers(0, 11, (2, 6))
GPT2 = "base_model.model.transformer."
THIN = [name for name in methods.names() if name not in ("full", "dora", "dora_detached")]


def base(seed=0, dtype=np.float32) -> GPT:
    """A model whose every array is random: gains and biases too."""
    model, rng = GPT(TINY, seed, dtype), np.random.default_rng(seed)
    for _, p in model.named_parameters():
        p.data[:] = rng.normal(0.0, 0.3, p.shape)
    return model


def trained(name, targets="all-linear", steps=4, model=None, rank_pattern=None, alpha_pattern=None, **options) -> GPT:
    options = methods.known(name, **{"r": 2, "start_step": 1, **options})
    model = adapt(model or base(), name, targets, 0, False, rank_pattern, alpha_pattern, **options)
    rate = 0.3 if name == "vera" else 0.02
    train(model, AdamW(model.trainable(), lr=rate), iter([(IDS, IDS[:, ::-1])] * steps), steps, progress=False)
    return model


def logits(model):
    with no_grad():
        return model(IDS).data


def assert_same_function(one, other, tolerance=1e-6):
    one, other = logits(one), logits(other)
    assert np.abs(one - other).max() <= tolerance * np.abs(other).max()


def tensors_of(folder):
    return load_file(folder / "adapter_model.safetensors")


def config_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def assert_same_tensors(one, other):
    one, other = tensors_of(one), tensors_of(other)
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype and one[name].tobytes() == other[name].tobytes(), name


# ------------------------------------------------------------------------------------------------------- there and back

TARGETS = {
    "all": {},
    "q and v": {"targets": ["q", "v"]},
    "down": {"targets": ["down"]},
    "ranks of their own": {"rank_pattern": {"blocks.0.q": 3, "up": 1}, "alpha_pattern": {"k": 4.0, "blocks.1.o": 8.0}},
}


@pytest.mark.parametrize("names", ["gpt2", "minilora"])
@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("name", [name for name in methods.names() if name not in ("full", "vera")])
def test_there_and_back_is_the_same_function(tmp_path, name, targets, names):
    model = trained(name, **TARGETS[targets])
    before = state(model)
    save_peft(tmp_path, model, names=names)
    assert_untouched(model, before)
    loaded = load_peft(tmp_path, base())
    assert_same_function(loaded, model)
    assert np.abs(logits(model) - logits(base())).max() > 1e-3  # the adapter does something
    np.testing.assert_array_equal(logits(unload(loaded)), logits(base()))


@pytest.mark.parametrize("names, targets", [("minilora", "all"), ("minilora", "q and v"), ("gpt2", "down")])
def test_vera_there_and_back(tmp_path, names, targets):
    model = trained("vera", r=5, **TARGETS[targets])
    save_peft(tmp_path, model, names=names)
    assert_same_function(load_peft(tmp_path, base()), model, 0.0)


@pytest.mark.parametrize("names", ["gpt2", "minilora"])
@pytest.mark.parametrize("name", THIN)
def test_any_thin_update_as_lora(tmp_path, name, names):
    model = trained(name)
    config = save_peft(tmp_path, model, form="lora", names=names)
    assert config["peft_type"] == "LORA" and not config["use_rslora"] and not config["use_dora"]
    loaded = load_peft(tmp_path, base())
    assert {layer.method.name for layer in adapted_layers(loaded).values()} == {"lora"}
    assert_same_function(loaded, model)


@pytest.mark.parametrize("name", methods.names())
def test_any_method_merged(tmp_path, name):
    model = trained(name)
    before = state(model)
    save_peft(tmp_path, model, form="merged")
    assert_untouched(model, before)
    merged = load_gpt2(tmp_path)
    np.testing.assert_array_equal(logits(merged), logits(merge_and_unload(model)))


@pytest.mark.parametrize("name", ["full", "dora", "dora_detached"])
def test_what_is_no_thin_product_is_not_written_as_lora(tmp_path, name):
    with pytest.raises(InputError, match=rf'the update of {name} is no thin product.*form="merged"'):
        save_peft(tmp_path / "new", trained(name), form="lora")
    assert not (tmp_path / "new").exists()


def test_a_change_of_a_higher_rank_is_not_cut_off(tmp_path):
    """Delta-LoRA's and PiSSA's changes have rank 2 r; were the base moved in another way, the file would lie."""
    model = trained("pissa", ["q"])
    model.blocks[1].q.base.W.data[0] += np.linspace(1.0, 2.0, 16, dtype=np.float32)
    model.blocks[1].q.base.W.data[1] += np.linspace(1.0, -2.0, 16, dtype=np.float32)
    with pytest.raises(InputError, match=r"the change of blocks.1.q by pissa has a higher rank than 4"):
        save_peft(tmp_path / "new", model)
    assert not (tmp_path / "new").exists()


def test_a_new_adapter_starts_as_the_base_model_there_too(tmp_path):
    save_peft(tmp_path, adapt(base(), "lora", r=2, verbose=False))
    np.testing.assert_array_equal(logits(load_peft(tmp_path, base())), logits(base()))


HALF = '''"""Half of LoRA."""

from dataclasses import dataclass

from .lora import LoRA


@dataclass(frozen=True)
class Half(LoRA):
{own}
    def factors(self, W, p):
        return 0.5 * self.scaling * p.B, p.A
'''


@pytest.fixture
def half(tmp_path, monkeypatch):
    """Adds a method to the folder that inherits from LoRA and merges something else; ``own`` is a line of its file."""
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])

    def write(own=""):
        (tmp_path / "half.py").write_text(HALF.format(own=own))
        return trained("half", r=3)

    yield write
    sys.modules.pop("minilora.methods.half", None)


def test_a_method_that_inherits_is_not_taken_for_its_parent(half, tmp_path):
    model = half()
    save_peft(tmp_path / "out", model)
    written, layer = tensors_of(tmp_path / "out"), adapted_layers(model)["blocks.0.up"]
    A, B = (written[f"{GPT2}h.0.mlp.c_fc.lora_{name}.weight"] for name in "AB")
    np.testing.assert_allclose(B @ A, 0.5 * layer.method.scaling * layer.p.B @ layer.p.A, rtol=1e-5, atol=1e-7)


def test_a_method_says_in_its_own_file_what_peft_calls_it(half, tmp_path):
    config = save_peft(tmp_path / "out", half('    peft = {"peft_type": "LORA", "use_rslora": True}'))
    assert config["use_rslora"] and config["r"] == 3
    loaded = load_peft(tmp_path / "out", base())
    assert {layer.method.name for layer in adapted_layers(loaded).values()} == {"rslora"}


def test_each_kind_of_file_comes_back_as_one_method():
    own = [vars(methods.get(name)) for name in methods.names()]
    said = {json.dumps(of["peft"]) for of in own if "peft" in of}
    assert len(said) == 5
    assert sorted(said) == sorted(json.dumps(of["peft"]) for of in own if of.get("from_peft"))


def test_delta_loras_file_has_rank_2_r_and_its_control_its_own_alpha(tmp_path):
    save_peft(tmp_path / "delta", trained("delta_lora", ["up"], r=3))
    save_peft(tmp_path / "control", trained("delta_lora_control", ["up"], r=3, alpha=5.0, update_ratio=2.0))
    assert config_of(tmp_path / "delta")["r"] == 6
    assert (config_of(tmp_path / "control")["r"], config_of(tmp_path / "control")["lora_alpha"]) == (3, 15)


def test_a_float64_model_keeps_its_precision(tmp_path):
    model = trained("rslora", model=base(dtype=np.float64))
    save_peft(tmp_path, model)
    assert_same_function(load_peft(tmp_path, base(dtype=np.float64)), model, 1e-14)


class Two(Module):
    """No GPT: two layers, by names of its own."""

    def __init__(self):
        rng = np.random.default_rng(0)
        self.one, self.other = (Linear(rng.normal(size=s).astype(np.float32)) for s in ((6, 5), (4, 6)))


def test_a_model_that_is_no_gpt_goes_by_its_own_names(tmp_path):
    model = adapt(Two(), "lora", r=2, verbose=False)
    model.other.p.B[:] = 1.0
    with pytest.raises(InputError, match='use names="minilora"'):
        save_peft(tmp_path, model)
    save_peft(tmp_path, model, names="minilora")
    loaded = load_peft(tmp_path, Two())
    np.testing.assert_array_equal(loaded.other.p.B, model.other.p.B)
    np.testing.assert_array_equal(loaded.one.p.A, model.one.p.A)


# --------------------------------------------------------------------------------------------- what the files look like


def test_three_layers_in_one_are_blocks(tmp_path):
    """q and v have A of their own: PEFT's c_attn gets both, B is zero off the blocks and for k, and alpha / r stays."""
    model = trained("lora", ["q", "v"], r=2, alpha=3.0)
    save_peft(tmp_path, model)
    found, config, q, v = tensors_of(tmp_path), config_of(tmp_path), model.blocks[1].q.p, model.blocks[1].v.p
    A, B = (found[f"{GPT2}h.1.attn.c_attn.lora_{x}.weight"] for x in "AB")
    np.testing.assert_array_equal(A, np.concatenate([q.A, v.A]))
    np.testing.assert_array_equal(B[:16, :2], q.B)
    np.testing.assert_array_equal(B[32:, 2:], v.B)
    assert not B[16:32].any() and not B[:16, 2:].any() and not B[32:, :2].any()
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (4, 6, ["c_attn"])
    assert config["rank_pattern"] == config["alpha_pattern"] == {}


def test_three_layers_of_many_ranks_have_no_more_than_their_inputs(tmp_path):
    """r = 6 of q, k and v would be 18 rows of A for 16 inputs; the product of 16 is the same."""
    model = trained("dora", ["q", "k", "v"], r=6)
    save_peft(tmp_path, model)
    assert (config_of(tmp_path)["r"], config_of(tmp_path)["lora_alpha"]) == (16, 16)
    assert_same_function(load_peft(tmp_path, base()), model)


def test_layers_with_one_a_keep_it(tmp_path):
    model = trained("lora", ["q", "k"])
    for block in model.blocks:
        block.k.p.A[:] = block.q.p.A
    save_peft(tmp_path, model)
    found = tensors_of(tmp_path)
    np.testing.assert_array_equal(found[f"{GPT2}h.0.attn.c_attn.lora_A.weight"], model.blocks[0].q.p.A)
    np.testing.assert_array_equal(found[f"{GPT2}h.0.attn.c_attn.lora_B.weight"][16:32], model.blocks[0].k.p.B)
    assert (config_of(tmp_path)["r"], config_of(tmp_path)["lora_alpha"]) == (2, 16)
    assert_same_function(load_peft(tmp_path, base()), model)


def test_layers_with_one_a_and_other_alphas_have_them_in_b(tmp_path):
    model = trained("lora", ["q", "k"], alpha_pattern={"k": 4.0})
    for block in model.blocks:
        block.k.p.A[:] = block.q.p.A
    save_peft(tmp_path, model)
    found = tensors_of(tmp_path)[f"{GPT2}h.0.attn.c_attn.lora_B.weight"]
    np.testing.assert_array_equal(found[16:32], model.blocks[0].k.p.B / 4)
    assert_same_function(load_peft(tmp_path, base()), model)


def test_doras_magnitude_of_a_layer_that_has_none_is_its_row_norms(tmp_path):
    model = trained("dora", ["q"])
    save_peft(tmp_path, model)
    m = tensors_of(tmp_path)[f"{GPT2}h.1.attn.c_attn.lora_magnitude_vector"]
    np.testing.assert_array_equal(m[:16], model.blocks[1].q.p.m)
    np.testing.assert_allclose(m[32:], np.linalg.norm(model.blocks[1].v.W.data, axis=1), rtol=1e-6)


def test_the_configuration_is_pefts(tmp_path):
    model = trained("rslora", ["q", "o", "down"], rank_pattern={"blocks.0.down": 3}, alpha_pattern={"o": 5.5})
    returned = save_peft(tmp_path, model, base="gpt2")
    config = config_of(tmp_path)
    assert config == returned
    assert config["target_modules"] == ["c_attn", "c_proj"]
    assert (config["r"], config["rank_pattern"]) == (2, {"0.mlp.c_proj": 3})
    assert (config["lora_alpha"], config["alpha_pattern"]) == (16, {"attn.c_proj": 5.5})
    assert type(config["lora_alpha"]) is int  # as PEFT declares it; 5.5 above is a float where it has to be
    assert config["use_rslora"] is True and config["use_dora"] is False and config["fan_in_fan_out"] is True
    assert (config["bias"], config["task_type"], config["base_model_name_or_path"]) == ("none", "CAUSAL_LM", "gpt2")
    assert list(config) == sorted(config)
    with safe_open(tmp_path / "adapter_model.safetensors", framework="numpy") as file:
        assert file.metadata()["format"] == "pt"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_names_are_as_short_as_they_can_be_and_no_shorter(tmp_path):
    save_peft(tmp_path, trained("lora", ["o", "blocks.1.down", "up"]))
    assert config_of(tmp_path)["target_modules"] == ["attn.c_proj", "c_fc", "1.mlp.c_proj"]


paths = st.lists(st.sampled_from("ab01"), min_size=1, max_size=4).map(".".join)


@given(st.sets(paths, min_size=1, max_size=8), st.data())
@settings(max_examples=100, deadline=None)
def test_short_names_select_exactly_what_was_chosen(among, data):
    among = sorted(among)
    chosen = data.draw(st.sets(st.sampled_from(among), min_size=1))
    names = set(short_names(chosen, among)) if is_possible(chosen, among) else chosen
    assert {path for path in among if not names.isdisjoint(endings(path))} >= chosen
    if is_possible(chosen, among):
        assert {path for path in among if not names.isdisjoint(endings(path))} == chosen


def is_possible(chosen, among):
    """A path that ends in another one cannot be left out where that one is chosen."""
    return all(other in chosen for path in chosen for other in among if path in endings(other))


# --------------------------------------------------------------------------------------------------- files made by hand


def hand_made(
    folder, config, seed=0, modules=("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"), prefix=GPT2, ranks=None
):
    """A file as PEFT writes it, with random tensors: what a c_attn has is one A for q, k and v."""
    rng, r, tensors = np.random.default_rng(seed), config["r"], {}
    shapes = {"attn.c_attn": (48, 16), "attn.c_proj": (16, 16), "mlp.c_fc": (64, 16), "mlp.c_proj": (16, 64)}
    draw = lambda *shape: rng.normal(0.0, 0.3, shape).astype(np.float32)
    for i in range(2):
        for module in modules:
            (d_out, d_in), at = shapes[module], f"{prefix}h.{i}.{module}"
            own = (ranks or {}).get(f"h.{i}.{module}", r)
            if config["peft_type"] == "VERA":
                tensors |= {f"{at}.vera_lambda_b": draw(d_out), f"{at}.vera_lambda_d": draw(r)}
            else:
                tensors |= {f"{at}.lora_A.weight": draw(own, d_in), f"{at}.lora_B.weight": draw(d_out, own)}
                if config.get("use_dora"):
                    tensors[f"{at}.lora_magnitude_vector"] = 1.0 + draw(d_out)
    if config["peft_type"] == "VERA" and config.get("save_projection", True):
        widest = [max(shapes[module][k] for module in modules) for k in (0, 1)]
        tensors |= {"base_model.vera_A": draw(r, widest[1]), "base_model.vera_B": draw(widest[0], r)}
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return tensors


LORA = {"peft_type": "LORA", "r": 3, "lora_alpha": 5, "target_modules": ["c_attn", "c_proj", "c_fc"]}
VERA = {"peft_type": "VERA", "r": 3, "target_modules": ["c_attn", "c_proj", "c_fc"], "projection_prng_key": 7}
BY_HAND = {
    "lora": (LORA, "lora"),
    "rslora": (LORA | {"use_rslora": True}, "rslora"),
    "dora": (LORA | {"use_dora": True}, "dora_detached"),
    "vera": (VERA, "vera"),
}


@pytest.mark.parametrize("kind", BY_HAND)
def test_the_tensors_of_an_imported_file_are_written_to_the_byte(tmp_path, kind):
    config, name = BY_HAND[kind]
    hand_made(tmp_path / "theirs", config)
    model = load_peft(tmp_path / "theirs", base())
    assert {layer.method.name for layer in adapted_layers(model).values()} == {name}
    save_peft(tmp_path / "again", model)
    assert_same_tensors(tmp_path / "theirs", tmp_path / "again")
    again = config_of(tmp_path / "again")
    assert {key: again[key] for key in config if key != "target_modules"} == {
        key: value for key, value in config.items() if key != "target_modules"
    }
    assert_same_function(load_peft(tmp_path / "again", base()), model, 0.0)


def layer_weight(found, at, rows, s):
    """W + s B A of one layer, from PEFT's tensors and PEFT's formula."""
    return lambda W: W + s * found[f"{at}.lora_B.weight"][rows] @ found[f"{at}.lora_A.weight"]


@pytest.mark.parametrize(
    "config, scalings",
    [
        (LORA, (5 / 3, 5 / 3)),
        (LORA | {"use_rslora": True}, (5 / 3**0.5, 5 / 3**0.5)),
        (LORA | {"alpha_pattern": {r"h\.0\.attn\.c_attn": 2.5, "c_fc": 9}}, (2.5 / 3, 5 / 3)),
        (LORA | {"alpha_pattern": {"attn.c_attn": 2, r"h\.0\.attn\.c_attn": 9}}, (2 / 3, 2 / 3)),
        (LORA | {"rank_pattern": {"h.1.attn.c_attn": 2}, "alpha_pattern": {"1.attn.c_attn": 1}}, (5 / 3, 1 / 2)),
    ],
    ids=["alpha over r", "over the root of r", "an alpha of its own", "two that fit", "a rank of its own"],
)
def test_the_scaling_is_pefts(tmp_path, config, scalings):
    found = hand_made(tmp_path, config, ranks=config.get("rank_pattern"))
    model, W = load_peft(tmp_path, base()), base()
    for i, s in enumerate(scalings):
        for layer, rows in {"q": slice(0, 16), "k": slice(16, 32), "v": slice(32, 48)}.items():
            ours = getattr(model.blocks[i], layer)
            theirs = layer_weight(found, f"{GPT2}h.{i}.attn.c_attn", rows, s)(getattr(W.blocks[i], layer).W.data)
            np.testing.assert_allclose(ours.method.merge(ours.base.W.data, ours.p), theirs, rtol=0, atol=1e-6)


def test_dora_with_the_root_of_r(tmp_path):
    """A method that has alpha / r gets alpha · √r."""
    hand_made(tmp_path, LORA | {"use_dora": True, "use_rslora": True})
    layer = load_peft(tmp_path, base()).blocks[1].up
    assert layer.method.name == "dora_detached" and layer.method.scaling == pytest.approx(5 / 3**0.5)


def test_layers_from_one_module_share_no_memory(tmp_path):
    hand_made(tmp_path, LORA)
    model = load_peft(tmp_path, base())
    model.blocks[0].q.p.A[:] = 0.0
    assert model.blocks[0].k.p.A.any()


def test_an_imported_adapter_trains_and_is_saved_as_any_other(tmp_path):
    for kind, (config, _) in BY_HAND.items():
        hand_made(tmp_path / kind, config)
        model = load_peft(tmp_path / kind, base())
        train(model, AdamW(model.trainable(), lr=0.01), iter([(IDS, IDS)] * 2), 2, progress=False)
        save_adapter(tmp_path / f"{kind}.safetensors", model, fingerprint(base()))
        loaded = load_adapter(tmp_path / f"{kind}.safetensors", base())
        np.testing.assert_array_equal(logits(loaded), logits(model))


def test_pissa_unconverted_stands_on_the_residual_of_the_module(tmp_path):
    """PEFT takes r singular directions of c_attn as a whole, and saves A and B alone."""
    found = hand_made(tmp_path, LORA | {"init_lora_weights": "pissa"})
    model, W = load_peft(tmp_path, base()), base()
    fused = np.concatenate([np.asarray(layer.W.data) for layer in (W.blocks[1].q, W.blocks[1].k, W.blocks[1].v)])
    U, sigma, Vt = np.linalg.svd(fused.astype(np.float64), full_matrices=False)
    residual = fused - (U[:, :3] * sigma[:3]) @ Vt[:3]
    update = 5 / 3 * found[f"{GPT2}h.1.attn.c_attn.lora_B.weight"] @ found[f"{GPT2}h.1.attn.c_attn.lora_A.weight"]
    v = model.blocks[1].v
    assert v.method.name == "pissa"
    np.testing.assert_allclose(v.method.merge(v.base.W.data, v.p), (residual + update)[32:], rtol=0, atol=2e-6)
    np.testing.assert_array_equal(logits(unload(model)), logits(base()))
    save_peft(tmp_path / "converted", load_peft(tmp_path, base()))
    assert_same_function(load_peft(tmp_path / "converted", base()), load_peft(tmp_path, base()))


def test_veras_layers_see_their_rows_of_b(tmp_path):
    found = hand_made(tmp_path, VERA)
    model, W = load_peft(tmp_path, base()), base()
    at = f"{GPT2}h.0.attn.c_attn"
    b, d, A, B = (
        found[n] for n in (f"{at}.vera_lambda_b", f"{at}.vera_lambda_d", "base_model.vera_A", "base_model.vera_B")
    )
    whole = (b[:, None] * B[:48] * d) @ A[:, :16]
    for layer, rows in {"q": slice(0, 16), "k": slice(16, 32), "v": slice(32, 48)}.items():
        ours = getattr(model.blocks[0], layer)
        theirs = getattr(W.blocks[0], layer).W.data + whole[rows]
        np.testing.assert_allclose(ours.method.merge(ours.base.W.data, ours.p), theirs, rtol=0, atol=1e-6)


def test_veras_matrices_come_from_the_key_where_the_file_has_none(tmp_path):
    """For the sizes of PEFT's modules: c_attn counts with all its 48 rows, and c_fc, which is wider, is not there."""
    config = VERA | {"save_projection": False, "target_modules": ["c_attn"]}
    hand_made(tmp_path / "theirs", config, modules=["attn.c_attn"])
    model = load_peft(tmp_path / "theirs", base())
    drawn = methods.create("vera", r=3, projection_prng_key=7).init_shared([(48, 16)], None)
    np.testing.assert_array_equal(model.shared.A.data, drawn["A"])
    np.testing.assert_array_equal(model.shared.B.data, drawn["B"])
    save_peft(tmp_path / "again", model, save_projection=False)
    assert_same_tensors(tmp_path / "theirs", tmp_path / "again")


def test_projections_that_are_not_the_keys_have_to_be_saved(tmp_path):
    hand_made(tmp_path, VERA)
    with pytest.raises(InputError, match="not those of the key; leave save_projection at True"):
        save_peft(tmp_path / "new", load_peft(tmp_path, base()), save_projection=False)
    assert not (tmp_path / "new").exists()


def test_names_without_transformer_in_front(tmp_path):
    """As saved from a GPT2Model."""
    hand_made(tmp_path / "one", LORA, prefix="base_model.model.")
    hand_made(tmp_path / "other", LORA)
    assert_same_function(load_peft(tmp_path / "one", base()), load_peft(tmp_path / "other", base()), 0.0)


TARGETED = {  # target_modules and the like: the modules that the file must then have
    "all-linear": ({"target_modules": "all-linear"}, ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")),
    "an ending": ({"target_modules": ["c_proj"]}, ("attn.c_proj", "mlp.c_proj")),
    "a longer ending": ({"target_modules": ["mlp.c_proj", "c_fc"]}, ("mlp.c_fc", "mlp.c_proj")),
    "an expression": ({"target_modules": r".*\.(c_attn|c_fc)"}, ("attn.c_attn", "mlp.c_fc")),
    "names that are not there": ({"target_modules": ["c_fc", "q_proj"]}, ("mlp.c_fc",)),
    "an exclusion": (
        {"target_modules": ["c_proj", "c_fc"], "exclude_modules": ["attn.c_proj"]},
        ("mlp.c_fc", "mlp.c_proj"),
    ),
    "an excluding expression": (
        {"target_modules": "all-linear", "exclude_modules": r".*\.mlp\..*"},
        ("attn.c_attn", "attn.c_proj"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TARGETED)
def test_which_modules_a_configuration_targets(tmp_path, case):
    changes, modules = TARGETED[case]
    hand_made(tmp_path, LORA | changes, modules=modules)
    ours = {"attn.c_attn": ["q", "k", "v"], "attn.c_proj": ["o"], "mlp.c_fc": ["up"], "mlp.c_proj": ["down"]}
    expected = {f"blocks.{i}.{layer}" for i in range(2) for module in modules for layer in ours[module]}
    assert set(adapted_layers(load_peft(tmp_path, base()))) == expected
    tensors = tensors_of(tmp_path)
    save_file({n: a for n, a in tensors.items() if "h.1." not in n}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(AdapterFormatError, match=r"h\.1\..*is missing"):
        load_peft(tmp_path, base())


@pytest.mark.parametrize("pattern", [None, "h", ["layers", "h"], []], ids=str)
@pytest.mark.parametrize("layers", [1, [1], [1, 5]], ids=str)
def test_a_configuration_for_some_layers(tmp_path, layers, pattern):
    found = hand_made(tmp_path, LORA | {"layers_to_transform": layers, "layers_pattern": pattern})
    with pytest.raises(AdapterFormatError, match=r"do not select transformer.h.0"):
        load_peft(tmp_path, base())
    save_file({n: a for n, a in found.items() if "h.1." in n}, tmp_path / "adapter_model.safetensors")
    assert {path.split(".")[1] for path in adapted_layers(load_peft(tmp_path, base()))} == {"1"}


@pytest.mark.parametrize("pattern", ["blocks", "h|x"])
def test_a_pattern_of_layers_that_leads_to_no_number_selects_none(tmp_path, pattern):
    """PEFT puts the pattern into an expression as it is: behind h there is then no number, only behind x."""
    hand_made(tmp_path, LORA | {"layers_to_transform": [0, 1], "layers_pattern": pattern})
    with pytest.raises(AdapterFormatError, match="do not select"):
        load_peft(tmp_path, base())


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_precisions_take_the_models(tmp_path, dtype):
    found = hand_made(tmp_path, LORA)
    save_file({n: a.astype(dtype) for n, a in found.items()}, tmp_path / "adapter_model.safetensors")
    model = load_peft(tmp_path, base())
    assert {p.dtype for _, p in model.named_parameters()} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(
        model.blocks[0].up.p.B, found[f"{GPT2}h.0.mlp.c_fc.lora_B.weight"].astype(dtype).astype(np.float32)
    )


def test_data_and_keys_that_are_off_change_nothing(tmp_path):
    hand_made(tmp_path / "one", LORA)
    newer = {"a_key_of_2030": None, "another": False, "a_map": {}, "a_list": [], "a_text": ""}
    data = {"lora_dropout": 0.5, "base_model_name_or_path": "/etc/passwd", "revision": "main", "peft_version": "9.9",
            "auto_mapping": {"base_model_class": "os.system", "parent_library": "os"}, "task_type": "CAUSAL_LM",
            "fan_in_fan_out": True, "inference_mode": False, "qalora_group_size": 16, "megatron_core": "os",
            "modules_to_save": [], "loftq_config": {}, "init_lora_weights": "gaussian"}  # fmt: skip
    hand_made(tmp_path / "other", LORA | newer | data)
    assert_same_function(load_peft(tmp_path / "other", base()), load_peft(tmp_path / "one", base()), 0.0)


# ------------------------------------------------------------------------------------------------------ what is refused

AT = f"{GPT2}h.1.attn.c_attn.lora_A.weight"


def configured(**changes):
    """A change of the configuration; ``...`` takes a key away."""

    def spoil(folder):
        config = {k: v for k, v in (config_of(folder) | changes).items() if v is not ...}
        (folder / "adapter_config.json").write_text(json.dumps(config))

    return spoil


def with_tensors(**changes):
    """A change of the tensors; None takes one away."""

    def spoil(folder):
        found = tensors_of(folder) | changes
        save_file({n: a for n, a in found.items() if a is not None}, folder / "adapter_model.safetensors")

    return spoil


def text(content, name="adapter_config.json"):
    return lambda folder: (folder / name).write_bytes(content)


def only_a_pickle(folder):
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def a_pair_of_two(folder):
    """Half of another export: what a copy that was cut short leaves."""
    save_peft(folder, trained("lora", r=2, alpha=4.0))
    save_peft(folder / "other", trained("lora", r=2, alpha=5.0))
    shutil.copy(folder / "other" / "adapter_config.json", folder)


NAN = np.full((3, 16), np.nan, np.float32)
BAD = {
    "no configuration": (lambda folder: (folder / "adapter_config.json").unlink(), "no such file; the adapter_config"),
    "no JSON": (text(b"{"), "the configuration is not JSON"),
    "a list": (text(b"[]"), "the configuration is not a map"),
    "a key twice": (text(b'{"r": 1, "r": 2}'), 'has the key "r" twice'),
    "too large": (text(b" " * (1 << 20) + b"{}"), "is larger than 1,048,576 bytes"),
    "no tensors": (lambda folder: (folder / "adapter_model.safetensors").unlink(), "no such file; the adapter_model"),
    "a pickle": (only_a_pickle, r"is a pickle.*save_pretrained\(\) writes adapter_model.safetensors"),
    "garbage": (text(b"no tensors at all", "adapter_model.safetensors"), "is not the adapter_model.safetensors"),
    "another kind": (configured(peft_type="IA3"), 'peft_type is "IA3"; supported: LORA, VERA'),
    "no kind": (configured(peft_type=...), "peft_type is null; supported"),
    "a list as kind": (configured(peft_type=["LORA"]), r'peft_type is \["LORA"\]; supported'),
    "no rank": (configured(r=...), "lacks r"),
    "no alpha": (configured(lora_alpha=...), "lacks lora_alpha"),
    "no targets": (configured(target_modules=...), "lacks target_modules"),
    "null as targets": (configured(target_modules=None), "target_modules is null; it must be text or a list"),
    "a rank of 0": (configured(r=0), "r is 0; it must be an integer of at least 1"),
    "true as rank": (configured(r=True), "r is true; it must be an integer"),
    "a rank as text": (configured(r="3"), 'r is "3"; it must be an integer'),
    "a rank as float": (configured(r=3.0), "r is 3.0; it must be an integer"),
    "a rank above all layers": (configured(r=10**6), "r=1000000 is larger than blocks.0.q allows"),
    "a rank above all numbers": (configured(r=10**30), "it must be an integer of at least 1"),
    "another rank": (configured(r=4), r"is F32\(3, 16\); expected \(4, 16\)"),
    "alpha of 0": (configured(lora_alpha=0), "lora_alpha is 0; it must be a finite number above 0"),
    "alpha below 0": (configured(lora_alpha=-8), "lora_alpha is -8; it must be"),
    "alpha as a flag": (configured(lora_alpha=True), "lora_alpha is true; it must be"),
    "alpha without end": (text(json.dumps(LORA).replace("5", "1e999").encode()), "lora_alpha is Infinity; it must be"),
    "a rank in a pattern": (configured(rank_pattern={"c_fc": 0}), "rank_pattern is .*; it must be a map"),
    "a list as pattern": (configured(alpha_pattern=[1]), r"alpha_pattern is \[1\]; it must be a map"),
    "a pattern that fits": (configured(rank_pattern={"c_fc": 2}), r"c_fc.lora_A.weight\": is F32\(3, 16\); exp.*\(2"),
    "use_dora as a number": (configured(use_dora=1), "use_dora is 1; it must be true or false"),
    "dora without magnitudes": (configured(use_dora=True), 'lora_magnitude_vector": is missing'),
    "bias": (configured(bias="all"), 'bias is "all"; it must be "none"'),
    "modules_to_save": (configured(modules_to_save=["lm_head"]), r'modules_to_save is \["lm_head"\], which is not'),
    "layer_replication": (configured(layer_replication=[[0, 1]]), r"layer_replication is \[\[0, 1\]\], which is not"),
    "target_parameters": (configured(target_parameters=["w"]), "target_parameters is .*, which is not supported"),
    "trained tokens": (configured(trainable_token_indices=[1]), "trainable_token_indices is .*, which is not supp"),
    "use_qalora": (configured(use_qalora=True), "use_qalora is true, which is not supported"),
    "lora_bias": (configured(lora_bias=True), "lora_bias is true, which is not supported"),
    "alora": (configured(alora_invocation_tokens=[5]), r"alora_invocation_tokens is \[5\], which is not supported"),
    "megatron": (configured(megatron_config={"a": 1}), "megatron_config is .*, which is not supported"),
    "loftq": (configured(loftq_config={"loftq_bits": 4}), "loftq_config is .*, which is not supported"),
    "corda": (configured(init_lora_weights="corda"), 'init_lora_weights is "corda"; it must be true, false'),
    "pissa, the fast one": (configured(init_lora_weights="pissa_niter_4"), 'init_lora_weights is "pissa_niter_4"'),
    "pissa and dora": (configured(init_lora_weights="pissa", use_dora=True), "use_dora is true and init_lora_weights"),
    "a misspelt key": (
        configured(use_rslora=..., use_rs_lora=True),
        r'unknown key "use_rs_lora", with the value true \(did you mean "use_rslora"\?\)',
    ),
    "a key of a newer PEFT that is on": (configured(use_magic=2), 'unknown key "use_magic", with the value 2'),
    "a key of VeRA's": (configured(save_projection=True), 'unknown key "save_projection", with the value true'),
    "a nested quantifier": (configured(target_modules="(a*)*b"), "expression .* could take forever"),
    "a quantifier on a group": (configured(target_modules="(a|b)+c_attn"), "could take forever"),
    "a counted group": (configured(exclude_modules="(a|b){30}c_attn"), "exclude_modules: .* could take forever"),
    "five quantifiers": (configured(target_modules=".*.*.*.*.*c_attn"), "could take forever"),
    "many choices": (configured(target_modules="(|.)" * 40 + "!"), "could take forever"),
    "many optional ones": (configured(target_modules=".?" * 40 + "!"), "could take forever"),
    "a long one": (configured(target_modules="a" * 1001), "could take forever"),
    "flags": (configured(target_modules="(?x)( a | b ) *"), "could take forever"),
    "many patterns": (configured(rank_pattern={f"k{i}": 1 for i in range(1001)}), "1,001 entries; at most 1,000"),
    "many dear patterns": (
        configured(rank_pattern={f".*.*.*.*k{i}": 1 for i in range(5)}),
        "rank_pattern: the expression .* could take forever",
    ),
    "a dear pattern of layers": (configured(layers_to_transform=0, layers_pattern="(.*)*"), "could take forever"),
    "no expression": (configured(target_modules="(c_attn"), "could take forever|is not a regular expression"),
    "no expression either": (configured(alpha_pattern={"c_fc**": 1}), "is not a regular expression: multiple repeat"),
    "a name that is taken": (
        configured(layers_to_transform=0, layers_pattern="(?P<idx>h)"),
        "layers_pattern: .* is not a regular expression: redefinition of group",
    ),
    "an untargeted module": (
        configured(target_modules=["c_proj", "c_fc"]),
        "c_attn.*target_modules in adapter_config.json do not select transformer.h.0.attn.c_attn",
    ),
    "a targeted module that is not there": (with_tensors(**{AT: None}), f'tensor "{AT}": is missing'),
    "a tensor too many": (with_tensors(**{f"{AT}s": np.ones(3)}), f'"{AT}s": belongs to nothing in this model'),
    "a full layer": (with_tensors(**{"base_model.model.lm_head.weight": np.ones((11, 16))}), "belongs to nothing"),
    "a tensor of another shape": (with_tensors(**{AT: np.ones((16, 3))}), rf'"{AT}": is F64\(16, 3\); expected \(3, '),
    "integers": (with_tensors(**{AT: np.ones((3, 16), int)}), f'"{AT}": its dtype is "I64"'),
    "not a number": (with_tensors(**{AT: NAN}), f'"{AT}": holds NaN or an infinity'),
    "too large for float32": (with_tensors(**{AT: np.full((3, 16), 1e300)}), f'"{AT}": holds a number'),
    "names of another model": (
        lambda folder: hand_made(folder, LORA, prefix="base_model.model.model."),
        r'no tensor is named after a layer of this model; expected names such as "base_model\.model\.transformer\.h',
    ),
    "two exports in one folder": (a_pair_of_two, "written with another adapter_config.json than the one beside it"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_one_error_that_names_it_and_changes_nothing(tmp_path, name):
    spoil, message = BAD[name]
    hand_made(tmp_path, LORA)
    spoil(tmp_path)
    model = base()
    before = state(model)
    with pytest.raises(AdapterFormatError, match=message) as caught:
        load_peft(tmp_path, model)
    assert_untouched(model, before)
    assert caught.value.file.startswith(str(tmp_path)) and "\n" not in str(caught.value)
    hand_made(tmp_path, LORA)
    assert adapted_layers(load_peft(tmp_path, model))  # and the good one still loads


BAD_VERA = {
    "alpha": (configured(lora_alpha=3), 'unknown key "lora_alpha"'),
    "a pattern": (configured(rank_pattern={"c_fc": 2}), 'unknown key "rank_pattern"'),
    "a key below 0": (configured(projection_prng_key=-1), "projection_prng_key is -1; it must be an integer from 0"),
    "no projections": (configured(save_projection=False), '"base_model.vera_A": belongs to nothing in this model'),
    "projections of ours": (
        with_tensors(**{"base_model.vera_B": np.ones((63, 3), np.float32)}),
        r'"base_model.vera_B": is F32\(63, 3\); expected \(64, 3\)',
    ),
    "projections missing": (with_tensors(**{"base_model.vera_A": None}), '"base_model.vera_A": is missing'),
    "bias": (configured(bias="vera_only"), 'bias is "vera_only"; it must be "none"'),
    "a rank without end": (configured(r=2**30), r"expected \(1073741824, 64\)|expected \(1073741824,\)"),
}


@pytest.mark.parametrize("name", BAD_VERA)
def test_a_bad_file_of_vera_too(tmp_path, name):
    spoil, message = BAD_VERA[name]
    hand_made(tmp_path, VERA)
    spoil(tmp_path)
    model = base()
    before = state(model)
    with pytest.raises(AdapterFormatError, match=message):
        load_peft(tmp_path, model)
    assert_untouched(model, before)


def test_a_small_file_cannot_ask_for_large_matrices(tmp_path):
    """Without projections, r numbers in the file stand for r · 112 that are drawn."""
    hand_made(tmp_path, VERA | {"save_projection": False, "r": 2_000_000}, modules=["mlp.c_fc"])
    configured(target_modules=["c_fc"])(tmp_path)
    with pytest.raises(
        AdapterFormatError, match="leaves 160,000,000 numbers to its key; at most 134,217,728 are drawn"
    ):
        load_peft(tmp_path, base())


def test_a_model_that_is_adapted_already_gets_no_second_adapter(tmp_path):
    hand_made(tmp_path, LORA)
    model = adapt(base(), "lora", r=2, verbose=False)
    before = state(model)
    with pytest.raises(InputError, match="this model is adapted already"):
        load_peft(tmp_path, model)
    assert_untouched(model, before)


def ways(pattern):
    return ways_to_match(pattern) <= PATTERN_WAYS


def test_expressions_that_people_write_are_read():
    for pattern in (
        "c_attn",
        r".*\.(q_proj|v_proj)",
        r"^transformer\.h\.(0|1|2|3|4|5|6|7|8|9|10|11)\.(attn|mlp)\.c_(proj|fc|attn)$",
        r"^(?!.*vision).*(?:c_attn|c_proj|c_fc).*$",
        r".*h\.[0-9]+\.(?:attn|mlp)\..+",
        r"(?:.*\.)?h\.\d{1,2}\.attn\.c_attn",
        r"[^()*+]*\(\*\+c_attn",
    ):
        assert ways(pattern), pattern


@pytest.mark.parametrize(
    "form, names, message",
    [
        ("lorra", "gpt2", r'unknown form "lorra" \(did you mean "lora"\?\)'),
        ("adapter", "gpt", r'unknown names "gpt" \(did you mean "gpt2"\?\)'),
        ("merged", "minilora", 'form="merged" is a model for transformers; leave names at "gpt2"'),
    ],
)
def test_unknown_words_are_refused(tmp_path, form, names, message):
    with pytest.raises(InputError, match=message):
        save_peft(tmp_path / "new", trained("lora", ["q"]), form, names)
    assert not (tmp_path / "new").exists()


def test_a_model_without_adapter_has_none_to_write(tmp_path):
    with pytest.raises(InputError, match=r"no adapter; call adapt\(\) first"):
        save_peft(tmp_path / "new", base())


def vera_with_parts(rows, d=None):
    """VeRA on q, k and v whose rows of the shared B are ``rows``; ``d`` is k's."""
    model = base()
    method = methods.create("vera", r=3)
    chosen = plan(model, method, ["blocks.0.q", "blocks.0.k", "blocks.0.v"])
    host(model, chosen, parts={path: {"B": slice(*own)} for path, own in zip(chosen, rows, strict=True)})
    if d is not None:
        model.blocks[0].k.p.d[:] = d
    return model


@pytest.mark.parametrize(
    "model, message",
    [
        (lambda: trained("vera", r=3), "takes rows 16 to 32 of B for blocks.0.k, which has 0 to 16 here"),
        (lambda: trained("vera", ["q", "v"], r=3), "is one layer for blocks.0.q, .*, and not all of them are adapted"),
        (lambda: vera_with_parts([(0, 16), (16, 32), (16, 32)]), "takes rows 32 to 48 of B for blocks.0.v"),
        (lambda: vera_with_parts([(0, 16), (16, 32), (32, 48)], d=2.0), "has one d, and blocks.0.k has another than"),
    ],
    ids=["made here", "q and v", "other rows", "another d"],
)
def test_vera_of_q_k_and_v_apart_is_not_what_pefts_c_attn_can_be(tmp_path, model, message):
    with pytest.raises(InputError, match=f'{message}.*form="lora", or names="minilora"'):
        save_peft(tmp_path / "new", model())
    assert not (tmp_path / "new").exists()


def test_vera_from_pefts_c_attn_is_not_what_its_layers_apart_can_be(tmp_path):
    hand_made(tmp_path, VERA)
    model = load_peft(tmp_path, base())
    with pytest.raises(InputError, match=r"takes rows 0 to 16 of B for blocks.0.k, which has 16 to 32 here"):
        save_peft(tmp_path / "new", model, names="minilora")
    save_peft(tmp_path / "new", model, form="lora", names="minilora")
    assert_same_function(load_peft(tmp_path / "new", base()), model)


# --------------------------------------------------------------------------------------------------- saves that are cut


@pytest.mark.parametrize("form", ["adapter", "merged"])
@pytest.mark.parametrize("step", ["open", "write", "fsync", "replace"])
@pytest.mark.parametrize("at", [0, 1])
def test_an_export_that_fails_leaves_the_old_files_or_a_pair_that_is_recognised(tmp_path, monkeypatch, step, at, form):
    """Both files are on the disk before the first is renamed: until then, whatever fails, the old pair is whole."""
    save_peft(tmp_path, trained("lora", ["q"]), form)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    real, calls = getattr(os, step), []

    def fails(*args, **options):
        if str(tmp_path) in str(args[0]) or step in ("write", "fsync"):
            calls.append(args)
            if len(calls) == at + 1:
                raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args, **options)

    model = trained("lora", ["q", "v"], r=3)
    with monkeypatch.context() as patch:
        patch.setattr(files.os, step, fails)
        with pytest.raises(InputError, match=r"cannot write .*No space left on device"):
            save_peft(tmp_path, model, form)
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert len(calls) == at + 1
    assert after.keys() == before.keys()
    if (step, at) != ("replace", 1):
        assert after == before
    elif form == "adapter":
        with pytest.raises(AdapterFormatError, match="one of the two was replaced"):
            load_peft(tmp_path, base())


# ----------------------------------------------------------------------------------------------------- the command line


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(base model's file, folder of a run) of a tiny model with the tokenizer's alphabet."""
    folder = tmp_path_factory.mktemp("run")
    model = GPT(GPTConfig(n_positions=32, n_embd=16, n_layer=1, n_head=2), 0)
    save_model(folder / "tiny.safetensors", model)
    mark = fingerprint(model)
    adapt(model, "delta_lora", r=2, verbose=False, start_step=0)
    for p in model.trainable().values():
        p.data[:] = np.random.default_rng(0).normal(0.0, 0.3, p.shape)
    model.after_step()
    (folder / "adapter").mkdir()
    save_adapter(folder / "adapter" / "adapter.safetensors", model, mark)
    return str(folder / "tiny.safetensors"), str(folder / "adapter")


def said(capsys, *argv, base=None):
    """What a command prints."""
    assert main([str(a) for a in argv] + ([] if base is None else ["--base", str(base)])) == 0
    return capsys.readouterr().out


def test_export_import_and_generate(run, tmp_path, capsys):
    base, adapter = run
    write = ["generate", "--tokens", 30, "--temperature", 0]
    text = said(capsys, *write, "--adapter", adapter, base=base)
    assert text != said(capsys, *write, base=base)
    printed = said(capsys, "export", adapter, tmp_path / "peft", "--with-base", base=base)
    assert "LORA, r = 4" in printed and f'PeftModel.from_pretrained(model, "{tmp_path}/peft")' in printed
    assert config_of(tmp_path / "peft")["base_model_name_or_path"] == f"{tmp_path}/peft/base"
    np.testing.assert_array_equal(load_gpt2(tmp_path / "peft" / "base").tokens.data, load_base(base).tokens.data)
    assert text == said(capsys, *write, "--adapter", tmp_path / "peft", base=base)
    assert text == said(capsys, *write, "--adapter", tmp_path / "peft", base=tmp_path / "peft" / "base")
    assert "lora in 6 layers" in said(capsys, "import", tmp_path / "peft", "--out", tmp_path / "back", base=base)
    assert text == said(capsys, *write, "--adapter", tmp_path / "back", base=base)
    assert "without any adapter" in said(capsys, "export", adapter, tmp_path / "m", "--form", "merged", base=base)
    assert text == said(capsys, *write, base=tmp_path / "m")
    assert "BASE is the base model" in said(capsys, "export", adapter, tmp_path / "lora", "--form", "lora", base=base)
    said(capsys, "export", adapter, tmp_path / "ours", "--names", "minilora", base=base)
    assert text == said(capsys, *write, "--adapter", tmp_path / "ours", base=base)


@pytest.mark.parametrize("argv", [("export", "nowhere", "new"), ("import", "nowhere", "--out", "new")], ids=str)
def test_a_folder_that_is_not_there_is_one_line(argv, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*argv]) == 2
    error = capsys.readouterr().err
    assert "there is no such file" in error and error.count("\n") == 1
    assert not (tmp_path / "new").exists()


# ------------------------------------------------------------------------------------------------------ docs/peft.md

PAGE = (Path(__file__).parents[2] / "docs" / "peft.md").read_text(encoding="utf-8")


def block(kind, after=""):
    return re.search(rf"{after}\n?```{kind}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)[1]


def test_the_pages_commands_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    commands = [shlex.split(line) for line in block("sh", "<!-- commands -->").splitlines()]
    assert [name for name, *_ in commands] == ["minilora"] * 4
    for _, *argv in commands:
        assert main(argv + (["--workers", "1"] if argv[0] == "train" else [])) == 0
    assert "Written: peft/lora, LORA, r = 16" in capsys.readouterr().out
    assert (tmp_path / "peft/lora/base/model.safetensors").exists()


def test_the_pages_code_prints_what_it_says(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    page = re.sub(r"<!-- with PEFT -->\n```python\n.*?^```$", "", PAGE, flags=re.MULTILINE | re.DOTALL)
    code = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert len(code) == PAGE.count("```python") - 1 == 2
    namespace = {}
    for part in code:
        exec(compile(part, "docs/peft.md", "exec"), namespace)
    assert capsys.readouterr().out == block("text")
    assert float(namespace["optimizer"].lr_scale.max()) == 16.0


def rows():
    """(methods, what it is in PEFT, the rank, what it comes back as) from the page's table."""
    table = PAGE.split("<!-- methods -->\n")[1].split("\n\n")[0].splitlines()[2:]
    for line in table:
        names, kind, rank, back = (cell.strip() for cell in line.strip("|").split("|"))
        for name in re.findall(r"`(\w+)`", names):
            yield name, kind, rank, back.strip("`")


@pytest.mark.parametrize("row", list(rows()), ids=lambda row: row[0])
def test_the_pages_table_is_true(tmp_path, row):
    name, kind, rank, back = row
    model = trained(name, ["up", "down"], r=3)
    if back == "–":
        with pytest.raises(InputError, match="merged"):
            save_peft(tmp_path, model)
        return
    config = save_peft(tmp_path, model)
    assert config["peft_type"] == kind.split(",")[0]
    assert {flag for flag in ("use_rslora", "use_dora") if config.get(flag)} == set(re.findall(r"`(use_\w+)`", kind))
    assert config["r"] == {"r": 3, "2 r": 6}[rank]
    assert ("(1 + λ)" in kind) == (config.get("lora_alpha") == 48)
    assert {layer.method.name for layer in adapted_layers(load_peft(tmp_path, base())).values()} == {back}


def test_the_pages_table_has_every_method():
    assert sorted(name for name, *_ in rows()) == methods.names()
