"""The tiny GPT sees no later token, starts at GPT-2's weights, and its gradient is right in every parameter.
These tests exist because each layer can be right while their wiring is not: a mask, a tied head, a stale cache.
"""

import math

import numpy as np
import pytest

from minilora import methods, ops
from minilora.engine import Tensor, backward, is_recording, no_grad
from minilora.errors import InputError
from minilora.gpt import GPT, GPTConfig
from minilora.memory import ledger
from minilora.nn import Linear, Module, Parameter
from minilora.recompute import recompute
from minilora.sampling import sample
from minilora.surgery import adapt
from minilora.tools.gradcheck import check_model

TINY = GPTConfig(vocab_size=7, n_positions=6, n_embd=8, n_layer=2, n_head=2)


def lively(config=TINY, name="all trained", dtype=np.float64) -> GPT:
    """A model far from its start, so that no gradient and no preference is near zero: adapted by ``name``, or with its
    own parameters trained, or its norms alone."""
    gpt, rng = GPT(config, dtype=dtype), np.random.default_rng(0)
    for path, p in gpt.named_parameters():
        gain = path.endswith(".g")
        p.data[:] = rng.normal(1.0 if gain else 0.0, 0.1 if gain else 0.3, p.shape)
        if name == "norms trained" and "norm1" not in path and "norm2" not in path:
            p.freeze()
    if name in methods.names():
        adapt(gpt, name, verbose=False, **methods.known(name, r=2))
        for p in gpt.trainable().values():
            p.data[...] += rng.normal(0.0, 0.3, p.shape)  # B = 0 would hide dA
    return gpt


def random_ids(*shape, seed=0, vocab=TINY.vocab_size):
    return np.random.default_rng(seed).integers(0, vocab, shape)


def logits(gpt, ids, rng=None):
    with no_grad():
        return gpt(ids, rng).data


# -------------------------------------------------------------------------------- forward


def test_the_forward_pass_by_numpy_alone():
    """One block written out again, without the package's operations."""
    gpt, ids = lively(GPTConfig(7, 6, 8, 1, 2)), random_ids(2, 5)
    p = {name: a.data for name, a in gpt.named_parameters()}

    def norm(x, g, b):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * g + b

    def layer(x, name):
        return x @ p[f"blocks.0.{name}.W"].T + p[f"blocks.0.{name}.b"]

    for row, sequence in enumerate(ids):
        x = p["tokens"][sequence] + p["positions"][:5]
        h = norm(x, p["blocks.0.norm1.g"], p["blocks.0.norm1.b"])
        heads = []
        for q, k, v in zip(*(np.split(layer(h, name), 2, axis=1) for name in "qkv"), strict=True):
            weights = np.tril(np.exp(q @ k.T / math.sqrt(4)))
            heads.append(weights / weights.sum(axis=1, keepdims=True) @ v)
        x = x + layer(np.concatenate(heads, axis=1), "o")
        u = layer(norm(x, p["blocks.0.norm2.g"], p["blocks.0.norm2.b"]), "up")
        x = x + layer(u / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3))), "down")
        expected = norm(x, p["norm.g"], p["norm.b"]) @ p["tokens"].T
        np.testing.assert_allclose(logits(gpt, ids)[5 * row : 5 * row + 5], expected, rtol=1e-11, atol=1e-12)


def test_no_logit_depends_on_a_later_token():
    gpt, ids = lively(), random_ids(2, 6)
    before = logits(gpt, ids).reshape(2, 6, -1)
    for t in range(1, 6):
        changed = ids.copy()
        changed[:, t] = (changed[:, t] + 1) % TINY.vocab_size
        after = logits(gpt, changed).reshape(2, 6, -1)
        np.testing.assert_array_equal(after[:, :t], before[:, :t])
        assert (after[:, t:] != before[:, t:]).any(axis=-1).all()  # and each later one does depend on it


def test_loss_is_the_cross_entropy_of_the_logits():
    gpt, ids, targets = lively(), random_ids(2, 4), random_ids(2, 4, seed=1)
    targets[0, 1] = ops.IGNORE_INDEX
    expected = ops.cross_entropy(Tensor(logits(gpt, ids)), targets=targets.ravel())
    assert gpt.loss(ids, targets).data == expected.data
    assert GPT(TINY)(ids).dtype == GPT(TINY).loss(ids, targets).dtype == np.float32


