"""minilora: the LoRA family from scratch, one readable file per method, gradients written by hand and checked.

model = minilora.pretrained()                        # a tiny GPT-2 that has read Shakespeare
minilora.adapt(model, "lora", r=8, alpha=16)         # freeze it and put LoRA beside each linear layer
optimizer = minilora.AdamW(model.trainable(), lr=5e-3)
minilora.train(model, optimizer, batches, steps=200)
"""

from importlib.util import find_spec

from . import elementary, methods, ops  # elementary gives Tensor its operators
from .adapter import Adapter
from .bank import Adapters
from .engine import Tensor, backward, no_grad, plain
from .errors import InputError, TrainingStopped
from .files.adapters import load_adapter
from .files.base import pretrained
from .files.gpt2 import load_gpt2, save_gpt2
from .files.peft import load_peft, save_peft
from .gpt import GPT, GPTConfig
from .memory import kept_bytes, ledger
from .merging import merge, merge_and_unload, unload, unmerge
from .surgery import adapt, count_parameters
from .training.optim import AdamW
from .training.sgd import SGD
from .training.trainer import evaluate, train

if find_spec(f"{__name__}.fast"):
    from . import fast as fast  # last: it registers faster forms of what is imported above

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
    "load_adapter",
    "load_gpt2",
    "load_peft",
    "merge",
    "merge_and_unload",
    "methods",
    "no_grad",
    "ops",
    "plain",
    "pretrained",
    "save_gpt2",
    "save_peft",
    "train",
    "unload",
    "unmerge",
]
