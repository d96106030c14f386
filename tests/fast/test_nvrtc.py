"""Each fused kernel, as CuPy translates it, is compiled by NVRTC for a GPU, which needs no GPU.

CuPy writes a translation unit for each dtype and layout that a kernel is called with. The functions that do so ask for
no device, but they are private, so the extra ``kernels`` pins CuPy's version.
"""

import importlib
import importlib.metadata

import numpy as np
import pytest
from standin_cupy.kernels import NUMBERS

from minilora.fast import fused

pytestmark = pytest.mark.nvrtc
ARCHITECTURE = 80  # compute capability 8.0
TYPES = {"bool": np.dtype(bool), "int64": np.dtype(np.int64), "I": np.dtype(np.int64)}  # T is each test's


@pytest.fixture(scope="module")
def cupy():
    """The real CuPy. If it is installed and does not work, that is an error and no reason to skip."""
    if not {"cupy-cuda12x", "nvidia-cuda-nvrtc-cu12"} <= {d.name for d in importlib.metadata.distributions()}:
        pytest.skip("CuPy and NVRTC are not installed: pip install 'minilora[kernels]'")
    return importlib.import_module("cupy")


def unit(cupy, name, dtype, change=("", "")):
    """CuPy's translation unit of the kernel ``name``: arrays of three axes, and numbers where fused.py has them."""
    from cupy._core import _carray, _kernel, _reduction, _scalar

    types = TYPES | {"T": np.dtype(dtype)}
    definition = [part.replace(*change) for part in fused.ELEMENTWISE.get(name) or fused.REDUCTION[name]]
    params = [p.split() for p in f"{definition[0]}, {definition[1]}".split(",")]
    array, indexer, scalar = (1, cupy.ndarray), (2, _carray.Indexer), (3, _scalar.CScalar)  # _ArgKind of _kernel.pxd
    infos = [
        _kernel._ArgInfo(*scalar, types[kind], 0, True, True)
        if word in NUMBERS
        else _kernel._ArgInfo(*array, types[kind], 3, False, True)
        for *_, kind, word in params
    ]
    infos.append(_kernel._ArgInfo(*indexer, None, 3, True, True))
    letters = tuple((letter, types[letter].type) for letter in "IT" if any(letter in p for p in params))
    if name in fused.ELEMENTWISE:
        kernel = cupy.ElementwiseKernel(*definition, name)
        return _kernel._get_elementwise_kernel_code(
            tuple(infos), _kernel._TypeMap(letters), kernel.params, kernel.operation, name, kernel.preamble
        )
    *maps, reduce_type, preamble = definition
    kernel = cupy.ReductionKernel(*maps, name, reduce_type, preamble=preamble)
    infos += [infos[-1], _kernel._ArgInfo(*scalar, np.dtype(np.int32), 0, True, True)]
    return _reduction._ReductionKernel_get_cached_function_code(
        kernel.nin, kernel.nout, kernel._params, tuple(infos), _kernel._TypeMap((*letters, ("IndexT", np.int32))), name,
        512, reduce_type, kernel.identity, kernel.map_expr, kernel.reduce_expr, kernel.post_map_expr, preamble, (),
    )  # fmt: skip


def assembly(code):
    """The PTX of a translation unit, as bytes; raises CuPy's CompileException."""
    from cupy._core import core
    from cupy.cuda import compiler

    headers = "".join(f"#include <{name}>\n" for name in core._cupy_header_list)
    options = core.assemble_cupy_compiler_options(())
    program = compiler._NVRTCProgram(headers + code, "kernel.cu", (), (), method="ptx")
    return program.compile((*options, f"-arch=compute_{ARCHITECTURE}", "--device-as-default-execution-space"))[0]


@pytest.mark.parametrize("name", [*fused.ELEMENTWISE, *fused.REDUCTION])
def test_a_kernel_compiles_and_computes_in_its_own_dtype_alone(cupy, name):
    """A constant such as 0.5 without T(0.5) would make float32 compute in float64, many times slower on most cards."""
    for dtype in (np.float32, np.float64):
        lines = assembly(unit(cupy, name, dtype)).split(b"\n")
        wide = any(b".f64" in line for line in lines if not line.startswith(b".global"))  # a header's constants
        assert wide == (dtype == np.float64 and name != "later")


def test_a_broken_kernel_does_not_compile(cupy):
    from cupy.cuda.compiler import CompileException

    for name, change in {"gelu": ("half =", "hlf ="), "softmax_all": ("T top, total;", "T top;")}.items():
        with pytest.raises(CompileException, match=r"undefined|no member"):
            assembly(unit(cupy, name, np.float32, change))
