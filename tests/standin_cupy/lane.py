"""``pytest --device standin``: the library computes on the stand-in, where whatever a test gives to it is moved.

The tests are written with NumPy and stay so: a moved array is on the same memory, and a test reads a result as if it
were NumPy's.
"""

import functools
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from minilora.engine import Operation, Tensor

from . import LIBRARY, belongs_to_library, device, launches, module

FILES = (  # what runs in the lane: the tests of everything that computes with arrays
    "test_engine.py", "test_elementary.py", "test_ops.py", "test_gpt.py", "test_methods.py", "test_contract.py",
    "test_surgery.py", "test_bank.py", "test_loop.py", "test_optim.py", "test_checkpoint.py", "test_gradcheck.py",
)  # fmt: skip
HOST = (  # of these files, the tests that are about the host alone
    "test_kept_bytes_are_what_the_allocator_says",
    "test_a_registered_form_runs_by_default_and_not_within_plain_nor_on_complex_arrays",
)
# The library's files that make Tensors of a test's, or new, numbers.
BUILDERS = {str(LIBRARY / name) for name in ("nn.py", "gpt.py", "elementary.py", "tools/trial.py")}

used = Counter()  # the computations that the library asked for, by test file


def pytest_ignore_collect(collection_path):
    return (collection_path.suffix == ".py" and collection_path.name not in FILES) or None


def pytest_collection_modifyitems(config, items):
    """Leave out what is about the host alone."""
    host = [item for item in items if getattr(item, "originalname", item.name) in HOST]
    config.hook.pytest_deselected(items=host)
    items[:] = [item for item in items if item not in host]


def pytest_runtest_logfinish(location):
    used[Path(location[0]).name] += len(launches)
    launches.clear()


def pytest_sessionfinish(session):
    """A file whose tests compute nothing on the device, or that is not there, is a hole in the lane."""
    whole = session.config.args_source is session.config.ArgsSource.TESTPATHS and not session.config.option.keyword
    idle = [file for file in (FILES if whole else list(used)) if not used[file]]
    if idle and session.exitstatus == 0:
        print(f"\nnothing was computed on the device by {', '.join(idle)}")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def moved(value, kinds="fc"):
    """``value`` with its host arrays of these kinds on the device, within lists, tuples and dicts too."""
    if isinstance(value, np.ndarray | np.generic):
        return device(value) if value.dtype.kind in kinds else value
    if isinstance(value, dict):
        return type(value)((k, moved(v, kinds)) for k, v in value.items())
    return type(value)(moved(v, kinds) for v in value) if type(value) in (list, tuple) else value


def called_by_a_test() -> bool:
    """Whether the function that asks was called by a test, and not by the library."""
    return belongs_to_library(sys._getframe(2).f_code.co_filename) is False


def taking(function):
    """``function``, to which a test may hand host arrays."""

    @functools.wraps(function)
    def wrapper(*args, **options):
        if called_by_a_test():
            args, options = moved(args), moved(options)
        return function(*args, **options)

    return wrapper


def on_the_host(init):
    """A method's init, which computes on the host: a test may hand it what the lane has moved."""

    def back(value):
        return getattr(value, "_host", value)

    @functools.wraps(init)
    def wrapper(self, W, rng, shared):
        return init(self, back(W), rng, type(shared)((k, back(v)) for k, v in shared.items()))

    return wrapper


def take_in_class(cls):
    """The functions of a method's class, as tests call them."""
    for name, value in [*vars(cls).items()]:
        if callable(value) and not name.startswith("_") and not hasattr(value, "__wrapped__"):
            setattr(cls, name, on_the_host(value) if name == "init" else taking(value))


def take_in_module(place):
    for name, value in [*vars(place).items()]:
        if isinstance(value, Operation):
            value.forward, value.backward = taking(value.forward), taking(value.backward)
            value.forms.update({k: tuple(map(taking, pair)) for k, pair in value.forms.items()})
        elif type(value) is type(taking) and value.__module__ == place.__name__:
            setattr(place, name, taking(value))


def is_built() -> bool:
    """Whether the Tensor that is made has a test's numbers, or a new model's. Whatever the library makes while it
    computes or adapts is on the device by itself, or is a mistake.
    """
    frame = sys._getframe(2)
    while frame.f_code.co_name == "__init__" and isinstance(frame.f_locals.get("self"), Tensor):
        frame = frame.f_back  # Parameter's, and that of a subclass in a test
    file = frame.f_code.co_filename
    return not belongs_to_library(file) or file in BUILDERS


def install():
    """Put the stand-in in CuPy's place and let the library take a test's host arrays."""
    sys.modules["cupy"] = module()
    import minilora
    from minilora import adapter, elementary, engine, methods, ops, placement
    from minilora.tools import gradcheck, trial
    from minilora.training import workers

    build, slot = Tensor.__init__, Tensor.data

    def on_the_device(self, data, *args, **options):
        build(self, data, *args, **options)
        if is_built():
            slot.__set__(self, device(self.data))

    def put(self, array):
        slot.__set__(self, device(array) if called_by_a_test() else array)

    Tensor.__init__, Tensor.data = on_the_device, property(slot.__get__, put)
    real = placement.device_module
    placement.device_module = lambda name: real({"cpu": "cuda"}.get(name, name))  # a test's .to("cpu") too
    workers.usual_workers = lambda *args, **options: 1  # as on a GPU
    for place in (engine, ops, elementary, gradcheck):
        take_in_module(place)
    minilora.backward = engine.backward
    for name in methods.names():
        for cls in methods.get(name).__mro__:
            if cls.__module__.startswith("minilora.methods"):
                take_in_class(cls)
    adapter.Adapter.__init_subclass__ = classmethod(lambda cls: take_in_class(cls))
    pick = elementary.getitem.forward
    elementary.getitem.forward = lambda need, x, *, index: pick(need, moved(x), index=moved(index, "iub"))
    point, prepare = gradcheck.method_point, trial.Trial.__init__

    def trial_init(self, *args, **options):
        prepare(self, *args, **options)
        self.W0, self.x, self.c = moved((self.W0, self.x, self.c))

    gradcheck.method_point = lambda *args, **options: moved(point(*args, **options))
    trial.Trial.__init__ = trial_init
