"""A folder of transformers' GPT-2 is read to the bit, and one that is wrong in any way is one clear error.

transformers itself is the judge in oracle/test_peft_files.py; here its files are made by hand.
"""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny import TINY, base, logits

from minilora.cli import main
from minilora.errors import InputError
from minilora.files.base import load_base, save_model
from minilora.files.errors import FormatError
from minilora.files.gpt2 import load_gpt2, modules, save_gpt2, tensors
from minilora.surgery import adapt, linear_layers

C_ATTN = "transformer.h.1.attn.c_attn.weight"


def same(one, other):
    return all(
        np.array_equal(a.data, b.data)
        for (_, a), (_, b) in zip(one.named_parameters(), other.named_parameters(), strict=True)
    )


@pytest.fixture
def folder(tmp_path):
    save_gpt2(tmp_path / "model", base())
    return tmp_path / "model"


def rewrite(folder, change, name="model.safetensors"):
    """The file ``name`` with its arrays changed by ``change``, a function of {name: array}."""
    arrays = load_file(folder / name)
    save_file({n: np.ascontiguousarray(a) for n, a in (change(arrays) or arrays).items()}, folder / name)


def configure(**changes):
    """A change of config.json; ``None`` stands for null, ``...`` takes a key away."""

    def spoil(folder):
        config = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))

    return spoil


# ----------------------------------------------------------------------------------------------------- what is right


def test_a_model_comes_back_to_the_bit(folder):
    loaded = load_gpt2(folder)
    assert loaded.config == TINY
    assert same(loaded, base())
    np.testing.assert_array_equal(logits(loaded), logits(base()))
    assert all(p.requires_grad and p.dtype == np.float32 for _, p in loaded.named_parameters())


def test_the_file_has_transformers_names_and_layout(folder):
    arrays, model = load_file(folder / "model.safetensors"), base()
    block = model.blocks[1]
    fused = np.concatenate([np.asarray(layer.W.data) for layer in (block.q, block.k, block.v)])
    np.testing.assert_array_equal(arrays[C_ATTN], fused.T)
    assert arrays["transformer.h.0.mlp.c_fc.weight"].shape == (16, 64)
    assert arrays["transformer.h.0.mlp.c_proj.weight"].shape == (64, 16)
    np.testing.assert_array_equal(arrays["transformer.h.1.ln_2.bias"], block.norm2.b.data)
    np.testing.assert_array_equal(arrays["transformer.wte.weight"], model.tokens.data)
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "gpt2" and config["n_embd"] == 16 and config["dtype"] == "float32"
    assert config["eos_token_id"] is None  # 50256 is not among 11 tokens
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_every_array_and_layer_has_its_place():
    model = base()
    assert sorted(name for _, names in tensors(TINY).values() for name in names) == sorted(
        name for name, _ in model.named_parameters()
    )
    assert [path for paths in modules(2).values() for path in paths] == list(linear_layers(model))


def test_the_names_of_a_model_without_head(folder):
    rewrite(folder, lambda arrays: {n.removeprefix("transformer."): a for n, a in arrays.items()})
    assert same(load_gpt2(folder), base())


def test_the_masks_of_older_files_are_not_read(folder):
    mask = {f"transformer.h.{i}.attn.bias": np.tril(np.ones((1, 1, 8, 8), bool)) for i in range(2)}
    masked = {"transformer.h.0.attn.masked_bias": np.array(-1e4, np.float32)}
    rewrite(folder, lambda arrays: arrays | mask | masked)
    assert same(load_gpt2(folder), base())


def test_a_head_that_is_tied_may_be_there(folder):
    rewrite(folder, lambda arrays: arrays | {"lm_head.weight": arrays["transformer.wte.weight"]})
    assert same(load_gpt2(folder), base())


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_precisions_become_float32(folder, dtype):
    rewrite(folder, lambda arrays: {n: a.astype(dtype) for n, a in arrays.items()})
    loaded = load_gpt2(folder)
    assert {p.dtype for _, p in loaded.named_parameters()} == {np.dtype(np.float32)}
    np.testing.assert_allclose(logits(loaded), logits(base()), rtol=0, atol=2e-2 if dtype is np.float16 else 0)


