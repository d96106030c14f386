"""The floor under a LoRA step: its matrix products alone, beside the whole step of minilora.

A step cannot take less time than its matrix products do, so step ÷ floor says how much is left to gain: a little more
where products are joined, as those of q, k and v can be; here each is one by itself. Counted are the products of one
step with LoRA (r = 8) on the six linears of each block:

- wide: y = x Wᵀ and dx = dy W of each linear; the first block's q, k, v have no dx, nobody below them is trained
- low rank: h = x Aᵀ, dh = dy B, dB = dyᵀ h, dA = dhᵀ x of each linear. The other two of LoRA's formulas, h Bᵀ and
  dh A, can be had within the wide ones, from the weight W + s B A, for a product of r / N times a wide one's work
- attention: S = k qᵀ, y = Pᵀ v, dv = P dy, dP = v dyᵀ, dq = dSᵀ k, dk = dS q for each sample and head, in blocks of 64
  queries, each with the keys up to its end: 3/4 of the whole square at T = 128, 10/16 at 256, all of it up to 64
- logits: x Wᵀ and dx = dlogits W

Not counted: W + s B A itself, sums, softmax, all other operations, allocation. Each product writes to a buffer that
was allocated before, and arrays are about as cold as in a step: what a step keeps for backward has a buffer for each
layer, met in a step's order; what it frees at once is scratch that all layers share. For each shape the fastest way
known is taken, by a trial: whole, or as a stack of 64 or 256 rows, which small and thin products gain by.
"""

import json
import time
from functools import partial
from pathlib import Path

from shapes import SIZES, R
from sizes import adapted, in_turns, machine, parser, print_machine, step_of  # sets NumPy's threads

# isort: split
import numpy as np

BLOCK = 64


def buffer(*shape):
    """Not an empty one: a trial may read what nothing has written yet."""
    return np.ones(shape, np.float32)


