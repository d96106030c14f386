"""README.md says what is true: its code runs, its table is the registry's, its figures are the model's."""

import re
import shlex
from pathlib import Path

import numpy as np
import pages
import pytest

import minilora
from minilora.lab.task import Task
from minilora.tools.catalogue import catalogue, markdown

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_the_table_of_methods_is_the_registry_s():
    table = re.search(r"<!-- methods -->\n(.*)\n<!-- /methods -->", README, re.DOTALL)[1]
    assert table == markdown(catalogue())


def test_the_method_shown_is_the_method_file():
    block = re.search(r"```python\n(def forward.*?)```", README, re.DOTALL)[1]
    source = (ROOT / "minilora/methods/lora.py").read_text()
    indented = "".join(f"    {line}".rstrip() + "\n" for line in block.splitlines())
    assert indented in source


def test_the_python_example_runs(capsys):
    block = re.search(r"```python\n(import numpy.*?)```", README, re.DOTALL)[1]
    exec(compile(block, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    before, after = map(float, re.search(r"loss (\S+) → (\S+),", printed).groups())
    assert after < before


def test_each_notebook_has_a_row_with_its_title_and_a_badge_that_leads_to_it():
    table = re.search(r"<!-- notebooks -->\n(.*)\n<!-- /notebooks -->", README, re.DOTALL)[1].splitlines()[2:]
    notebooks = sorted((ROOT / "notebooks").glob("*.ipynb"))
    assert len(table) == len(notebooks) == 12
    for row, path in zip(table, notebooks, strict=True):
        title = re.search(r"^# # (.*)$", path.with_suffix(".py").read_text(), re.MULTILINE)[1]
        assert f"[{title}](notebooks/{path.name})" in row
        assert f"colab.research.google.com/github/minilora/minilora/blob/main/notebooks/{path.name})" in row


def test_the_site_has_the_same_table_of_notebooks():
    rows = lambda text: re.findall(r"^\|.*(\[\d\d · [^]]*\]\(notebooks/\w+\.ipynb\) \| .* \|)$", text, re.MULTILINE)
    page = (ROOT / "docs/learn.md").read_text().replace("](../notebooks/", "](notebooks/")
    assert rows(page) == rows(README)
    assert len(rows(README)) == 12


def test_the_reading_order_is_the_same_on_the_site():
    beside = {"elementary.py", "blocks.py"}

    def order(text):
        lines = [re.findall(r"minilora/([\w/]+\.py)\)", line) for line in re.findall(r"^\d\. .*", text, re.MULTILINE)]
        return [[name for name in names if name not in beside] for names in lines if names]

    assert order(README) == order((ROOT / "docs/start.md").read_text())
    assert len(order(README)) == 7


def test_the_demo_is_twelve_lines():
    block = re.search(r"```python\n(import numpy.*?)```", README, re.DOTALL)[1]
    assert len([line for line in block.splitlines() if line.strip()]) <= 12


def test_links_lead_to_files():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert len(links) > 10
    for link in links:
        assert link.startswith("https://") or (ROOT / link).exists(), link


def test_every_command_named_exists(capsys):
    from minilora.cli import main

    for command in set(re.findall(r"^\| `minilora (\w+)", README, re.MULTILINE)):
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        assert stop.value.code == 0


def test_the_shipped_model_is_as_good_as_it_says():
    stated = re.search(r"held-out loss of (\d\.\d+) nats per character \(\*Macbeth\*", README)[1]
    assert Task().losses(minilora.pretrained())[0] == pytest.approx(float(stated), abs=0.006)
    assert sum(p.data.size for _, p in minilora.pretrained().named_parameters()) == pytest.approx(0.8e6, rel=0.05)


def test_what_freezing_does_to_a_da_is_true():
    """The README's sentence: at B = 0 a dA that is seven times too large passes."""
    from minilora.engine import Saved
    from minilora.tools.gradcheck import check_method

    class Wrong(minilora.methods.get("lora")):
        def backward(self, dy, saved, W, p):
            dx, grads = super().backward(dy, Saved(saved), W, p)
            return dx, {**grads, "A": 7 * grads["A"]}

    assert check_method(Wrong(r=3), at_init=True) and not check_method(Wrong(r=3))
    assert np.isfinite(check_method(Wrong(r=3)).worst_error)


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def command_lines():
    """Each ``minilora …`` in a shell block of README or docs, with the page that shows it."""
    for page in PAGES:
        if {"_build", "notebooks"} & set(page.parts):
            continue
        for block in re.findall(r"```(?:sh|bash)\n(.*?)```", page.read_text(), re.DOTALL):
            for line in re.findall(r"(?:^|&& |\.venv/bin/)(minilora .*?)(?=$| &&)", block, re.MULTILINE):
                yield pytest.param(line, id=f"{page.name}: {line}"[:80])


@pytest.mark.parametrize("line", list(command_lines()))
def test_a_command_line_on_a_page_is_one_that_the_program_takes(line):
    from minilora.cli import build_parser

    argv = shlex.split(line, comments=True)[1:]
    build_parser().parse_args(argv)  # exits with a message where it does not


SITE = [p for p in (ROOT / "docs").rglob("*.md") if "_build" not in p.parts]


@pytest.mark.parametrize("path", [ROOT / "README.md", *SITE], ids=lambda path: path.stem)
def test_no_line_of_code_is_cut_off_on_a_page(path):
    """92 characters are seen; README's commands may be longer, since GitHub's page is wider."""
    most = 120 if path.name == "README.md" else 92
    lines = "".join(pages.FENCED.findall(path.read_text(encoding="utf-8"))).splitlines()
    assert not [line for line in lines if len(line) > most]
