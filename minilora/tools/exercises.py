"""Exercises whose answer is checked: assess() for those of the notebooks, and method files with a hole in them.

``minilora exercise METHOD`` takes the body of ``backward`` out of a method's file; ``minilora check --file`` grades
what the reader wrote there line by line, and takes the reader's own methods too.
"""

import ast
import inspect
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np

from .. import methods
from ..adapter import Adapter
from ..errors import InputError
from .contract import CHECKS, SIZES, Case, tagged
from .gradcheck import CENTRAL_TOLERANCE, gradcheck, judge, method_loss
from .methodfile import backward_equations, functions, load, located, place, read

SIGNS = {"right": "✓", "wrong": "✗", "open": "○", "unseen": "·"}
GOOD = ("right", "unseen")


# ------------------------------------------------------------------------------------- the exercises of the notebooks


class NotAnswered(Exception):
    """The answer is still the empty one, ``...``."""


def assess(title: str, answer, *tests) -> None:
    """Print one line: ○ where ``answer`` returns nothing yet, ✓ where all tests hold, ✗ with the first hint otherwise.

    ``tests`` are pairs (hint, function of the answer that is true where it is right), tried in order. What the answer
    raises is a hint too, by its type and message.
    """

    def asked(*args, **kwargs):
        result = answer(*args, **kwargs)
        if result is None or result is ...:
            raise NotAnswered
        return result

    try:
        hint = next((hint for hint, holds in tests if not holds(asked)), None)
    except NotAnswered:
        print(f"○ {title}: not answered yet")
        return
    except Exception as error:
        hint = f"{type(error).__name__}: {error}"
    print(f"✓ {title}: right" if hint is None else f"✗ {title}: {hint}")


# ------------------------------------------------------------------------------------------ a method file with a hole


def exercise(name: str) -> str:
    """The file of the method ``name`` without the body of ``backward``; a comment names each equation and its shape.

    Raises InputError for a method that inherits its backward.
    """
    path = Path(inspect.getfile(methods.get(name)))
    source = read(path)
    backward = functions(ast.parse(source)).get("backward")
    if backward is None:
        parent = methods.get(name).__base__.__module__.rpartition(".")[2]
        raise InputError(f"{name} has no backward of its own, it inherits that of {parent}: minilora exercise {parent}")
    equations = backward_equations(source)
    hole = [f"# {e}  {e.shape}" for e in equations]
    hole.append(f"# then: {ast.get_source_segment(source, backward.body[-1])}")
    hole.append(f'raise NotImplementedError("write {", ".join(map(str, equations))}")')
    lines, indent = source.split("\n"), " " * backward.body[0].col_offset
    lines[backward.body[0].lineno - 1 : backward.end_lineno] = [indent + line for line in hole]
    return "\n".join(lines)


def write_exercise(name: str, out=None) -> Path:
    """Write exercise(name) to ``out``, by default NAME_exercise.py here. Raises InputError where a file is there."""
    text, path = exercise(name), Path(f"{name}_exercise.py" if out is None else out)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise InputError(f'"{path}" is there already, perhaps with your work in it; choose another --out') from None
    except OSError as error:
        raise InputError(f'cannot write "{path}": {error.strerror}') from error
    return path


# ---------------------------------------------------------------------------------------------------------- its grades


@dataclass(frozen=True)
class Mark:
    """The verdict, one of SIGNS, on one thing asked for, such as "B2 dB", and what is wrong or missing."""

    what: str
    verdict: str
    hint: str = ""

    def __str__(self):
        return f"{SIGNS[self.verdict]} {self.what}{'  ' + self.hint if self.hint else ''}"


@dataclass(frozen=True)
class Grades:
    """All marks of a file; true where nothing is wrong or open. ``print(grades)`` shows them, ``dict()`` is JSON's."""

    title: str
    marks: tuple

    def __bool__(self) -> bool:
        return all(mark.verdict in GOOD for mark in self.marks)

    def dict(self) -> dict:
        return {"title": self.title, "ok": bool(self), "marks": [asdict(mark) for mark in self.marks]}

    def __str__(self):
        count = {verdict: sum(mark.verdict == verdict for mark in self.marks) for verdict in SIGNS}
        summary = f"{count['right']} right, {count['wrong']} wrong, {count['open']} not written yet"
        return "\n".join([self.title, *map(str, self.marks), "", summary])


