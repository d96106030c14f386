"""The exercises: what is missing is told, the right lines pass, and each mistake is told by its tag."""

import json
import re

import pytest
import source
from source import text_of

from minilora import InputError, methods
from minilora.cli import main
from minilora.tools import exercises
from minilora.tools.exercises import assess, exercise, grade, write_exercise
from minilora.tools.methodfile import backward_equations, docstring_and_code

OWN = [name for name in methods.names() if "backward" in vars(methods.get(name))]


@pytest.fixture
def grade_text(tmp_path):
    def grade_it(text, name="mine"):
        path = tmp_path / f"{name}.py"
        path.write_text(text, encoding="utf-8")
        return grade(path)

    return grade_it


def line_of(text, piece):
    return str(text[: text.index(piece)].count("\n") + 1)


def verdicts(grades):
    return {mark.what: mark.verdict for mark in grades.marks}


# --------------------------------------------------------------------------------------------------------------- assess


def test_assess_says_one_of_three_things(capsys):
    tests = [("it should be 4 for 2", lambda f: f(2) == 4), ("and 0 for 0", lambda f: f(0) == 0)]
    assess("square", lambda x: ..., *tests)
    assess("square", lambda x: None, *tests)
    assess("square", lambda x: x * x, *tests)
    assess("square", lambda x: x + x + 1, *tests)
    assess("square", lambda x: x + 2, *tests)
    assess("square", lambda x: x / 0, *tests)
    assert capsys.readouterr().out.splitlines() == [
        "○ square: not answered yet",
        "○ square: not answered yet",
        "✓ square: right",
        "✗ square: it should be 4 for 2",
        "✗ square: and 0 for 0",
        "✗ square: ZeroDivisionError: division by zero",
    ]


# ------------------------------------------------------------------------------------------------- the file with a hole


@pytest.mark.parametrize("name", OWN)
def test_the_exercise_keeps_the_equations_and_is_not_written_yet_line_by_line(name, tmp_path):
    grades = grade(write_exercise(name, tmp_path / f"{name}.py"))
    stated = backward_equations(text_of(name))
    assert verdicts(grades) == {f"{e.tag} {e.name}": "open" for e in stated}
    assert not grades and "not written yet" in str(grades)
    docstring, code = docstring_and_code(exercise(name))
    assert docstring == docstring_and_code(text_of(name))[0]
    hole = code[code.index("def backward") :].split("\n    def ")[0]
    assert hole.count("\n        # B") == len(stated) and "def forward" in code
    assert not re.search(r"^ {8}\w+ = ", hole, re.MULTILINE)


@pytest.mark.parametrize("name", OWN)
def test_the_original_passes(name, grade_text, monkeypatch):
    monkeypatch.setattr(exercises, "CHECKS", {})  # tests/test_contract.py has them
    stated = [f"{e.tag} {e.name}" for e in backward_equations(text_of(name))]
    assert verdicts(grade_text(text_of(name))) == dict.fromkeys([*stated, "return"], "right")


def test_every_tagged_line_of_every_method_has_an_equation_of_its_name():
    for name in OWN:
        lines = [m for line in text_of(name).splitlines() if (m := source.ASSIGNMENT.match(line))]
        written = {m[4].split()[-1]: (m[2], m[4].rpartition(" ")[0]) for m in lines}
        stated = {e.tag: (e.name, e.shape) for e in backward_equations(text_of(name))}
        assert stated == {tag: of for tag, of in written.items() if tag[0] == "B"}, name


def test_a_method_that_inherits_its_backward_names_the_one_to_ask_for():
    inherited = sorted(set(methods.names()) - set(OWN))
    assert len(inherited) > 3
    for name in inherited:
        with pytest.raises(InputError, match=f"{name} has no backward of its own.* minilora exercise lora"):
            exercise(name)


# ------------------------------------------------------------------------------------------------ mistakes by their tag


def spoilt(text):
    """(tag, kind, source): each tagged backward line scaled, negated, zeroed and, where that changes it, transposed."""
    for description, mutant in source.mutants(text):
        yield *description.split(), mutant
    lines = text.split("\n")
    for i, line in enumerate(lines):
        match = source.ASSIGNMENT.match(line)
        if match and match[4].split()[-1].startswith("B") and "," in match[4].strip("(").split(",)")[0]:
            indent, target, expression, comment = match.groups()
            turned = f"{indent}{target} = ({expression}).T  # {comment}"
            yield comment.split()[-1], "transposed", "\n".join([*lines[:i], turned, *lines[i + 1 :]])


HINTS = {"scaled": "constant factor 1.1", "sign": "sign is flipped", "zero": "zero everywhere",
         "transposed": "the transpose of it"}  # fmt: skip


