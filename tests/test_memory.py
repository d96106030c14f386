"""The ledger's total is what the allocator says a forward pass leaves behind.
These tests exist because the memory that a method needs is a result here, and a result must be measured.
"""

import gc
import tracemalloc

import numpy as np
import pytest

from minilora import ops
from minilora.engine import Operation, Tensor, backward, nodes_of
from minilora.gpt import GPT, GPTConfig
from minilora.memory import Entry, kept_bytes, ledger, owner
from minilora.nn import LayerNorm, Linear, Module
from minilora.surgery import adapt
from minilora.tools.audit import by_operation
from minilora.training.sgd import SGD

CONFIG = GPTConfig(vocab_size=96, n_positions=64, n_embd=64, n_layer=2, n_head=4)
IDS, TARGETS = np.random.default_rng(0).integers(0, 96, (2, 8, 64))


def numpy_bytes():
    """What NumPy holds at this moment, by tracemalloc."""
    gc.collect()
    arrays = tracemalloc.DomainFilter(inclusive=True, domain=np.lib.tracemalloc_domain)
    return sum(s.size for s in tracemalloc.take_snapshot().filter_traces([arrays]).statistics("filename"))


def train_norms_only(model):
    for name, p in model.named_parameters():
        if "norm" not in name:
            p.freeze()
    return model


DROPPING = GPTConfig(vocab_size=96, n_positions=64, n_embd=64, n_layer=2, n_head=4, dropout=0.1)
MODELS = {
    "all trained": lambda: GPT(CONFIG),
    "dropout": lambda: GPT(DROPPING),
    "recomputed": lambda: GPT(CONFIG).recompute(),
    "lora on the last down": lambda: adapt(GPT(CONFIG), "lora", ["blocks.1.down"], verbose=False),
    "norms only": lambda: train_norms_only(GPT(CONFIG)),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_total_is_what_the_allocator_says_and_nothing_is_left_after_backward(name):
    model, rng = MODELS[name](), np.random.default_rng(0)

    def run():
        return model.loss(IDS.copy(), TARGETS.copy(), rng)

    run()  # a warm-up pass: what is made once and stays is no part of a step
    tracemalloc.start()
    try:
        before = numpy_bytes()
        loss = run()
        grown, kept = numpy_bytes() - before, kept_bytes(loss, model)
    finally:
        tracemalloc.stop()
    assert kept > 2**19
    assert abs(grown - kept) <= 0.005 * grown
    assert sum(by_operation(ledger(loss, model)).values()) == kept
    order = nodes_of(loss)
    backward(loss)
    assert kept_bytes(loss) == 0 and all(node.saved is None for node in order)


def test_without_a_graph_nothing_is_kept():
    model = GPT(CONFIG)
    model.freeze()
    assert ledger(model.loss(IDS, TARGETS)) == []


def leaf(*shape):
    return Tensor(np.ones(shape), requires_grad=True)


def test_entries_come_in_forward_order_with_name_and_shape():
    x = leaf(5, 4)
    y = ops.gelu(ops.linear(x, leaf(3, 4), None)).sum()
    entries = ledger(y)
    assert [(e.operation, e.name, e.shape) for e in entries] == [
        ("linear", "x", (5, 4)),
        ("linear", "W", (3, 4)),
        ("gelu", "slope", (5, 3)),
    ]
    assert [e.nbytes for e in entries] == [8 * 20, 8 * 12, 8 * 15]
    assert kept_bytes(y) == 8 * (20 + 12 + 15)


def test_the_owner_of_a_view_of_a_view():
    a = np.arange(24.0)
    assert owner(a) is a
    assert owner(a.reshape(4, 6)[1:].T[::2]) is a
    assert owner(np.broadcast_to(a[:1], (1000, 1))) is a
    of_bytes = np.frombuffer(bytes(16))  # what owns its memory is no array, so it is the last that counts
    assert owner(of_bytes[1:]) is of_bytes


def test_the_models_own_parameters_count_nowhere():
    class Two(Module):
        def __init__(self):
            self.norm, self.layer = LayerNorm(4, np.float64), Linear(np.ones((3, 4)), np.zeros(3))

    model, x = Two(), leaf(5, 4)
    model.norm.g.freeze()
    y = model.layer(model.norm(x)).sum()
    without = kept_bytes(y, model)
    assert kept_bytes(y) - without == 8 * (3 * 4 + 4)  # W of the layer, g of the norm
    assert {e.name for e in ledger(y, model) if e.nbytes == 0} == {"W", "g"}
    SGD(model.trainable(), lr=0.1)  # now they are views of one buffer
    assert kept_bytes(model.layer(model.norm(x)).sum(), model) == without


def test_an_index_of_several_arrays_counts():
    x, rows, columns = leaf(5, 4), np.zeros(1000, int), np.ones(1000, int)
    assert kept_bytes(x[rows]) == rows.nbytes
    assert kept_bytes(x[rows, columns]) == rows.nbytes + columns.nbytes


def test_sums_by_operation_are_in_falling_order():
    entries = [Entry("a", "x", (1,), 8), Entry("b", "x", (4,), 32), Entry("a", "y", (2,), 16)]
    assert list(by_operation(entries).items()) == [("b", 32), ("a", 24)]


def test_what_an_operation_says_it_keeps_is_what_is_counted():
    def hoard_forward(need, x):
        return x + 0.0, {"pile": np.ones(123), "none": None, "number": 3.0, "scalar": np.float64(3.0), "shape": (3, 4)}

    hoard = Operation(hoard_forward, lambda need, dy, saved: (dy,))
    assert ledger(hoard(leaf(2))) == [Entry("hoard", "pile", (123,), 123 * 8)]
