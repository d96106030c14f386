"""ElementwiseKernel and ReductionKernel without a GPU: CuPy's rules, and the same C++ source compiled for the host.

A GPU runs the entries in any order and in many threads, so here entries go from the last to the first, a reduction is
shared among eight threads, some without an entry, and what a kernel leaves unwritten is NaN.
"""

import atexit
import ctypes
import functools
import hashlib
import itertools
import math
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np

COMPILER = shutil.which("g++") or shutil.which("c++")
C_TYPES = {"bool": "bool", "int32": "int", "int64": "long long", "float32": "float", "float64": "double"}

wrap = None  # makes an array of a host array; without it kernels take and return NumPy's
launches = []  # (kernel, arguments, C type by template letter) of each launch; an argument is an Argument

PRELUDE = """
#define __device__ inline
typedef __PTRDIFF_TYPE__ ptrdiff_t;
extern "C" { double exp(double); float expf(float); double log(double); float logf(float); double tanh(double);
             float tanhf(float); double sqrt(double); float sqrtf(float); }
inline float exp(float x) { return expf(x); }
inline float log(float x) { return logf(x); }
inline float tanh(float x) { return tanhf(x); }
inline float sqrt(float x) { return sqrtf(x); }
template <typename A> struct CArray {
  A* data; ptrdiff_t ndim, count, lengths[8], steps[8];
  ptrdiff_t size() const { return count; }
  const ptrdiff_t* shape() const { return lengths; }
  A& at(ptrdiff_t i) const {
    char* place = (char*)data;
    for (ptrdiff_t k = ndim - 1; k >= 0; --k) { place += i % lengths[k] * steps[k]; i /= lengths[k]; }
    return *(A*)place;
  }
  A& operator[](ptrdiff_t i) { return at(i); }
  const A& operator[](ptrdiff_t i) const { return at(i); }
};
struct CIndexer {
  ptrdiff_t count, index;
  ptrdiff_t size() const { return count; }
  ptrdiff_t get() const { return index; }
  void set(ptrdiff_t i) { index = i; }
};
"""


class Parameter:
    """``raw T x``: a type (one letter is a template's), a name, and whether the kernel indexes it itself."""

    def __init__(self, text):
        *keywords, self.type, self.name = text.split()
        if not set(keywords) <= {"raw"}:
            raise ValueError(f'Unknown keyword "{text}"')
        self.raw, self.letter = "raw" in keywords, len(self.type) == 1
        self.dtype = None if self.letter else np.dtype(self.type)
        self.c_type = self.type if self.letter else C_TYPES[self.dtype.name]


class Argument:
    """One argument of one launch: an array, broadcast where it is not raw, or a number."""

    def __init__(self, value):
        self.given, self.is_array = value, hasattr(value, "_host") or isinstance(value, np.ndarray)
        self.host = getattr(value, "_host", value)
        if wrap is not None and isinstance(value, np.ndarray):
            raise TypeError(f"Unsupported type {type(value)}")
        if not self.is_array and not isinstance(value, bool | int | float | np.number | np.bool_):
            raise TypeError(f"Unsupported type {type(value)}")

    def pointer(self):
        """The address of a CArray, or of a number."""
        if not self.is_array:
            self.memory = np.array(self.host)
            return self.memory.ctypes.data
        a, pad = self.host, [0] * (8 - self.host.ndim)
        self.memory = np.array([a.ctypes.data, a.ndim, a.size, *a.shape, *pad, *a.strides, *pad], np.intp)
        return self.memory.ctypes.data