@pytest.mark.parametrize("name", OWN)
def test_a_mistake_is_told_by_its_tag_and_once(name, grade_text, monkeypatch):
    """Each line has one mistake of its own kind here; that the check sees every kind is a test of the contract."""
    monkeypatch.setattr(exercises, "CHECKS", {})
    kinds, tags = list(HINTS), [e.tag for e in backward_equations(text_of(name))]
    for tag, kind, text in spoilt(text_of(name)):
        if kinds.index(kind) != tags.index(tag) % len(kinds):
            continue
        grades = grade_text(text)
        wrong = [mark for mark in grades.marks if mark.verdict != "right"]
        assert [mark.what.split()[0] for mark in wrong] == [tag], (tag, kind, str(grades))
        assert HINTS[kind] in wrong[0].hint, (tag, kind, str(grades))


@pytest.mark.parametrize(
    ("line", "becomes", "hint"),
    [
        ("dy @ (s * p.B)  # (N, r) B1", "dy @ p.B", "✗ B1 dh  constant factor 0.1875: was s forgotten?"),
        ("dy.T @ (s * saved.h)", "dy.T @ (s * s * saved.h)", "✗ B2 dB  constant factor 5.333: is s in it twice?"),
        ("dh.T @ saved.x", "0.5 * dh.T @ saved.x", "✗ B3 dA  constant factor 0.5: was a factor 2 forgotten?"),
        ("dh.T @ saved.x", "float((dh.T @ saved.x).sum())", "✗ B3 dA  is float; it must be an array (3, 7)"),
        ("dh.T @ saved.x", "saved.x @ dh", "✗ B3 dA  line {line}: ValueError: matmul: Input operand 1"),
        ('{"A": dA, "B": dB}', '{"A": dA}', "✗ return  has gradients for A; what is trained is A, B"),
        ('{"A": dA, "B": dB}', '{"A": 2 * dA, "B": dB}', "✗ return  dA: off by a constant factor 2"),
        ('dx, {"A": dA, "B": dB}', "dx", "✗ return  is ndarray; it must be dx and a dict of the gradients"),
        ('dx, {"A": dA, "B": dB}', "dx, dA, dB", "✗ return  is tuple; it must be dx and a dict of the gradients"),
        ('return dx, {"A": dA, "B": dB}', "raise NotImplementedError", "○ return  not written yet"),
        ('return dx, {"A": dA, "B": dB}', "return dxx", "✗ return  line {line}: NameError: name 'dxx' is not defined"),
        ("        return dx, {", "        dy *= 2.0\n        return dx, {",
         "✗ backward leaves what it is given as it is  backward changes dy"),
        ("dx = dy @ W + dh @ p.A", "dh @= p.A @ p.A.T\n        dx = dy @ W + dh @ p.A", "✗ B1 dh"),
        ("s = self.scaling\n        dh", "import numpy\n        s = numpy.float64(self.scaling)\n        dh",
         "✗ dtype in is dtype out  from float32, dx is float64, dA is float64, dB is float64"),
        ('{"x": x, "h": h}', '{"x": x, "h": h, "y": 1 * y}', '✗ the line Kept for backward  "Kept for'),
        ("W + (self.scaling * p.B) @ p.A", "W + p.B @ p.A", "✗ merge is forward as one weight  forward(x) is not"),
        ("(t.merged == t.W0).all()", "False", '✗ the claims  "starts as the base model" does not hold'),
    ],
)  # fmt: skip
def test_what_is_said_about_a_mistake(line, becomes, hint, grade_text):
    text = text_of("lora")
    assert line in text
    changed = text.replace(line, becomes)
    grades = grade_text(changed)
    assert hint.replace("{line}", line_of(changed, becomes)) in str(grades), grades
    assert not grades


def test_lines_below_a_mistake_are_graded_with_the_right_values_and_those_to_come_are_open(grade_text):
    text = text_of("lora").replace("dy @ (s * p.B)  # (N, r) B1", "dy @ p.B")
    grades = grade_text(text.replace("dh.T @ saved.x", "3 * dh.T @ saved.x"))
    assert list(verdicts(grades).items()) == [
        ("B1 dh", "wrong"), ("B2 dB", "right"), ("B3 dA", "wrong"), ("B4 dx", "right")]  # fmt: skip
    text = exercise("lora").replace("        # B1 dh", "        dh = dy @ (self.scaling * p.B)\n        # B1 dh")
    assert list(verdicts(grade_text(text)).values()) == ["right", "open", "open", "open"]


def test_a_value_that_is_made_in_two_steps_counts_when_it_is_done(grade_text):
    for step in ("dB = s * dB", "for _ in [1]:\n            dB *= s", "dB[:] = s * dB"):
        assert grade_text(text_of("lora").replace("dy.T @ (s * saved.h)", f"dy.T @ saved.h\n        {step}"))


