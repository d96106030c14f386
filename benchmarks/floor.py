"""The floor under a LoRA step: the time of its matrix products alone, and of a whole step of minilora.

A step cannot take less time than its matrix products, so step ÷ floor shows how much is left to gain. Counted are the
products of one step with LoRA (r = 8) on the six linears of each block:

- linears: y = x Wᵀ and dx = dy W; the first block's q, k, v have no dx, since nothing before them is trained
- low rank: h = x Aᵀ, dh = dy B, dB = dyᵀ h, dA = dhᵀ x. The other two of LoRA's formulas, h Bᵀ and dh A, can be had
  within those of the linears, from the weight W + s B A, for a fraction r / N of their work
- attention: S = k qᵀ, y = Pᵀ v, dv = P dy, dP = v dyᵀ, dq = dSᵀ k, dk = dS q for each sample and head, in blocks of 64
  queries, each with the keys up to its end: 3/4 of the whole square at T = 128, 10/16 at 256, all of it up to 64
- logits: x Wᵀ and dx = dlogits W

Not counted: W + s B A, sums, softmax, all other operations, allocation. Each product writes to an existing buffer, and
arrays are about as cold as in a step: an array that a step keeps for backward has a buffer of its own, met in a step's
order, and all others are scratch that the layers share. A product is taken whole or as a stack of parts of 64 rows,
whichever was faster in a trial.
"""

import json
import timeit
from pathlib import Path

from shapes import SIZES, R
from sizes import adapted, in_turns, machine, parser, print_machine, step_of  # sets NumPy's threads

# isort: split
import numpy as np

BLOCK = 64


