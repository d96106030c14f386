"""PyTorch's side: the same GPT, adapted by Hugging Face PEFT. Nothing of minilora is imported here."""

import ctypes
import sys
import weakref

import numpy as np
import peft
import torch
import torch.nn.functional as F  # noqa: N812
from shapes import SIZES, TARGETS, R
from torch import nn

from .settings import IDLE_RATE, LR_RATIO, METHODS
from .side import Timed


class Block(nn.Module):
    """minilora's Block: x + o(attention(q, k, v of norm1(x))), then x + down(gelu(up(norm2(x))))."""

    def __init__(self, d, heads):
        super().__init__()
        self.heads, self.norm1, self.norm2 = heads, nn.LayerNorm(d), nn.LayerNorm(d)
        self.q, self.k, self.v, self.o = (nn.Linear(d, d) for _ in range(4))
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x, cache=None, past=0):  # x (B, T, d); cache: two buffers (B, heads, n_positions, d / heads)
        h = self.norm1(x)
        q, k, v = (f(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        if cache is not None:
            end = past + x.shape[1]
            for buffer, new in zip(cache, (k, v), strict=True):
                buffer[:, :, past:end] = new
            k, v = (buffer[:, :, :end] for buffer in cache)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=past == 0)  # (B, heads, T, d / heads)
        x = x + self.o(y.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class GPT(nn.Module):
    """minilora's GPT: from ids and targets, (B, T) each, to the loss in nats per token, or to the last logits."""

    def __init__(self, vocab_size, n_positions, n_embd, n_layer, n_head):
        super().__init__()
        self.tokens = nn.Parameter(torch.empty(vocab_size, n_embd))
        self.positions = nn.Parameter(torch.empty(n_positions, n_embd))
        self.blocks = nn.ModuleList(Block(n_embd, n_head) for _ in range(n_layer))
        self.norm = nn.LayerNorm(n_embd)

    def forward(self, ids, targets=None, caches=None, past=0):
        x = F.embedding(ids, self.tokens) + self.positions[past : past + ids.shape[1]]
        for i, block in enumerate(self.blocks):
            x = block(x) if caches is None else block(x, caches[i], past)
        if targets is None:
            return F.linear(self.norm(x[:, -1]), self.tokens)
        return F.cross_entropy(F.linear(self.norm(x), self.tokens).flatten(0, 1), targets.flatten())


def keep_heap():
    """minilora's setting of glibc, which PyTorch does not come with: it gains some 6 % by it at sizes M and L."""
    if sys.platform.startswith("linux"):
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
        for parameter in (-3, -1) if mallopt else ():  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD of malloc.h
            mallopt(parameter, 2**31 - 1)


class Kept:
    """A tensor that autograd saved; it lives as long as the graph that saved it."""

    def __init__(self, tensor):
        self.tensor = tensor


class Model(Timed):
    """The adapted GPT with its optimizer: eager with the fastest of PyTorch's AdamW loops, or compiled with fused."""

    def build(self, size, method, path, adamw=None, compiled=False, device="cpu"):
        """The adapted model with the arrays of ``path``; ``adamw`` None tries which loop is fastest.

        ``compiled``: True, or a mode of torch.compile.
        """
        self.size, self.method = size, method
        net, last = GPT(*SIZES[size][:-1]), {"weight": ("W", "g"), "bias": ("b",)}
        with np.load(path) as arrays, torch.no_grad():
            for name, p in net.named_parameters():
                stem, _, end = name.rpartition(".")
                ours = next(key for key in (name, *(f"{stem}.{e}" for e in last.get(end, ()))) if key in arrays)
                p.copy_(torch.from_numpy(arrays[ours]))  # one at a time: reading must not be the peak of memory
            self.ids, self.targets = torch.from_numpy(arrays["ids"]), torch.from_numpy(arrays["targets"])
            kind, options, self.lr = METHODS[method]
            if kind is None:
                for name, p in net.named_parameters():
                    p.requires_grad_(name.endswith(tuple(f".{target}.weight" for target in TARGETS)))
            else:
                config = getattr(peft, kind)(r=R, target_modules=TARGETS, bias="none", **options)
                net = peft.get_peft_model(net, config)
            for name, p in net.named_parameters():
                if kind == "LoraConfig" and ".lora_" in name and "magnitude" not in name:  # VeRA's come from a seed
                    layer, _, key = name.removeprefix("base_model.model.").partition(".lora_")
                    p.copy_(torch.from_numpy(arrays[f"{layer}.{key[0]}"]))
                    p.requires_grad_(not (method == "lora_fa" and key[0] == "A"))
        self.net = net.to(device)
        self.ids, self.targets = self.ids.to(device), self.targets.to(device)
        if device == "cuda":
            torch.set_float32_matmul_precision("highest")
            self.pool = torch.cuda.max_memory_reserved
        self.call = torch.compile(net, mode=None if compiled is True else compiled) if compiled else net
        self.adamw = "fused" if compiled else adamw or self.fastest_adamw()
        self.optimizer = self.make_adamw(self.adamw, self.lr)
        keep_heap()
        trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
        return {"trained": trained, "adamw": self.adamw}

    def make_adamw(self, loop, lr):
        settings = {"for-loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}[loop]
        settings |= {"lr": lr, "eps": 1e-8}
        if self.method == "lora_plus":
            from peft.optimizers import create_loraplus_optimizer

            return create_loraplus_optimizer(self.net, torch.optim.AdamW, loraplus_lr_ratio=LR_RATIO, **settings)
        return torch.optim.AdamW([p for p in self.net.parameters() if p.requires_grad], weight_decay=0.0, **settings)

    def fastest_adamw(self):
        """The fastest of PyTorch's AdamW loops for this model, tried at rate 0, which moves nothing."""
        self.net(self.ids, self.targets).backward()
        seconds = {}
        for loop in ("for-loop", "foreach", "fused"):
            self.step_alone = self.make_adamw(loop, 0.0).step
            seconds[loop] = min(self.turn("step_alone", 10, 1))
        del self.step_alone
        self.net.zero_grad()
        return min(seconds, key=seconds.get)

    def idle_rate(self):
        for group in self.optimizer.param_groups:
            group["lr"] *= IDLE_RATE

    def step(self):
        loss = self.call(self.ids, self.targets)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def forward(self):
        with torch.inference_mode():
            return self.call(self.ids, self.targets).item()

    def generate(self, prompt, n):
        _, positions, d, layers, heads, _ = SIZES[self.size]
        new, past, tokens = self.ids[:1, :prompt], 0, []
        with torch.inference_mode():
            shape = 1, heads, positions, d // heads
            caches = [(torch.empty(shape), torch.empty(shape)) for _ in range(layers)]
            for _ in range(n):
                logits = self.net(new, caches=caches, past=past)
                past += new.shape[1]
                new = logits.argmax(dim=-1, keepdim=True)
                tokens.append(new.item())
        return tokens

    def kept(self):
        """Bytes that one forward pass keeps for backward, each storage once, the model's own arrays left out."""
        own = {t.untyped_storage().data_ptr() for t in (*self.net.parameters(), *self.net.buffers())}
        alive = weakref.WeakSet()  # a graph that forward drops, as that of DoRA's detached norm, keeps nothing

        def pack(tensor):
            kept = Kept(tensor)
            alive.add(kept)
            return kept

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
            loss = self.net(self.ids, self.targets)
        storages = {s.data_ptr(): s.nbytes() for s in (kept.tensor.untyped_storage() for kept in alive)}
        del loss  # it held the graph until here
        return sum(size for address, size in storages.items() if address not in own)

    def facts(self):
        versions = {"PyTorch": torch.__version__, "PEFT": peft.__version__}
        return versions | ({"PyTorch's CUDA": torch.version.cuda} if torch.version.cuda else {})
