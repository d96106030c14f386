"""Regular expressions from a file of somebody else: a small language, matched in a time that can be told beforehand.

    alternatives = sequence { "|" sequence }
    sequence     = { piece }
    piece        = character [ quantifier ]  |  "(" alternatives ")" [ "?" ]  |  "^"  |  "$"
    quantifier   = "*" | "+" | "?" | "{1}" | "{1,}" | "{1,2}", with any digits
    character    = a letter, a digit, "_" or "-"  |  "."  |  "\\." "\\-" "\\d" "\\w"  |  a class: "[a-z0-9]", "[^.]"

That is what configurations of PEFT contain. Also read are "(?:", and "?" after a quantifier, which makes no difference
to a whole match. A group cannot be repeated, and there are no backreferences, no lookarounds and no flags.

Python's own matcher tries one way after the other, and an expression such as ``(a+)+$`` has more ways than anyone can
wait for. Here all ways are followed at once, as a set of positions that each piece moves on: at most as many steps as
the expression has characters, each of which looks once at every character of the name.
"""

import re
from functools import lru_cache

DEPTH = 20  # of groups within groups
ONE = r"[\w\-]|\.|\\[.\-dw]|\[\^?(?:\\[.\-dw]|\w-\w|[\w.])+-?\]"
TOKEN = (
    rf"(?P<one>{ONE})(?:(?P<times>[*+?]|\{{\d(?:,\d?)?\}})\??)?"
    r"|(?P<open>\((?:\?:)?)|(?P<close>\)\??)|(?P<bar>\|)|(?P<edge>[\^$])"
)
EXPRESSION, TOKEN = re.compile(f"(?:{TOKEN})*", re.ASCII), re.compile(TOKEN, re.ASCII)


def is_expression(text: str) -> bool:
    """Is ``text`` an expression of the language above?"""
    if not EXPRESSION.fullmatch(text):
        return False
    depth = 0
    for token in TOKEN.finditer(text):
        depth += bool(token["open"]) - bool(token["close"])
        if depth > DEPTH:
            return False
    try:
        re.compile(text)  # Python reads neither [z-a] nor {2,1}, nor brackets that are not pairs
    except re.error:
        return False
    return True


def matches_whole(expression: str, name: str, starts=(0,)) -> bool:
    """Does ``expression`` match ``name`` up to its end, from one of the positions ``starts``?"""
    return len(name) in reached(TOKEN.finditer(expression), name, set(starts))


def reached(tokens, name: str, starts: set) -> set:
    """The positions in ``name`` to which the alternatives lead from ``starts``; takes their tokens and the bracket."""
    ends, here = set(), starts
    for token in tokens:
        if token["close"]:
            return ends | here | (starts if token["close"] == ")?" else set())
        if token["bar"]:
            ends, here = ends | here, starts
        elif token["open"]:
            here = reached(tokens, name, here)
        elif token["edge"]:
            here = here & {0 if token["edge"] == "^" else len(name)}
        else:
            here = after(token["one"], *limits(token["times"]), name, here)
    return ends | here


def limits(times: str | None) -> tuple[int, int | None]:
    """(fewest, most) repetitions that a quantifier allows; None is any number."""
    if times is None:
        return 1, 1
    if times in "*+?":
        return {"*": (0, None), "+": (1, None), "?": (0, 1)}[times]
    low, comma, high = times[1:-1].partition(",")
    return int(low), int(high) if high else None if comma else int(low)


def after(one: str, low: int, high: int | None, name: str, starts: set) -> set:
    """The positions behind ``low`` to ``high`` characters that are ``one``."""
    ends, here = set(), starts
    for count in range(1 + (len(name) if high is None else high)):
        if count >= low:
            here = here - ends
            ends |= here
        here = {i + 1 for i in here if i < len(name) and is_one(one, name[i])}
    return ends


@lru_cache(4096)
def is_one(one: str, character: str) -> bool:
    return re.fullmatch(one, character) is not None
