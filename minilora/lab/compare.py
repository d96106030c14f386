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
from ..training.optim import check_positive
from . import figures
from .task import (
    GLANCE,
    PASSAGES,
    PROMPT,
    Task,
    learning_rate,
    recorded_rates,
    side_by_side,
    tune,
    write_sample,
)

ROW_KEYS = [
    *("method", "trainable", "trainable_percent", "loss_b_before", "loss_b_after", "loss_a_before", "loss_a_after"),
    *("kept_bytes", "seconds_per_step", "tokens_per_second", "steps", "seed"),
]


def compare(
    names=None, steps=120, seed=0, device="cpu", r=None, alpha=None, out="compare", lr=None, batch=8, base=None,
    progress=None, report=print, workers=1,
) -> dict:  # fmt: skip
    """Fine-tune with every method of ``names`` (all by default); write compare.json, .md and .png into ``out``.

    ``r`` and ``alpha`` go to each method that has them, instead of its default, and ``lr`` replaces the recorded
    learning rates. ``workers``: processes that share each batch out. Returns what compare.json holds: ``settings``,
    ``rows`` (with ROW_KEYS), and by method ``curves`` and ``samples``. Raises InputError, before anything is trained
    or written, for any input that cannot be used.
    """
    names = methods.names() if names is None else list(dict.fromkeys(names))
    given = {key: value for key, value in {"r": r, "alpha": alpha}.items() if value is not None}
    chosen = [methods.create(n, **methods.known(n, **given)) for n in names]
    check_positive(steps=steps, batch=batch, lr=lr)
    if not names:
        raise InputError(f"compare: no method was named; there are {', '.join(methods.names())}")
    task = Task(base, device)
    for method in chosen:
        plan(task.model, method)
    folder = writable_folder(out)

    loss_a, loss_b = task.losses(task.model)
    rates = {name: learning_rate(name) if lr is None else lr for name in names}
    samples, rows, curves = {"before": write_sample(task.model, task.tokenizer, seed)}, [], {}
    report(f"Base model: {loss_b:.3f} on the Folio, {loss_a:.3f} on modern spelling, nats per character.")
    for name, method in zip(names, chosen, strict=True):
        model, history, curves[name] = tune(task, method, steps, rates[name], batch, seed, progress, workers)
        trainable, total = count_parameters(model)
        after_a, after_b = task.losses(model)
        samples[name] = write_sample(model, task.tokenizer, seed)
        values = [name, trainable, 100 * trainable / total, loss_b, after_b, loss_a, after_a, history.kept_bytes,
                  history.seconds_per_step, history.tokens_per_second, steps, seed]  # fmt: skip
        rows.append(dict(zip(ROW_KEYS, values, strict=True)))
        report(f"{name}: {after_b:.3f} on the Folio after {steps} steps, {history.seconds_per_step * 1e3:.0f} ms each.")

    result = {
        "settings": {
            "options": {m.name: asdict(m) for m in chosen}, "batch": batch,
            "context": task.model.config.n_positions, "device": device, "workers": workers,
            "learning_rates": rates,
            "prompt": PROMPT, "date": date.today().isoformat(),
            "python": platform.python_version(), "numpy": np.__version__, "machine": platform.machine(),
        },
        "rows": rows, "curves": curves, "samples": samples,
    }  # fmt: skip
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
    head = ["method", "trainable", "%", "loss, Folio", "loss, modern", "kept MiB", "ms/step", "tok/s"]
    losses = lambda row, when: [f"{row[f'loss_{text}_{when}']:.3f}" for text in "ba"]
    lines = [["before", "", "", *losses(rows[0], "before"), "", "", ""]] + [
        [r["method"], f"{r['trainable']:,}", f"{r['trainable_percent']:.2f}", *losses(r, "after"),
         f"{r['kept_bytes'] / 2**20:.1f}", f"{r['seconds_per_step'] * 1e3:.0f}", f"{r['tokens_per_second']:,.0f}"]
        for r in rows
    ]  # fmt: skip
    widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
    row = lambda cells: "| " + " | ".join(
        c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))
    ) + " |"  # fmt: skip
    rule = "|" + "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
    return "\n".join([row(head), rule, *map(row, lines)])


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
        "- *trainable*: numbers that are trained. *%*: of all that the adapted model holds: the base model's own, and",
        "  what the method adds, trained or not. `full` adds a trained copy of each weight, and Delta-LoRA a second",
        "  A and B, as they were a step ago.",
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


def _settings(settings) -> list[str]:
    """The lines of a table: what each method was run with."""
    swept = recorded_rates()["methods"]
    lines = ["| method | learning rate | options |", "| --- | ---: | --- |"]
    for name, rate in settings["learning_rates"].items():
        options = [f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in settings["options"][name].items()]
        star = " ★" if rate == swept.get(name) else ""
        lines.append(f"| {name} | {rate:g}{star} | {', '.join(options) or '–'} |")
    return lines
