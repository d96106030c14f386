"""Adapters travel to PEFT's files and back as the same function, and a file that cannot be honoured is one clear error.

PEFT itself is the judge in oracle/test_peft_files.py; here its files are made by hand, and NumPy is all that is needed.
"""

import ast
import contextlib
import errno
import itertools
import json
import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from hra import HRA
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tiny import IDS, assert_same_function, assert_untouched, base, logits, moved, state

from minilora import cli, methods
from minilora.adapter import Adapter
from minilora.cli import main
from minilora.errors import InputError
from minilora.files import peft, peft_config, peft_parts
from minilora.files import tensorfile as files
from minilora.files.base import fingerprint, load_base, save_model
from minilora.files.checkpoint import load_adapter, save_adapter
from minilora.files.errors import AdapterFormatError
from minilora.files.gpt2 import load_gpt2
from minilora.files.peft import load_peft, save_peft, short_names
from minilora.files.peft_config import endings
from minilora.gpt import GPT, GPTConfig
from minilora.lab import finetune
from minilora.merging import merge_and_unload, unload
from minilora.nn import Linear, Module
from minilora.surgery import adapt, adapted_layers
from minilora.tools.peft_table import END, START, table
from minilora.training.optim import AdamW
from minilora.training.trainer import train

GPT2, BASE = "base_model.model.transformer.", logits(base())


def tensors_of(folder):
    return load_file(folder / peft.TENSORS)


def config_of(folder):
    return json.loads((folder / peft.CONFIG).read_text())


def method_of(model):
    (name,) = {layer.method.name for layer in adapted_layers(model).values()}
    return name


def assert_same_tensors(one, other):
    one, other = tensors_of(one), tensors_of(other)
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype and one[name].tobytes() == other[name].tobytes(), name


# ------------------------------------------------------------------------------------------------------- there and back

OWN = {"rank_pattern": {"blocks.0.q": 3, "up": 1}, "alpha_pattern": {"v": 4.0, "blocks.1.o": 8.0}}
TARGETS = {"part of c_attn": ["q", "v", "o", "up"], "no c_attn": ["o", "down"]}


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("name", methods.names())
def test_there_and_back_is_the_same_function(tmp_path, name, targets):
    """In each form and under both kinds of names; or one error, if PEFT has nothing that does the same.

    If c_attn is adapted, k is not, and if the method has r and alpha, some layers have their own.
    """
    own = OWN if targets == "part of c_attn" and "alpha" in methods.options(name) else {}
    model = moved(name, TARGETS[targets], **own)
    before, layer, expected = state(model), next(iter(adapted_layers(model).values())), logits(model)
    method, fused, loaded = layer.method, targets != "no c_attn", None
    assert np.abs(expected - BASE).max() > 1e-3  # the adapter does something
    for form, names in itertools.product(("adapter", "lora"), ("gpt2", "minilora")):
        folder = tmp_path / form / names
        native = form == "adapter" and method.peft and not method.updates_base
        if native:
            possible = method.is_product or names == "minilora" or not fused
        else:
            possible = method.updates_base or method.factors(layer.base.W.data, layer.p) is not None
        if not possible:
            with pytest.raises(InputError, match='form="lora"' if native else 'low-rank product.*form="merged"'):
                save_peft(folder, model, form, names)
            assert not folder.exists()
            continue
        config = save_peft(folder, model, form, names)
        assert config == config_of(folder)
        loaded = load_peft(folder, base())
        assert np.abs(logits(loaded) - expected).max() <= 1e-6 * np.abs(expected).max()
        if native:
            assert methods.get(method_of(loaded)).peft == method.peft
        else:
            assert method_of(loaded) == "lora" and not config["use_rslora"] and not config["use_dora"]
    save_peft(tmp_path / "merged", model, form="merged")
    assert_untouched(model, before)
    if loaded:
        np.testing.assert_array_equal(logits(unload(loaded)), BASE)
    np.testing.assert_array_equal(logits(load_gpt2(tmp_path / "merged")), logits(merge_and_unload(model)))


