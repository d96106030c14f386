"""Every table about methods is what docs/tables.py makes, and a new method file is in all of them by itself."""

import re
import sys

import pages
import pytest

from minilora import methods

sys.path.insert(0, str(pages.DOCS))
import pictures
import tables

RUN = "run: python docs/tables.py"
TWICE = '''"""Twice LoRA: an update that is doubled.   Nobody 2026, arXiv 2601.00001

  F3  s = 2 alpha / r

Kept for backward: x (N, d_in), h (N, r)
"""

from dataclasses import dataclass

from minilora.methods.lora import LoRA


@dataclass(frozen=True)
class Twice(LoRA):
    boost: float = 2.5

    @property
    def scaling(self) -> float:
        return 2 * self.alpha / self.r  # () F3
'''


@pytest.mark.parametrize("page", tables.pages(), ids=lambda page: page.stem)
def test_every_block_is_what_the_method_files_and_the_records_say(page):
    assert tables.filled(page) == page.read_text(encoding="utf-8"), RUN


@pytest.mark.parametrize("name", methods.names())
def test_a_picture_shows_the_method_s_own_arrays(name):
    described = pictures.described(tables.page_of(name).with_suffix(".png"))
    assert described == pictures.description(*tables.picture_of(name)), RUN


def test_a_block_that_was_changed_is_made_again(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- compared lora full -->old<!-- /compared -->\nb <!-- other -->kept<!-- /other -->\n")
    made = tables.filled(page)
    assert (
        "old" not in made and "| `lora` | 73,728 |" in made and made.endswith("b <!-- other -->kept<!-- /other -->\n")
    )


@pytest.fixture
def twice(tmp_path, monkeypatch):
    """A method whose file lies in the registry, and nothing else: no page, no learning rate, no record."""
    (tmp_path / "twice.py").write_text(TWICE)
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])
    yield "twice"
    sys.modules.pop("minilora.methods.twice")


def test_a_new_method_file_is_in_every_table_with_no_other_edit(twice, tmp_path):
    readme, index, conventions, adapters = map(tables.filled, tables.pages()[:4])
    assert re.search(
        r"^\| \[`twice`\]\(minilora/methods/twice.py\) \| Twice LoRA: an update .*2601.00001", readme, re.M
    )
    assert "| `twice` | Twice LoRA: an update that is doubled. | 0.005 |" in index
    for row in (r".*`twice`.* \| `2 \* alpha / r` \| 4", r".*`twice`.* \| `W` \(base\)", r"`twice` \| `boost` \| 2.5"):
        assert re.search(rf"^\| {row} \|", conventions, re.MULTILINE), row
    assert "`twice`" in re.search(r"<!-- summands -->(.*?)<!--", adapters)[1]
    picture = tmp_path / "twice.png"
    pictures.write(picture, *tables.picture_of(twice))
    assert pictures.described(picture) == pictures.description(*tables.picture_of(twice))
