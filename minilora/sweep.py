"""``minilora sweep``: method × rank × alpha × learning rate × seed, on local processes or a Dask cluster.

One JSON line per run, on the disk before the next is looked at: a sweep that was stopped goes on where it stopped.
"""

import json
import math
import os
import signal
import socket
import statistics
import threading
import traceback
from collections import deque
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, ProcessPoolExecutor, wait
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from itertools import product
from multiprocessing import active_children, get_context, parent_process
from operator import itemgetter
from pathlib import Path

import numpy as np

from . import methods
from .adapter import count_parameters, plan
from .checkpoint import fingerprint, writable_folder, write_atomically
from .compare import Task, tune
from .errors import InputError, TrainingStopped
from .optim import check_positive
from .train import progress_bar

MARK = b'{"minilora_sweep": 1, '  # every line starts with it: so half a line is known for ours as well
BLAS_THREADS = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
DIVERGED = TrainingStopped.__name__


@dataclass(frozen=True)
class Run:
    """One training run. ``r`` or ``alpha`` None: the method's own default, or a method that has none."""

    method: str
    r: int | None
    alpha: float | None
    lr: float
    seed: int
    steps: int
    batch: int
    base: str | None = None
    options: dict = field(default_factory=dict)

    def key(self) -> str:
        """The same string for the same run, in every process and at every time."""
        return json.dumps(asdict(self), sort_keys=True)

    def adapter(self):
        """The method with its hyper-parameters. Raises InputError for a value that it cannot have."""
        given = {"r": self.r, "alpha": self.alpha, **self.options}
        return methods.create(self.method, **{name: value for name, value in given.items() if value is not None})


def grid(names, ranks, alphas, rates, seeds, steps, batch, base=None) -> list[Run]:
    """Every combination once; what a method does not have, such as a rank, does not multiply its runs.

    ``ranks`` and ``alphas`` may be [None], each method's default. Raises InputError for whatever a run cannot use.
    """
    for what, values in {"methods": names, "r": ranks, "alpha": alphas, "lr": rates, "seeds": seeds}.items():
        if not values or len(set(values)) < len(values):
            raise InputError(f"sweep: {what} is {list(values)}; give at least one value, and each value once")
    for name, rate, seed in product(names, rates, seeds):
        methods.get(name)
        check_positive(lr=rate, steps=steps, batch=batch)
        check_positive(zero_allowed=True, seed=seed)
    path, runs = base and str(Path(base).resolve()), {}  # a worker may have another working directory
    model = Task(path).model
    for name, r, alpha, rate, seed in product(names, ranks, alphas, rates, seeds):
        own = methods.known(name, r=r, alpha=alpha and float(alpha))
        run = Run(name, own.get("r"), own.get("alpha"), float(rate), seed, steps, batch, path)
        if run.key() not in runs:
            plan(model, run.adapter())
        runs[run.key()] = run
    return list(runs.values())


def execute(run: Run) -> dict:
    """Do ``run``, in whatever process this is, and return its line; one that fails has "error" in place of losses.

    Held out is the end of B's training text: a learning rate must not be chosen on the play that results are for.
    """
    worker = f"{socket.gethostname()}:{os.getpid()}"
    line = {**asdict(run), "started": datetime.now(UTC).isoformat(timespec="seconds"), "worker": worker}
    try:
        with np.errstate(all="ignore"):  # a run that diverges overflows first
            return line | _train(run)
    except Exception as error:
        return line | _failure(error)


def _train(run: Run) -> dict:
    task = Task(run.base, "cpu", selection=True)
    before = task.losses(task.model)[1]
    model, history, _ = tune(task, run.adapter(), run.steps, run.lr, run.batch, run.seed, progress=False)
    loss_a, loss_b = task.losses(model)
    if not (math.isfinite(loss_a) and math.isfinite(loss_b)):
        raise TrainingStopped(f"the held-out losses after training are {loss_a} on A and {loss_b} on B")
    return {
        "loss_b": loss_b, "loss_a": loss_a, "loss_b_before": before,
        "train_loss": statistics.fmean(history.loss[-math.ceil(run.steps / 10) :]),  # the last tenth of the steps
        "trainable": count_parameters(model)[0], "kept_bytes": history.kept_bytes,
        "seconds_per_step": history.seconds_per_step, "base_sha256": fingerprint(task.model),
    }  # fmt: skip


