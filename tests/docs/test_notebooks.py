"""The notebooks: source and executed twin agree, nothing in them is of one machine, and each exercise can be failed.

``-m notebooks`` runs them all from a fresh kernel, where the "notebooks" extra is installed.
"""

import ast
import importlib.util
import json
import re
from statistics import mean

import pages
import pytest
from mistakes import MISTAKES

ROOT = pages.DOCS.parent
FOLDER = ROOT / "notebooks"
NAMES = sorted(path.stem for path in FOLDER.glob("[0-9][0-9]_*.py"))
every_notebook = pytest.mark.parametrize("name", NAMES)


def source_of(name) -> str:
    return (FOLDER / f"{name}.py").read_text(encoding="utf-8")


def executed(name) -> dict:
    return json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))


def cells(name) -> list[tuple[str, str]]:
    """The cells of the executed notebook, as (kind, source)."""
    return [(cell["cell_type"], "".join(cell["source"])) for cell in executed(name)["cells"]]


def outputs(name) -> list[dict]:
    return [output for cell in executed(name)["cells"] for output in cell.get("outputs", [])]


def printed(output) -> str:
    return "".join(output.get("text", [])) + "".join(output.get("data", {}).get("text/plain", []))


def solutions(name) -> dict[str, str]:
    """{function: the code of the solution that the notebook folds away}."""
    markdown = "\n".join(text for kind, text in cells(name) if kind == "markdown")
    folded = re.findall(r"<details>(?:(?!</details>).)*?```python\n(.*?)```", markdown, re.DOTALL)
    return {re.search(r"^def (\w+)", code, re.MULTILINE)[1]: code for code in folded}


def assessed(text) -> list[str]:
    """The functions that a code cell's assess() calls are about."""
    calls = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]
    return [ast.unparse(call.args[1]) for call in calls if call.func.id == "assess"]


# --------------------------------------------------------------------------------------------------- what is committed


@every_notebook
def test_source_and_notebook_have_the_same_cells(name):
    """The notebook's cells, written as a percent-format file, are the source below its head."""
    comment = lambda text: "\n".join(f"# {line}".rstrip() for line in text.split("\n"))
    twin = [f"# %%\n{text}" if kind == "code" else f"# %% [markdown]\n{comment(text)}" for kind, text in cells(name)]
    source = re.sub(r"\n{3,}# %%", "\n\n# %%", source_of(name).split("# ---\n\n", 1)[1])
    assert source == "\n\n".join(twin) + "\n", f"run: python notebooks/make.py notebooks/{name}.py"