def test_a_change_of_a_higher_rank_is_not_cut_off(tmp_path):
    """Delta-LoRA's and PiSSA's changes have rank 2 r; were the base moved in another way, the file would lie."""
    model = moved("pissa", ["q"])
    model.blocks[1].q.base.W.data[0] += np.linspace(1.0, 2.0, 16, dtype=np.float32)
    model.blocks[1].q.base.W.data[1] += np.linspace(1.0, -2.0, 16, dtype=np.float32)
    with pytest.raises(InputError, match=r"the change of blocks.1.q by pissa has a higher rank than 4"):
        save_peft(tmp_path / "new", model)
    assert not (tmp_path / "new").exists()


def test_a_model_that_is_no_gpt_goes_by_its_own_names_and_keeps_its_precision(tmp_path):
    def two():
        model, rng = Module(), np.random.default_rng(0)
        model.one, model.other = (Linear(rng.normal(size=shape)) for shape in ((6, 5), (4, 6)))
        return model

    model = moved("lora", model=two())
    with pytest.raises(InputError, match='use names="minilora"'):
        save_peft(tmp_path, model)
    save_peft(tmp_path, model, names="minilora")
    loaded = load_peft(tmp_path, two())
    assert model.other.p.B.dtype == np.float64
    np.testing.assert_array_equal(loaded.other.p.B, model.other.p.B)
    np.testing.assert_array_equal(loaded.one.p.A, model.one.p.A)


# --------------------------------------------------------------------------------- a method is named in its own file

HALF = '''"""Half of LoRA."""

from dataclasses import dataclass

from .lora import LoRA


@dataclass(frozen=True)
class Half(LoRA):
    @property
    def scaling(self):
        return 0.5 * self.alpha / self.r
'''


@pytest.fixture
def added(tmp_path, monkeypatch):
    """A function that adds a file to the folder of methods."""
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])

    def write(name, text):
        (tmp_path / f"{name}.py").write_text(text)
        return name

    yield write
    for name in ("half", "hra"):
        sys.modules.pop(f"minilora.methods.{name}", None)


def test_a_new_file_of_a_method_brings_its_own_kind_of_peft_file(added, tmp_path):
    name, out = added("hra", HRA), tmp_path / "out"
    model = moved(name)
    with pytest.raises(InputError, match=r"c_attn has one u, and blocks.0.k has another than blocks.0.q"):
        save_peft(out, model)
    with pytest.raises(InputError, match="the update of hra is not a low-rank product"):
        save_peft(out, model, form="lora")
    for block in model.blocks:
        block.q.p.u[:] = block.k.p.u[:] = block.v.p.u
    config = save_peft(out, model)
    assert (config["peft_type"], config["r"], config["apply_GS"], config["init_weights"]) == ("HRA", 2, False, True)
    assert not {"lora_alpha", "rank_pattern", "use_dora"} & config.keys()
    np.testing.assert_array_equal(tensors_of(out)[f"{GPT2}h.1.attn.c_attn.hra_u"], model.blocks[1].v.p.u)
    assert method_of(load_peft(out, base())) == "hra"
    assert_same_function(load_peft(out, base()), model, 0.0)
    save_file(tensors_of(out), out / peft.TENSORS, {"format": "pt"})  # without the configuration's checksum
    for change, message in [
        ({"apply_GS": True}, "apply_GS is true; it must be false"),
        ({"lora_alpha": 8}, 'unknown key "lora_alpha", with the value 8'),
    ]:
        (out / peft.CONFIG).write_text(json.dumps(config | change))
        with pytest.raises(AdapterFormatError, match=message):
            load_peft(out, base())
    with pytest.raises(InputError, match=r"c_attn has one HRA\(r=2\), and blocks.0.k has another than blocks.0.q"):
        save_peft(out, moved(name, rank_pattern={"k": 1}))
    with pytest.raises(InputError, match="PEFT has one r for all modules, and 0"):
        save_peft(out, moved(name, ["up", "down"], rank_pattern={"blocks.0.up": 1}))


