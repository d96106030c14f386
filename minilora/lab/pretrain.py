"""How the tiny base model in the package was made: a GPT trained from nothing on Shakespeare in modern spelling.

The recipe is fixed, seed included, so that ``minilora pretrain`` makes the same model again.
"""

from dataclasses import dataclass, field

import numpy as np

from ..data import CharTokenizer, fixed_batches, load_corpus, random_batches
from ..gpt import GPT, GPTConfig
from ..training.loop import History
from ..training.optim import AdamW
from ..training.trainer import evaluate, train


@dataclass(frozen=True)
class Recipe:
    """Pre-training, in the style of nanoGPT's recipe for a CPU; loss and time are in the README."""

    config: GPTConfig = field(default_factory=lambda: GPTConfig(dropout=0.15))
    steps: int = 4000
    batch: int = 16
    lr: float = 2e-3
    warmup: int = 100
    weight_decay: float = 0.1
    clip: float = 1.0
    seed: int = 1


def pretrain(recipe=Recipe(), device="cpu", progress=None, every=250, report=print, workers=1) -> tuple[GPT, History]:
    """A GPT trained by ``recipe``; ``report`` gets a line with both losses each ``every`` steps."""
    corpus, tokenizer = load_corpus("modern"), CharTokenizer()
    train_ids, val_ids = tokenizer.encode(corpus.train), tokenizer.encode(corpus.val)
    context, rng = recipe.config.n_positions, np.random.default_rng(recipe.seed)
    held_out = fixed_batches(val_ids, 32, context, limit=128)
    model = GPT(recipe.config, rng).to(device)
    optimizer = AdamW(
        model.trainable(), recipe.lr, betas=(0.9, 0.99), weight_decay=recipe.weight_decay, clip=recipe.clip
    )

    def report_losses(step, history):
        if (step + 1) % every == 0 or step + 1 == recipe.steps:
            recent = np.mean(history.loss[-every:])
            report(f"step {step + 1:5d}  train {recent:.3f}  held out {evaluate(model, held_out):.3f}", flush=True)

    batches = random_batches(train_ids, recipe.batch, context, rng)
    options = {"warmup": recipe.warmup, "rng": rng, "workers": workers, "progress": progress, "label": "pretrain"}
    history = train(model, optimizer, batches, recipe.steps, [report_losses], **options)
    return model, history