def test_lines_that_are_put_into_one_are_judged_by_the_gradients(grade_text):
    text = text_of("lora").replace("        dh = dy @ (s * p.B)  # (N, r) B1\n", "")
    grades = grade_text(text.replace("dh.T @", "(dy @ (s * p.B)).T @").replace("+ dh @", "+ dy @ (s * p.B) @"))
    assert verdicts(grades)["B1 dh"] == "unseen" and grades, grades
    text = exercise("full").replace(
        'raise NotImplementedError("write B1 dW, B2 dx")', 'return dy @ p.W, {"W": dy.T @ saved.x}'
    )
    assert grade_text(text)


# ---------------------------------------------------------------------------------------------- the reader's own method


def test_a_method_of_ones_own_is_graded_by_differences_and_the_contract(grade_text):
    text = (source.DROPPED_IN / "square.py").read_text(encoding="utf-8")
    grades = grade_text(text)
    assert grades and list(verdicts(grades))[:3] == ["B2 dM", "B4 dx", "return"]
    assert "equation tags, in the docstring and on the lines" in verdicts(grades)
    wrong = grade_text(text.replace("== p.rows) @ dG", "== p.rows) @ -dG"))
    assert "✗ B2 dM  the sign is flipped" in str(wrong) and "✓ B4 dx" in str(wrong)
    untagged = grade_text(text.replace("  # (m, m) B2", "  # (m, m)"))
    assert "the docstring has F1, F2, F3, B1, B2, B3, B4; the lines F1, F2, F3, B1, B3, B4" in str(untagged)
    no_equations = grade_text(text[text.index('"""\n\nimport') + 3 :].replace("dy @ W + dh", "dh"))
    assert [m.what for m in no_equations.marks] == ["return"] and "dx: a term of" in no_equations.marks[0].hint


# ------------------------------------------------------------------------------------------------ files that do not run


@pytest.mark.parametrize(
    ("line", "becomes", "message"),
    [
        ("h = x @ p.A.T", "h = x @ (p.A.T", "mine.py, line {line}: SyntaxError: '(' was never closed"),
        ("import math", "import no_such", "mine.py, line {line}: ModuleNotFoundError"),
        ("h = x @ p.A.T", "h = x @ p.A", "mine.py, line {line}: ValueError: matmul"),
        ("A = rng.uniform", "A = rng.uniforn", "mine.py, line {line}: AttributeError"),
        ("class LoRA(Adapter)", "class LoRA", "mine.py defines 0 Adapter classes"),
        ("r: int = 8\n    alpha: float = 16.0", "r: int = 8\n    alpha: float", "mine.py, line "),
        ("alpha: float = 16.0", "alpha: float = -1.0", "alpha is -1.0; it must be a finite number above 0"),
    ],
)
def test_a_file_that_does_not_run_is_one_error_with_its_line(line, becomes, message, grade_text):
    text = text_of("lora")
    assert line in text
    changed = text.replace(line, becomes)
    with pytest.raises(InputError) as caught:
        grade_text(changed)
    assert message.replace("{line}", line_of(changed, becomes)) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_or_written(tmp_path):
    for path, message in ((tmp_path / "no.py", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(InputError, match=message):
            grade(path)
    (tmp_path / "latin.py").write_bytes(b"# \xe9\n")
    with pytest.raises(InputError, match="not UTF-8"):
        grade(tmp_path / "latin.py")
    with pytest.raises(InputError, match="cannot write"):
        write_exercise("lora", tmp_path / "no" / "lora.py")


# ----------------------------------------------------------------------------------------------------- the command line


def test_from_the_exercise_to_the_solution_on_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["exercise", "lora"]) == 0
    assert capsys.readouterr().out.endswith("minilora check --file lora_exercise.py\n")
    assert main(["check", "--file", "lora_exercise.py"]) == 1
    assert "○ B1 dh  not written yet" in capsys.readouterr().out
    assert main(["exercise", "lora"]) == 2  # what is there may be an hour's work
    assert "is there already" in capsys.readouterr().err
    (tmp_path / "lora_exercise.py").write_text(text_of("lora"), encoding="utf-8")
    assert main(["check", "--file", "lora_exercise.py"]) == 0
    assert "0 wrong, 0 not written yet" in capsys.readouterr().out
    assert main(["check", "--file", "lora_exercise.py", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["ok"] and printed["marks"][0] == {"what": "B1 dh", "verdict": "right", "hint": ""}


def test_check_takes_methods_or_a_file(tmp_path, capsys):
    assert main(["check", "lora", "--file", str(tmp_path / "x.py")]) == 2
    assert "name methods, or one file" in capsys.readouterr().err
    assert main(["exercise", "pissa", "--out", str(tmp_path / "x.py")]) == 2
    assert not (tmp_path / "x.py").exists()


def test_a_check_that_raises_is_a_mark_and_no_crash(grade_text, monkeypatch):
    monkeypatch.setattr(exercises, "CHECKS", {"merge": lambda case: case.method.merge(case.W)})
    assert "✗ merge  TypeError" in str(grade_text(text_of("lora")))
