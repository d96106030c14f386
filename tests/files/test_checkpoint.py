"""What is saved is loaded to the bit, and a file that is wrong in any way is one clear error and changes nothing.
These tests exist because weights are hours of work: a half-written file or a silent mismatch would lose them.
"""

import numpy as np
import pytest
from tiny import TINY, assert_untouched, base, logits, moved, state

from minilora import methods
from minilora.errors import InputError
from minilora.files import tensorfile as files
from minilora.files.base import fingerprint, load_model, model_shapes, save_model
from minilora.files.checkpoint import adapter_arrays, adapter_shapes, load_adapter, save_adapter
from minilora.files.errors import AdapterFormatError
from minilora.files.saving import writable_folder
from minilora.files.tensorfile import TensorFile, write_tensors
from minilora.gpt import GPT, GPTConfig
from minilora.surgery import adapted_layers, host, plan


def test_what_cannot_be_read_again_is_not_saved(tmp_path):
    """A model with an adapter is no base model, and one without has none to save: either would lose the training."""
    with pytest.raises(InputError, match="adapter"):
        save_model(tmp_path / "model.safetensors", moved("lora"))
    with pytest.raises(InputError, match=r"no adapter; call adapt\(\) first"):
        save_adapter(tmp_path / "adapter.safetensors", base(), "0" * 64)
    assert list(tmp_path.iterdir()) == []


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


@pytest.mark.parametrize("sizes", [TINY, GPTConfig(vocab_size=8, n_positions=2, n_embd=8, n_layer=3, n_head=1)])
def test_the_shapes_of_a_model_are_known_before_it_is_made(sizes):
    assert model_shapes(sizes) == {name: p.shape for name, p in GPT(sizes).named_parameters()}


@pytest.mark.parametrize("name", methods.names())
def test_an_adapter_comes_back_to_the_bit(tmp_path, name):
    """With its options, which no two layers need to share, and without any weight of the base model."""
    own = {"rank_pattern": {"q": 3}, "alpha_pattern": {"up": 0.1}} if "alpha" in methods.options(name) else {}
    model, path = moved(name, ["q", "up", "blocks.1.down"], **own), tmp_path / "adapter.safetensors"
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
    moved_weights = {f"{where}.base.W" for where in layers if layers[where].method.updates_base}
    assert not {name for name in TensorFile(path).tensors if ".base." in name} - moved_weights


def test_the_fingerprint_tells_models_apart():
    one, other = base(), base()
    assert fingerprint(one) == fingerprint(other)
    other.blocks[1].up.b.data[3] = np.nextafter(other.blocks[1].up.b.data[3], np.float32(np.inf))  # the last bit
    assert fingerprint(one) != fingerprint(other)
    assert len(fingerprint(one)) == 64


A = "blocks.1.q.arrays.A"
BAD_ADAPTERS = {  # the arrays that are put in, None takes one out: what the error says; hostile.py has hundreds
    "missing": ({A: None}, f'tensor "{A}": is missing'),
    "too many": ({f"{A}a": np.ones(3)}, "belongs to nothing in this model"),
    "misspelt": ({A: None, f"{A}a": np.ones(3)}, rf'belongs to nothing in this model \(did you mean "{A}"\?\)'),
    "of another shape": ({A: np.ones((3, 16), np.float32)}, r"F32\(3, 16\); expected \(2, 16\)"),
}


@pytest.mark.parametrize("case", BAD_ADAPTERS)
def test_a_bad_adapter_file_is_one_error_that_names_it_and_changes_nothing(tmp_path, case):
    changes, message = BAD_ADAPTERS[case]
    path, model = tmp_path / "adapter.safetensors", base()
    save_adapter(path, moved("lora"), fingerprint(model))
    file = TensorFile(path)
    arrays = {key: a for key, a in (file.read() | changes).items() if a is not None}
    write_tensors(path, arrays, file.metadata)
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


@pytest.mark.parametrize("below", ["", "sub/sub"])
def test_a_folder_at_or_below_a_file_is_one_clear_error(tmp_path, below):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(InputError, match=r"cannot write to the folder .*file.*choose another with --out"):
        writable_folder(tmp_path / "file" / below)
    assert (tmp_path / "file").read_text() == "not a folder"


def test_a_folder_without_permission_is_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.setattr(files.Path, "touch", lambda self: (_ for _ in ()).throw(PermissionError(13, "denied")))
    with pytest.raises(InputError, match=r"cannot write to the folder .*: denied"):
        writable_folder(tmp_path)
