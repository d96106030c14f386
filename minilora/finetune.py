"""``minilora train``: one method, on the Folio or on the user's own text, to an adapter in a file."""

import json

import numpy as np

from .checkpoint import fingerprint, load_base, save_adapter, writable_folder, write_atomically
from .compare import PROMPT, learning_rate, side_by_side, write_sample
from .data import CharTokenizer, fixed_batches, load_corpus, random_batches, read_text_file, split_text
from .errors import TrainingStopped
from .optim import AdamW, check_positive
from .surgery import adapt
from .train import evaluate, train


def finetune(
    method, targets="all-linear", data=None, replace=None, steps=150, lr=None, batch=8, warmup=20, weight_decay=0.0,
    clip=1.0, out="runs/train", base=None, seed=0, device="cpu", progress=None, report=print,
    workers=1, micro_batches=1, recompute=(),
):  # fmt: skip
    """Fine-tune with ``method``, an Adapter; write adapter.safetensors and history.json into ``out``.

    ``workers``, ``micro_batches``: see train; ``recompute``: see GPT.recompute.
    ``data``: a text file, whose end is held out; the Folio by default. Raises InputError before any training for
    input that cannot be used; TrainingStopped at a loss that is not finite, with the last good state saved.
    """
    check_positive(steps=steps, batch=batch, lr=lr)
    check_positive(zero_allowed=True, warmup=warmup)
    corpus = load_corpus("folio") if data is None else split_text(read_text_file(data, replace))
    model, tokenizer = load_base(base), CharTokenizer()
    context, rng = model.config.n_positions, np.random.default_rng(seed)
    batches = random_batches(tokenizer.encode(corpus.train), batch, context, rng)
    held_out = fixed_batches(tokenizer.encode(corpus.val), 32, context, limit=128)
    prompt = PROMPT if data is None else corpus.val[:32]
    write = lambda: write_sample(model, tokenizer, seed, prompt)
    mark = fingerprint(model)
    adapt(model.to(device), method, targets, seed)
    model.recompute(*recompute)
    rate = learning_rate(method.name) if lr is None else lr
    optimizer = AdamW(model.trainable(), rate, weight_decay=weight_decay, clip=clip)
    folder = writable_folder(out)

    before, sample = evaluate(model, held_out), write()  # an adapter starts as the base model
    try:
        history = train(
            model, optimizer, batches, steps, min(warmup, steps // 2), label=method.name, progress=progress,
            micro_batches=micro_batches, workers=workers,
        )  # fmt: skip
    except TrainingStopped as stop:
        save_adapter(folder / "adapter.safetensors", model, mark)
        raise TrainingStopped(f"{stop}; saved in {folder / 'adapter.safetensors'}") from None
    save_adapter(folder / "adapter.safetensors", model, mark)
    after = evaluate(model, held_out)
    record = {"loss": history.loss, "lr": history.lr, "grad_norm": history.grad_norm, "seconds": history.seconds,
              "held_out_before": before, "held_out_after": after}  # fmt: skip
    write_atomically(folder / "history.json", json.dumps(record).encode())
    report(f"Held-out loss {before:.3f} → {after:.3f} nats per character, {steps} steps, "
           f"{history.seconds_per_step * 1e3:.0f} ms each.\n")  # fmt: skip
    report(side_by_side("before", sample, "after", write()))
    report(f"\nWritten: {folder / 'adapter.safetensors'}; try: minilora generate --adapter {folder}")
    return model
