"""The same seed and the same number of threads give the same bits, run after run, for every method.

These tests exist because a result that cannot be repeated cannot be looked into.
"""

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import minilora
from minilora import GPT, AdamW, GPTConfig, adapt, methods
from minilora.backend import to_host
from minilora.files.checkpoint import adapter_arrays
from minilora.training.trainer import train
from minilora.training.workers import Workers

CONFIG = GPTConfig(vocab_size=13, n_positions=8, n_embd=16, n_layer=2, n_head=2, dropout=0.1)


def digest(name, workers=1, seed=0) -> str:
    """Of all that six steps of training leave: the adapter, moved weights, optimizer, losses, a sampled text."""
    rng = np.random.default_rng(seed)
    model = adapt(GPT(CONFIG), name, seed=seed, verbose=False, **methods.known(name, r=2, start_step=2))
    optimizer = AdamW(model.trainable(), lr=0.02, weight_decay=0.1, clip=1.0)
    texts = (rng.integers(0, 13, (4, 9)) for _ in range(6))
    batches = ((ids[:, :-1], ids[:, 1:]) for ids in texts)
    history = train(model, optimizer, batches, 6, warmup=3, rng=rng, progress=False, workers=workers)
    text = model.generate(np.zeros((2, 1), int), 12, rng=seed)
    arrays = [to_host(p.data) for p in adapter_arrays(model).values()]
    arrays += [to_host(a) for a in optimizer.state().values()] + [np.array(history.loss), np.array(text)]
    return hashlib.sha256(b"".join(np.ascontiguousarray(a).tobytes() for a in arrays)).hexdigest()


@pytest.mark.parametrize("name", methods.names())
def test_two_runs_are_the_same_to_the_bit(name):
    assert digest(name) == digest(name)


def test_two_runs_of_two_workers_are_the_same_to_the_bit():
    if not sys.platform.startswith("linux"):
        pytest.skip(f"worker processes need Linux, this is {sys.platform}: {Workers.__doc__.splitlines()[0]}")
    first = digest("delta_lora", workers=2)
    assert first == digest("delta_lora", workers=2) != digest("delta_lora", workers=2, seed=1)


def test_a_new_process_comes_to_the_same_bits():
    """Nothing depends on what was computed before, on addresses, or on the order of a set (PYTHONHASHSEED)."""
    program = f"import sys; sys.path[:0] = {[str(Path(minilora.__file__).parents[1]), str(Path(__file__).parent)]!r}"
    program += "\nfrom test_determinism import digest\nprint(digest('vera'))"
    command = [sys.executable, "-c", program]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == digest("vera")
