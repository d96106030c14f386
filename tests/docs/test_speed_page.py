"""The figures of docs/speed.md and README.md are those that were recorded, and the records are whole."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def page():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import speed_page
    finally:
        sys.path.pop(0)
    return speed_page


def test_what_is_printed_is_what_was_recorded(page):
    for name, marks in page.parts().items():
        text = (ROOT / name).read_text(encoding="utf-8")
        assert page.filled(text, marks) == text, f"{name}: run python benchmarks/speed_page.py"


def test_the_whole_report_is_made_from_the_record(page):
    seen = page.load("docs/speed/versus_peft.json")
    assert (ROOT / "docs/speed/versus_peft.md").read_text(encoding="utf-8") == page.report.tables(seen) + "\n"


def test_the_sizes_are_those_that_were_measured(page):
    table = page.parts()["docs/speed.md"]["sizes"]
    assert "| M | 4 | 128 | 4 | 128 | 16 | 2,048 | 65 |" in table
    assert "| XL | 12 | 768 | 12 | 128 | 4 | 512 | 50,257 |" in table
    recorded = json.loads((ROOT / "docs/memory.json").read_text(encoding="utf-8"))["sizes"]["M"]["shape"]
    assert recorded == [65, 128, 128, 4, 4, 16]


def test_what_the_sentences_say_of_the_record(page):
    text = " ".join((ROOT / "docs/speed.md").read_text(encoding="utf-8").split())
    rows = page.load("docs/speed/versus_peft.json")["rows"]
    at = {(row["size"], row["threads"]): row for row in rows if row["method"] == "lora"}
    assert {row["torch_adamw"] for row in rows} == {"fused"} and "the fused one in every row" in text

    workers = {size: at[size, 2]["ms"]["minilora_2_workers"] for size in ("S", "M", "L", "XL")}
    span = lambda values, form: f"{format(min(values), form)} to {format(max(values), form)}"
    one_core = span([at[size, 1]["ms"]["minilora"] / ms for size, ms in workers.items()], ".1f")
    blas = [at[size, 2]["ms"]["minilora"] / ms for size, ms in workers.items()]
    assert f"{one_core} times as fast as one core, and {min(blas):.2f} to {max(blas):.1f} times as fast as two" in text
    assert f"on two cores {one_core} times as fast as on one" in text

    forward = [at[size, 2]["forward_ratio_quartiles"][1] for size in ("M", "L", "XL")]
    assert f"{span(forward, '.2f')} times as long as PyTorch's on two threads from M up" in text
    rates = [row["tokens_per_second"] for row in at.values()]
    assert 5 / 6 < min(r["minilora"] / r["torch"] for r in rates) < 0.85 and "up to a sixth slower" in text

    kept = at["M", 1]["kept_bytes"]
    memory = page.load("docs/memory.json")["sizes"]["M"]["rows"]["LoRA, recompute attention"]
    assert f"{kept['minilora'] / 2**20:.1f} MiB against {kept['torch'] / 2**20:.1f} at M" in text
    assert f'`recompute("attention")` it is {memory["kept_bytes"] / 2**20:.1f}' in text
    assert round(memory["step_ratio"], 2) == 1.05 and "a twentieth more time" in text

    floor = page.load("docs/speed/floor.json")["results"]
    share = {size: row["products_ms"] / row["step_ms"] for size, row in floor.items()}
    assert 0.75 < share["L"] < share["XL"] and "At L and XL three quarters of a step and more" in text
    by_method = {row["method"]: row for row in rows if (row["size"], row["threads"]) == ("M", 1)}
    assert [m for m, row in by_method.items() if row["ratio_quartiles"][1] > 1] == ["full"]
    assert by_method["dora"]["ratio_quartiles"][1] < 1


def test_a_changed_figure_and_a_lost_mark_are_seen(page):
    text = (ROOT / "docs/speed.md").read_text(encoding="utf-8")
    marks = page.parts()["docs/speed.md"]
    assert page.filled(text.replace("a step, ms |", "a step, s |", 1), marks) == text
    with pytest.raises(KeyError, match="floor"):
        page.filled(text.replace("<!-- floor -->", ""), marks)


def test_the_comparison_has_every_row_that_it_should_have():
    rows = json.loads((ROOT / "docs/speed/versus_peft.json").read_text(encoding="utf-8"))["rows"]
    seen = {(row["size"], row["method"], row["threads"]) for row in rows}
    assert {(size, "lora", threads) for size in ("S", "M", "L", "XL") for threads in (1, 2)} <= seen
    assert {("M", m, 1) for m in ("full", "lora_fa", "lora_plus", "vera", "dora", "dora_detached", "rslora")} <= seen
    for row in rows:
        assert row["loss_distance"] <= 1e-4
        assert not row["notes"], row["notes"]
