"""``minilora methods``: what each method trains, keeps for backward and is described as, read from its own file."""

import inspect
import re
import sys

from . import methods
from .adapter import adapt, count_parameters
from .gpt import GPT, GPTConfig


def catalogue() -> list[dict]:
    """One entry for each method; the counts are for the shipped model's shape and the method's defaults."""
    entries = []
    for name in methods.names():
        method = methods.get(name)
        doc = inspect.getdoc(sys.modules[method.__module__])
        trainable, total = count_parameters(adapt(GPT(GPTConfig()), name, verbose=False))
        entries.append({
            "method": name,
            "title": doc.split("\n")[0].split("   ")[0].rstrip("."),
            "source": [*doc.split("\n")[0].split("   "), ""][1],
            "options": {key: default for key, (_, default) in methods.options(name).items()},
            "trainable": trainable,
            "trainable_percent": 100 * trainable / total,
            "kept": re.search(r"^Kept for backward: (.*)$", doc, re.MULTILINE)[1],
        })  # fmt: skip
    return entries


def show(entries) -> str:
    """The catalogue as text for a terminal."""
    lines = []
    for e in entries:
        options = ", ".join(f"{key}={value}" for key, value in e["options"].items()) or "no options"
        lines += [
            f"{e['method']}: {e['title']}",
            *([f"    {e['source']}"] if e["source"] else []),
            f"    {options}; trains {e['trainable']:,} numbers ({e['trainable_percent']:.2f} %) of the shipped model",
            f"    keeps for backward: {e['kept']}",
        ]
    return "\n".join(lines)
