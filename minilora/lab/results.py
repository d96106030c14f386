"""The runs of a sweep as lines of a file: what a run is, reading them, the best rates among them."""

import json
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from statistics import fmean, median, stdev

from .. import methods
from ..errors import InputError, TrainingStopped
from ..files.saving import write_atomically

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
        *whole, half = (Path(path).read_bytes() if Path(path).exists() else b"").split(b"\n")
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
    """Per method, rank and alpha: the best rate, its mean loss ± deviation over seeds, and the losses beside it."""
    form = "{:<20} {:>4} {:>6} {:>8} {:>14}  {:>16} {:>16} {:>5} {:>6}"
    rows = [form.format("method", "r", "alpha", "best lr", "loss B", "rate below", "rate above", "runs", "failed")]
    for (name, r, alpha), curve in curves(lines).items():
        rates, every = best(curve), [loss for losses in curve.values() for loss in losses]
        cells = ["edge of grid" if v is None else f"{fmean(curve[v]):.3f} at {v:g}" for v in rates]
        below, mean, above = (cell.replace("inf", "failed") for cell in cells)
        spread = f" ± {stdev(curve[rates[1]]):.3f}" if len(curve[rates[1]]) > 1 and mean[0] != "f" else ""
        rows.append(form.format(name, r or "", alpha or "", f"{rates[1]:g}", mean.split()[0] + spread, below, above,
                                len(every), every.count(math.inf)))  # fmt: skip
    errors = [line["error"] for line in lines if "error" in line and line["error"]["type"] != TrainingStopped.__name__]
    rows += [f"{len(errors)} failed otherwise ({e['type']}: {e['message']}): --retry-failed" for e in errors[:1]]
    return "\n".join(rows)


def record(lines, path, allow_edge=False):
    """Write each method's best rate as learning_rates.json has them. Raises InputError where it is not known yet."""
    if any("error" in line and line["error"]["type"] != TrainingStopped.__name__ for line in lines):
        raise InputError("record: runs failed for another reason than divergence; do them with --retry-failed")
    by_least = sorted(curves(lines).items(), key=lambda item: min(map(fmean, item[1].values())), reverse=True)
    chosen, rates = {name: curve for (name, *_), curve in by_least}, {}  # of several ranks, the best comes last
    for name, curve in sorted(chosen.items()):
        below, rates[name], above = best(curve)
        if math.isinf(fmean(curve[rates[name]])) or len(set(map(len, curve.values()))) > 1:
            raise InputError(f"record: {name} lacks seeds at some rates, or failed at every rate; sweep on")
        if None in (below, above) and not allow_edge:
            raise InputError(f"{name} is best at the edge of the grid, {rates[name]:g}; sweep beyond, or --allow-edge")
    write_atomically(path, json.dumps({"default": median(rates.values()), "methods": rates}, indent=2).encode() + b"\n")
