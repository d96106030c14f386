"""A stand-in for CuPy without a GPU: the functions that minilora uses, with CuPy's behaviour, on NumPy arrays inside.

It refuses to the library what CuPy refuses, counts how often the library waits for the device, and a gate in
tests/gpu/test_standin.py holds its names and keywords against the real CuPy's. In three places it is stricter than CuPy,
where that would work but slowly or by a detour: a NumPy function on a device array, an index that lies on the host,
and iterating over an array, which counts as waiting.
"""

import types

import numpy as np

from . import kernels
from .array import host_of, is_operand, ndarray, unsupported, wrap
from .frames import strict


def device(array):
    """A host array as a device array on the same memory: for tests, which may change theirs afterwards."""
    return wrap(array) if isinstance(array, np.ndarray | np.generic) else array


SCATTERED = ("int32", "float16", "float32", "float64", "uint32", "uint64")  # what an atomic addition knows


class Ufunc:
    """An elementwise function: arrays and numbers in, an array out, ``out=`` as in CuPy."""

    def __init__(self, name):
        self.__name__, self.host = name, getattr(np, name)

    def __call__(self, *args, out=None, dtype=None):
        library = strict()
        for a in args:
            if not is_operand(a):
                raise unsupported(a)
        args = [host_of(a, library) for a in args]
        options = {} if dtype is None else {"dtype": dtype}
        if out is None:
            return wrap(self.host(*args, **options))
        if not isinstance(out, ndarray):
            raise unsupported(out)
        self.host(*args, out=out._host, **options)
        return out

    def at(self, a, indices, b=None):
        library = strict()
        if self.__name__ != "add":
            raise NotImplementedError(f"{self.__name__}.at is not supported")
        if isinstance(a, ndarray) and a.dtype.name not in SCATTERED:
            raise TypeError(f"scatter_add only supports {', '.join(SCATTERED)} as data type")
        inside = tuple if isinstance(indices, tuple) else lambda parts: next(iter(parts))
        parts = indices if isinstance(indices, tuple) else (indices,)
        self.host.at(host_of(a, library), inside(host_of(i, library) for i in parts), host_of(b, library))


UFUNCS = (
    "add",
    "subtract",
    "multiply",
    "divide",
    "sqrt",
    "exp",
    "log",
    "tanh",
    "absolute",
    "maximum",
    "minimum",
    "isfinite",
)


def array(obj, dtype=None, copy=True, order="K", subok=False, ndmin=0, *, blocking=False):
    if isinstance(obj, ndarray):
        return wrap(np.array(obj._host, dtype, copy=copy or None, order=order), obj)
    return wrap(np.array(obj, dtype, order=order))


def asarray(a, dtype=None, order=None, *, blocking=False):
    if isinstance(a, ndarray):
        return wrap(np.asarray(a._host, dtype, order), a)
    return wrap(np.array(a, dtype, order=order or "K"))  # a copy: the device shares no memory with the host


def ascontiguousarray(a, dtype=None):
    return asarray(a, dtype, "C")


def asnumpy(a, stream=None, order="C", out=None, *, blocking=True):
    return a.get(order=order) if isinstance(a, ndarray) else np.asarray(a, order=order)


def empty(shape, dtype=float, order="C"):
    """Filled with NaN, where the dtype has it: what is read before it was written is seen."""
    return full(shape, np.nan if np.dtype(dtype).kind in "fc" else 0, dtype, order)


def zeros(shape, dtype=float, order="C"):
    return wrap(np.zeros(shape, dtype, order))


def ones(shape, dtype=float, order="C"):
    return wrap(np.ones(shape, dtype, order))


def full(shape, fill_value, dtype=None, order="C"):
    return wrap(np.full(shape, host_of(fill_value, strict()), dtype, order))


def arange(start, stop=None, step=1, dtype=None):
    return wrap(np.arange(start, step=step, dtype=dtype) if stop is None else np.arange(start, stop, step, dtype))


