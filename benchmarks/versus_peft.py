"""One training step of minilora and the same step of PyTorch + Hugging Face PEFT: times, memory, a table, a figure.

A step is forward, backward and AdamW on the six linears of every block, float32, r = 8, alpha = 16, no dropout, no
weight decay. The two sides are processes of their own. They first take five steps from the same weights on the same
batch and must show the same losses; then they are timed in turns, A B A B …, so that a busy moment of the machine
falls on both. README.md in this folder says how to run it, and what is fair about it and what is not.
"""

import argparse
import datetime
import json
import os
import shlex
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from shapes import SIZES
from versus import report, settings
from versus.command import Failure, check, say, stem
from versus.settings import CHECKED_STEPS, FIRST_STEP_ONLY, METHODS, MICRO_BATCHES, PROMPT, TOKENS
from versus.side import PAUSE, Side, SideError, in_turns, medians, ratio

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
OURS, THEIRS, COMPILED, MICRO = "minilora", "torch", "torch_compiled", "minilora_micro_batches"
INSTALL = "python3 -m venv .bench && .bench/bin/pip install torch==2.13.0 peft threadpoolctl ."


def options(words=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.error = lambda message: parser.exit(2, f"versus_peft: {message}\n")  # one line, without the usage
    parser.add_argument("--sizes", nargs="+", choices=SIZES, help="tiny, if not given")
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="lora, if not given")
    parser.add_argument("--threads", nargs="+", type=int, choices=[1, 2], help="of both sides; 1, if not given")
    parser.add_argument("--all", action="store_true", help="LoRA at S to XL on 1 and 2 threads, all methods at M")
    parser.add_argument("--rounds", type=int, help="turns of each side; by size, if not given")
    parser.add_argument("--steps-per-round", type=int, help="timed steps in a turn; by size, if not given")
    parser.add_argument("--compile", action="store_true", help="time torch.compile with fused AdamW as well")
    parser.add_argument("--out", type=Path, help="a folder, or a path without ending: .json and .png go there")
    args = parser.parse_args(words)
    if args.all and (args.sizes or args.methods or args.threads):
        parser.error("--all chooses --sizes, --methods and --threads itself; leave them out")
    if any(n is not None and n < 1 for n in (args.rounds, args.steps_per_round)):
        parser.error("--rounds and --steps-per-round must be at least 1")
    if max(args.threads or [1]) > CORES:
        parser.error(f"--threads {max(args.threads)}: this machine has {CORES} core(s)")
    if args.out:
        args.out = stem(parser, args.out, "versus_peft")
    return args


def plan(args):
    """(size, method, threads) of every row."""
    if not args.all:
        each = args.sizes or ["tiny"], args.methods or ["lora"], args.threads or [1]
        return [(size, method, threads) for threads in each[2] for size in each[0] for method in each[1]]
    lora = [(size, "lora", threads) for threads in (1, 2) if threads <= CORES for size in ("S", "M", "L", "XL")]
    return lora + [("M", method, 1) for method in METHODS if method != "lora"]


def wanted_sides(method, threads, compiled):
    """The sides of a row: label, module, its threads, what build is told; the first two must work."""
    sides = [(OURS, "ours", threads, {}), (THEIRS, "theirs", threads, {})]
    if threads > 1:  # each worker has one BLAS thread, which has to be said before NumPy is imported
        sides.append((workers_label(threads), "ours", 1, {"workers": threads}))
    elif method == "lora":
        sides.append((MICRO, "ours", threads, {"micro_batches": MICRO_BATCHES}))
    return sides + ([(COMPILED, "theirs", threads, {"compiled": True})] if compiled else [])


def workers_label(threads):
    return f"minilora_{threads}_workers"


def compare(size, method, threads, args, folder):
    """Check that all sides do the same work, then time them in turns: a row of the report, times in ms."""
    path = str(folder / "arrays.npz")
    with Side("ours", 1) as maker:
        maker.ask("make", size=size, method=method, path=path)
    row = {"size": size, "method": method, "threads": threads, "notes": []}
    with ExitStack() as stack:
        sides, built, losses = {}, {}, {}
        compiled = args.compile and (method == "lora" or not args.all)  # compiling takes half a minute and more
        for label, module, own_threads, told in wanted_sides(method, threads, compiled):
            cache = stack.enter_context(tempfile.TemporaryDirectory()) if label == COMPILED else None
            side = stack.enter_context(Side(module, own_threads, cache))
            try:
                built[label] = side.ask("build", size=size, method=method, path=path, **told)
                seen = side.ask("steps", n=CHECKED_STEPS)
            except SideError as error:
                if label in (OURS, THEIRS):
                    raise
                note = f"{label} is not timed: {error}"
                print(f"{size}, {method}, {threads} thread(s): {note}", file=sys.stderr)
                row["notes"].append(note)
                side.__exit__()  # at once, so that it is not there while the others are timed
                continue
            sides[label], losses[label] = side, [loss for loss, _ in seen]
            if label == COMPILED:
                row["compile_seconds"] = seen[0][1]
        row |= {"trained": built[OURS]["trained"], "torch_adamw": built[THEIRS]["adamw"], "losses": losses}
        if built[OURS]["trained"] != built[THEIRS]["trained"]:
            raise Failure(f"{size}, {method}: the two sides do not train the same number of parameters, {built}")
        row["loss_distance"] = check(
            losses, THEIRS, f"{size}, {method}", 1 if method in FIRST_STEP_ONLY else CHECKED_STEPS
        )
        for side in sides.values():
            side.ask("idle_rate")
        time_all(row, sides, args)
    return row


