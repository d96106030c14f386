"""A folder of transformers' GPT-2 is read to the bit, and one that is wrong in any way is one clear error.

transformers itself is the judge in oracle/test_peft_files.py; here its files are made by hand.
"""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny import TINY, base

from minilora.cli import main
from minilora.errors import InputError
from minilora.files.base import load_base
from minilora.files.errors import FormatError
from minilora.files.gpt2 import load_gpt2, save_gpt2
from minilora.surgery import adapt

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


def shard(folder, index=None):
    """model.safetensors in two files and an index, as save_pretrained() divides a large model."""
    arrays = load_file(folder / "model.safetensors")
    names = sorted(arrays)
    files = {n: f"model-0000{1 + (i > 9)}-of-00002.safetensors" for i, n in enumerate(names)}
    for file in set(files.values()):
        save_file({n: arrays[n] for n in names if files[n] == file}, folder / file)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index or {"metadata": {}, "weight_map": files}))


MASKS = {f"transformer.h.{i}.attn.bias": np.tril(np.ones((1, 1, 8, 8), bool)) for i in range(2)}
MASKED = {"transformer.h.0.attn.masked_bias": np.array(-1e4, np.float32)}
GOOD = {  # what is written here, and what other writers and versions do
    "as it is": lambda folder: None,
    "without the head's prefix": lambda f: rewrite(
        f, lambda a: {n.removeprefix("transformer."): v for n, v in a.items()}
    ),
    "with the masks of older files": lambda f: rewrite(f, lambda a: a | MASKS | MASKED),
    "with the tied head": lambda f: rewrite(f, lambda a: a | {"lm_head.weight": a["transformer.wte.weight"]}),
    "in float64": lambda f: rewrite(f, lambda a: {n: v.astype(np.float64) for n, v in a.items()}),
    "in several files": shard,
    "with dropout and other data": configure(attn_pdrop=0.5, embd_pdrop=0.5, summary_type="cls_index", new_key=3),
    "with synonyms": configure(activation_function="gelu_pytorch_tanh", n_inner=64, reorder_and_upcast_attn=True),
    "with defaults": configure(n_inner=..., activation_function=..., layer_norm_epsilon=..., tie_word_embeddings=...),
}


@pytest.mark.parametrize("case", GOOD)
def test_what_is_said_in_another_way_is_the_same_model(folder, case):
    GOOD[case](folder)
    loaded = load_base(str(folder))
    assert same(loaded, base()) and loaded.config == TINY  # the dropout too: it is 0
    assert all(p.requires_grad and p.dtype == np.float32 for _, p in loaded.named_parameters())


def test_a_float64_model_is_written_as_it_is(tmp_path):
    save_gpt2(tmp_path, base(np.float64))
    assert {a.dtype for a in load_file(tmp_path / "model.safetensors").values()} == {np.dtype(np.float64)}
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float64"


def test_a_model_with_adapters_is_not_written(tmp_path):
    with pytest.raises(InputError, match=r"merge_and_unload\(model\) first"):
        save_gpt2(tmp_path / "new", adapt(base(), "lora", r=2, verbose=False))
    assert not (tmp_path / "new").exists()


# ----------------------------------------------------------------------------------------------------- what is wrong


def lose_a_tensor(folder):
    shard(folder)
    rewrite(folder, lambda a: {n: v for n, v in a.items() if n != C_ATTN}, "model-00002-of-00002.safetensors")
    rewrite(folder, lambda a: {n: v for n, v in a.items() if n != C_ATTN}, "model-00001-of-00002.safetensors")


def twice(folder):
    shard(folder)
    extra = load_file(folder / "model-00001-of-00002.safetensors").popitem()
    rewrite(folder, lambda a: a | dict([extra]), "model-00002-of-00002.safetensors")


def having(**arrays):
    """A change of the tensors."""
    return lambda folder: rewrite(folder, lambda found: found | arrays)


BAD = [  # (what is spoilt, what the error says); hostile.py has hundreds more
    (configure(n_head=3), "n_embd 16 is not a multiple of n_head 3"),
    (configure(n_layer=10**9), "says n_layer 1000000000, and there are 28 tensors"),
    (configure(vocab_size=10**9), r'"transformer.wte.weight": is F32\(11, 16\); expected \(1000000000'),
    (configure(n_layer=1), '"transformer.h.1.*": belongs to nothing in this model'),
    (configure(n_layer=3), '"transformer.h.2.*": is missing'),
    (having(**{"transformer.h.2.attn.bias": np.ones(3)}), '"transformer.h.2.attn.bias": belongs to nothing'),
    (lambda folder: shard(folder, {"weight_map": {C_ATTN: "other.safetensors"}}), "there is no such file"),
    (lose_a_tensor, f'"{C_ATTN}": is missing'),
    (twice, "belongs to nothing in this model"),
    (having(**{"transformer.wpe.weight": np.ones((8, 16), bool)}), '"transformer.wpe.weight": its dtype is "BOOL"'),
]
DIFFERENT_HEAD = having(**{"lm_head.weight": np.ones((11, 16), np.float32)}), "differs from wte.weight"


@pytest.mark.parametrize("spoil, message", [*BAD, DIFFERENT_HEAD], ids=range(1 + len(BAD)))
def test_a_bad_folder_is_one_error_that_names_it(folder, spoil, message, monkeypatch):
    spoil(folder)
    if (spoil, message) != DIFFERENT_HEAD:
        monkeypatch.setattr("minilora.files.gpt2.GPT", None)  # no model may be made
    with pytest.raises(FormatError, match=message) as caught:
        load_gpt2(folder)
    assert caught.value.file.startswith(str(folder))


@pytest.mark.parametrize("command", ["generate", "train lora --steps 1", "compare --steps 1"])
def test_a_model_with_another_vocabulary_is_one_clear_sentence(folder, tmp_path, monkeypatch, capsys, command):
    monkeypatch.chdir(tmp_path)
    assert main([*command.split(), "--base", str(folder)]) == 2
    assert "has 11 tokens, and the tokenizer 96 characters; a model that reads" in capsys.readouterr().err
