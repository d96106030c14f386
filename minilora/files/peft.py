"""Adapters that travel: the files of Hugging Face PEFT, written from a model here and read into one.

A layout says which of our layers make up a module of theirs, one or three; all else is written once for both. A file is
data that is checked: nothing it says is imported or run, and no expression in it can take long.
"""

import hashlib
import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .. import methods
from ..adapter import AdaptedLinear
from ..backend import to_host
from ..engine import Saved
from ..errors import AdapterFormatError, InputError, nearest, shown, shown_json
from ..gpt import GPT
from ..surgery import adapted_layers, check_plan, linear_layers
from ..targets import matches
from .checkpoint import put_adapter
from .gpt2 import modules as gpt2_modules
from .gpt2 import write_gpt2
from .peft_config import CONFIG_BYTES, endings, is_targeted, read_config
from .saving import writable_folder, write_together
from .tensorfile import TensorFile, read_arrays, read_bytes, tensor_bytes

CONFIG, TENSORS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
FORMS, NAMES = ("adapter", "lora", "merged"), ("gpt2", "minilora")
ROOT, SHARED = "base_model.model.", {"A": "base_model.vera_A", "B": "base_model.vera_B"}
CONFIG_DIGEST = "adapter_config_sha256"  # metadata by which a pair of which one file was replaced is recognised

LORA, DORA, VERA = ("A", "B"), ("A", "B", "m"), ("b", "d")
ARRAYS = {  # an array here: its name behind the module's in PEFT, and its shape; a fused module stacks along d_out
    "A": ("lora_A.weight", ("r", "d_in")),
    "B": ("lora_B.weight", ("d_out", "r")),
    "m": ("lora_magnitude_vector", ("d_out",)),
    "b": ("vera_lambda_b", ("d_out",)),
    "d": ("vera_lambda_d", ("r",)),
}

DRAWN = 1 << 27  # and on the numbers of projections that a file leaves to its key: 512 MiB
ROUNDING = 128  # units in the last place by which a weight may stray that was updated 128² times

# ------------------------------------------------------------------------------------------------------ what PEFT reads


def save_peft(folder, model, form="adapter", names="gpt2", base=None, save_projection=True) -> dict:
    """Write the adapter of ``model`` as a folder that PEFT loads; returns the configuration that is written.

    ``form``: "adapter", as the method's own kind in PEFT, or as LoRA where PEFT has none and the update is a thin
    product; "lora", as LoRA in any case; "merged", no adapter but the whole model for transformers, merged.
    ``names``: of modules, "gpt2" as in transformers or "minilora" as here. ``base``: what base_model_name_or_path says.
    ``save_projection``: False leaves VeRA's shared matrices to its key. The model stays as it is.
    Raises InputError for a model without adapter, or an adapter that the form cannot hold, before a file is written.
    """
    check_request(model, form, names)
    if form == "merged":
        return write_gpt2(folder, model.config, merged_arrays(model))
    layers, everything = adapted_layers(model), layouts(model)[names]
    layout = {module: paths for module, paths in everything.items() if any(path in layers for path in paths)}
    method = next(iter(layers.values())).method
    keys = keys_of(type(method))
    if form == "lora" or method.updates_base or not keys:
        parts = {path: thin_part(path, layer) for path, layer in layers.items()}
        config, tensors = lora_file(model, layout, parts, {})
    elif keys["peft_type"] == "VERA":
        config, tensors = vera_file(model, layout, save_projection)
    else:
        parts = {path: native_part(layer, keys) for path, layer in layers.items()}
        config, tensors = lora_file(model, layout, parts, keys)
    config |= {
        "auto_mapping": None,
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": names == "gpt2",
        "inference_mode": True,
        "modules_to_save": None,
        "target_modules": short_names(layout, everything),
        "task_type": "CAUSAL_LM" if names == "gpt2" else None,
    }
    text = json.dumps(config, indent=2, sort_keys=True).encode()
    metadata = {"format": "pt", CONFIG_DIGEST: hashlib.sha256(text).hexdigest()}
    folder = writable_folder(folder)
    write_together({folder / TENSORS: tensor_bytes(tensors, metadata), folder / CONFIG: text})
    return config


