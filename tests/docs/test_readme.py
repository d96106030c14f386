"""README.md says what is true: its code runs, its lists are whole, the shipped model is as good as it says."""

import re

import pages
import pytest

import minilora
from minilora.cli import COMMANDS
from minilora.lab.task import Task

README = pages.read("../README.md")
ROOT = pages.DOCS.parent


def test_the_method_shown_is_the_method_file():
    block = re.search(r"```python\n(def forward.*?)```", README, re.DOTALL)[1]
    indented = "".join(f"    {line}".rstrip() + "\n" for line in block.splitlines())
    assert indented in (ROOT / "minilora/methods/lora.py").read_text(encoding="utf-8")


def test_the_python_example_runs(capsys):
    """In at most twelve lines; with 3 steps instead of 20 here, for which the loss falls too."""
    block = re.search(r"```python\n(import numpy.*?)```", README, re.DOTALL)[1]
    assert len([line for line in block.splitlines() if line.strip()]) <= 12
    assert block.count("steps=20") == 1
    exec(compile(block.replace("steps=20", "steps=3"), "README.md", "exec"), {})
    before, after = map(float, re.search(r"loss (\S+) → (\S+),", capsys.readouterr().out).groups())
    assert after < before


def test_each_notebook_has_a_row_with_its_title_and_a_badge_that_leads_to_it():
    table = re.search(r"<!-- notebooks -->\n(.*)\n<!-- /notebooks -->", README, re.DOTALL)[1].splitlines()[2:]
    for row, path in zip(table, sorted((ROOT / "notebooks").glob("*.ipynb")), strict=True):
        title = re.search(r"^# # (.*)$", path.with_suffix(".py").read_text(encoding="utf-8"), re.MULTILINE)[1]
        assert f"[{title}](notebooks/{path.name})" in row
        assert f"colab.research.google.com/github/minilora/minilora/blob/main/notebooks/{path.name})" in row


def test_every_command_is_listed():
    assert set(re.findall(r"^\| `minilora (\w+)", README, re.MULTILINE)) == set(COMMANDS)


def test_the_shipped_model_is_as_good_as_it_says():
    stated = re.search(r"held-out loss of (\d\.\d+) nats per character", README)[1]
    assert minilora.evaluate(minilora.pretrained(), Task().held_out_a) == pytest.approx(float(stated), abs=0.006)
