"""``minilora sweep``: method × rank × alpha × learning rate × seed, on local processes or a Dask cluster.

Each run is one JSON line, flushed to the disk before the next one is handled: a sweep that was stopped resumes when the
same command is given again.
"""

import json
import math
import os
import socket
from concurrent.futures import BrokenExecutor, as_completed
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
from ..files.saving import writable_folder
from ..surgery import count_parameters, plan
from ..training.progress import progress_bar
from .results import MARK, Run, read
from .settings import Grid
from .task import Task, tune


def runs_of(grid: Grid) -> list[Run]:
    """Each combination once, with those of ``r`` and ``alpha`` that the method has. InputError for unusable ones."""
    names = methods.names() if grid.methods is None else grid.methods
    ranks, alphas = grid.r or [None], grid.alpha or [None]
    values = {"methods": names, "r": ranks, "alpha": alphas, "lr": grid.lr, "seeds": grid.seeds}
    for name, given in values.items():
        if not given or len(set(given)) < len(given):
            raise InputError(f"sweep: {name} is {list(given)}; give at least one value, and each value once")
    base = grid.base and str(Path(grid.base).resolve())  # a worker may have another working directory
    model, runs = load_base(base), {}
    for name, r, alpha, lr, seed in product(*values.values()):
        run = Run(name, lr, seed, grid.steps, grid.batch, base, **methods.known(name, r=r, alpha=alpha))
        plan(model, run.adapter())
        runs[run.key()] = run
    return list(runs.values())


def execute(run: Run) -> dict:
    """Do ``run`` in this process, whichever it is, and return its line. Raises TrainingStopped if it diverges."""
    line = asdict(run) | {"started": f"{datetime.now(UTC):%FT%TZ}", "worker": f"{socket.gethostname()}:{os.getpid()}"}
    task = Task(run.base, "cpu", selection=True)  # a rate must not be chosen on the play that results are for
    with np.errstate(all="ignore"):  # a run that diverges overflows first
        model, history, _ = tune(task, run.adapter(), run.steps, run.lr, run.batch, run.seed, progress=False)
        (loss_a, loss_b), (_, before) = task.losses(model), task.losses(task.model)
    if not math.isfinite(loss_a + loss_b):
        raise TrainingStopped(f"the held-out losses after training are {loss_a} on A and {loss_b} on B")
    return line | {
        "loss_b": loss_b,
        "loss_a": loss_a,
        "loss_b_before": before,
        "train_loss": fmean(history.loss[-math.ceil(run.steps / 10) :]),  # the last tenth of the steps
        "trainable": count_parameters(model)[0],
        "kept_bytes": history.kept_bytes,
        "seconds_per_step": history.seconds_per_step,
        "base_sha256": fingerprint(task.model),
    }


def sweep(runs, executor, path, report=print, retry_failed=False, progress=None) -> list:
    """Do the ``runs`` that the file lacks on any concurrent.futures.Executor; returns all lines of the file.

    Raises InputError, with nothing written, for a file that is not a sweep's, or not of runs comparable with these;
    TrainingStopped if a worker process dies: the same call again does the runs that are still missing.
    """
    lines, size = read(path)
    check_comparable(path, lines.values(), runs)
    writable_folder(Path(path).parent)
    if os.path.exists(path) and not os.access(path, os.W_OK):
        raise InputError(f'"{path}" cannot be written to; choose another file with --out')
    todo = [run for run in runs if (line := lines.get(run.key())) is None or (retry_failed and "error" in line)]
    report(f"{len(runs)} runs, {len(runs) - len(todo)} of them done already; results go to {path}")
    results = _results(todo, executor)
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


def check_comparable(path, lines, runs) -> None:
    """Raise InputError if the ``lines`` of the file at ``path`` are of other steps, batch or base than ``runs``."""
    settings = {(of["steps"], of["batch"], of["base"]) for of in [*lines, *map(asdict, runs)]}
    models = {line["base_sha256"] for line in lines if "loss_b" in line}
    if len(settings) > 1 or len(models | {fingerprint(load_base(run.base)) for run in runs[:1]}) > 1:
        raise InputError(f'"{path}" holds runs with other steps, batch or base model; choose another file with --out')


def _results(runs, executor):
    """(run, line) as the runs end, with "error" in the line of one that fails. What has not started is cancelled."""
    pending = {}
    try:
        for run in runs:
            pending[executor.submit(execute, run)] = run
        for future in as_completed(pending):
            run = pending[future]
            try:
                line = future.result()
            except BrokenExecutor:
                raise
            except Exception as error:
                line = asdict(run) | {"error": {"type": type(error).__name__, "message": str(error)}}
            yield run, line
    except BrokenExecutor as error:
        raise TrainingStopped(
            "a worker process died, perhaps for want of memory; the same command again resumes, with fewer --workers"
        ) from error
    finally:
        for future in pending:
            future.cancel()
