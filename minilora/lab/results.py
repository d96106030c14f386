"""The runs of a sweep as lines of a file: what a run is, reading them, the best rates among them."""

import json
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from statistics import fmean, median, stdev

from .. import methods
from ..errors import InputError, TrainingStopped
from ..files.saving import write_atomically
from . import tables

MARK = b'{"minilora_sweep": 1, '  # every line starts with it, so that half a line is known for ours as well


@dataclass(frozen=True)
class Run:
    """One training run. ``r`` or ``alpha`` None: the method's own default, or a method that has none."""

    method: str
    lr: float
    seed: int
    steps: int
    batch: int
    base: str | None = None
    r: int | None = None
    alpha: float | None = None
    options: dict = field(default_factory=dict)  # other fields of the method

    def key(self) -> str:
        """The same string for the same run, in every process and at every time."""
        return json.dumps(asdict(self), sort_keys=True)

    def adapter(self):
        """The method with its hyper-parameters. Raises InputError for a value that it cannot have."""
        given = {"r": self.r, "alpha": self.alpha, **self.options}
        return methods.create(self.method, **{name: value for name, value in given.items() if value is not None})


def read(path) -> tuple[dict, int]:
    """A sweep's lines by key, the latest of each, and the bytes of all whole ones. InputError for other files."""
    try:
        content = Path(path).read_bytes() if Path(path).exists() else b""
        *whole, half = content.split(b"\n")
        if not all(text.startswith(MARK) for text in whole) or not (half.startswith(MARK) or MARK.startswith(half)):
            raise ValueError("a line is of something else")
        lines = [json.loads(text) for text in whole]
        keys = [Run(**{f.name: line[f.name] for f in fields(Run)}).key() for line in lines]
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f'"{path}" is not a file of a sweep ({error}); choose another with --out') from error
    return dict(zip(keys, lines, strict=True)), sum(len(text) + 1 for text in whole)


def curves(lines) -> dict:
    """{(method, r, alpha): {rate: losses of its seeds}}, rates ascending; the loss of a failed run is infinite."""
    found = {}
    for line in sorted(lines, key=lambda line: (line["method"], line["r"] or 0, line["alpha"] or 0, line["lr"])):
        curve = found.setdefault((line["method"], line["r"], line["alpha"]), {})
        curve.setdefault(line["lr"], []).append(line.get("loss_b", math.inf))
    return found


def best(curve) -> list:
    """[rate below, best rate, rate above], by the mean over seeds; None beyond the edge of the grid."""
    rates = [None, *curve, None]
    i = rates.index(min(curve, key=lambda rate: fmean(curve[rate])))
    return rates[i - 1 : i + 2]


def table(lines) -> str:
    """Per method, rank and alpha: the best rate, its mean loss ± deviation over seeds, and those of its neighbours."""
    head, rows = ["method", "r", "alpha", "best lr", "loss B", "rate below", "rate above", "runs", "failed"], []
    for (name, r, alpha), curve in curves(lines).items():
        below, rate, above = best(curve)
        every = [loss for losses in curve.values() for loss in losses]
        counts = [str(len(every)), str(every.count(math.inf))]
        mean = _mean(curve[rate])
        if len(curve[rate]) > 1 and mean != "failed":
            mean += f" ± {stdev(curve[rate]):.3f}"
        neighbours = ["edge of grid" if x is None else f"{_mean(curve[x])} at {x:g}" for x in (below, above)]
        rows.append([name, str(r or ""), str(alpha or ""), f"{rate:g}", mean, *neighbours, *counts])
    errors = [line["error"] for line in lines if failed_otherwise(line)]
    text = [f"{len(errors)} failed otherwise ({e['type']}: {e['message']}): --retry-failed" for e in errors[:1]]
    return "\n".join([tables.table(head, rows), *text])


def _mean(losses) -> str:
    return "failed" if math.isinf(fmean(losses)) else f"{fmean(losses):.3f}"


def failed_otherwise(line) -> bool:
    """Whether the run failed for another reason than divergence."""
    return "error" in line and line["error"]["type"] != TrainingStopped.__name__


def record(lines, path, allow_edge=False):
    """Write each method's best rate in the form of learning_rates.json. Raises InputError if one is not known yet."""
    if any(map(failed_otherwise, lines)):
        raise InputError("record: runs failed for another reason than divergence; do them with --retry-failed")
    by_loss = sorted(curves(lines).items(), key=lambda item: least(item[1]), reverse=True)
    chosen = {name: curve for (name, *_), curve in by_loss}  # of several ranks, the best comes last and stays
    rates = {}
    for name, curve in sorted(chosen.items()):
        below, rates[name], above = best(curve)
        if math.isinf(least(curve)) or len(set(map(len, curve.values()))) > 1:
            raise InputError(f"record: {name} lacks seeds at some rates, or failed at every rate; sweep on")
        if None in (below, above) and not allow_edge:
            raise InputError(f"{name} is best at the edge of the grid, {rates[name]:g}; sweep beyond, or --allow-edge")
    recorded = {"default": median(rates.values()), "methods": rates}
    write_atomically(path, json.dumps(recorded, indent=2).encode() + b"\n")


def least(curve) -> float:
    """The mean loss at the best rate."""
    return min(map(fmean, curve.values()))
