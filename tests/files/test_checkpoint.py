"""What is saved is loaded to the bit, and a file that is wrong in any way is one clear error and changes nothing.
These tests exist because weights are hours of work: a half-written file or a silent mismatch would lose them.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from untouched import assert_untouched, state

from minilora import methods
from minilora.backend import to_host
from minilora.engine import no_grad
from minilora.errors import AdapterFormatError, FormatError, InputError
from minilora.files import tensorfile as files
from minilora.files.base import fingerprint, load_model, model_shapes, save_model
from minilora.files.checkpoint import adapter_arrays, adapter_shapes, load_adapter, save_adapter
from minilora.files.saving import writable_folder
from minilora.files.tensorfile import write_tensors
from minilora.gpt import GPT, GPTConfig
from minilora.surgery import adapt, adapted_layers, host, merge_and_unload, plan
from minilora.training.optim import AdamW
from minilora.training.trainer import train

TINY = GPTConfig(vocab_size=11, n_positions=8, n_embd=16, n_layer=2, n_head=2)
IDS = np.random.default_rng(0).integers(0, 11, (2, 6))


def base(seed=0, dtype=np.float32) -> GPT:
    """A model whose every array is random: gains and biases too."""
    model, rng = GPT(TINY, seed, dtype), np.random.default_rng(seed)
    for _, p in model.named_parameters():
        p.data[:] = rng.normal(0.0, 0.3, p.shape)
    return model


def trained(name, steps=3) -> GPT:
    model = adapt(base(), name, verbose=False, **methods.known(name, r=2))
    train(model, AdamW(model.trainable(), lr=0.01), iter([(IDS, IDS[:, ::-1])] * steps), steps)
    return model


def logits(model):
    with no_grad():
        return model(IDS).data


# -------------------------------------------------------------------------------- models


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_model_comes_back_to_the_bit(tmp_path, dtype):
    model, path = base(dtype=dtype), tmp_path / "model.safetensors"
    save_model(path, model)
    loaded = load_model(path)
    assert loaded.config == model.config
    for (name, a), (other, b) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        assert name == other and a.dtype == b.dtype and b.requires_grad
        np.testing.assert_array_equal(a.data, b.data)
    np.testing.assert_array_equal(logits(loaded), logits(model))
    assert fingerprint(loaded) == fingerprint(load_model(str(path))) == fingerprint(model)


def test_a_model_file_is_safetensors_as_anyone_reads_it(tmp_path):
    save_model(tmp_path / "model.safetensors", base())
    with safe_open(tmp_path / "model.safetensors", framework="numpy") as file:
        assert json.loads(file.metadata()["config"])["n_embd"] == 16
        np.testing.assert_array_equal(file.get_tensor("blocks.1.q.W"), base().blocks[1].q.W.data)


def test_a_merged_model_is_a_model_again(tmp_path):
    model = merge_and_unload(trained("lora"))
    save_model(tmp_path / "model.safetensors", model)
    np.testing.assert_array_equal(logits(load_model(tmp_path / "model.safetensors")), logits(model))


def test_an_adapted_model_is_not_saved_as_a_model(tmp_path):
    """load_model() could not read it, and the training would be lost."""
    with pytest.raises(InputError, match="adapter"):
        save_model(tmp_path / "model.safetensors", trained("lora"))
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_model_is_not_loaded(tmp_path):
    """One bit of a weight, which no reader of safetensors would notice."""
    path = tmp_path / "model.safetensors"
    save_model(path, base())
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(FormatError, match="is damaged"):
        load_model(path)


@pytest.mark.parametrize("sizes", [TINY, GPTConfig(vocab_size=8, n_positions=2, n_embd=8, n_layer=3, n_head=1)])
def test_the_shapes_of_a_model_are_known_before_it_is_made(sizes):
    assert model_shapes(sizes) == {name: p.shape for name, p in GPT(sizes).named_parameters()}


# -------------------------------------------------------------------------------- adapters


@pytest.mark.parametrize("name", methods.names())
def test_an_adapter_comes_back_to_the_bit(tmp_path, name):
    model, path = trained(name), tmp_path / "adapter.safetensors"
    save_adapter(path, model, fingerprint(base()))
    loaded = load_adapter(path, base())
    np.testing.assert_array_equal(logits(loaded), logits(model))
    assert not np.array_equal(logits(loaded), logits(base()))
    layers, others = adapted_layers(model), adapted_layers(loaded)
    assert list(layers) == list(others)
    for where, layer in layers.items():
        assert others[where].method == layer.method
        assert list(others[where].p) == list(layer.p)
        assert all(np.array_equal(others[where].p[k], a) for k, a in layer.p.items())
    assert list(loaded.trainable()) == list(model.trainable())


def test_method_options_and_layers_come_back_too(tmp_path):
    model = adapt(base(), "lora", ["blocks.1.q", "down"], verbose=False, r=3, alpha=0.1)
    save_adapter(tmp_path / "a", model, fingerprint(base()))
    layers = adapted_layers(load_adapter(tmp_path / "a", base()))
    assert list(layers) == ["blocks.0.down", "blocks.1.q", "blocks.1.down"]
    assert {(layer.method.r, layer.method.alpha) for layer in layers.values()} == {(3, 0.1)}


def test_arrays_of_another_precision_take_the_models(tmp_path):
    model = trained("lora")
    save_adapter(tmp_path / "a", model, fingerprint(base()))
    spoil_adapter(**{A: to_host(model.blocks[1].q.p.A).astype(np.float64)})(tmp_path / "a")
    loaded = load_adapter(tmp_path / "a", base())
    assert {p.dtype for _, p in loaded.named_parameters()} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(logits(loaded), logits(model))


def test_an_adapter_file_holds_no_base_weights(tmp_path):
    save_adapter(tmp_path / "a", trained("lora"), fingerprint(base()))
    with safe_open(tmp_path / "a", framework="numpy") as file:
        assert set(file.keys()) == {
            f"blocks.{i}.{layer}.arrays.{name}"
            for i in range(2)
            for layer in ("q", "k", "v", "o", "up", "down")
            for name in "AB"
        }


def test_a_model_without_adapter_has_none_to_save(tmp_path):
    with pytest.raises(InputError, match=r"no adapter; call adapt\(\) first"):
        save_adapter(tmp_path / "a", base(), fingerprint(base()))
    assert list(tmp_path.iterdir()) == []


def test_the_fingerprint_tells_models_apart():
    one, other = base(), base()
    assert fingerprint(one) == fingerprint(other)
    other.blocks[1].up.b.data[3] = np.nextafter(other.blocks[1].up.b.data[3], np.float32(np.inf))  # the last bit
    assert fingerprint(one) != fingerprint(other)
    assert len(fingerprint(one)) == 64


def spoil_adapter(metadata=None, **changes):
    def spoil(path):
        with safe_open(path, framework="numpy") as file:
            arrays, notes = {k: file.get_tensor(k) for k in file.keys()}, file.metadata()  # noqa: SIM118
        arrays |= {name.replace("__", "."): a for name, a in changes.items()}
        notes = {k: v for k, v in (notes | (metadata or {})).items() if v is not None}
        write_tensors(path, {name: a for name, a in arrays.items() if a is not None}, notes)

    return spoil


A = "blocks__1__q__arrays__A"
BAD_ADAPTERS = {  # one of each kind; test_hostile.py has hundreds
    "missing": (Path.unlink, "there is no such file; an adapter file was expected"),
    "a model": (lambda path: save_model(path, base()), 'of the format "minilora model 1"; expected'),
    "another base": (spoil_adapter({"base": fingerprint(base(seed=1))}), "was trained on another base model"),
    "unknown option": (spoil_adapter({"layers": '{"blocks.1.q": {"options": {"rank": 2}}}'}), "lora has no option"),
    "array missing": (spoil_adapter(**{A: None}), 'tensor "blocks.1.q.arrays.A": is missing'),
    "array too many": (spoil_adapter(blocks__1__q__arrays__C=np.ones(3)), "belongs to nothing in this model"),
    "array of another shape": (spoil_adapter(**{A: np.ones((3, 16), np.float32)}), r"F32\(3, 16\); expected \(2, 16\)"),
    "array of integers": (spoil_adapter(**{A: np.ones((2, 16), int)}), 'its dtype is "I64"; weights are'),
}


@pytest.mark.parametrize("name", BAD_ADAPTERS)
def test_a_bad_adapter_file_is_one_error_that_names_it_and_changes_nothing(tmp_path, name):
    spoil, message = BAD_ADAPTERS[name]
    path, model = tmp_path / "adapter.safetensors", base()
    save_adapter(path, trained("lora"), fingerprint(model))
    spoil(path)
    before = state(model)
    with pytest.raises(AdapterFormatError, match=message) as caught:
        load_adapter(path, model)
    assert_untouched(model, before)
    assert caught.value.file == str(path) and str(path) in str(caught.value)


@pytest.mark.parametrize("ranks", [{}, {"rank_pattern": {"q": 3}, "alpha_pattern": {"up": 5.0}}])
@pytest.mark.parametrize("name", methods.names())
def test_the_shapes_that_a_file_is_held_to_are_those_of_the_arrays(name, ranks):
    """They are found without the arrays, so that a file that lies about its rank gets nothing allocated."""
    method = methods.create(name, **methods.known(name, r=2))
    own = {} if name in ("full", "vera") else ranks
    model = base()
    chosen = plan(model, method, ["q", "up", "blocks.1.down"], **own)
    parts = {"blocks.1.down": {"B": slice(60, 76)}} if name == "vera" and ranks else {}
    promised = adapter_shapes(model, chosen, parts)
    host(model, chosen, parts=parts)
    assert promised == {name: p.shape for name, p in adapter_arrays(model).items()}


# -------------------------------------------------------------------------------- writing


def test_a_folder_is_made_and_left_empty(tmp_path):
    folder = tmp_path / "a" / "b"
    assert writable_folder(str(folder)) == folder
    assert folder.is_dir() and list(folder.iterdir()) == []
    assert writable_folder(folder) == folder


@pytest.mark.parametrize("below", ["", "sub", "sub/sub"])
def test_a_folder_at_or_below_a_file_is_one_clear_error(tmp_path, below):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(InputError, match=r"cannot write to the folder .*file.*choose another with --out"):
        writable_folder(tmp_path / "file" / below)
    assert (tmp_path / "file").read_text() == "not a folder"


def test_a_folder_without_permission_is_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.setattr(files.Path, "touch", lambda self: (_ for _ in ()).throw(PermissionError(13, "denied")))
    with pytest.raises(InputError, match=r"cannot write to the folder .*: denied"):
        writable_folder(tmp_path)
