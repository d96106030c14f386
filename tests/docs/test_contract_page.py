"""docs/contract.md shows a whole method file and its report: the file is a method, the report what is printed."""

import dataclasses
import re
import sys

import pages
import test_contract
from pytest import fixture

from minilora import methods
from minilora.adapter import Adapter
from minilora.cli import main
from minilora.tools.contract import CHECKS

PAGE = pages.read("contract.md")
FILE, REPORT, HINT = (
    re.search(rf"^```{kind}\n({start}.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)[1]
    for kind, start in (("python", '"""'), ("text", r"\$"), ("text", "✗"))
)


@fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with the page's file in it."""
    (tmp_path / "input_scale.py").write_text(FILE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@fixture
def registered(folder, monkeypatch):
    """As if the file were in the folder of methods."""
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(folder)])
    yield
    sys.modules.pop("minilora.methods.input_scale", None)


def test_the_report_is_what_the_command_prints(folder, capsys):
    command, _, expected = REPORT.partition("\n")
    assert main(command.split()[2:]) == 0
    assert capsys.readouterr().out == expected
    assert all(f"✓ {what}\n" in expected for what in CHECKS)


def test_the_hint_is_what_the_mistake_gets(folder, capsys):
    mistake = re.search(r"With `(dx = .*)`:\n", PAGE)[1]
    right = "dx = u * p.c"
    assert FILE.count(right) == 1
    (folder / "broken.py").write_text(FILE.replace(right, mistake), encoding="utf-8")
    assert main(["check", "--file", "broken.py"]) == 1
    assert HINT in capsys.readouterr().out


def test_the_file_is_a_method_that_the_suite_would_take(registered):
    assert main(["check", "input_scale"]) == 0
    test_contract.test_each_tagged_backward_line_matters_and_the_check_sees_it("input_scale")
    test_contract.test_shape_comments_are_true_while_the_code_runs("input_scale")
    test_contract.test_the_file_is_plain_and_holds_no_array("input_scale")


def test_the_tables_have_every_member_of_the_contract():
    needed = re.findall(r"^\|(?: \d)? \| `(\w+)` \|", PAGE, re.MULTILINE)
    rows = re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE)
    assert needed == ["shapes", "init", "forward", "backward", "merge"]
    in_peft = {name for name in vars(Adapter) if name.startswith("peft")} | {"from_peft", "is_product"}
    own = {name for name in vars(Adapter) if not name.startswith("_")} - {"name"} - in_peft
    assert dataclasses.is_dataclass(Adapter) and {*needed, *rows} == own
