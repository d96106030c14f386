"""docs/memory.md is true: its arithmetic is the record's and what the graph holds, its code runs."""

import json
import re

import pages
import pytest

from minilora import ops
from minilora.cli import main
from minilora.memory import kept_bytes

PAGE, REPORT = pages.read("memory.md"), json.loads(pages.read("memory.json"))
BARS = {  # by the page's code: a row of the tables
    "textbook": "LoRA on a textbook tape",
    "lora": "LoRA",
    "recompute": "LoRA, recompute",
    "lora_fa": "LoRA-FA",
}
SMALL = (11, 12, 16, 2, 2, 4)
each_bar = pytest.mark.parametrize("bar", BARS)


@pytest.fixture(scope="module")
def memory():
    return pages.benchmark("memory")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def by_hand(bar, shape):
    """The page's own function at a row of benchmarks/shapes.py."""
    names = {}
    exec(compile(next(b for b in blocks("python") if b.startswith("def kept")), "docs/memory.md", "exec"), names)
    vocab, T, d, layers, heads, batch = shape
    return names["kept"](bar, batch * T, T, d, heads, layers, vocab)


# -------------------------------------------------------------------------------- the record


def test_the_record_agrees_with_itself(memory):
    for size, result in REPORT["sizes"].items():
        assert tuple(result["shape"]) == memory.SIZES[size] and list(result["rows"]) == list(memory.ROWS)
        for row in result["rows"].values():
            assert sum(row["groups"].values()) == row["kept_bytes"]
            assert row["allocator_bytes"] == pytest.approx(row["kept_bytes"], rel=0.005)
            assert row["peak_bytes"] > result["import_peak_bytes"] + row["kept_bytes"]


@each_bar
def test_the_arithmetic_gives_the_recorded_bytes(memory, bar):
    for size, result in REPORT["sizes"].items():
        assert by_hand(bar, memory.SIZES[size]) == result["rows"][BARS[bar]]["kept_bytes"]


# -------------------------------------------------------------------------------- what holds now


SHAPES = [(11, 12, 16, 2, 2, 3)]
if ops.attention.forms:  # the page counts the probabilities of the tiles in fast/, which matter where T is above 64
    SHAPES.append((7, 128, 8, 3, 2, 1))


@each_bar
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_arithmetic_gives_the_bytes_of_a_small_model(memory, bar, shape):
    model, ids, targets = memory.build(memory.ROWS[BARS[bar]], shape)
    assert kept_bytes(model.loss(ids, targets), model) == by_hand(bar, shape)


def test_recompute_adds_one_layer_in_backward(memory):
    model, _, _ = memory.build(memory.Row(), SMALL)
    one, two = (by_hand("lora", (*SMALL[:3], layers, *SMALL[4:])) for layers in (1, 2))
    assert memory.one_block(model, SMALL[-1]) == two - one


@pytest.mark.parametrize("name", ["LoRA on a textbook tape", "LoRA, recompute", "LoRA, 2 micro-batches"])
def test_the_gradient_is_lora_s(memory, name):
    row = memory.ROWS[name]
    off = memory.difference(row, SMALL, memory.gradient(memory.ROWS["LoRA"], SMALL))
    assert max(off.values()) <= (0.0 if row.recompute else 1e-5)


def test_the_table_of_arrays_adds_up():
    rows = re.findall(r"^\| (.*?) \|.* \| (\S+) \| (\S+) \| (\S+) \| (\S+) \|$", PAGE.partition("## By hand")[2], re.M)
    counts = [[int(cell) for cell in row[1:]] for row in rows if row[1].isdigit()]
    (total,) = (row[1:] for row in rows if row[0] == "**together**")
    assert [f"**{sum(column)}**" for column in zip(*counts, strict=True)] == list(total)


# -------------------------------------------------------------------------------- its code and its command


def test_the_switches_run(capsys):
    (block,) = (b for b in blocks("python") if b.startswith("import"))
    names = {}
    exec(compile(block.replace("steps=5", "steps=1"), "docs/memory.md", "exec"), names)
    # the shipped model has 96 characters, and a part of the batch is two sequences
    assert names["history"].kept_bytes == by_hand("recompute", (96, 128, 128, 4, 4, 2))


def test_the_ledger_s_command_runs(capsys):
    program, *words = blocks("sh")[-1].split()
    assert program == "minilora" and not main([*words, "--batch", "1"])
    printed = capsys.readouterr().out
    assert all(word in printed for word in words[1:])
