"""What is recorded in the repository is what was measured: learning rates from the sweep, the figure from its run."""

import json
from importlib import resources
from pathlib import Path

from minilora import methods
from minilora.lab import results
from minilora.lab.compare import ROW_KEYS, page
from minilora.lab.task import learning_rate

DOCS = Path(__file__).parents[2] / "docs"
SWEEP = DOCS / "sweep" / "learning_rates.jsonl"


def test_the_learning_rates_are_the_best_of_the_recorded_sweep(tmp_path):
    lines, _ = results.read(SWEEP)
    results.record(list(lines.values()), tmp_path / "best.json")  # refuses a best rate at the edge of its grid
    recorded = (resources.files("minilora") / "learning_rates.json").read_text()
    assert json.loads((tmp_path / "best.json").read_text()) == json.loads(recorded)


def test_every_method_has_been_swept_with_several_seeds_and_rates():
    lines = list(results.read(SWEEP)[0].values())
    assert {line["method"] for line in lines} == set(methods.names())
    for name in methods.names():
        of_method = [line for line in lines if line["method"] == name]
        assert len({line["lr"] for line in of_method}) >= 5 and len({line["seed"] for line in of_method}) >= 2
        assert learning_rate(name) in {line["lr"] for line in of_method}


def test_a_method_that_was_never_swept_gets_the_default():
    assert (
        learning_rate("unheard_of")
        == json.loads((resources.files("minilora") / "learning_rates.json").read_text())["default"]
    )


def test_the_recorded_comparison_has_every_method_and_its_page_is_made_from_it():
    result = json.loads((DOCS / "compare.json").read_text())
    assert [row["method"] for row in result["rows"]] == methods.names()
    assert all(list(row) == ROW_KEYS for row in result["rows"])
    assert (DOCS / "compare.md").read_text() == page(result)
    for row in result["rows"]:
        assert row["loss_b_after"] < row["loss_b_before"] - 0.3  # all of them learn the Folio's spelling
    folio = ("haue", "vp", "Bru.", "Ant.", "beare", "selfe", "heere", "thinke")
    before = result["samples"].pop("before")
    assert not any(word in before for word in folio)
    assert all(any(word in text for word in folio) for text in result["samples"].values())


def test_what_the_readme_says_the_comparison_shows():
    rows = {row["method"]: row for row in json.loads((DOCS / "compare.json").read_text())["rows"]}
    b, a = ({name: row[key] for name, row in rows.items()} for key in ("loss_b_after", "loss_a_after"))
    assert min(b, key=b.get) == max(a, key=a.get) == "full"
    assert b["lora"] - b["full"] < 0.02 and a["lora"] < a["full"]
    assert round(b["lora"] - b["dora"], 3) == 0.007
    assert b["delta_lora"] > b["delta_lora_control"] and b["lora_plus"] > b["lora"] - 0.001
    assert 0.6 < rows["lora_fa"]["kept_bytes"] / rows["lora"]["kept_bytes"] < 0.7
    assert abs(b["lora_fa"] - b["lora_fa_corrected"]) < 0.005
    assert rows["lora"]["trainable"] == 12 * rows["vera"]["trainable"] and max(b, key=b.get) == "vera"
    assert 1.25 < rows["dora"]["seconds_per_step"] / rows["lora"]["seconds_per_step"] < 1.4
