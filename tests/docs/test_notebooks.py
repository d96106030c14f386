"""The notebooks: source and executed twin agree, nothing in them is of one machine, and each exercise can be failed.

``-m notebooks`` runs them all from a fresh kernel, where the "notebooks" extra is installed.
"""

import ast
import contextlib
import importlib.util
import io
import json
import re
import runpy
import symtable
import time
from pathlib import Path
from statistics import mean

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "notebooks"
NAMES = sorted(path.stem for path in FOLDER.glob("[0-9][0-9]_*.py"))
every_notebook = pytest.mark.parametrize("name", NAMES)

spec = importlib.util.spec_from_file_location("notebooks_make", FOLDER / "make.py")
make = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make)


def source_of(name):
    return make.cells((FOLDER / f"{name}.py").read_text(encoding="utf-8"))


def executed(name):
    return json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))


def outputs(name):
    return [output for cell in executed(name)["cells"] for output in cell.get("outputs", [])]


def printed(output) -> str:
    return "".join(output.get("text", [])) + "".join(output.get("data", {}).get("text/plain", []))


# --------------------------------------------------------------------------------------------------- what is committed


def test_all_twelve_are_there_in_both_forms():
    assert [name[:2] for name in NAMES] == [f"{i:02}" for i in range(12)]
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == NAMES


@every_notebook
def test_source_and_notebook_have_the_same_cells(name):
    twin = [(cell["cell_type"], "".join(cell["source"])) for cell in executed(name)["cells"]]
    for i, (one, other) in enumerate(zip(source_of(name), twin, strict=True)):
        assert one == other, f"cell {i}: python notebooks/make.py notebooks/{name}.py"


@every_notebook
def test_the_notebook_was_run_once_from_top_to_bottom(name):
    code = [cell for cell in executed(name)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert sum(map(bool, outputs(name))) >= 5
    for output in outputs(name):
        assert output["output_type"] != "error" and output.get("name") != "stderr", output


@every_notebook
def test_nothing_in_it_is_of_one_machine(name):
    places = re.compile(r"(?<![\w.:/])/(work|tmp|home|root|Users|private|var|opt|usr)/")
    for text in (printed(output) for output in outputs(name)):
        assert not places.search(text), text
        assert not re.search(r"\.py:\d+: \w*Warning| at 0x", text), text
    found = executed(name)
    assert set(found["metadata"]) <= {"jupytext", "kernelspec", "language_info"}
    assert set(found["metadata"].get("language_info", {})) <= {"name"}
    assert not any("execution" in cell["metadata"] for cell in found["cells"])


@every_notebook
def test_the_first_cell_says_where_it_is_and_what_it_is_for(name):
    (kind, first), (_, second) = source_of(name)[:2]
    badge, _, title = first.partition("\n\n")
    url = f"https://colab.research.google.com/github/minilora/minilora/blob/main/notebooks/{name}.ipynb"
    assert kind == "markdown"
    assert badge == f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({url})"
    assert title.startswith(f"# {name[:2]} · ")
    after = first.split("**After this you can**")[1]
    assert 3 <= len(re.findall(r"^- ", after, re.MULTILINE)) <= 5
    assert second.startswith("# On Colab: !pip install -q git+https://github.com/minilora/minilora")


@every_notebook
def test_each_figure_is_small_and_has_words_for_who_cannot_see_it(name):
    for output in outputs(name):
        if "image/png" in output.get("data", {}):
            assert output["metadata"]["image/png"]["alt"].strip()
            assert len(output["data"]["image/png"]) < 200_000
        else:
            assert "Figure(" not in printed(output), "a figure is shown by plots.show(figure, alt)"


@every_notebook
def test_links_lead_somewhere(name):
    for kind, text in source_of(name):
        for target in re.findall(r"\]\(([^)#\s]+)\)", text) if kind == "markdown" else ():
            assert target.startswith("https://") or (FOLDER / target).exists(), target


# ------------------------------------------------------------------------------------------------------- the exercises


def code_of(name):
    return [text for kind, text in source_of(name) if kind == "code"]


def assessed(text) -> list[str]:
    """The functions that a cell's assess() calls are about."""
    calls = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]
    return [ast.unparse(call.args[1]) for call in calls if call.func.id == "assess"]


def exercises(name):
    return [function for text in code_of(name) for function in assessed(text)]


def answers(name) -> dict:
    """The file's {function: (right, wrong)}, each the source of an answer or a tuple of several.

    Nothing where there is no such file, which fails below.
    """
    path = ROOT / "tests" / "notebooks" / f"answers_{name[:2]}.py"
    return runpy.run_path(str(path))["ANSWERS"] if path.exists() else {}


MUTATORS = ("append", "extend", "update", "add", "insert", "write_text")


def walk_outside(node):
    """The nodes of a statement that do not lie in a function, a class or a comprehension of its own."""
    yield node
    inner = ast.FunctionDef | ast.ClassDef | ast.Lambda | ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp
    for child in () if isinstance(node, inner) else ast.iter_child_nodes(node):
        yield from walk_outside(child)