@pytest.mark.parametrize("own, r, alpha", [("", 3, 3), ('\n    peft = {"peft_type": "LORA"}\n', 3, 8)])
def test_a_method_that_inherits_is_not_taken_for_its_parent(added, tmp_path, own, r, alpha):
    """Without a word in its file it is converted; as the parent's kind, alpha makes up for its other scaling."""
    model = moved(added("half", HALF + own), ["up", "down"], r=3, alpha=16.0)
    config = save_peft(tmp_path / "out", model)
    assert (config["r"], config["lora_alpha"]) == (r, alpha)
    assert_same_function(load_peft(tmp_path / "out", base()), model)


def test_no_method_and_nothing_of_one_is_named_in_the_code_for_files():
    known, text = [methods.get(name) for name in methods.names()], ""
    theirs, ours = set(), set(methods.names()) - {"lora"}  # form="lora" is a word for users
    for method in known:
        theirs |= {*method.peft.values(), *method.peft, *method.peft_names.values(), *method.peft_patterns.values()}
        theirs |= {*method.peft_keys, *method.peft_ignored, *(name for name, _ in method.peft_arrays.values())}
        ours |= set(method.peft_arrays)
    theirs -= {True, "r", "peft_type", "fan_in_fan_out"}  # the last is about the model
    for module in (peft, peft_config, peft_parts, cli):
        text += Path(module.__file__).read_text(encoding="utf-8")
    constants = {node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant)}
    assert not constants & ours
    assert {"LORA", "use_dora", "vera_lambda_d", "base_model.vera_A"} <= theirs
    assert [name for name in theirs if re.search(rf"\b{re.escape(name)}\b", text)] == []


# --------------------------------------------------------------------------------------------- what the files look like


def test_three_layers_of_many_ranks_have_no_more_than_their_inputs(tmp_path):
    """r = 6 of q, k and v would be 18 rows of A for 16 inputs; the product of 16 is the same."""
    model = moved("dora", ["q", "k", "v"], r=6)
    config = save_peft(tmp_path, model)
    assert (config["r"], config["lora_alpha"]) == (16, 16)
    assert_same_function(load_peft(tmp_path, base()), model)


def test_layers_with_one_a_keep_it_and_b_holds_the_ratio_of_their_alphas(tmp_path):
    model = moved("lora", ["q", "k"], alpha_pattern={"k": 4.0})
    for block in model.blocks:
        block.k.p.A[:] = block.q.p.A
    config, found = save_peft(tmp_path, model), tensors_of(tmp_path)
    np.testing.assert_array_equal(found[f"{GPT2}h.0.attn.c_attn.lora_A.weight"], model.blocks[0].q.p.A)
    np.testing.assert_array_equal(found[f"{GPT2}h.0.attn.c_attn.lora_B.weight"][16:32], model.blocks[0].k.p.B / 4)
    assert (config["r"], config["lora_alpha"]) == (2, 16)
    assert_same_function(load_peft(tmp_path, base()), model)


def test_the_configuration_is_pefts(tmp_path):
    model = moved("rslora", ["q", "o", "down"], rank_pattern={"blocks.0.down": 3}, alpha_pattern={"o": 5.5})
    save_peft(tmp_path, model, base="gpt2")
    config = config_of(tmp_path)
    assert config["target_modules"] == ["c_attn", "c_proj"]
    assert (config["r"], config["rank_pattern"]) == (2, {"0.mlp.c_proj": 3})
    assert (config["lora_alpha"], config["alpha_pattern"]) == (16, {"attn.c_proj": 5.5})
    assert type(config["lora_alpha"]) is int  # as PEFT declares it; 5.5 above is a float where it has to be
    assert config["use_rslora"] is True and config["use_dora"] is False and config["fan_in_fan_out"] is True
    assert (config["bias"], config["task_type"], config["base_model_name_or_path"]) == ("none", "CAUSAL_LM", "gpt2")
    assert list(config) == sorted(config)
    with safe_open(tmp_path / peft.TENSORS, framework="numpy") as file:
        assert file.metadata()["format"] == "pt"
    assert sorted(path.name for path in tmp_path.iterdir()) == [peft.CONFIG, peft.TENSORS]


