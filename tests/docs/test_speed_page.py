"""The tables of speed and memory are the recorded ones, and the record of the comparison is whole."""

import pages
import pytest


@pytest.fixture(scope="module")
def page():
    return pages.benchmark("speed_page")


@pytest.mark.parametrize("name", ["speed.md", "memory.md", "../README.md"])
def test_the_tables_are_the_recorded_ones(page, name):
    marks = page.parts()[f"docs/{name}".removeprefix("docs/../")]
    assert page.filled(pages.read(name), marks) == pages.read(name), "run python benchmarks/speed_page.py"


def test_the_comparison_has_every_row_that_it_should_have(page):
    rows = page.load("docs/speed/versus_peft.json")["rows"]
    seen = {(row["size"], row["method"], row["threads"]) for row in rows}
    assert {(size, "lora", threads) for size in ("S", "M", "L", "XL") for threads in (1, 2)} <= seen
    assert {("M", m, 1) for m in ("full", "lora_fa", "lora_plus", "vera", "dora", "dora_detached", "rslora")} <= seen
    for row in rows:
        assert row["loss_distance"] <= 1e-4
        assert not row["notes"], row["notes"]