class Products:
    """The products of one step at a size, in order. ``run()`` takes them all."""

    def __init__(self, vocab, T, d, layers, heads, batch):
        self.T, self.heads, self.batch, self.N = T, heads, batch, batch * T
        self.calls, self.flops, self.stacked, self.shared, self.rng = [], 0, {}, {}, np.random.default_rng(0)
        undo = []  # the backward of each layer, which comes in reverse
        for layer in range(layers):
            x1, x2, gelu = self.normal(self.N, d), self.normal(self.N, d), self.normal(self.N, 4 * d)
            (q, undo_q), (k, undo_k), (v, undo_v) = (self.linear(x1, d, layer > 0) for _ in range(3))
            y, undo_attention = self.attention(q, k, v)
            undo += [undo_q, undo_k, undo_v, undo_attention]
            undo += [self.linear(x, d_out)[1] for x, d_out in ((y, d), (x2, 4 * d), (gelu, d))]
        x, W, logits = self.normal(self.N, d), self.normal(vocab, d), self.scratch(self.N, vocab)
        self.product(x, W.T, logits)
        self.product(logits, W, self.scratch(self.N, d))
        for function in reversed(undo):
            function()

    def run(self):
        for a, b, out, sum_out in self.calls:
            np.matmul(a, b, out=out)
            if sum_out is not None:
                np.add.reduce(out, axis=0, out=sum_out)

    def normal(self, *shape):
        return self.rng.standard_normal(shape, np.float32)

    def scratch(self, *shape, role=None):
        """A buffer that all layers share; ``role`` tells apart two of one shape that are in use at once."""
        return self.shared.setdefault((role, shape), np.ones(shape, np.float32))

    def linear(self, x, d_out, need_dx=True):
        """(y, the function that adds backward's products)."""
        N, d_in = x.shape
        W, A, B, dy = self.normal(d_out, d_in), self.normal(R, d_in), self.normal(d_out, R), self.scratch(N, d_out)
        h, y, dh = np.ones((N, R), np.float32), np.ones((N, d_out), np.float32), self.scratch(N, R, role="dh")
        self.product(x, A.T, h)
        self.product(x, W.T, y)

        def undo():
            self.product(dy, B, dh)
            self.product(dy.T, h, self.scratch(d_out, R))  # dB
            self.product(dh.T, x, self.scratch(R, d_in))  # dA
            if need_dx:
                self.product(dy, W, self.scratch(N, d_in, role="dx"))

        return y, undo

    def attention(self, q, k, v):
        """(y, the function that adds backward's products)."""
        T, heads, (N, d) = self.T, self.heads, q.shape
        y, dy, dq = np.ones((N, d), np.float32), self.scratch(N, d), self.scratch(N, d, role="dx")
        split = self.batch, T, heads, d // heads
        qh, kh, vh, yh, dyh, dqh = (a.reshape(split).transpose(0, 2, 1, 3) for a in (q, k, v, y, dy, dq))
        blocks = []  # scores, keys, queries, values, and the blocks' y, dy, dq
        for i in range(self.batch):
            for start in range(0, T, BLOCK):
                end = min(start + BLOCK, T)
                P, rows = np.ones((heads, end, end - start), np.float32), slice(start, end)
                keys, values = kh[i, :, :end], vh[i, :, :end]
                blocks.append((P, keys, qh[i, :, rows], values, yh[i, :, rows], dyh[i, :, rows], dqh[i, :, rows]))
                self.add(keys, qh[i, :, rows].swapaxes(1, 2), P)
                self.add(P.swapaxes(1, 2), values, yh[i, :, rows])

        def undo():
            for P, keys, queries, values, _, dy, dq in blocks:
                dS = self.scratch(*P.shape, role="dS")
                self.add(P, dy, self.scratch(*values.shape))
                self.add(values, dy.swapaxes(1, 2), dS)
                self.add(dS.swapaxes(1, 2), keys, dq)
                self.add(dS, queries, self.scratch(*keys.shape))

        return y, undo

    def product(self, a, b, out):
        """a @ b, whole or in parts of 64 rows; where the sum runs over the N rows, the parts are added up."""
        whole, key = (a, b, out, None), (a.shape, b.shape, b.flags.c_contiguous)
        (n, K), M = a.shape, b.shape[1]
        if K == self.N and K % BLOCK == 0:
            parts = self.scratch(K // BLOCK, n, M, role="parts")
            at = a.T.reshape(-1, BLOCK, n).swapaxes(1, 2)
            stack = at, b.reshape(-1, BLOCK, M), parts, out
        elif n % BLOCK == 0:
            stack = a.reshape(-1, BLOCK, K), b, out.reshape(-1, BLOCK, M), None
        else:
            stack = whole
        if key not in self.stacked:
            self.stacked[key] = least(*stack) < least(*whole)
        self.add(*(stack if self.stacked[key] else whole))

    def add(self, a, b, out, sum_out=None):
        self.calls.append((a, b, out, sum_out))
        self.flops += 2 * out.size * a.shape[-1]


def least(a, b, out, _):
    """The least seconds of a product, of three."""
    return min(timeit.repeat(lambda: np.matmul(a, b, out=out), number=1, repeat=3))


def measure(size, rounds):
    """Products and step in turns at ``size``, a row of SIZES: a dict, times in ms, ratios within each round."""
    products = Products(*size)
    seconds = in_turns(rounds, products.run, step_of(*adapted(size)))
    floor, step = 1e3 * np.median(seconds, axis=0)
    gflops = products.flops / 1e9
    row = {"gigaflop": gflops, "products_ms": floor, "gflops_per_second": 1e3 * gflops / floor, "step_ms": step}
    ratio = float(np.median(seconds[:, 1] / seconds[:, 0]))
    return row | {"step_over_floor": ratio, "ms_per_turn": (1e3 * seconds).tolist()}


def main():
    options = parser(__doc__, rounds=7)
    options.add_argument("--sizes", nargs="+", choices=SIZES, default=["S", "M", "L"])
    options.add_argument("--json", type=Path, help="a file for all that was measured")
    args = options.parse_args()
    print_machine()
    results = {}
    for size in args.sizes:
        row = results[size] = measure(SIZES[size], args.rounds)
        print(f"{size}: products {row['products_ms']:.2f} ms, {row['gflops_per_second']:.0f} GF/s;", end=" ")
        print(f"step {row['step_ms']:.2f} ms, {row['step_over_floor']:.2f} times as long", flush=True)
    if args.json:
        report = {"machine": machine(), "rounds": args.rounds, "results": results}
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
