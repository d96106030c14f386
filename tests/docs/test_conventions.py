"""docs/conventions.md: the tables of numbers that docs/tables.py does not make, against the code."""

import math
import re

import numpy as np
import pages
import pytest

from minilora import methods
from minilora.engine import Saved

PAGE = pages.read("conventions.md")


def marked(name: str) -> list[list[str]]:
    """The rows of the table below ``<!-- name -->``, without its head."""
    table = re.search(rf"<!-- {name} -->\n((?:\|.*\n)+)", PAGE)[1].splitlines()
    return [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in table[2:]]


def significant(value: float, printed: str) -> str:
    """``value`` with as many significant digits as ``printed`` has."""
    digits = len(printed.replace(".", "").lstrip("0")) or 1
    return f"{float(f'{value:.{digits - 1}e}'):g}"


def test_factors_follow_from_their_formulas():
    for code, formula, printed in marked("factors"):
        value = eval(formula.replace("√r", "math.sqrt(r)"), {"math": math}, {"r": 8, "alpha": 16.0})
        assert significant(value, printed) == printed, f"{code}: {formula} is {value}"


DRAWS = {  # a draw of A (r, d)
    "U(±1/√d_in)": lambda g, d, r: g.uniform(-1, 1, (r, d)) / math.sqrt(d),
    "U(±1/√r)": lambda g, d, r: g.uniform(-1, 1, (r, d)) / math.sqrt(r),
    "U(±√6/√d_in)": lambda g, d, r: g.uniform(-1, 1, (r, d)) * math.sqrt(6 / d),
    "N(0, 0.02²)": lambda g, d, r: g.normal(0, 0.02, (r, d)),
    "N(0, 1/r²)": lambda g, d, r: g.normal(0, 1 / r, (r, d)),
    "N(0, 1/r)": lambda g, d, r: g.normal(0, 1 / math.sqrt(r), (r, d)),
}


def test_std_of_A_x():
    """What is printed is measured, for each draw; and minilora's A are those of the rows that name it."""
    d, r, rng = 768, 8, np.random.default_rng(0)
    x = rng.standard_normal((500, d))
    table = {entries: float(printed) for entries, printed, _ in marked("inits")}
    assert set(table) == set(DRAWS)
    for entries, printed in table.items():
        assert np.std([x @ DRAWS[entries](rng, d, r).T for _ in range(4)]) == pytest.approx(printed, rel=0.05), entries
    lora = methods.create("lora", r=r).init(np.zeros((5, d)), rng, {})[0]["A"]
    vera = methods.create("vera", r=64).init_shared([(5, d)], rng)["A"]
    for A, entries in ((lora, "U(±1/√d_in)"), (vera, "U(±√6/√d_in)")):
        assert np.std(x @ A.T) == pytest.approx(table[entries], rel=0.08)


@pytest.mark.parametrize("row", marked("merge"), ids=lambda row: row[0])
def test_float32_merge_error(row):
    d = int(row[0])
    for name, printed in zip(("lora", "dora"), row[1:], strict=True):
        rng, method = np.random.default_rng(0), methods.create(name)
        W = rng.standard_normal((d, d))
        arrays, _ = method.init(W, rng, {})
        arrays["B"] = 0.1 * rng.standard_normal(arrays["B"].shape)
        p = Saved((k, a.astype(np.float32)) for k, a in arrays.items())
        x, W = rng.standard_normal((64, d)).astype(np.float32), W.astype(np.float32)
        y, _ = method.forward(x, W, p)
        error = np.linalg.norm(y - x @ method.merge(W, p).T) / np.linalg.norm(y)
        assert float(printed) / 2.5 <= error <= float(printed) * 2.5, f"{name}: {error:.1e}"


def test_merge_differences_by_width_and_format():
    """The table of why/merge-difference.md; another BLAS library may move float32 by a factor of 2.5."""
    page, namespace = pages.read("why/merge-difference.md"), {}
    for code, _ in pages.blocks(page)[:2]:
        exec(code.split("\nprint(", 1)[0], namespace)
    for d, *printed in re.findall(
        r"^\| (\d+) \| (\S+) \| (\S+) \| (\S+) \|$", page.split("<!-- measured -->")[1], re.M
    ):
        for rounding, number in zip(namespace["ROUND"].values(), printed, strict=True):
            measured, _ = namespace["compare"](rounding, 0.1, d=int(d))
            assert float(number) / 2.5 <= measured <= float(number) * 2.5
            assert float(number) < 1e-6 or f"{measured:.0e}".replace("e-0", "e-") == number
