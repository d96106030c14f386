"""``minilora sweep``: method × rank × alpha × learning rate × seed, on local processes or a Dask cluster.

One JSON line per run, on the disk before the next is looked at: a sweep that was stopped goes on where it stopped.
"""

import json
import math
import os
import socket
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, wait
from contextlib import closing
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from statistics import fmean

import numpy as np

from .. import methods
from ..errors import InputError, TrainingStopped
from ..files.base import fingerprint, load_base
from ..files.saving import writable_folder, write_atomically
from ..plots import png
from ..surgery import count_parameters, plan
from ..training.optim import check_positive
from ..training.progress import progress_bar
from . import figures
from .executors import Local, cluster
from .results import MARK, Run, read, record, table
from .task import Task, tune


def grid(names, ranks, alphas, rates, seeds, steps, batch, base=None) -> list[Run]:
    """Each combination once; ranks and alphas count only for methods that have them. InputError for unusable ones."""
    for what, values in {"methods": names, "r": ranks, "alpha": alphas, "lr": rates, "seeds": seeds}.items():
        if not values or len(set(values)) < len(values):
            raise InputError(f"sweep: {what} is {list(values)}; give at least one value, and each value once")
    path, runs = base and str(Path(base).resolve()), {}  # a worker may have another working directory
    model = load_base(path)
    for name, r, alpha, rate, seed in product(names, ranks, alphas, rates, seeds):
        check_positive(lr=rate, steps=steps, batch=batch)
        check_positive(zero_allowed=True, seed=seed)
        own = methods.known(name, r=r, alpha=alpha and float(alpha))
        run = Run(name, float(rate), seed, steps, batch, path, **own)
        plan(model, run.adapter())
        runs[run.key()] = run
    return list(runs.values())


def execute(run: Run) -> dict:
    """Do ``run`` in this process, whichever it is, and return its line. Raises TrainingStopped where it diverges."""
    line = asdict(run) | {"started": f"{datetime.now(UTC):%FT%TZ}", "worker": f"{socket.gethostname()}:{os.getpid()}"}
    task = Task(run.base, "cpu", selection=True)  # a rate must not be chosen on the play that results are for
    with np.errstate(all="ignore"):  # a run that diverges overflows first
        model, history, _ = tune(task, run.adapter(), run.steps, run.lr, run.batch, run.seed, progress=False)
        (loss_a, loss_b), (_, before) = task.losses(model), task.losses(task.model)
    if not math.isfinite(loss_a + loss_b):
        raise TrainingStopped(f"the held-out losses after training are {loss_a} on A and {loss_b} on B")
    return line | {
        "loss_b": loss_b, "loss_a": loss_a, "loss_b_before": before,
        "train_loss": fmean(history.loss[-math.ceil(run.steps / 10) :]),  # the last tenth of the steps
        "trainable": count_parameters(model)[0], "kept_bytes": history.kept_bytes,
        "seconds_per_step": history.seconds_per_step, "base_sha256": fingerprint(task.model),
    }  # fmt: skip


def sweep(runs, executor, path, report=print, retry_failed=False, ahead=math.inf, progress=None) -> list:
    """Do the ``runs`` that the file lacks, ``ahead`` at a time, on any concurrent.futures.Executor; all its lines.

    Raises InputError, with nothing written, for a file that is not a sweep's, or not of runs comparable with these.
    """
    lines, size = read(path)
    settings = {(of["steps"], of["batch"], of["base"]) for of in [*lines.values(), *map(asdict, runs)]}
    models = {line["base_sha256"] for line in lines.values() if "loss_b" in line}
    if len(settings) > 1 or len(models | {fingerprint(load_base(run.base)) for run in runs[:1]}) > 1:
        raise InputError(f'"{path}" holds runs with other steps, batch or base model; choose another file with --out')
    writable_folder(Path(path).parent)
    if os.path.exists(path) and not os.access(path, os.W_OK):
        raise InputError(f'"{path}" cannot be written to; choose another file with --out')
    todo = [run for run in runs if (line := lines.get(run.key())) is None or (retry_failed and "error" in line)]
    report(f"{len(runs)} runs, {len(runs) - len(todo)} of them done already; results go to {path}")
    results = _results(todo, executor, ahead)
    with open(path, "ab") as file, progress_bar(len(runs), "sweep", progress) as bar, closing(results):
        file.truncate(size)
        bar.update(len(runs) - len(todo))
        for run, line in results:
            file.write(MARK + json.dumps(line).encode()[1:] + b"\n")
            file.flush()
            os.fsync(file.fileno())
            lines[run.key()] = line
            losses = [(line["loss_b"], line["method"], line["lr"]) for line in lines.values() if "loss_b" in line]
            bar.set_postfix_str("best {:.3f}, {} at {:g}".format(*min(losses)) if losses else "", refresh=False)
            bar.update()
    return list(lines.values())