paths = st.lists(st.sampled_from("ab01"), min_size=1, max_size=4).map(".".join)


@given(st.sets(paths, min_size=1, max_size=8), st.data())
@settings(max_examples=25, deadline=None)
def test_short_names_select_exactly_what_was_chosen(among, data):
    """But for a path that ends in another one, which cannot be left out where that one is chosen."""
    chosen = data.draw(st.sets(st.sampled_from(sorted(among)), min_size=1))
    chosen |= {path for path in among if not chosen.isdisjoint(endings(path))}
    names = short_names(chosen, among)
    assert {path for path in among if not set(names).isdisjoint(endings(path))} == chosen


# --------------------------------------------------------------------------------------------------- files made by hand

SIZES = {"attn.c_attn": (48, 16), "attn.c_proj": (16, 16), "mlp.c_fc": (64, 16), "mlp.c_proj": (16, 64)}


def hand_made(folder, config, modules=tuple(SIZES), prefix=GPT2, ranks=None):
    """A file as PEFT writes it, with random tensors: what a c_attn has is one A for q, k and v."""
    rng, r, tensors = np.random.default_rng(0), config["r"], {}
    draw = lambda *shape: rng.normal(0.0, 0.3, shape).astype(np.float32)
    for i in range(2):
        for module in modules:
            (d_out, d_in), at = SIZES[module], f"{prefix}h.{i}.{module}"
            own = (ranks or {}).get(f"h.{i}.{module}", r)
            if config["peft_type"] == "VERA":
                tensors |= {f"{at}.vera_lambda_b": draw(d_out), f"{at}.vera_lambda_d": draw(r)}
            else:
                tensors |= {f"{at}.lora_A.weight": draw(own, d_in), f"{at}.lora_B.weight": draw(d_out, own)}
                if config.get("use_dora"):
                    tensors[f"{at}.lora_magnitude_vector"] = 1.0 + draw(d_out)
    if config["peft_type"] == "VERA" and config["save_projection"]:
        d_out, d_in = (max(SIZES[module][k] for module in modules) for k in (0, 1))
        tensors |= {"base_model.vera_A": draw(r, d_in), "base_model.vera_B": draw(d_out, r)}
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / peft.TENSORS, {"format": "pt"})
    (folder / peft.CONFIG).write_text(json.dumps(config))
    return tensors


NAMED = ["c_attn", "c_proj", "c_fc"]
LORA = {"peft_type": "LORA", "r": 3, "lora_alpha": 5, "target_modules": NAMED}
VERA = {"peft_type": "VERA", "r": 3, "target_modules": NAMED, "projection_prng_key": 7, "d_initial": 0.1,
        "save_projection": True}  # fmt: skip
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
    assert method_of(model) == name
    again = save_peft(tmp_path / "again", model)
    assert_same_tensors(tmp_path / "theirs", tmp_path / "again")
    assert {key: again[key] for key in config} == config | {"target_modules": again["target_modules"]}
    assert_same_function(load_peft(tmp_path / "again", base()), model, 0.0)
    train(model, AdamW(model.trainable(), lr=0.01), iter([(IDS, IDS)] * 2), 2, progress=False)  # as any other
    save_adapter(tmp_path / "trained.safetensors", model, fingerprint(base()))
    np.testing.assert_array_equal(logits(load_adapter(tmp_path / "trained.safetensors", base())), logits(model))


