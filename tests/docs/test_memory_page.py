"""docs/memory.md says what is true: its tables are the recorded ones, its arithmetic is the ledger's, its code runs."""

import importlib
import json
import re
from pathlib import Path

import numpy as np
import pytest

from minilora.cli import main
from minilora.gpt import RECOMPUTED
from minilora.memory import kept_bytes

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
REPORT = json.loads((ROOT / "docs" / "memory.json").read_text(encoding="utf-8"))
BARS = {  # by the page's code: a row of the tables
    "textbook": "LoRA on a textbook tape",
    "lora": "LoRA",
    "recompute": "LoRA, recompute all three",
    "lora_fa": "LoRA-FA",
}
each_bar = pytest.mark.parametrize("bar", BARS)


@pytest.fixture(scope="module")
def memory():
    """benchmarks/memory.py, which is no part of the package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        yield importlib.import_module("memory")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def by_hand(bar, shape):
    """The page's own function at a row of benchmarks/shapes.py."""
    names = {}
    exec(compile(next(b for b in blocks("python") if b.startswith("def kept")), "docs/memory.md", "exec"), names)
    vocab, T, d, layers, heads, batch = shape
    return names["kept"](bar, batch * T, T, d, heads, layers, vocab)


def now(memory, row, shape):
    """Bytes that one forward pass keeps here and now."""
    model, ids, targets = memory.build(row, shape)
    return kept_bytes(model.loss(ids, targets), model)


# -------------------------------------------------------------------------------- what is recorded


def test_the_tables_are_made_from_the_recorded_run(memory):
    assert memory.fill(PAGE, memory.tables(REPORT)) == PAGE
    assert PAGE.count("<!-- tables -->") == PAGE.count("<!-- /tables -->") == 1


def test_the_record_has_every_row_and_agrees_with_itself(memory):
    assert list(REPORT["sizes"]) == list(memory.TITLES)
    for size, result in REPORT["sizes"].items():
        assert tuple(result["shape"]) == memory.SIZES[size] and list(result["rows"]) == list(memory.ROWS)
        for name, row in result["rows"].items():
            assert sum(row["groups"].values()) == row["kept_bytes"]
            assert row["allocator_bytes"] == pytest.approx(row["kept_bytes"], rel=0.005)
            assert row["peak_bytes"] > result["import_peak_bytes"] + row["kept_bytes"]
            how = memory.ROWS[name]
            off = max(row["difference"].values()) if how.same_gradient else 0.0
            assert off == 0.0 or (off < 1e-4 and (how.naive or how.micro_batches > 1))  # recompute: to the last bit
    assert (ROOT / "docs" / "memory.png").stat().st_size > 10_000


@each_bar
def test_the_arithmetic_gives_the_recorded_bytes(memory, bar):
    for size, result in REPORT["sizes"].items():
        assert by_hand(bar, memory.SIZES[size]) == result["rows"][BARS[bar]]["kept_bytes"]


# -------------------------------------------------------------------------------- what holds now


@each_bar
@pytest.mark.parametrize("shape", [(11, 12, 16, 2, 2, 3), (7, 128, 8, 3, 2, 1)], ids=str)
def test_the_arithmetic_gives_the_bytes_of_a_small_model(memory, bar, shape):
    assert now(memory, memory.ROWS[BARS[bar]], shape) == by_hand(bar, shape)


@each_bar
def test_the_colours_are_who_keeps_what(memory, bar):
    _, T, d, layers, heads, batch = shape = (11, 12, 16, 2, 2, 3)
    groups = memory.kept(memory.ROWS[BARS[bar]], shape)["groups"]
    N, numbers, tape = batch * T, {k: v / 4 / layers for k, v in groups.items()}, bar == "textbook"
    x = {"textbook": 7, "lora": 7, "recompute": 1 + 1 / layers, "lora_fa": 0}[bar]  # the first norm is kept
    squares = {"textbook": 2 * (T + 1), "recompute": 0}.get(bar, T)
    assert numbers[memory.X] == N * (x * d + 6 * memory.R)
    assert numbers[memory.GELU] == N * d * (16 if tape else 4)
    assert numbers[memory.PROBABILITIES] == N * heads * squares
    assert numbers[memory.QKV] == 3 * N * d
    assert numbers[memory.NORM] == (4 * N * (d + 1) if tape else 2 * N * (d + 1))


