"""NumPy and CuPy are told apart by the arrays, and a missing GPU is one clear sentence.
These tests exist because most readers have no GPU: CuPy is played by a stand-in here.
"""

import sys
import types

import numpy as np
import pytest

from minilora import ops
from minilora.backend import array_module, to_device, to_host
from minilora.engine import Tensor
from minilora.errors import InputError
from minilora.placement import device_module

pytestmark = pytest.mark.quick


class FakeArray:
    """An array that says it is CuPy's."""

    __module__ = "cupy"

    def __init__(self, host=None):
        self.host = np.ones(3) if host is None else host
        self.shape, self.dtype, self.ndim = self.host.shape, self.host.dtype, self.host.ndim


def fake_cupy(count=1, error=None):
    def device_count():
        if error:
            raise error
        return count

    cupy = types.ModuleType("cupy")
    cupy.cuda = types.SimpleNamespace(runtime=types.SimpleNamespace(getDeviceCount=device_count))
    cupy.asarray, cupy.asnumpy = FakeArray, lambda array: array.host
    return cupy


@pytest.fixture
def cupy(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy())
    return sys.modules["cupy"]


def test_the_array_decides_and_libraries_are_never_mixed(cupy):
    assert array_module(np.ones(3), np.float32(1.0)) is np
    assert array_module(FakeArray(), FakeArray()) is cupy
    a, b = Tensor(np.ones((2, 3))), Tensor(FakeArray(np.ones((4, 3))))
    for mixed in (lambda: a + b, lambda: b + a, lambda: ops.linear(a, b, None)):
        with pytest.raises(InputError, match="NumPy and CuPy arrays are mixed"):
            mixed()


def test_the_device_is_chosen_by_name(cupy):
    assert device_module("cpu") is np and device_module("cuda") is cupy
    with pytest.raises(InputError, match='unknown device "tpu"; use "cpu" or "cuda"'):
        device_module("tpu")


UNUSABLE = {  # None: an import raises ImportError
    "gpu12": None,
    "GPU": fake_cupy(count=0),
    "cudaErrorInsufficientDriver": fake_cupy(error=RuntimeError("cudaErrorInsufficientDriver")),
}


@pytest.mark.parametrize("cause", UNUSABLE)
def test_cuda_without_cupy_or_gpu_names_the_cause_and_the_way_out(monkeypatch, cause):
    monkeypatch.setitem(sys.modules, "cupy", UNUSABLE[cause])
    with pytest.raises(InputError) as caught:
        device_module("cuda")
    message = str(caught.value)
    assert cause in message and '"cpu"' in message and "\n" not in message


def test_moving_between_devices(cupy):
    host, there = np.arange(3.0), FakeArray()
    assert to_device(host, np) is host
    assert to_host(host) is host
    assert to_device(there, cupy) is there
    assert isinstance(to_device(host, cupy), FakeArray)
    assert to_host(there) is there.host
