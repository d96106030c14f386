"""The main job: fine-tune one small model on one real text with every method, and show what each costs and gains.

The base model has read Shakespeare in modern spelling (text A). It is tuned on the First Folio's spelling of 1623
(text B); the loss on A afterwards shows what it forgot. Both are measured on Macbeth, which no training text holds.
"""

import json
import platform
from dataclasses import asdict
from datetime import date

import numpy as np

from .. import methods
from ..errors import InputError
from ..files.saving import writable_folder, write_atomically
from ..plots import png
from ..surgery import count_parameters, plan
from . import figures
from .settings import Comparison
from .tables import markdown
from .task import GLANCE, PASSAGES, PROMPT, Task, learning_rate, recorded_rates, side_by_side, tune, write_sample

ROW_KEYS = [
    *("method", "trainable", "trainable_percent", "loss_b_before", "loss_b_after", "loss_a_before", "loss_a_after"),
    *("kept_bytes", "seconds_per_step", "tokens_per_second", "steps", "seed"),
]

COLUMNS = {  # of the table, by heading: (the row's key, what it is multiplied by, its format)
    "trainable": ("trainable", 1, ","),
    "%": ("trainable_percent", 1, ".2f"),
    "loss, Folio": ("loss_b_after", 1, ".3f"),
    "loss, modern": ("loss_a_after", 1, ".3f"),
    "kept MiB": ("kept_bytes", 2**-20, ".1f"),
    "ms/step": ("seconds_per_step", 1e3, ".0f"),
    "tok/s": ("tokens_per_second", 1, ",.0f"),
}