@pytest.mark.parametrize(
    "config, scalings",
    [
        (LORA, (5 / 3, 5 / 3)),
        (LORA | {"use_rslora": True}, (5 / 3**0.5, 5 / 3**0.5)),
        (LORA | {"alpha_pattern": {r"h\.0\.attn\.c_attn": 2.5, "c_fc": 9}}, (2.5 / 3, 5 / 3)),
        (LORA | {"alpha_pattern": {"attn.c_attn": 2, r"h\.0\.attn\.c_attn": 9}}, (2 / 3, 2 / 3)),
        (LORA | {"alpha_pattern": {"^c_attn": 9, r"^.*\.1\.attn\.c_attn$": 2}}, (5 / 3, 2 / 3)),
        (LORA | {"rank_pattern": {"h.1.attn.c_attn": 2}, "alpha_pattern": {"1.attn.c_attn": 1}}, (5 / 3, 1 / 2)),
        (LORA | {"use_rslora": True, "rank_pattern": {"h.1.attn.c_attn": 2}}, (5 / 3**0.5, 5 / 2**0.5)),
    ],
    ids=["alpha over r", "over the root of r", "an alpha of its own", "two that fit", "the whole path",
         "a rank of its own", "and the root"],
)  # fmt: skip
def test_the_scaling_is_pefts(tmp_path, config, scalings):
    found = hand_made(tmp_path, config, ranks=config.get("rank_pattern"))
    model, W = load_peft(tmp_path, base()), base()
    for i, s in enumerate(scalings):
        A, B = (found[f"{GPT2}h.{i}.attn.c_attn.lora_{x}.weight"] for x in "AB")
        for layer, rows in {"q": slice(0, 16), "k": slice(16, 32), "v": slice(32, 48)}.items():
            ours, before = getattr(model.blocks[i], layer), getattr(W.blocks[i], layer).W.data
            merged = ours.method.merge(ours.base.W.data, ours.p)
            np.testing.assert_allclose(merged, before + s * B[rows] @ A, rtol=0, atol=1e-6)
    model.blocks[0].q.p.A[:] = 0.0
    assert model.blocks[0].k.p.A.any()  # its memory is its own
    hand_made(tmp_path, config | {"use_dora": True}, ranks=config.get("rank_pattern"))  # which has alpha / r alone
    for block, s in zip(load_peft(tmp_path, base()).blocks, scalings, strict=True):
        assert block.q.method.name == "dora_detached" and block.q.method.scaling == pytest.approx(s)


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
    found, at = hand_made(tmp_path, VERA), f"{GPT2}h.0.attn.c_attn"
    model, W = load_peft(tmp_path, base()), base()
    b, d = found[f"{at}.vera_lambda_b"], found[f"{at}.vera_lambda_d"]
    whole = (b[:, None] * found["base_model.vera_B"][:48] * d) @ found["base_model.vera_A"][:, :16]
    for layer, rows in {"q": slice(0, 16), "k": slice(16, 32), "v": slice(32, 48)}.items():
        ours = getattr(model.blocks[0], layer)
        theirs = getattr(W.blocks[0], layer).W.data + whole[rows]
        np.testing.assert_allclose(ours.method.merge(ours.base.W.data, ours.p), theirs, rtol=0, atol=1e-6)
    with pytest.raises(InputError, match="A is not what the key draws; leave save_projection at True"):
        save_peft(tmp_path / "new", model, save_projection=False)
    with pytest.raises(InputError, match=r"takes rows 0 to 16 of B for blocks.0.k, which has 16 to 32"):
        save_peft(tmp_path / "new", model, names="minilora")
    assert not (tmp_path / "new").exists()
    save_peft(tmp_path / "new", model, form="lora", names="minilora")
    assert_same_function(load_peft(tmp_path / "new", base()), model)


def test_veras_matrices_come_from_the_key_where_the_file_has_none(tmp_path):
    """For the sizes of PEFT's modules: c_attn counts with all its 48 rows, and c_fc, which is wider, is not there."""
    hand_made(tmp_path / "theirs", VERA | {"save_projection": False, "target_modules": ["c_attn"]}, ["attn.c_attn"])
    model = load_peft(tmp_path / "theirs", base())
    drawn = methods.create("vera", r=3, projection_prng_key=7).init_shared([(48, 16)], None)
    np.testing.assert_array_equal(model.shared.A.data, drawn["A"])
    np.testing.assert_array_equal(model.shared.B.data, drawn["B"])
    save_peft(tmp_path / "again", model, save_projection=False)
    assert_same_tensors(tmp_path / "theirs", tmp_path / "again")