@pytest.mark.parametrize(
    "change",
    [
        {"attn_pdrop": 0.5, "resid_pdrop": 0.5, "embd_pdrop": 0.5, "summary_type": "cls_index", "new_key": 3},
        {"activation_function": "gelu_pytorch_tanh", "n_inner": 64, "reorder_and_upcast_attn": True},
        {"n_inner": ..., "activation_function": ..., "layer_norm_epsilon": ..., "tie_word_embeddings": ...},
    ],
    ids=["dropout and other data", "synonyms", "defaults"],
)
def test_a_configuration_that_says_the_same_in_other_words(folder, change):
    configure(**change)(folder)
    assert load_gpt2(folder).config == TINY  # the dropout too: it is 0


def shard(folder, index=None):
    """model.safetensors in two files and an index, as save_pretrained() divides a large model."""
    arrays = load_file(folder / "model.safetensors")
    names = sorted(arrays)
    files = {n: f"model-0000{1 + (i > 9)}-of-00002.safetensors" for i, n in enumerate(names)}
    for file in set(files.values()):
        save_file({n: arrays[n] for n in names if files[n] == file}, folder / file)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index or {"metadata": {}, "weight_map": files}))


def test_a_model_in_several_files(folder):
    shard(folder)
    assert same(load_gpt2(folder), base())


def test_load_base_takes_a_folder(folder):
    assert same(load_base(str(folder)), base())


def test_a_float64_model_is_written_as_it_is(tmp_path):
    save_gpt2(tmp_path, base(np.float64))
    assert {a.dtype for a in load_file(tmp_path / "model.safetensors").values()} == {np.dtype(np.float64)}
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float64"


def test_a_model_with_adapters_is_not_written(tmp_path):
    with pytest.raises(InputError, match=r"merge_and_unload\(model\) first"):
        save_gpt2(tmp_path / "new", adapt(base(), "lora", r=2, verbose=False))
    assert not (tmp_path / "new").exists()


# ----------------------------------------------------------------------------------------------------- what is wrong


def spoil(change):
    return lambda folder: rewrite(folder, change)


