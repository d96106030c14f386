"""minilora: the LoRA family from scratch, one readable file per method, gradients written by hand and checked.

model = minilora.pretrained()                        # a tiny GPT-2 that has read Shakespeare
minilora.adapt(model, "lora", r=8, alpha=16)         # freeze it and put LoRA beside each linear layer
optimizer = minilora.AdamW(model.trainable(), lr=5e-3)
minilora.train(model, optimizer, batches, steps=200)
"""

from . import elementary, methods, ops  # elementary gives Tensor its operators
from .adapter import Adapter
from .adapters import Adapters
from .checkpoint import pretrained
from .engine import Tensor, backward, no_grad
from .errors import InputError, TrainingStopped
from .gpt import GPT, GPTConfig
from .gpt2 import load_gpt2, save_gpt2
from .ledger import kept_bytes, ledger
from .optim import SGD, AdamW
from .peft import load_peft, save_peft
from .surgery import adapt, count_parameters, merge, merge_and_unload, unload, unmerge
from .train import evaluate, train

__version__ = "0.1.0"

__all__ = [
    "GPT",
    "SGD",
    "AdamW",
    "Adapter",
    "Adapters",
    "GPTConfig",
    "InputError",
    "Tensor",
    "TrainingStopped",
    "adapt",
    "backward",
    "count_parameters",
    "elementary",
    "evaluate",
    "kept_bytes",
    "ledger",
    "load_gpt2",
    "load_peft",
    "merge",
    "merge_and_unload",
    "methods",
    "no_grad",
    "ops",
    "pretrained",
    "save_gpt2",
    "save_peft",
    "train",
    "unload",
    "unmerge",
]