def test_vera_of_q_k_and_v_apart_is_not_what_pefts_c_attn_can_be(tmp_path):
    hand_made(tmp_path / "theirs", VERA)
    another_d = load_peft(tmp_path / "theirs", base())
    another_d.blocks[0].k.p.d[:] = 2.0
    for model, message in [
        (moved("vera", r=3), "takes rows 16 to 32 of B for blocks.0.k, which has 0 to 16"),
        (moved("vera", ["q", "v"], r=3), "is one layer for blocks.0.q, .*, and not all of them are adapted"),
        (another_d, "has one d, and blocks.0.k has another than"),
    ]:
        with pytest.raises(InputError, match=f'{message}.*form="lora", or names="minilora"'):
            save_peft(tmp_path / "new", model)
        assert not (tmp_path / "new").exists()


NEWER = {"a_key_of_2030": None, "another": False, "a_map": {}, "a_list": [], "a_text": ""}
ONLY_DATA = {
    "lora_dropout": 0.5, "base_model_name_or_path": "/etc/passwd", "revision": "main", "peft_version": "9.9",
    "auto_mapping": {"base_model_class": "os.system", "parent_library": "os"}, "task_type": "CAUSAL_LM",
    "fan_in_fan_out": True, "inference_mode": False, "qalora_group_size": 16, "megatron_core": "os",
    "modules_to_save": [], "loftq_config": {}, "init_lora_weights": "gaussian",
}  # fmt: skip


@pytest.mark.parametrize("case", ["a GPT2Model's names", "keys that are off", "only data", "float64"])
def test_what_is_said_in_another_way_is_the_same_adapter(tmp_path, case):
    config = LORA | {"keys that are off": NEWER, "only data": ONLY_DATA}.get(case, {})
    found = hand_made(tmp_path, config, prefix=GPT2.removesuffix("transformer.") if "names" in case else GPT2)
    if case == "float64":
        save_file({name: a.astype(np.float64) for name, a in found.items()}, tmp_path / peft.TENSORS)
    model = load_peft(tmp_path, base())
    assert {p.dtype for _, p in model.named_parameters()} == {np.dtype(np.float32)}
    hand_made(tmp_path / "usual", LORA)
    assert_same_function(model, load_peft(tmp_path / "usual", base()), 0.0)


BLOCK_1 = [f"1.{module}" for module in SIZES if module != "mlp.c_proj"]
TARGETED = [  # (the configuration, the modules that the file must then have in some block)
    ({"target_modules": "all-linear"}, list(SIZES)),
    ({"target_modules": ["c_fc", "mlp.c_proj", "q_proj"]}, ["mlp.c_fc", "mlp.c_proj"]),
    ({"target_modules": r".*\.(c_attn|c_fc)"}, ["attn.c_attn", "mlp.c_fc"]),
    ({"exclude_modules": ["attn.c_proj", "c_attn"]}, ["mlp.c_fc", "mlp.c_proj"]),
    ({"target_modules": "all-linear", "exclude_modules": r".*\.mlp\..*"}, ["attn.c_attn", "attn.c_proj"]),
    ({"layers_to_transform": 1, "exclude_modules": ["mlp.c_proj"]}, BLOCK_1),
    ({"layers_to_transform": [1, 5], "layers_pattern": ["layers", "h"], "exclude_modules": ["mlp.c_proj"]}, BLOCK_1),
]


@pytest.mark.parametrize("changes, modules", TARGETED, ids=str)
def test_which_modules_a_configuration_targets(tmp_path, changes, modules):
    """These and no others: one of them that is missing is an error, and so is one too many."""
    found = hand_made(tmp_path, LORA | changes)
    with pytest.raises(AdapterFormatError, match="do not select") if len(modules) < 4 else contextlib.nullcontext():
        load_peft(tmp_path, base())
    named = {name: a for name, a in found.items() if any(module in name for module in modules)}
    save_file(named, tmp_path / peft.TENSORS)
    ours = {"attn.c_attn": ["q", "k", "v"], "attn.c_proj": ["o"], "mlp.c_fc": ["up"], "mlp.c_proj": ["down"]}
    expected = {
        f"blocks.{i}.{layer}"
        for i, (module, layers) in itertools.product(range(2), ours.items())
        if any(f"{i}.{module}".endswith(chosen) for chosen in modules)
        for layer in layers
    }
    assert set(adapted_layers(load_peft(tmp_path, base()))) == expected
    del named[next(name for name in named if "h.1." in name)]
    save_file(named, tmp_path / peft.TENSORS)
    with pytest.raises(AdapterFormatError, match=r"h\.1\..*is missing"):
        load_peft(tmp_path, base())