def test_the_table_of_arrays_adds_up():
    rows = re.findall(r"^\| (.*?) \|.* \| (\S+) \| (\S+) \| (\S+) \| (\S+) \|$", PAGE.partition("## By hand")[2], re.M)
    counts = [[int(cell) for cell in row[1:]] for row in rows if row[1].isdigit()]
    (total,) = (row[1:] for row in rows if row[0] == "**together**")
    assert [f"**{sum(column)}**" for column in zip(*counts, strict=True)] == list(total)
    width = re.search(r"width = \{(.*?)\}", PAGE)[1]
    assert re.findall(r"\d+", width) == [cell.strip("*") for cell in total]


def test_the_worked_example(memory):
    text = PAGE.partition("**Worked through")[2]
    layer, four, total, exact = re.search(
        r"A layer keeps ([\d.]+) MiB, four of them ([\d.]+)\..*Together ([\d.]+) MiB, or ([\d,]+) bytes",
        text,
        re.DOTALL,
    ).groups()
    assert int(exact.replace(",", "")) == by_hand("lora", memory.SIZES["M"])
    assert f"{int(exact.replace(',', '')) / 2**20:.3f}" == total
    vocab, T, d, layers, heads, batch = memory.SIZES["M"]
    N = batch * T
    assert N * d * 4 == 2**20 and N * heads * T * 4 == 4 * 2**20
    kept = 4 * (16 * N * d + 0.75 * N * heads * T + 6 * N * memory.R + 2 * N) / 2**20
    assert (f"{kept:.3f}", f"{layers * kept:.3f}") == (layer, four)
    assert float(total) == pytest.approx(float(four) + N * (4 * vocab + 12) / 2**20, abs=2e-3)


SMALL = (11, 12, 16, 2, 2, 4)


@pytest.mark.parametrize("name", ["textbook", *RECOMPUTED, "recompute", "LoRA, 2 micro-batches"])
def test_the_gradient_is_lora_s(memory, name):
    row = memory.ROWS[BARS.get(name) or (name if name in memory.ROWS else f"LoRA, recompute {name}")]
    off = memory.difference(row, SMALL, memory.gradient(memory.ROWS["LoRA"], SMALL))
    assert max(off.values()) <= (0.0 if row.recompute else 1e-5)


def test_a_wrong_textbook_tape_is_noticed(memory, monkeypatch):
    monkeypatch.setattr(memory, "layer_norm", lambda layer, x: x * 1.01)
    off = memory.difference(memory.ROWS[BARS["textbook"]], SMALL, memory.gradient(memory.ROWS["LoRA"], SMALL))
    assert max(off.values()) > memory.CLOSE


def test_what_recompute_saves_with_lora_fa(memory):
    kept = {names: now(memory, memory.Row("lora_fa", names), SMALL) for names in [(), *((n,) for n in RECOMPUTED)]}
    assert kept["layer_norm",] == kept["gelu",] == kept[()] > kept["attention",]


def test_micro_batches_divide_what_is_kept(memory):
    assert memory.kept(memory.Row(micro_batches=4), SMALL)["kept_bytes"] * 4 == now(memory, memory.Row(), SMALL)


# -------------------------------------------------------------------------------- its code, its commands, its links


def test_the_switches_run(capsys):
    (block,) = (b for b in blocks("python") if b.startswith("import"))
    names = {}
    exec(compile(block, "docs/memory.md", "exec"), names)
    assert np.isfinite(names["history"].loss).all()
    # the shipped model has 96 characters, and a part of the batch is two sequences
    assert names["history"].kept_bytes == by_hand("recompute", (96, 128, 128, 4, 4, 2))
    assert "MiB kept for backward" in capsys.readouterr().out


def test_the_commands_exist(memory, capsys, monkeypatch):
    measure, ledger = blocks("sh")
    program, *words = ledger.split()
    assert program == "minilora" and not main([*words, "--batch", "1"])
    printed = capsys.readouterr().out
    assert "the allocator says" in printed and all(word in printed for word in words[1:])
    script, *options = measure.rpartition("benchmarks/")[2].split()
    assert Path(memory.__file__).name == script
    monkeypatch.setattr("sys.argv", [script, "--help"])
    with pytest.raises(SystemExit):
        memory.main()
    assert options[0] in capsys.readouterr().out


def test_links_lead_to_files():
    links = re.findall(r"\]\(([^)#]+)\)", PAGE)
    assert len(links) >= 4 and all((ROOT / "docs" / link).exists() for link in links)
