"""The figures of docs/speed.md and README.md are those that were recorded, and the records are whole."""

import json
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.quick
ROOT = Path(__file__).parents[1]


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


def test_a_changed_figure_and_a_lost_mark_are_seen(page):
    text = (ROOT / "docs/speed.md").read_text(encoding="utf-8")
    marks = page.parts()["docs/speed.md"]
    assert page.filled(text.replace("step, ms |", "step, s |", 1), marks) == text
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
