"""Models, adapters and half-done training in files: safetensors with a description of their own, never pickle.

Every save is all or nothing, and every file is checked whole before a model changes; both are files.py's work.
"""

import json
import math
from dataclasses import asdict

import numpy as np

from .. import methods
from ..backend import array_module, to_device, to_host
from ..errors import InputError, nearest, shown
from ..gpt import GPT
from ..surgery import adapted_layers, check_plan, host, linear_layers, shared_shapes
from .base import FORMAT, TRAINING, fingerprint, host_arrays
from .errors import AdapterFormatError
from .tensorfile import DIGEST, TensorFile, described, parse_json, read_arrays, require, write_tensors

SERIES = ("loss", "lr", "grad_norm", "seconds")  # the lists of train.History


def adapter_arrays(model: GPT) -> dict:
    """The Parameters that make the adapter, by path: all that is not the base's, and W where the method moves it."""
    layers = adapted_layers(model)
    inside = ("shared.", *(f"{path}.arrays." for path in layers))
    moved = {f"{path}.base.W" for path, layer in layers.items() if layer.method.updates_base}
    return {n: p for n, p in model.named_parameters() if n.startswith(inside) or n in moved}


def adapter_metadata(model: GPT, base_fingerprint: str) -> dict:
    """What an adapter file says beside its arrays: which method, with which options, in which layer of which base."""
    layers = adapted_layers(model)
    if not layers:
        raise InputError("save_adapter: this model has no adapter; call adapt() first")
    entries = {path: {"options": asdict(layer.method)} for path, layer in layers.items()}
    for path, layer in layers.items():
        if layer.part:
            entries[path]["part"] = {name: [rows.start, rows.stop] for name, rows in layer.part.items()}
    return {
        "format": FORMAT,
        "method": next(iter(layers.values())).method.name,
        "layers": json.dumps(entries),
        "base": base_fingerprint,
    }


def save_adapter(path, model: GPT, base_fingerprint: str) -> None:
    """Save what adapt() added and training changed, with the method, its options and layers, as safetensors.

    Raises InputError for a model that is not adapted, and where the disk does not take it.
    """
    write_tensors(path, host_arrays(adapter_arrays(model)), adapter_metadata(model, base_fingerprint))


def load_adapter(path, model: GPT) -> GPT:
    """Put the adapter of a save_adapter() file into ``model``, the base model that it was trained on.

    Raises AdapterFormatError, with the model as it was, for a missing or foreign file, another base model, or arrays
    that do not fit.
    """
    file = TensorFile(path, "an adapter file", AdapterFormatError)
    chosen, parts = read_description(file, FORMAT, model)
    arrays = read_arrays(file, model, adapter_shapes(model, chosen, parts), integers=integer_arrays(chosen))
    put_adapter(model, chosen, parts, arrays)
    return model


def read_description(file: TensorFile, form: str, model: GPT):
    """(method by layer, parts by layer) from the metadata of an adapter or checkpoint; the base model is compared."""
    if file.metadata.get("format") != form:
        found = file.metadata.get("format", "none")
        file.fail(f"is a safetensors file of the format {shown(found)}; expected {shown(form)}")
    require(file, "adapter", "base", "method", "layers", DIGEST)
    if file.metadata["base"] != fingerprint(model):
        file.fail("was trained on another base model; load that one first (--base on the command line)")
    layers = parse_json(file.metadata["layers"], file.path, "list of layers", file.error)
    if not isinstance(layers, dict) or not layers:
        file.fail("the list of layers is not a map with at least one layer")
    chosen, parts, linears = {}, {}, linear_layers(model)
    for path, entry in layers.items():
        if path not in linears:
            file.fail(f"there is no linear layer {shown(path)} in this model{nearest(path, linears)}")
        if not isinstance(entry, dict) or not set(entry) <= {"options", "part"}:
            file.fail(f"the entry of the layer {shown(path)} has other keys than options and part")
        chosen[path] = read_method(file, path, entry.get("options"))
        if "part" in entry:
            parts[path] = read_part(file, path, entry["part"], chosen[path], linears[path].W.shape[0])
    try:
        check_plan(model, chosen)
    except InputError as error:
        file.fail(str(error))
    return chosen, parts


def read_method(file: TensorFile, path, options):
    """The method of one layer: its name and options are looked up, nothing in them is run."""
    if not isinstance(options, dict):
        file.fail(f"the options of the layer {shown(path)} are not a map")
    try:
        return methods.create(file.metadata["method"], **options)
    except InputError as error:
        file.fail(f"the layer {shown(path)}: {error}")


def read_part(file: TensorFile, path, part, method, d_out):
    """{name: slice} from {name: [start, stop]}: the rows of shared arrays that are the layer's ``d_out`` outputs."""
    here, larger = (method.shared_shapes(n, 1) for n in (d_out, d_out + 1))  # which arrays have a row for each output?
    by_rows = [name for name in here if here[name][:1] == (d_out,) and larger[name][:1] == (d_out + 1,)]
    for name, at in part.items() if isinstance(part, dict) else [(None, part)]:
        pair = isinstance(at, list) and len(at) == 2 and all(type(n) is int and 0 <= n < 2**31 for n in at)
        if name not in by_rows or not pair or at[1] - at[0] != d_out:
            file.fail(f"the part of the layer {shown(path)} is not {d_out} rows [start, stop] of a shared array")
    return {name: slice(*at) for name, at in part.items()}


