"""Where arrays lie: the library behind a device's name, and a model moved there."""

import importlib

import numpy as np

from .backend import to_device
from .errors import InputError


def device_module(device: str):
    """The array library behind ``device``, "cpu" or "cuda".

    Raises InputError for another name, and for "cuda" without CuPy or without a usable GPU.
    """
    if device == "cpu":
        return np
    if device != "cuda":
        raise InputError(f'unknown device "{device}"; use "cpu" or "cuda"')
    try:
        cupy = importlib.import_module("cupy")
    except ImportError as error:
        install = "pip install 'minilora[gpu12]' for CUDA 12 or 'minilora[gpu13]' for CUDA 13"
        raise InputError(f'device "cuda" needs CuPy; {install}, or use the device "cpu"') from error
    try:
        count, problem = cupy.cuda.runtime.getDeviceCount(), None
    except Exception as error:  # CUDARuntimeError: no driver, no device, driver too old
        count, problem = 0, error
    if count == 0:
        why = f" ({problem})" if problem else ""
        raise InputError(f'device "cuda": CuPy finds no usable GPU{why}; use the device "cpu"') from problem
    return cupy


def move_to(module, device: str):
    """Move every array to "cpu" or "cuda"; returns the module. Raises InputError without CuPy or GPU."""
    xp, moved = device_module(device), {}

    def move(array):
        """The array on the device: once for all that refer to it, so that what is one array stays one."""
        if array is None:
            return None
        if id(array) not in moved:
            moved[id(array)] = to_device(array, xp), array  # with the array, whose id is then nobody else's
        return moved[id(array)][0]

    for _, p in module.named_parameters():
        p.data = move(p.data)
        if p.node is not None:
            p.node.grad = move(p.node.grad)
    for owner in (module, *(m for _, m in module.named_modules())):
        for name in owner.arrays_beside:
            setattr(owner, name, move(getattr(owner, name)))
    return module
