"""Adapters that travel: the files of Hugging Face PEFT, written from a model here and read into one.

A layout says which of our layers make up one of PEFT's modules, one or three. The method's own file says what PEFT
calls the method, its hyper-parameters and its arrays, so no method has code here. A file that is read is data: all of
it is checked, and nothing in it is imported or run.
"""

import hashlib
import json
import math
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import numpy as np

from ..adapter import Adapter
from ..backend import to_host
from ..engine import Saved
from ..errors import InputError, nearest, shown
from ..gpt import GPT
from ..surgery import adapted_layers, check_plan, linear_layers
from .checkpoint import put_adapter
from .errors import AdapterFormatError, shown_json
from .gpt2 import modules as gpt2_modules
from .gpt2 import write_gpt2
from .peft_config import CONFIG_BYTES, choices, endings, is_targeted, kinds, read_config, value_for
from .peft_parts import SHARED, axes_of, fuse, own_part, product_part, rows_in_module, with_scaling
from .saving import writable_folder, write_together
from .tensorfile import TensorFile, read_arrays, read_bytes, refuse_pickle, tensor_bytes

CONFIG, TENSORS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
FORMS, NAMES = ("adapter", "lora", "merged"), ("gpt2", "minilora")
ROOT = "base_model.model."  # in front of the names of a module's arrays
TRANSPOSED = "fan_in_fan_out"  # the key, of some kinds, that says that weights are (d_in, d_out), as in GPT-2
CONFIG_DIGEST = "adapter_config_sha256"  # metadata by which a pair of which one file was replaced is recognised

DRAWN = 1 << 27  # the most numbers of shared arrays that a file may leave to its key: 512 MiB

# ------------------------------------------------------------------------------------------------------ what PEFT reads


def save_peft(folder, model, form="adapter", names="gpt2", base=None, save_projection=True) -> dict:
    """Write the adapter of ``model`` as a folder that PEFT loads; returns the configuration that is written.

    ``form``: "adapter", as the method's own kind in PEFT, or as LoRA if PEFT has none and the update is a low-rank
    product; "lora", as LoRA in any case; "merged", no adapter but the whole model for transformers, merged.
    ``names``: of modules, "gpt2" as in transformers or "minilora" as here. ``base``: what base_model_name_or_path says.
    ``save_projection``: False leaves arrays that all layers share to the key that draws them. The model stays as it is.
    Raises InputError for a model without adapter, or an adapter that the form cannot hold, before a file is written.
    """
    check_request(model, form, names)
    if form == "merged":
        return write_gpt2(folder, model.config, merged_arrays(model))
    layers, everything, weights = adapted_layers(model), layouts(model)[names], base_weights(model)
    layout = {module: paths for module, paths in everything.items() if any(path in layers for path in paths)}
    method, known = next(iter(layers.values())).method, kinds()
    if form == "lora" or method.updates_base or not method.peft:
        # LoRA, found as the method that is a product and needs no further key in PEFT's configuration
        kind = next(one for own in known.values() for one in own if one.is_product and len(one.peft) == 1)
        parts = {path: product_part(path, layer, kind) for path, layer in layers.items()}
    else:
        readers = known.get(method.peft["peft_type"], [])  # none, if files of this method are not read here
        kind = next((reader for reader in readers if reader.peft == method.peft), type(method))
        parts = {path: own_part(layer, kind) for path, layer in layers.items()}
    fused, arrays = {}, {}
    for module, paths in layout.items():
        fused[module] = fuse(module, {path: parts.get(path) for path in paths}, weights)
        arrays |= {tensor_name(kind, name, module): array for name, array in fused[module].arrays.items()}
    config = settings(fused, known)
    if kind.peft_shared_key:
        config[kind.peft_shared_key] = save_projection
    if save_projection or not kind.peft_shared_key:
        arrays |= {tensor_name(kind, name): shared_array(model, name) for name in axes_of(kind, shared=True)}
    else:
        for name, drawn in draw_shared(method, module_sizes(layout, weights)).items():
            array = shared_array(model, name)
            if not np.array_equal(array, drawn.astype(array.dtype)):
                raise InputError(f"save_peft: {name} is not what the key draws; leave save_projection at True")
    config |= {
        "auto_mapping": None,
        "base_model_name_or_path": base,
        "bias": "none",
        "inference_mode": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "modules_to_save": None,
        "target_modules": short_names(layout, everything),
        "task_type": "CAUSAL_LM" if names == "gpt2" else None,
    }
    if TRANSPOSED in config:
        config[TRANSPOSED] = names == "gpt2"
    text = json.dumps(config, indent=2, sort_keys=True).encode()
    metadata = {"format": "pt", CONFIG_DIGEST: hashlib.sha256(text).hexdigest()}
    folder = writable_folder(folder)
    write_together({folder / TENSORS: tensor_bytes(arrays, metadata), folder / CONFIG: text})
    return config