# ------------------------------------------------------------------------------------------------------ what is refused

AT = f"{GPT2}h.1.attn.c_attn.lora_A.weight"


def key(**changes):
    """A change of the configuration; ``...`` takes a key away."""

    def spoil(folder):
        config = {k: v for k, v in (config_of(folder) | changes).items() if v is not ...}
        (folder / peft.CONFIG).write_text(json.dumps(config))

    return spoil


def tensor(name, array):
    """A change of the tensors; None takes one away."""

    def spoil(folder):
        found = {n: a for n, a in (tensors_of(folder) | {name: array}).items() if a is not None}
        save_file(found, folder / peft.TENSORS)

    return spoil


def a_pair_of_two(folder):
    """Half of another export: what a copy that was cut short leaves."""
    save_peft(folder, moved("lora", alpha=4.0))
    save_peft(folder / "other", moved("lora", alpha=5.0))
    shutil.copy(folder / "other" / peft.CONFIG, folder)


NOT_READ = "the expression .* is not read"
BAD = [  # (what is spoilt, what the error says); hostile.py has hundreds more
    (a_pair_of_two, "written with a different adapter_config.json than the one next to it"),
    (
        lambda folder: hand_made(folder, LORA, prefix="base_model.model.model."),
        r'no tensor is named after .*; expected names such as "base_model\.model\.transformer\.h',
    ),
    (key(r=10**6), "r=1000000 is larger than blocks.0.q allows"),
    (key(r=4), r"is F32\(3, 16\); expected \(4, 16\)"),
    (key(rank_pattern={"c_fc": 2}), r"c_fc.lora_A.weight\": is F32\(3, 16\); exp.*\(2"),
    (key(rank_pattern={f"k{i}": 1 for i in range(1001)}), "1,001 entries; at most 1,000"),
    (key(rank_pattern={f"{i:0500}": 1 for i in range(21)}), "expressions of more than 10,000 characters in all"),
    (key(layers_to_transform=0, layers_pattern="h|x"), r"layers_pattern is \"h\|x\"; it must be null, a name"),
    (key(layers_to_transform=0, layers_pattern="blocks"), "do not select"),
    (key(use_dora=True), 'lora_magnitude_vector": is missing'),
    (key(init_lora_weights="pissa_niter_4"), 'init_lora_weights is "pissa_niter_4"; it must be true, false'),
    (key(init_lora_weights="pissa", use_dora=True), "use_dora is true and init_lora_weights"),
    (key(use_rs_lora=True), r'unknown key "use_rs_lora", with the value true \(did you mean "use_rslora"\?\)'),
    (key(magic=2), 'unknown key "magic", with the value 2; only files in which it is absent or off'),
    (key(target_modules="(a*)*b"), f"target_modules: {NOT_READ}"),
    (key(exclude_modules="(a|b)+c_attn"), f"exclude_modules: {NOT_READ}"),
    (key(alpha_pattern={"c_fc**": 1}), f"alpha_pattern: {NOT_READ}"),
    (key(target_modules=["c_proj", "c_fc"]), "do not select transformer.h.0.attn.c_attn"),
    (tensor(AT, None), f'tensor "{AT}": is missing'),
    (tensor("base_model.model.lm_head.weight", np.ones((11, 16))), "belongs to nothing"),
    (tensor(AT, np.full((3, 16), 1e300)), f'"{AT}": holds a number'),
]
BAD_VERA = [
    (key(lora_alpha=3), 'unknown key "lora_alpha"'),
    (key(save_projection=False), '"base_model.vera_A": belongs to nothing in this model'),
    (key(r=2_000_000, save_projection=False), "leaves 256,000,000 numbers to its key; at most 134,217,728 are drawn"),
]


