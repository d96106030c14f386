"""What a refusal is: one error that says which file, which tensor and which rule, in time, and nothing changed.

The tests of hostile files share it, with the tiny models whose files they spoil.
"""

import os
import re
import sys
import time
import tracemalloc
from contextlib import contextmanager

import hostile
import numpy as np
import pytest
from hostile import FIRST, SOME, Seed

from minilora import methods
from minilora.errors import AdapterFormatError
from minilora.gpt import GPT, GPTConfig
from minilora.surgery import adapt
from minilora.training.loop import History
from minilora.training.optim import AdamW
from minilora.training.trainer import train

for name in methods.names():  # imported before any test, which sees what a file makes imported
    methods.get(name)

TINY = GPTConfig(vocab_size=11, n_positions=2, n_embd=8, n_layer=1, n_head=2)
IDS = np.random.default_rng(0).integers(0, 11, (2, 2))


def base() -> GPT:
    return GPT(TINY, 1)


def tuned(name, targets=("q",), steps=2):
    """(model, optimizer, history, rng) of a short run in which every array has moved."""
    model, rng = adapt(base(), name, list(targets), verbose=False, **methods.known(name, r=2)), np.random.default_rng(3)
    optimizer, history = AdamW(model.trainable(), lr=0.1), History()
    train(model, optimizer, iter([(IDS, IDS[:, ::-1])] * steps), steps, history=history)
    return model, optimizer, history, rng


def state(model):
    """Everything that a failed load could have changed."""
    return {name: (p.requires_grad, p.data.tobytes()) for name, p in model.named_parameters()}


def assert_well_said(error, path):
    """It names the file, or one of several that may be meant, and the rule, and no terminal obeys it."""
    text, paths = str(error), path if isinstance(path, tuple) else (path,)
    assert error.file in map(str, paths) and error.file in text and error.rule
    assert text.isprintable() and len(text) < 600


@contextmanager
def refused(path, seed=None, error=AdapterFormatError, file=None):
    """One error of this kind, with all that it must say, in time, with nothing imported and nothing left behind."""
    modules, folder = set(sys.modules), sorted(os.listdir(path.parent))
    tracemalloc.start()
    start = time.process_time()  # of this process alone, on however busy a machine
    try:
        with pytest.raises(error) as caught:
            yield
        seconds, (_, peak) = time.process_time() - start, tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    found = caught.value
    assert_well_said(found, path if file is None else file)
    assert seconds < 1.0 and peak < 50e6
    assert set(sys.modules) == modules and sorted(os.listdir(path.parent)) == folder
    if seed is not None:
        assert re.search(seed.rule, found.rule)
        if seed.tensor == SOME:
            assert found.tensor
        elif seed.tensor is not None:
            assert found.tensor == seed.tensor and "tensor " in str(found)


def spoil(path, good: bytes, seed: Seed) -> Seed:
    """Spoil a good file at ``path``; the seed with the first tensor's name."""
    path.write_bytes(good)
    named = seed if seed.tensor != FIRST else Seed(seed.spoil, seed.rule, hostile.first(hostile.read(path)[0]))
    seed.spoil(path)
    return named


def parametrized(seeds):
    return pytest.mark.parametrize(
        "seed", seeds.values(), ids=[re.sub(r"[^\w .:()\[\]-]", "?", name) for name in seeds]
    )


def in_front(path, name):
    """Lay the arrays of a file one behind the other again, beginning with ``name``."""
    header, data = hostile.read(path)
    notes, tail = header.pop("__metadata__"), b""
    for key in sorted(header, key=lambda key: (key != name, header[key]["data_offsets"])):
        begin, end = header[key]["data_offsets"]
        header[key]["data_offsets"] = [len(tail), len(tail) + end - begin]
        tail += data[begin:end]
    hostile.write(path, {"__metadata__": notes, name: header[name]} | header, tail)