def check_request(model, form, names) -> None:
    for what, value, known in (("form", form, FORMS), ("names", names, NAMES)):
        if value not in known:
            there = ", ".join(known)
            raise InputError(f"save_peft: unknown {what} {shown(str(value))}{nearest(value, known)}; there are {there}")
    if not adapted_layers(model):
        raise InputError("save_peft: this model has no adapter; call adapt() first; save_gpt2() saves a base model")
    if names == "gpt2" and not isinstance(model, GPT):
        raise InputError('save_peft: names="gpt2" are those of a GPT; use names="minilora" for another model')
    if form == "merged" and names != "gpt2":
        raise InputError('save_peft: form="merged" is a model for transformers; leave names at "gpt2"')


def keys_of(method) -> dict:
    """What a method's own file says of PEFT; a method that inherits from another may compute something else."""
    return vars(method).get("peft", {})


def arrays_of(keys) -> tuple:
    """The names of the arrays that each module has in a file with these ``keys`` of PEFT's configuration."""
    return VERA if keys["peft_type"] == "VERA" else DORA if keys.get("use_dora") else LORA


def layouts(model) -> dict:
    """The layouts that a file may have: {module's path in PEFT: [our layers in it]} for each name."""
    ours = {path: [path] for path in base_weights(model)}
    if not isinstance(model, GPT):
        return {"minilora": ours}
    theirs = gpt2_modules(model.config.n_layer)
    return {
        "gpt2": {f"transformer.{module}": paths for module, paths in theirs.items()},
        "gpt2, without a head": theirs,
        "minilora": ours,
    }


def base_weights(model) -> dict:
    """The weight of each linear layer before any adapter, by path."""
    hosted = {f"{path}.base": (path, layer.original) for path, layer in adapted_layers(model).items()}
    return dict(hosted.get(path, (path, linear.W.data)) for path, linear in linear_layers(model).items())


def merged_arrays(model) -> dict:
    """{name: array} of the model that merge_and_unload() would make."""
    layers = adapted_layers(model)
    inside = (*(f"{path}." for path in layers), "shared.")
    arrays = {name: to_host(p.data) for name, p in model.named_parameters() if not name.startswith(inside)}
    for path, layer in layers.items():
        arrays[f"{path}.W"] = to_host(layer.method.merge(layer.base.W.data, layer.p))
        arrays[f"{path}.b"] = to_host(layer.base.b.data)
    return arrays


@dataclass
class Part:
    """The LoRA of one layer or module: A (r, d_in), B (d_out, r), alpha, and DoRA's m (d_out,)."""

    A: np.ndarray
    B: np.ndarray
    alpha: float
    m: np.ndarray | None = None

    @property
    def r(self) -> int:
        return len(self.A)


def native_part(layer: AdaptedLinear, keys) -> Part:
    """The layer's own A, B and m, with the alpha by which PEFT scales them as the method does."""
    method, found = layer.method, {name: to_host(layer.p[name]) for name in arrays_of(keys)}
    over = root(keys)(method.r)
    alpha = method.alpha if method.alpha / over == method.scaling else method.scaling * over
    return Part(alpha=alpha, **found)


def root(keys):
    """PEFT multiplies B A by alpha / root(r)."""
    return math.sqrt if keys.get("use_rslora") else float


def thin_part(path, layer: AdaptedLinear) -> Part:
    """LoRA of scaling 1 with the layer's merged weight. Raises InputError for an update that is no thin product."""
    method = layer.method
    if method.updates_base:
        B, A = split_change(path, layer)
    elif (found := method.factors(layer.base.W.data, layer.p)) is not None:
        B, A = map(to_host, found)
    else:
        raise InputError(
            f'save_peft: the update of {method.name} is no thin product, so that no LoRA holds it; use form="merged"'
        )
    return Part(A, B, alpha=float(len(A)))