def _failure(error: BaseException) -> dict:
    """What a line says of a run that failed; a bug keeps its traceback, divergence needs none."""
    kind = type(error).__name__
    told = {"type": kind, "message": str(error) or "no message"}
    return {"error": told if kind == DIVERGED else told | {"traceback": "".join(traceback.format_exception(error))}}


def sweep(runs, executor, path, report=print, retry_failed=False, progress=None, renew=None, ahead=math.inf) -> list:
    """Do those ``runs`` that the file ``path`` lacks, on any concurrent.futures.Executor; all lines of the file.

    Each line is on the disk at once; a half-written last one, from a sweep that was killed, is cut off and its run
    done again. ``retry_failed``: failed runs too. ``renew()`` gives a new executor for one whose process died;
    ``ahead``: at most so many runs are handed over at a time. Raises InputError, before anything is written, for a
    file that is not a sweep's or holds runs under other settings. Ctrl-C cancels what has not started.
    """
    lines, size = read(path)
    _check_settings(path, lines.values(), runs)
    todo = [run for run in runs if (line := lines.get(run.key())) is None or (retry_failed and "error" in line)]
    report(f"{len(runs)} runs, {len(runs) - len(todo)} of them done already; results go to {path}")
    with _appending(path) as file, progress_bar(len(runs), "sweep", progress) as bar:
        file.truncate(size)
        bar.update(len(runs) - len(todo))
        with closing(_results(todo, executor, renew, ahead)) as results:
            for run, line in results:
                file.write(MARK + json.dumps(line).encode()[1:] + b"\n")
                file.flush()
                os.fsync(file.fileno())
                lines[run.key()] = line
                bar.update()
                best = min((line for line in lines.values() if "loss_b" in line), key=itemgetter("loss_b"), default={})
                bar.set_postfix_str("best {loss_b:.3f}, {method} at {lr:g}".format(**best) if best else "none yet")
    return list(lines.values())


def _appending(path):
    writable_folder(Path(path).parent)
    try:
        return open(path, "ab")
    except OSError as error:
        raise InputError(f'cannot write to "{path}": {error.strerror}; choose another file with --out') from error


def _results(runs, executor, renew, ahead):
    """(run, line) as the runs end. The runs that a broken executor held get one more chance, on a new one."""
    todo, pending, again = deque(runs), {}, []
    try:
        while todo or pending:
            while todo and len(pending) < ahead:
                run = todo.popleft()
                try:
                    future = executor.submit(execute, run)
                except BrokenExecutor as error:  # it broke a moment ago; treated as if it broke a moment later
                    future = Future()
                    future.set_exception(error)
                pending[future] = run, executor
            for future in wait(pending, return_when=FIRST_COMPLETED).done:
                run, source = pending.pop(future)
                try:
                    line = future.result()
                except Exception as error:  # of the executor: execute() itself raises none
                    if isinstance(error, BrokenExecutor) and renew is not None and run not in again:
                        executor = renew() if source is executor else executor
                        again.append(run)
                        todo.append(run)
                        continue
                    line = asdict(run) | _failure(error)
                yield run, line
    finally:
        for future in pending:
            future.cancel()


def read(path) -> tuple[dict, int]:
    """The lines of a sweep's file by their runs' keys, the latest of each, and the bytes up to its last whole line.

    Raises InputError for a file that holds anything else, or cannot be read. One that is not there has no lines.
    """
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        return {}, 0
    except OSError as error:
        raise InputError(f'cannot read "{path}": {error.strerror}; choose another file with --out') from error
    lines, size = {}, data.rfind(b"\n") + 1
    for number, text in enumerate(data[:size].split(b"\n")[:-1], 1):
        try:
            line = json.loads(text)
            run = Run(**{f.name: line[f.name] for f in fields(Run)})
            if line.pop("minilora_sweep") != 1 or not line.keys() & {"error", "loss_b"}:
                raise ValueError
        except (ValueError, TypeError, KeyError, AttributeError):
            raise InputError(f'"{path}" is not a sweep\'s file (line {number}); choose another with --out') from None
        lines[run.key()] = line
    if not (data[size:].startswith(MARK) or MARK.startswith(data[size:])):
        raise InputError(f'"{path}" is not a sweep\'s file (its last line); choose another with --out')
    return lines, size


