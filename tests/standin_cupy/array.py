"""The stand-in's array: a NumPy array inside, CuPy's manners outside."""

import operator

import numpy as np

from .frames import strict, synchronise

IMPLICIT = (
    "Implicit conversion to a NumPy array is not allowed. Please use `.get()` to construct a NumPy array explicitly."
)


def unsupported(value):
    return TypeError(f"Unsupported type {type(value)}")


def wrap(host, *parents):
    """``host`` on the device; where it is a view of one of the arrays ``parents``, that one owns the memory."""
    host = np.asarray(host)
    for parent in parents:
        if host is parent._host:
            return parent
        if host.size and np.may_share_memory(host, parent._host):
            return ndarray(host, parent._base if parent._base is not None else parent)
    return ndarray(host)


def host_of(value, library):
    """What NumPy computes with: the array inside, a number as it is, and for the library no host array at all."""
    if isinstance(value, ndarray):
        return value._host
    if library and isinstance(value, np.ndarray):
        raise unsupported(value)
    return value


def is_operand(value):
    return isinstance(value, ndarray | np.ndarray | np.generic | bool | int | float | complex)


class ndarray:  # noqa: N801
    """A subset of cupy.ndarray: what minilora uses of it, and nothing that CuPy does not have."""

    __module__ = "cupy"  # by which minilora.backend tells the two libraries apart
    __array_priority__ = 100

    def __init__(self, host, base=None):
        self._host, self._base = host, base

    # ------------------------------------------------------------------------------------------- what it is

    shape = property(lambda self: self._host.shape)
    dtype = property(lambda self: self._host.dtype)
    ndim = property(lambda self: self._host.ndim)
    size = property(lambda self: self._host.size)
    nbytes = property(lambda self: self._host.nbytes)
    itemsize = property(lambda self: self._host.itemsize)
    strides = property(lambda self: self._host.strides)
    flags = property(lambda self: self._host.flags)
    base = property(lambda self: self._base)
    T = property(lambda self: wrap(self._host.T, self))
    real = property(lambda self: wrap(self._host.real, self))
    imag = property(lambda self: wrap(self._host.imag, self))

    def __len__(self):
        if not self.ndim:
            raise TypeError("len() of unsized object")
        return len(self._host)

    # ------------------------------------------------------------------------------------------- to the host

    def get(self, stream=None, order="C", out=None, blocking=True):
        synchronise()
        return np.array(self._host, order=order)

    def item(self):
        synchronise()
        return self._host.item()

    def tolist(self):
        synchronise()
        return self._host.tolist()

    def __float__(self):
        return float(self.item())

    def __int__(self):
        return int(self.item())

    def __complex__(self):
        return complex(self.item())

    def __bool__(self):
        synchronise()
        return bool(self._host)

    def __iter__(self):  # CuPy's gives arrays again, without waiting; but nobody iterates except to look at them
        synchronise()
        return iter([wrap(item, self) for item in self._host])

    def __contains__(self, value):
        return bool((self == value).any())

    def __repr__(self):
        return f"cupy.{self._host!r}"

    def __format__(self, spec):
        return format(self.item() if spec else self._host, spec)

    __hash__ = None

    # ------------------------------------------------------------------------------------------- NumPy's doors

    def __array__(self, dtype=None, copy=None):
        if strict():
            raise TypeError(IMPLICIT)
        return np.array(self._host, dtype=dtype) if copy else np.asarray(self._host, dtype=dtype)

    def __array_ufunc__(self, ufunc, method, *inputs, **options):
        if strict():  # CuPy sends some of these on to its own ufunc; the library is to ask for that by name
            mixed = next((a for a in inputs if isinstance(a, np.ndarray)), None)
            if mixed is not None:
                raise unsupported(mixed)
            if "out" not in options and any(isinstance(a, np.generic) for a in inputs):  # a NumPy number * an array
                return wrap(ufunc(*(host_of(a, True) for a in inputs)))
            raise TypeError(IMPLICIT)
        out = options.pop("out", None)
        if out is not None:
            options["out"] = tuple(host_of(a, False) for a in out)
        result = getattr(ufunc, method)(*(host_of(a, False) for a in inputs), **options)
        return result if out is None else out[0] if len(out) == 1 else out

    def __array_function__(self, function, types, args, options):
        if strict():
            raise TypeError(IMPLICIT)
        plain = lambda a: (
            a._host if isinstance(a, ndarray) else type(a)(map(plain, a)) if type(a) in (list, tuple) else a
        )
        return function(*plain(args), **{k: plain(v) for k, v in options.items()})

    def __getattr__(self, name):
        """For a test, what NumPy's array has beyond CuPy's; the library does without."""
        if name.startswith("__") or name in ("_host", "_base") or strict():
            raise AttributeError(f"'cupy.ndarray' object has no attribute '{name}'")
        return getattr(self._host, name)

    def __deepcopy__(self, memo):
        return ndarray(self._host.copy())

    def __reduce__(self):
        return wrap, (self._host,)

    # ------------------------------------------------------------------------------------------- parts of it

    def __getitem__(self, index):
        return wrap(self._host[index_of(index)], self)

    def __setitem__(self, index, value):
        self._host[index_of(index)] = host_of(value, strict())

    def reshape(self, *shape, order="C"):
        return wrap(self._host.reshape(*shape, order=order), self)

    def transpose(self, *axes):
        return wrap(self._host.transpose(*axes), self)

    def swapaxes(self, axis1, axis2):
        return wrap(self._host.swapaxes(axis1, axis2), self)

    def ravel(self, order="C"):
        return wrap(self._host.ravel(order), self)

    def view(self, dtype=None):
        return ndarray(self._host.view() if dtype is None else self._host.view(dtype), self._base or self)

    def squeeze(self, axis=None):
        return wrap(self._host.squeeze(axis), self)

    # ------------------------------------------------------------------------------------------- new arrays

    def copy(self, order="C"):
        return wrap(self._host.copy(order))

    def astype(self, dtype, order="K", casting=None, subok=None, copy=True):
        return wrap(self._host.astype(dtype, order=order, copy=copy), self)

    def conj(self):
        return wrap(self._host.conj(), self)

    def fill(self, value):
        self._host.fill(host_of(value, strict()))

    def dot(self, b, out=None):
        return wrap(np.dot(self._host, host_of(b, strict())))

    # ------------------------------------------------------------------------------------------- reductions
    # always an array, 0-d where NumPy gives a number; without NumPy's where= and initial=

    def _reduce(self, name, axis, out=None, **options):
        library = strict()
        host = getattr(np, name)(self._host, axis=axis, **{k: v for k, v in options.items() if v is not None})
        if out is None:
            return wrap(host)
        host_of(out, library)[...] = host
        return out

    def sum(self, axis=None, dtype=None, out=None, keepdims=False):
        return self._reduce("sum", axis, out, dtype=dtype, keepdims=keepdims)

    def prod(self, axis=None, dtype=None, out=None, keepdims=None):
        return self._reduce("prod", axis, out, dtype=dtype, keepdims=bool(keepdims))

    def mean(self, axis=None, dtype=None, out=None, keepdims=False):
        return self._reduce("mean", axis, out, dtype=dtype, keepdims=keepdims)

    def max(self, axis=None, out=None, keepdims=False):
        return self._reduce("max", axis, out, keepdims=keepdims)

    def min(self, axis=None, out=None, keepdims=False):
        return self._reduce("min", axis, out, keepdims=keepdims)

    def any(self, axis=None, out=None, keepdims=False):
        return self._reduce("any", axis, out, keepdims=keepdims)

    def all(self, axis=None, out=None, keepdims=False):
        return self._reduce("all", axis, out, keepdims=keepdims)

    def argmax(self, axis=None, out=None, dtype=None, keepdims=False):
        return self._reduce("argmax", axis, out, keepdims=keepdims)

    # ------------------------------------------------------------------------------------------- operators

    def __neg__(self):
        return wrap(-self._host)

    def __pos__(self):
        return wrap(+self._host)

    def __abs__(self):
        return wrap(abs(self._host))

    def __invert__(self):
        return wrap(~self._host)