def split_change(path, layer: AdaptedLinear):
    """(B, A) of what merging does to the weight that was before the adapter, for a method that moves W itself.

    Its two thin products, now and then, have rank 2 r together; what is beyond that must be rounding.
    """
    W, merged = to_host(layer.original), to_host(layer.method.merge(layer.base.W.data, layer.p))
    change = merged.astype(np.float64) - W
    U, sigma, Vt = np.linalg.svd(change, full_matrices=False)
    k = min(2 * getattr(layer.method, "r", len(sigma)), len(sigma))
    B, A = U[:, :k] * np.sqrt(sigma[:k]), np.sqrt(sigma[:k])[:, None] * Vt[:k]
    rest, allowed = np.abs(change - B @ A).max(), ROUNDING * np.finfo(W.dtype).eps * np.abs(merged).max()
    if rest > allowed:
        raise InputError(
            f"save_peft: the change of {path} by {layer.method.name} has a higher rank than {k}: {rest:.1e} is left "
            f'over, and rounding would leave {allowed:.1e}; use form="merged"'
        )
    return B.astype(W.dtype), A.astype(W.dtype)


def lora_file(model, layout, parts, keys) -> tuple[dict, dict]:
    """(configuration, tensors) of a LoRA file with ``parts`` {path: Part}, one for each adapted layer, and ``keys``."""
    weights = base_weights(model)
    fused = {
        module: fuse([parts.get(path) for path in paths], [weights[path] for path in paths], root(keys))
        for module, paths in layout.items()
    }
    r, rank_pattern = usual({module: part.r for module, part in fused.items()})
    alpha, alpha_pattern = usual({module: number(part.alpha) for module, part in fused.items()})
    config = {"peft_type": "LORA", "r": r, "lora_alpha": alpha, "lora_dropout": 0.0, "init_lora_weights": True}
    config |= {"rank_pattern": rank_pattern, "alpha_pattern": alpha_pattern, "use_dora": False, "use_rslora": False}
    config |= {"exclude_modules": None, "layers_pattern": None, "layers_to_transform": None} | keys
    arrays = {module: {"A": part.A, "B": part.B, "m": part.m} for module, part in fused.items()}
    return config, named(arrays)


def fuse(parts: list[Part | None], weights: list, root) -> Part:
    """One module's Part from those of its layers, None for a layer that has no adapter and must stay as it is.

    Layers with one A keep it, their B stacked. Otherwise each has rows of A of its own, and B is zero off its block; if
    that makes more rows than there are inputs, the product itself is smaller, and A is the identity.
    """
    present = [part for part in parts if part is not None]
    first = present[0]
    one = all(part.A.shape == first.A.shape and part.A.tobytes() == first.A.tobytes() for part in present)
    A = first.A if one else np.concatenate([part.A for part in present])
    scaling = first.alpha / root(first.r)
    B = np.zeros((sum(map(len, weights)), len(A)), A.dtype)
    row = column = 0
    for part, W in zip(parts, weights, strict=True):
        if part is not None:
            B[row : row + len(W), column : column + part.r] = part.B * (part.alpha / root(part.r) / scaling)
            column += 0 if one else part.r
        row += len(W)
    alpha, m = first.alpha if one else scaling * root(len(A)), None
    if len(A) > A.shape[1] and not one:
        B, A, alpha = (scaling * B) @ A, np.eye(A.shape[1], dtype=A.dtype), root(A.shape[1])
    if first.m is not None:
        m = np.concatenate([row_norms(W) if part is None else part.m for part, W in zip(parts, weights, strict=True)])
    return Part(A, B, alpha, m)


def row_norms(W):
    """DoRA's m of a layer that stays as it is."""
    W = to_host(W)
    return np.linalg.norm(W.astype(np.float64), axis=1).astype(W.dtype)


