"""Has an operation become slower? Compares two files of pytest-benchmark, as test_operations.py says how to make.

Not times but ratios are compared, operation ÷ textbook form, each within its own file: another machine or a busy day
changes both times, and hardly the ratio. The time of a side is its least, the one least disturbed. Ends with status 1
where a ratio has grown by more than 30 %, or a pair is missing, and with 2 where a file cannot be read.
"""

import argparse
import json
import sys

GROWTH = 1.3
SIDES = {"minilora", "textbook"}


class BadFileError(Exception):
    """A file that is no record of pairs; the message says why."""


def ratios(path):
    """{group: least time of minilora ÷ least time of the textbook form} of a pytest-benchmark file."""
    try:
        with open(path, encoding="utf-8") as file:
            rows = json.load(file)["benchmarks"]
        times = {}
        for row in rows:
            times.setdefault(row["group"], {})[row["params"]["side"]] = row["stats"]["min"]
        pairs = {group: pair["minilora"] / pair["textbook"] for group, pair in times.items()}
    except OSError as error:
        raise BadFileError(f"{path}: {error.strerror}") from error
    except (ValueError, LookupError, TypeError, ArithmeticError) as error:
        raise BadFileError(f"{path} is no pytest-benchmark file of test_operations.py, whole and in pairs") from error
    if not pairs:
        raise BadFileError(f"{path} has no benchmarks in it")
    return pairs


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("recorded", help="the last recorded file, benchmarks/operations.json")
    parser.add_argument("new", help="the file to judge")
    args = parser.parse_args()
    try:
        old, new = ratios(args.recorded), ratios(args.new)
    except BadFileError as error:
        print(f"compare_ratios: {error}", file=sys.stderr)
        return 2
    width, failures = max(map(len, [*old, *new, "operation ÷ textbook"])), []
    print(f"| {'operation ÷ textbook':{width}} | recorded |  new | growth |")
    print(f"|-{'-' * width}-|---------:|-----:|-------:|")
    for group in {**old, **new}:
        if group not in old or group not in new:
            print(f"| {group:{width}} | only in {args.new if group in new else args.recorded}")
            failures += [f"{group}: not in {args.new}"] if group in old else []
            continue
        growth = new[group] / old[group]
        print(f"| {group:{width}} | {old[group]:8.2f} | {new[group]:4.2f} | {100 * (growth - 1):+4.0f} % |")
        if growth > GROWTH:
            grown = f"{old[group]:.2f} to {new[group]:.2f}, {100 * (growth - 1):.0f} % more"
            failures.append(f"{group}: operation ÷ textbook has grown from {grown} (allowed: 30 %)")
    for failure in failures:
        print(f"compare_ratios: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
