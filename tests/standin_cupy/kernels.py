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
ELEMENTWISE = """
for (ptrdiff_t i = _n - 1; i >= 0; --i) {{
  {entries}
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
compiled = {}  # the functions by name, which is a hash of the source
signatures = set()  # (kernel's name, dtypes by letter, numbers by index) of what was launched


class Kernel:
    """``in_params`` and ``out_params`` are texts such as "T x, raw I y": one letter is a template's type."""

    preamble = ""

    def __init__(self, in_params, out_params, name):
        inputs, outputs = ([p.split() for p in text.split(",")] for text in (in_params, out_params))
        self.inputs, self.params, self.name, self.sources = len(inputs), inputs + outputs, name, {}

    def take(self, args):
        """(host arrays and numbers, the dtype of each letter) of a launch, refused as CuPy refuses them."""
        if len(args) != len(self.params):
            raise TypeError(f"Wrong number of arguments for {self.name!r}")
        types = {}
        for (*_, kind, _), a in zip(self.params, args, strict=True):
            if not isinstance(a, ndarray | bool | int | float | np.number | np.bool_):
                raise unsupported(a)
            if isinstance(a, ndarray):
                expected = types.setdefault(kind, a.dtype if len(kind) == 1 else np.dtype(kind))
                if expected != a.dtype:
                    raise TypeError(f"Type is mismatched: {kind} is {expected}, the array is {a.dtype}")
        if not all(isinstance(a, ndarray) for a in args[self.inputs :]):
            raise TypeError("Output arguments type must be cupy.ndarray")
        return [getattr(a, "_host", a) for a in args], {k: v.name for k, v in types.items() if len(k) == 1}

    def launch(self, hosts, types, shape, left, rows, n):
        """Run the kernel with inputs of ``shape``; outputs have the shape ``left`` and are written in place."""
        scalars = [k for k, h in enumerate(hosts) if not isinstance(h, np.ndarray)]
        ready = []
        for k, ((*raw, kind, _), host) in enumerate(zip(self.params, hosts, strict=True)):
            if k >= self.inputs and not raw and host.shape != left:
                raise ValueError("Out shape is mismatched")
            array = np.asarray(host, types.get(kind, kind))
            whole = raw or k in scalars or k >= self.inputs
            ready.append(np.ascontiguousarray(array if whole else np.broadcast_to(array, shape)))
        signature = tuple(types.items()), tuple(scalars)
        signatures.add((self.name, *signature))
        launches.append(self.name)
        if rows and n:
            if signature not in self.sources:
                self.sources[signature] = self.source(*signature)
                build(dict([self.sources[signature]]))
            name, _ = self.sources[signature]
            compiled[name]((ctypes.c_void_p * len(ready))(*(a.ctypes.data for a in ready)), rows, n)
        for host, array in zip(hosts[self.inputs :], ready[self.inputs :], strict=True):
            if array is not host:
                host[...] = array

    def source(self, types, scalars):
        """(name, text) of the C++ function for these dtypes by letter and numbers by index, in its own namespace."""
        once, entries, results = [], [], []
        for k, (*raw, kind, name) in enumerate(self.params):
            const, kind = "const " if k < self.inputs else "", C_TYPES.get(kind, kind)
            array = f"(({const}{kind}*)_args[{k}])"
            if raw:
                once.append(f"{const}{kind}* {name} = {array};")
            elif k in scalars:
                once.append(f"{const}{kind}& {name} = *{array};")
            else:
                (entries if k < self.inputs else results).append(f"{const}{kind}& {name} = {array}[i];")
        letters = [f"typedef {C_TYPES[dtype]} {letter};" for letter, dtype in types]
        body = "\n".join([*once, self.body("\n".join(entries), "\n".join(results))])
        name = "k" + hashlib.sha256(repr((letters, self.preamble, body)).encode()).hexdigest()[:16]
        head = f'extern "C" void {name}(void** _args, ptrdiff_t _rows, ptrdiff_t _n) {{'
        return name, "\n".join([f"namespace {name} {{", *letters, self.preamble, head, body, "}}\n"])


class ElementwiseKernel(Kernel):
    def __init__(self, in_params, out_params, operation, name="kernel"):
        super().__init__(in_params, out_params, name)
        self.operation = operation

    def body(self, entries, results):
        return ELEMENTWISE.format(entries=entries + results, operation=self.operation)

    def __call__(self, *args):
        hosts, types = self.take(args)
        shape = np.broadcast_shapes(*(np.shape(h) for h, p in zip(hosts, self.params, strict=True) if "raw" not in p))
        self.launch(hosts, types, shape, shape, 1, math.prod(shape))


class ReductionKernel(Kernel):
    def __init__(
        self, in_params, out_params, map_expr, reduce_expr, post_map_expr, identity, name="reduce_kernel",
        reduce_type=None, preamble="",
    ):  # fmt: skip
        super().__init__(in_params, out_params, name)
        self.parts = {"map": map_expr, "reduce": reduce_expr, "post": post_map_expr, "identity": identity}
        self.parts["type"], self.preamble = reduce_type or self.params[-1][-2], preamble

    def body(self, entries, results):
        return REDUCTION.format(**self.parts, entries=entries, results=results)

    def __call__(self, *args, axis, keepdims=False):
        hosts, types = self.take(args)
        shape = np.broadcast_shapes(*map(np.shape, hosts[: self.inputs]))
        if axis != len(shape) - 1:
            raise NotImplementedError("the stand-in reduces the last axis only")
        left = shape[:-1] + (1,) * keepdims
        self.launch(hosts, types, shape, left, math.prod(left), shape[-1])


@functools.cache
def folder():
    return tempfile.TemporaryDirectory(prefix="kernels-")


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
