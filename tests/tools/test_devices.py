"""``minilora devices`` gives one sentence with the cause and the remedy, whatever is missing; CuPy is played here."""

import contextlib
import json
import re
import sys
import tomllib
import types
from pathlib import Path

import numpy as np
import pytest

from minilora.cli import main
from minilora.tools import devices

pytestmark = pytest.mark.quick
ROOT = Path(__file__).parents[2]
CARD = {"name": b"NVIDIA L4", "totalGlobalMem": 24 * 2**30, "major": 8, "minor": 9}
OLD = RuntimeError("cudaErrorInsufficientDriver: CUDA driver version is insufficient\nand a second line")


def cupy_of(count=1, driver=13000, ones=np.ones):
    """A CuPy that finds ``count`` cards, or raises ``count``, and computes with the arrays of ``ones``."""

    def number():
        if isinstance(count, Exception):
            raise count
        return count

    cupy = types.ModuleType("cupy")
    cupy.__version__, cupy.ones, cupy.float32 = "14.2.0", ones, np.float32
    runtime = types.SimpleNamespace(
        getDeviceCount=number, runtimeGetVersion=lambda: 12090, driverGetVersion=lambda: driver,
        getDeviceProperties=lambda index: CARD, memGetInfo=lambda: (20 * 2**30, 24 * 2**30),
    )  # fmt: skip
    cupy.cuda = types.SimpleNamespace(runtime=runtime, Device=lambda index: contextlib.nullcontext())
    return cupy


def no_library(shape, dtype):
    raise ImportError("=====\nlibcublas.so.12: no such file")


NONE = {
    "no CuPy": (None, r"CuPy is not installed; .*pip install 'minilora\[gpu13\]'"),
    "no driver": (cupy_of(OLD, driver=0), "CuPy is installed, but no NVIDIA driver"),
    "an old driver": (cupy_of(OLD, driver=11040), r"\(cudaErrorInsufficientDriver.*for CUDA 12\.9.* up to 11\.4"),
    "no card": (cupy_of(0), r"no usable GPU \(no card\)"),
    "no library": (cupy_of(ones=no_library), r"libcublas.so.12: no such file.*'minilora\[gpu12\]' brings it"),
    "wrong results": (cupy_of(ones=lambda shape, dtype: np.full(shape, 2.0)), "should be 12 is 40"),
}


@pytest.mark.parametrize(("cupy", "sentence"), NONE.values(), ids=NONE)
def test_without_a_gpu_the_cause_is_one_sentence(cupy, sentence, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    assert main(["devices"]) == 0
    text = capsys.readouterr().out
    assert re.search(f"^cuda  none: .*{sentence}", text, re.MULTILINE) and "second line" not in text
    assert text.startswith(f"cpu   {devices.cpu_name()}, ") and f"NumPy {np.__version__}; BLAS: " in text
    assert main(["devices", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["cuda"]["reason"] in text


def test_a_cupy_that_cannot_be_imported(monkeypatch):
    def fail(name):
        raise ImportError("=====\nFailed to import CuPy.") from ImportError("libcudart.so.12: no such file")

    monkeypatch.setattr("minilora.placement.importlib.import_module", fail)
    assert devices.cuda()["reason"] == "CuPy is installed, but importing it fails: libcudart.so.12: no such file"


def test_two_cards(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", cupy_of(2))
    *_, first, second, versions = devices.show(devices.devices()).splitlines()
    assert first == "cuda  0: NVIDIA L4, 24.0 GiB (20.0 free), compute capability 8.9" and second.startswith(
        "cuda  1: "
    )
    assert versions == "      CuPy 14.2.0 for CUDA 12.9; the driver serves 13.0"


def test_the_page_names_the_extras_of_the_project():
    page = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for extra in ("gpu12", "gpu13"):
        package, driver = re.search(rf"^\| `{extra}` \| `(.*)` \| (\d+) or newer", page, re.MULTILINE).groups()
        assert extras[extra][0].startswith(package)
        assert re.search(rf"'minilora\[{extra}\]' for (driver )?{driver} or newer", devices.INSTALL)