def check_request(model, form, names) -> None:
    for what, value, known in (("form", form, FORMS), ("names", names, NAMES)):
        if value not in known:
            there = ", ".join(known)
            raise InputError(f"save_peft: unknown {what} {shown(str(value))}{nearest(value, known)}; there are {there}")
    if not adapted_layers(model):
        raise InputError("save_peft: this model has no adapter; call adapt() first; save_gpt2() saves a base model")
    if names == "gpt2" and not isinstance(model, GPT):
        raise InputError('save_peft: names="gpt2" needs a GPT; use names="minilora" for this model')
    if form == "merged" and names != "gpt2":
        raise InputError('save_peft: form="merged" is a model for transformers; leave names at "gpt2"')


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


def tensor_name(kind, array, module="") -> str:
    """The name in PEFT's file of a module's array, or of one that all modules share."""
    theirs, _ = kind.peft_arrays[array]
    return theirs if theirs.startswith(SHARED) else f"{ROOT}{module}.{theirs}"


def shared_array(model, name) -> np.ndarray:
    return to_host(vars(model.shared)[name].data)


def draw_shared(method, sizes: dict) -> dict:
    """The shared arrays by name, as PEFT draws them for modules of these ``sizes``."""
    return method.init_shared(list(sizes.values()), np.random.default_rng(0))


def module_sizes(layout: dict, weights: dict) -> dict[str, tuple[int, int]]:
    """(d_out, d_in) of each module."""
    return {
        module: (sum(len(weights[path]) for path in paths), weights[paths[0]].shape[1])
        for module, paths in layout.items()
    }


def settings(parts: dict, known: dict) -> dict:
    """The method's keys of the configuration, from the modules' ``parts``."""
    kind = type(next(iter(parts.values())).method)
    config = {key: value for key, value in kind.peft_ignored.items() if value is not None}
    usual_values = choices([kind, *known.get(kind.peft["peft_type"], [])])
    config |= {key: values[0] for key, values in usual_values.items()} | kind.peft
    for option, key in kind.peft_names.items():
        config[key], others = usual({module: number(getattr(part.method, option)) for module, part in parts.items()})
        if option in kind.peft_patterns:
            config[kind.peft_patterns[option]] = others
        elif others:
            raise InputError(f"save_peft: PEFT has one {key} for all modules, and {next(iter(others))} has another")
    return config


def number(value):
    """A float that is a whole number as PEFT writes alpha: 16, not 16.0."""
    return int(value) if isinstance(value, float) and value == int(value) else value


def usual(values: dict) -> tuple:
    """(the value that most modules have, {name: value} for the others)."""
    most = Counter(values.values()).most_common(1)[0][0]
    others = {}
    for value in dict.fromkeys(values.values()):
        if value != most:
            having = [module for module, own in values.items() if own == value]
            others |= dict.fromkeys(short_names(having, values), value)
    return most, others


def short_names(chosen, among) -> list[str]:
    """The shortest endings, from a dot on, that name the modules ``chosen`` and no other ``among`` them."""
    chosen = set(chosen)
    foreign = {ending for module in set(among) - chosen for ending in endings(module)}
    found = [next((e for e in endings(module) if e not in foreign), module) for module in among if module in chosen]
    return list(dict.fromkeys(found))


