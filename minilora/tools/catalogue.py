"""``minilora methods``: what each method trains, keeps for backward and is described as, read from its own file."""

import inspect
import math
import re
import sys

from .. import methods
from ..gpt import GPT, GPTConfig
from ..surgery import count_parameters, linear_layers
from .methodfile import KEPT, listed, stated_shapes
from .trial import verdicts


def catalogue() -> list[dict]:
    """One entry for each method; the counts are for the shipped model's shape and the method's defaults."""
    model = GPT(GPTConfig())
    base, linears = count_parameters(model)[1], [linear.W.shape for linear in linear_layers(model).values()]
    entries = []
    for name in methods.names():
        method = methods.create(name)
        doc = inspect.getdoc(sys.modules[type(method).__module__])
        title, *source = doc.split("\n")[0].split("   ")
        trainable, stored = map(sum, zip(*(map(count, method.shapes(*shape)) for shape in linears), strict=True))
        shared = method.shared_shapes(*map(max, zip(*linears, strict=True)))
        _, buffers = method.shapes(*linears[0])
        entries.append({
            "method": name,
            "title": title.rstrip("."),
            "source": source[0] if source else "",
            "options": {key: default for key, (_, default) in methods.options(name).items()},
            "trained_arrays": trained_shapes(name),
            "trainable": trainable,
            "trainable_percent": 100 * trainable / (base + trainable + stored + count(shared)),
            "frozen": sorted({**buffers, **shared}),
            "claims": verdicts(name),
            "kept": KEPT.search(doc)[1],
        })  # fmt: skip
    return entries


def count(shapes: dict) -> int:
    """How many numbers arrays of these shapes hold."""
    return sum(map(math.prod, shapes.values()))


def trained_shapes(name) -> dict[str, list[str]]:
    """The trainable arrays of a layer by name, with the shapes that the method's file states: {"A": ["r", "d_in"], …}.

    An array that the file's line "Forward, …:" does not name has the numbers of a layer of the shipped model.
    """
    method, width = methods.create(name), GPTConfig().n_embd
    trainable, stated = method.shapes(4 * width, width)[0], stated_shapes(method)
    return {array: list(stated.get(array) or map(str, shape)) for array, shape in trainable.items()}


def show(entries) -> str:
    """The catalogue as text for a terminal."""
    lines = []
    for e in entries:
        arrays = listed(e["trained_arrays"])
        options = ", ".join(f"{key}={value}" for key, value in e["options"].items()) or "no options"
        lines += [
            f"{e['method']}: {e['title']}",
            *([f"    {e['source']}"] if e["source"] else []),
            f"    {options}",
            f"    trains {arrays}: {e['trainable']:,} numbers, {e['trainable_percent']:.2f} % of the shipped model",
            f"    keeps for backward: {e['kept']}" + (f"; frozen: W, {', '.join(e['frozen'])}" if e["frozen"] else ""),
            *(f"    {'✓' if holds else '✗'} {claim}" for claim, holds in e["claims"].items()),
        ]
    return "\n".join(lines)


def markdown(entries) -> str:
    """The catalogue as the table of the README."""
    rows = ["| method | what | trains | numbers | keeps for backward |", "| --- | --- | --- | ---: | --- |"]
    for e in entries:
        arrays, numbers = listed(e["trained_arrays"]), f"{e['trainable']:,} ({e['trainable_percent']:.1f} %)"
        source = re.sub(r"arXiv (\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", e["source"])
        what = f"{e['title']}. {source}" if source else e["title"]
        link = f"[`{e['method']}`](minilora/methods/{e['method']}.py)"
        rows.append(f"| {link} | {what} | {arrays} | {numbers} | {e['kept']} |")
    return "\n".join(rows)
