"""The main job: fine-tune one small model on one real text with every method, and show what each costs and gains.

The base model has read Shakespeare in modern spelling (text A). It is tuned on the First Folio's spelling of 1623
(text B); the loss on A afterwards shows what it forgot. Both are measured on Macbeth, which no training text holds.
"""

import json
import platform
from dataclasses import asdict
from datetime import date
from importlib import resources

import numpy as np

from . import methods
from .backend import device_module
from .checkpoint import load_base
from .data import CharTokenizer, fixed_batches, load_corpus, random_batches, split_text
from .errors import InputError
from .files import writable_folder, write_atomically
from .optim import AdamW, check_positive
from .surgery import adapt, count_parameters, plan
from .train import evaluate, train

ROW_KEYS = [
    *("method", "trainable", "trainable_percent", "loss_b_before", "loss_b_after", "loss_a_before", "loss_a_after"),
    *("kept_bytes", "seconds_per_step", "tokens_per_second", "steps", "seed"),
]
PROMPT = "Enter Macbeth and his Lady.\n\n"
SAMPLE_TOKENS = 320
PASSAGES, GLANCE = 128, 16  # of a held-out text, for its loss; of B, for the curve during training


class Task:
    """Text B to train on, A and B held out to measure on, all as token ids; the base model, before any tuning.

    ``selection``: for choosing hyper-parameters. B is then held out from the end of the training text, so that the
    play on which results are reported is never looked at.
    """

    def __init__(self, base=None, device="cpu", selection=False):
        device_module(device)
        self.device, self.tokenizer = device, CharTokenizer()
        self.load = lambda: load_base(base, self.tokenizer.vocab_size)
        self.model = self.load().to(device)
        a, b, context = load_corpus("modern"), load_corpus("folio"), self.model.config.n_positions
        b = split_text(b.train) if selection else b
        self.train_ids = self.tokenizer.encode(b.train)
        self.held_out_a = fixed_batches(self.tokenizer.encode(a.val), 32, context, limit=PASSAGES)
        self.held_out_b = fixed_batches(self.tokenizer.encode(b.val), 32, context, limit=PASSAGES)
        self.glance_b = [tuple(a[:GLANCE] for a in self.held_out_b[0])]

    def losses(self, model) -> tuple[float, float]:
        """Held-out loss on A and on B, in nats per character."""
        return evaluate(model, self.held_out_a), evaluate(model, self.held_out_b)


def write_sample(model, tokenizer, seed, prompt=PROMPT) -> str:
    """What the model writes after ``prompt``; one seed for all models, so that only the weights differ."""
    ids = tokenizer.encode(prompt)[None]
    return tokenizer.decode(model.generate(ids, SAMPLE_TOKENS, 0.6, top_k=20, rng=seed)[0])


def learning_rate(method: str) -> float:
    """The rate recorded for ``method`` in learning_rates.json, or the file's default for one that is not there."""
    rates = recorded_rates()
    return rates["methods"].get(method, rates["default"])


def recorded_rates() -> dict:
    """learning_rates.json: the best rate of the recorded sweep by method, and a default for all others."""
    return json.loads((resources.files("minilora") / "learning_rates.json").read_text())


def tune(task: Task, method, steps, lr, batch, seed, progress=None, workers=1):
    """Fine-tune the base model on B with ``method``, an Adapter: (model, History, curve of (step, held-out loss))."""
    model = adapt(task.load().to(task.device), method, seed=seed, verbose=False)
    rng = np.random.default_rng(seed)  # the same batches for every method
    batches = random_batches(task.train_ids, batch, model.config.n_positions, rng)
    optimizer = AdamW(model.trainable(), lr, clip=1.0)
    curve, every = [(0, evaluate(model, task.glance_b))], max(1, steps // 10)

    def callback(step, history):
        if (step + 1) % every == 0 or step + 1 == steps:
            curve.append((step + 1, evaluate(model, task.glance_b)))

    warmup = min(20, steps // 5)
    history = train(
        model, optimizer, batches, steps, warmup, callback=callback, label=method.name, progress=progress,
        workers=workers,
    )  # fmt: skip
    return model, history, curve


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
    from . import plots

    write_atomically(folder / "compare.json", json.dumps(result, indent=1).encode())
    write_atomically(folder / "compare.md", page(result).encode())
    write_atomically(folder / "compare.png", plots.png(plots.comparison(result)))


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


def side_by_side(left_title, left, right_title, right, width=58) -> str:
    """Two texts in two columns of ``width`` characters."""
    fold = lambda text: [line[i : i + width] for line in text.split("\n") for i in range(0, max(1, len(line)), width)]
    a, b = [left_title, "-" * width, *fold(left)], [right_title, "-" * width, *fold(right)]
    a, b = a + [""] * (len(b) - len(a)), b + [""] * (len(a) - len(b))
    return "\n".join(f"{x:<{width}}  {y}".rstrip() for x, y in zip(a, b, strict=True))


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
