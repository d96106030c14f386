"""Which layers a method adapts, and with which rank: names, expressions and PEFT's patterns, on lists of paths."""

import re
from dataclasses import replace

from .adapter import Adapter
from .errors import InputError


def choose(names: list[str], method: Adapter, target_modules, rank_pattern, alpha_pattern) -> dict[str, Adapter]:
    """The method of each of ``names`` that is chosen, with its own r and alpha; see surgery.adapt()."""
    chosen = dict.fromkeys(match_targets(names, target_modules), method)
    for option, pattern in (("r", rank_pattern or {}), ("alpha", alpha_pattern or {})):
        for key in pattern:
            if not any(matches(key, path) for path in chosen):
                raise InputError(f'{option}: the pattern "{key}" matches no adapted layer of {", ".join(chosen)}')
        for path, own in chosen.items():
            for key in [key for key in pattern if matches(key, path)][:1]:  # the first that fits counts
                chosen[path] = vary(own, option, pattern[key])
    return chosen


def match_targets(names: list[str], target_modules) -> list[str]:
    """The ``names`` that ``target_modules`` selects, in their order; see adapt()."""
    endings = sorted({n.rpartition(".")[2] for n in names})
    if target_modules == "all-linear":
        chosen = set(names)
    elif isinstance(target_modules, str):
        try:
            chosen = {n for n in names if re.fullmatch(target_modules, n)}
        except re.error as error:
            raise InputError(f'target_modules: "{target_modules}" is not a regular expression: {error}') from error
        if not chosen:
            raise InputError(f'target_modules: the expression "{target_modules}" matches no path; there are {names}')
    else:
        chosen = set()
        for target in target_modules:
            hits = {n for n in names if n == target or n.endswith("." + target)}
            if not hits:
                raise InputError(f'target_modules: no linear layer is named "{target}"; there are {", ".join(endings)}')
            chosen |= hits
    if not chosen:
        raise InputError(f"target_modules: nothing is selected; there are {', '.join(endings)}")
    return [n for n in names if n in chosen]


def vary(method: Adapter, option: str, value) -> Adapter:
    """``method`` with another ``option``. Raises InputError where it has none, or where layers share arrays."""
    if not hasattr(method, option) or type(method).init_shared is not Adapter.init_shared:
        raise InputError(f"{method.name}: its layers cannot have an {option} of their own")
    return replace(method, **{option: value})


def matches(pattern: str, path: str) -> bool:
    """PEFT's rule for a key of a pattern: an expression for the path, or for the end of it behind a dot."""
    try:
        return re.fullmatch(rf"(.*\.)?({pattern})", path) is not None
    except re.error as error:
        raise InputError(f'the pattern "{pattern}" is not a regular expression: {error}') from error
