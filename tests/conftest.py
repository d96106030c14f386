"""One BLAS thread for all tests: their matrices are small, and on a busy machine two can be ten times slower.

And the second lane, ``--device standin``: the library computes on arrays that behave like CuPy's (standin_cupy/).
"""

import os
import sys
from pathlib import Path

import pytest

for library in ("OPENBLAS", "OMP", "MKL"):  # read when NumPy is first imported, which is after these lines
    os.environ.setdefault(f"{library}_NUM_THREADS", "1")


def pytest_addoption(parser):
    help = "cpu: NumPy. standin: a stand-in for CuPy, as strict as CuPy, on a machine without a GPU"
    parser.addoption("--device", choices=["cpu", "standin"], default="cpu", help=help)
    help = "how often tests/lab/test_resume.py kills a training process"
    parser.addoption("--kills", type=int, default=10, metavar="N", help=help)
    help = "tests/files/test_hostile.py: every hostile file on every loader, every cut and flip, and more by chance"
    parser.addoption("--nightly", action="store_true", help=help)


def standin_lane(config):
    """The lane's module, where this run is in the lane."""
    if config.getoption("--device") != "standin":
        return None
    from standin_cupy import lane

    return lane


def pytest_configure(config):
    sys.path.insert(0, str(Path(__file__).parent))
    if lane := standin_lane(config):
        lane.install()


def pytest_ignore_collect(collection_path, config):
    """Under ``-m quick``, leave out files without such a test: to collect thousands of others takes seconds."""
    if config.option.markexpr == "quick" and collection_path.suffix == ".py":
        return "mark.quick" not in collection_path.read_text(encoding="utf-8") or None


def pytest_collection_modifyitems(config, items):
    """In the lane, leave out what is about the host alone: each such test has a line that says why."""
    if not standin_lane(config):
        return
    from standin_cupy.host import reason, stale

    whole = not any("::" in arg for arg in config.args)
    if whole and (entries := stale(items)):
        raise pytest.UsageError(f"standin_cupy/host.py names tests that are not there: {', '.join(entries)}")
    for item in items:
        if why := reason(item):
            item.add_marker(pytest.mark.host(why))
    host = [item for item in items if item.get_closest_marker("host")]
    config.hook.pytest_deselected(items=host)
    items[:] = [item for item in items if not item.get_closest_marker("host")]
    config.stash[HOST] = host


HOST = pytest.StashKey[list]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    if not (lane := standin_lane(item.config)):
        return (yield)
    lane.begin(item.path)
    try:
        return (yield)
    finally:
        lane.end()


def pytest_sessionfinish(session):
    """A test file that should have used the device and did not is a hole in the lane."""
    config = session.config
    whole = not config.option.keyword and not any("::" in arg for arg in config.args)
    if (lane := standin_lane(config)) and whole and lane.idle_files() and session.exitstatus == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config):
    if not (lane := standin_lane(config)):
        return
    write = terminalreporter.write_line
    write(f"device standin: {sum(lane.used.values()):,} operations of the library on device arrays")
    for file in lane.idle_files():
        write(f"  none in {file}: mark its tests as host, or let them use the device")
    reasons = {}
    for item in config.stash.get(HOST, []):
        reason = item.get_closest_marker("host").args[0]
        reasons.setdefault((item.path.name, reason), []).append(item)
    write(f"on the host alone: {sum(map(len, reasons.values()))} tests")
    for (file, reason), items in sorted(reasons.items()):
        write(f"  {len(items):>4}  {file}: {reason}")
