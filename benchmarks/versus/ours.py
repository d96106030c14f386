"""minilora's side. Nothing of PyTorch is imported here."""

import platform
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from shapes import ALPHA, SIZES, TARGETS, R

import minilora
from minilora.backend import keep_heap
from minilora.tools.devices import cpu_name
from minilora.training.loop import training_step

from .settings import IDLE_RATE, METHODS
from .side import Timed


class Model(Timed):
    """An adapted GPT with its optimizer, trained with BLAS threads, in micro-batches, or by ``workers`` processes."""

    def __init__(self, start):
        super().__init__(start)
        self.stack = ExitStack()

    def make(self, size, method, path, batch=None):
        """Draw weights, adapter matrices and tokens, for both sides, into the file ``path``."""
        *sizes, usual = SIZES[size]
        batch = usual if batch is None else batch
        rng = np.random.default_rng(0)
        gpt = minilora.GPT(minilora.GPTConfig(*sizes), rng)
        # Larger, and no bias 0 or norm 1: what was copied wrongly shows in the loss. Beyond d 128 less, so that the
        # scores of attention, which grow with d, leave the softmax something to do.
        noise = 0.1 * min(1.0, (128 / gpt.config.n_embd) ** 0.5)
        for _, p in gpt.named_parameters():
            p.data += rng.normal(0.0, noise, p.shape).astype(np.float32)
        arrays = {name: p.data for name, p in gpt.named_parameters()}
        draws = rng.integers(0, sizes[0], (batch, sizes[1] + 1))
        arrays |= {"ids": draws[:, :-1], "targets": draws[:, 1:]}
        self.adapt(gpt, method)
        for name, layer in minilora.surgery.adapted_layers(gpt).items():
            arrays |= {f"{name}.{key}": layer.p[key] for key in ("A", "B") if method != "vera" and key in layer.p}
        np.savez(path, **arrays)

    def adapt(self, gpt, method):
        known = minilora.methods.options(method)
        options = {name: value for name, value in (("r", R), ("alpha", ALPHA)) if name in known}
        minilora.adapt(gpt, method, TARGETS, verbose=False, **options)

    def build(self, size, method, path, micro_batches=None, workers=None, device="cpu"):
        """The adapted model with the arrays of ``path``; returns how many numbers it has and how many it trains."""
        self.gpt = minilora.GPT(minilora.GPTConfig(*SIZES[size][:-1]))
        with np.load(path) as arrays:
            for name, p in self.gpt.named_parameters():
                p.data[...] = arrays[name]
            self.ids, self.targets = arrays["ids"], arrays["targets"]
        self.gpt.to(device)
        self.adapt(self.gpt, method)  # draws the matrices that ``path`` has for PyTorch: they come from a seed
        self.optimizer = minilora.AdamW(self.gpt.trainable(), METHODS[method][-1], eps=1e-8, weight_decay=0.0)
        keep_heap()  # as train() does
        self.options = {} if micro_batches is None else {"micro_batches": micro_batches}
        if workers is not None:
            from minilora.training.workers import Workers

            self.options["team"] = self.stack.enter_context(Workers(self.gpt, self.optimizer, workers))
        if device == "cuda":
            self.use_the_gpu_s_clock()
        numbers = sum(p.data.size for _, p in self.gpt.named_parameters())
        return {"trained": self.optimizer.data.size, "numbers": numbers}

    def use_the_gpu_s_clock(self):
        import cupy

        def mark():
            event = cupy.cuda.Event()
            event.record()
            return event

        def between(a, b):
            b.synchronize()
            return cupy.cuda.get_elapsed_time(a, b)

        self.mark, self.between = mark, between
        self.pool = cupy.get_default_memory_pool().total_bytes  # it never shrinks by itself

    def close(self):
        self.stack.close()

    def idle_rate(self):
        self.optimizer.lr *= IDLE_RATE

    def step(self):
        return training_step(self.gpt, self.optimizer, self.ids, self.targets, **self.options)[0]

    def forward(self):
        with minilora.no_grad():
            return float(self.gpt.loss(self.ids, self.targets).data)

    def generate(self, prompt, n):
        return self.gpt.generate(self.ids[:1, :prompt], n, temperature=0.0)[0].tolist()

    def kept(self):
        """Bytes that one forward pass keeps for backward."""
        return minilora.kept_bytes(self.gpt.loss(self.ids, self.targets), self.gpt)

    def facts(self):
        versions = {
            "CPU": cpu_name(),
            "Python": platform.python_version(),
            "NumPy": np.__version__,
            "minilora": minilora.__version__,
        }
        return versions | {"NumPy's BLAS": self.blas(), "minilora is": str(Path(minilora.__file__).parent)}

    def gpu(self):
        """What ``minilora devices`` says of the GPU; ``reason`` where there is none."""
        from minilora.tools.devices import cuda

        return cuda()
