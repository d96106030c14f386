"""Short enough to read: what a learner must read to understand everything, and the package as a whole."""

import ast
from pathlib import Path

import pytest

import minilora

pytestmark = pytest.mark.quick
PACKAGE = Path(minilora.__file__).parent


def lines(*names):
    """Lines that are not blank."""
    return sum(1 for name in names for line in (PACKAGE / name).read_text().splitlines() if line.strip())


def test_the_reading_path_is_about_1280_lines():
    path = [
        "engine.py",
        "ops.py",
        "nn.py",
        "gpt.py",
        "adapter.py",
        "methods/lora.py",
        "surgery.py",
        "optim.py",
        "train.py",
    ]
    assert lines(*path) <= 1280


def test_every_module_opens_with_why_it_exists():
    for path in PACKAGE.rglob("*.py"):
        assert ast.get_docstring(ast.parse(path.read_text())), path


def test_imports_run_one_way():
    """Engine and operations know no model, models no adapter, adapters no trainer."""
    below = {
        "engine.py": "elementary ops nn gpt adapter methods optim train compare",
        "ops.py": "nn gpt adapter methods optim train compare",
        "nn.py": "gpt adapter methods optim train compare",
        "gpt.py": "adapter methods optim train compare",
        "adapter.py": "gpt methods surgery optim train compare",
        "surgery.py": "gpt optim train compare",
        "optim.py": "gpt adapter methods train compare",
        "train.py": "gpt adapter methods compare",
    }
    for name, forbidden in below.items():
        text = (PACKAGE / name).read_text()
        for module in forbidden.split():
            assert f"from .{module} import" not in text and f"from . import {module}" not in text, (name, module)


def test_cupy_is_imported_in_one_file_alone():
    for path in PACKAGE.rglob("*.py"):
        assert path.name == "backend.py" or "import cupy" not in path.read_text(), path