def time_all(row, sides, args):
    """Add to the row: steps of every side, then peak memory and kept bytes, then forward and generation of LoRA."""
    rounds, steps = settings.TURNS[row["size"]]
    rounds, steps = args.rounds or rounds, args.steps_per_round or steps
    warm = settings.UNTIMED.get(row["size"], 1)
    turns = in_turns(sides, rounds, what="step", n=steps, warm=warm)
    row |= {"rounds": rounds, "steps_per_round": steps, "ms_per_turn": turns, "ms": medians(turns)}
    row["best"] = min((label for label in (OURS, workers_label(row["threads"])) if label in turns), key=row["ms"].get)
    row["ratio_quartiles"] = ratio(turns[row["best"]], turns[THEIRS])
    if COMPILED in turns:
        row["compiled_ratio_quartiles"] = ratio(turns[row["best"]], turns[COMPILED])
    # Workers share pages with the process that forked them; what that process has says little.
    row["peak_mb"] = {label: side.ask("peak") for label, side in sides.items() if "workers" not in label}
    pair = {label: sides[label] for label in (OURS, THEIRS)}
    row["kept_bytes"] = {label: side.ask("kept") for label, side in pair.items()}
    if row["method"] != "lora":
        return
    turns = in_turns(pair, rounds, what="forward", n=steps, warm=warm)
    row |= {"forward_ms_per_turn": turns, "forward_ms": medians(turns)}
    row["forward_ratio_quartiles"] = ratio(turns[OURS], turns[THEIRS])
    n = min(TOKENS, SIZES[row["size"]][1] - PROMPT)
    texts = {label: side.ask("generate", prompt=PROMPT, n=n) for label, side in pair.items()}
    same = [a == b for a, b in zip(texts[OURS], texts[THEIRS], strict=True)]
    row["generated"] = {"tokens": n, "alike_from_the_start": [*same, False].index(False)}
    turns = {label: [] for label in pair}
    for _ in range(min(rounds, 4)):
        for label, side in pair.items():
            time.sleep(PAUSE)
            begin = time.perf_counter()
            side.ask("generate", prompt=PROMPT, n=n)
            turns[label].append(1e3 * (time.perf_counter() - begin))
    row["generate_ms_per_turn"] = turns
    row["tokens_per_second"] = {label: 1e3 * n / statistics.median(ms) for label, ms in turns.items()}


def startup(folder, rounds=5):
    """Seconds from before the first import to the end of the first LoRA step at size S: a fresh process each time."""
    path, seconds = str(folder / "arrays.npz"), {OURS: [], THEIRS: []}
    told = {"size": "S", "method": "lora", "path": path}
    with Side("ours", 1) as maker:
        maker.ask("make", **told)
    for _ in range(rounds):
        for label, module, more in ((OURS, "ours", {}), (THEIRS, "theirs", {"adamw": "foreach"})):
            with Side(module, 1) as side:
                seconds[label].append(side.ask("startup", **told, **more))
    return {"seconds": seconds, "median": medians(seconds)}


def machine():
    """(what the figures depend on: CPU, versions, date; the memory of each side's imports, MB)."""
    facts, imports = {"cores": CORES, "date": datetime.date.today().isoformat()}, {}
    for label, module in ((OURS, "ours"), (THEIRS, "theirs")):
        with Side(module, 1) as side:
            imports[label] = side.ask("imports")
            facts |= side.ask("facts")
    return facts, imports


def run(args):
    facts, imports = machine()
    print("; ".join(f"{key} {value}" for key, value in facts.items()), file=sys.stderr)
    del facts["minilora is"]  # a path, of interest while it runs
    command = shlex.join(["versus_peft.py", *sys.argv[1:]])
    seen = {"machine": facts, "imports_mb": imports, "command": command, "rows": []}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        if args.all:
            seen["startup"] = startup(folder)
        for row in plan(args):
            begin = time.perf_counter()
            seen["rows"].append(compare(*row, args, folder))
            row = seen["rows"][-1]
            print(report.line(row), f"({time.perf_counter() - begin:.0f} s)", file=sys.stderr)
            if args.out:  # after every row, so that a run that is stopped leaves what it had
                args.out.with_suffix(".json").write_text(json.dumps(seen, indent=1) + "\n", encoding="utf-8")
    print(*report.tables(seen).values(), sep="\n\n")
    if args.out:
        from versus.plot import draw

        draw(seen, args.out.with_suffix(".png"))


def main():
    args = options()
    say("versus_peft", INSTALL, lambda: run(args))


if __name__ == "__main__":
    main()