def _of_arrays(name):
    """NumPy's function of one device array and plain arguments."""

    def function(a, *args, **options):
        if not isinstance(a, ndarray):
            raise unsupported(a)
        library = strict()
        return wrap(getattr(np, name)(a._host, *(host_of(b, library) for b in args), **options), a)

    return function


def zeros_like(a, dtype=None, order="K", subok=None, shape=None):
    return _of_arrays("zeros_like")(a, dtype)


def ones_like(a, dtype=None, order="K", subok=None, shape=None):
    return _of_arrays("ones_like")(a, dtype)


def empty_like(prototype, dtype=None, order="K", subok=None, shape=None):
    return _of_arrays("zeros_like")(prototype, dtype)


def broadcast_to(array, shape):
    return _of_arrays("broadcast_to")(array, shape)


def tril(m, k=0):
    return _of_arrays("tril")(m, k)


def tile(A, reps):
    return _of_arrays("tile")(A, reps)


def _several(name, arrays, **options):
    library = strict()
    for a in arrays:
        if not isinstance(a, ndarray) and (library or not isinstance(a, np.ndarray)):
            raise unsupported(a)
    return wrap(getattr(np, name)([host_of(a, library) for a in arrays], **options))


def concatenate(tup, axis=0, out=None, *, dtype=None, casting="same_kind"):
    return _several("concatenate", tup, axis=axis, dtype=dtype)


def stack(tup, axis=0, out=None, *, dtype=None, casting="same_kind"):
    return _several("stack", tup, axis=axis, dtype=dtype)


def where(condition, x=None, y=None):
    library = strict()
    return wrap(np.where(*(host_of(a, library) for a in (condition, x, y))))


def einsum(*operands, dtype=None, optimize=False):
    subscripts, *arrays = operands
    library = strict()
    return wrap(np.einsum(subscripts, *(host_of(a, library) for a in arrays)))


def matmul(x1, x2, /, out=None, casting="same_kind", order="K", dtype=None):
    library = strict()
    if out is not None and not isinstance(out, ndarray):
        raise unsupported(out)
    for a in (x1, x2):
        if not isinstance(a, ndarray) and (library or not isinstance(a, np.ndarray)):
            raise unsupported(a)
    host = np.matmul(host_of(x1, library), host_of(x2, library), out=None if out is None else out._host)
    return wrap(host) if out is None else out


def pinv(a, rcond=1e-15):
    if not isinstance(a, ndarray):
        raise unsupported(a)
    strict()
    return wrap(np.linalg.pinv(a._host, rcond))


FUNCTIONS = [
    array, asarray, ascontiguousarray, asnumpy, empty, zeros, ones, full, arange, zeros_like, ones_like, empty_like,
    broadcast_to, tril, tile, concatenate, stack, where, einsum, matmul,
]  # fmt: skip


def on_device(kernel):
    """A kernel class of kernels.py that takes and makes device arrays."""

    class Kernel(kernel):
        def __call__(self, *args, **options):
            strict()
            before, kernels.wrap = kernels.wrap, wrap
            try:
                return super().__call__(*args, **options)
            finally:
                kernels.wrap = before

    return Kernel


def module():
    """The stand-in as a module by the name of cupy, for sys.modules."""
    cupy = types.ModuleType("cupy", __doc__)
    for function in FUNCTIONS:
        setattr(cupy, function.__name__, function)
    for name in UFUNCS:
        setattr(cupy, name, Ufunc(name))
    cupy.ndarray = ndarray
    cupy.ElementwiseKernel, cupy.ReductionKernel = map(on_device, (kernels.ElementwiseKernel, kernels.ReductionKernel))
    for name in ("float32", "float64", "complex64", "complex128", "int32", "int64", "bool_", "newaxis", "inf", "pi"):
        setattr(cupy, name, getattr(np, name))
    cupy.linalg = types.SimpleNamespace(pinv=pinv)
    cupy.cuda = types.SimpleNamespace(runtime=types.SimpleNamespace(getDeviceCount=lambda: 1))
    return cupy
