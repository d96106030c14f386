"""Putting adapters into a model, in place and layer by layer: adapt(), alike for every method."""

import zlib

import numpy as np

from . import methods
from .adapter import AdaptedLinear, Adapter, own_array
from .backend import array_module
from .errors import InputError, nearest
from .nn import Linear, Module, Parameter
from .targets import choose


def adapt(
    model: Module, method: str | Adapter, target_modules="all-linear", seed=0, verbose=True,
    rank_pattern=None, alpha_pattern=None, **options,
) -> Module:  # fmt: skip
    """Freeze ``model`` and put ``method`` beside each Linear that ``target_modules`` names; returns the model.

    ``target_modules``: a list of names (a path, or its last part such as "q"), "all-linear", or a regular
    expression that the whole path matches. ``options``: the method's fields, such as r and alpha; ``rank_pattern`` and
    ``alpha_pattern`` {name or expression: value} give some layers an r or alpha of their own, as in PEFT.
    Raises InputError for an unknown method or option, a target or pattern that matches nothing, a rank that does not
    fit, or a model that is adapted already; nothing has been changed then.
    """
    method = methods.create(method, **options)
    chosen = plan(model, method, target_modules, rank_pattern, alpha_pattern)
    host(model, chosen, seed)
    if verbose:
        kinds = dict.fromkeys(name.rpartition(".")[2] for name in chosen)
        trainable, total = count_parameters(model)
        print(f"{method.name}: {len(chosen)} layers matched ({', '.join(kinds)}); ", end="")
        print(f"trainable {trainable:,} of {total:,} ({100 * trainable / total:.2f} %)")
    return model


def plan(model, method: Adapter, target_modules="all-linear", rank_pattern=None, alpha_pattern=None) -> dict:
    """The method of each layer that adapt() would adapt, by path. Raises its errors, and changes nothing."""
    chosen = choose(list(linear_layers(model)), method, target_modules, rank_pattern, alpha_pattern)
    check_plan(model, chosen)
    return chosen


def check_plan(model: Module, chosen: dict[str, Adapter]) -> None:
    """Raises InputError where host() could not put ``chosen`` into ``model``."""
    if adapted_layers(model):
        raise InputError("adapt: this model is adapted already; use merge_and_unload(model) or a fresh model")
    linears = linear_layers(model)
    for path, method in chosen.items():
        if path not in linears:
            raise InputError(f'adapt: there is no linear layer "{path}"{nearest(path, linears)}')
        method.check_layer(path, linears[path].W.shape)
    first = next(iter(chosen.values()))
    if type(first).init_shared is not Adapter.init_shared and any(method != first for method in chosen.values()):
        raise InputError(f"adapt: with {first.name} the layers share arrays, so that all must have the same options")


def host(model: Module, chosen: dict[str, Adapter], seed=0, parts=None) -> None:
    """Freeze ``model`` and put its method beside each layer, by path; check_plan() says whether it can be done.

    ``parts`` {path: {name: slice}}: see AdaptedLinear.
    """
    linears = linear_layers(model)
    model.freeze()
    W, method = linears[next(iter(chosen))].W.data, next(iter(chosen.values()))
    shared = method.init_shared(shared_shapes(model, chosen, parts), np.random.default_rng(seed))
    shared = {k: Parameter(own_array(a, array_module(W), W.dtype), requires_grad=False) for k, a in shared.items()}
    if shared:
        model.shared = Module()  # the model owns them, the layers refer to them: moved, stored and counted once
        vars(model.shared).update(shared)
    for path, method in chosen.items():
        parent, attribute = parent_of(model, path)
        layer_seed = [seed, zlib.crc32(path.encode())]
        setattr(parent, attribute, AdaptedLinear(linears[path], method, layer_seed, shared, (parts or {}).get(path)))


def shared_shapes(model: Module, chosen, parts=None) -> list:
    """The (d_out, d_in) that shared arrays must serve: those of the layers, up to the last row that a part reaches."""
    found = []
    for path, linear in linear_layers(model).items():
        if path in chosen:
            last = [rows.stop for rows in (parts or {}).get(path, {}).values()]
            found.append((max(len(linear.W.data), *last, 1), linear.W.shape[1]))
    return found


def linear_layers(model: Module) -> dict[str, Linear]:
    """The plain linear layers by path."""
    return {path: m for path, m in model.named_modules() if isinstance(m, Linear)}


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
