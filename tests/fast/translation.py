"""What the real CuPy hands to NVRTC for a launch that the stand-in recorded, what NVRTC makes of it, and what it
computes when the host's compiler takes it instead. None of it needs a GPU.

CuPy writes a translation unit for each dtype and layout that a kernel is called with. The functions that do so ask for
no device, but they are CuPy's own business, so the extra ``kernels`` pins the version.
"""

import ctypes
import functools
import importlib.metadata
import re
import sys
from types import SimpleNamespace

import numpy as np
from standin_cupy import kernels as emulation

ARRAY, INDEXER, SCALAR = 1, 2, 3  # _ArgKind of cupy/_core/_kernel.pxd


@functools.cache
def real():
    """The real CuPy's modules, whatever stands in its place."""
    placed = sys.modules.pop("cupy", None)
    try:
        import cupy
        from cupy._core import _carray, _kernel, _reduction, _scalar, core
        from cupy.cuda import compiler
        from cupy_backends.cuda.libs import nvrtc

        version = nvrtc.getVersion()
    finally:
        if placed is not None:
            sys.modules["cupy"] = placed
    modules = cupy, _carray, _kernel, _reduction, _scalar, core, compiler
    return SimpleNamespace(**{m.__name__.rpartition(".")[2]: m for m in modules}, version=version)


def missing():
    """What is not installed, or None. What is installed and does not work is an error, never a reason to skip."""
    wanted = [("cupy-cuda12x", "nvidia-cuda-nvrtc-cu12"), ("cupy-cuda13x", "nvidia-cuda-nvrtc")]
    installed = {d.name for d in importlib.metadata.distributions()}
    return None if any(installed.issuperset(pair) for pair in wanted) else f"no {' with '.join(wanted[0])}"


def is_reduction(kernel):
    return hasattr(kernel, "reduce_type")


def layout(kernel, args):
    """Each argument of the translated kernel: an array and its shape, or a number, or the shape of an index."""
    whole = [a.host for p, a in zip(kernel.params, args, strict=True) if a.is_array and not p.raw]
    if is_reduction(kernel):
        shapes, flat = [whole[0].shape, args[len(kernel.inputs)].host.shape], False
    else:  # CuPy sees arrays that are all contiguous as vectors
        flat = all(h.flags.c_contiguous for h in whole)
        shapes = [(whole[0].size,) if flat else whole[0].shape]
    views = [
        SimpleNamespace(
            kind=ARRAY if a.is_array else SCALAR, host=a.host.reshape(-1) if flat and a.host.ndim else a.host
        )
        for a in args
    ]
    return views + [SimpleNamespace(kind=INDEXER, shape=shape) for shape in shapes]


def unit(launch, block=512):
    """CuPy's translation unit of one of standin_cupy.kernels.launches, for ``block`` threads of a reduction."""
    (kernel, args, types), it = launch, real()
    arguments, options = kernel.made_with
    made = (it.cupy.ReductionKernel if is_reduction(kernel) else it.cupy.ElementwiseKernel)(*arguments, **options)

    def info(view):
        if view.kind == INDEXER:
            return it._kernel._ArgInfo(INDEXER, it._carray.Indexer, None, len(view.shape), True, True)
        if view.kind == SCALAR:
            return it._kernel._ArgInfo(SCALAR, it._scalar.CScalar, view.host.dtype, 0, True, True)
        contiguous = view.host.flags.c_contiguous
        return it._kernel._ArgInfo(ARRAY, it.cupy.ndarray, view.host.dtype, view.host.ndim, contiguous, True)

    infos = tuple(map(info, layout(kernel, args)))
    pairs = tuple(sorted((letter, dtype.type) for letter, dtype in types.items()))
    if not is_reduction(kernel):
        return it._kernel._get_elementwise_kernel_code(
            infos, it._kernel._TypeMap(pairs), made.params, made.operation, made.name, made.preamble
        )
    stride = it._kernel._ArgInfo(SCALAR, it._scalar.CScalar, np.dtype(np.int32), 0, True, True)
    return it._reduction._ReductionKernel_get_cached_function_code(
        made.nin, made.nout, made._params, (*infos, stride), it._kernel._TypeMap((*pairs, ("IndexT", np.int32))),
        made.name, block, made.reduce_type, made.identity, made.map_expr, made.reduce_expr, made.post_map_expr,
        made.preamble, made.options,
    )  # fmt: skip