def grade(path) -> Grades:
    """Grade the method file at ``path``: each backward equation, then what else a method file must hold.

    A gradient is compared with finite differences. What lies between, such as dh, is compared with the shipped method
    whose class has the same name, if there is one. Each line is given the right values of the lines above it, so that
    one mistake is told once. Raises InputError for a file that cannot be run up to its backward.
    """
    file, source = str(path), read(path)
    cls = load(source, Path(path).stem, file)
    rank = {"r": 3} if "r" in (field.name for field in fields(cls)) else {}
    with located(file):
        method = cls(**rank)
        case = Case.of(method, source)
        case.forward()
    reference = reference_of(method)
    marks = grade_equations(file, case, reference)
    if all(mark.verdict in GOOD for mark in marks):
        marks.append(grade_returned(file, case))
    if all(mark.verdict in GOOD for mark in marks):  # what would follow from a mistake that is told is no news
        marks += grade_contract(file, case, own=reference is None)
    s = f", s = {method.scaling:.4g}, 1/s = {1 / method.scaling:.4g}" if hasattr(method, "scaling") else ""
    sizes = ", ".join(f"{key} = {value}" for key, value in {**SIZES, **rank}.items())
    return Grades(f"{cls.__name__} in {file}, at a random point with {sizes}{s}", tuple(marks))


def reference_of(method: Adapter) -> Adapter | None:
    """The shipped method whose class has the same name, with the same options."""
    for name in methods.names():
        if methods.get(name).__name__ == type(method).__name__:
            return methods.create(name, **methods.known(name, **asdict(method)))
    return None


def grade_equations(file, case, reference) -> list[Mark]:
    """A mark for each backward equation of the docstring whose value can be compared."""
    equations, truth = backward_equations(case.source), {}
    names = [e.name for e in equations]
    if reference is not None:
        right = inspect.getfile(type(reference))
        truth = watch_backward(right, replace(case, method=reference, source=read(right)), names, {})[0]
    seen, result, error = watch_backward(file, case, names, truth)
    seen |= {f"d{name}": g for name, g in returned_gradients(result).items() if f"d{name}" not in seen}
    arrays, marks = case.gradient_arrays(), []
    for e in equations:
        array = e.name[1:] if e.name.startswith("d") and e.name[1:] in arrays else None
        if array is None and e.name not in truth:
            continue
        if e.name in seen:
            value = seen[e.name]
            hint = wrong_gradient(case, array, value) if array else wrong_value(case, e, value, truth[e.name])
            marks.append(Mark(str(e), "wrong" if hint else "right", hint))
        elif result is not None:
            marks.append(Mark(str(e), "unseen", f"no variable {e.name}: the gradients decide"))
        elif error is None or isinstance(error, NotImplementedError):
            marks.append(Mark(str(e), "open", "not written yet"))
        else:
            marks.append(Mark(str(e), "wrong", place(error, file)))
            error = None  # the lines after it were not reached
    return marks


def watch_backward(file, case, names, truth):
    """Run backward: ({name: what it assigned}, what it returned, what it raised).

    After the last statement that assigns one of ``names`` the variable takes its value in ``truth``, if it has one.
    """
    seen = {}

    def watch(name, value):
        seen[name] = value
        return truth[name].copy() if name in truth else value

    tree = ast.parse(case.source)
    if backward := functions(tree).get("backward"):
        put_watches(backward, names)
    cls = load(ast.fix_missing_locations(tree), Path(file).stem, file, watch_=watch)
    try:
        with np.errstate(all="ignore"):
            return seen, case.backward(cls(**asdict(case.method))), None
    except Exception as error:
        return seen, None, error


