"""Each tagged backward line of ops.py is broken on purpose, and the check of the operations must fail."""

import re
import types
from pathlib import Path

import pytest

import minilora.ops
from minilora.tools.gradcheck import check_operations

SOURCE = Path(minilora.ops.__file__).read_text().split("\n")
TAGGED = re.compile(r"  # .*\b(B\d+)\b")
TARGET = re.compile(r"^(\s+)(?:xp\.add\.at\((\w+),|(\w+) = )")
LINES = [number for number, line in enumerate(SOURCE) if TAGGED.search(line)]


def broken(number, factor):
    """The source with what line ``number`` computes, or returns, multiplied by ``factor``."""
    line = SOURCE[number]
    if line.strip().startswith("return ("):
        new = [line.replace("return (", f"return ({factor} * ")]
    else:
        indent, *targets = TARGET.match(line).groups()
        (target,) = filter(None, targets)
        in_place = f"{target} = {factor} * {target}"
        new = [line, f"{indent}if {target} is not None:", f"{indent}    {in_place}"]
    return "\n".join([*SOURCE[:number], *new, *SOURCE[number + 1 :]])


@pytest.mark.parametrize("factor", [1.1, -1.0, 0.0])
@pytest.mark.parametrize("number", LINES, ids=lambda n: f"line {n + 1} {TAGGED.search(SOURCE[n])[1]}")
def test_a_broken_line_is_seen(number, factor):
    module = types.ModuleType("minilora.mutant_ops")
    module.__package__ = "minilora"
    exec(compile(broken(number, factor), "<mutant of ops.py>", "exec"), vars(module))
    assert not all(check_operations(ops=module)), f"ops.py:{number + 1} times {factor} passes"


def test_the_unbroken_source_passes():
    module = types.ModuleType("minilora.mutant_ops")
    module.__package__ = "minilora"
    exec(compile("\n".join(SOURCE), "<copy of ops.py>", "exec"), vars(module))
    assert all(check_operations(ops=module))
