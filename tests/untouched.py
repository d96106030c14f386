"""That what failed has changed nothing."""

import numpy as np


def state(model):
    """Everything in a model that a failed load, or a save, could have changed."""
    return {name: (p.requires_grad, p.data.copy()) for name, p in model.named_parameters()}


def assert_untouched(model, before):
    after = state(model)
    assert list(after) == list(before)
    for name, (requires_grad, array) in before.items():
        assert after[name][0] == requires_grad
        np.testing.assert_array_equal(after[name][1], array)
