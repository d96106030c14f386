"""The settings of ``minilora train``, ``compare`` and ``sweep``, each defined once.

A field has its type, its default, the help text of its flag, and the check of its value. The command line makes its
flags from these fields, a checkpoint holds them, and each run writes them into its folder as settings.json.
"""

# ruff: noqa: RUF009  (setting() is dataclasses.field() with metadata)

import os
from dataclasses import dataclass, field, fields
from types import UnionType
from typing import get_args, get_origin

import numpy as np

from .. import methods
from ..errors import InputError, printable
from ..training.optim import check_positive

BASE = "a model file from pretrain, or a folder of transformers' GPT-2; the shipped model by default"
TARGETS = 'layers to adapt: "all-linear", or names such as q,v'
RECOMPUTE = "activation checkpointing: save each block's input alone, and compute the rest again in backward"
WORKERS = "data-parallel processes, one core each; by default as many as there are cores, at most 4, and 1 without fork"


def above_zero(name, value):
    check_positive(**{name: value})


def at_least_zero(name, value):
    check_positive(zero_allowed=True, **{name: value})


def setting(default, help=None, check=None, flag=None, split=False, **argument):
    """A field of a dataclass. ``help``, ``flag`` and ``argument`` are for argparse: without a help text, no flag.

    ``check(name, value)`` raises InputError for a value that is out of range; a list is checked value by value.
    ``split``: each text of a list may be several with commas between them, ["lora,vera", "dora"].
    """
    metadata = {"help": help, "check": check, "flag": flag, "split": split, "argument": argument}
    if isinstance(default, (dict, list)):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Checked:
    """Turns each value into the type of its field and checks it. Raises InputError for one that cannot be used."""

    def __post_init__(self):
        for f in fields(self):
            value = getattr(self, f.name)
            try:
                value = converted(value, f.type)
            except (TypeError, OverflowError):
                kind = f.type.__name__ if isinstance(f.type, type) else f.type
                raise InputError(f"{f.name} is {printable(repr(value), 80)}; expected {kind}") from None
            if value and f.metadata.get("split"):
                value = [one for text in value for one in text.split(",") if one]
            object.__setattr__(self, f.name, value)
            if check := f.metadata.get("check"):
                for one in value if isinstance(value, list) else [value]:
                    check(f.name, one)


def converted(value, kind):
    """``value`` as an instance of ``kind``: NumPy's numbers become Python's, paths strings, tuples lists.

    Raises TypeError for a value of another type, and OverflowError for an integer that is too large for a float.
    """
    value = value.item() if isinstance(value, np.generic) else value
    value = os.fspath(value) if isinstance(value, os.PathLike) else value
    if isinstance(kind, UnionType):
        for one in get_args(kind):
            try:
                return converted(value, one)
            except TypeError:
                continue
    elif get_origin(kind) is list and isinstance(value, (list, tuple, range)):
        return [converted(one, *get_args(kind)) for one in value]
    elif kind is float and type(value) is int:
        return float(value)
    elif isinstance(kind, type) and isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    raise TypeError(kind)


def layer_names(text: str):
    """ "all-linear" as it is, and ["q", "v"] of "q,v"."""
    return text if text == "all-linear" else text.split(",")


@dataclass(frozen=True, kw_only=True)
class Common(Checked):
    """What the settings of all three commands have."""

    steps: int = setting(150, "training steps", above_zero)
    batch: int = setting(8, "sequences per step", above_zero)
    base: str | None = setting(None, BASE, metavar="FILE")


@dataclass(frozen=True, kw_only=True)
class Training(Common):
    """What the settings of ``train`` and ``compare`` have."""

    lr: float | None = setting(None, "peak learning rate; by default the method's recorded one", above_zero)
    seed: int = setting(0, "seed of every random draw", at_least_zero)
    device: str = setting("cpu", "device to compute on", choices=["cpu", "cuda"])
    workers: int | None = setting(None, WORKERS, above_zero, metavar="N")

    def processes(self) -> int:
        """``workers``, or as many as this machine should have."""
        from ..training.workers import usual_workers

        return usual_workers(self.device) if self.workers is None else self.workers


@dataclass(frozen=True)
class Settings(Training):
    """All that decides the result of a run of ``minilora train``.

    ``Settings("lora", {"r": 4}, steps=300)``: the method's name, its own hyper-parameters, then what train has flags
    for. The last two are filled in by the run: the SHA-256 of its text, and the number of BLAS threads.
    """

    method: str
    options: dict = setting({})
    data: str | None = setting(None, "your own text, UTF-8; its last tenth is held out", metavar="FILE")
    replace: str | None = setting(
        None, "replace characters that the tokenizer lacks with CHAR", flag="--replace-unknown", metavar="CHAR"
    )
    targets: str | list[str] = setting(
        "all-linear", TARGETS, flag="--target-modules", metavar="NAMES", type=layer_names
    )
    warmup: int = setting(20, "steps of linear warm-up, followed by a cosine", at_least_zero)
    weight_decay: float = setting(0.0, "decoupled weight decay, on matrices", at_least_zero)
    clip: float | None = setting(1.0, "gradient clipping: the largest norm of the gradient", above_zero)
    micro_batches: int = setting(1, "gradient accumulation: take each batch in K parts", above_zero, metavar="K")
    recompute: bool = setting(False, RECOMPUTE)
    every: int = setting(25, "steps between two checkpoints", above_zero, flag="--checkpoint-every", metavar="N")
    text_sha256: str | None = setting(None)
    blas_threads: int | None = setting(None, check=above_zero)

    def adapter(self):
        """The method with its hyper-parameters. Raises InputError for a value that it cannot have."""
        return methods.create(self.method, **self.options)

    @classmethod
    def read(cls, file, found: dict):
        """From a checkpoint. Raises AdapterFormatError for a setting that is missing, unknown or cannot be used."""
        names = {f.name for f in fields(cls)}
        if missing := names - found.keys():
            file.fail(f"settings are missing: {sorted(missing)}")
        if unknown := found.keys() - names:
            file.fail(f"there are settings that no run has: {sorted(unknown)}")
        for name in ("lr", "workers", "text_sha256", "blas_threads"):
            if found[name] is None:
                file.fail(f'the setting "{name}" is missing')
        try:
            settings = cls(**found)
            settings.adapter()
        except InputError as error:
            file.fail(str(error))
        return settings


@dataclass(frozen=True)
class Comparison(Training):
    """What ``minilora compare`` trains. ``r`` and ``alpha`` go to each method that has them."""

    methods: list[str] | None = setting(None, "methods to compare; all by default", split=True, metavar="NAME")
    steps: int = setting(120, "training steps for each method", above_zero)
    r: int | None = setting(None, "rank of all methods, instead of each method's own default")
    alpha: float | None = setting(None, "alpha of all methods, instead of each method's own default")
    lr: float | None = setting(None, "one learning rate for all, instead of each method's recorded one", above_zero)


@dataclass(frozen=True)
class Grid(Common):
    """What ``minilora sweep`` trains: each combination. ``r`` and ``alpha`` count only for methods that have them."""

    methods: list[str] | None = setting(None, "methods to sweep; all by default", split=True, metavar="NAME")
    r: list[int] | None = setting(None, "ranks; each method's own by default", metavar="R")
    alpha: list[float] | None = setting(None, "scales; each method's own by default", metavar="ALPHA")
    lr: list[float] = setting([1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2], "learning rates", above_zero, metavar="LR")
    seeds: list[int] = setting([0, 1, 2], "seeds of each combination", at_least_zero, metavar="SEED")
