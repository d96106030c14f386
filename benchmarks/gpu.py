"""One training step on a GPU: minilora on CuPy beside PyTorch + PEFT, eager and compiled, and minilora on NumPy.

LoRA with r = 8 on the six linears of every block, float32, AdamW; the same weights, adapters and tokens on all sides,
whose first five losses must agree. Each side is a process of its own and has the card to itself while it is timed. A
step ends with its loss on the host, which waits for the GPU. README.md in this folder says how to run it; docs/gpu.md
has the results.
"""

import argparse
import datetime
import json
import math
import shlex
import statistics
import sys
import tempfile
from pathlib import Path

from shapes import SIZES
from versus.command import Failure, check, say, stem
from versus.report import table
from versus.settings import CHECKED_STEPS
from versus.side import Side, SideError

SIDES = {  # name: module, what build is told, how it is called in a table
    "numpy": ("ours", {}, "minilora, NumPy"),
    "cupy": ("ours", {"device": "cuda"}, "minilora, CuPy"),
    "torch": ("theirs", {"device": "cuda"}, "PyTorch + PEFT"),
    "compile": ("theirs", {"device": "cuda", "compiled": True}, "torch.compile"),
    "graphs": ("theirs", {"device": "cuda", "compiled": "reduce-overhead"}, "torch.compile, CUDA graphs"),
}
ON_THE_GPU = [name for name, (_, told, _) in SIDES.items() if told]
BATCHES = [1, 4, 16, 64]
MOST_SECONDS = 5.0  # of a step on the CPU: a batch that would take longer is left out
STEPS, WARM = (5, 200), 5  # least and most timed steps; untimed ones before them
INSTALL = "python3 -m venv .gpu && .gpu/bin/pip install -e '.[gpu13]' torch==2.13.0 peft"


def options(words=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.error = lambda message: parser.exit(2, f"gpu: {message}\n")  # one line, without the usage
    parser.add_argument("--sizes", nargs="+", choices=SIZES, help="tiny, if not given")
    parser.add_argument("--batches", nargs="+", type=int, metavar="B", help="sequences per step; each size's own")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES), help="all, if not given")
    parser.add_argument("--all", action="store_true", help=f"all sizes, each at its own batch and at {BATCHES}")
    parser.add_argument("--seconds", type=float, default=2.0, help="time for the timed steps of each side")
    parser.add_argument("--threads", type=int, default=1, help="of NumPy's BLAS")
    parser.add_argument("--out", type=Path, help="a folder, or a path without ending: .json and .md go there")
    args = parser.parse_args(words)
    if args.all and (args.sizes or args.batches):
        parser.error("--all chooses --sizes and --batches itself; leave them out")
    if min(args.batches or [1]) < 1 or args.threads < 1 or not 0.0 < args.seconds < math.inf:
        parser.error("--batches and --threads must be at least 1, --seconds above 0 and finite")
    if args.out:
        args.out = stem(parser, args.out, "gpu")
    return args


def plan(args):
    """(size, batch) of every row."""
    if args.all:
        return [(size, batch) for size in SIZES for batch in sorted({*BATCHES, SIZES[size][-1]})]
    return [(size, batch) for size in args.sizes or ["tiny"] for batch in args.batches or [SIZES[size][-1]]]


def measure(name, size, path, args):
    """What one side shows: losses, the ms of each timed step, the memory that it has taken from the card."""
    module, told, _ = SIDES[name]
    with tempfile.TemporaryDirectory() as cache, Side(module, args.threads, cache, CUPY_TF32="0") as side:
        built = side.ask("build", size=size, method="lora", path=path, **told)
        seen = side.ask("steps", n=CHECKED_STEPS)
        side.ask("idle_rate")
        once = 1e-3 * statistics.median(side.ask("turn", what="step", n=3, warm=1))
        n = min(STEPS[1], max(STEPS[0], int(args.seconds / once)))
        ms = side.ask("turn", what="step", n=n, warm=WARM if once < 1.0 else 0)
        losses, seconds = zip(*seen, strict=True)
        return built | {"losses": losses, "first_step_s": seconds[0], "ms": ms, "pool_bytes": side.ask("pool")}


