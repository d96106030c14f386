"""ElementwiseKernel and ReductionKernel without a GPU: their CUDA source, compiled as C++ for the host.

A GPU runs entries in any order and in many threads. So entries go from the last to the first here, and a row is shared
among eight threads, some of which may have no entry.
"""

import ctypes
import functools
import hashlib
import math
import shutil
import subprocess
import tempfile
import types
from pathlib import Path

import numpy as np

from . import launches, ndarray, unsupported

COMPILER = shutil.which("g++") or shutil.which("c++")
C_TYPES = {"bool": "bool", "int32": "int", "int64": "long long", "float32": "float", "float64": "double"}
PRELUDE = """#include <cmath>
#include <cstddef>
#define __device__
using std::exp; using std::log; using std::tanh; using std::sqrt;
"""
SOURCE = """namespace {name} {{
{letters}
{preamble}
extern "C" void {name}(void** _args, ptrdiff_t _rows, ptrdiff_t _n) {{
  {once}
  {body}
}}}}
"""
ELEMENTWISE = """
for (ptrdiff_t i = _n - 1; i >= 0; --i) {{
  {entries}
  {results}
  {operation};
}}"""
REDUCTION = """
for (ptrdiff_t _row = _rows - 1; _row >= 0; --_row) {{
  {type} _part[8];
  for (ptrdiff_t _thread = 7; _thread >= 0; --_thread) {{
    _part[_thread] = {type}({identity});
    for (ptrdiff_t _k = _thread; _k < _n; _k += 8) {{
      ptrdiff_t i = _row * _n + _k;
      {entries}
      {type} a = _part[_thread], b = {map};
      _part[_thread] = {reduce};
    }}
  }}
  for (int _half = 4; _half; _half /= 2)
    for (int _thread = 0; _thread < _half; ++_thread) {{
      {type} a = _part[_thread], b = _part[_thread + _half];
      _part[_thread] = {reduce};
    }}
  ptrdiff_t i = _row;
  {results}
  {type} a = _part[0];
  {post};
}}"""
# The parameters for which fused.py hands over numbers; all others are arrays.
NUMBERS = ["eps", "width", "keys", "first", "scale", "beta1", "rest1", "beta2", "rest2", "rate", "correction"]
compiled = {}  # the functions by name, which is a hash of the source


class Kernel:
    """``in_params`` and ``out_params`` are texts such as "T x, raw I y": one letter is a template's type.

    ``body``: a C++ template, which ``parts`` fill in.
    """

    def __init__(self, in_params, out_params, name, preamble, body, **parts):
        inputs, outputs = ([p.split() for p in text.split(",")] for text in (in_params, out_params))
        self.inputs, self.params, self.name = len(inputs), inputs + outputs, name
        self.preamble, self.body, self.parts = preamble, body, parts
        self.functions = {}  # compiled, by which parameters are numbers and by dtypes

    def take(self, args):
        """(host arrays and numbers, the dtype's name of each letter) of a launch, refused as CuPy refuses them."""
        if len(args) != len(self.params):
            raise TypeError(f"Wrong number of arguments for {self.name!r}")
        letters = {}
        for (*_, kind, _), a in zip(self.params, args, strict=True):
            if not isinstance(a, ndarray | bool | int | float | np.number | np.bool_):
                raise unsupported(a)
            if isinstance(a, ndarray):
                expected = letters.setdefault(kind, a.dtype.name) if len(kind) == 1 else kind
                if expected != a.dtype.name:
                    raise TypeError(f"Type is mismatched: {kind} is {expected}, the array is {a.dtype}")
        if not all(isinstance(a, ndarray) for a in args[self.inputs :]):
            raise TypeError("Output arguments type must be cupy.ndarray")
        return [getattr(a, "_host", a) for a in args], letters

    def launch(self, hosts, letters, shape, left, rows, n):
        """Run the kernel with inputs of ``shape``; outputs have the shape ``left`` and are written in place."""
        launches.append(self.name)
        ready, numbers = [], []
        for k, ((*raw, kind, _), host) in enumerate(zip(self.params, hosts, strict=True)):
            if k >= self.inputs and not raw and host.shape != left:
                raise ValueError("Out shape is mismatched")
            array = np.asarray(host, letters.get(kind, kind))
            if not isinstance(host, np.ndarray):
                numbers.append(k)
            elif not raw and k < self.inputs:
                array = np.broadcast_to(array, shape)
            ready.append(np.ascontiguousarray(array))
        if rows and n:
            key = *numbers, *letters.values()
            if key not in self.functions:
                build_the_library_s()
                name, text = self.source(numbers, **letters)
                build({name: text})
                self.functions[key] = compiled[name]
            self.functions[key]((ctypes.c_void_p * len(ready))(*(a.ctypes.data for a in ready)), rows, n)
        for host, array in zip(hosts[self.inputs :], ready[self.inputs :], strict=True):
            if array is not host:
                host[...] = array

    def source(self, numbers=None, **letters):
        """(name, text) of the C++ function for these dtypes of the letters, in its own namespace.

        ``numbers``: the indices of the parameters that are numbers and not arrays; by their names, if not given.
        """
        if numbers is None:
            numbers = [k for k, (*_, name) in enumerate(self.params) if name in NUMBERS]
        once, entries, results = [], [], []
        for k, (*raw, kind, name) in enumerate(self.params):
            kind = "const " * (k < self.inputs) + C_TYPES.get(kind, kind)
            if raw:
                once.append(f"{kind}* {name} = ({kind}*)_args[{k}];")
            elif k in numbers:
                once.append(f"{kind}& {name} = *({kind}*)_args[{k}];")
            else:
                (entries if k < self.inputs else results).append(f"{kind}& {name} = (({kind}*)_args[{k}])[i];")
        parts = self.parts | {"entries": "\n".join(entries), "results": "\n".join(results)}
        used = {kind for *_, kind, _ in self.params}
        parts = {
            "letters": "".join(f"typedef {C_TYPES[dtype]} {kind};" for kind, dtype in letters.items() if kind in used),
            "preamble": self.preamble,
            "once": "\n".join(once),
            "body": self.body.format(**parts),
        }
        name = "k" + hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
        return name, SOURCE.format(name=name, **parts)