def only_a_pickle(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def sharded(**weight_map):
    return lambda folder: shard(folder, {"weight_map": weight_map})


def lose_a_tensor(folder):
    shard(folder)
    rewrite(folder, lambda a: {n: v for n, v in a.items() if n != C_ATTN}, "model-00002-of-00002.safetensors")
    rewrite(folder, lambda a: {n: v for n, v in a.items() if n != C_ATTN}, "model-00001-of-00002.safetensors")


def twice(folder):
    shard(folder)
    extra = load_file(folder / "model-00001-of-00002.safetensors").popitem()
    rewrite(folder, lambda a: a | dict([extra]), "model-00002-of-00002.safetensors")


def without(name):
    return spoil(lambda arrays: {n: a for n, a in arrays.items() if n != name})


def having(name, array):
    return spoil(lambda arrays: arrays | {name: array})


CONFIGURED = [  # (a key, a value that is refused, what the error says)
    ("model_type", "llama", 'model_type is "llama"; supported: "gpt2"'),
    ("activation_function", "relu", "activation_function is .*gelu_new"),
    ("layer_norm_epsilon", 1e-6, "layer_norm_epsilon is 1e-06; supported: 1e-05"),
    ("scale_attn_weights", False, "scale_attn_weights is false; supported: true"),
    ("scale_attn_weights", 1, "scale_attn_weights is 1; supported: true"),
    ("scale_attn_by_inverse_layer_idx", True, "scale_attn_by_inverse_layer_idx is true"),
    ("tie_word_embeddings", False, "tie_word_embeddings is false; supported: true"),
    ("add_cross_attention", True, "add_cross_attention is true; supported: false"),
    ("n_inner", 63, "n_inner is 63; supported: null or 4 n_embd"),
    ("n_layer", True, "n_layer is true; it must be an integer of at least 1"),
    ("n_embd", 0, "n_embd is 0; it must be"),
    ("n_head", "2", "n_head is .*; it must be"),
    ("n_head", 3, "n_embd 16 is not a multiple of n_head 3"),
    ("n_layer", 10**9, "says n_layer 1000000000, and there are 28 tensors"),
    ("vocab_size", 10**9, r'"transformer.wte.weight": is F32\(11, 16\); expected \(1000000000'),
    ("n_embd", 2 * 10**9, r"expected \(11, 2000000000\)"),
    ("n_layer", 1, '"transformer.h.1.*": belongs to nothing in this model'),
    ("n_layer", 3, '"transformer.h.2.*": is missing'),
]
BAD = [
    *((configure(**{key: value}), message) for key, value, message in CONFIGURED),
    (lambda folder: (folder / "config.json").unlink(), "there is no such file; the config.json of a GPT-2"),
    (lambda folder: (folder / "config.json").write_text("{"), "is not JSON"),
    (lambda folder: (folder / "config.json").write_text("[]"), "the configuration is not a map"),
    (lambda folder: (folder / "model.safetensors").unlink(), "there is no such file; a safetensors file"),
    (only_a_pickle, r"is a pickle.*save_pretrained\(\) writes model.safetensors"),
    (without(C_ATTN), f'"{C_ATTN}": is missing'),
    (having("score.weight", np.ones(3, np.float32)), '"score.weight": belongs to'),
    (having("transformer.h.2.attn.bias", np.ones(3, np.float32)), '"transformer.h.2.attn.bias": belongs to nothing'),
    (having(C_ATTN, np.ones((48, 16), np.float32)), rf'"{C_ATTN}": is F32\(48, 16\); expected \(16, 48\)'),
    (having(C_ATTN, np.ones((16, 48), int)), f'"{C_ATTN}": its dtype is "I64"'),
    (sharded(**{C_ATTN: "../model.safetensors"}), "weight_map names .*; expected a .safe"),
    (sharded(**{C_ATTN: "pytorch_model.bin"}), "weight_map names .pytorch_model.bin."),
    (sharded(**{C_ATTN: 3}), "weight_map names 3; expected"),
    (sharded(), "weight_map names null; expected"),
    (sharded(**{C_ATTN: "other.safetensors"}), "there is no such file"),
    (lose_a_tensor, f'"{C_ATTN}": is missing'),
    (twice, "belongs to nothing in this model"),
]
BAD_NUMBERS = [
    (having("lm_head.weight", np.ones((11, 16), np.float32)), '"lm_head.weight": differs from wte.weight'),
    (having(C_ATTN, np.full((16, 48), np.nan)), f'"{C_ATTN}": holds NaN'),
    (having(C_ATTN, np.full((16, 48), 1e300)), f'"{C_ATTN}": holds a number'),
]


NAMES = [spoil if isinstance(spoil, str) else spoil.__name__ for spoil, _ in BAD + BAD_NUMBERS]


@pytest.mark.parametrize("spoil_it, message", BAD + BAD_NUMBERS, ids=NAMES)
def test_a_bad_folder_is_one_error_that_names_it(folder, spoil_it, message, monkeypatch):
    spoil_it(folder)
    if (spoil_it, message) in BAD:
        monkeypatch.setattr("minilora.files.gpt2.GPT", None)  # no model may be made
    with pytest.raises(FormatError, match=message) as caught:
        load_gpt2(folder)
    assert caught.value.file.startswith(str(folder))


def test_a_mask_is_not_read_but_must_lie_right(folder):
    """A dtype that weights do not have is let through for a mask alone."""
    rewrite(folder, lambda arrays: arrays | {"transformer.wpe.weight": np.ones((8, 16), bool)})
    with pytest.raises(
        FormatError, match=r'"transformer.wpe.weight": its dtype is "BOOL"; weights are one of F64, F32'
    ):
        load_gpt2(folder)


@pytest.mark.parametrize(
    "argv", [["generate"], ["train", "lora", "--steps", "1"], ["compare", "--steps", "1"]], ids=str
)
def test_a_model_with_another_vocabulary_is_one_clear_sentence(folder, tmp_path, monkeypatch, capsys, argv):
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "model.safetensors", base())
    for model in (folder, tmp_path / "model.safetensors"):
        assert main([*argv, "--base", str(model)]) == 2
        assert "has 11 tokens, and the tokenizer 96 characters; a model that reads" in capsys.readouterr().err
