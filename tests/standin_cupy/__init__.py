"""A stand-in for CuPy without a GPU: the names that minilora uses, with CuPy's behaviour, on NumPy arrays inside.

The library is held to CuPy's rules, and each time it waits for the device is recorded. A test, which is written with
NumPy, may mix the two. The nearest frame of the call stack that belongs to minilora/ or to tests/ says who is asking.
In three places the stand-in is stricter than CuPy, where CuPy would be slow: it refuses a NumPy function on a device
array and an index array on the host, and iterating over an array counts as waiting.
"""

import operator
import sys
import types
from functools import cache, partial
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
LIBRARY = HERE.parent.parent / "minilora"
IMPLICIT = (
    "Implicit conversion to a NumPy array is not allowed. Please use `.get()` to construct a NumPy array explicitly."
)

waits = []  # the file of minilora/ that waited for the device, once for each time
launches = []  # what the library asked for on device arrays: a name, or "" for an operator

# Names and, where they are functions, the keywords that the library may use. tests/gpu/test_standin.py holds them
# against CuPy's.
ATTRIBUTES, VIEWS = ["shape", "dtype", "ndim", "size", "nbytes", "itemsize", "strides", "flags"], ["T", "real", "imag"]
METHODS = {
    **dict.fromkeys(("sum", "mean", "prod"), "axis dtype out keepdims"),
    **dict.fromkeys(("max", "min", "any", "all", "argmax"), "axis out keepdims"),
    **dict.fromkeys(("transpose", "swapaxes", "conj", "view", "fill"), ""),
    **dict.fromkeys(("reshape", "ravel", "copy"), "order"),
    "astype": "order casting subok copy",
    "squeeze": "axis",
    "dot": "out",
}
UFUNCS = ["add", "subtract", "multiply", "divide", "sqrt", "exp", "log", "tanh", "maximum", "minimum", "isfinite"]
FUNCTIONS = {
    **dict.fromkeys(UFUNCS, "out dtype"),
    **dict.fromkeys(("zeros", "ones", "full"), "dtype order"),
    **dict.fromkeys(("zeros_like", "ones_like"), "dtype order"),
    **dict.fromkeys(("concatenate", "stack"), "axis out dtype casting"),
    **dict.fromkeys(("broadcast_to", "tile", "where"), ""),
    "arange": "dtype",
    "tril": "k",
    "triu": "k",
    "einsum": "",
    "matmul": "out dtype casting order",
}
SCATTERED = ["int32", "float16", "float32", "float64", "uint32", "uint64"]  # the dtypes of CuPy's add.at
OPERATORS = ["add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor"]
IN_PLACE = ["add", "sub", "mul", "truediv", "pow"]
COMPARISONS, UNARY = ["eq", "ne", "lt", "le", "gt", "ge"], ["neg", "abs", "invert"]


# ------------------------------------------------------------------------------------------------ who is asking


@cache
def belongs_to_library(file: str):
    """True for code of the library, False for a test's, None for NumPy's, Python's and this package's."""
    path = Path(file)
    if file.startswith("<mutant of") or path.is_relative_to(LIBRARY):
        return True
    return False if path.is_relative_to(HERE.parent) and not path.is_relative_to(HERE) else None


def asker():
    """(the file that asks, whether it is the library's)."""
    frame = sys._getframe(2)
    while frame is not None:
        file = frame.f_code.co_filename
        if (library := belongs_to_library(file)) is not None:
            return file, library
        frame = frame.f_back
    return "?", True


def strict() -> bool:
    """Whether CuPy's rules hold for this call: the library asks, not a test."""
    return asker()[1]


def wait():
    """Record that the library waits here until the device is done."""
    file, library = asker()
    if library:
        waits.append(file)


# ------------------------------------------------------------------------------------------------ in and out


def unsupported(value):
    return TypeError(f"Unsupported type {type(value)}")


def device(array):
    """A host array as a device array on the same memory: for tests, which may change theirs afterwards."""
    return ndarray(np.asarray(array)) if isinstance(array, np.ndarray | np.generic) else array


