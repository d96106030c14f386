"""Each faster form of minilora/fast beside its plain form in minilora/ops.py, at size M: same result, then the times.

    python benchmarks/operations.py --json benchmarks/operations.json     # records the times
    python benchmarks/operations.py --compare benchmarks/operations.json  # has a faster form become slower?

Not times but ratios are compared, fast ÷ plain, each within its own run: another machine or a busy day changes both
times, and hardly the ratio. The time of a form is that of its best turn, the one least disturbed. The comparison ends
with status 1 if a ratio has grown by more than 30 %, or if a pair is missing.
"""

import json
import sys
from pathlib import Path

from shapes import SIZES, R
from sizes import in_turns, machine, parser, print_machine  # sets NumPy's threads

# isort: split
import numpy as np

import minilora
from minilora import ops
from minilora.engine import Operation, Saved
from minilora.fast.heap import keep_heap
from minilora.fast.products import product
from minilora.nn import Parameter

VOCABULARY, T, D, LAYERS, HEADS, BATCH = SIZES["M"]
N = BATCH * T
TOLERANCE, GROWTH = 1e-4, 1.3  # of the largest entry, float32; of a ratio
rng = np.random.default_rng(0)


def normal(*shape):
    return rng.standard_normal(shape, np.float32)


ARRAYS = {
    "linear": [normal(N, D), normal(4 * D, D), normal(4 * D)],
    "layer_norm": [normal(N, D), normal(D), normal(D)],
    "gelu": [normal(N, 4 * D)],
    "attention": [normal(N, D), normal(N, D), normal(N, D)],
    "cross_entropy": [normal(N, VOCABULARY)],
}
CONSTANTS = {
    "attention": {"batch": BATCH, "heads": HEADS},
    "cross_entropy": {"targets": rng.integers(0, VOCABULARY, N)},
}


def halves(operation, form):
    """Forward and backward of a form, as functions without arguments that return arrays."""
    arrays, constants = ARRAYS[operation.name], CONSTANTS.get(operation.name, {})
    need = operation.Need(*[True] * len(arrays))
    y, saved = form[0](need, *arrays, **constants)
    dy = np.asarray(np.random.default_rng(1).standard_normal(np.shape(y)), np.float32)
    return lambda: form[0](need, *arrays, **constants)[:1], lambda: form[1](need, dy, Saved(saved))


def adamw(how, gradient):
    """A step of all LoRA matrices of a model of size M, which begin at 0; ``how`` is put around it."""
    linears = [(D, D)] * 4 + [(4 * D, D), (D, 4 * D)]
    shapes = LAYERS * [shape for d_out, d_in in linears for shape in ((R, d_in), (d_out, R))]
    weights = {str(i): Parameter(np.zeros(shape, np.float32)) for i, shape in enumerate(shapes)}
    optimizer = minilora.AdamW(weights, lr=1e-2)
    optimizer.grad[:] = gradient[: optimizer.grad.size]
    step = how(optimizer.step)

    def go():
        step()
        return [optimizer.data]

    return go


def pairs():
    """{name: (fast, plain)}, functions without arguments that return arrays."""
    found = {}
    for operation in vars(ops).values():
        if isinstance(operation, Operation) and "numpy" in operation.forms:
            fast = halves(operation, operation.forms["numpy"])
            plain = halves(operation, (operation.forward, operation.backward))
            found |= {f"{operation.name} forward": (fast[0], plain[0])}
            found |= {f"{operation.name} backward": (fast[1], plain[1])}
    del found["linear backward"]  # it has one form only
    gradient, x, A = normal(10**6), normal(N, 4 * D), normal(R, 4 * D)
    found["AdamW step"] = adamw(lambda step: step, gradient), adamw(minilora.plain(), gradient)
    found["thin product"] = (lambda: [product(x, A.T)]), (lambda: [x @ A.T])
    return found


def check(name, fast, plain):
    """Stop if two forms do not give the same arrays."""
    for a, b in zip(fast(), plain(), strict=True):
        if np.shape(a) != np.shape(b) or not np.abs(a - b).max() <= TOLERANCE * np.abs(b).max():
            sys.exit(f"{name}: the two forms do not agree")


def without_result(f):
    def call():
        f()

    return call


def measure(rounds):
    """{name: {"fast": ms, "plain": ms}}, the times of the best turn."""
    found = {}
    for name, pair in pairs().items():
        check(name, *pair)
        best = 1e3 * in_turns(rounds, *map(without_result, pair)).min(axis=0)
        found[name] = dict(zip(("fast", "plain"), best.tolist(), strict=True))
    return found


def compare(recorded, new):
    """Print a table; return what has become slower, or is missing, a line each."""
    failures = []
    print("| fast ÷ plain | recorded | new |\n| --- | ---: | ---: |")
    for name, pair in recorded.items():
        if name not in new:
            failures.append(f"{name} is missing")
            continue
        before, after = (each["fast"] / each["plain"] for each in (pair, new[name]))
        print(f"| {name} | {before:.2f} | {after:.2f} |")
        if after > GROWTH * before:
            failures.append(f"{name}: fast ÷ plain has grown from {before:.2f} to {after:.2f}, by more than 30 %")
    return failures


def main():
    options = parser(__doc__, rounds=7)
    options.add_argument("--json", type=Path, help="a file to record the times in")
    options.add_argument("--compare", type=Path, help="a file to compare the ratios with")
    args = options.parse_args()
    print_machine()
    keep_heap()  # as train() does
    new = measure(args.rounds)
    if args.json:
        report = {"machine": machine(), "milliseconds": new}
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if args.compare:
        sys.exit("\n".join(compare(json.loads(args.compare.read_text(encoding="utf-8"))["milliseconds"], new)) or 0)


if __name__ == "__main__":
    main()
