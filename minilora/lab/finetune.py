"""``minilora train``: one method, on the Folio or on the user's own text, to an adapter in a file.

A run can be stopped or killed at any moment, and resumes from its last checkpoint as if nothing had happened.
"""

import hashlib
import json
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from ..data import CharTokenizer, fixed_batches, load_corpus, random_batches, read_text_file, split_text
from ..errors import InputError, Interrupted, TrainingStopped
from ..files.adapters import ADAPTER
from ..files.base import fingerprint, load_base
from ..files.checkpoint import SERIES, load_training, open_training, save_adapter, save_training, steps_taken
from ..files.errors import AdapterFormatError
from ..files.saving import writable_folder, write_atomically
from ..surgery import adapt, plan
from ..training.history import History
from ..training.optim import AdamW
from ..training.trainer import evaluate, train
from .settings import Settings
from .task import PROMPT, learning_rate, side_by_side, write_sample

CHECKPOINT, HISTORY, SETTINGS = "checkpoint.safetensors", "history.json", "settings.json"


def finetune(settings: Settings, out="runs/train", overwrite=False, progress=None, report=print):
    """Fine-tune with ``settings``; write adapter, history, settings and checkpoints into ``out``; returns the model.

    Raises InputError before any training for input that cannot be used, such as a folder with an unfinished run, unless
    ``overwrite``; TrainingStopped at a loss that is not finite, with the last good state saved; Interrupted if a signal
    stopped it, between two steps.
    """
    settings = replace(
        settings,
        options=asdict(settings.adapter()),
        data=None if settings.data is None else str(Path(settings.data).resolve()),
        base=None if settings.base is None else str(Path(settings.base).resolve()),
        lr=learning_rate(settings.method) if settings.lr is None else settings.lr,
        warmup=min(settings.warmup, settings.steps // 2),
        workers=settings.processes(),
        text_sha256=sha256(read_corpus(settings)),
        blas_threads=blas_threads(),
    )
    return run(settings, Path(out), None, overwrite, progress, report)


def resume(out, workers=None, device=None, progress=None, report=print):
    """Resume the run in the folder ``out``, to the state that it would have reached without the interruption.

    It is the same bit for bit on the same machine with as many ``workers`` and BLAS threads; if others are asked for,
    the sums are rounded in another order. Raises AdapterFormatError for a folder without a checkpoint or a damaged
    one, InputError if the text has changed since, and what finetune raises.
    """
    path = Path(out) / CHECKPOINT
    if not path.exists():
        raise AdapterFormatError(path, "there is no such checkpoint; a run's folder was expected")
    file, found = open_training(path)
    settings = Settings.read(file, found)
    threads = blas_threads() if settings.workers == 1 else settings.blas_threads  # workers have one each
    for name, asked in (("workers", workers), ("device", device), ("blas_threads", threads)):
        if asked not in (None, getattr(settings, name)):
            began = f"The run began with {name} {getattr(settings, name)}"
            report(f"{began}: with {asked} it is the same but for rounding.")
            settings = replace(settings, **{name: asked})
    return run(settings, Path(out), file, False, progress, report)


def run(settings: Settings, folder: Path, file, overwrite, progress, report):
    """The whole run, or the rest of it from its checkpoint ``file`` on: the model, trained."""
    corpus = read_corpus(settings)
    if sha256(corpus) != settings.text_sha256:
        raise InputError(f"the text {settings.data or 'that is shipped'} is not the one that this run began with")
    tokenizer, method = CharTokenizer(), settings.adapter()
    model = load_base(settings.base, tokenizer.vocab_size)
    plan(model, method, settings.targets)
    mark = fingerprint(model)
    model.recompute(settings.recompute).to(settings.device)
    context, rng, history = model.config.n_positions, np.random.default_rng(settings.seed), History()
    batches = random_batches(tokenizer.encode(corpus.train), settings.batch, context, rng)
    held_out = fixed_batches(tokenizer.encode(corpus.val), 32, context, limit=128)
    prompt = PROMPT if settings.data is None else corpus.val[:32]
    writable_folder(folder)
    if file is None and not overwrite:
        check_unfinished(folder)

    before = evaluate(model, held_out)  # an adapter starts as the base model
    sample = write_sample(model, tokenizer, settings.seed, prompt)
    if file is None:
        adapt(model, method, settings.targets, settings.seed)
        optimizer = make_optimizer(settings, model.trainable())
        (folder / CHECKPOINT).unlink(missing_ok=True)  # of another run
    else:
        optimizer = load_training(file, model, lambda params: make_optimizer(settings, params), history, rng)
        report(f"{method.name}: resuming after step {len(history.loss)} of {settings.steps}")
    text = json.dumps(asdict(settings), indent=2, ensure_ascii=False) + "\n"
    write_atomically(folder / SETTINGS, text.encode())

    def save():
        save_training(folder / CHECKPOINT, model, mark, optimizer, history, rng, asdict(settings))

    options = {"warmup": settings.warmup, "micro_batches": settings.micro_batches, "workers": settings.workers}
    with stop_signals() as signals:
        checkpoints = Checkpoints(folder, settings, save, signals, len(history.loss))
        try:
            train(model, optimizer, batches, settings.steps, [checkpoints], history,
                  label=method.name, progress=progress, **options)  # fmt: skip
        except TrainingStopped as stop:
            save_adapter(folder / ADAPTER, model, mark)
            (folder / CHECKPOINT).unlink(missing_ok=True)  # from there, the same would happen again
            raise TrainingStopped(f"{stop}; saved in {folder / ADAPTER}") from None
    save_adapter(folder / ADAPTER, model, mark)
    after = evaluate(model, held_out)
    record = {name: getattr(history, name) for name in SERIES}
    record |= {"held_out_before": before, "held_out_after": after}
    write_atomically(folder / HISTORY, json.dumps(record).encode())
    report(
        f"Held-out loss {before:.3f} → {after:.3f} nats per character, {settings.steps} steps, "
        f"{history.seconds_per_step * 1e3:.0f} ms each.\n"
    )
    report(side_by_side("before", sample, "after", write_sample(model, tokenizer, settings.seed, prompt)))
    report(f"\nWritten: {folder / ADAPTER}; try: minilora generate --adapter {folder}")
    return model


@dataclass
class Checkpoints:
    """A callback of train(): saves each ``settings.every`` steps, at the last, and if one of ``signals`` asks to stop.

    ``saved``: the step of the checkpoint in ``folder``, 0 if there is none. Raises Interrupted after a signal, and
    InputError if the disk does not take it, naming the checkpoint that is good.
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
                there = f"the checkpoint of step {self.saved} is good: {how_to_resume(self.folder)}"
                there = there if self.saved else "no step is saved yet"
                raise InputError(f"stopped after step {done}: {error}; {there}") from error
            self.saved = done
        if stopping:
            saved = f"stopped and saved after step {done} of {steps}; to resume: {how_to_resume(self.folder)}"
            raise Interrupted(saved, self.signals[0])


def make_optimizer(settings, parameters):
    return AdamW(parameters, settings.lr, weight_decay=settings.weight_decay, clip=settings.clip)


def blas_threads() -> int:
    from threadpoolctl import threadpool_info

    return max((pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"), default=1)


def read_corpus(settings: Settings):
    """The text to learn, and its part that is held out."""
    if settings.data is None:
        return load_corpus("folio")
    return split_text(read_text_file(settings.data, settings.replace))


def sha256(corpus) -> str:
    return hashlib.sha256(f"{corpus.train}\0{corpus.val}".encode()).hexdigest()


def check_unfinished(folder: Path) -> None:
    """Raise InputError if a run in ``folder`` could still resume: its checkpoint would be lost."""
    if not (folder / CHECKPOINT).exists():
        return
    try:
        file, settings = open_training(folder / CHECKPOINT)
        steps = Settings.read(file, settings).steps
        if steps_taken(file) == steps:
            return
        where = f'"{settings["method"]}", step {steps_taken(file)} of {steps}'
        what = f"holds an unfinished run ({where}): resume it with {how_to_resume(folder)}"
    except AdapterFormatError as error:
        what = f"holds a checkpoint that cannot be read ({error.rule}): look at it"
    raise InputError(f'"{folder}" {what}; or choose another --out, or replace it with --overwrite')


def how_to_resume(folder) -> str:
    return f"minilora train --resume {folder}"


@contextmanager
def stop_signals():
    """A list that receives the number of SIGINT (Ctrl-C) or SIGTERM; a second one does what it always does."""
    got, previous = [], {}

    def note(signum, frame):
        got.append(signum)
        signal.signal(signum, previous[signum])
        print("\nminilora: stopping after this step; the same again stops at once", file=sys.stderr)

    if threading.current_thread() is threading.main_thread():  # no other may set handlers
        for signum in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(signum) is not signal.SIG_IGN:  # as in a background job, or under nohup
                previous[signum] = signal.getsignal(signum) or signal.SIG_DFL
                signal.signal(signum, note)
    try:
        yield got
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
