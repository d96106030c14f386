"""minilora's side. Nothing of PyTorch is imported here."""

import platform
from pathlib import Path

import numpy as np
from shapes import ALPHA, SIZES, TARGETS, R

import minilora

from .settings import IDLE_RATE, METHODS
from .side import Timed


class Model(Timed):
    """An adapted GPT and its optimizer, trained by minilora.train() on one batch, from turn to turn."""

    def make(self, size, method, path, batch=None):
        """Draw weights, adapter matrices and tokens, for both sides, into the file ``path``."""
        *sizes, usual = SIZES[size]
        batch = usual if batch is None else batch
        rng = np.random.default_rng(0)
        gpt = minilora.GPT(minilora.GPTConfig(*sizes), rng)
        # Larger, and no bias 0 or norm 1, so that a wrong copy shows in the loss. Beyond d 128 less, so that the
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

    def build(self, size, method, path, device="cpu", **options):
        """The adapted model with the arrays of ``path``; returns its number of parameters and of trained ones.

        ``options``: of minilora.train, such as ``micro_batches`` and ``workers``.
        """
        self.gpt = minilora.GPT(minilora.GPTConfig(*SIZES[size][:-1]))
        with np.load(path) as arrays:
            for name, p in self.gpt.named_parameters():
                p.data[...] = arrays[name]
            self.batch = arrays["ids"], arrays["targets"]
        self.gpt.to(device)
        self.adapt(self.gpt, method)  # draws the matrices that ``path`` has for PyTorch: they come from a seed
        self.optimizer = minilora.AdamW(
            self.gpt.trainable(), METHODS.get(method, (3e-3,))[-1], eps=1e-8, weight_decay=0.0
        )
        self.options, self.history = options, None
        if device == "cuda":
            import cupy

            self.pool = cupy.get_default_memory_pool().total_bytes  # it never shrinks
        numbers = sum(p.data.size for _, p in self.gpt.named_parameters())
        return {"trained": self.optimizer.data.size, "numbers": numbers}

    def idle_rate(self):
        self.optimizer.lr *= IDLE_RATE

    def steps(self, n):
        """(loss, seconds) of each of ``n`` more steps at a constant learning rate."""
        done = 0 if self.history is None else len(self.history.loss)
        self.history = minilora.train(
            self.gpt, self.optimizer, [self.batch] * n, done + n,
            floor=1.0, progress=False, history=self.history, **self.options,
        )  # fmt: skip
        return list(zip(self.history.loss[done:], self.history.seconds[done:], strict=True))

    def turn(self, what, n, warm):
        if what != "step":
            return super().turn(what, n, warm)
        warm = max(warm, int(self.options.get("workers", 1) > 1))  # train() starts its workers anew
        return [1e3 * seconds for _, seconds in self.steps(n + warm)[warm:]]

    def forward(self):
        with minilora.no_grad():
            return float(self.gpt.loss(*self.batch).data)

    def generate(self, prompt, n):
        return self.gpt.generate(self.batch[0][:1, :prompt], n, temperature=0.0)[0].tolist()

    def kept(self):
        """Bytes that one forward pass keeps for backward."""
        return minilora.kept_bytes(self.gpt.loss(*self.batch), self.gpt)

    def where(self):
        return str(Path(minilora.__file__).resolve().parent)

    def facts(self):
        from minilora.tools.devices import cpu_name

        versions = {
            "CPU": cpu_name(),
            "Python": platform.python_version(),
            "NumPy": np.__version__,
            "minilora": minilora.__version__,
        }
        return versions | {"NumPy's BLAS": self.blas(), "minilora is": self.where()}

    def gpu(self):
        """What ``minilora devices`` says of the GPU; ``reason`` where there is none."""
        from minilora.tools.devices import cuda

        return cuda()
