"""The table of docs/peft.md: each method is written for PEFT and read again.

``python -m minilora.tools.peft_table`` prints it.
"""

import tempfile

from .. import methods
from ..errors import InputError
from ..files.peft import load_peft, save_peft
from ..gpt import GPT, GPTConfig
from ..surgery import adapt, adapted_layers

START, END = "<!-- peft -->", "<!-- /peft -->"
SMALL = GPTConfig(vocab_size=2, n_positions=2, n_embd=8, n_layer=1, n_head=1)
TARGETS = {"": ["q", "k", "v", "o", "up", "down"], ", without q, k and v": ["o", "up", "down"]}
R = 2


def table() -> str:
    """The rows for all methods, in Markdown."""
    lines = ["| method | in PEFT | rank of one layer | comes back as |", "| --- | --- | --- | --- |"]
    return "\n".join(lines + [row(name) for name in methods.names()])


def row(name: str) -> str:
    for restriction, targets in TARGETS.items():
        model = adapt(GPT(SMALL), name, targets, verbose=False, **methods.known(name, r=R))
        method = model.blocks[0].up.method
        with tempfile.TemporaryDirectory() as folder:
            try:
                save_peft(folder, model)
            except InputError:
                continue
            config = save_peft(folder, adapt(GPT(SMALL), method, ["up"], verbose=False))
            back = adapted_layers(load_peft(folder, GPT(SMALL)))["blocks.0.up"].method
        converted = method.updates_base or not method.peft
        kind = config["peft_type"] + (", converted" if converted else restriction)
        flags = [f"`{key}`" for key, value in method.peft.items() if value is True and not converted]
        if "alpha" in methods.options(name) and back.alpha != method.alpha and not converted:
            flags.append(f"alpha {back.alpha:g} for {method.alpha:g}")
        rank = "r" if back.r == R else f"{back.r / R:g} r"
        return f"| `{name}` | {', '.join([kind, *flags])} | {rank} | `{back.name}` |"
    return f"| `{name}` | none; `--form merged` | – | – |"


if __name__ == "__main__":
    print(table())