def hosts(value, library):
    """``value`` with the arrays inside device arrays, in lists, tuples and dicts too. No host array for the library."""
    if isinstance(value, ndarray):
        return value._host
    if library and isinstance(value, np.ndarray):
        raise unsupported(value)
    if type(value) in (list, tuple):
        return type(value)(hosts(v, library) for v in value)
    return {k: hosts(v, library) for k, v in value.items()} if type(value) is dict else value


def wrap(host, parents=(), name=""):
    """A result on the device. A view of one of the arrays ``parents`` names the owner of its memory as its base."""
    host = np.asarray(host)
    for parent in parents:
        if isinstance(parent, ndarray) and host is parent._host:
            return parent
        if isinstance(parent, ndarray) and host.size and np.may_share_memory(host, parent._host):
            return ndarray(host, parent if parent._base is None else parent._base)
    note(name, strict())
    return ndarray(host)


def note(name, library):
    if library:
        launches.append(name)


def call(compute, name, keywords, parents, *args, **options):
    """A function of NumPy on device arrays, with the ``keywords`` that CuPy's has too."""
    library = strict()
    if library and (unknown := options.keys() - keywords.split()):
        raise TypeError(f"{name}() got an unexpected keyword argument '{unknown.pop()}'")
    result = compute(*hosts(args, library), **hosts(options, library))
    if "out" in options:
        note(name, library)
        return options["out"]
    return None if result is None else wrap(result, (*parents, *args), name)


# ------------------------------------------------------------------------------------------------ the array


class ndarray:  # noqa: N801
    """A subset of cupy.ndarray: what minilora uses of it, and nothing that CuPy does not have."""

    __module__ = "cupy"  # by which minilora.backend tells the two libraries apart
    __hash__ = None

    def __init__(self, host, base=None):
        self._host, self._base = host, base

    base = property(lambda self: self._base)

    def __getattr__(self, name):
        """A test may use whatever NumPy's array has, the library only what is in the tables above."""
        if name.startswith("_") or (name not in METHODS and strict()):
            raise AttributeError(f"'cupy.ndarray' object has no attribute '{name}'")
        value = getattr(self._host, name)
        if callable(value):
            return partial(call, value, name, METHODS.get(name, ""), [self])
        return wrap(value, [self]) if isinstance(value, np.ndarray) else value

    def __len__(self):
        return len(self._host)

    def get(self, stream=None, order="C", out=None, blocking=True):
        wait()
        return np.array(self._host, order=order)

    def item(self):
        wait()
        return self._host.item()

    def tolist(self):
        wait()
        return self._host.tolist()

    def __bool__(self):
        wait()
        return bool(self._host)

    def __float__(self):
        return float(self.item())

    def __int__(self):
        return int(self.item())

    def __format__(self, spec):
        return format(self.item() if spec else self._host, spec)

    def __repr__(self):
        return f"cupy.{self._host!r}"

    def __iter__(self):  # CuPy's gives arrays again, without waiting; but nobody iterates except to look at them
        wait()
        return iter([wrap(item, [self]) for item in self._host])

    def __getitem__(self, index):
        return wrap(self._host[hosts(index, strict())], [self])

    def __setitem__(self, index, value):
        library = strict()
        note("setitem", library)
        self._host[hosts(index, library)] = hosts(value, library)

    def __deepcopy__(self, memo):
        return ndarray(self._host.copy())

    def __array__(self, dtype=None, copy=None):
        if strict():
            raise TypeError(IMPLICIT)
        return np.array(self._host, dtype=dtype, copy=copy)

    def __array_ufunc__(self, ufunc, method, *inputs, **options):
        library = strict()
        inputs = hosts(inputs, library)
        if library and (options or not any(isinstance(a, np.generic) for a in inputs)):
            raise TypeError(IMPLICIT)
        result = getattr(ufunc, method)(*inputs, **hosts(options, library))
        return wrap(result) if library else result  # for the library: a NumPy number times a device array

    def __array_function__(self, function, types, args, options):
        if strict():
            raise TypeError(IMPLICIT)
        return function(*hosts(args, False), **hosts(options, False))


