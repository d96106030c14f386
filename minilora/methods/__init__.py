"""One method, one file. The files in this folder are the registry: a new method is a new file and nothing else.

A file that starts with an underscore is skipped. In each file, the method is the Adapter class defined there.
"""

import dataclasses
import importlib
import os

from ..adapter import Adapter
from ..errors import InputError, nearest, shown


def names() -> list[str]:
    """The names of all methods, which are their file names, in alphabetical order."""
    files = [file for folder in __path__ for file in os.listdir(folder)]
    return sorted(file.removesuffix(".py") for file in files if file.endswith(".py") and not file.startswith("_"))


def get(name: str) -> type:
    """The Adapter class of the method ``name``. Raises InputError with the nearest name for an unknown one."""
    if name not in names():
        raise InputError(f"unknown method {shown(name)}{nearest(name, names())}; there are {', '.join(names())}")
    module = importlib.import_module(f"{__name__}.{name}")
    found = [
        c
        for c in vars(module).values()
        if isinstance(c, type) and issubclass(c, Adapter) and c.__module__ == module.__name__
    ]
    if len(found) != 1:
        raise InputError(f"methods/{name}.py defines {len(found)} Adapter classes; a method file defines exactly one")
    return found[0]


def options(name: str) -> dict:
    """The method's hyper-parameters: name to (type, default)."""
    return {f.name: (f.type, f.default) for f in dataclasses.fields(get(name))}


def create(name: str, /, **values):
    """The method ``name`` with these hyper-parameters. Raises InputError for one that it does not have."""
    known = options(name)
    for key in values:
        if key not in known:
            have = ", ".join(known) or "none"
            raise InputError(f"{name} has no option {shown(key)}{nearest(key, known)}; its options: {have}")
    return get(name)(**values)


def known(name: str, /, **values) -> dict:
    """Those of ``values`` that the method ``name`` has as hyper-parameters."""
    have = options(name)
    return {key: value for key, value in values.items() if key in have}
