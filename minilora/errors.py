"""The errors that a user can mend, which the command line prints as one line. Anything else that is raised is a bug."""

import difflib
import json


class InputError(ValueError):
    """Something the caller passed cannot be used: a value, a shape, a dtype, a name, a file or a device."""


class Interrupted(Exception):
    """The user, or the system, asked a run to stop; it stopped between two steps, with everything saved."""

    def __init__(self, message: str, signum: int):
        super().__init__(message)
        self.signum = signum


class TrainingStopped(RuntimeError):
    """Training met a loss or gradient that is not finite; the weights are those of the last good step."""


def nearest(name: str, names) -> str:
    """A hint ' (did you mean "lora"?)' for a misspelt ``name``, or an empty string when nothing is close."""
    close = difflib.get_close_matches(str(name)[:200], [str(n)[:200] for n in names], n=1, cutoff=0.5)
    return f" (did you mean {shown(close[0])}?)" if close else ""


def shown(text: str, most=80) -> str:
    """``text`` in quotes as a message may print it: from a file it may be long, or hold a terminal's control codes."""
    start = text[: most + 1]
    return f'"{printable(json.dumps(start, ensure_ascii=not start.isprintable())[1:-1], most)}"'


def printable(text: str, most=360) -> str:
    """``text`` without control codes, which are spelt out, and not longer than ``most``."""
    start = text[: most + 1]
    if not start.isprintable():
        start = "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in start)
    return start if len(start) <= most else start[: most - 1] + "…"