def vera_file(model, layout, save_projection) -> tuple[dict, dict]:
    """(configuration, tensors) of a VeRA file. Raises InputError where PEFT's layer would take other rows of B."""
    layers, arrays = adapted_layers(model), {}
    for module, paths in layout.items():
        check_rows(module, paths, layers)
        found = [{name: to_host(layers[path].p[name]) for name in VERA} for path in paths]
        arrays[module] = {"b": np.concatenate([part["b"] for part in found]), "d": found[0]["d"]}
    method = next(iter(layers.values())).method
    shared = {name: to_host(t.data) for name, t in vars(model.shared).items()}
    if not save_projection:
        shapes = [(len(shared["B"]), shared["A"].shape[1])]
        drawn = method.init_shared(shapes, np.random.default_rng(0))
        if not all(np.array_equal(shared[name], drawn[name].astype(shared[name].dtype)) for name in shared):
            raise InputError("save_peft: these projections are not those of the key; leave save_projection at True")
    config = {"peft_type": "VERA", "r": method.r, "d_initial": method.d_initial, "vera_dropout": 0.0}
    config |= {"projection_prng_key": method.projection_prng_key, "save_projection": save_projection}
    config |= {"init_weights": True, "layers_pattern": None, "layers_to_transform": None}
    return config, named(arrays) | ({SHARED[name]: shared[name] for name in SHARED} if save_projection else {})


def check_rows(module, paths, layers) -> None:
    """PEFT's module takes the first rows of the shared B, three layers in one a third of them each, and has one d."""

    def fail(rule):
        raise InputError(
            f'save_peft: in PEFT, a VeRA {module} {rule}; use form="lora", or names="minilora", with q, k and v apart'
        )

    if not all(path in layers for path in paths):
        fail(f"is one layer for {', '.join(paths)}, and not all of them are adapted")
    row, first = 0, layers[paths[0]]
    for path in paths:
        d_out, layer = len(layers[path].original), layers[path]
        rows = layer.part.get("B", slice(0, d_out))
        if (rows.start, rows.stop) != (row, row + d_out):
            fail(f"takes rows {row} to {row + d_out} of B for {path}, which has {rows.start} to {rows.stop} here")
        if not np.array_equal(to_host(layer.p["d"]), to_host(first.p["d"])):
            fail(f"has one d, and {path} has another than {paths[0]}")
        row += d_out


def named(arrays: dict) -> dict:
    """{PEFT's name: array} from {module: {name: array or None}}."""
    return {
        tensor_name(module, name): array
        for module, own in arrays.items()
        for name, array in own.items()
        if array is not None
    }


def tensor_name(module, name) -> str:
    return f"{ROOT}{module}.{ARRAYS[name][0]}"


def number(value):
    """A float that is a whole number as PEFT writes alpha: 16, not 16.0."""
    return int(value) if value == int(value) else float(value)


def usual(values: dict) -> tuple:
    """(the value that most modules have, {name: value} for the others)."""
    most = Counter(values.values()).most_common(1)[0][0]
    others = dict.fromkeys(value for value in values.values() if value != most)
    having = lambda value: [module for module, own in values.items() if own == value]
    return most, {name: value for value in others for name in short_names(having(value), values)}


def short_names(chosen, among) -> list[str]:
    """The shortest endings, from a dot on, that name the modules ``chosen`` and no other ``among`` them."""
    found, chosen = {}, set(chosen)
    for module in among:
        if module in chosen:
            fits = lambda ending: all(other in chosen for other in among if ending in endings(other))
            found[next(ending for ending in endings(module) if fits(ending))] = None
    return list(found)


# ----------------------------------------------------------------------------------------------------- what PEFT writes