def put_watches(function: ast.FunctionDef, names) -> None:
    """Put ``name = watch_("name", name)`` behind the last statement of ``function`` that assigns each of ``names``."""
    last = {name: i for i, node in enumerate(function.body) for name in assigned(node)}
    for name, i in sorted(last.items(), key=lambda item: -item[1]):
        if name in names:
            probe = ast.parse(f"{name} = watch_({name!r}, {name})").body[0]
            for node in ast.walk(probe):
                ast.copy_location(node, function.body[i])
            function.body.insert(i + 1, probe)


def assigned(statement: ast.stmt) -> set[str]:
    """The variables that ``statement`` assigns, as a whole (dB = …, dB *= …) or a part of them (dB[0] = …)."""
    targets = [n for n in ast.walk(statement) if isinstance(getattr(n, "ctx", None), ast.Store)]
    names = [n.value if isinstance(n, ast.Subscript) else n for n in targets]
    return {n.id for n in names if isinstance(n, ast.Name)}


def returned_gradients(result) -> dict:
    """{"x": dx, "A": dA …} of what backward returned, where that has the form it should have."""
    pair = isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], dict)
    return {"x": result[0], **result[1]} if pair else {}


def wrong_gradient(case, array, value) -> str:
    """Why ``value`` is not the gradient of ``array`` by finite differences, or an empty string."""
    arrays = case.gradient_arrays()
    if hint := wrong_shape(value, arrays[array].shape):
        return hint
    loss = method_loss(case.method, case.W, case.p, case.dy)
    report = gradcheck(loss, {array: value}, arrays, complex_step=case.method.holomorphic)
    return next((advice(row, case.method) for row in report.rows if not row.ok), "")


def wrong_value(case, equation, value, truth) -> str:
    """Why ``value`` is not what the shipped method has there, or an empty string."""
    if hint := wrong_shape(value, truth.shape):
        return hint
    row = judge(equation.name, "reference", value, truth, CENTRAL_TOLERANCE)
    return "" if row.ok else advice(row, case.method)


def wrong_shape(value, shape) -> str:
    if not hasattr(value, "dtype") or not hasattr(value, "nbytes"):
        return f"is {type(value).__name__}; it must be an array {shape}"
    turned = ", the transpose of it" if value.shape == shape[::-1] else ""
    return "" if value.shape == shape else f"has shape {value.shape}{turned}; it must be {shape}"


def advice(row, method) -> str:
    """What a gradcheck.Row guesses is wrong; a factor of s or 1 / s is called by its name."""
    factor, s = row.analytic / row.numeric if row.numeric else np.nan, getattr(method, "scaling", np.nan)
    questions = {"was s forgotten?": 1 / s, "is s in it twice?": s, "was a factor 2 forgotten?": 0.5}
    for question, known in questions.items():
        if "constant factor" in row.advice and abs(factor - known) < 1e-4 * abs(known):
            return f"constant factor {factor:.4g}: {question}"
    return row.advice.removeprefix("guess: ")


def grade_returned(file, case) -> Mark:
    """The mark of what the plain backward returns."""
    try:
        result = case.backward()
    except NotImplementedError:
        return Mark("return", "open", "not written yet")
    except Exception as error:
        return Mark("return", "wrong", place(error, file))
    found, wanted = returned_gradients(result), case.gradient_arrays()
    if not found:
        return Mark("return", "wrong", f"is {type(result).__name__}; it must be dx and a dict of the gradients")
    if set(found) != set(wanted):
        have, want = (", ".join(sorted(set(arrays) - {"x"})) or "nothing" for arrays in (found, wanted))
        return Mark("return", "wrong", f"has gradients for {have}; what is trained is {want}")
    for name, value in found.items():
        if hint := wrong_gradient(case, name, value):
            return Mark("return", "wrong", f"d{name}: {hint}")
    return Mark("return", "right", ", ".join(f"d{name}" for name in found))


def grade_contract(file, case, own) -> list[Mark]:
    """Marks for what else a method file must hold; the reader's ``own`` method has tags to keep in order, too."""
    marks = []
    for what, check in CHECKS.items():
        if check is tagged and not own:
            continue
        try:
            hint = check(case)
        except Exception as error:
            hint = place(error, file)
        marks.append(Mark(what, "wrong" if hint else "right", hint))
    return marks
