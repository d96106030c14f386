"""One checkout of minilora as a side of versus_commit.py. It uses only what has the same name in every version."""

import time
from pathlib import Path

import numpy as np
from shapes import ALPHA, SIZES, TARGETS, R

import minilora

from .side import Timed

OPTIONS = {"full": {}, "vera": {"r": R}}  # of the other methods: r and alpha


class Model(Timed):
    """An adapted GPT that minilora.train() takes from turn to turn, always on the same batch."""

    def build(self, size, method, workers=1):
        """Draw the model and its batch from a seed; returns the folder that minilora was imported from."""
        *config, batch = SIZES[size]
        rng = np.random.default_rng(0)
        self.gpt = minilora.GPT(minilora.GPTConfig(*config), rng)
        options = OPTIONS.get(method, {"r": R, "alpha": ALPHA})
        minilora.adapt(self.gpt, method, TARGETS, verbose=False, **options)
        self.optimizer = minilora.AdamW(self.gpt.trainable(), 1e-3)
        tokens = rng.integers(0, config[0], (batch, config[1] + 1))
        self.batch, self.workers, self.history = (tokens[:, :-1], tokens[:, 1:]), workers, None
        return str(Path(minilora.__file__).resolve().parents[1])

    def train(self, n):
        """Take ``n`` more steps: their losses, their milliseconds, and this process's own time for one of them."""
        # A history that continues spares the later turns what train() measures only in a run's first steps.
        done = 0 if self.history is None else len(self.history.loss)
        batches, start = [self.batch] * n, time.process_time()
        self.history = minilora.train(
            self.gpt, self.optimizer, batches, done + n, workers=self.workers, progress=False, history=self.history
        )
        own = 1e3 * (time.process_time() - start) / n
        return {"loss": self.history.loss[done:], "ms": [1e3 * s for s in self.history.seconds[done:]], "own_ms": own}