class ElementwiseKernel(Kernel):
    def __init__(self, in_params, out_params, operation, name="kernel"):
        super().__init__(in_params, out_params, name, "", ELEMENTWISE, operation=operation)

    def __call__(self, *args):
        hosts, letters = self.take(args)
        shape = np.broadcast_shapes(*(np.shape(h) for h, p in zip(hosts, self.params, strict=True) if "raw" not in p))
        self.launch(hosts, letters, shape, shape, 1, math.prod(shape))


class ReductionKernel(Kernel):
    def __init__(
        self, in_params, out_params, map_expr, reduce_expr, post_map_expr, identity, name, reduce_type, preamble="",
    ):  # fmt: skip
        parts = {"map": map_expr, "reduce": reduce_expr, "post": post_map_expr, "identity": identity}
        super().__init__(in_params, out_params, name, preamble, REDUCTION, **parts, type=reduce_type)

    def __call__(self, *args, axis, keepdims=False):
        hosts, letters = self.take(args)
        shape = np.broadcast_shapes(*map(np.shape, hosts[: self.inputs]))
        if axis != len(shape) - 1:
            raise NotImplementedError("the stand-in reduces the last axis only")
        left = shape[:-1] + (1,) * keepdims
        self.launch(hosts, letters, shape, left, math.prod(left), shape[-1])


@functools.cache
def folder():
    return tempfile.TemporaryDirectory(prefix="kernels-")


@functools.cache
def build_the_library_s():
    """Compile the kernels of minilora/fast/fused.py in both dtypes, in one call of the compiler."""
    from minilora.fast import fused

    xp = types.SimpleNamespace(ElementwiseKernel=ElementwiseKernel, ReductionKernel=ReductionKernel)
    all_of_them = [fused.kernel.__wrapped__(xp, name) for name in [*fused.ELEMENTWISE, *fused.REDUCTION]]
    build(dict(kernel.source(T=dtype, I="int64") for kernel in all_of_them for dtype in ("float32", "float64")))


def build(sources: dict):
    """Compile the functions {name: text} that are not compiled yet, in one call of the compiler."""
    sources = {name: text for name, text in sources.items() if name not in compiled}
    if not sources:
        return
    if COMPILER is None:
        raise RuntimeError("the kernels are compiled for the host here, and there is no g++ or c++")
    path = Path(folder().name) / f"{len(compiled)}.so"
    command = [COMPILER, "-x", "c++", "-std=c++14", "-shared", "-fPIC", "-o", str(path), "-", "-lm"]
    done = subprocess.run(command, input=PRELUDE + "".join(sources.values()), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    library = ctypes.CDLL(str(path))
    for name in sources:
        launch = compiled[name] = getattr(library, name)
        launch.argtypes, launch.restype = [ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_ssize_t], None