# ----------------------------------------------------------------------------------------------------- what PEFT writes


def load_peft(folder, model):
    """Put the adapter of a folder that PEFT wrote into ``model``, the base model that it was trained on; returns it.

    A file is read as the method whose class says so (``from_peft``). The modules may have the names of GPT2LMHeadModel,
    of GPT2Model or of minilora. If several layers are one module in PEFT, each gets its own rows of the arrays, and a
    copy of those without rows. Raises AdapterFormatError, with the model as it was, for a configuration that cannot be
    honoured in full, or tensors that are not exactly those of the configuration.
    """
    folder = Path(folder)
    text = read_bytes(folder / CONFIG, CONFIG_BYTES, "the adapter_config.json of PEFT", AdapterFormatError)
    known = kinds()
    config = read_config(folder / CONFIG, text, known)
    refuse_pickle(folder / PICKLE, folder / TENSORS, "PEFT", AdapterFormatError)
    file = TensorFile(folder / TENSORS, "the adapter_model.safetensors of PEFT", AdapterFormatError)
    digest = hashlib.sha256(text).hexdigest()
    if file.metadata.get(CONFIG_DIGEST, digest) != digest:
        file.fail(f"was written with a different {CONFIG} than the one next to it; one of the two was replaced")
    kind, scaled = kind_of(folder / CONFIG, config, known[config["peft_type"]])
    layout, weights = targeted_layout(file, kind, config, model), base_weights(model)
    sizes, parts = module_sizes(layout, weights), shared_rows(kind, layout, weights)
    try:
        methods = {module: method_of(kind, scaled, config, module) for module in layout}
        chosen = {path: methods[module] for module, paths in layout.items() for path in paths}
        check_plan(model, chosen)
    except InputError as error:
        raise AdapterFormatError(folder / CONFIG, str(error)) from None
    shared = config[kind.peft_shared_key] if kind.peft_shared_key else True
    found = read_arrays(file, model, expected(file, methods, sizes, shared))
    arrays = our_arrays(found, layout, methods, weights)
    if not shared:
        dtype = next(iter(arrays.values())).dtype
        drawn = draw_shared(next(iter(methods.values())), sizes)
        arrays |= {f"shared.{name}": array.astype(dtype) for name, array in drawn.items()}
    put_adapter(model, chosen, parts, arrays)
    return model


def kind_of(path, config, own: list[type]) -> tuple[type, type]:
    """(the method that PEFT trains with a configuration, the method whose scaling it has then).

    Of the methods whose keys the configuration has, it is the one of most keys. One that only rescales can also go
    together with another. Raises AdapterFormatError for two methods at once.
    """
    fits = [kind for kind in own if kind.peft.items() <= config.items()]
    others = [kind for kind in fits if not kind.peft_rescales]
    if not others:
        raise AdapterFormatError(path, f"no method here reads a {config['peft_type']} with these keys")
    most = max(len(kind.peft) for kind in others)
    best = [kind for kind in others if len(kind.peft) == most]
    if len(best) > 1:
        asked = {key: value for kind in best for key, value in kind.peft.items() if key != "peft_type"}
        asked = " and ".join(f"{key} is {shown_json(value)}" for key, value in asked.items())
        raise AdapterFormatError(path, f"{asked}; one of them is supported, not both at once")
    scaled = next((kind for kind in fits if kind.peft_rescales), best[0])
    return (scaled if best[0].peft.items() <= scaled.peft.items() else best[0]), scaled


def method_of(kind, scaled, config, module) -> Adapter:
    """The method of a module, with its own values of the hyper-parameters."""
    values = {}
    for option, key in kind.peft_names.items():
        pattern = config[kind.peft_patterns[option]] if option in kind.peft_patterns else {}
        values[option] = value_for(pattern, module, config[key])
    method = kind(**values)
    return method if scaled is kind else with_scaling(method, method.r, scaled(**values).scaling)