def load_peft(folder, model):
    """Put the adapter of a folder that PEFT wrote into ``model``, the base model that it was trained on; returns it.

    LoRA, rsLoRA, DoRA (as dora_detached, PEFT's gradient), PiSSA and VeRA; names of GPT2LMHeadModel, of GPT2Model or
    of minilora. A layer that PEFT has in one with others gets the shared A, and its own rows of the rest.
    Raises AdapterFormatError, with the model as it was, for a configuration that cannot be honoured in full, or
    tensors that are not exactly its own.
    """
    folder = Path(folder)
    text = read_bytes(folder / CONFIG, CONFIG_BYTES, "the adapter_config.json of PEFT", AdapterFormatError)
    config = read_config(folder / CONFIG, text)
    file = open_tensors(folder)
    if file.metadata.get(CONFIG_DIGEST, digest := hashlib.sha256(text).hexdigest()) != digest:
        file.fail(f"was written with another {CONFIG} than the one beside it; one of the two was replaced")
    layout, weights = targeted_layout(file, config, model), base_weights(model)
    chosen = read_methods(folder / CONFIG, config, layout)
    parts = {path: rows for paths in layout.values() for path, rows in rows_of(weights, config, paths).items()}
    try:
        check_plan(model, chosen)
    except InputError as error:
        raise AdapterFormatError(folder / CONFIG, str(error)) from None
    found = read_arrays(file, model, shapes(file, config, weights, layout, chosen))
    put_adapter(model, chosen, parts, divide(weights, config, layout, chosen, found))
    return model


def open_tensors(folder: Path) -> TensorFile:
    if (folder / PICKLE).exists() and not (folder / TENSORS).exists():
        raise AdapterFormatError(
            folder / PICKLE,
            "is a pickle, which can run any code when it is read; load it with PEFT, where you trust it, and "
            f"save_pretrained() writes {TENSORS}",
        )
    return TensorFile(folder / TENSORS, "the adapter_model.safetensors of PEFT", AdapterFormatError)


def targeted_layout(file: TensorFile, config, model) -> dict:
    """The layout that the tensors' names have, of the modules that the configuration targets."""
    owners = {name: module_of(name) for name in file.tensors}
    found = next((own for own in layouts(model).values() if set(own) & set(owners.values())), None)
    if found is None:
        expected = ", ".join(shown(tensor_name(next(iter(own)), "A")) for own in layouts(model).values())
        file.fail(f"no tensor is named after a layer of this model; expected names such as {expected}")
    layout = {module: paths for module, paths in found.items() if is_targeted(config, module)}
    for name, module in owners.items():
        if module in found and module not in layout:
            file.fail(f"target_modules in {CONFIG} do not select {module}", name)
    return layout


def module_of(name: str):
    """The module that a tensor's name begins with, or None."""
    for ending, _ in ARRAYS.values():
        if name.startswith(ROOT) and name.endswith(f".{ending}"):
            return name[len(ROOT) : -len(ending) - 1]
    return None


def read_methods(path, config, layout) -> dict:
    """{path: method} with each layer's r and alpha."""
    name, keys = named_method(path, config)
    ranks = by_module(config.get("rank_pattern"), layout, config["r"])
    alphas = by_module(config.get("alpha_pattern"), layout, config.get("lora_alpha", 1.0))
    if root(config) is not root(keys):  # a method that has alpha / r
        alphas = {module: alpha * math.sqrt(ranks[module]) for module, alpha in alphas.items()}
    own = lambda module: methods.known(name, **config | {"r": ranks[module], "alpha": alphas[module]})
    return {
        ours: method
        for module, paths in layout.items()
        for method in [methods.create(name, **own(module))]
        for ours in paths
    }