def gives(statement) -> tuple[set, set]:
    """The names that a statement assigns anew, and those that it may assign, or whose objects it changes."""
    nodes = list(walk_outside(statement))
    names = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    names |= {n.name for n in nodes if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    imports = [n for n in nodes if isinstance(n, ast.Import | ast.ImportFrom)]
    names |= {(a.asname or a.name).split(".")[0] for n in imports for a in n.names}
    parts = [n for n in nodes if isinstance(n, ast.Subscript | ast.Attribute) and isinstance(n.ctx, ast.Store)]
    parts += [n.func for n in nodes if isinstance(n, ast.Call) and getattr(n.func, "attr", "") in MUTATORS]
    changed = {next((n.id for n in ast.walk(part.value) if isinstance(n, ast.Name)), "") for part in parts}
    certain = isinstance(statement, ast.Assign | ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef)
    return (names, changed) if certain else (set(), names | changed)


def takes(statement) -> set:
    """The names that a statement needs from before it; not those that are local to a function or a comprehension."""

    def needed(table):
        whole = table.get_type() == "module"
        names = {s.get_name() for s in table.get_symbols() if s.is_referenced() and (whole or s.is_global())}
        return names.union(*map(needed, table.get_children()))

    return needed(symtable.symtable(ast.unparse(statement), "statement", "exec"))


def verdict(name, function, answer=None) -> str:
    """What the cell that checks ``function`` prints, after the statements before it that its names come from."""
    bodies = [ast.parse(text).body for text in code_of(name)]
    (last,) = (i for i, text in enumerate(code_of(name)) if function in assessed(text))
    before = [statement for body in bodies[:last] for statement in body]
    if answer is not None:
        is_it = lambda s: isinstance(s, ast.FunctionDef) and s.name == function
        before = [new for s in before for new in (ast.parse(answer).body if is_it(s) else [s])]
    chosen, wanted = bodies[last][:], set()
    for statement in reversed(bodies[last]):
        wanted = wanted - gives(statement)[0] | takes(statement)
    for statement in reversed(before):
        assigned, changed = gives(statement)
        if wanted & (assigned | changed):
            chosen.insert(0, statement)
            wanted = wanted - assigned | takes(statement)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(ast.Module(chosen, []), f"{name}, {function}", "exec"), {"__name__": "__main__"})
    lines = [line for line in out.getvalue().splitlines() if line[:1] in ("✓", "✗", "○")]
    return lines[-len(assessed(code_of(name)[last])) :][assessed(code_of(name)[last]).index(function)]


@every_notebook
def test_there_are_exercises_with_solutions_and_answers_that_are_tested(name):
    markdown = [text for kind, text in source_of(name) if kind == "markdown"]
    assert any("## Exercises" in text for text in markdown)
    assert 3 <= len(exercises(name)) <= 5
    assert sum(text.count("<details>") for text in markdown) >= len(exercises(name))
    assert list(answers(name)) == exercises(name)
    shown = "".join(map(printed, outputs(name)))
    assert shown.count("not answered yet") == len(exercises(name))


CASES = [(name, function) for name in NAMES for function in answers(name)]


@pytest.mark.parametrize(("name", "function"), CASES)
def test_a_right_answer_is_right_and_a_wrong_one_gets_a_hint(name, function):
    several = lambda sources: (sources,) if isinstance(sources, str) else sources
    right, wrong = map(several, answers(name)[function])
    assert right and wrong
    assert verdict(name, function).startswith("○")
    for answer in right:
        assert (said := verdict(name, function, answer)).startswith("✓"), said + answer
    for answer in wrong:
        said = verdict(name, function, answer)
        assert said.startswith("✗") and "NameError" not in said, said + answer


# ------------------------------------------------------------------------------------- the figures that stand in a text


def literal(name, variable):
    """The value of a literal that a cell assigns to ``variable``."""
    for text in code_of(name):
        for node in ast.parse(text).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == variable:
                return ast.literal_eval(node.value)
    raise AssertionError(f"{name} assigns no {variable}")


def test_the_recorded_sweep_is_the_one_in_docs():
    lines = (ROOT / "docs" / "sweep" / "learning_rates.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "loss_b" in row]
    for method, (rates, b, a) in literal("09_family", "by_rate").items():
        runs = [[row for row in rows if row["method"] == method and row["lr"] == lr] for lr in rates]
        assert rates == sorted({row["lr"] for row in rows if row["method"] == method})
        assert b == [round(mean(row["loss_b"] for row in of), 3) for of in runs]
        assert a == [round(mean(row["loss_a"] for row in of), 3) for of in runs]


def test_the_recorded_comparison_of_seed_0_is_the_one_in_docs():
    rows = {row["method"]: row for row in json.loads((ROOT / "docs" / "compare.json").read_text())["rows"]}
    recorded = literal("09_family", "recorded")
    assert set(recorded) == set(rows)
    for method, (b, a) in recorded.items():  # workers round sums in another order
        assert b[0] == pytest.approx(rows[method]["loss_b_after"], abs=2e-4)
        assert a[0] == pytest.approx(rows[method]["loss_a_after"], abs=2e-4)


# ------------------------------------------------------------------------------------------------- from a fresh kernel


@pytest.mark.notebooks
@every_notebook
def test_it_runs_from_a_fresh_kernel(name, tmp_path, record_property):
    """Elsewhere than in its folder, as on Colab; make.SECONDS is the most that a cell may take."""
    for package in ("nbclient", "nbformat", "ipykernel"):
        pytest.importorskip(package)
    start = time.perf_counter()
    ran = make.executed(make.notebook((FOLDER / f"{name}.py").read_text(encoding="utf-8")), tmp_path)
    print(f"{name}: {time.perf_counter() - start:.0f} s")
    assert all(cell["execution_count"] for cell in ran["cells"] if cell["cell_type"] == "code")
    assert not list(tmp_path.iterdir()), "it leaves files behind"
