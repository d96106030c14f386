"""Whole trainings, sampling, files and memory: the same on a GPU as on the CPU, and the same each time."""

import gc

import numpy as np
import pytest
from twice import METHODS, assert_all_close, assert_close, batches, model, train, weights

import minilora
from minilora.backend import to_host
from minilora.data import CharTokenizer, fixed_batches, load_corpus
from minilora.files.base import fingerprint
from minilora.files.checkpoint import load_adapter, save_adapter

pytestmark = pytest.mark.gpu
each_method = pytest.mark.parametrize("name", [*METHODS, None], ids=[*METHODS, "no method"])


@each_method
def test_a_training_in_float64(cupy, name):
    losses, gpt = train("cpu", np.float64, name)
    losses_there, there = train("cuda", np.float64, name)
    assert losses[-1] < losses[0]
    np.testing.assert_allclose(losses_there, losses, rtol=1e-10)
    assert_all_close(weights(there), weights(gpt), 1e-10, "after 20 steps")


@each_method
def test_a_training_in_float32(cupy, name):
    """Adam divides a gradient by its own size, so that one which is 0 but for rounding, such as that of k's bias, moves
    its weight at random. So the losses are compared, and the distance that all weights together have gone."""
    losses, gpt = train("cpu", np.float32, name)
    losses_there, there = train("cuda", np.float32, name)
    np.testing.assert_allclose(losses_there, losses, rtol=1e-5)
    apart = length({n: to_host(p) - weights(gpt)[n] for n, p in weights(there).items()})
    start = weights(train("cpu", np.float32, name, steps=1)[1])
    gone = length({n: p - start[n] for n, p in weights(gpt).items()})
    assert apart <= (1e-2 if name is None else 1e-4) * gone


def length(arrays):
    return np.sqrt(sum(np.sum(np.square(a, dtype=np.float64)) for a in arrays.values()))


@pytest.mark.parametrize("name", METHODS)
def test_two_runs_are_bit_for_bit_the_same(cupy, name):
    """Of an adapter: the gradient of an embedding, which is frozen then, is added up in no fixed order."""
    (losses, gpt), (losses_again, again) = (train("cuda", np.float32, name, steps=8) for _ in range(2))
    assert losses == losses_again
    for key, p in weights(again).items():
        assert np.array_equal(to_host(p), to_host(weights(gpt)[key])), key


def test_activation_checkpointing_and_gradient_accumulation_give_the_same_gradient(cupy):
    """But for rounding, since a kernel may add a product in one operation."""
    ids, targets = next(batches())
    grads = []
    for again, parts in ((False, 1), (True, 1), (False, 3)):
        gpt = minilora.adapt(model(np.float64, "cuda"), "lora", verbose=False).recompute(again)
        for part in np.split(np.arange(len(ids)), parts):
            minilora.backward(gpt.loss(ids[part], targets[part]))
        grads.append({name: p.grad / parts for name, p in gpt.trainable().items()})
    for other in grads[1:]:
        assert_all_close(other, {name: to_host(grad) for name, grad in grads[0].items()}, 1e-12, "the gradient")


# ---------------------------------------------------------------------------------------- sampling, files, memory


@pytest.mark.parametrize(
    "how", [{"temperature": 0.0}, {"temperature": 0.7, "top_k": 20, "rng": 3}], ids=["greedy", "drawn"]
)
def test_sampled_tokens_are_the_same(cupy, how):
    ids, texts = CharTokenizer().encode("Enter Macbeth and his Lady.\n\n")[None], []
    for device in ("cpu", "cuda"):
        gpt = minilora.adapt(minilora.pretrained().to(device), "lora", verbose=False)
        minilora.merge(gpt)
        texts.append(gpt.generate(ids, 150, **how))  # beyond the context, so that it is read again
    assert isinstance(texts[1], np.ndarray) and np.array_equal(*texts)


@pytest.mark.parametrize("name", METHODS)
def test_an_adapter_trained_on_the_gpu_is_loaded_on_the_cpu(cupy, name, tmp_path):
    gpt = model(np.float32, "cuda")
    mark = fingerprint(gpt)
    assert mark == fingerprint(model(np.float32, "cpu"))
    minilora.adapt(gpt, name, verbose=False)
    minilora.train(gpt, minilora.AdamW(gpt.trainable(), lr=3e-3), batches(), 3, progress=False)
    save_adapter(tmp_path / "adapter.safetensors", gpt, mark)
    loaded, again = (load_adapter(tmp_path / "adapter.safetensors", model(np.float32, d)) for d in ("cpu", "cuda"))
    for key, p in weights(loaded).items():
        assert np.array_equal(p, to_host(weights(gpt)[key])), key
    ids, targets = next(batches(seed=1))
    assert_close(gpt.loss(ids, targets).data, np.asarray(loaded.loss(ids, targets).data), 1e-5, "the loss")
    assert float(again.loss(ids, targets).data) == float(gpt.loss(ids, targets).data)


@pytest.mark.parametrize("recompute", [False, True], ids=["plain", "recompute"])
@pytest.mark.parametrize("name", METHODS)
def test_the_ledger_gives_the_growth_of_the_pool(pool, name, recompute):
    gpt = minilora.adapt(minilora.pretrained().to("cuda"), name, verbose=False).recompute(recompute)
    ids, targets = fixed_batches(CharTokenizer().encode(load_corpus("folio").val), 8, 128)[0]
    gpt.loss(ids, targets)  # what is allocated once and for all is allocated now
    gc.collect()
    before = pool.used_bytes()
    loss = gpt.loss(ids, targets)
    assert pool.used_bytes() - before == pytest.approx(minilora.kept_bytes(loss, gpt), rel=0.05)


def test_evaluation_gives_its_memory_back(pool):
    gpt = minilora.pretrained().to("cuda")
    held_out = fixed_batches(CharTokenizer().encode(load_corpus("folio").val), 8, 128)[:2]
    minilora.evaluate(gpt, held_out)
    gc.collect()
    before = pool.used_bytes()
    minilora.evaluate(gpt, held_out)
    assert pool.used_bytes() == before
