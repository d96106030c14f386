"""One training step on a GPU: minilora on CuPy beside PyTorch + PEFT, eager and compiled, and minilora on NumPy.

LoRA with r = 8 on the six linears of every block, float32, AdamW; the same weights, adapters and tokens on all sides,
whose first five losses must agree. Each side is a process of its own and has the card to itself while it is timed. A
step ends with its loss on the host, which waits for the GPU. README.md in this folder says how to run it; docs/gpu.md
has the results.
"""

import argparse
import datetime
import math
import shlex
import statistics
import sys
import tempfile
from pathlib import Path

from shapes import SIZES
from versus.command import Failure, say, stem, write
from versus.report import table
from versus.settings import CHECKED_STEPS, TOLERANCE
from versus.side import Side, SideError

SIDES = {  # name: module, what build is told, how it is called in a table
    "numpy": ("ours", {}, "minilora, NumPy"),
    "cupy": ("ours", {"device": "cuda"}, "minilora, CuPy"),
    "torch": ("theirs", {"device": "cuda"}, "PyTorch + PEFT"),
    "compile": ("theirs", {"device": "cuda", "compiled": True}, "torch.compile"),
    "graphs": ("theirs", {"device": "cuda", "compiled": "reduce-overhead"}, "torch.compile, CUDA graphs"),
}
ON_THE_GPU = [name for name, (_, told, _) in SIDES.items() if told]
TF32, TF32_TOLERANCE = "_tf32", 1e-2  # TF32 keeps 10 bits of a number's 23
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
    parser.add_argument(
        "--tf32", action="store_true", help="time the sides on the GPU with TF32 as well; else it is off"
    )
    parser.add_argument(
        "--all", action="store_true", help=f"all sizes, each at its own batch and at {BATCHES}, with TF32"
    )
    parser.add_argument("--seconds", type=float, default=2.0, help="time for the timed steps of each side")
    parser.add_argument("--threads", type=int, default=1, help="of NumPy's BLAS")
    parser.add_argument("--out", type=Path, help="a folder, or a path without ending: .json and .md go there")
    args = parser.parse_args(words)
    if args.all and (args.sizes or args.batches):
        parser.error("--all chooses --sizes and --batches itself; leave them out")
    if args.batches and min(args.batches) < 1:
        parser.error("--batches must be at least 1")
    if not 0.0 < args.seconds < math.inf or args.threads < 1:
        parser.error("--seconds must be above 0 and finite, --threads at least 1")
    args.tf32 = args.tf32 or args.all
    if args.out:
        args.out = stem(parser, args.out, "gpu")
    return args


def plan(args):
    """(size, batch) of every row."""
    if args.all:
        return [(size, batch) for size in SIZES for batch in sorted({*BATCHES, SIZES[size][-1]})]
    return [(size, batch) for size in args.sizes or ["tiny"] for batch in args.batches or [SIZES[size][-1]]]


def labels(args):
    """The sides of a row; those with TF32 behind the others."""
    return args.sides + [name + TF32 for name in args.sides if args.tf32 and name in ON_THE_GPU]


def title(label):
    return SIDES[label.removesuffix(TF32)][2] + (", TF32" if label.endswith(TF32) else "")


def measure(label, size, path, args):
    """What one side shows: losses, the ms of each timed step, the memory that it has taken from the card."""
    module, told, _ = SIDES[label.removesuffix(TF32)]
    on = label.endswith(TF32)
    told = told | ({"tf32": on} if module == "theirs" else {})
    with tempfile.TemporaryDirectory() as cache, Side(module, args.threads, cache, CUPY_TF32=str(int(on))) as side:
        built = side.ask("build", size=size, method="lora", path=path, **told)
        seen = side.ask("steps", n=CHECKED_STEPS)
        side.ask("idle_rate")
        once = 1e-3 * statistics.median(side.ask("turn", what="step", n=3, warm=1))
        n = min(STEPS[1], max(STEPS[0], int(args.seconds / once)))
        ms = side.ask("turn", what="step", n=n, warm=WARM if once < 1.0 else 0)
        losses, seconds = zip(*seen, strict=True)
        return built | {"losses": losses, "first_step_s": seconds[0], "ms": ms, "pool_bytes": side.ask("pool")}


