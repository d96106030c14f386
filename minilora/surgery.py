"""Putting adapters into a model and taking them out again: adapt(), merge(), unload() and what they stand on.

A model is changed in place, layer by layer, and every function here works for every method.
"""

import re
import zlib

import numpy as np

from . import methods
from .adapter import AdaptedLinear, Adapter, own_array
from .backend import array_module
from .errors import InputError
from .nn import Linear, Module, Parameter


def adapt(model: Module, method: str | Adapter, target_modules="all-linear", seed=0, verbose=True, **options) -> Module:
    """Freeze ``model`` and put ``method`` beside each Linear that ``target_modules`` names; returns the model.

    ``target_modules``: a list of names (a path, or its last part such as "q"), "all-linear", or a regular
    expression that the whole path matches. ``options``: the method's fields, such as r and alpha.
    Raises InputError for an unknown method or option, a target that matches nothing, a rank that does not fit, or
    a model that is adapted already; nothing has been changed then.
    """
    method = methods.create(method, **options) if isinstance(method, str) else method
    matched = plan(model, method, target_modules)
    model.freeze()
    shared = method.init_shared([linear.W.shape for linear in matched.values()], np.random.default_rng(seed))
    W = next(iter(matched.values())).W.data
    shared = {k: Parameter(own_array(a, array_module(W), W.dtype), requires_grad=False) for k, a in shared.items()}
    if shared:
        model.shared = Module()  # the model owns them, the layers refer to them: moved, stored and counted once
        vars(model.shared).update(shared)
    for name, linear in matched.items():
        parent, attribute = parent_of(model, name)
        layer_seed = [seed, zlib.crc32(name.encode())]
        setattr(parent, attribute, AdaptedLinear(linear, method, layer_seed, shared))
    if verbose:
        kinds = dict.fromkeys(name.rpartition(".")[2] for name in matched)
        trainable, total = count_parameters(model)
        print(f"{method.name}: {len(matched)} layers matched ({', '.join(kinds)}); ", end="")
        print(f"trainable {trainable:,} of {total:,} ({100 * trainable / total:.2f} %)")
    return model


def plan(model: Module, method: Adapter, target_modules="all-linear") -> dict[str, Linear]:
    """The layers that adapt() would give ``method``, by path. Raises its errors, and changes nothing."""
    if adapted_layers(model):
        raise InputError("adapt: this model is adapted already; use merge_and_unload(model) or a fresh model")
    linears = {name: m for name, m in model.named_modules() if isinstance(m, Linear)}
    matched = match_targets(list(linears), target_modules)
    for name in matched:
        method.check_layer(name, linears[name].W.shape)
    return {name: linears[name] for name in matched}


def match_targets(names: list[str], target_modules) -> list[str]:
    """The ``names`` that ``target_modules`` selects, in their order; see adapt()."""
    endings = sorted({n.rpartition(".")[2] for n in names})
    if target_modules == "all-linear":
        chosen = set(names)
    elif isinstance(target_modules, str):
        try:
            chosen = {n for n in names if re.fullmatch(target_modules, n)}
        except re.error as error:
            raise InputError(f'target_modules: "{target_modules}" is not a regular expression: {error}') from error
        if not chosen:
            raise InputError(f'target_modules: the expression "{target_modules}" matches no path; there are {names}')
    else:
        chosen = set()
        for target in target_modules:
            hits = {n for n in names if n == target or n.endswith("." + target)}
            if not hits:
                raise InputError(f'target_modules: no linear layer is named "{target}"; there are {", ".join(endings)}')
            chosen |= hits
    if not chosen:
        raise InputError(f"target_modules: nothing is selected; there are {', '.join(endings)}")
    return [n for n in names if n in chosen]


def parent_of(model: Module, path: str):
    """(module, attribute) that hold ``path``: ``blocks.0.q`` is attribute ``q`` of ``model.blocks[0]``."""
    *parents, attribute = path.split(".")
    for part in parents:
        model = model[int(part)] if isinstance(model, list) else getattr(model, part)
    return model, attribute


def adapted_layers(model: Module) -> dict[str, AdaptedLinear]:
    """The adapted layers by path."""
    return {name: m for name, m in model.named_modules() if isinstance(m, AdaptedLinear)}


def count_parameters(model: Module) -> tuple[int, int]:
    """(trainable, total) numbers, the adapters' own included; what layers share is counted once."""
    sizes = [(p.data.size if p.requires_grad else 0, p.data.size) for _, p in model.named_parameters()]
    return tuple(map(sum, zip(*sizes, strict=True)))


def merge(model: Module) -> None:
    """Fold each adapter into one weight for inference: no product more than the base model has."""
    for layer in adapted_layers(model).values():
        layer.merged = layer.method.merge(layer.base.W.data, layer.p)


def unmerge(model: Module) -> None:
    """Undo merge() exactly: the base weight was never touched, so it is the same to the bit."""
    for layer in adapted_layers(model).values():
        layer.merged = None


def unload(model: Module) -> Module:
    """Take the adapters out again: the base model with the weights it had before adapt(), frozen; returns the model."""
    for name, layer in adapted_layers(model).items():
        parent, attribute = parent_of(model, name)
        layer.base.W.data = layer.original
        setattr(parent, attribute, layer.base)
    vars(model).pop("shared", None)
    return model


def merge_and_unload(model: Module) -> Module:
    """Replace each adapted layer by a plain Linear with the merged weight; returns the model."""
    for name, layer in adapted_layers(model).items():
        parent, attribute = parent_of(model, name)
        plain = Linear(layer.method.merge(layer.base.W.data, layer.p))
        plain.b = layer.base.b
        plain.freeze()
        setattr(parent, attribute, plain)
    vars(model).pop("shared", None)
    return model
