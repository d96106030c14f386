"""Short enough to read: the book's length, and who may import whom."""

import ast
import re
from pathlib import Path

import pytest

import minilora

pytestmark = pytest.mark.quick
PACKAGE = Path(minilora.__file__).parent
README = PACKAGE.parent / "README.md"
ROOMS = {"fast", "tools", "files", "lab", "plots", "data"}  # what the book does not need


def modules():
    """{dotted name within the package: path}."""
    return {
        ".".join(p for p in path.relative_to(PACKAGE).with_suffix("").parts if p != "__init__"): path
        for path in PACKAGE.rglob("*.py")
    }


FILES = modules()


def imports(name) -> set[str]:
    """The package's modules that ``name`` imports when it is itself imported: those on top level, in ``if`` and try."""
    path, found = FILES[name], set()
    package = name.split(".") if path.name == "__init__.py" and name else name.split(".")[:-1]
    body = list(ast.parse(path.read_text(encoding="utf-8")).body)
    while body:
        node = body.pop()
        if isinstance(node, ast.If | ast.Try):
            body += node.body
        if not isinstance(node, ast.ImportFrom) or not (node.level or (node.module or "").startswith("minilora")):
            continue
        base = package[: len(package) - node.level + 1] if node.level else []
        target = ".".join([*base, *(node.module or "").removeprefix("minilora").strip(".").split(".")]).strip(".")
        for alias in node.names:
            inner = f"{target}.{alias.name}".strip(".")
            found.add(inner if inner in FILES else target)
    return found - {name}


def lines(name) -> int:
    """Lines that are not blank."""
    return sum(1 for line in FILES[name].read_text(encoding="utf-8").splitlines() if line.strip())


def reading_order() -> list[str]:
    """The files of the README's reading order, without those in brackets, which are beside the path."""
    text = README.read_text(encoding="utf-8").partition("## Reading order")[2]
    items = re.findall(r"^\d+\. (.*)$", text.partition("\n## ")[0], re.MULTILINE)
    linked = [re.findall(r"\]\(minilora/([\w/]+)\.py\)", re.sub(r"\(\[.*?\)\)?[^()]*\)", "", item)) for item in items]
    return [name.replace("/", ".") for names in linked for name in names]


def test_the_book_with_every_file_that_it_imports_is_an_afternoon():
    book, todo = set(), reading_order()
    assert {"engine", "ops", "gpt", "adapter", "methods.lora", "training.loop"} <= set(todo)
    while todo:
        name = todo.pop()
        if name not in book:
            book.add(name)
            todo += imports(name) - {""}
    total = {name: lines(name) for name in sorted(book)}
    assert sum(total.values()) <= 1200, total


def test_the_loop_fits_on_a_screen_and_a_method_on_two():
    loop = ast.get_source_segment(text := FILES["training.loop"].read_text(), ast.parse(text).body[-1])
    assert len([line for line in loop.splitlines() if line.strip()]) <= 60
    for name, path in FILES.items():
        assert not name.startswith("methods.") or len(path.read_text().splitlines()) <= 120, name


def test_every_module_opens_with_why_it_exists():
    for path in PACKAGE.rglob("*.py"):
        assert ast.get_docstring(ast.parse(path.read_text())), path


def test_the_book_imports_no_room_and_nothing_names_fast():
    for name in FILES:
        room = name.partition(".")[0]
        if room != "fast" and name:
            assert "fast" not in {other.partition(".")[0] for other in imports(name)}, name
        if "." not in name and name not in ("", "cli", "__main__", "bank", *ROOMS):
            assert not {other.partition(".")[0] for other in imports(name)} & ROOMS, name
        if room in ("methods", "training"):
            assert not {other.partition(".")[0] for other in imports(name)} & ROOMS, name


def test_imports_have_no_circle():
    arrows = {name: imports(name) - {""} for name in FILES if name}
    while free := [name for name, others in arrows.items() if not others & arrows.keys()]:
        for name in free:
            del arrows[name]
    assert not arrows, {name: others & arrows.keys() for name, others in arrows.items()}


def test_rooms_have_no_circle():
    """Files on the table, which are in no room, count each for itself."""
    arrows = {}
    for name in FILES:
        room = name.partition(".")[0]
        arrows.setdefault(room, set()).update(other.partition(".")[0] for other in imports(name))
    arrows.pop("")
    arrows = {room: others - {room, ""} for room, others in arrows.items()}
    while free := [room for room, others in arrows.items() if not others & arrows.keys()]:
        for room in free:
            del arrows[room]
    assert not arrows, {room: others & arrows.keys() for room, others in arrows.items()}


def test_a_public_name_means_one_thing():
    """minilora.train is the function, and no module of that name can be imported in its place."""
    for name in minilora.__all__:
        value = getattr(minilora, name)
        assert name not in FILES or value.__name__ == f"minilora.{name}", name


def test_cupy_is_imported_in_one_file_alone():
    for path in PACKAGE.rglob("*.py"):
        assert path.name == "backend.py" or "import cupy" not in path.read_text(), path
