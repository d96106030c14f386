"""What the site makes itself: equations of docstrings one below the other, and each command's help in its place."""

import html
import re

import pytest
from browsing import HTML

pytestmark = pytest.mark.site
if not (HTML / "api.html").exists():
    pytest.skip(f"the site is not built in {HTML}: make -C docs", allow_module_level=True)


def page(name: str) -> str:
    return (HTML / name).read_text(encoding="utf-8")


def words(markup: str) -> str:
    return " ".join(html.unescape(re.sub(r"<[^>]*>", "", markup)).split())


def test_an_equation_of_a_docstring_is_a_row_of_its_own():
    part = page("api.html").split('id="minilora.ops.linear_backward"')[1].split("</table>")[0]
    rows = [[words(cell) for cell in re.findall(r"<td>(.*?)</td>", row, re.DOTALL)] for row in part.split("<tr")[1:]]
    assert [row[:2] for row in rows] == [["B1", "dx = dy W"], ["B2", "dW = dyᵀ x"], ["B3", "db = Σ_N dy"]]
    assert all(len(row) == 3 and row[2] for row in rows)


def test_a_rule_without_a_tag_is_a_row_too():
    part = page("api.html").split('id="minilora.AdamW"')[1].split("</table>")[0]
    assert "w ← (1 − lr · weight_decay) w − lr · m̂ / (√v̂ + eps)" in [words(cell) for cell in part.split("<td>")]


def test_the_command_line_s_page_has_each_help():
    text = words(page("cli.html"))
    headings = re.findall(r"<h3>(\w+)", page("cli.html"))
    assert len(headings) >= 14
    for command in headings:
        assert f"usage: minilora {command} [-h]" in text


def test_a_shape_in_a_table_is_marked_so_that_it_stays_on_one_line():
    part = page("conventions.html").split("Which way round", 1)[1]
    assert re.search(r'<code[^>]*>.*?lora_down.*?<span class="whole">.*?\(r,.*?d_in\)', part)
