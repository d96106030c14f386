"""The errors a user can mend: each names what was wrong and what would be right.

The command line prints these as one line; anything else that is raised is a bug and keeps its traceback.
"""

import difflib


class InputError(ValueError):
    """Something the caller passed cannot be used: a value, a shape, a dtype, a name, a file or a device."""


class TrainingStopped(RuntimeError):
    """Training met a loss or gradient that is not finite; the weights are those of the last good step."""


def nearest(name: str, names) -> str:
    """A hint ' (did you mean "lora"?)' for a misspelt ``name``, or an empty string when nothing is close."""
    close = difflib.get_close_matches(str(name), [str(n) for n in names], n=1, cutoff=0.5)
    return f' (did you mean "{close[0]}"?)' if close else ""