@every_notebook
def test_the_notebook_was_run_once_from_top_to_bottom_and_nothing_in_it_is_of_one_machine(name):
    found = executed(name)
    code = [cell for cell in found["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert set(found["metadata"]) == {"jupytext", "kernelspec"}
    assert not any(cell["metadata"] for cell in found["cells"])
    for output in outputs(name):
        assert output["output_type"] != "error" and output.get("name") != "stderr", output
        assert not re.search(r"(?<![\w.:/])/(work|tmp|home|root|Users|private|var|opt|usr)/", printed(output)), output
        assert not re.search(r"\.py:\d+: \w*Warning| at 0x", printed(output)), output


@every_notebook
def test_the_first_cell_has_the_badge_and_the_title(name):
    (kind, first), (_, second) = cells(name)[:2]
    url = f"https://colab.research.google.com/github/minilora/minilora/blob/main/notebooks/{name}.ipynb"
    badge = f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({url})"
    assert kind == "markdown" and first.startswith(f"{badge}\n\n# {name[:2]} · ")
    assert second.startswith("# On Colab: !pip install -q git+https://github.com/minilora/minilora")


@every_notebook
def test_each_figure_is_small_and_has_an_alt_text(name):
    for output in outputs(name):
        if "image/png" in output.get("data", {}):
            assert output["metadata"]["image/png"]["alt"].strip()
            assert len(output["data"]["image/png"]) < 200_000
        else:
            assert "Figure(" not in printed(output), "a figure is shown by plots.show(figure, alt)"


@every_notebook
def test_links_lead_somewhere(name):
    for kind, text in cells(name):
        for target in re.findall(r"\]\(([^)#\s]+)\)", text) if kind == "markdown" else ():
            assert target.startswith("https://") or (FOLDER / target).exists(), target


@every_notebook
def test_every_exercise_has_a_solution_and_a_mistake_that_it_can_be_tried_with(name):
    asked = [function for kind, text in cells(name) if kind == "code" for function in assessed(text)]
    assert list(solutions(name)) == list(MISTAKES[name]) == asked and len(asked) >= 3
    assert all(right in solutions(name)[function] for function, (right, _) in MISTAKES[name].items())
    assert "".join(map(printed, outputs(name))).count("not answered yet") == len(asked)


# ------------------------------------------------------------------------------------- the figures that stand in a text


def literal(name, variable):
    """The value of a literal that a cell assigns to ``variable``."""
    for node in ast.parse(source_of(name)).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == variable:
            return ast.literal_eval(node.value)
    raise AssertionError(f"{name} assigns no {variable}")


def test_the_recorded_sweep_is_the_one_in_docs():
    rows = [row for row in map(json.loads, pages.read("sweep/learning_rates.jsonl").splitlines()) if "loss_b" in row]
    for method, (rates, b, a) in literal("09_family", "by_rate").items():
        runs = [[row for row in rows if row["method"] == method and row["lr"] == lr] for lr in rates]
        assert rates == sorted({row["lr"] for row in rows if row["method"] == method})
        assert b == [round(mean(row["loss_b"] for row in of), 3) for of in runs]
        assert a == [round(mean(row["loss_a"] for row in of), 3) for of in runs]


def test_the_recorded_comparison_of_seed_0_is_the_one_in_docs():
    rows = {row["method"]: row for row in json.loads(pages.read("compare.json"))["rows"]}
    for method, (b, a) in literal("09_family", "recorded").items():  # workers round sums in another order
        assert b[0] == pytest.approx(rows[method]["loss_b_after"], abs=2e-4)
        assert a[0] == pytest.approx(rows[method]["loss_a_after"], abs=2e-4)


# ------------------------------------------------------------------------------------------------- from a fresh kernel


@pytest.mark.notebooks
@every_notebook
def test_it_runs_from_a_fresh_kernel_and_takes_its_own_solutions_alone(name, tmp_path):
    """Elsewhere than in its folder, as on Colab; each exercise is also tried with its solution and with a mistake."""
    for package in ("nbclient", "nbformat", "ipykernel", "jupytext"):
        pytest.importorskip(package)
    spec = importlib.util.spec_from_file_location("notebooks_make", FOLDER / "make.py")
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    notebook = make.notebook(source_of(name))
    new_cell = make.nbformat.v4.new_code_cell
    code, run, tried = [cell for cell in notebook.cells if cell.cell_type == "code"], [], []
    for cell in notebook.cells:
        run.append(cell)
        for i, function in enumerate(assessed(cell.source) if cell.cell_type == "code" else ()):
            stub = next(other for other in code if f"def {function}(" in other.source)
            solution = solutions(name)[function]
            for mark, answer in ("✓", solution), ("✗", solution.replace(*MISTAKES[name][function], 1)):
                run.append(new_cell(f"{answer}\n{cell.source}"))
                tried.append((run[-1], i - len(assessed(cell.source)), mark))
            run.append(new_cell(stub.source))
    notebook.cells = run
    make.executed(notebook, tmp_path)
    for cell, i, mark in tried:
        said = [line for text in map(printed, cell.outputs) for line in text.splitlines() if line[:1] in "✓✗○"]
        assert said[i].startswith(mark) and "NameError" not in said[i], f"{said[i]}\n{cell.source}"
    assert not list(tmp_path.iterdir()), "it leaves files behind"
