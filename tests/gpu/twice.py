"""What the files of the gpu lane share: how arrays move, what counts as equal, and a small training."""

import os

import numpy as np
import pytest

import minilora
from minilora import methods
from minilora.backend import array_module, to_device, to_host
from minilora.data import random_batches

TOLERANCE = {np.float64: 1e-12, np.float32: 1e-5}  # relative to the largest entry
each_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=["float64", "float32"])
# The stand-in tries the lane's own code, and a few methods are enough for that.
METHODS = ["delta_lora", "dora", "full"] if os.environ.get("MINILORA_GPU") == "standin" else methods.names()
CONFIG = minilora.GPTConfig(vocab_size=40, n_positions=24, n_embd=32, n_layer=2, n_head=4)


def move(value, xp):
    """``value`` with every array in it, of lists and dicts too, on the device of ``xp``."""
    if isinstance(value, dict):
        return type(value)((k, move(v, xp)) for k, v in value.items())
    if isinstance(value, list | tuple):
        return type(value)(move(v, xp) for v in value)
    return to_device(value, xp) if hasattr(value, "dtype") else value


def assert_close(there, here, tolerance, what):
    """Both sides have the shape and dtype, and no entry is further away than ``tolerance`` times the largest here."""
    assert array_module(here) is np and array_module(there) is not np, f"{what}: not one of each device"
    there = to_host(there)
    assert (there.shape, there.dtype) == (here.shape, here.dtype), what
    scale = np.abs(here).max(initial=0.0) or 1.0
    distance = np.abs(there - here).max(initial=0.0) / scale
    assert distance <= tolerance, f"{what}: {distance:.1e} of {scale:.1e}, allowed {tolerance:.0e}"


def assert_all_close(there: dict, here: dict, tolerance, what):
    assert set(there) == set(here), what
    for name in here:
        assert_close(there[name], here[name], tolerance, f"{what}: {name}")


def model(dtype, device, seed=0, config=CONFIG):
    """A GPT with no bias at 0 and no norm at 1, so that none can be forgotten."""
    rng = np.random.default_rng(seed)
    gpt = minilora.GPT(config, rng, dtype)
    for _, p in gpt.named_parameters():
        p.data += rng.normal(0.0, 0.1, p.shape).astype(dtype)
    return gpt.to(device)


def batches(seed=0, batch=6, config=CONFIG):
    """Batches of a text with something to learn in it; they are on the host, for either device."""
    rng = np.random.default_rng(seed)
    text = (np.cumsum(rng.integers(0, 3, 4000)) % config.vocab_size).astype(np.int64)
    return random_batches(text, batch, config.n_positions, rng)


def train(device, dtype, method, steps=20, **options):
    """(losses, trained model) of a small training on ``device``; without a method every parameter is trained."""
    gpt = model(dtype, device)
    if method is not None:
        minilora.adapt(gpt, method, verbose=False)
    optimizer = minilora.AdamW(gpt.trainable(), lr=3e-3, weight_decay=0.01, clip=1.0)
    history = minilora.train(gpt, optimizer, batches(), steps, warmup=3, progress=False, **options)
    return history.loss, gpt


def weights(gpt) -> dict:
    return {name: p.data for name, p in gpt.named_parameters()}
