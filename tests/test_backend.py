"""NumPy and CuPy are told apart by the arrays, and a missing GPU is one clear sentence.
These tests exist because most readers have no GPU: CuPy is played by a stand-in here.
"""

import sys
import types

import numpy as np
import pytest

from minilora import ops
from minilora.backend import array_module, device_module, to_device, to_host
from minilora.engine import Tensor
from minilora.errors import InputError

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


def test_the_array_decides(cupy):
    assert array_module(np.ones(3)) is np
    assert array_module(np.ones(3), np.float32(1.0)) is np
    assert array_module(FakeArray(), FakeArray()) is cupy


def test_libraries_are_never_mixed(cupy):
    with pytest.raises(InputError, match="NumPy and CuPy arrays are mixed"):
        array_module(np.ones(3), FakeArray())


@pytest.mark.parametrize("swap", [False, True])
def test_an_operation_refuses_a_mixture(cupy, swap):
    a, b = Tensor(np.ones(3)), Tensor(FakeArray())
    with pytest.raises(InputError, match="NumPy and CuPy arrays are mixed"):
        (b + a) if swap else (a + b)
    x, W = Tensor(np.ones((2, 3))), Tensor(FakeArray(np.ones((4, 3))))
    with pytest.raises(InputError, match="NumPy and CuPy arrays are mixed"):
        ops.linear(x, W, None)


@pytest.mark.parametrize("other", [[1.0], 1.0, "text", None])
def test_what_is_no_array_is_refused_by_its_type(other):
    with pytest.raises(InputError, match=f"expected a NumPy or CuPy array, got {type(other).__name__}"):
        array_module(other)


def test_the_cpu_is_numpy():
    assert device_module("cpu") is np


def test_a_usable_gpu_is_cupy(cupy):
    assert device_module("cuda") is cupy


def test_cuda_without_cupy_names_the_extra_and_the_way_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)  # an import raises ImportError
    with pytest.raises(InputError) as caught:
        device_module("cuda")
    message = str(caught.value)
    assert "gpu12" in message and '"cpu"' in message
    assert "\n" not in message


@pytest.mark.parametrize("kind", [{"count": 0}, {"error": RuntimeError("cudaErrorInsufficientDriver")}])
def test_cuda_without_a_usable_gpu_names_the_way_out(monkeypatch, kind):
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy(**kind))
    with pytest.raises(InputError) as caught:
        device_module("cuda")
    message = str(caught.value)
    assert "GPU" in message and '"cpu"' in message
    assert str(kind.get("error", "")) in message
    assert "\n" not in message


def test_an_unknown_device_is_refused():
    with pytest.raises(InputError, match='unknown device "tpu"; use "cpu" or "cuda"'):
        device_module("tpu")


def test_moving_between_devices(cupy):
    host, there = np.arange(3.0), FakeArray()
    assert to_device(host, np) is host
    assert to_host(host) is host
    assert to_device(there, cupy) is there
    assert isinstance(to_device(host, cupy), FakeArray)
    assert to_host(there) is there.host