class Kernel:
    def __new__(cls, *args, **options):
        kernel = super().__new__(cls)
        kernel.made_with = args, options  # for the real CuPy to make the same
        return kernel

    def __init__(self, in_params, out_params, name, preamble):
        self.inputs, self.outputs = ([Parameter(t) for t in p.split(",") if t] for p in (in_params, out_params))
        self.params, self.name, self.preamble = self.inputs + self.outputs, name, preamble
        if "i" in [p.name for p in self.params]:
            raise ValueError("Can not use 'i' as a parameter name")

    def arguments(self, args):
        if len(args) not in (len(self.inputs), len(self.params)):
            raise TypeError(f"Wrong number of arguments for {self.name!r}")
        args = [Argument(a) for a in args]
        if not all(a.is_array for a in args[len(self.inputs) :]):
            raise TypeError("Output arguments type must be cupy.ndarray")
        return args

    def types(self, args):
        """The dtype of each template letter: outputs decide first, and all arrays of a letter must agree."""
        types = {}
        outputs = zip(self.outputs, args[len(self.inputs) :], strict=False)
        for p, a in itertools.chain(outputs, zip(self.inputs, args, strict=False)):
            expected = types.setdefault(p.type, a.host.dtype) if p.letter and a.is_array else p.dtype
            if a.is_array and a.host.dtype != expected:
                raise TypeError(f"Type is mismatched. {p.name} {a.host.dtype} {expected}")
        return types

    @staticmethod
    def broadcast(params, args):
        """Broadcast the arrays that are not raw, in place; returns their shape."""
        whole = [a for p, a in zip(params, args, strict=False) if a.is_array and not p.raw]
        if not whole:
            raise ValueError("Loop size is undecided.")
        shape = np.broadcast_shapes(*(a.host.shape for a in whole))
        for a in whole:
            a.host = np.broadcast_to(a.host, shape) if a.host.shape != shape else a.host
        return shape

    def allocated(self, shape, types):
        """New outputs, of NaN where there is one."""
        if any(p.raw for p in self.outputs):
            raise ValueError("Output array size is Undecided")
        dtypes = [types[p.type] if p.letter else p.dtype for p in self.outputs]
        hosts = [np.full(shape, np.nan if d.kind == "f" else 77, d) for d in dtypes]
        return [Argument(wrap(h) if wrap else h) for h in hosts]

    def run(self, args, types, body, *sizes):
        for p, a in zip(self.inputs, args, strict=False):
            if not a.is_array:
                a.host = np.asarray(a.host).astype(types[p.type] if p.letter else p.dtype)
        launches.append((self, args, types))
        self.execute(args, types, body, *sizes)

    def execute(self, args, types, body, *sizes):
        library(self.source(args, types, body))((ctypes.c_void_p * len(args))(*(a.pointer() for a in args)), *sizes)

    def source(self, args, types, body):
        lines = [PRELUDE, *(f"typedef {C_TYPES[dtype.name]} {letter};" for letter, dtype in types.items())]
        lines += [self.preamble, body[0], 'extern "C" void launch(void** _args, ptrdiff_t _n, ptrdiff_t _m) {']
        for k, (p, a) in enumerate(zip(self.params, args, strict=True)):
            const = "const " if k < len(self.inputs) else ""
            if a.is_array:
                kind, name = f"CArray<{p.c_type}>", p.name if p.raw else f"_raw_{p.name}"
            else:
                kind, name = p.c_type, p.name
            lines.append(f"{const}{kind}& {name} = *({kind}*)_args[{k}];")
        return "\n".join([*lines, *body[1:], "}"])

    def references(self, params, args, index):
        """``T &x = _raw_x[…]`` for each array that is not raw; an input cannot be written."""
        return "\n".join(
            f"{'const ' if p in self.inputs else ''}{p.c_type}& {p.name} = _raw_{p.name}[{index}];"
            for p, a in zip(params, args, strict=False)
            if a.is_array and not p.raw
        )


class ElementwiseKernel(Kernel):
    def __init__(
        self, in_params, out_params, operation, name="kernel", reduce_dims=True, preamble="", no_return=False,
        return_tuple=False, loop_prep="", after_loop="", options=(),
    ):  # fmt: skip
        super().__init__(in_params, out_params, name, preamble)
        self.operation, self.loop_prep, self.after_loop = operation, loop_prep, after_loop
        self.no_return, self.return_tuple = no_return, return_tuple

    def __call__(self, *args, size=None, stream=None, block_size=128):
        args = self.arguments(args)
        types = self.types(args)
        if size is None:
            shape = self.broadcast(self.params, args)
        elif any(a.is_array and not p.raw for p, a in zip(self.params, args, strict=False)):
            raise ValueError("Specified 'size' can be used only if all of the ndarray are 'raw'.")
        else:
            shape = (size,)
        for p, a in zip(self.outputs, args[len(self.inputs) :], strict=False):
            if not p.raw and a.given.shape != shape:
                raise ValueError("Out shape is mismatched")
        if len(args) == len(self.inputs):
            args += self.allocated(shape, types)
        if 0 not in shape:
            inside = f"_ind.set(i); {self.references(self.params, args, '_ind.get()')}\n{self.operation};\n"
            loop = f"{self.loop_prep};\nfor (ptrdiff_t i = _n - 1; i >= 0; --i) {{ {inside} }}"
            loop = f"CIndexer _ind = {{_n, 0}};\n{loop}"
            self.run(args, types, ["", loop, f"{self.after_loop};"], math.prod(shape), 0)
        results = tuple(a.given for a in args[len(self.inputs) :])
        return None if self.no_return else results if self.return_tuple or len(results) > 1 else results[0]