def index_of(index):
    """The index inside. CuPy also takes a host array, which it copies over at each use: refused to the library."""
    library = strict()
    return tuple(host_of(i, library) for i in index) if isinstance(index, tuple) else host_of(index, library)


def _operator(name, swapped):
    operate = getattr(operator, name)

    def method(self, other):
        if not is_operand(other):
            library = strict()
            if library or not isinstance(other, list | tuple):
                return NotImplemented
        library = strict()
        a, b = self._host, host_of(other, library)
        host = operate(b, a) if swapped else operate(a, b)
        # A test that mixes the two goes on with NumPy, as it was written.
        return wrap(host) if isinstance(other, ndarray) or np.isscalar(other) else host

    return method


def _in_place(name):
    ufunc = getattr(np, name)

    def method(self, other):
        if not is_operand(other):
            return NotImplemented
        ufunc(self._host, host_of(other, strict()), out=self._host)
        return self

    return method


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and_", "or_", "xor"):
    setattr(ndarray, f"__{_name.strip('_')}__", _operator(_name, False))
    setattr(ndarray, f"__r{_name.strip('_')}__", _operator(_name, True))
for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    setattr(ndarray, f"__{_name}__", _operator(_name, False))
for _name, _ufunc in {
    "add": "add", "sub": "subtract", "mul": "multiply", "truediv": "divide", "pow": "power"
}.items():  # fmt: skip
    setattr(ndarray, f"__i{_name}__", _in_place(_ufunc))