def test_initial_weights_are_gpt2s():
    """Normal of deviation 0.02, by 1/√(2 n_layer) less where a layer writes to the residual stream."""
    gpt = GPT(GPTConfig(vocab_size=96, n_positions=64, n_embd=64, n_layer=3, n_head=4))
    for name, p in gpt.named_parameters():
        if p.data.ndim == 1:
            assert (p.data == (1.0 if name.endswith(".g") else 0.0)).all(), name
        else:
            std = 0.02 / math.sqrt(2 * 3) if name.endswith(("o.W", "down.W")) else 0.02
            four_deviations = 4 / math.sqrt(2 * p.data.size)  # of a sample's standard deviation, relative to it
            assert abs(p.data.std() / std - 1.0) < four_deviations, name


def test_a_seed_is_a_model_and_the_default_is_zero():
    models = (GPT(TINY, rng) for rng in (0, np.random.default_rng(0), 4))
    for (name, a), (_, b), (_, other) in zip(*(m.named_parameters() for m in models), strict=True):
        np.testing.assert_array_equal(a.data, b.data)
        assert name.endswith((".g", ".b")) or not np.array_equal(a.data, other.data)
    np.testing.assert_array_equal(GPT(TINY).tokens.data, GPT(TINY, 0).tokens.data)


SMALL = GPTConfig(vocab_size=5, n_positions=4, n_embd=4, n_layer=1, n_head=2)


@pytest.mark.parametrize("name", ["all trained", "lora"])
def test_gradient_entry_by_entry(name):
    gpt = lively(SMALL, name)
    ids, targets = random_ids(2, 4, vocab=5), random_ids(2, 4, seed=1, vocab=5)
    targets[1, 2] = ops.IGNORE_INDEX
    report = check_model(gpt, ids, targets)
    assert {row.array for row in report.rows} == set(gpt.trainable())
    assert {row.method for row in report.rows} == {"central", "complex"}
    assert report, report


# -------------------------------------------------------------------------------- dropout

DROPPING = GPTConfig(vocab_size=7, n_positions=6, n_embd=8, n_layer=2, n_head=2, dropout=0.3)


