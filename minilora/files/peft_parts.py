"""What a layer has in PEFT's file, and how several layers become one module: GPT-2 there has q, k and v in one."""

from dataclasses import dataclass, field, replace

import numpy as np

from ..adapter import AdaptedLinear, Adapter
from ..backend import to_host
from ..engine import Saved
from ..errors import InputError

SHARED = "base_model."  # how the name of an array begins that all modules share
ROUNDING = 128  # units in the last place by which a weight may stray that was updated 128² times


@dataclass
class Part:
    """The method of one layer or module, and its arrays in NumPy; ``rows``: the layer's rows of shared arrays."""

    method: Adapter
    arrays: dict
    rows: dict = field(default_factory=dict)


def axes_of(kind: type, shared=False) -> dict[str, tuple]:
    """{array: its axes} of the arrays of a method in PEFT's file: those of each module, or those that all share."""
    found = kind.peft_arrays.items()
    return {array: axes for array, (theirs, axes) in found if theirs.startswith(SHARED) == shared}


def rows_in_module(paths, weights: dict) -> dict[str, slice]:
    """{path: the rows of the module that are the layer's}: one layer lies behind the other."""
    found, row = {}, 0
    for path in paths:
        found[path] = slice(row, row + len(weights[path]))
        row = found[path].stop
    return found


def own_part(layer: AdaptedLinear, kind: type) -> Part:
    """The layer's own arrays, for the method ``kind`` as which the file is read, with the alpha of the same scaling."""
    method, values = layer.method, {option: getattr(layer.method, option) for option in kind.peft_names}
    read = kind(**values)
    if kind.is_product and read.scaling != method.scaling:
        read = with_scaling(read, read.r, method.scaling)
    return Part(read, {array: to_host(layer.p[array]) for array in axes_of(kind)}, layer.part)


def product_part(path: str, layer: AdaptedLinear, kind: type) -> Part:
    """The layer's update as that of the low-rank product ``kind``. Raises InputError for an update that is none."""
    method = layer.method
    if method.updates_base:
        B, A = split_change(path, layer)
    elif (found := method.factors(layer.base.W.data, layer.p)) is not None:
        B, A = map(to_host, found)
    else:
        raise InputError(
            f"save_peft: the update of {method.name} is not a low-rank product, and LoRA cannot hold it; "
            'use form="merged"'
        )
    b, a = product_arrays(kind)
    return Part(with_scaling(kind(r=len(A)), len(A), 1.0), {a: A, b: B})


def product_arrays(kind: type) -> tuple[str, str]:
    """The names of B (d_out, r) and A (r, d_in) of a method that is a product."""
    by_axes = {axes: array for array, axes in axes_of(kind).items()}
    return by_axes["d_out", "r"], by_axes["r", "d_in"]


def with_scaling(method: Adapter, r: int, scaling: float) -> Adapter:
    """``method`` with the rank ``r`` and the alpha of this scaling: a whole number if one is exact."""
    alpha = scaling / replace(method, r=r, alpha=1.0).scaling  # scaling is proportional to alpha
    whole = replace(method, r=r, alpha=max(1.0, float(round(alpha))))
    return whole if whole.scaling == scaling else replace(method, r=r, alpha=alpha)


def split_change(path: str, layer: AdaptedLinear):
    """(B, A) of what merging does to the weight before the adapter, for a method that moves W itself.

    Its two low-rank products, now and before, have rank 2 r together; what is beyond that must be rounding.
    """
    W, merged = to_host(layer.original), to_host(layer.method.merge(layer.base.W.data, layer.p))
    change = merged.astype(np.float64) - W
    U, sigma, Vt = np.linalg.svd(change, full_matrices=False)
    k = min(2 * getattr(layer.method, "r", len(sigma)), len(sigma))
    root = np.sqrt(sigma[:k])
    B, A = U[:, :k] * root, root[:, None] * Vt[:k]
    rest, allowed = np.abs(change - B @ A).max(), ROUNDING * np.finfo(W.dtype).eps * np.abs(merged).max()
    if rest > allowed:
        raise InputError(
            f"save_peft: the change of {path} by {layer.method.name} has a higher rank than {k}: {rest:.1e} is left "
            f'over, and rounding would leave {allowed:.1e}; use form="merged"'
        )
    return B.astype(W.dtype), A.astype(W.dtype)


