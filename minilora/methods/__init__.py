"""One method, one file. The files in this folder are the registry: a new method is a new file and nothing else."""

import importlib
import os

from ..adapter import Adapter
from ..errors import InputError, nearest, shown
from ..options import options_of


def names() -> list[str]:
    """The names of all methods, which are their file names, in alphabetical order."""
    files = [file for folder in __path__ for file in os.listdir(folder)]
    return sorted(file.removesuffix(".py") for file in files if file.endswith(".py") and not file.startswith("_"))


def get(name: str) -> type:
    """The Adapter class of the method ``name``. Raises InputError with the nearest name for an unknown one."""
    if name not in names():
        known = ", ".join(names())
        raise InputError(f"unknown method {shown(str(name))}{nearest(str(name), names())}; there are {known}")
    return defined_in(importlib.import_module(f"{__name__}.{name}"), f"methods/{name}.py")


def defined_in(module, file: str) -> type:
    """The Adapter class of a method file's module. Raises InputError unless the file defines exactly one."""
    classes = [member for member in vars(module).values() if isinstance(member, type) and issubclass(member, Adapter)]
    found = [cls for cls in classes if cls.__module__ == module.__name__]
    if len(found) != 1:
        raise InputError(f"{file} defines {len(found)} Adapter classes; a method file defines exactly one")
    return found[0]


def options(name: str) -> dict:
    """The method's hyper-parameters: name to (type, default)."""
    return options_of(get(name))


def create(method: str | Adapter, /, **values) -> Adapter:
    """The method of that name with these hyper-parameters; an Adapter, which has its own already, as it is.

    Raises InputError for a hyper-parameter that the method does not have, or that is given beside an Adapter.
    """
    given = isinstance(method, Adapter)
    name, known = (method.name, options_of(type(method))) if given else (method, options(method))
    for key in values:
        if key not in known:
            have = ", ".join(known) or "none"
            raise InputError(f"{name} has no option {shown(key)}{nearest(key, known)}; its options: {have}")
    if given and values:
        beside = f"{method} has its options already, and {', '.join(values)} would be ignored"
        raise InputError(f'{beside}; give the name "{name}" with all its options')
    return method if given else get(method)(**values)


def known(name: str, /, **values) -> dict:
    """Those of ``values`` that the method ``name`` has as hyper-parameters."""
    have = options(name)
    return {key: value for key, value in values.items() if key in have}


def low_rank(B, A) -> tuple[Adapter, dict]:
    """The method whose update is the product of B (d_out, r) and A (r, d_in), and its arrays: LoRA with scaling 1."""
    return create("lora", r=len(A), alpha=float(len(A))), {"A": A, "B": B}
