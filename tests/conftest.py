"""One BLAS thread for all tests: their matrices are small, and on a busy machine two can be ten times slower.

And the second lane, ``--device standin``: the library computes on arrays that behave like CuPy's (standin_cupy/).
"""

import os
import sys
from pathlib import Path

for library in ("OPENBLAS", "OMP", "MKL"):  # read when NumPy is first imported, which is after these lines
    os.environ.setdefault(f"{library}_NUM_THREADS", "1")


def pytest_addoption(parser):
    help = "cpu: NumPy. standin: a stand-in for CuPy, as strict as CuPy, on a machine without a GPU"
    parser.addoption("--device", choices=["cpu", "standin"], default="cpu", help=help)
    help = "how often tests/lab/test_resume.py kills a training process"
    parser.addoption("--kills", type=int, default=10, metavar="N", help=help)
    help = "tests/files/test_hostile.py: every hostile file on every loader, every cut and flip, and more by chance"
    parser.addoption("--nightly", action="store_true", help=help)


def pytest_configure(config):
    sys.path.insert(0, str(Path(__file__).parent))
    if config.getoption("--device") == "standin":
        from standin_cupy import lane

        lane.install()
        config.pluginmanager.register(lane)


def pytest_ignore_collect(collection_path, config):
    """Under ``-m quick``, leave out files without such a test: to collect thousands of others takes seconds."""
    if config.option.markexpr == "quick" and collection_path.suffix == ".py":
        return "mark.quick" not in collection_path.read_text(encoding="utf-8") or None
