"""The tables of speed and memory are the recorded ones, and the record of the comparison is whole."""

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def page():
    """benchmarks/speed_page.py, which is not part of the package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        yield importlib.import_module("speed_page")


@pytest.mark.parametrize("name", ["docs/speed.md", "docs/memory.md", "README.md"])
def test_the_tables_are_the_recorded_ones(page, name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert page.filled(text, page.parts()[name]) == text, "run python benchmarks/speed_page.py"


def test_the_comparison_has_every_row_that_it_should_have(page):
    rows = page.load("docs/speed/versus_peft.json")["rows"]
    seen = {(row["size"], row["method"], row["threads"]) for row in rows}
    assert {(size, "lora", threads) for size in ("S", "M", "L", "XL") for threads in (1, 2)} <= seen
    assert {("M", m, 1) for m in ("full", "lora_fa", "lora_plus", "vera", "dora", "dora_detached", "rslora")} <= seen
    for row in rows:
        assert row["loss_distance"] <= 1e-4
        assert not row["notes"], row["notes"]
