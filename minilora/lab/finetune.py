"""``minilora train``: one method, on the Folio or on the user's own text, to an adapter in a file.

A run can be stopped or killed at any moment, and goes on from its last checkpoint as if nothing had happened.
"""

import hashlib
import json
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from .. import methods
from ..data import CharTokenizer, fixed_batches, load_corpus, random_batches, read_text_file, split_text
from ..errors import AdapterFormatError, InputError, Interrupted, TrainingStopped
from ..files.base import fingerprint, load_base
from ..files.checkpoint import load_training, open_training, save_adapter, save_training, steps_taken
from ..files.saving import writable_folder, write_atomically
from ..surgery import adapt, plan
from ..training.loop import History
from ..training.optim import AdamW, check_positive
from ..training.trainer import evaluate, train
from .task import PROMPT, learning_rate, side_by_side, write_sample

ADAPTER, CHECKPOINT, HISTORY = "adapter.safetensors", "checkpoint.safetensors", "history.json"


NUMBERS = ("steps", "batch", "lr", "clip", "every", "warmup", "weight_decay")


@dataclass(frozen=True)
class Settings:
    """All that decides what a run comes to; its checkpoint holds them."""

    method: str
    options: dict
    targets: str | list
    data: str | None
    replace: str | None
    text_sha256: str
    steps: int
    lr: float
    batch: int
    warmup: int
    weight_decay: float
    clip: int | float | None
    base: str | None
    seed: int
    device: str
    workers: int
    blas_threads: int
    micro_batches: int
    recompute: bool
    every: int

    @classmethod
    def read(cls, file, found: dict):
        """From a checkpoint. Raises AdapterFormatError for a setting that is missing, unknown or of another type."""
        for field in fields(cls):
            kind = (int, float) if field.type is float else field.type
            if field.name not in found or not isinstance(found[field.name], kind):
                file.fail(f'the setting "{field.name}" is missing or has another type than {field.type}')
        if len(found) > len(fields(cls)):
            file.fail(f"there are settings that no run has: {sorted(found.keys() - {f.name for f in fields(cls)})}")
        try:
            methods.create(found["method"], **found["options"])
            check_numbers(**{name: found[name] for name in NUMBERS})
        except InputError as error:
            file.fail(str(error))
        return cls(**found)