def test_dropout_is_applied_only_with_a_generator_and_reproducible_from_its_seed():
    ids, none, dropping = random_ids(2, 5), lively(), lively(DROPPING)
    undropped = logits(none, ids)
    np.testing.assert_array_equal(logits(dropping, ids), undropped)
    np.testing.assert_array_equal(logits(none, ids, np.random.default_rng(1)), undropped)
    first, again, other = (logits(dropping, ids, np.random.default_rng(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other) and not np.array_equal(first, undropped)


def test_dropout_is_drawn_for_the_embedding_and_twice_in_each_block(monkeypatch):
    drawn = []

    def spy(x, *, p, rng):
        drawn.append((x.shape, p))
        return ops.dropout(x, p=p, rng=rng)

    monkeypatch.setattr("minilora.gpt.dropout", spy)
    logits(GPT(DROPPING), random_ids(2, 5), np.random.default_rng(0))
    assert drawn == [((10, 8), 0.3)] * (1 + 2 * TINY.n_layer)


# -------------------------------------------------------------------------------- sampling

LENGTHS = [  # (context, prompt, new tokens)
    (6, 1, 5),
    (6, 4, 12),  # past the context twice
    (6, 9, 4),  # of a prompt longer than the context, its end counts
    (1, 1, 3),
]


@pytest.mark.parametrize(("context", "prompt", "n"), LENGTHS)
@pytest.mark.parametrize("name", ["all trained", "lora"])
def test_cached_sampling_equals_the_full_forward_pass(context, prompt, n, name):
    """Where the context is full, the model reads the later half again, the new token included, and goes on."""
    gpt, ids = lively(GPTConfig(7, context, 8, 2, 2), name), random_ids(3, prompt)
    text = np.concatenate([ids, gpt.generate(ids, n, temperature=0.0)], axis=1)
    assert text.shape == (3, prompt + n)
    start = max(0, prompt - context)
    for t in range(prompt, prompt + n):
        expected = logits(gpt, text[:, start:t]).reshape(3, t - start, -1)[:, -1].argmax(axis=1)
        np.testing.assert_array_equal(text[:, t], expected)
        if t + 1 - start > context:
            start = t + 1 - max(1, context // 2)


def test_a_seed_is_a_text():
    gpt, ids = lively(), random_ids(2, 2)
    first, again, other = (gpt.generate(ids, 20, rng=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    np.testing.assert_array_equal(first, gpt.generate(ids, 20, rng=np.random.default_rng(1)))


@pytest.mark.parametrize("options", [{"top_k": 1}, {"temperature": 1e-40}])
def test_one_candidate_or_no_temperature_is_greedy(options):
    gpt, ids = lively(dtype=np.float32), random_ids(2, 2)
    new = gpt.generate(ids, 8, rng=1, **options)
    np.testing.assert_array_equal(new, gpt.generate(ids, 8, temperature=0.0))


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, None), (0.5, None), (2.0, 3)])
def test_tokens_are_drawn_from_the_softmax(temperature, top_k):
    row, n = np.array([1.0, 0.0, -1.0, 2.0, 0.5]), 20_000
    weights = np.exp(row / temperature) * (row >= np.sort(row)[-(top_k or 5)])
    p = weights / weights.sum()
    drawn = sample(np.tile(row, (n, 1)), temperature, top_k, np.random.default_rng(0))
    share = np.bincount(drawn, minlength=5) / n
    assert (np.abs(share - p) <= 4 * np.sqrt(p * (1 - p) / n)).all()


# -------------------------------------------------------------------------------- what is refused

MISTAKES = {
    "too long": (lambda gpt: gpt(random_ids(2, 7)), "a sequence of 7 tokens is longer than the context, 6"),
    "too large": (lambda gpt: gpt(np.array([[0, 7]])), "GPT: ids run from 0 to 7; they must lie in 0 … 6"),
    "negative": (lambda gpt: gpt(np.array([[-1, 3]])), "GPT: ids run from -1 to 3"),
    "one axis": (lambda gpt: gpt(np.array([0, 1])), r"ids have shape \(2,\); expected \(batch, time\)"),
    "no token": (lambda gpt: gpt(np.zeros((2, 0), int)), r"ids have shape \(2, 0\)"),
    "no sequence": (lambda gpt: gpt(np.zeros((0, 2), int)), r"ids have shape \(0, 2\)"),
    "float": (lambda gpt: gpt(np.array([[0.0, 1.0]])), "GPT: ids must be integers, got float64"),
    "targets: float": (lambda gpt: gpt.loss(random_ids(2, 3), np.zeros((2, 3))), "ids must be integers"),
    "targets: count": (lambda gpt: gpt.loss(random_ids(2, 3), random_ids(2, 4)), r"targets"),
    "targets: turned": (lambda gpt: gpt.loss(random_ids(2, 3), random_ids(3, 2)), r"targets"),
    "generate: n": (lambda gpt: gpt.generate(random_ids(1, 2), 0), "generate: n is 0"),
    "generate: one axis": (lambda gpt: gpt.generate(np.array([0, 1]), 2), r"\(2,\)"),
    "generate: no token": (lambda gpt: gpt.generate(np.zeros((1, 0), int), 2), "generate: the prompt is empty"),
    "generate: float": (lambda gpt: gpt.generate(np.array([[1.0]]), 2), "GPT: ids must be integers"),
    "temperature": (lambda gpt: gpt.generate(random_ids(1, 2), 2, temperature=-1.0), "temperature is -1.0"),
    "temperature nan": (lambda gpt: gpt.generate(random_ids(1, 2), 2, temperature=math.nan), "temperature is nan"),
    "top_k 0": (lambda gpt: gpt.generate(random_ids(1, 2), 2, top_k=0), "top_k is 0; it must lie in 1 … 7"),
    "top_k 8": (lambda gpt: gpt.generate(random_ids(1, 2), 2, top_k=8), "top_k is 8"),
    "dropout 1": (lambda _: GPTConfig(dropout=1.0), "GPTConfig: dropout is 1.0"),
    "dropout nan": (lambda _: GPTConfig(dropout=math.nan), "GPTConfig: dropout is nan"),
    "heads": (lambda _: GPTConfig(n_head=3), "n_embd 128 is not a multiple of n_head 3"),
    "device": (lambda gpt: gpt.to("tpu"), 'unknown device "tpu"'),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named(name):
    f, message = MISTAKES[name]
    with pytest.raises(InputError, match=message):
        f(GPT(TINY))


@pytest.mark.parametrize("field", ["vocab_size", "n_positions", "n_embd", "n_layer", "n_head"])
def test_a_size_is_a_positive_integer(field):
    for value in (0, 2.0, "2"):
        with pytest.raises(InputError, match=f"GPTConfig: {field} is {value!r}"):
            GPTConfig(**{field: value})


def test_parameters_are_found_in_order_and_modules_by_path():
    class Pair(Module):
        def __init__(self):
            self.layers = [Linear(np.ones((2, 3)), np.zeros(2)), Linear(np.ones((1, 2)))]
            self.scale, self.note = Parameter(np.ones(1)), "no parameter"

    pair = Pair()
    assert [name for name, _ in pair.named_parameters()] == ["layers.0.W", "layers.0.b", "layers.1.W", "scale"]
    assert dict(pair.named_modules()) == {"layers.0": pair.layers[0], "layers.1": pair.layers[1]}


def test_after_step_reaches_every_module_below():
    called = []

    class Deep(Module):
        def __init__(self, *below):
            self.below, self.weight = list(below), Parameter(np.ones(1))

        def after_step(self):
            called.append(self)
            super().after_step()

    one, two = Deep(), Deep()
    top = Deep(Deep(one, two))
    top.after_step()
    assert called == [top, top.below[0], one, two]


def test_frozen_parameters_are_listed_but_not_trainable():
    gpt = GPT(TINY).to("cpu")
    gpt.blocks[0].freeze()
    names = [name for name, _ in gpt.named_parameters()]
    assert list(gpt.trainable()) == [name for name in names if not name.startswith("blocks.0.")]


# -------------------------------------------------------------------------------- activation checkpointing


def learnt(gpt, rng=None):
    """(loss, gradients by name) of one pass."""
    loss = gpt.loss(random_ids(3, 6), random_ids(3, 6, seed=1), rng)
    for p in gpt.trainable().values():
        p.node.grad = None
    backward(loss)
    return loss.data, {name: p.grad for name, p in gpt.trainable().items()}


def assert_equal(one, other):
    assert one[0] == other[0] and one[1].keys() == other[1].keys()
    for name, grad in one[1].items():
        assert grad.any()
        np.testing.assert_array_equal(grad, other[1][name], name)


@pytest.mark.quick
@pytest.mark.parametrize("name", ["lora", "dora", "vera", "all trained", "norms trained"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputing_changes_no_gradient_by_a_bit(name, dropout):
    gpt = lively(GPTConfig(7, 6, 8, 2, 2, dropout=dropout), name, np.float32)
    expected = learnt(gpt, np.random.default_rng(3))
    assert gpt.recompute() is gpt
    assert_equal(learnt(gpt, np.random.default_rng(3)), expected)
    assert_equal(learnt(gpt.recompute(False), np.random.default_rng(3)), expected)


@pytest.mark.quick
def test_recomputing_saves_a_blocks_input_alone():
    gpt, ids, targets = lively(dtype=np.float32), random_ids(3, 6), random_ids(3, 6, seed=1)
    everything = ledger(gpt.loss(ids, targets), gpt)
    less = ledger(gpt.recompute().loss(ids, targets), gpt)
    saved = [(e.name, e.shape) for e in less if e.operation == "recompute"]
    assert saved == [("x", (18, 8))] * gpt.config.n_layer
    outside = ("embedding", "layer_norm", "linear", "cross_entropy", "add")
    assert {e.operation for e in less} <= {"recompute", *outside}
    assert sum(e.nbytes for e in less) < 0.3 * sum(e.nbytes for e in everything)


@pytest.mark.quick
def test_a_recomputed_module_records_in_backward_alone():
    recorded = []

    class Square(Module):
        def __call__(self, x):
            recorded.append(is_recording())
            return x * x

    x = Tensor(np.ones(2), requires_grad=True)
    y = recompute(Square(), x)
    assert recorded == [False]
    backward(y.sum())
    assert recorded == [False, True]
    np.testing.assert_array_equal(x.grad, [2.0, 2.0])


@pytest.mark.quick
def test_sampling_records_nothing_and_is_the_same_where_blocks_are_recomputed():
    recorded = []

    class Watched(GPT):
        def __call__(self, ids, **options):
            recorded.append(is_recording())
            return super().__call__(ids, **options)

    gpt, ids = Watched(TINY), random_ids(2, 2)
    expected = gpt.generate(ids, 9, rng=1)
    np.testing.assert_array_equal(gpt.recompute().generate(ids, 9, rng=1), expected)
    assert set(recorded) == {False}
