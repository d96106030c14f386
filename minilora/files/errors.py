"""The errors of files, and how a message shows what stands in one."""

import json

from ..errors import InputError, printable, shown


class FormatError(InputError):
    """A file breaks a rule: ``file`` and ``rule`` say which, ``tensor`` where in it, if anywhere."""

    def __init__(self, file, rule: str, tensor: str | None = None):
        self.file, self.tensor, self.rule = str(file), tensor, printable(rule)
        where = "" if tensor is None else f"tensor {shown(tensor)}: "
        super().__init__(f"{shown(str(file), 300)}: {where}{self.rule}")


class AdapterFormatError(FormatError):
    """The same for an adapter or a training checkpoint, of minilora or of PEFT."""


def shown_json(value, most=80) -> str:
    """A value from a JSON file as a message may print it."""
    text = json.dumps(value)
    return text if len(text) <= most else text[: most - 1] + "…"
