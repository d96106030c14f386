"""The training step of two checkouts of minilora, timed in turns: is the second faster, and does it take less memory?

    python benchmarks/versus_commit.py BEFORE AFTER

BEFORE and AFTER are folders that each contain a ``minilora`` package, for example two git worktrees. By default the
rows are LoRA at sizes S, M and L, and the methods full, lora_fa, vera and dora at M, with one BLAS thread. That takes
some three minutes. ``--workers 2`` times minilora.train(workers=2); ``--sizes`` and ``--methods`` choose other rows;
``--rounds 2`` is a quick try; ``--json FILE`` keeps every time. The same folder twice shows the machine's noise.

Each checkout has a process of its own with its folder on PYTHONPATH. A step is forward, backward, clipping, AdamW and
after_step, as minilora.train() takes it and its history.seconds times it. The processes take turns, in alternating
order, so that a slow moment of the machine falls on both. Below 1, AFTER is faster: the ratio is AFTER / BEFORE of the
median step times, then the quartiles of that ratio over the rounds, then the ratio of processor time, which a busy
machine changes less. MB is the most memory that a process has had resident. The run stops unless the losses of the
first steps agree to 1e-4 nats per token.
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from contextlib import ExitStack
from pathlib import Path

from shapes import SIZES
from versus.command import Failure, say
from versus.side import Side

PAUSE = 0.05  # seconds before a turn, in which idle threads of the other process fall asleep
CHECKED, TOLERANCE = 4, 1e-4  # first steps, which are not timed, and how far their losses may be apart, nats per token
TURNS = {"tiny": (12, 8, 1), "S": (12, 12, 2), "M": (12, 4, 1), "L": (10, 2, 0), "XL": (6, 1, 0)}
# Rounds; timed steps of a turn; steps before them that are not timed, since a first step finds cold caches.
METHODS_AT_M = ["full", "lora_fa", "vera", "dora"]


def options():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("before", type=Path, help="a folder that contains a minilora package")
    parser.add_argument("after", type=Path, help="another one")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, help="S, M and L, if not given")
    parser.add_argument("--methods", nargs="+", help="lora, if not given")
    parser.add_argument("--workers", type=int, default=1, help="processes of minilora.train; 1, if not given")
    parser.add_argument("--rounds", type=int, help="turns of each checkout; by size, if not given")
    parser.add_argument("--json", type=Path, help="a file for every time that was taken")
    args = parser.parse_args()
    for folder in (args.before, args.after):
        if not (folder / "minilora/__init__.py").is_file():
            parser.error(f"{folder} has no minilora package")
    if args.workers < 1 or (args.rounds is not None and args.rounds < 1):
        parser.error("--workers and --rounds must be at least 1")
    return args


def plan(args):
    """(size, method) of every row."""
    if args.sizes or args.methods:
        return [(size, method) for size in args.sizes or ["S", "M", "L"] for method in args.methods or ["lora"]]
    return [(size, "lora") for size in ("S", "M", "L")] + [("M", method) for method in METHODS_AT_M]


def compare(size, method, args):
    """One row: the times of both checkouts, turn by turn, and the peak memory of their processes."""
    rounds, steps, warm = TURNS[size]
    rounds, warm = args.rounds or rounds, max(warm, int(args.workers > 1))  # new workers have pages to copy
    with ExitStack() as stack:
        sides, losses = {}, {}
        for label, folder in (("before", args.before.resolve()), ("after", args.after.resolve())):
            side = stack.enter_context(Side("commit", 1, PYTHONPATH=str(folder)))
            imported = side.ask("build", size=size, method=method, workers=args.workers)
            if imported != str(folder):
                raise Failure(f"{label}: minilora was imported from {imported} and not from {folder}")
            losses[label] = side.ask("train", n=CHECKED)["loss"]
            sides[label] = side
        apart = max(abs(a - b) for a, b in zip(losses["before"], losses["after"], strict=True))
        if not apart <= TOLERANCE:  # a NaN is not an agreement
            raise Failure(f"{size}, {method}: the losses are {apart:.1e} apart: {losses}")
        turns, own = {"before": [], "after": []}, {"before": [], "after": []}
        for i in range(rounds):
            for label in ("before", "after") if i % 2 == 0 else ("after", "before"):
                time.sleep(PAUSE)
                seen = sides[label].ask("train", n=warm + steps)
                turns[label].append(seen["ms"][warm:])
                own[label].append(seen["own_ms"])
        peaks = {label: side.ask("peak") for label, side in sides.items()}
    row = {"size": size, "method": method, "workers": args.workers, "ms": turns, "own_ms": own}
    return row | {"peak_mb": peaks, "losses": losses}


def line(row):
    """The row of the table."""
    before, after = row["ms"]["before"], row["ms"]["after"]
    middle = [statistics.median(itertools.chain(*turns)) for turns in (before, after)]
    ratios = [statistics.median(a) / statistics.median(b) for a, b in zip(after, before, strict=True)]
    quartiles = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else 3 * ratios
    spread = " … ".join(f"{q:.3f}" for q in quartiles)
    cells = [row["size"], row["method"], row["workers"], *(f"{ms:.2f}" for ms in middle)]
    cells += [f"**{middle[1] / middle[0]:.3f}**", spread]
    own = [statistics.median(row["own_ms"][label]) for label in ("before", "after")]
    cells.append("–" if row["workers"] > 1 else f"{own[1] / own[0]:.3f}")
    peaks = row["peak_mb"]["before"], row["peak_mb"]["after"]
    if None not in peaks:
        cells += [*(f"{mb:.0f}" for mb in peaks), f"{peaks[1] / peaks[0]:.3f}"]
    return "| " + " | ".join(map(str, cells)) + " |"


def run(args):
    begin, rows = time.perf_counter(), []
    print("| size | method | workers | before, ms | after, ms | after / before | quartiles | CPU | MB | MB | ratio |")
    print("| --- | --- | ---: | ---: | ---: | ---: | --- | ---: | ---: | ---: | ---: |", flush=True)
    for size, method in plan(args):
        rows.append(compare(size, method, args))
        print(line(rows[-1]), flush=True)
        if args.json:
            args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(f"{time.perf_counter() - begin:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    arguments = options()
    say("versus_commit", "pip install numpy threadpoolctl", lambda: run(arguments))