def save_training(path, model: GPT, base_fingerprint: str, optimizer, history, rng, settings: dict) -> None:
    """Save all that the next step depends on, so that load_training() goes on as if nothing had happened.

    The adapter's arrays with the moved base weights, the optimizer's state, the history (and so the step and the
    schedule's position), the state of ``rng`` (and so the position in the data), and the ``settings``, plain data.
    """
    arrays = host_arrays(adapter_arrays(model))
    arrays |= {f"optimizer.{name}": to_host(array) for name, array in optimizer.state().items()}
    arrays |= {f"history.{name}": np.array(getattr(history, name), np.float64) for name in SERIES}
    metadata = adapter_metadata(model, base_fingerprint) | {
        "format": TRAINING,
        "settings": json.dumps(settings),
        "random": json.dumps(rng.bit_generator.state),
        "counts": json.dumps([len(history.loss), history.tokens_per_step, history.kept_bytes]),
    }
    write_tensors(path, arrays, metadata)


def open_training(path) -> tuple[TensorFile, dict]:
    """A checkpoint that save_training() wrote, its header checked, and its settings. Raises AdapterFormatError."""
    file = TensorFile(path, "a training checkpoint", AdapterFormatError)
    if file.metadata.get("format") != TRAINING:
        file.fail(f"is no training checkpoint of the format {shown(TRAINING)}")
    require(file, "run", "settings", "random", "counts")
    settings = described(file, "settings")
    if not isinstance(settings, dict):
        file.fail("the settings are not a map")
    return file, settings


def steps_taken(file: TensorFile) -> int:
    return read_counts(file)[0]


def read_counts(file: TensorFile) -> list[int]:
    """[steps taken, tokens per step, bytes kept] of a checkpoint."""
    counts = described(file, "counts")
    if not isinstance(counts, list) or len(counts) != 3 or not all(type(n) is int and n >= 0 for n in counts):
        file.fail("the counts are not three integers of at least 0")
    return counts


def load_training(file: TensorFile, model: GPT, make_optimizer, history, rng):
    """Put the adapter, the optimizer's state, the history and ``rng`` back as they were; returns the optimizer.

    ``model`` is the base model; ``make_optimizer(trainable parameters)`` makes the optimizer as the run did.
    Raises AdapterFormatError, with all as it was.
    """
    chosen, parts = read_description(file, TRAINING, model)
    steps, tokens_per_step, kept_bytes = read_counts(file)
    trained = sum(
        math.prod(shape)
        for path, method in chosen.items()
        for shape in method.shapes(*linear_layers(model)[path].W.shape)[0].values()
    )
    moments = {f"optimizer.{name}": (trained,) for name in ("m", "v")}
    records = {"optimizer.t": (1,)} | {f"history.{name}": (steps,) for name in SERIES}
    shapes = adapter_shapes(model, chosen, parts) | moments
    arrays = read_arrays(file, model, shapes, records, integer_arrays(chosen))
    if arrays["optimizer.t"] != steps:
        file.fail(f"is not the {steps} steps that were taken", "optimizer.t")
    if (arrays["optimizer.v"] < 0.0).any():
        file.fail("holds squares below 0", "optimizer.v")
    try:
        rng.bit_generator.state = described(file, "random")  # NumPy takes a state whole or not at all
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        file.fail(f"the state of the random generator cannot be used ({error!r})")
    put_adapter(model, chosen, parts, arrays)
    optimizer = make_optimizer(model.trainable())
    optimizer.restore({name: arrays[f"optimizer.{name}"] for name in optimizer.state()})
    history.tokens_per_step, history.kept_bytes = tokens_per_step, kept_bytes
    for name in SERIES:
        getattr(history, name)[:] = arrays[f"history.{name}"].tolist()
    return optimizer


def put_adapter(model: GPT, chosen: dict, parts: dict, arrays: dict) -> None:
    """Put the methods ``chosen`` into ``model`` with those of the adapter_arrays() that are in ``arrays`` by name."""
    host(model, chosen, parts=parts)
    for name, p in adapter_arrays(model).items():
        if name in arrays:
            p.data = to_device(arrays[name], array_module(p.data))


def adapter_shapes(model: GPT, chosen: dict, parts: dict) -> dict:
    """What adapter_arrays() would be after host(): {name: shape}, with no array made, however large r is."""
    found, linears = {}, linear_layers(model)
    for path, method in chosen.items():
        d_out, d_in = linears[path].W.shape
        trainable, buffers = method.shapes(d_out, d_in)
        found |= {f"{path}.arrays.{name}": shape for name, shape in (trainable | buffers).items()}
        if method.updates_base:
            found[f"{path}.base.W"] = (d_out, d_in)
    largest = map(max, zip(*shared_shapes(model, chosen, parts), strict=True))
    return found | {f"shared.{name}": shape for name, shape in method.shared_shapes(*largest).items()}


def integer_arrays(chosen: dict) -> set:
    """The names, as in adapter_shapes(), of the arrays that hold integers."""
    own = {f"{path}.arrays.{name}" for path, method in chosen.items() for name in method.integers}
    return own | {f"shared.{name}" for method in chosen.values() for name in method.integers}
