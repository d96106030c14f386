"""Hyper-parameters are the fields of a method's dataclass: their types, and the values that they take."""

import sys
import typing
from dataclasses import MISSING, fields

import numpy as np

from .errors import InputError


def options_of(cls) -> dict:
    """{field: (type, default)} of a dataclass; annotations that are text become types."""
    types, made = typing.get_type_hints(cls), [(f, f.default_factory) for f in fields(cls)]
    return {f.name: (types[f.name], f.default if make is MISSING else make()) for f, make in made}


def base_type(kind):
    """``int`` for ``int | None``; any other type as it is."""
    inner = [arg for arg in typing.get_args(kind) if arg is not type(None)]
    return inner[0] if type(None) in typing.get_args(kind) else kind


def plain_value(owner: str, name: str, kind, default, value):
    """``value`` as the Python object that the field ``name`` of ``owner`` holds; a NumPy number becomes Python's.

    A list or a tuple may be given as text, "1,2,3", and becomes a tuple. Raises InputError for a value that does not
    fit the type. A float must be above 0, or may be 0 if that is the default.
    """
    value = value.item() if isinstance(value, np.generic) else value
    if value is None and base_type(kind) is not kind:
        return None
    given, kind = value, base_type(kind)
    if (typing.get_origin(kind) or kind) in (list, tuple):
        items = [item for item in value.split(",") if item] if isinstance(value, str) else value
        try:
            value = tuple(map(typing.get_args(kind)[0], items) if typing.get_args(kind) else items)
        except (TypeError, ValueError):
            value = None
    number, whole = type(value) in (int, float), type(value) is int
    finite = number and 0 <= value <= sys.float_info.max
    fits, must = {
        int: (whole and 0 <= value < 2**32, "an integer of at least 0 and below 2³²"),
        float: (finite and (value > 0 or default == 0), "a finite number above 0" + ", or 0" * (default == 0)),
        bool: (type(value) is bool, "True or False"),
        str: (isinstance(value, str), "text"),
    }.get(kind, (value is not None, f"a list such as 1,2, and fit {kind}"))
    if name == "r" and not (whole and value >= 1):
        raise InputError(f"{owner}: r is {given!r:.60}; the rank must be an integer of at least 1")
    if not fits:
        raise InputError(f"{owner}: {name} is {given!r:.60}; it must be {must}")
    return float(value) if kind is float else value