class ReductionKernel(Kernel):
    def __init__(
        self, in_params, out_params, map_expr, reduce_expr, post_map_expr, identity, name="reduce_kernel",
        reduce_type=None, reduce_dims=True, preamble="", options=(),
    ):  # fmt: skip
        super().__init__(in_params, out_params, name, preamble)
        self.maps, self.identity = (map_expr, reduce_expr, post_map_expr), "" if identity is None else str(identity)
        self.reduce_type = reduce_type or self.outputs[0].c_type

    def __call__(self, *args, out=None, axis=None, keepdims=False, stream=None):
        args = self.arguments([*args, out] if out is not None else args)
        types = self.types(args)
        shape = self.broadcast(self.inputs, args[: len(self.inputs)])
        axes = range(len(shape)) if axis is None else [axis] if isinstance(axis, int) else axis
        reduced = sorted(range(len(shape))[k] for k in axes)
        order = (*reduced, *(k for k in range(len(shape)) if k not in reduced))
        left = tuple(1 if k in reduced else n for k, n in enumerate(shape) if keepdims or k not in reduced)
        for p, a in zip(self.outputs, args[len(self.inputs) :], strict=False):
            if not p.raw and a.given.shape != left:
                raise ValueError("Out shape is mismatched")
        if len(args) == len(self.inputs):
            args += self.allocated(left, types)
        if math.prod(left):
            if self.identity == "" and 0 in shape:
                raise ValueError(f"zero-size array to reduction operation {self.name} which has no identity")
            if order != tuple(range(len(shape))) and any(p.raw for p in self.params):
                raise NotImplementedError("Illegal conditions")
            for p, a in zip(self.inputs, args, strict=False):
                if a.is_array and not p.raw:
                    a.host = a.host.transpose(order)
            self.run(args, types, self.body(args), math.prod(shape), math.prod(left))
        return args[len(self.inputs)].given

    def body(self, args):
        pre, merge, post = self.maps
        macros = (
            f"#define REDUCE(a, b) ({merge})\n#define POST_MAP(a) ({post})\ntypedef {self.reduce_type} _type_reduce;"
        )
        return [
            macros,
            f"""
            const int _threads = 8;
            CIndexer _in_ind = {{_n, 0}}, _out_ind = {{_m, 0}};
            for (ptrdiff_t _i = _m - 1; _i >= 0; --_i) {{
              _type_reduce _sdata[_threads];
              for (int _tid = _threads - 1; _tid >= 0; --_tid) {{
                _type_reduce _s = _type_reduce({self.identity});
                for (ptrdiff_t _j = _i + _tid * _m; _j < _n; _j += _threads * _m) {{
                  _in_ind.set(_j);
                  {self.references(self.inputs, args, "_in_ind.get()")}
                  _type_reduce _a = static_cast<_type_reduce>({pre});
                  _s = REDUCE(_s, _a);
                }}
                _sdata[_tid] = _s;
              }}
              for (int _block = _threads / 2; _block >= 1; _block /= 2)
                for (int _tid = 0; _tid < _block; ++_tid) {{
                  _type_reduce _a = _sdata[_tid], _b = _sdata[_tid + _block];
                  _sdata[_tid] = REDUCE(_a, _b);
                }}
              _type_reduce _s = _sdata[0];
              _out_ind.set(_i);
              {self.references(self.outputs, args[len(self.inputs) :], "_out_ind.get()")}
              POST_MAP(_s);
            }}
            """,
        ]


@functools.cache
def folder():
    path = tempfile.mkdtemp(prefix="kernels-")
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return Path(path)


@functools.cache
def library(source, *options):
    """The compiled ``launch(arguments, entries, results)`` of a source, once per process."""
    if COMPILER is None:
        raise RuntimeError("the kernels are compiled for the host here, and there is no g++ or c++")
    path = folder() / f"{hashlib.sha256(repr((source, options)).encode()).hexdigest()[:16]}.so"
    command = [COMPILER, "-x", "c++", "-std=c++14", "-O1", "-shared", "-fPIC", *options, "-o", str(path), "-", "-lm"]
    result = subprocess.run(command, input=source, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{result.stderr}\n{source}")
    launch = ctypes.CDLL(str(path)).launch
    launch.argtypes, launch.restype = [ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_ssize_t], None
    return launch