def _results(runs, executor, ahead):
    """(run, line) as the runs end, with "error" for one that fails; what a broken executor held is submitted again."""
    todo, pending = [(run, False) for run in runs], {}
    try:
        while todo or pending:
            while todo and len(pending) < ahead:
                run, again = todo.pop(0)
                try:
                    future = executor.submit(execute, run)
                except BrokenExecutor as error:
                    (future := Future()).set_exception(error)
                pending[future] = run, again
            for future in wait(pending, return_when=FIRST_COMPLETED).done:
                run, again = pending.pop(future)
                try:
                    line = future.result()
                except Exception as error:
                    if isinstance(error, BrokenExecutor) and not again:
                        todo.append((run, True))
                        continue
                    line = asdict(run) | {"error": {"type": type(error).__name__, "message": str(error)}}
                yield run, line
    finally:
        for future in pending:
            future.cancel()


def add_arguments(parser):
    """The flags of ``minilora sweep``."""
    add, rates = parser.add_argument, [1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2]
    add("--methods", nargs="+", metavar="NAME", help="methods to sweep; all by default")
    add("--r", nargs="+", type=int, metavar="R", help="ranks; each method's own by default")
    add("--alpha", nargs="+", type=float, metavar="ALPHA", help="scales; each method's own by default")
    add("--lr", nargs="+", type=float, metavar="LR", default=rates, help="learning rates")
    add("--seeds", nargs="+", type=int, metavar="SEED", default=[0, 1, 2], help="seeds of each combination")
    add("--steps", type=int, default=150, help="training steps of a run")
    add("--batch", type=int, default=8, help="sequences per step")
    add("--base", metavar="FILE", help="a model file that every worker can read; the shipped one by default")
    add("--workers", type=int, metavar="N", default=os.cpu_count() or 1, help="local processes")
    add("--dask", metavar="ADDRESS", help="run on this Dask cluster instead, such as tcp://127.0.0.1:8786")
    add("--out", default="sweep.jsonl", metavar="FILE", help="one JSON line per run; the same command again resumes")
    add("--retry-failed", action="store_true", help="do failed runs again")
    add("--report", action="store_true", help="run nothing; print a table of --out and draw it beside it as .png")
    add("--record", metavar="FILE", help="run nothing; write the best rates of --out as learning_rates.json has them")
    add("--allow-edge", action="store_true", help="let --record take a rate at the edge of the grid")


def run_sweep(args):
    """Do what the flags of add_arguments() say. Raises InputError for any that cannot be used."""
    out, picture = Path(args.out), Path(os.path.splitext(args.out)[0] + ".png")
    if out in (picture, Path(args.record or "")):
        raise InputError(f'--out "{out}" would be written over by --report or --record; choose another name')
    if args.report or args.record:
        lines = list(read(out)[0].values())
        if not lines:
            raise InputError(f'"{out}" holds no runs; do some with minilora sweep --out "{out}"')
    else:
        names = [name for word in args.methods or methods.names() for name in word.split(",") if name]
        of = args.r or [None], args.alpha or [None], args.lr, args.seeds, args.steps, args.batch, args.base
        runs, ahead = grid(names, *of), math.inf if args.dask else args.workers + 1  # a process that dies loses those
        with cluster(args.dask) if args.dask else Local(args.workers) as executor:
            lines = sweep(runs, executor, out, retry_failed=args.retry_failed, ahead=ahead)
    print(table(lines))
    if args.report:
        write_atomically(picture, png(figures.sweep(lines)))
        print(f"Written: {picture}")
    if args.record:
        record(lines, args.record, args.allow_edge)