def fuse(module: str, parts: dict[str, Part | None], weights: dict) -> Part:
    """The Part of PEFT's ``module`` from those of its layers, by path; a layer without one must stay as it is."""
    method = next(part.method for part in parts.values() if part is not None)
    if method.is_product:
        return blocks(list(parts.values()), [weights[path] for path in parts])
    check_alike(module, parts, weights)
    arrays = {}
    for array, axes in axes_of(type(method)).items():
        each = [part.arrays[array] for part in parts.values()]
        arrays[array] = np.concatenate(each) if axes[0] == "d_out" else each[0]
    return Part(method, arrays)


def blocks(parts: list[Part | None], weights: list) -> Part:
    """Products of several layers as one: layers with the same A keep it, and their B are stacked.

    Otherwise each has rows of A of its own, and B is zero off its block. If that makes more rows than there are inputs,
    the product itself is smaller, and A is the identity. All other arrays are stacked, as at the start for a layer
    without adapter.
    """
    present = [part for part in parts if part is not None]
    method, first = present[0].method, present[0].arrays
    b, a = product_arrays(type(method))
    same = all(np.array_equal(part.arrays[a], first[a]) for part in present)
    A = first[a] if same else np.concatenate([part.arrays[a] for part in present])
    B = np.zeros((sum(map(len, weights)), len(A)), A.dtype)
    others = {array: [] for array in first if array not in (a, b)}
    row = column = 0
    for part, W in zip(parts, weights, strict=True):
        if part is not None:
            columns = slice(column, column + part.method.r)
            B[row : row + len(W), columns] = part.arrays[b] * (part.method.scaling / method.scaling)
            column = column if same else columns.stop
        for array, each in others.items():
            each.append(start(method, W)[array] if part is None else part.arrays[array])
        row += len(W)
    scaling, (r, d_in) = method.scaling, A.shape
    if not same and r > d_in:
        A, B, scaling = np.eye(d_in, dtype=A.dtype), (scaling * B) @ A, 1.0
    if not same:
        method = with_scaling(method, len(A), scaling)
    return Part(method, {a: A, b: B} | {array: np.concatenate(each) for array, each in others.items()})


def start(method: Adapter, W) -> dict:
    """The method's trainable arrays at the start, computed in float64."""
    W = to_host(W)
    arrays, _ = method.init(W.astype(np.float64), np.random.default_rng(0), Saved())
    return {name: array.astype(W.dtype) for name, array in arrays.items()}


def check_alike(module: str, parts: dict[str, Part | None], weights: dict) -> None:
    """Raises InputError if these layers, by path, cannot be one module of PEFT.

    A module takes the first rows of an array that all modules share, so a layer in it takes those after the layer
    before. Of an array without rows for outputs it has a single one.
    """

    def fail(rule):
        raise InputError(
            f'save_peft: in PEFT, {module} {rule}; use form="lora", or names="minilora", which leaves layers apart'
        )

    if None in parts.values():
        fail(f"is one layer for {', '.join(parts)}, and not all of them are adapted")
    path_of_first, first = next(iter(parts.items()))
    kind = type(first.method)
    for path, rows in rows_in_module(parts, weights).items():
        part = parts[path]
        if part.method != first.method:
            fail(f"has one {first.method}, and {path} has another than {path_of_first}")
        for array, axes in axes_of(kind, shared=True).items():
            own = part.rows.get(array, slice(0, len(weights[path])))
            if axes[0] == "d_out" and own != rows:
                taken = f"takes rows {rows.start} to {rows.stop} of {array}"
                fail(f"{taken} for {path}, which has {own.start} to {own.stop}")
        for array, axes in axes_of(kind).items():
            if axes[0] != "d_out" and not np.array_equal(part.arrays[array], first.arrays[array]):
                fail(f"has one {array}, and {path} has another than {path_of_first}")
