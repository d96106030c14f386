"""The gpu lane, ``pytest -m gpu``: everything is computed twice, by NumPy and by CuPy, and must agree.

Without CuPy or a card the lane is one skipped test, which gives the reason in the words of ``minilora devices``. With
MINILORA_GPU=standin the lane's own code is tried on the stand-in for CuPy.
"""

import os
import sys
import warnings

import pytest

from minilora.backend import device_module
from minilora.errors import InputError
from minilora.tools import devices

STANDIN = os.environ.get("MINILORA_GPU") == "standin"


def pytest_collection_modifyitems(config, items):
    own = [item for item in items if item.get_closest_marker("gpu")]
    for item in own:  # CuPy warns of parts of CUDA that it does not find; that is no error while it computes
        item.add_marker(pytest.mark.filterwarnings("default"))
    if STANDIN:
        return
    try:
        with warnings.catch_warnings(action="ignore"):
            device_module("cuda")
    except InputError:
        for item in own[:1]:
            item.add_marker(pytest.mark.skip(f"{len(own)} tests need a GPU: {devices.cuda()['reason']}"))
        config.hook.pytest_deselected(items=own[1:])
        items[:] = [item for item in items if item not in own[1:]]


@pytest.fixture(scope="session")
def cupy():
    """CuPy, with a device that it can use."""
    if not STANDIN:
        yield device_module("cuda")
        return
    import standin_cupy

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "cupy", standin_cupy.module())
        yield sys.modules["cupy"]


@pytest.fixture
def pool(cupy):
    """CuPy's memory pool, which the stand-in does not have."""
    if STANDIN:
        pytest.skip("the stand-in for CuPy has no memory pool")
    return cupy.get_default_memory_pool()
