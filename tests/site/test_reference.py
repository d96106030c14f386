"""What docs/conf.py makes itself: equations of docstrings one below the other, and each command's help in its place."""

import html as entities
import re

import pytest

pytestmark = pytest.mark.site


def words(markup: str) -> str:
    return " ".join(entities.unescape(re.sub(r"<[^>]*>", "", markup)).split())


def test_an_equation_of_a_docstring_is_a_row_of_its_own(html):
    part = (html / "api.html").read_text("utf-8").split('id="minilora.ops.linear_backward"')[1].split("</table>")[0]
    rows = [[words(cell) for cell in re.findall(r"<td>(.*?)</td>", row, re.DOTALL)] for row in part.split("<tr")[1:]]
    assert [row[:2] for row in rows] == [["B1", "dx = dy W"], ["B2", "dW = dyᵀ x"], ["B3", "db = Σ_N dy"]]


def test_the_command_line_s_page_has_each_help(html):
    page = (html / "cli.html").read_text("utf-8")
    commands = re.findall(r"<h3>(\w+)", page)
    assert commands and not [name for name in commands if f"usage: minilora {name} " not in words(page)]
