"""One training step of minilora beside the same step of PyTorch eager + Hugging Face PEFT, in one process.

A step is forward, backward and AdamW on the six linears of every block, float32, r = 8, alpha = 16, no dropout, no
weight decay. Both sides first take five steps from the same weights on the same batch and must show the same
losses; then they are timed in turns, A B A B …, so that a busy moment of the machine falls on both. README.md beside
this file says how to run it, and what is fair about it and what is not.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

SIZES = {  # GPTConfig's vocab_size, n_positions (T), n_embd, n_layer, n_head; then the batch, in sequences of T tokens
    "tiny": (96, 128, 128, 4, 4, 8),  # the model that comes with minilora, at the batch of `minilora compare`
    "S": (65, 64, 64, 2, 4, 16),
    "M": (65, 128, 128, 4, 4, 16),
    "L": (65, 256, 384, 6, 6, 8),
}
TARGETS, R, ALPHA = ["q", "k", "v", "o", "up", "down"], 8, 16
METHODS = {  # a method of minilora: PEFT's configuration class, its options, the learning rate of the check
    "lora": ("LoraConfig", {"lora_alpha": ALPHA}, 3e-3),
    "rslora": ("LoraConfig", {"lora_alpha": ALPHA, "use_rslora": True}, 3e-3),
    "dora_detached": ("LoraConfig", {"lora_alpha": ALPHA, "use_dora": True}, 3e-3),
    "vera": ("VeraConfig", {}, 3e-2),
    "full": (None, {}, 3e-3),  # without PEFT: the weights of the same linears trained, everything else frozen
}
CHECKED_STEPS, TOLERANCE = 5, 1e-4  # of losses, in nats per token
PAUSE = 0.05  # seconds before a turn: idle threads of the other side spin for some 30 ms before they sleep
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()

parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["tiny"])
parser.add_argument("--methods", nargs="+", choices=METHODS, default=["lora"])
parser.add_argument("--threads", type=int, choices=[1, 2], default=1, help="the same for both sides")
parser.add_argument("--rounds", type=int, default=10, help="turns of each side")
parser.add_argument("--steps-per-round", type=int, default=10, help="timed steps in a turn")
parser.add_argument("--out", type=Path, help="write all that was measured to this JSON file")
args = parser.parse_args()
if min(args.rounds, args.steps_per_round) < 1 or (args.out and not args.out.resolve().parent.is_dir()):
    parser.error("--rounds and --steps-per-round must be at least 1, and the folder of --out must exist")
for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"):
    os.environ[name] = str(args.threads)  # read when NumPy and PyTorch are imported, hence before that

try:
    import numpy as np
    import peft
    import threadpoolctl
    import torch
    import torch.nn.functional as F  # noqa: N812
    from torch import nn

    import minilora
    from minilora.backend import keep_heap
    from minilora.surgery import adapted_layers
    from minilora.train import training_step
except ImportError as error:
    install = ".bench/bin/pip install torch==2.13.0 peft threadpoolctl ."
    run = "python3 -m venv .bench && " + install + " && .bench/bin/python benchmarks/versus_peft.py"
    print(f"versus_peft: {error}; in the root of the repository, run: {run}", file=sys.stderr)
    sys.exit(2)


class TorchBlock(nn.Module):
    """minilora's Block: x + o(attention(q, k, v of norm1(x))), then x + down(gelu(up(norm2(x))))."""

    def __init__(self, d, heads):
        super().__init__()
        self.heads, self.norm1, self.norm2 = heads, nn.LayerNorm(d), nn.LayerNorm(d)
        self.q, self.k, self.v, self.o = (nn.Linear(d, d) for _ in range(4))
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x):  # (B, T, d)
        h = self.norm1(x)
        q, k, v = (f(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, heads, T, d / heads)
        x = x + self.o(y.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class TorchGPT(nn.Module):
    """minilora's GPT: from ids and targets, (B, T) each, to the loss in nats per token."""

    def __init__(self, c):
        super().__init__()
        self.tokens = nn.Parameter(torch.empty(c.vocab_size, c.n_embd))
        self.positions = nn.Parameter(torch.empty(c.n_positions, c.n_embd))
        self.blocks = nn.ModuleList(TorchBlock(c.n_embd, c.n_head) for _ in range(c.n_layer))
        self.norm = nn.LayerNorm(c.n_embd)

    def forward(self, ids, targets):
        x = F.embedding(ids, self.tokens) + self.positions[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(F.linear(self.norm(x), self.tokens).flatten(0, 1), targets.flatten())


def build(size, method):
    """(minilora's model, PyTorch's model, ids, targets): adapted, with the same arrays, not yet trained."""
    *sizes, batch = SIZES[size]
    rng = np.random.default_rng(0)
    gpt = minilora.GPT(minilora.GPTConfig(*sizes), rng)
    for _, p in gpt.named_parameters():  # larger, and no bias 0 or norm 1: what was copied wrongly shows in the loss
        p.data += rng.normal(0.0, 0.1, p.shape).astype(np.float32)
    net, last = TorchGPT(gpt.config), {"W": "weight", "g": "weight", "b": "bias"}
    torch_name = lambda name: ".".join(last.get(part, part) for part in name.split("."))
    net.load_state_dict({torch_name(name): torch.tensor(p.data) for name, p in gpt.named_parameters()})

    known = minilora.methods.options(method)
    minilora.adapt(gpt, method, TARGETS, verbose=False, **{k: v for k, v in (("r", R), ("alpha", ALPHA)) if k in known})
    kind, peft_options, _ = METHODS[method]
    if kind is None:
        for name, p in net.named_parameters():
            p.requires_grad_(name.endswith(tuple(f".{target}.weight" for target in TARGETS)))
    else:
        net = peft.get_peft_model(net, getattr(peft, kind)(r=R, target_modules=TARGETS, bias="none", **peft_options))
        for name, layer in adapted_layers(gpt).items() if kind == "LoraConfig" else ():  # VeRA's come from a seed
            for key in ("A", "B"):
                matrices = getattr(net.get_submodule(f"base_model.model.{name}"), f"lora_{key}")
                matrices["default"].weight.data.copy_(torch.from_numpy(layer.p[key]))
    draws = rng.integers(0, sizes[0], (batch, sizes[1] + 1))
    return gpt, net, draws[:, :-1].copy(), draws[:, 1:].copy()


def fastest_adamw(net, lr, ids, targets):
    """(name, optimizer): the fastest of PyTorch's AdamW loops for ``net``, tried at rate 0, which moves nothing."""
    params = [p for p in net.parameters() if p.requires_grad]
    loops = {"for-loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
    make = lambda name, lr: torch.optim.AdamW(params, lr=lr, eps=1e-8, weight_decay=0.0, **loops[name])
    net(ids, targets).backward()
    trials = {name: make(name, 0.0).step for name in loops}
    best = min(loops, key=lambda name: min(seconds_of(trials[name], 10)))
    net.zero_grad()
    return best, make(best, lr)


def seconds_of(step, steps):
    """The seconds of each of ``steps`` calls of ``step``, after one that is not timed."""
    marks = []
    for _ in range(steps + 1):
        step()
        marks.append(time.perf_counter())
    return np.diff(marks).tolist()


def compare(size, method):
    """Check that both sides do the same work, then time them in turns: a dict of what was seen, times in ms a step."""
    gpt, net, ids, targets = build(size, method)
    torch_ids, torch_targets = torch.from_numpy(ids), torch.from_numpy(targets)
    lr = METHODS[method][-1]
    optimizer = minilora.AdamW(gpt.trainable(), lr, eps=1e-8, weight_decay=0.0)
    loop, torch_optimizer = fastest_adamw(net, lr, torch_ids, torch_targets)

    def step():
        return training_step(gpt, optimizer, ids, targets)[0]

    def torch_step():
        loss = net(torch_ids, torch_targets)
        loss.backward()
        torch_optimizer.step()
        torch_optimizer.zero_grad()
        return loss.item()

    trained, torch_trained = optimizer.data.size, sum(p.numel() for p in net.parameters() if p.requires_grad)
    print(f"\n{size}, {method}: minilora trains {trained:,} numbers, PyTorch {torch_trained:,} (AdamW: {loop})")
    assert trained == torch_trained, "the two sides do not train the same"
    losses = [(step(), torch_step()) for _ in range(CHECKED_STEPS)]
    for i, (ours, theirs) in enumerate(losses):
        print(f"  loss of step {i + 1}: {ours:.6f} and {theirs:.6f}, apart by {abs(ours - theirs):.1e}")
    assert np.ptp(losses, axis=1).max() <= TOLERANCE, f"losses are more than {TOLERANCE} apart"
    assert losses[0][1] - losses[-1][1] > 100 * TOLERANCE, "the loss fell too little for the check to mean much"

    # From here on hardly anything moves: a step costs the same, and no softmax drifts towards 0 and 1.
    optimizer.lr = torch_optimizer.param_groups[0]["lr"] = 1e-6
    turns = {"minilora": [], "torch": []}  # the median step of each turn, ms
    for _ in range(args.rounds):
        for side, one in (("minilora", step), ("torch", torch_step)):
            time.sleep(PAUSE)
            turns[side].append(1e3 * statistics.median(seconds_of(one, args.steps_per_round)))
    ratio = [np.percentile(np.divide(turns["minilora"], turns["torch"]), q) for q in (25, 50, 75)]
    medians = {side: statistics.median(ms) for side, ms in turns.items()}
    row = {"size": size, "method": method, "trained": trained, "torch_adamw": loop, "losses": losses}
    return row | {"ms_per_turn": turns, "ms": medians, "ratio_quartiles": ratio}


def machine():
    """What the figures depend on: CPU, threads, versions, date."""
    info = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
    names = [line.partition(": ")[2] for line in info.splitlines() if line.startswith("model name")]
    cpu = names[0] if names else platform.processor() or platform.machine()
    blas = [lib for lib in threadpoolctl.threadpool_info() if lib["user_api"] == "blas"]
    blas = ", ".join(f"{lib['internal_api']} {lib['version']}" for lib in blas) or "unknown to threadpoolctl"
    versions = {module.__name__: module.__version__ for module in (np, torch, peft, minilora)}
    facts = {"CPU": cpu, "cores": CORES, "threads": args.threads, "Python": platform.python_version(), **versions}
    return facts | {"NumPy's BLAS": blas, "date": datetime.date.today().isoformat()}


def main():
    torch.set_num_threads(args.threads)
    threadpoolctl.threadpool_limits(args.threads, user_api="blas")
    report = {"machine": machine(), "keep_heap": keep_heap(), "rounds": args.rounds, "steps": args.steps_per_round}
    print("; ".join(f"{key} {value}" for key, value in report["machine"].items()))
    print(f"minilora is {Path(minilora.__file__).parent}; keep_heap, for both sides: {report['keep_heap']}")
    report["results"] = [compare(size, method) for size in args.sizes for method in args.methods]
    print(f"\nMedian ms per step, {args.rounds} rounds of {args.steps_per_round} steps, {args.threads} thread(s):")
    print("| size | method        | minilora | PyTorch + PEFT | ratio | its quartiles |")
    print("|------|---------------|---------:|---------------:|------:|--------------:|")
    for row in report["results"]:
        ms, (q1, ratio, q3) = row["ms"], row["ratio_quartiles"]
        print(f"| {row['size']:4} | {row['method']:13} | {ms['minilora']:8.1f} | {ms['torch']:14.1f}", end=" ")
        print(f"| {ratio:5.2f} | {q1:5.2f} … {q3:5.2f} |")
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
