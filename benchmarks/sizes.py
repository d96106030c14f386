"""What the benchmarks of minilora alone share: threads, a model to time, and the machine's description.

Import it before NumPy: it puts ``--threads`` of the command line into the environment, which NumPy's BLAS reads once.
"""

import argparse
import datetime
import os
import platform
import statistics
import time
from pathlib import Path

from shapes import ALPHA, TARGETS, R

LEAST_SECONDS = 0.2  # of a turn


def parser(doc, rounds):
    """The options that every script has: --threads and --rounds. ``doc``: the script's docstring."""
    made = argparse.ArgumentParser(description=doc.partition("\n")[0], allow_abbrev=False)
    made.add_argument("--rounds", type=int, default=rounds, help=f"turns of each side; {rounds} by default")
    made.add_argument("--threads", type=int, default=1, help="of NumPy's BLAS; 1 by default")
    return made


_early = argparse.ArgumentParser(add_help=False, allow_abbrev=False, usage=argparse.SUPPRESS)
_early.add_argument("--threads", type=int, default=1)
THREADS = _early.parse_known_args()[0].threads
for _name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"):
    os.environ[_name] = str(THREADS)

import numpy as np  # noqa: E402

import minilora  # noqa: E402
from minilora.tools.devices import cpu_name  # noqa: E402


def adapted(size, method="lora", **options):
    """(model, ids, targets) at ``size``, a row of SIZES: the six linears of each block, float32, random tokens."""
    vocab, T, d, layers, heads, batch = size
    rng = np.random.default_rng(0)
    model = minilora.GPT(minilora.GPTConfig(vocab, T, d, layers, heads), rng)
    options |= {"r": R, "alpha": ALPHA} if {"r", "alpha"} <= set(minilora.methods.options(method)) else {}
    minilora.adapt(model, method, TARGETS, verbose=False, **options)
    draws = rng.integers(0, vocab, (batch, T + 1))
    return model, draws[:, :-1].copy(), draws[:, 1:].copy()


def step_of(model, ids, targets, **options):
    """One training step as a function that returns its seconds. ``options``: of minilora.train."""
    optimizer = minilora.AdamW(model.trainable(), lr=1e-4)  # low, so that the weights hardly move
    history = minilora.train(model, optimizer, [(ids, targets)], 1, progress=False, **options)

    def step():
        done = len(history.loss)
        minilora.train(model, optimizer, [(ids, targets)], done + 1, history=history, progress=False, **options)
        return history.seconds[-1]

    return step


def turn(f):
    """The median seconds of a call, over at least LEAST_SECONDS of calls; the first, if short, warms the caches.

    If ``f`` returns a number, this is the seconds that it took.
    """
    seconds, stop = [], time.perf_counter() + LEAST_SECONDS
    while not seconds or time.perf_counter() < stop:
        start = time.perf_counter()
        own = f()
        seconds.append(time.perf_counter() - start if own is None else own)
    return statistics.median(seconds[1:] or seconds)


def in_turns(rounds, *functions):
    """A B A B …: an array (rounds, functions) of seconds, so that a busy moment of the machine falls on all of them."""
    for f in functions:
        f()  # memory that is touched for the first time costs more
    return np.array([[turn(f) for f in functions] for _ in range(rounds)])


def machine():
    """What the figures depend on: CPU, threads, versions, date."""
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    facts = {"CPU": cpu_name(), "cores": os.cpu_count(), "threads": THREADS, "Python": platform.python_version()}
    facts |= {"numpy": np.__version__, "blas": f"{blas['name']} {blas['version']}"}
    return facts | {"date": datetime.date.today().isoformat()}


def print_machine():
    print("; ".join(f"{key} {value}" for key, value in machine().items()))
    print(f"minilora is {Path(minilora.__file__).parent}")
