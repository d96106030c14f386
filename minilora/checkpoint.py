"""Weights in files: a base model as .npz, which NumPy alone can read, and an adapter as safetensors. Never pickle.

A file is written beside its target and renamed over it, so that an interrupted save leaves the old one whole.
"""

import hashlib
import io
import json
import os
import zipfile
import zlib
from dataclasses import asdict
from importlib import resources
from pathlib import Path

import numpy as np

from .backend import array_module, to_device, to_host
from .errors import InputError, nearest
from .gpt import GPT, GPTConfig
from .surgery import adapt, adapted_layers, unload

FORMAT = "minilora adapter 1"
CONFIG = "config"  # the .npz member that holds the GPTConfig as JSON text


def write_atomically(path, data: bytes) -> None:
    """Write ``data`` to ``path``: a temporary file in the same folder, flushed to the disk, renamed over the target."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def writable_folder(path) -> Path:
    """``path`` as a folder that exists and can be written to. Raises InputError where it cannot."""
    folder = Path(path)
    probe = folder / f".probe.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(
            f'cannot write to the folder "{folder}": {error.strerror}; choose another with --out'
        ) from error
    return folder


def save_model(path, model: GPT) -> None:
    """Save a model in its dtype, as .npz. Raises InputError for one with adapters."""
    if adapted_layers(model):
        raise InputError("save_model: this model has adapters; use save_adapter(), or merge_and_unload(model) first")
    buffer = io.BytesIO()
    arrays = {name: to_host(p.data) for name, p in model.named_parameters()}
    np.savez_compressed(buffer, **{CONFIG: json.dumps(asdict(model.config))}, **arrays)
    write_atomically(path, buffer.getvalue())


def load_model(path) -> GPT:
    """The model that save_model() wrote.

    Raises InputError for a missing file, one that is no .npz, or arrays that are not exactly the configuration's.
    """
    try:
        with open(path, "rb") as file:
            members = dict(np.load(file, allow_pickle=False))
    except FileNotFoundError:
        raise InputError(f'there is no model file "{path}"') from None
    except (OSError, ValueError, TypeError, EOFError, zlib.error, zipfile.BadZipFile, NotImplementedError) as error:
        raise InputError(f'"{path}" is not a model file that save_model() wrote: {error}') from error
    try:
        config = GPTConfig(**json.loads(str(members.pop(CONFIG))))
    except (KeyError, TypeError, ValueError) as error:  # InputError and JSONDecodeError are ValueErrors
        raise InputError(f'"{path}" holds no model configuration that can be used ({error})') from error
    model = GPT(config, dtype=next((a.dtype for a in members.values() if a.dtype.kind == "f"), np.float32))
    assign(dict(model.named_parameters()), members, path)
    return model


def pretrained() -> GPT:
    """The tiny GPT that comes with minilora: pre-trained on Shakespeare in modern spelling by ``minilora pretrain``."""
    with resources.as_file(resources.files("minilora.data") / "pretrained.npz") as path:
        return load_model(path)


def load_base(path=None) -> GPT:
    """The model of ``path``, or the shipped one where none is given."""
    return pretrained() if path is None else load_model(path)


def fingerprint(model: GPT) -> str:
    """SHA-256 over the base model's arrays, by which an adapter knows the model that it was trained on."""
    digest = hashlib.sha256()
    for name, p in model.named_parameters():
        digest.update(name.encode() + str(p.shape).encode() + np.ascontiguousarray(to_host(p.data)).tobytes())
    return digest.hexdigest()


def adapter_arrays(model: GPT) -> dict:
    """The Parameters that make the adapter, by path: all that is not the base's, and W where the method moves it."""
    layers = adapted_layers(model)
    base = {f"{path}.base.{name}" for path in layers for name in ("W", "b")}
    moved = {f"{path}.base.W" for path, layer in layers.items() if layer.method.updates_base}
    inside = (*(f"{path}." for path in layers), "shared.")
    return {n: p for n, p in model.named_parameters() if n.startswith(inside) and n not in base - moved}


def save_adapter(path, model: GPT, base_fingerprint: str) -> None:
    """Save what adapt() added and training changed, with the method, its options and layers, as safetensors.

    Raises InputError for a model that is not adapted.
    """
    from safetensors.numpy import save

    layers = adapted_layers(model)
    if not layers:
        raise InputError("save_adapter: this model has no adapter; call adapt() first")
    method = next(iter(layers.values())).method
    metadata = {
        "format": FORMAT,
        "method": method.name,
        "options": json.dumps(asdict(method)),
        "layers": json.dumps(list(layers)),
        "base": base_fingerprint,
    }
    arrays = {name: np.ascontiguousarray(to_host(p.data)) for name, p in adapter_arrays(model).items()}
    write_atomically(path, save(arrays, metadata))


def load_adapter(path, model: GPT) -> GPT:
    """Put the adapter of a save_adapter() file into ``model``, the base model that it was trained on.

    Raises InputError for a missing or foreign file, another base model, or arrays that do not fit.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            metadata, arrays = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise InputError(f'there is no adapter file "{path}"') from None
    except (OSError, SafetensorError) as error:
        raise InputError(f'"{path}" is not an adapter file: {error}') from error
    if metadata.get("format") != FORMAT:
        raise InputError(f'"{path}" is a safetensors file, but not one that save_adapter() wrote')
    try:
        base, method = metadata["base"], metadata["method"]
        options, layers = json.loads(metadata["options"]), json.loads(metadata["layers"])
    except (KeyError, json.JSONDecodeError) as error:
        raise InputError(f'"{path}": the description of the adapter is damaged ({error!r})') from error
    if base != fingerprint(model):
        raise InputError(
            f'"{path}" was trained on another base model; load that one first (--base on the command line)'
        )
    before = [(p, p.node) for _, p in model.named_parameters()]
    try:
        adapt(model, method, layers, verbose=False, **options)
    except InputError as error:  # nothing has been changed then
        raise InputError(f'"{path}": {error}') from error
    try:
        assign(adapter_arrays(model), arrays, path)
    except InputError:
        unload(model)
        for p, node in before:
            p.node = node
        raise
    return model


def assign(params: dict, arrays: dict, path) -> None:
    """Put ``arrays`` into the Parameters of the same names. Raises InputError, before any is set, unless all fit."""
    for name in arrays.keys() - params.keys():
        raise InputError(f'"{path}": array "{name}" belongs to no parameter{nearest(name, params)}')
    for name, p in params.items():
        if name not in arrays:
            raise InputError(f'"{path}": there is no array "{name}"')
        array = arrays[name]
        if array.shape != p.shape or array.dtype.kind != "f":
            raise InputError(f'"{path}": array "{name}" is {array.dtype}{array.shape}; expected {p.dtype}{p.shape}')
    for name, p in params.items():
        p.data = to_device(arrays[name].astype(p.dtype, copy=False), array_module(p.data))