class Products:
    """The products of one step at a size, in order. ``run()`` takes them all."""

    def __init__(self, vocab, T, d, layers, heads, batch):
        self.T, self.d, self.heads, self.batch, self.N = T, d, heads, batch, batch * T
        self.calls, self.flops, self.best, self.shared, self.rng = [], 0, {}, {}, np.random.default_rng(0)
        self.arriving = {n: self.normal(self.N, n) for n in (d, 4 * d)}  # dy
        undo = []  # the backward of each layer, which comes in reverse
        for layer in range(layers):
            x1, x2, gelu = self.normal(self.N, d), self.normal(self.N, d), self.normal(self.N, 4 * d)
            (q, undo_q), (k, undo_k), (v, undo_v) = (self.linear(x1, d, layer > 0, kept=True) for _ in range(3))
            y, undo_attention = self.attention(q, k, v)
            undo += [undo_q, undo_k, undo_v, undo_attention]
            undo += [self.linear(x, d_out)[1] for x, d_out in ((y, d), (x2, 4 * d), (gelu, d))]
        x, W = self.normal(self.N, d), self.normal(vocab, d)
        self.product(self.product(x, W.T), W)
        for function in reversed(undo):
            function()

    def run(self):
        for call in self.calls:
            call()

    def normal(self, *shape):
        return self.rng.standard_normal(shape, np.float32)

    def linear(self, x, d_out, need_dx=True, kept=False):
        """(y, the function that adds backward's products)."""
        d_in, normal = x.shape[1], self.normal
        W, A, B, dy = normal(d_out, d_in), normal(R, d_in), normal(d_out, R), self.arriving[d_out]
        h, y = self.product(x, A.T, kept=True), self.product(x, W.T, kept)

        def undo():
            dh = self.product(dy, B)
            self.product_over_rows(dy, h)  # dB
            self.product_over_rows(dh, x)  # dA
            if need_dx:
                self.product(dy, W)

        return y, undo

    def scratch(self, *shape, role=None):
        """A buffer that all layers share; ``role`` tells apart two of one shape that are in use at once."""
        if (role, shape) not in self.shared:
            self.shared[role, shape] = buffer(*shape)
        return self.shared[role, shape]

    def product(self, a, b, kept=False):
        """a (N, K) @ b (K, M): the result's buffer."""
        (N, K), M = a.shape, b.shape[1]
        out, forms = buffer(N, M) if kept else self.scratch(N, M), {}
        for rows in {N, 64, 256}:
            if N % rows == 0:
                forms[rows] = partial(np.matmul, a.reshape(-1, rows, K), b, out=out.reshape(-1, rows, M))
        self.add(2 * N * K * M, self.fastest((a.shape, b.shape, b.flags.c_contiguous), forms))
        return out

    def product_over_rows(self, a, b):
        """aᵀ b, with a (N, K), b (N, M): a sum over the rows, whole or over 64 at a time."""
        (N, K), M = a.shape, b.shape[1]
        out, forms = self.scratch(K, M, role="sum"), {}
        forms["whole"] = partial(np.matmul, a.T, b, out=out)
        if N % BLOCK == 0:
            n, parts = N // BLOCK, self.scratch(N // BLOCK, K, M, role="parts")
            at, b3 = a.reshape(n, BLOCK, K).swapaxes(1, 2), b.reshape(n, BLOCK, M)
            forms["stack"] = lambda: np.add.reduce(np.matmul(at, b3, out=parts), axis=0, out=out)
        self.add(2 * N * K * M, self.fastest((a.shape, b.shape, "rows"), forms))

    def attention(self, q, k, v):
        """(y, the function that adds backward's products)."""
        T, heads, d = self.T, self.heads, self.d
        y, dy, dq = buffer(self.N, d), self.arriving[d], self.scratch(self.N, d)
        shape = self.batch, T, heads, d // heads
        qh, kh, vh, yh, dyh, dqh = (a.reshape(shape).transpose(0, 2, 1, 3) for a in (q, k, v, y, dy, dq))
        blocks = [(start, min(start + BLOCK, T)) for start in range(0, T, BLOCK)]
        P = [[buffer(heads, end, end - start) for start, end in blocks] for _ in range(self.batch)]

        def add(a, b, out):
            self.add(2 * out.size * a.shape[-1], partial(np.matmul, a, b, out=out))

        for i in range(self.batch):
            for j, (start, end) in enumerate(blocks):
                keys, values, queries = kh[i, :, :end], vh[i, :, :end], qh[i, :, start:end]
                add(keys, queries.swapaxes(1, 2), P[i][j])
                add(P[i][j].swapaxes(1, 2), values, yh[i, :, start:end])

        def undo():
            for i in range(self.batch):
                for j, (start, end) in enumerate(blocks):
                    keys, values, queries = kh[i, :, :end], vh[i, :, :end], qh[i, :, start:end]
                    dyb, dS = dyh[i, :, start:end], self.scratch(*P[i][j].shape, role="dS")
                    add(P[i][j], dyb, self.scratch(*values.shape))
                    add(values, dyb.swapaxes(1, 2), dS)
                    add(dS.swapaxes(1, 2), keys, dqh[i, :, start:end])
                    add(dS, queries, self.scratch(*keys.shape))

        return y, undo

    def add(self, flops, call):
        self.calls.append(call)
        self.flops += flops

    def fastest(self, shape, forms):
        """The fastest of ``forms``, functions by name; tried once for each shape, three calls of each."""
        if shape not in self.best:
            seconds = dict.fromkeys(forms, float("inf"))
            for _ in range(3):
                for name, call in forms.items():
                    start = time.perf_counter()
                    call()
                    seconds[name] = min(seconds[name], time.perf_counter() - start)
            self.best[shape] = min(seconds, key=seconds.get)
        return forms[self.best[shape]]


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
    print("| size | products alone, ms |     GF | GF/s | minilora step, ms | step ÷ floor |")
    print("|------|-------------------:|-------:|-----:|------------------:|-------------:|")
    results = {}
    for size in args.sizes:
        row = results[size] = measure(SIZES[size], args.rounds)
        print(f"| {size:4} | {row['products_ms']:18.2f} | {row['gigaflop']:6.2f}", end=" ")
        print(
            f"| {row['gflops_per_second']:4.0f} | {row['step_ms']:17.2f} | {row['step_over_floor']:12.2f} |", flush=True
        )
    if args.json:
        report = {"machine": machine(), "rounds": args.rounds, "results": results}
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
