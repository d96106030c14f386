"""GPT-2 as Hugging Face transformers keeps it: a folder with config.json and model.safetensors, read and written.

The model is the one of gpt.py under other names: weights lie transposed, and q, k and v are one layer there.
"""

import json
import re
from pathlib import Path

import numpy as np

from ..backend import array_module, to_device
from ..errors import InputError
from ..gpt import GPT, GPTConfig
from ..surgery import adapted_layers
from .base import host_arrays
from .errors import FormatError, shown_json
from .peft_config import is_one_of
from .saving import writable_folder, write_together
from .tensorfile import TensorFile, parse_json, read_arrays, read_bytes, refuse_pickle, tensor_bytes

CONFIG, WEIGHTS, INDEX, PICKLE = "config.json", "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"
CONFIG_BYTES, INDEX_BYTES = 1 << 20, 1 << 22  # caps on what is read
PREFIX, HEAD = "transformer.", "lm_head.weight"
MODULES = {"attn.c_attn": ("q", "k", "v"), "attn.c_proj": ("o",), "mlp.c_fc": ("up",), "mlp.c_proj": ("down",)}
NORMS = {"ln_1": "norm1", "ln_2": "norm2"}
SIZES = {"vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12}  # transformers' defaults
SUPPORTED = {  # config.json: the values that gpt.py computes, transformers' default first
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "tie_word_embeddings": (True,),
    "add_cross_attention": (False,),
}
MASK = re.compile(rf"({re.escape(PREFIX)})?h\.(\d{{1,6}})\.attn\.(masked_)?bias")  # the causal mask, in older files


def modules(n_layer: int) -> dict[str, list[str]]:
    """The linear layers by transformers' names: {``h.0.attn.c_attn``: [``blocks.0.q``, ``blocks.0.k``, …]}."""
    return {
        f"h.{i}.{module}": [f"blocks.{i}.{layer}" for layer in layers]
        for i in range(n_layer)
        for module, layers in MODULES.items()
    }


def tensors(config: GPTConfig) -> dict:
    """{transformers' name: (its shape, the names of our arrays that it holds)}, without the prefix."""
    d, wide = config.n_embd, 4 * config.n_embd
    shapes = {"attn.c_attn": (d, 3 * d), "attn.c_proj": (d, d), "mlp.c_fc": (d, wide), "mlp.c_proj": (wide, d)}
    norms = {"ln_f": "norm"}
    for i in range(config.n_layer):
        norms |= {f"h.{i}.{theirs}": f"blocks.{i}.{ours}" for theirs, ours in NORMS.items()}
    found = {"wte.weight": ((config.vocab_size, d), ["tokens"]), "wpe.weight": ((config.n_positions, d), ["positions"])}
    for theirs, ours in norms.items():
        found[f"{theirs}.weight"] = ((d,), [f"{ours}.g"])
        found[f"{theirs}.bias"] = ((d,), [f"{ours}.b"])
    for module, layers in modules(config.n_layer).items():
        shape = shapes[module.split(".", 2)[2]]
        found[f"{module}.weight"] = (shape, [f"{layer}.W" for layer in layers])
        found[f"{module}.bias"] = (shape[1:], [f"{layer}.b" for layer in layers])
    return found


def load_gpt2(folder) -> GPT:
    """The GPT-2 of a folder that transformers' save_pretrained() wrote, as a float32 model.

    GPT2LMHeadModel's and GPT2Model's names are both read, in one file or several. Dropout rates in the configuration
    are not taken over: they count in training alone, and an adapter is trained without. Raises FormatError, before an
    array is allocated, for a configuration that gpt.py does not compute, or files that do not hold exactly its arrays.
    """
    folder = Path(folder)
    config = read_config(folder)
    files = open_weights(folder, unread=lambda name: is_mask(name, config.n_layer))
    present = {name for file in files for name in file.tensors}
    if config.n_layer > len(present):  # before a list of its layers is made
        files[0].fail(f"{CONFIG} says n_layer {config.n_layer}, and there are {len(present)} tensors")
    prefix = PREFIX if any(name.startswith(PREFIX) for name in present) else ""
    layout = {prefix + name: entry for name, entry in tensors(config).items()}
    shapes = {name: shape for name, (shape, _) in layout.items()}
    embedding = f"{prefix}wte.weight"
    if HEAD in present:
        shapes[HEAD] = shapes[embedding]
    expected = divide(files, shapes)
    for file, own in zip(files, expected, strict=True):
        file.check(own)
    model, found, arrays = GPT(config), {}, {}
    for file, own in zip(files, expected, strict=True):
        found |= read_arrays(file, model, own)
    if HEAD in found and not np.array_equal(found[HEAD], found[embedding]):
        files[0].fail("differs from wte.weight; gpt.py ties the two", HEAD)
    for name, (_, ours) in layout.items():
        arrays |= dict(zip(ours, np.split(turned(ours, found[name]), len(ours)), strict=True))
    for name, p in model.named_parameters():
        p.data = to_device(np.array(arrays[name], order="C"), array_module(p.data))
    return model


def turned(ours, array):
    """``array`` as transformers has it, if it is a weight: its Conv1D keeps the transpose, (d_in, d_out)."""
    return array.T if ours[0].endswith(".W") else array


def is_mask(name, n_layer) -> bool:
    """Is it a block's causal mask, which older versions of transformers stored beside the weights?"""
    match = MASK.fullmatch(name)
    return match is not None and int(match[2]) < n_layer


def read_config(folder: Path) -> GPTConfig:
    path = folder / CONFIG
    found = parse_json(read_bytes(path, CONFIG_BYTES, "the config.json of a GPT-2"), path, "configuration")
    if not isinstance(found, dict):
        raise FormatError(path, "the configuration is not a map")
    for key, supported in SUPPORTED.items():
        value = found.get(key, supported[0])
        if not is_one_of(value, supported):
            names = " or ".join(map(json.dumps, supported))
            raise FormatError(path, f"{key} is {shown_json(value)}; supported: {names}")
    sizes = {key: found.get(key, default) for key, default in SIZES.items()}
    for key, value in sizes.items():
        if type(value) is not int or not 0 < value < 2**31:
            raise FormatError(path, f"{key} is {shown_json(value)}; it must be an integer of at least 1")
    if found.get("n_inner") not in (None, 4 * sizes["n_embd"]):
        raise FormatError(path, f"n_inner is {shown_json(found['n_inner'])}; supported: null or 4 n_embd")
    try:
        return GPTConfig(**sizes)
    except InputError as error:
        raise FormatError(path, str(error)) from None


def open_weights(folder: Path, unread) -> list[TensorFile]:
    """The safetensors files of a folder, their headers checked: one, or those that an index names."""
    path = folder / INDEX
    if (folder / WEIGHTS).exists() or not path.exists():
        refuse_pickle(folder / PICKLE, folder / WEIGHTS, "transformers", FormatError)
        return [TensorFile(folder / WEIGHTS, "a safetensors file of weights", unread=unread)]
    index = parse_json(read_bytes(path, INDEX_BYTES, "an index of weights"), path, "index")
    shards = index.get("weight_map") if isinstance(index, dict) else None
    names = shards.values() if isinstance(shards, dict) and shards else [None]
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(r"[\w-][\w.-]*\.safetensors", name):
            raise FormatError(path, f"weight_map names {shown_json(name)}; expected a .safetensors file in the folder")
    return [TensorFile(folder / name, "a safetensors file of weights", unread=unread) for name in sorted(set(names))]


def divide(files: list[TensorFile], shapes: dict) -> list[dict]:
    """The part of ``shapes`` {name: shape} that each file must hold; the last one must hold what no other has."""
    rest, parts = dict(shapes), []
    for file in files[:-1]:
        parts.append({name: rest.pop(name) for name in file.tensors if name in rest})
    return [*parts, rest]


def save_gpt2(folder, model: GPT) -> None:
    """Write ``model`` as a folder that transformers' ``GPT2LMHeadModel.from_pretrained(folder)`` loads.

    Raises InputError for a model with adapters, and where the disk does not take it.
    """
    if adapted_layers(model):
        raise InputError(
            "save_gpt2: this model has adapters; call merge_and_unload(model) first, or use save_peft(…, form='merged')"
        )
    write_gpt2(folder, model.config, host_arrays(dict(model.named_parameters())))


def write_gpt2(folder, config: GPTConfig, arrays: dict) -> dict:
    """save_gpt2() for the arrays {name: ndarray} of a model; returns what config.json says."""
    folder = writable_folder(folder)
    written = {}
    for name, (_, ours) in tensors(config).items():
        written[PREFIX + name] = turned(ours, np.concatenate([arrays[own] for own in ours]))
    said = description(config, arrays)
    text = json.dumps(said, indent=2, sort_keys=True).encode() + b"\n"
    write_together({folder / WEIGHTS: tensor_bytes(written, {"format": "pt"}), folder / CONFIG: text})
    return said


def description(config: GPTConfig, arrays: dict) -> dict:
    """config.json. The dropout of embeddings and residuals is the model's; its attention has none."""
    end = 50256 if config.vocab_size > 50256 else None  # GPT-2's own <|endoftext|>, where there is one
    return {
        **{key: values[0] for key, values in SUPPORTED.items()},
        **{key: getattr(config, key) for key in SIZES},
        "architectures": ["GPT2LMHeadModel"],
        "attn_pdrop": 0.0,
        "bos_token_id": end,
        "dtype": str(arrays["tokens"].dtype),
        "embd_pdrop": config.dropout,
        "eos_token_id": end,
        "n_inner": None,
        "resid_pdrop": config.dropout,
    }
