"""Has a faster form become slower? Compares two files of test_operations.py: ``compare_ratios.py RECORDED NEW``.

Not times but ratios are compared, fast ÷ plain, each within its own file: another machine or a busy day changes both
times, and hardly the ratio. The time of a side is its least, the one least disturbed. Ends with status 1 if a ratio
has grown by more than 30 %, or if a pair is missing.
"""

import json
import sys
from pathlib import Path

GROWTH = 1.3


def times(path):
    """{group: {"fast": least ms, "plain": least ms}} of a pytest-benchmark file."""
    found = {}
    for row in json.loads(Path(path).read_text(encoding="utf-8"))["benchmarks"]:
        found.setdefault(row["group"], {})[row["params"]["side"]] = 1e3 * row["stats"]["min"]
    return found


def compare(recorded, new):
    """Print a table; return what has become slower, or is missing, a line each."""
    failures = []
    print("| fast ÷ plain | recorded | new |\n| --- | ---: | ---: |")
    for group, pair in recorded.items():
        if group not in new:
            failures.append(f"{group} is missing")
            continue
        before, after = (each["fast"] / each["plain"] for each in (pair, new[group]))
        print(f"| {group} | {before:.2f} | {after:.2f} |")
        if after > GROWTH * before:
            failures.append(f"{group}: fast ÷ plain has grown from {before:.2f} to {after:.2f}, by more than 30 %")
    return failures


if __name__ == "__main__":
    slower = compare(*map(times, sys.argv[1:]))
    sys.exit("\n".join(slower) if slower else 0)
