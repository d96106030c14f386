"""Hyper-parameters are the fields of a method's dataclass: their types, and the values that they take."""

import sys
import typing
from dataclasses import MISSING, fields

import numpy as np

from .errors import InputError


def options_of(cls) -> dict:
    """{field: (type, default)} of a dataclass; annotations that are text become types."""
    types = typing.get_type_hints(cls)
    return {
        field.name: (types[field.name], field.default if field.default_factory is MISSING else field.default_factory())
        for field in fields(cls)
    }


def base_type(kind):
    """``int`` for ``int | None``; any other type as it is."""
    inner = [arg for arg in typing.get_args(kind) if arg is not type(None)]
    return inner[0] if type(None) in typing.get_args(kind) else kind


def plain_value(owner: str, name: str, kind, default, value):
    """``value`` as the Python object that the field ``name`` of ``owner`` holds; a NumPy number becomes Python's.

    A list or a tuple may be given as text, "1,2,3", and becomes a tuple. Raises InputError for a value that does not
    fit the type, for a rank below 1, and for a float that is not above 0 (0 itself is fine if it is the default).
    """
    value = value.item() if isinstance(value, np.generic) else value
    if value is None and base_type(kind) is not kind:
        return None
    kind = base_type(kind)
    container = typing.get_origin(kind) or kind
    zero = kind is float and default == 0
    given, allowed = f"{owner}: {name} is {value!r:.60}", ""
    if name == "r" and not (type(value) is int and value >= 1):
        raise InputError(f"{given}; the rank must be an integer of at least 1")
    if kind is int and not (type(value) is int and 0 <= value < 2**32):
        allowed = "an integer of at least 0 and below 2³²"
    elif kind is float:
        if type(value) in (int, float) and (value > 0 or (zero and value == 0)) and value <= sys.float_info.max:
            return float(value)
        allowed = "a finite number of at least 0" if zero else "a finite number above 0"
    elif kind is bool and type(value) is not bool:
        allowed = "True or False"
    elif kind is str and not isinstance(value, str):
        allowed = "text"
    elif container in (list, tuple):
        try:
            items, kinds = split(value), typing.get_args(kind)
            return tuple(map(kinds[0], items)) if kinds else tuple(items)
        except (TypeError, ValueError):
            allowed = f"a list such as 1,2 ({getattr(kind, '__name__', kind)})"
    if allowed:
        raise InputError(f"{given}; it must be {allowed}")
    return value


def split(value) -> list:
    return [part for part in value.split(",") if part] if isinstance(value, str) else list(value)


def flag(kind) -> dict:
    """How argparse reads a field of the type ``kind``: a bool as --name and --no-name, a list as one text."""
    import argparse  # only the command line needs it

    if base_type(kind) is bool:
        return {"action": argparse.BooleanOptionalAction}
    return {"type": base_type(kind) if base_type(kind) in (int, float) else str}
