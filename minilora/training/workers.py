"""Worker processes that share every batch out: the gradient of a step, computed on several cores.

NumPy runs most operations on one core, so two cores help only where the work is cut. Processes do it better than
threads, which wait for each other's turn at Python. All see the same weights, in memory that they share; each adds up
the gradient of its own sequences, and the sum is the gradient of the batch.
"""

import contextlib
import mmap
import multiprocessing
import os
import signal
import sys
import warnings

import numpy as np

from ..adapter import AdaptedLinear, Adapter
from ..errors import InputError
from ..memory import kept_bytes
from ..nn import Module
from .gradient import accumulate, check_parts, count_targets, split


def usual_workers(device="cpu", most=4) -> int:
    """As many workers as this process has cores, at most ``most``; one on a GPU, and where there can be no more."""
    if device != "cpu" or not sys.platform.startswith("linux"):
        return 1
    return min(most, len(os.sched_getaffinity(0)))


class Workers:
    """``n`` processes, this one included, that compute a step's gradient together; close() or ``with`` ends them.

    Each takes its share of the sequences, with one BLAS thread. The arrays that a step changes move to shared memory
    and stay there. Dropout is drawn anew by each process, from seeds that the step's ``rng`` gives.
    Raises InputError for n < 1, for a model on a GPU, and where the system cannot fork safely (not Linux).
    """

    def __init__(self, model, optimizer, n: int):
        if not isinstance(n, int) or n < 1:
            raise InputError(f"workers is {n!r}; it must be an integer of at least 1")
        if not sys.platform.startswith("linux"):
            raise InputError(f"worker processes need Linux, this is {sys.platform}; use workers=1")
        if not isinstance(optimizer.data, np.ndarray):
            raise InputError("worker processes are for the CPU; on a GPU use workers=1")
        from threadpoolctl import threadpool_limits

        self.model, self.optimizer, self.processes, self.connections = model, optimizer, [], []
        self.grads = shared_array((n, *optimizer.grad.shape), optimizer.grad.dtype)  # a row for each process
        for p in changed_after_step(model):
            p.data = shared_copy(p.data)
        optimizer.place(shared_copy(optimizer.data), self.grads[0])
        self.blas_threads = threadpool_limits(1, user_api="blas")
        fork = multiprocessing.get_context("fork")
        with warnings.catch_warnings():  # Python warns of a fork beside threads: OpenBLAS's own, and it prepares for it
            warnings.simplefilter("ignore", DeprecationWarning)
            try:
                for grad in self.grads[1:]:
                    ours, theirs = fork.Pipe()
                    self.connections.append(ours)
                    arguments = (theirs, [*self.connections], model, optimizer, grad)
                    process = fork.Process(target=work, args=arguments, daemon=True)
                    process.start()
                    theirs.close()
                    self.processes.append(process)
            except BaseException:
                self.close()
                raise

    def accumulate(self, ids, targets, rng=None, micro_batches=1, history=None):
        """gradient.accumulate() with the sequences shared out; each process takes ``micro_batches`` parts.

        A ``history`` without steps gets the bytes that all processes save for backward.
        """
        check_parts(micro_batches, len(ids))
        measure = history is not None and not history.loss
        total, (own, *others) = count_targets(targets), split(len(ids), len(self.grads))
        try:
            for connection, part in zip(self.connections, others, strict=True):
                seed = None if rng is None else int(rng.integers(2**63))
                connection.send((ids[part], targets[part], seed, micro_batches, total, measure))
            answers = [attempt(self.model, ids[own], targets[own], rng, micro_batches, total, measure)]
            answers += [connection.recv() for connection in self.connections]
        except (EOFError, OSError) as error:
            self.close()
            raise RuntimeError("a worker process ended; the weights are those of the last good step") from error
        except BaseException:  # Ctrl-C: what the others still answer belongs to no step
            self.close()
            raise
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        for grad in self.grads[1:]:
            self.grads[0] += grad
        losses, kept = zip(*answers, strict=True)
        if measure:
            history.kept_bytes = sum(kept)
        return sum(losses)

    def close(self):
        """End the processes; the model, the optimizer and this process's BLAS threads are as usual afterwards."""
        for connection in self.connections:
            connection.close()
        for process in self.processes:
            process.join(timeout=5)
            process.kill()
            process.join()
        self.blas_threads.restore_original_limits()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def work(connection, siblings, model, optimizer, grad):
    """A worker's life: a share of a batch in, its loss out, its gradient in ``grad``; until the other end closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that was started, which ends this one
    for other in siblings:
        other.close()
    optimizer.place(optimizer.data, grad)
    with contextlib.suppress(EOFError, OSError):  # the other end has closed
        while True:
            ids, targets, seed, *rest = connection.recv()
            grad.fill(0.0)
            rng = None if seed is None else np.random.default_rng(seed)
            connection.send(attempt(model, ids, targets, rng, *rest))


def attempt(model, ids, targets, rng, micro_batches, total, measure):
    """(loss, bytes saved for backward or 0), or the exception that was raised; zeros for a share without sequences."""
    kept = [0]

    def watch(loss):
        kept.append(kept_bytes(loss, model))

    try:
        if not len(ids):
            return 0.0, 0
        parts = min(micro_batches, len(ids))
        loss = accumulate(model, ids, targets, rng, parts, total, watch if measure else None)
        return float(loss), max(kept)
    except Exception as error:
        return error


def changed_after_step(model):
    """The Parameters, beside the optimizer's, that a step may change: those of modules with an after_step of theirs."""
    found = {}
    for _, module in model.named_modules():
        own, default = (module.method, Adapter) if isinstance(module, AdaptedLinear) else (module, Module)
        if type(own).after_step is not default.after_step:
            found |= {id(p): p for _, p in module.named_parameters()}
    return found.values()


def shared_array(shape, dtype) -> np.ndarray:
    """Zeros that a process shares with those it forks."""
    dtype, size = np.dtype(dtype), int(np.prod(shape))
    return np.frombuffer(mmap.mmap(-1, max(1, size * dtype.itemsize)), dtype, size).reshape(shape)


def shared_copy(array) -> np.ndarray:
    copy = shared_array(array.shape, array.dtype)
    copy[...] = array
    return copy
