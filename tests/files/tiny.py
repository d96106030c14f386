"""A GPT of two blocks of which every array is random, gains and biases too; and its logits."""

import numpy as np

from minilora import methods
from minilora.engine import no_grad
from minilora.gpt import GPT, GPTConfig
from minilora.surgery import adapt

TINY = GPTConfig(vocab_size=11, n_positions=8, n_embd=16, n_layer=2, n_head=2)
IDS = np.random.default_rng(0).integers(0, 11, (2, 6))


def base(dtype=np.float32, config=TINY) -> GPT:
    model, rng = GPT(config, 0, dtype), np.random.default_rng(0)
    for _, p in model.named_parameters():
        p.data[:] = rng.normal(0.0, 0.3, p.shape)
    return model


def moved(name, targets="all-linear", model=None, rank_pattern=None, alpha_pattern=None, **options) -> GPT:
    """An adapted model whose trainable arrays, and W where the method moves it, are away from their start."""
    options = methods.known(name, **{"r": 2, "start_step": 1, **options})
    model = adapt(model or base(), name, targets, 0, False, rank_pattern, alpha_pattern, **options)
    rng = np.random.default_rng(1)
    for _ in range(2):
        for p in model.trainable().values():
            p.data += rng.normal(0.0, 0.1, p.shape).astype(p.dtype)
        model.after_step()
    return model


def logits(model):
    with no_grad():
        return model(IDS).data


def assert_same_function(one, other, tolerance=1e-6):
    one, other = logits(one), logits(other)
    assert np.abs(one - other).max() <= tolerance * np.abs(other).max()


def state(model):
    """Everything in a model that a failed load, or a save, could have changed."""
    return {name: (p.requires_grad, p.data.copy()) for name, p in model.named_parameters()}


def assert_untouched(model, before):
    after = state(model)
    assert list(after) == list(before)
    for name, (requires_grad, array) in before.items():
        assert after[name][0] == requires_grad
        np.testing.assert_array_equal(after[name][1], array)