def targeted_layout(file: TensorFile, kind, config, model) -> dict:
    """The layout that the tensors' names have, of the modules that the configuration targets."""
    owners = {name: module_of(kind, name) for name in file.tensors}
    found = next((own for own in layouts(model).values() if set(own) & set(owners.values())), None)
    if found is None:
        first = next(iter(axes_of(kind)))
        expected = ", ".join(shown(tensor_name(kind, first, next(iter(own)))) for own in layouts(model).values())
        file.fail(f"no tensor is named after a layer of this model; expected names such as {expected}")
    layout = {module: paths for module, paths in found.items() if is_targeted(config, module)}
    for name, module in owners.items():
        if module in found and module not in layout:
            file.fail(f"target_modules in {CONFIG} do not select {module}", name)
    return layout


def module_of(kind, name: str):
    """The module that a tensor's name begins with, or None."""
    for array in axes_of(kind):
        ending = f".{kind.peft_arrays[array][0]}"
        if name.startswith(ROOT) and name.endswith(ending):
            return name.removeprefix(ROOT).removesuffix(ending)
    return None


def shared_rows(kind, layout, weights) -> dict:
    """{path: {array: slice}}: the rows of the shared arrays that each of several layers in one module takes."""
    stacked = [name for name, axes in axes_of(kind, shared=True).items() if axes[0] == "d_out"]
    return {
        path: dict.fromkeys(stacked, rows)
        for paths in layout.values()
        for path, rows in rows_in_module(paths, weights).items()
        if stacked and len(paths) > 1
    }


def expected(file: TensorFile, methods: dict, sizes: dict, shared: bool) -> dict:
    """The tensors that the file must hold: {PEFT's name: shape}. Raises if it leaves too many numbers to its key."""
    method = next(iter(methods.values()))
    kind, widest = type(method), tuple(map(max, zip(*sizes.values(), strict=True)))
    found = {
        tensor_name(kind, name, module): shape_of(axes, own, sizes[module])
        for module, own in methods.items()
        for name, axes in axes_of(kind).items()
    }
    all_share = axes_of(kind, shared=True).items()
    for_all = {tensor_name(kind, name): shape_of(axes, method, widest) for name, axes in all_share}
    numbers = sum(map(math.prod, for_all.values()))
    if not shared and numbers > DRAWN:
        file.fail(f"leaves {numbers:,} numbers to its key; at most {DRAWN:,} are drawn")
    return found | for_all if shared else found


def shape_of(axes, method, size) -> tuple:
    """The shape in numbers: an axis is d_out, d_in or a hyper-parameter."""
    numbers = asdict(method) | {"d_out": size[0], "d_in": size[1]}
    return tuple(numbers[axis] for axis in axes)


def our_arrays(found: dict, layout, methods, weights) -> dict:
    """{our name: array} from the tensors of a file, ``found``: each layer gets copies of its own."""
    kind, dtype = type(next(iter(methods.values()))), next(iter(found.values())).dtype
    shared = axes_of(kind, shared=True)
    arrays = {f"shared.{name}": found[theirs] for name in shared if (theirs := tensor_name(kind, name)) in found}
    for module, paths in layout.items():
        for path, rows in rows_in_module(paths, weights).items():
            for name, axes in axes_of(kind).items():
                array = found[tensor_name(kind, name, module)]
                arrays[f"{path}.arrays.{name}"] = np.array(array[rows] if axes[0] == "d_out" else array)
        if kind.updates_base:
            arrays |= moved_weights(methods[module], paths, weights, dtype)
    return arrays


def moved_weights(method, paths, weights, dtype) -> dict:
    """{our name: W} as the method's start leaves them, which PEFT makes of the module's weight and does not save."""
    W = np.concatenate([to_host(weights[path]) for path in paths]).astype(np.float64)
    method.init(W, np.random.default_rng(0), Saved())
    return {f"{path}.base.W": W[rows].astype(dtype) for path, rows in rows_in_module(paths, weights).items()}
