"""The suite on the stand-in: whatever a test builds goes to the device, and the library computes there.

The tests are written with NumPy and stay so. What they hand to the library is moved on the way in; it lies on the same
memory, so that a test may still change its own array. What comes back, a test reads as if it were NumPy's.
"""

import functools
import sys
from pathlib import Path

import numpy as np

from minilora.engine import Tensor

from . import device, frames, kernels, module

used = {}  # operations that the library asked for on device arrays, by test file
waiting = None  # the test file whose operations are counted now


def moved(value):
    """``value`` with its host arrays on the device, within lists, tuples and dicts too."""
    if isinstance(value, np.ndarray) or (isinstance(value, np.generic) and value.dtype.kind in "fc"):
        return device(value)
    if isinstance(value, dict):
        return type(value)((k, moved(v)) for k, v in value.items())
    if type(value) in (list, tuple):
        return type(value)(map(moved, value))
    return value


def from_a_test() -> bool:
    """Whether the function that asks was called by a test, and not by the library."""
    file = sys._getframe(2).f_code.co_filename
    return frames._is_library(file) is False


BUILDERS = ("nn.py", "gpt.py", "claims.py", "elementary.py")  # files that make Tensors of a test's, or new, numbers


def is_built() -> bool:
    """Whether the Tensor that is made holds what a test gave, or a new model's numbers. What the library makes while it
    computes or adapts is on the device by itself, or is a mistake.
    """
    frame = sys._getframe(2)
    while frame.f_code.co_name == "__init__" and isinstance(frame.f_locals.get("self"), Tensor):
        frame = frame.f_back  # Parameter's, and that of a subclass in a test
    path = Path(frame.f_code.co_filename)
    return not frames._is_library(str(path)) or (path.parent == frames.LIBRARY and path.name in BUILDERS)


def taking(function, constants=False):
    """``function``, to which a test may hand host arrays; keyword arguments are left as they are by default."""

    if getattr(function, "takes_host_arrays", False):
        return function

    @functools.wraps(function)
    def wrapper(*args, **options):
        if from_a_test():
            args = moved(args)
            options = moved(options) if constants else options
        return function(*args, **options)

    wrapper.takes_host_arrays = True
    return wrapper


def on_the_host(init):
    """A method's init, which computes on the host: a test may hand it what the lane has moved."""
    back = lambda value: getattr(value, "_host", value)

    @functools.wraps(init)
    def wrapper(self, W, rng, shared):
        return init(self, back(W), rng, type(shared)((k, back(v)) for k, v in shared.items()))

    return wrapper


def giving(function):
    """``function``, whose host arrays come back on the device."""
    return functools.wraps(function)(lambda *args, **options: moved(function(*args, **options)))


METHOD_PARTS = ("forward", "backward", "surrogate", "merge", "after_step", "norm", "update", "scaled")


def take_in_class(cls):
    """The parts of a method that compute, as tests call them."""
    for name in METHOD_PARTS:
        if name in vars(cls):
            setattr(cls, name, taking(vars(cls)[name]))
    if "init" in vars(cls) and not hasattr(cls.init, "__wrapped__"):
        cls.init = on_the_host(cls.init)


def install():
    """Put the stand-in in CuPy's place and let the library take a test's host arrays."""
    sys.modules["cupy"] = module()
    import minilora
    from minilora import adapter, backend, elementary, engine, methods, nn, ops
    from minilora.fast import blocked as blocks
    from minilora.fast import shortcut
    from minilora.tools import gradcheck
    from minilora.tools import trial as claims
    from minilora.training import workers as parallel

    build, slot = engine.Tensor.__init__, engine.Tensor.data

    def on_the_device(self, data, *args, **options):
        build(self, data, *args, **options)
        if is_built():
            slot.__set__(self, device(self.data))

    engine.Tensor.__init__ = on_the_device
    put = lambda self, array: slot.__set__(self, device(array) if from_a_test() else array)
    engine.Tensor.data = property(slot.__get__, put)
    there = {"cpu": "cuda"}  # a test's .to("cpu") goes to the device, too
    nn.device_module = lambda name: backend.device_module(there.get(name, name))
    parallel.usual_workers = lambda *args, **options: 1  # as on a GPU

    engine.backward, engine.gradients = taking(engine.backward, True), taking(engine.gradients, True)
    minilora.backward = engine.backward

    engine.Tensor.__getitem__ = lambda x, index: elementary.getitem(x, index=moved(index))

    for place in (ops, elementary):
        for name, value in [*vars(place).items()]:
            if isinstance(value, engine.Operation):
                index = name == "getitem"  # the one constant that an operation does not move itself
                value.forward, value.backward = taking(value.forward, index), taking(value.backward)
            elif name.endswith(("_forward", "_backward", "_again")):
                setattr(place, name, taking(value))
    for name in ("row_mean", "row_dot", "split_heads", "head_columns", "add_product", "scores"):
        setattr(blocks, name, taking(getattr(blocks, name)))

    adapter.Adapter.__init_subclass__ = classmethod(lambda cls: take_in_class(cls))
    for name in methods.names():
        for cls in methods.get(name).__mro__:
            if cls.__module__.startswith("minilora.methods"):
                take_in_class(cls)
    for name in ("forward", "backward"):
        setattr(shortcut.Shortcut, name, taking(getattr(shortcut.Shortcut, name)))

    gradcheck.method_point = giving(gradcheck.method_point)
    gradcheck.gradcheck = taking(gradcheck.gradcheck)
    check_operation = gradcheck.check_operation
    gradcheck.check_operation = functools.wraps(check_operation)(
        lambda operation, arrays, *args, **constants: check_operation(
            operation, moved(arrays), *args, **{k: moved(v) if k == "index" else v for k, v in constants.items()}
        )
    )

    prepare = claims.Trial.__init__

    def trial(self, *args, **options):
        prepare(self, *args, **options)
        self.W0, self.x, self.c = moved((self.W0, self.x, self.c))

    claims.Trial.__init__ = trial


def begin(file: Path):
    """Count from here for the test file ``file``."""
    global waiting
    waiting = file.name, frames.calls


def end():
    """Book what the library has asked for since begin()."""
    file, before = waiting
    used[file] = used.get(file, 0) + frames.calls - before
    kernels.launches.clear()  # it holds every array of every launch
    frames.syncs.clear()


def idle_files() -> list[str]:
    """The test files that ran in the lane and never had the library compute on the device."""
    return sorted(file for file, count in used.items() if not count)