def binary(name, swapped=False):
    """The operator ``name`` of Python's module operator as a method of the array."""
    operate = getattr(operator, name)

    def method(self, other):
        library = strict()
        if not isinstance(other, ndarray | np.ndarray | np.generic | bool | int | float | complex):
            return NotImplemented
        operands = [self._host, hosts(other, library)]
        host = operate(*reversed(operands)) if swapped else operate(*operands)
        if host is self._host:
            note(name, library)
            return self
        return host if isinstance(other, np.ndarray) else wrap(host)  # a test that mixes the two continues with NumPy

    return method


for name in UNARY:
    setattr(ndarray, f"__{name}__", lambda self, name=name: wrap(getattr(operator, name)(self._host)))
for name in ATTRIBUTES:
    setattr(ndarray, name, property(operator.attrgetter(f"_host.{name}")))
for name in VIEWS:
    setattr(ndarray, name, property(lambda self, name=name: wrap(getattr(self._host, name), [self])))
for name in OPERATORS + COMPARISONS:
    setattr(ndarray, f"__{name}__", binary(f"__{name}__"))
for name in OPERATORS:
    setattr(ndarray, f"__r{name}__", binary(f"__{name}__", swapped=True))
for name in IN_PLACE:
    setattr(ndarray, f"__i{name}__", binary(f"__i{name}__"))


# ------------------------------------------------------------------------------------------------ the functions


def function(name):
    """CuPy's function ``name``, which takes device arrays."""
    compute, keywords = getattr(np, name), FUNCTIONS[name]

    def f(*args, **options):
        several = name in ("concatenate", "stack")
        for a in args[0] if several else args if name in UFUNCS else ():
            if isinstance(a, list) or (several and not hasattr(a, "shape")):
                raise unsupported(a)
        return call(compute, name, keywords, args[0] if several else (), *args, **options)

    def at(a, indices, b=None):
        library = strict()
        if a.dtype.name not in SCATTERED or name != "add":
            raise TypeError(f"scatter_{name} only supports {', '.join(SCATTERED)} as data type")
        compute.at(*hosts((a, indices, b), library))

    if name in UFUNCS:
        f.at = at
    return f


def array(obj, dtype=None, copy=True, order="K"):
    if isinstance(obj, ndarray):
        return wrap(np.array(obj._host, dtype, copy=copy or None, order=order), [obj])
    return wrap(np.array(obj, dtype, order=order))  # a copy: the device shares no memory with the host


def asarray(a, dtype=None, order=None):
    return array(a, dtype, False, order or "K")


def ascontiguousarray(a, dtype=None):
    return array(a, dtype, False, "C")


def asnumpy(a, stream=None, order="C"):
    return a.get(order=order) if isinstance(a, ndarray) else np.asarray(a, order=order)


def empty(shape, dtype=float, order="C"):
    """Filled with NaN, if the dtype has it: an entry that is read before it is written is seen. No launch."""
    return ndarray(np.full(shape, np.nan if np.dtype(dtype).kind in "fc" else 0, dtype, order))


def pinv(a, rcond=1e-15):
    return wrap(np.linalg.pinv(hosts(a, True), rcond))


def module():
    """The stand-in as a module by the name of cupy, for sys.modules."""
    from . import kernels

    cupy = types.ModuleType("cupy", __doc__)
    for name in FUNCTIONS:
        setattr(cupy, name, function(name))
    for f in (array, asarray, ascontiguousarray, asnumpy, empty):
        setattr(cupy, f.__name__, f)
    cupy.ndarray, cupy.linalg = ndarray, types.SimpleNamespace(pinv=pinv)
    cupy.ElementwiseKernel, cupy.ReductionKernel = kernels.ElementwiseKernel, kernels.ReductionKernel
    for name in ("float32", "float64", "complex64", "complex128", "int32", "int64", "bool_", "newaxis", "inf", "pi"):
        setattr(cupy, name, getattr(np, name))
    cupy.cuda = types.SimpleNamespace(runtime=types.SimpleNamespace(getDeviceCount=lambda: 1))
    return cupy