def _check_settings(path, lines, runs):
    """Raise InputError where ``runs`` could not be compared with the ``lines`` that are there."""
    settings = ("steps", "batch", "base")
    for line, run in product({line["method"]: line for line in lines}.values(), {r.method: r for r in runs}.values()):
        same_options = line["method"] != run.method or line["options"] == run.options
        if any(line[name] != getattr(run, name) for name in settings) or not same_options:
            have = ", ".join(f"{name} {line[name]}" for name in (*settings, "options"))
            raise InputError(f'"{path}" holds runs with {have}, which these are not; choose another file with --out')
    if runs and {line["base_sha256"] for line in lines if "loss_b" in line} - {fingerprint(Task(runs[0].base).model)}:
        raise InputError(f'"{path}" holds runs on another base model; choose another file with --out')


def _appending(path):
    try:
        return open(path, "ab")  # the caller's with statement closes it
    except OSError as error:
        raise InputError(f'cannot write to "{path}": {error.strerror}; choose another file with --out') from error


@contextmanager
def local(workers=None):
    """(executor, renew, ahead) of ``workers`` processes, by default one per core, each with one BLAS thread.

    Raises InputError for workers < 1. An exception, such as Ctrl-C, ends the processes at once.
    """
    workers = os.cpu_count() or 1 if workers is None else workers
    check_positive(workers=workers)
    before, saved, pools = active_children(), {name: os.environ.get(name) for name in BLAS_THREADS}, []

    def renew():
        pools.append(ProcessPoolExecutor(workers, get_context("spawn"), _start_worker))
        return pools[-1]

    os.environ.update(dict.fromkeys(BLAS_THREADS, "1"))  # a process reads it when it starts, which is at a first run
    try:
        yield renew(), renew, workers + 1
    except BaseException:
        for pool in pools:
            pool.shutdown(wait=False, cancel_futures=True)
        for process in set(active_children()) - set(before):
            process.terminate()
        raise
    finally:
        for name in BLAS_THREADS:
            os.environ.pop(name)
        os.environ.update({name: value for name, value in saved.items() if value is not None})
        for pool in pools:
            pool.shutdown()


def _start_worker():
    """Ctrl-C is for the sweep to handle, and a worker whose sweep was killed does not live on."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()


@contextmanager
def cluster(address):
    """(executor, renew, ahead) of the Dask cluster at ``address``. Raises InputError where there is none."""
    try:
        from distributed import Client
    except ImportError:
        raise InputError('--dask needs the package "distributed": pip install "minilora[dask]"') from None
    try:
        client = Client(address, timeout=5, set_as_default=False)
    except (OSError, ValueError) as error:
        raise InputError(f'no Dask scheduler answers at "{address}": {error}') from error
    with client:
        yield client.get_executor(pure=False), None, math.inf  # pure: a repeated run would be taken from its memory


@dataclass
class Curve:
    """One method at one rank and alpha: by learning rate, the losses of its seeds and how many seeds failed."""

    method: str
    r: int | None
    alpha: float | None
    losses: dict = field(default_factory=dict)
    failed: dict = field(default_factory=dict)

    def mean(self, rate) -> float:
        """Over seeds; infinite where one failed, since such a rate is not to be recommended."""
        return math.inf if self.failed[rate] else statistics.fmean(self.losses[rate])

    @property
    def best(self) -> float | None:
        """The rate with the least mean loss; None where there is none without a failure."""
        rate = min(self.losses, key=self.mean)
        return rate if math.isfinite(self.mean(rate)) else None

    def beside(self, step) -> float | None:
        """The next rate below (-1) or above (+1) the best; None at the edge of the grid."""
        rates = [None, *self.losses, None]
        return rates[rates.index(self.best) + step]


def curves(lines) -> list[Curve]:
    """The lines by method, rank and alpha, in that order, with ascending rates."""
    found = {}
    none_first = lambda line: [(v is not None, v or 0) for v in (line["r"], line["alpha"])]
    for line in sorted(lines, key=lambda line: (line["method"], none_first(line), line["lr"])):
        of = line["method"], line["r"], line["alpha"]
        curve = found.setdefault(of, Curve(*of))
        losses = curve.losses.setdefault(line["lr"], [])
        losses += [line["loss_b"]] if "loss_b" in line else []
        curve.failed[line["lr"]] = curve.failed.get(line["lr"], 0) + ("error" in line)
    return list(found.values())