def compiled(code, architecture, method="cubin"):
    """The machine code (``cubin``) or the assembly (``ptx``) of a unit; raises CuPy's CompileException."""
    it = real()
    headers = "".join(f"#include <{name}>\n" for name in it.core._cupy_header_list)
    program = it.compiler._NVRTCProgram(headers + code, "kernel.cu", (), (), method=method)
    kind = "sm" if method == "cubin" else "compute"
    options = it.core.assemble_cupy_compiler_options(())
    return program.compile((*options, f"-arch={kind}_{architecture}", "--device-as-default-execution-space"))[0]


THREADS, STRIDE = 8, 2  # of one block, and how many results of a reduction it works on at a time
HOST = f"""
#include <cmath>
#include <cstring>
#include <cassert>
#include <cstddef>
#include <pthread.h>
using std::exp; using std::log; using std::tanh; using std::sqrt;
#define __device__
#define __host__
#define __global__
#define __shared__ static
#define __forceinline__ inline
#define __syncthreads() pthread_barrier_wait(&_together)
static int __popc(unsigned int x) {{ return __builtin_popcount(x); }}
static int __popcll(unsigned long long x) {{ return __builtin_popcountll(x); }}
static pthread_barrier_t _together;
struct _Place {{ unsigned int x; }};
static thread_local _Place threadIdx;
static const _Place blockIdx = {{0}}, blockDim = {{ {THREADS} }}, gridDim = {{1}};
#include <cupy/carray.cuh>
"""
ENTRY = f"""
static void** _args;
static void* _thread(void* k) {{
  threadIdx.x = (size_t)k;
  %s;
  return 0;
}}
extern "C" void launch(void** args, ptrdiff_t, ptrdiff_t) {{
  pthread_t threads[{THREADS}];
  _args = args;
  pthread_barrier_init(&_together, 0, {THREADS});
  for (size_t k = 0; k < {THREADS}; ++k) pthread_create(&threads[k], 0, _thread, (void*)k);
  for (size_t k = 0; k < {THREADS}; ++k) pthread_join(threads[k], 0);
  pthread_barrier_destroy(&_together);
}}
"""


def run_on_host(kernel, args, types):
    """One launch, as CuPy translates it, with CuPy's own classes of arrays and indices, by the host's compiler and in
    real threads that wait for each other.
    """
    code = unit((kernel, args, types), THREADS)
    declared = re.search(rf"\b{kernel.name}\((.*)\) {{", code)[1]
    parameters = re.sub(r", (?=const C|C|const \w)", "\n", declared).split("\n")
    parameters = [p.removeprefix("const ").rpartition(" ")[0] for p in parameters]
    values = ", ".join(f"*({c_type}*)_args[{k}]" for k, c_type in enumerate(parameters))
    source = HOST + code + ENTRY % f"{kernel.name}({values})"
    memory = []
    for view in layout(kernel, args):
        if view.kind == ARRAY:
            h = view.host
            memory.append(np.array([h.ctypes.data, h.size, *h.shape, *h.strides], np.intp))
        elif view.kind == SCALAR:
            memory.append(np.array(view.host))
        else:
            memory.append(np.array([np.prod(view.shape, dtype=int), *view.shape, *(0 for _ in view.shape)], np.intp))
    memory += [np.array(STRIDE, np.int32)] if is_reduction(kernel) else []
    assert len(memory) == len(parameters)
    pointers = (ctypes.c_void_p * len(memory))(*(m.ctypes.data for m in memory))
    headers = real().core._get_header_dir_path()
    emulation.library(source, f"-I{headers}", "-std=c++17", "-fpermissive", "-w", "-pthread")(pointers, 0, 0)
