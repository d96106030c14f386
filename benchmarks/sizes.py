"""What the benchmarks of minilora alone share: threads, a model to time, and the machine's description.

Import it before NumPy: it puts ``--threads`` of the command line into the environment, which NumPy's BLAS reads once.
"""

import argparse
import datetime
import os
import platform
import statistics
import sys
import time
from pathlib import Path

from shapes import ALPHA, TARGETS, R

LEAST_SECONDS = 0.2  # of a turn


def threads_option(parser):
    parser.add_argument("--threads", type=int, choices=[1, 2], default=1, help="of NumPy's BLAS; 1 by default")
    return parser


_early = argparse.ArgumentParser(add_help=False, allow_abbrev=False, usage=argparse.SUPPRESS)
THREADS = threads_option(_early).parse_known_args()[0].threads
for _name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"):
    os.environ[_name] = str(THREADS)

try:
    import numpy as np

    import minilora
    from minilora.backend import keep_heap
    from minilora.tools.devices import cpu_name
    from minilora.training.loop import training_step
except ImportError as error:
    sys.exit(f"{error}; in the root of the repository, run: python3 -m venv .bench && .bench/bin/pip install -e .")


def parser(doc, rounds):
    """The options that every script has: --threads and --rounds. ``doc``: the script's docstring."""
    made = argparse.ArgumentParser(description=doc.partition("\n")[0])
    made.add_argument("--rounds", type=at_least_one, default=rounds, help=f"turns of each side; {rounds} by default")
    return threads_option(made)


def at_least_one(text):
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def new_file(text):
    """A path that can be written to; said at the start, not after minutes of measuring."""
    path = Path(text)
    if not path.resolve().parent.is_dir():
        raise argparse.ArgumentTypeError(f"the folder of {text!r} does not exist")
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a folder; give the name of a file")
    return path


def lora(vocab, T, d, layers, heads, batch):
    """(model, optimizer, ids, targets): LoRA on the six linears of each block, float32, random tokens."""
    rng = np.random.default_rng(0)
    model = minilora.GPT(minilora.GPTConfig(vocab, T, d, layers, heads), rng)
    minilora.adapt(model, "lora", TARGETS, r=R, alpha=ALPHA, verbose=False)
    draws = rng.integers(0, vocab, (batch, T + 1))
    # A low rate: weights hardly move, and every step costs the same.
    return model, minilora.AdamW(model.trainable(), lr=1e-4), draws[:, :-1].copy(), draws[:, 1:].copy()


def lora_step(*size):
    """One training step of minilora at ``size``, as a function without arguments."""
    keep_heap()  # as train() does
    model, optimizer, ids, targets = lora(*size)
    return lambda: training_step(model, optimizer, ids, targets)


def turn(f):
    """The median seconds of a call, over at least LEAST_SECONDS of calls; the first, if short, warms the caches."""
    seconds, stop = [], time.perf_counter() + LEAST_SECONDS
    while not seconds or time.perf_counter() < stop:
        start = time.perf_counter()
        f()
        seconds.append(time.perf_counter() - start)
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
