"""Base models in files: save_model, load_model, and the tiny one that is shipped."""

import hashlib
import json
import os
from dataclasses import asdict
from importlib import resources

import numpy as np

from ..backend import array_module, to_device, to_host
from ..errors import InputError, shown
from ..gpt import GPT, GPTConfig
from ..surgery import adapted_layers
from .tensorfile import DIGEST, TensorFile, described, read_arrays, require, write_tensors

MODEL, FORMAT, TRAINING = "minilora model 1", "minilora adapter 2", "minilora training 1"


def save_model(path, model: GPT) -> None:
    """Save a model in its dtype, as safetensors. Raises InputError for one with adapters."""
    if adapted_layers(model):
        raise InputError("save_model: this model has adapters; use save_adapter(), or merge_and_unload(model) first")
    metadata = {"format": MODEL, "config": json.dumps(asdict(model.config))}
    write_tensors(path, host_arrays(dict(model.named_parameters())), metadata)


def load_model(path) -> GPT:
    """The model that save_model() wrote.

    Raises FormatError, before an array is allocated, for a missing or foreign file, or arrays that are not exactly the
    configuration's.
    """
    file = TensorFile(path, "a model file")
    if file.metadata.get("format") != MODEL:
        file.fail(f"is no model of the format {shown(MODEL)}; minilora pretrain and save_model() write one")
    require(file, "model", "config", DIGEST)
    found = described(file, "config")
    try:
        config = GPTConfig(**found)
    except (InputError, TypeError) as error:
        file.fail(f"no usable config: {error}")
    if config.n_layer > len(file.tensors):  # before a list of its layers is made
        file.fail(f"its config has {config.n_layer:,} layers, and the file {len(file.tensors)} tensors")
    shapes = model_shapes(config)
    file.check(shapes)
    model = GPT(config, dtype=np.float64 if file.tensors["tokens"][0] == "F64" else np.float32)
    arrays = read_arrays(file, model, shapes)
    for name, p in model.named_parameters():
        p.data = to_device(arrays[name], array_module(p.data))
    return model


def model_shapes(config: GPTConfig) -> dict:
    """{name: shape} of a model's arrays, with none of them made: read off a small one whose sizes all differ."""
    small = GPT(GPTConfig(vocab_size=3, n_positions=5, n_embd=2, n_layer=1, n_head=1))
    sizes = {3: config.vocab_size, 5: config.n_positions, 2: config.n_embd, 8: 4 * config.n_embd}
    return {
        name.replace("blocks.0.", f"blocks.{i}."): tuple(sizes[n] for n in p.shape)
        for name, p in small.named_parameters()
        for i in range(config.n_layer if name.startswith("blocks.") else 1)
    }


def pretrained() -> GPT:
    """The tiny GPT that comes with minilora: pre-trained on Shakespeare in modern spelling by ``minilora pretrain``."""
    with resources.as_file(resources.files("minilora.data") / "pretrained.safetensors") as path:
        return load_model(path)


def load_base(path=None, vocab_size=None) -> GPT:
    """The model of ``path``, a save_model() file or a folder of transformers' GPT-2; by default the shipped one.

    Raises InputError where the model is for another ``vocab_size`` than the tokenizer's.
    """
    from .gpt2 import load_gpt2

    model = pretrained() if path is None else load_gpt2(path) if os.path.isdir(path) else load_model(path)
    if vocab_size not in (None, model.config.vocab_size):
        raise InputError(
            f'"{path}" has {model.config.vocab_size:,} tokens, and the tokenizer {vocab_size} characters; '
            "a model that reads characters is needed here (minilora pretrain)"
        )
    return model


def fingerprint(model: GPT) -> str:
    """SHA-256 over the base model's arrays, by which an adapter knows the model that it was trained on."""
    digest = hashlib.sha256()
    for name, p in model.named_parameters():
        digest.update(name.encode() + str(p.shape).encode() + np.ascontiguousarray(to_host(p.data)).tobytes())
    return digest.hexdigest()


def host_arrays(params: dict) -> dict:
    return {name: to_host(p.data) for name, p in params.items()}