@pytest.mark.parametrize(
    "config, spoil, message",
    [(LORA, *case) for case in BAD] + [(VERA, *case) for case in BAD_VERA],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_a_bad_file_is_one_error_that_names_it_and_changes_nothing(tmp_path, config, spoil, message):
    hand_made(tmp_path, config)
    spoil(tmp_path)
    model = base()
    before = state(model)
    with pytest.raises(AdapterFormatError, match=message) as caught:
        load_peft(tmp_path, model)
    assert_untouched(model, before)
    assert caught.value.file.startswith(str(tmp_path)) and "\n" not in str(caught.value)


def test_a_model_that_is_adapted_already_gets_no_second_adapter(tmp_path):
    hand_made(tmp_path, LORA)
    model = adapt(base(), "lora", r=2, verbose=False)
    before = state(model)
    with pytest.raises(InputError, match="this model is adapted already"):
        load_peft(tmp_path, model)
    assert_untouched(model, before)


@pytest.mark.parametrize(
    "form, names, message",
    [
        ("lorra", "gpt2", r'unknown form "lorra" \(did you mean "lora"\?\)'),
        ("adapter", "gpt", r'unknown names "gpt" \(did you mean "gpt2"\?\)'),
        ("merged", "minilora", 'form="merged" is a model for transformers; leave names at "gpt2"'),
        ("adapter", "gpt2", r"no adapter; call adapt\(\) first"),
    ],
)
def test_an_export_that_cannot_be_is_one_error(tmp_path, form, names, message):
    with pytest.raises(InputError, match=message):
        save_peft(tmp_path / "new", base() if "adapt" in message else moved("lora", ["q"]), form, names)
    assert not (tmp_path / "new").exists()


# --------------------------------------------------------------------------------------------------- saves that are cut


@pytest.mark.parametrize("form", ["adapter", "merged"])
@pytest.mark.parametrize("step, at", [("write", 1), ("replace", 1)])
def test_an_export_that_fails_leaves_the_old_files_or_a_pair_that_is_recognised(tmp_path, monkeypatch, step, at, form):
    """Both files are on the disk before the first is renamed: until then, whatever fails, the old pair is whole."""
    save_peft(tmp_path, moved("lora", ["q"]), form)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    real, calls = getattr(os, step), []

    def fails(*args, **options):
        if str(tmp_path) in str(args[0]) or step in ("write", "fsync"):
            calls.append(args)
            if len(calls) == at + 1:
                raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args, **options)

    model = moved("lora", ["q", "v"], r=3)
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
    moved("delta_lora", model=model)
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


# ------------------------------------------------------------------------------------------------------ docs/peft.md

PAGE = (Path(__file__).parents[2] / "docs" / "peft.md").read_text(encoding="utf-8")


def block(kind, after=""):
    return re.search(rf"{after}\n?```{kind}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)[1]


def test_the_pages_commands_run(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(finetune, "write_sample", lambda *_: "")  # takes longer than the training
    base, _ = run
    commands = [shlex.split(line) for line in block("sh", "<!-- commands -->").splitlines()]
    assert [name for name, *_ in commands] == ["minilora"] * 4
    for _, *argv in commands:
        assert main([*argv, "--base", base, *(["--workers", "1"] if argv[0] == "train" else [])]) == 0
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


def test_the_page_explains_each_attribute():
    rows = re.findall(r"^\| `(\w+)` \|", PAGE.split("## What a method's file says")[1].split("\n## ")[0], re.MULTILINE)
    assert sorted(rows) == sorted(
        name for name in vars(Adapter) if name.startswith("peft") or name in ("from_peft", "is_product")
    )


def test_the_pages_table_is_what_the_methods_files_make():
    assert PAGE.split(START)[1].split(END)[0].strip() == table()
