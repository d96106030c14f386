"""The training step of two checkouts of minilora, timed in turns: is the second faster, and does it take less memory?

    python benchmarks/versus_commit.py BEFORE AFTER

BEFORE and AFTER are folders that each contain a ``minilora`` package, for example two git worktrees. By default the
rows are LoRA at sizes S, M and L, and the methods full, lora_fa, vera and dora at M, with one BLAS thread. That takes
some three minutes. ``--workers 2`` times minilora.train(workers=2); ``--sizes`` and ``--methods`` choose other rows;
``--rounds 2`` is a quick try; ``--json FILE`` keeps every turn. The same folder twice shows the machine's noise.

Each checkout has a process of its own, and the two take turns, so that a slow moment of the machine falls on both.
Below 1, AFTER is faster: AFTER ÷ BEFORE is the median over the rounds, then come its quartiles, then the ratio of
processor time, which a busy machine changes less. MB is the most memory that a process has had resident. The run stops
unless the losses of the first steps agree to 1e-4 nats per token.
"""

import argparse
import json
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from shapes import SIZES
from versus import settings
from versus.command import Failure, check, say
from versus.side import Side, in_turns, medians, ratio

ROWS = [("S", "lora"), ("M", "lora"), ("L", "lora"), *(("M", name) for name in ("full", "lora_fa", "vera", "dora"))]
HEADS = "size", "method", "before, ms", "after, ms", "after / before", "quartiles", "CPU", "MB before", "MB after"


def options():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("before", type=Path, help="a folder that contains a minilora package")
    parser.add_argument("after", type=Path, help="another one")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, help="S, M and L, if not given")
    parser.add_argument("--methods", nargs="+", help="lora, if not given")
    parser.add_argument("--workers", type=int, default=1, help="processes of minilora.train; 1, if not given")
    parser.add_argument("--rounds", type=int, help="turns of each checkout; by size, if not given")
    parser.add_argument("--json", type=Path, help="a file for every turn's time")
    args = parser.parse_args()
    for folder in (args.before, args.after):
        if not (folder / "minilora/__init__.py").is_file():
            parser.error(f"{folder} has no minilora package")
    if args.workers < 1 or (args.rounds is not None and args.rounds < 1):
        parser.error("--workers and --rounds must be at least 1")
    return args


def compare(size, method, args, path):
    """One row: the times of both checkouts, turn by turn, and the peak memory of their processes."""
    with ExitStack() as stack:
        sides, losses = {}, {}
        for label, folder in (("before", args.before.resolve()), ("after", args.after.resolve())):
            side = sides[label] = stack.enter_context(Side("ours", 1, PYTHONPATH=str(folder)))
            imported = side.ask("where")
            if imported != str(folder / "minilora"):
                raise Failure(f"{label}: minilora was imported from {imported} and not from {folder}")
            if label == "before":
                side.ask("make", size=size, method=method, path=path)
            side.ask("build", size=size, method=method, path=path, workers=args.workers)
            losses[label] = [loss for loss, _ in side.ask("steps", n=settings.CHECKED_STEPS)]
        check(losses, "before", f"{size}, {method}")
        rounds, steps = settings.TURNS[size]
        begin = {label: side.ask("cpu") for label, side in sides.items()}
        ms = in_turns(sides, args.rounds or rounds, what="step", n=steps, warm=settings.UNTIMED.get(size, 1))
        cpu = {label: side.ask("cpu") - begin[label] for label, side in sides.items()}
        peak = {label: side.ask("peak") for label, side in sides.items()}
    row = {"size": size, "method": method, "workers": args.workers, "losses": losses}
    return row | {"ms": ms, "cpu_seconds": cpu, "peak_mb": peak}


def line(row):
    """The row of the table. Processor time is not known of workers, nor memory where the system does not say."""
    low, middle, high = ratio(row["ms"]["after"], row["ms"]["before"])
    cells = [row["size"], row["method"], *(f"{ms:.2f}" for ms in medians(row["ms"]).values())]
    cells += [f"**{middle:.3f}**", f"{low:.3f} … {high:.3f}"]
    cells.append("–" if row["workers"] > 1 else f"{row['cpu_seconds']['after'] / row['cpu_seconds']['before']:.3f}")
    cells += ["–" if mb is None else f"{mb:.0f}" for mb in row["peak_mb"].values()]
    return "| " + " | ".join(cells) + " |"


def run(args):
    begin, rows, plan = time.perf_counter(), [], ROWS
    if args.sizes or args.methods:
        plan = [(size, method) for size in args.sizes or ["S", "M", "L"] for method in args.methods or ["lora"]]
    print(f"| {' | '.join(HEADS)} |\n|{' --- |' * len(HEADS)}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for size, method in plan:
            rows.append(compare(size, method, args, f"{folder}/arrays.npz"))
            print(line(rows[-1]), flush=True)
            if args.json:
                args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(f"{time.perf_counter() - begin:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    arguments = options()
    say("versus_commit", "pip install numpy threadpoolctl", lambda: run(arguments))
