"""What is recorded in the repository is what was measured: learning rates from the sweep, the figure from its run."""

import json
from importlib import resources

import pages

from minilora import methods
from minilora.lab import results
from minilora.lab.compare import ROW_KEYS, page
from minilora.lab.task import learning_rate

RATES = json.loads((resources.files("minilora") / "learning_rates.json").read_text())


def test_the_learning_rates_are_the_best_of_the_recorded_sweep(tmp_path):
    """Of several rates and seeds for each method; a best rate at the edge of its grid is refused."""
    lines = list(results.read(pages.DOCS / "sweep/learning_rates.jsonl")[0].values())
    results.record(lines, tmp_path / "best.json")
    assert json.loads((tmp_path / "best.json").read_text()) == RATES
    assert {line["method"] for line in lines} == set(RATES["methods"]) <= set(methods.names())
    for name in RATES["methods"]:
        runs = [line for line in lines if line["method"] == name]
        assert len({run["lr"] for run in runs}) >= 5 and len({run["seed"] for run in runs}) >= 2


def test_a_method_that_was_never_swept_gets_the_default():
    assert learning_rate("unheard_of") == RATES["default"]


def test_the_comparison_s_page_is_made_from_its_record():
    result = json.loads(pages.read("compare.json"))
    assert {row["method"] for row in result["rows"]} <= set(methods.names())
    assert all(list(row) == ROW_KEYS for row in result["rows"])
    assert pages.read("compare.md") == page(result)
    for row in result["rows"]:
        assert row["loss_b_after"] < row["loss_b_before"] - 0.3  # all of them learn the Folio's spelling