def finetune(
    method, targets="all-linear", data=None, replace=None, steps=150, lr=None, batch=8, warmup=20, weight_decay=0.0,
    clip=1.0, out="runs/train", base=None, seed=0, device="cpu", progress=None, report=print,
    workers=1, micro_batches=1, recompute=False, every=25, overwrite=False,
):  # fmt: skip
    """Fine-tune with ``method``, an Adapter; write adapter.safetensors, history.json and checkpoints into ``out``.

    ``workers``, ``micro_batches``: see train; ``recompute``: see GPT.recompute. ``every``: steps between checkpoints.
    ``data``: a text file, whose end is held out; the Folio by default. Raises InputError before any training for
    input that cannot be used, such as a folder with an unfinished run, unless ``overwrite``; TrainingStopped at a loss
    that is not finite, with the last good state saved; Interrupted where a signal stopped it, between two steps.
    """
    check_numbers(steps=steps, batch=batch, lr=lr, clip=clip, every=every, warmup=warmup, weight_decay=weight_decay)
    settings = Settings(
        method=method.name, options=asdict(method), targets=targets if isinstance(targets, str) else list(targets),
        data=None if data is None else str(Path(data).resolve()), replace=replace,
        text_sha256=sha256(read_corpus(data, replace)), steps=steps,
        lr=learning_rate(method.name) if lr is None else lr, batch=batch, warmup=min(warmup, steps // 2),
        weight_decay=weight_decay, clip=clip, base=None if base is None else str(Path(base).resolve()), seed=seed,
        device=device, workers=workers, blas_threads=blas_threads(), micro_batches=micro_batches,
        recompute=recompute, every=every,
    )  # fmt: skip
    return run(settings, Path(out), None, overwrite, progress, report)


def resume(out, workers=None, device=None, progress=None, report=print):
    """Go on with the run in the folder ``out``, to the state that it would have come to without the interruption.

    That holds to the bit on the same machine with as many ``workers`` and BLAS threads; others may be asked for, and
    then the sums are rounded in another order. Raises AdapterFormatError for a folder without a checkpoint or a damaged
    one, InputError where the text has changed since, and what finetune raises.
    """
    path = Path(out) / CHECKPOINT
    if not path.exists():
        raise AdapterFormatError(path, "there is no such checkpoint; a run's folder was expected")
    file, found = open_training(path)
    settings = Settings.read(file, found)
    threads = blas_threads() if settings.workers == 1 else settings.blas_threads  # workers have one each
    for name, asked in (("workers", workers), ("device", device), ("blas_threads", threads)):
        if asked not in (None, getattr(settings, name)):
            report(
                f"The run began with {name} {getattr(settings, name)}: with {asked} it is the same but for rounding."
            )
            settings = Settings(**{**asdict(settings), name: asked})
    return run(settings, Path(out), file, False, progress, report)


def run(settings: Settings, folder: Path, file, overwrite, progress, report):
    """The whole run, or from its checkpoint ``file`` on: the model, trained."""
    corpus = read_corpus(settings.data, settings.replace)
    if sha256(corpus) != settings.text_sha256:
        raise InputError(f"the text {settings.data or 'that is shipped'} is not the one that this run began with")
    tokenizer = CharTokenizer()
    model = load_base(settings.base, tokenizer.vocab_size)
    model.recompute(settings.recompute)
    context, rng, history = model.config.n_positions, np.random.default_rng(settings.seed), History()
    batches = random_batches(tokenizer.encode(corpus.train), settings.batch, context, rng)
    held_out = fixed_batches(tokenizer.encode(corpus.val), 32, context, limit=128)
    prompt = PROMPT if settings.data is None else corpus.val[:32]
    write = lambda: write_sample(model, tokenizer, settings.seed, prompt)
    mark, method = fingerprint(model), methods.create(settings.method, **settings.options)
    make_optimizer = lambda params: AdamW(params, settings.lr, weight_decay=settings.weight_decay, clip=settings.clip)
    plan(model, method, settings.targets)
    model.to(settings.device)
    writable_folder(folder)
    if file is None and not overwrite:
        check_unfinished(folder)

    before, sample = evaluate(model, held_out), write()  # an adapter starts as the base model
    if file is None:
        adapt(model, method, settings.targets, settings.seed)
        optimizer = make_optimizer(model.trainable())
        (folder / CHECKPOINT).unlink(missing_ok=True)  # of another run
    else:
        optimizer = load_training(file, model, make_optimizer, history, rng)
        report(f"{method.name}: going on after step {len(history.loss)} of {settings.steps}")
    save = lambda: save_training(folder / CHECKPOINT, model, mark, optimizer, history, rng, asdict(settings))
    with stop_signals() as signals:
        try:
            train(
                model, optimizer, batches, settings.steps, settings.warmup, label=method.name, progress=progress,
                callbacks=[Checkpoints(folder, settings, save, signals, len(history.loss))],
                micro_batches=settings.micro_batches, workers=settings.workers, history=history,
            )  # fmt: skip
        except TrainingStopped as stop:
            save_adapter(folder / ADAPTER, model, mark)
            (folder / CHECKPOINT).unlink(missing_ok=True)  # from there, the same would happen again
            raise TrainingStopped(f"{stop}; saved in {folder / ADAPTER}") from None
    save_adapter(folder / ADAPTER, model, mark)
    after = evaluate(model, held_out)
    record = {"loss": history.loss, "lr": history.lr, "grad_norm": history.grad_norm, "seconds": history.seconds,
              "held_out_before": before, "held_out_after": after}  # fmt: skip
    write_atomically(folder / HISTORY, json.dumps(record).encode())
    report(f"Held-out loss {before:.3f} → {after:.3f} nats per character, {settings.steps} steps, "
           f"{history.seconds_per_step * 1e3:.0f} ms each.\n")  # fmt: skip
    report(side_by_side("before", sample, "after", write()))
    report(f"\nWritten: {folder / ADAPTER}; try: minilora generate --adapter {folder}")
    return model


@dataclass
class Checkpoints:
    """train()'s callback: saves each ``settings.every`` steps, at the last, and where one of ``signals`` asks to stop.

    ``saved``: the step of the checkpoint in ``folder``, 0 where there is none. Raises Interrupted after a signal, and
    InputError where the disk does not take it, naming the checkpoint that is good.
    """

    folder: Path
    settings: Settings
    save: Callable
    signals: list
    saved: int

    def __call__(self, step, history):
        done, steps = step + 1, self.settings.steps
        stopping = self.signals and done < steps
        if stopping or done % self.settings.every == 0 or done == steps:
            try:
                self.save()
            except InputError as error:
                there = f"the checkpoint of step {self.saved} is good: {go_on(self.folder)}"
                raise InputError(
                    f"stopped after step {done}: {error}; {there if self.saved else 'no step is saved yet'}"
                ) from error
            self.saved = done
        if stopping:
            saved = f"stopped and saved after step {done} of {steps}; to go on: {go_on(self.folder)}"
            raise Interrupted(saved, self.signals[0])


def check_numbers(**numbers) -> None:
    """Raise InputError for a setting that is out of range."""
    may_be_zero = {name: numbers.pop(name) for name in ("warmup", "weight_decay")}
    check_positive(**numbers)
    check_positive(zero_allowed=True, **may_be_zero)


def blas_threads() -> int:
    from threadpoolctl import threadpool_info

    return max((pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"), default=1)


def read_corpus(data, replace):
    return load_corpus("folio") if data is None else split_text(read_text_file(data, replace))


def sha256(corpus) -> str:
    return hashlib.sha256(f"{corpus.train}\0{corpus.val}".encode()).hexdigest()


def check_unfinished(folder: Path) -> None:
    """Raise InputError where a run in ``folder`` could still go on: its checkpoint would be lost."""
    if not (folder / CHECKPOINT).exists():
        return
    try:
        file, settings = open_training(folder / CHECKPOINT)
        steps = Settings.read(file, settings).steps
        if steps_taken(file) == steps:
            return
        where = f'"{settings["method"]}", step {steps_taken(file)} of {steps}'
        what = f"holds an unfinished run ({where}): go on with {go_on(folder)}"
    except AdapterFormatError as error:
        what = f"holds a checkpoint that cannot be read ({error.rule}): look at it"
    raise InputError(f'"{folder}" {what}; or choose another --out, or replace it with --overwrite')


def go_on(folder) -> str:
    return f"minilora train --resume {folder}"


@contextmanager
def stop_signals():
    """A list that gets the number of SIGINT (Ctrl-C) or SIGTERM; the same signal once more does what it always does."""
    got, previous = [], {}

    def note(signum, frame):
        got.append(signum)
        signal.signal(signum, previous[signum])
        print("\nminilora: stopping after this step; once more stops at once", file=sys.stderr)

    if threading.current_thread() is threading.main_thread():  # no other may set handlers
        for signum in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(signum) is not signal.SIG_IGN:  # as for a job in the background, or under nohup
                previous[signum] = signal.getsignal(signum) or signal.SIG_DFL
                signal.signal(signum, note)
    try:
        yield got
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
