"""The task that methods are compared on: a base model, a text to learn, and two held-out texts to measure on."""

import json
from importlib import resources
from itertools import zip_longest

import numpy as np

from ..backend import device_module
from ..data import CharTokenizer, fixed_batches, load_corpus, random_batches, split_text
from ..files.base import load_base
from ..surgery import adapt
from ..training.optim import AdamW
from ..training.trainer import evaluate, train

PROMPT = "Enter Macbeth and his Lady.\n\n"
SAMPLE_TOKENS = 320
PASSAGES, GLANCE = 128, 16  # of a held-out text, for its loss; of B, for the curve during training


class Task:
    """Text B to train on, A and B held out to measure on, all as token ids; the base model, before any tuning.

    ``selection``: for choosing hyper-parameters. B is then held out from the end of the training text, so that the
    play on which results are reported is never looked at.
    """

    def __init__(self, base=None, device="cpu", selection=False):
        device_module(device)
        self.base, self.device, self.tokenizer = base, device, CharTokenizer()
        self.model = self.load()
        a, b, context = load_corpus("modern"), load_corpus("folio"), self.model.config.n_positions
        b = split_text(b.train) if selection else b
        self.train_ids = self.tokenizer.encode(b.train)
        self.held_out_a = fixed_batches(self.tokenizer.encode(a.val), 32, context, limit=PASSAGES)
        self.held_out_b = fixed_batches(self.tokenizer.encode(b.val), 32, context, limit=PASSAGES)
        self.glance_b = [tuple(a[:GLANCE] for a in self.held_out_b[0])]

    def load(self):
        """The base model anew, on the task's device."""
        return load_base(self.base, self.tokenizer.vocab_size).to(self.device)

    def losses(self, model) -> tuple[float, float]:
        """Held-out loss on A and on B, in nats per character."""
        return evaluate(model, self.held_out_a), evaluate(model, self.held_out_b)


def write_sample(model, tokenizer, seed, prompt=PROMPT) -> str:
    """What the model writes after ``prompt``; one seed for all models, so that only the weights differ."""
    ids = tokenizer.encode(prompt)[None]
    return tokenizer.decode(model.generate(ids, SAMPLE_TOKENS, 0.6, top_k=20, rng=seed)[0])


def learning_rate(method: str) -> float:
    """The rate recorded for ``method`` in learning_rates.json, or the file's default for one that is not there."""
    rates = recorded_rates()
    return rates["methods"].get(method, rates["default"])


def recorded_rates() -> dict:
    """learning_rates.json: the best rate of the recorded sweep by method, and a default for all others."""
    return json.loads((resources.files("minilora") / "learning_rates.json").read_text())


def tune(task: Task, method, steps, lr, batch, seed, progress=None, workers=1):
    """Fine-tune the base model on B with ``method``, an Adapter: (model, History, curve of (step, held-out loss))."""
    model = adapt(task.load(), method, seed=seed, verbose=False)
    rng = np.random.default_rng(seed)  # the same batches for every method
    batches = random_batches(task.train_ids, batch, model.config.n_positions, rng)
    optimizer = AdamW(model.trainable(), lr, clip=1.0)
    curve, every = [(0, evaluate(model, task.glance_b))], max(1, steps // 10)

    def glance(step, history):
        if (step + 1) % every == 0 or step + 1 == steps:
            curve.append((step + 1, evaluate(model, task.glance_b)))

    options = {"warmup": min(20, steps // 5), "workers": workers, "progress": progress, "label": method.name}
    history = train(model, optimizer, batches, steps, [glance], **options)
    return model, history, curve


def side_by_side(left_title, left, right_title, right, width=58) -> str:
    """Two texts in two columns of ``width`` characters."""
    columns = [[left_title, "-" * width, *folded(left, width)], [right_title, "-" * width, *folded(right, width)]]
    return "\n".join(f"{a:<{width}}  {b}".rstrip() for a, b in zip_longest(*columns, fillvalue=""))


def folded(text, width) -> list[str]:
    """The lines of ``text``, those longer than ``width`` in pieces."""
    return [line[i : i + width] for line in text.split("\n") for i in range(0, max(1, len(line)), width)]
