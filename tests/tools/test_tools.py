"""The tools a reader uses: ledger, trace, catalogue and diff."""

import json
import tracemalloc

import numpy as np
import pytest

from minilora import GPT, GPTConfig, adapt, count_parameters, kept_bytes, methods
from minilora.cli import main
from minilora.tools import catalogue
from minilora.tools.audit import audit
from minilora.tools.diff import code, difference, equations
from minilora.tools.trace import show as show_trace
from minilora.tools.trace import trace

every_method = pytest.mark.parametrize("name", methods.names())
ids = np.random.default_rng(0).integers(0, 17, (8, 33))
BATCH = ids[:, :-1], ids[:, 1:]


def model(name, **options):
    gpt = GPT(GPTConfig(vocab_size=17, n_positions=32, n_embd=48, n_layer=2, n_head=2))
    return adapt(gpt, name, verbose=False, **methods.known(name, **{"r": 2, **options}))


# ---------------------------------------------------------------------------------------------------------- ledger


@every_method
def test_the_ledger_s_total_is_what_the_allocator_says(name):
    audited = audit(model(name), *BATCH)
    assert audited["total"] == sum(e.nbytes for e in audited["entries"]) > 0
    assert audited["total"] == pytest.approx(audited["allocator"], rel=0.02)
    assert not tracemalloc.is_tracing()


def test_the_ledger_sees_an_array_that_is_kept_in_secret():
    """The audit can fail: a node that holds an array outside its saved dict is in the allocator's figure alone."""
    gpt, secret = model("lora"), []

    class Hoarder(type(gpt)):
        def loss(self, *args):
            loss = super().loss(*args)
            secret.append(np.ones(kept_bytes(loss) // 8))
            return loss

    gpt.__class__ = Hoarder
    audited = audit(gpt, *BATCH)
    assert audited["allocator"] > 1.5 * audited["total"]


def test_ledger_command(capsys):
    assert main(["ledger", "lora", "lora_fa", "--batch", "1"]) == 0
    text = capsys.readouterr().out
    assert "attention" in text and text.count("the allocator says") == 2
    slope = next(line for line in text.splitlines() if "slope" in line)
    assert slope.split()[-2] == "4"  # equal entries are one line: that of all four blocks
    assert main(["ledger", "lora", "--batch", "1", "--json"]) == 0
    audited = json.loads(capsys.readouterr().out)["lora"]
    assert audited["total"] == sum(e["nbytes"] for e in audited["entries"])
    assert {"operation", "name", "shape", "nbytes"} == set(audited["entries"][0])


def test_frozen_a_keeps_less_and_the_rank_hardly_matters():
    kept = {
        (n, r): kept_bytes((m := model(n, r=r)).loss(*BATCH), m) for n in ("lora", "lora_fa", "vera") for r in (1, 4)
    }
    tokens, d = 8 * 32, 48
    x = 4 * tokens * (3 * d + 4 * d) * 2  # the inputs of q k v, o, up and of down, in two blocks
    assert kept["lora", 1] - kept["lora_fa", 1] == x
    assert kept["lora_fa", 4] - kept["lora_fa", 1] == 4 * tokens * 3 * 12  # three more numbers for each of 12 layers
    assert kept["vera", 4] == kept["lora_fa", 4]


# ----------------------------------------------------------------------------------------------------------- trace


@pytest.mark.parametrize("name", ["lora", "vera"])
def test_trace_lists_the_step_in_order_with_shapes_bytes_and_gradients(name, capsys):
    gpt = model(name)
    steps = trace(gpt, *BATCH)
    layers = [s.layer for s in steps if s.operation == name]
    assert layers == [f"blocks.{i}.{n}" for i in range(2) for n in ("q", "k", "v", "o", "up", "down")]
    assert steps[-1].operation == "cross_entropy" and steps[-1].gradient_norm == 1.0
    assert sum(s.kept_bytes for s in steps) == kept_bytes(gpt.loss(*BATCH), gpt)
    up = next(s for s in steps if s.layer == "blocks.0.up")
    assert up.dy.shape == (256, 192) and up.inputs[0] == (256, 48)
    assert up.gradient_norm == pytest.approx(np.linalg.norm(up.dy), rel=1e-5)
    table = show_trace(steps)
    assert len(table.splitlines()) == len(steps) + 2 and "blocks.1.down" in table
    assert main(["trace", name]) == 0
    printed = capsys.readouterr().out
    assert "blocks.3.down" in printed and "x_hat" in printed


# ------------------------------------------------------------------------------------------------------- catalogue


def test_the_catalogue_counts_what_an_adapted_model_has(monkeypatch):
    """It makes no array: the counts come from the shapes that the methods declare."""
    config = GPTConfig(vocab_size=17, n_positions=8, n_embd=64, n_layer=1, n_head=2)
    monkeypatch.setattr(catalogue, "GPTConfig", lambda: config)
    for entry in catalogue.catalogue():
        trainable, total = count_parameters(adapt(GPT(config), entry["method"], verbose=False))
        assert (entry["trainable"], entry["trainable_percent"]) == (trainable, 100 * trainable / total)


# ------------------------------------------------------------------------------------------------------------ diff


def test_diff_shows_what_freezing_a_changes_and_nothing_else():
    text = difference("lora", "lora_fa")
    assert "- dA = dhᵀ x" in text and "- dA = dh.T @ saved.x" in text
    assert '+ return y, {"h": h}' in text
    assert "dx = dy W + dh A" not in text and "h = x @ p.A.T" not in text  # the same in both
    text = difference("lora", "lora_plus")
    assert "+ lr_ratio = 16.0" in text and "lr_scale" in text
    assert "backward" not in text and "forward" not in text  # both are inherited


@every_method
def test_diff_knows_every_equation_and_every_function(name):
    assert difference(name, name) == f"{name} and {name} do not differ"
    assert {"F", "B"} <= set(equations(name))
    assert {"init", "forward", "backward", "merge"} <= set(code(name))


def test_diff_command(capsys):
    assert main(["diff", "lora", "dora"]) == 0
    assert "lora → dora" in capsys.readouterr().out
    assert main(["diff", "lora", "doora"]) == 2
    assert 'did you mean "dora"' in capsys.readouterr().err