def named_method(path, config) -> tuple[str, dict]:
    """(name, keys) of the method that PEFT trains with a configuration: of those that agree, the one of most keys.

    use_rslora counts least: it is a factor, which alpha can hold for a method that has it not. Raises
    AdapterFormatError for two methods at once.
    """
    own = {name: vars(methods.get(name)) for name in methods.names()}
    kinds = {name: of["peft"] for name, of in own.items() if of.get("from_peft")}
    weight = lambda name: (len(kinds[name].keys() - {"use_rslora"}), len(kinds[name]))
    fits = sorted((name for name in kinds if kinds[name].items() <= config.items()), key=weight)
    if weight(fits[-1]) in map(weight, fits[:-1]):
        asked = {key: value for name in fits[-2:] for key, value in kinds[name].items() if key != "peft_type"}
        asked = " and ".join(f"{key} is {shown_json(value)}" for key, value in asked.items())
        raise AdapterFormatError(path, f"{asked}; one of them is supported, not both at once")
    return fits[-1], kinds[fits[-1]]


def by_module(pattern, layout, usual) -> dict:
    """{module: value} by PEFT's rule: the first key that matches counts."""
    values = {}
    for key, value in (pattern or {}).items():
        values = {module: value for module in layout if matches(key, module)} | values
    return dict.fromkeys(layout, usual) | values


def rows_of(weights, config, paths) -> dict:
    """{path: {"B": slice}}: the rows of VeRA's shared B that each of several layers in one module takes."""
    if config["peft_type"] != "VERA" or len(paths) == 1:
        return {}
    ends = np.cumsum([0] + [len(weights[path]) for path in paths]).tolist()
    return {path: {"B": slice(*rows)} for path, *rows in zip(paths, ends[:-1], ends[1:], strict=True)}


def shapes(file: TensorFile, config, weights, layout, chosen) -> dict:
    """What the file must hold: {PEFT's name: shape}. Raises where its key would draw more than a file is worth."""
    found, sizes_of = {}, module_sizes(weights, layout)
    for (module, paths), (d_out, d_in) in zip(layout.items(), sizes_of, strict=True):
        sizes = {"r": chosen[paths[0]].r, "d_out": d_out, "d_in": d_in}
        for array in arrays_of(config):
            found[tensor_name(module, array)] = tuple(sizes[size] for size in ARRAYS[array][1])
    if config["peft_type"] == "VERA":
        max_out, max_in = map(max, zip(*sizes_of, strict=True))
        if config["save_projection"]:
            found |= {SHARED["A"]: (config["r"], max_in), SHARED["B"]: (max_out, config["r"])}
        elif (numbers := config["r"] * (max_in + max_out)) > DRAWN:
            file.fail(f"leaves {numbers:,} numbers to its key; at most {DRAWN:,} are drawn")
    return found


def module_sizes(weights, layout) -> list[tuple[int, int]]:
    """(d_out, d_in) of each module."""
    return [(sum(len(weights[path]) for path in paths), weights[paths[0]].shape[1]) for paths in layout.values()]


def divide(weights, config, layout, chosen, found) -> dict:
    """{our name: array} from the tensors of a file, ``found``: each layer gets copies of its own."""
    dtype = next(iter(found.values())).dtype
    arrays = {f"shared.{ours}": found[theirs] for ours, theirs in SHARED.items() if theirs in found}
    if config["peft_type"] == "VERA" and not arrays:
        drawn = next(iter(chosen.values())).init_shared(module_sizes(weights, layout), np.random.default_rng(0))
        arrays = {f"shared.{ours}": own.astype(dtype) for ours, own in drawn.items()}
    for module, paths in layout.items():
        own = {array: found[tensor_name(module, array)] for array in arrays_of(config)}
        stacked = {array for array in own if ARRAYS[array][1][0] == "d_out"}
        method = chosen[paths[0]]
        if method.updates_base:  # by its start, which PEFT makes of the module's weight and does not save
            W = np.concatenate([to_host(weights[path]) for path in paths]).astype(np.float64)
            method.init(W, np.random.default_rng(0), Saved())
        row = 0
        for path in paths:
            rows = slice(row, row := row + len(weights[path]))
            for array, values in own.items():
                arrays[f"{path}.arrays.{array}"] = np.array(values[rows] if array in stacked else values)
            if method.updates_base:
                arrays[f"{path}.base.W"] = W[rows].astype(dtype)
    return arrays