def row_of(size, batch, args, slow):
    """All sides of one size and batch. ``slow``: seconds of a token on the CPU, by size, as far as they are known."""
    row = {"size": size, "batch": batch, "tokens": batch * SIZES[size][1], "sides": {}, "notes": []}
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "arrays.npz")
        with Side("ours", 1) as maker:
            maker.ask("make", size=size, method="lora", path=path, batch=batch)
        for label in labels(args):
            if label == "numpy" and (guess := slow.get(size, 0.0) * row["tokens"]) > MOST_SECONDS:
                row["notes"].append(f"{title(label)} is left out: a step would take some {guess:.0f} s")
                continue
            try:
                row["sides"][label] = measure(label, size, path, args)
            except SideError as error:
                if error.missing:
                    raise
                row["notes"].append(f"{title(label)} is not timed: {error}")
                print(f"{size}, batch {batch}: {row['notes'][-1]}", file=sys.stderr)
                continue
            if label == "numpy":
                slow[size] = 1e-3 * statistics.median(row["sides"][label]["ms"]) / row["tokens"]
    if not row["sides"]:
        raise Failure(f"{size}, batch {batch}: no side could be timed; {'; '.join(row['notes'])}")
    check(row)
    ours = next((s for s in row["sides"].values() if "numbers" in s), None)
    row["numbers"] = ours["numbers"] if ours else None
    return row


def check(row):
    """Every side has trained as many numbers, with the losses of the first. Raises Failure."""
    where = f"{row['size']}, batch {row['batch']}"
    (first, one), *_ = row["sides"].items()
    for label, side in row["sides"].items():
        distances = [abs(a - b) for a, b in zip(side["losses"], one["losses"], strict=True)]
        allowed = TF32_TOLERANCE if label.endswith(TF32) else TOLERANCE
        if side["trained"] != one["trained"]:
            raise Failure(f"{where}: {label} trains {side['trained']} numbers, {first} {one['trained']}")
        if not all(distance <= allowed for distance in distances):  # a NaN is no agreement
            raise Failure(
                f"{where}: {label} and {first} differ by more than {allowed}: {side['losses']}, {one['losses']}"
            )
        if not side["losses"][0] - side["losses"][-1] > 100 * TOLERANCE:
            raise Failure(f"{where}: the loss fell too little for the check to mean much: {side['losses']}")


# ------------------------------------------------------------------------------------------------------- the report


def ms_of(row, label):
    return statistics.median(row["sides"][label]["ms"]) if label in row["sides"] else None


def known(rows):
    """The labels that any row has, in order."""
    seen = {label for row in rows for label in row["sides"]}
    return [label + end for end in ("", TF32) for label in SIDES if label + end in seen]


def table_of(rows, labels, value, unit):
    """A line for each row, a column for each of ``labels``: ``value(row, label)`` as text, or a dash for None."""
    heads = ["size", "batch:", "tokens:", *(f"{title(label)}, {unit}:" for label in labels)]
    cells = [[value(row, label) if label in row["sides"] else "–" for label in labels] for row in rows]
    first = [[row["size"], str(row["batch"]), f"{row['tokens']:,}"] for row in rows]
    return table(heads, [a + b for a, b in zip(first, cells, strict=True)])


def page(seen):
    """The whole report."""
    rows, facts = seen["rows"], "; ".join(f"{key} {value}" for key, value in seen["machine"].items())
    parts = ["# One training step on a GPU", f"{facts}.", f"```sh\npython benchmarks/{seen['command']}\n```"]
    parts.append("Medians. LoRA, r = 8, six linears in each block, AdamW, float32; the same losses on all sides.")
    for how, end in (("With TF32 off:", ""), ("With TF32 on:", TF32)):
        labels = [label for label in known(rows) if label.endswith(TF32) == bool(end)]
        if labels:
            parts += [how, table_of(rows, labels, lambda row, label: f"{ms_of(row, label):.2f}", "ms")]
    notes = [f"- {row['size']}, batch {row['batch']}: {note}" for row in rows for note in row["notes"]]
    parts += ["\n".join(notes)] if notes else []
    labels = [label for label in known(rows) if label in ON_THE_GPU]
    if labels:
        pool = table_of(rows, labels, lambda row, label: f"{row['sides'][label]['pool_bytes'] / 2**20:,.0f}", "MiB")
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
    seen = {"machine": machine(args), "command": shlex.join(["gpu.py", *sys.argv[1:]]), "tf32": args.tf32, "rows": []}
    print("; ".join(f"{key} {value}" for key, value in seen["machine"].items()), file=sys.stderr)
    slow = {}
    for size, batch in plan(args):
        seen["rows"].append(row_of(size, batch, args, slow))
        row = seen["rows"][-1]
        times = ", ".join(f"{title(label)} {ms_of(row, label):.2f} ms" for label in row["sides"])
        print(f"{size}, batch {batch}: {times}", file=sys.stderr)
        if args.out:
            write(seen, page(seen), args.out)
    print(page(seen))


def main():
    args = options()
    say("gpu", INSTALL, lambda: run(args))


if __name__ == "__main__":
    main()