def row_of(size, batch, args, slow):
    """All sides at a size and a batch. ``slow``: seconds per token of NumPy's last batch at each size."""
    row = {"size": size, "batch": batch, "tokens": batch * SIZES[size][1], "sides": {}, "notes": []}
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "arrays.npz")
        with Side("ours", 1) as maker:
            maker.ask("make", size=size, method="lora", path=path, batch=batch)
        for name in args.sides:
            if name == "numpy" and (guess := slow.get(size, 0.0) * row["tokens"]) > MOST_SECONDS:
                row["notes"].append(f"{name} is left out: a step would take some {guess:.0f} s")
                continue
            try:
                row["sides"][name] = measure(name, size, path, args)
            except SideError as error:
                if error.missing:
                    raise
                row["notes"].append(f"{name} is not timed: {error}")
                print(f"{size}, batch {batch}: {row['notes'][-1]}", file=sys.stderr)
        if "numpy" in row["sides"]:
            slow[size] = 1e-3 * ms_of(row, "numpy") / row["tokens"]
    if not row["sides"]:
        raise Failure(f"{size}, batch {batch}: no side could be timed; {'; '.join(row['notes'])}")
    where = f"{size}, batch {batch}"
    if len(trained := {side["trained"] for side in row["sides"].values()}) > 1:
        raise Failure(f"{where}: the sides do not train as many numbers, {trained}")
    check({name: side["losses"] for name, side in row["sides"].items()}, next(iter(row["sides"])), where)
    return row


# ------------------------------------------------------------------------------------------------------- the report


def ms_of(row, name):
    return statistics.median(row["sides"][name]["ms"])


def table_of(rows, names, value, unit):
    """A line for each row, a column for each side of ``names``: ``value(row, name)`` as text, a dash for None."""
    heads = ["size", "batch:", "tokens:", *(f"{SIDES[name][2]}, {unit}:" for name in names)]
    cells = [[value(row, name) if name in row["sides"] else "–" for name in names] for row in rows]
    first = [[row["size"], str(row["batch"]), f"{row['tokens']:,}"] for row in rows]
    return table(heads, [a + b for a, b in zip(first, cells, strict=True)])


def page(seen):
    """The whole report."""
    rows, facts = seen["rows"], "; ".join(f"{key} {value}" for key, value in seen["machine"].items())
    parts = ["# One training step on a GPU", f"{facts}.", f"```sh\npython benchmarks/{seen['command']}\n```"]
    parts.append("Medians. LoRA, r = 8, six linears in each block, AdamW, float32; the same losses on all sides.")
    known = [name for name in SIDES if any(name in row["sides"] for row in rows)]
    parts.append(table_of(rows, known, lambda row, name: f"{ms_of(row, name):.2f}", "ms"))
    parts += [f"- {row['size']}, batch {row['batch']}: {note}" for row in rows for note in row["notes"]]
    there = [name for name in known if name in ON_THE_GPU]
    if there:
        pool = table_of(rows, there, lambda row, name: f"{row['sides'][name]['pool_bytes'] / 2**20:,.0f}", "MiB")
        parts += ["## The most memory taken from the card", pool]
    return "\n\n".join(parts)


# ------------------------------------------------------------------------------------------------------- the run


def machine(args):
    """What the figures depend on. Raises Failure where a GPU is wanted and there is none."""
    facts = {}
    with Side("ours", args.threads) as side:
        card = side.ask("gpu")
        if any(name in ON_THE_GPU for name in args.sides):
            if card["reason"]:
                raise Failure(f"no GPU: {card['reason']} (--sides numpy needs none)")
            facts["GPU"] = card["devices"][0]["name"]
            facts["the driver's CUDA"] = card["driver_cuda"]
            facts |= {"CuPy": card["cupy"], "CuPy's CUDA": card["runtime"]}
        facts |= side.ask("facts")
        print(f"minilora is {facts.pop('minilora is')}", file=sys.stderr)
    if any(SIDES[name][0] == "theirs" for name in args.sides):
        with Side("theirs", args.threads) as side:
            facts |= side.ask("facts")
    return facts | {"threads": args.threads, "date": datetime.date.today().isoformat()}


def run(args):
    seen = {"machine": machine(args), "command": shlex.join(["gpu.py", *sys.argv[1:]]), "rows": []}
    print("; ".join(f"{key} {value}" for key, value in seen["machine"].items()), file=sys.stderr)
    slow = {}
    for size, batch in plan(args):
        row = row_of(size, batch, args, slow)
        seen["rows"].append(row)
        times = ", ".join(f"{name} {ms_of(row, name):.2f} ms" for name in row["sides"])
        print(f"{size}, batch {batch}: {times}", file=sys.stderr)
        if args.out:  # after every row, so that a run that is stopped leaves what it had
            args.out.with_suffix(".json").write_text(json.dumps(seen, indent=1) + "\n", encoding="utf-8")
            args.out.with_suffix(".md").write_text(page(seen) + "\n", encoding="utf-8")
    print(page(seen))


def main():
    args = options()
    say("gpu", INSTALL, lambda: run(args))


if __name__ == "__main__":
    main()