def compare(settings: Comparison, out="compare", progress=None, report=print) -> dict:
    """Fine-tune with each method of ``settings``; write compare.json, .md and .png into ``out``.

    Returns what compare.json holds: ``settings``, ``rows`` (with ROW_KEYS), and by method ``curves`` and ``samples``.
    Raises InputError, before anything is trained or written, for any input that cannot be used.
    """
    names = methods.names() if settings.methods is None else list(dict.fromkeys(settings.methods))
    if not names:
        raise InputError(f"compare: no method was named; there are {', '.join(methods.names())}")
    given = {name: value for name in ("r", "alpha") if (value := getattr(settings, name)) is not None}
    chosen = {name: methods.create(name, **methods.known(name, **given)) for name in names}
    task, workers = Task(settings.base, settings.device), settings.processes()
    steps, batch, seed = settings.steps, settings.batch, settings.seed
    for method in chosen.values():
        plan(task.model, method)
    folder = writable_folder(out)

    loss_a, loss_b = task.losses(task.model)
    rates = {name: learning_rate(name) if settings.lr is None else settings.lr for name in names}
    samples, rows, curves = {"before": write_sample(task.model, task.tokenizer, seed)}, [], {}
    report(f"Base model: {loss_b:.3f} on the Folio, {loss_a:.3f} on modern spelling, nats per character.")
    for name, method in chosen.items():
        model, history, curves[name] = tune(task, method, steps, rates[name], batch, seed, progress, workers)
        trainable, total = count_parameters(model)
        after_a, after_b = task.losses(model)
        samples[name] = write_sample(model, task.tokenizer, seed)
        values = [name, trainable, 100 * trainable / total, loss_b, after_b, loss_a, after_a, history.kept_bytes,
                  history.seconds_per_step, history.tokens_per_second, steps, seed]  # fmt: skip
        rows.append(dict(zip(ROW_KEYS, values, strict=True)))
        report(f"{name}: {after_b:.3f} on the Folio after {steps} steps, {history.seconds_per_step * 1e3:.0f} ms each.")

    recorded = {
        "options": {name: asdict(method) for name, method in chosen.items()},
        "batch": batch,
        "context": task.model.config.n_positions,
        "device": settings.device,
        "workers": workers,
        "learning_rates": rates,
        "prompt": PROMPT,
        "date": date.today().isoformat(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "machine": platform.machine(),
    }
    result = {"settings": recorded, "rows": rows, "curves": curves, "samples": samples}
    save(folder, result)
    best = min(rows, key=lambda row: row["loss_b_after"])["method"]
    report("\n" + table(rows) + "\n\n" + side_by_side("before", samples["before"], f"after, {best}", samples[best]))
    report(f"\nWritten: {folder / 'compare.json'}, {folder / 'compare.md'}, {folder / 'compare.png'}")
    return result


def save(folder, result: dict) -> None:
    """Write ``result`` as compare.json, as a page compare.md, and as a picture compare.png."""
    write_atomically(folder / "compare.json", json.dumps(result, indent=1).encode())
    write_atomically(folder / "compare.md", page(result).encode())
    write_atomically(folder / "compare.png", png(figures.comparison(result)))


def table(rows) -> str:
    """The rows as a Markdown table that is aligned for a terminal as well; the first is the base model's."""
    before = ["before", "", "", f"{rows[0]['loss_b_before']:.3f}", f"{rows[0]['loss_a_before']:.3f}", "", "", ""]
    return markdown(["method", *COLUMNS], [before, *([row["method"], *cells(row)] for row in rows)])


def cells(row) -> list[str]:
    """What a row has in COLUMNS."""
    return [f"{row[key] * unit:{form}}" for key, unit, form in COLUMNS.values()]


def page(result: dict) -> str:
    """compare.md: how to read the table, the table, the settings, and a sample of text from each model."""
    s, rows = result["settings"], result["rows"]
    lines = [
        f"# One model, two spellings, {len(rows)} method{'s' * (len(rows) > 1)}",
        "",
        "The base model has read Shakespeare in modern spelling. With each method it is tuned on the spelling of the",
        "First Folio of 1623, by the same passages in the same order; `minilora compare` does it all, and writes this",
        "page. The losses are in nats per character, on Macbeth in either spelling, which no training text holds:",
        "lower on the Folio is learning, higher on modern text is forgetting.",
        "",
        "[![Loss while training, learning against forgetting, and three costs, by method](compare.png)](compare.png)",
        "",
        f"*Upper left: the loss while training, on {GLANCE} passages; the table's, on up to {PASSAGES}, is another.",
        "Upper right: the two losses of the table; lower left is better. Below: the costs.*",
        "",
        "- *trainable*: parameters that are trained. *%*: of all parameters of the adapted model, which are the base",
        "  model's own and those that the method adds, trained or not.",
        *_notes([row["method"] for row in rows]),
        "- *kept*: bytes that a step's forward pass keeps for backward.",
        "- *ms/step*: the median of a whole step; *tok/s*: characters per second, by the same median.",
        "",
        table(rows),
        "",
        f"{rows[0]['steps']} steps of {s['batch']} × {s['context']} characters, seed {rows[0]['seed']}, {s['device']}, "
        f"workers: {s['workers']}, {s['date']}, Python {s['python']}, NumPy {s['numpy']}.",
        "",
        "## Settings",
        "",
        "AdamW with 20 steps of warm-up, or a fifth of all if that is less, then a cosine; the gradient's norm is cut",
        "off at 1. ★: the best learning rate of the method's recorded sweep (`minilora sweep`).",
        "",
        *_settings(s),
        "",
        "## The same prompt, the same seed, before and after",
        "",
    ]
    for name, text in result["samples"].items():
        lines += [f"**{name}**", "", "```text", s["prompt"] + text, "```", ""]
    return "\n".join(lines)


def _notes(names) -> list[str]:
    """What the methods' own files say of what they add to the model."""
    notes = {name: getattr(methods.get(name), "note", "") for name in names if name in methods.names()}
    return [f"  `{name}` {note}." for name, note in notes.items() if note]


def _settings(settings) -> list[str]:
    """The lines of a table: what each method was run with."""
    swept = recorded_rates()["methods"]
    lines = ["| method | learning rate | options |", "| --- | ---: | --- |"]
    for name, rate in settings["learning_rates"].items():
        options = [f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in settings["options"][name].items()]
        star = " ★" if rate == swept.get(name) else ""
        lines.append(f"| {name} | {rate:g}{star} | {', '.join(options) or '–'} |")
    return lines
