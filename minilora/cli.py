"""The command line, thin: ``minilora compare``, ``train``, ``methods``, ``check`` and the rest that ``--help`` lists.

Each command is two functions in this file: NAME_flags(parser) declares its flags, run_NAME(args) does the work, and
the first line of its docstring is the help. Both import what they need when the command runs, so that none waits for
another's modules. An error that the user can mend is one line and exit code 2.
"""

import argparse
import dataclasses
import inspect
import json
import sys
from functools import partial
from pathlib import Path
from types import NoneType, UnionType
from typing import Union, get_args, get_origin, get_type_hints

from . import methods
from .errors import InputError, Interrupted, TrainingStopped


def main(argv=None) -> int:
    """Run one command; returns the exit code: 0, 1 for a failed check or a stopped run, 2 for unusable input."""
    try:
        args = build_parser().parse_args(argv)
        return args.run(args) or 0
    except InputError as error:
        print(f"minilora: error: {error}", file=sys.stderr)
        return 2
    except (TrainingStopped, Interrupted) as stop:
        print(f"minilora: {stop}", file=sys.stderr)
        return 128 + stop.signum if isinstance(stop, Interrupted) else 1  # 130 for Ctrl-C, as shells count
    except KeyboardInterrupt:
        print("\nminilora: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
        sys.stderr.close()
        return 0


# ------------------------------------------------------------------------------------------------- parsers and flags


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows a default if there is one; the help of an option without a default says what happens then."""

    def _get_help_string(self, action):
        nothing = action.default is False or action.default in (None, [])
        return action.help if nothing else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """A parser that declares its flags when it is used: ``declare(parser)`` adds them."""

    def __init__(self, *arguments, declare=None, **options):
        super().__init__(*arguments, allow_abbrev=False, formatter_class=Help, **options)
        self.declare = declare

    def parse_known_args(self, args=None, namespace=None):
        if self.declare is not None:
            self.declare(self)
            self.declare = None
        return super().parse_known_args(args, namespace)


class MethodNames(dict):
    """The choices of ``train``: a word that is not a method raises InputError, with the nearest name."""

    def __contains__(self, word):
        if not super().__contains__(word):
            try:
                methods.get(word)
            except InputError as error:
                raise InputError(f"{error}. A method's own options go after its name") from None
        return True


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    package = sys.modules["minilora"]
    parser = Parser(prog="minilora", description=inspect.getdoc(package).split("\n")[0])
    parser.add_argument("--version", action="version", version=f"minilora {package.__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, (flags, run) in COMMANDS.items():
        help = inspect.getdoc(run).split("\n")[0]
        commands.add_parser(name, help=help, description=help, declare=flags).set_defaults(run=run)
    return parser


def add_flags(parser, kind, otherwise=None):
    """A flag for each field of the dataclass ``kind`` whose metadata have a help text, or for all with ``otherwise``.

    The result of parsing has only the flags that were given: the defaults stand in the dataclass alone.
    """
    hints = get_type_hints(kind)
    for f in dataclasses.fields(kind):
        help = f.metadata.get("help") or otherwise
        if help is None:
            continue
        default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        words = argument(hints[f.name]) | f.metadata.get("argument", {})
        if not (default is None or default is False):
            shown = " ".join(map(str, default)) if isinstance(default, list) else default
            help = f"{help} (default: {shown})"
        flag = f.metadata.get("flag") or "--" + f.name.replace("_", "-")
        parser.add_argument(flag, dest=f.name, default=argparse.SUPPRESS, help=help.replace("%", "%%"), **words)


def argument(kind) -> dict:
    """What argparse needs for a value of the type ``kind``, such as int, bool, float | None or list[int]."""
    if get_origin(kind) in (Union, UnionType):
        kind = next(one for one in get_args(kind) if one is not NoneType)
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    if (get_origin(kind) or kind) in (list, tuple):
        return {"nargs": "+", "type": [*get_args(kind), str][0]}
    return {"type": kind}


def given(args, kind) -> dict:
    """Those fields of the dataclass ``kind`` that the command line gave."""
    return {f.name: vars(args)[f.name] for f in dataclasses.fields(kind) if f.name in args}


def base_flag(p):
    help = "a model file from pretrain, or a folder of transformers' GPT-2; the shipped model by default"
    p.add_argument("--base", metavar="FILE", help=help)


def device_flag(p):
    p.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="device to compute on")


def json_flag(p):
    p.add_argument("--json", action="store_true", help="print JSON")


# ------------------------------------------------------------------------------------------------- train and compare


def compare_flags(p):
    from .lab.settings import Comparison

    add_flags(p, Comparison)
    p.add_argument("--out", default="compare", metavar="DIR", help="folder for compare.json, .md and .png")


def run_compare(args):
    """Fine-tune on real text with every method; write a table and a figure."""
    from .lab.compare import compare
    from .lab.settings import Comparison

    compare(Comparison(**given(args, Comparison)), args.out)


def train_flags(p):
    run_flags(p)
    help = "one of: " + ", ".join(methods.names()) + "; METHOD --help lists its own options too"
    chosen = p.add_subparsers(dest="method", metavar="METHOD", help=help)
    for name in methods.names():
        description = f"{inspect.getdoc(run_train)} The method: {name}."
        chosen.add_parser(name, description=description, declare=partial(method_flags, name=name))
    chosen.choices = MethodNames(chosen.choices)


def run_flags(p):
    """The flags of ``train``, which may stand before the method's name or after it."""
    from .lab.settings import Settings

    add_flags(p, Settings)
    once = {"default": argparse.SUPPRESS}  # so that a parser that reads the rest does not overwrite what was given
    p.add_argument("--out", metavar="DIR", help="folder of the run's files (default: runs/train)", **once)
    p.add_argument("--overwrite", action="store_true", help="replace an unfinished run in the folder", **once)
    p.add_argument("--resume", metavar="DIR", help="resume the run in this folder, with its own settings", **once)


def method_flags(p, name):
    """The flags of ``train`` and those of the method ``name``."""
    run_flags(p)
    group = p.add_argument_group("the method's own options")
    add_flags(group, methods.get(name), f"see the equations at the top of methods/{name}.py")


def run_train(args):
    """Fine-tune with one method, on the Folio or on your own text; save the adapter."""
    from .lab.finetune import finetune, resume
    from .lab.settings import Settings

    got = {name: value for name, value in vars(args).items() if value is not None}
    if "resume" in got:
        if left := got.keys() - {"run", "resume", "workers", "device"}:
            raise InputError(
                f"--resume continues with the run's own settings; leave out {', '.join(sorted(left))}, "
                "or begin another run with another --out"
            )
        resume(args.resume, got.get("workers"), got.get("device"))
        return
    if args.method is None:
        raise InputError(f"name a method, one of {', '.join(methods.names())}; or --resume DIR")
    settings = Settings(**given(args, Settings), options=given(args, methods.get(args.method)))
    finetune(settings, got.get("out", "runs/train"), "overwrite" in got)


def sweep_flags(p):
    import os

    from .lab.settings import Grid

    add_flags(p, Grid)
    add = p.add_argument
    add("--workers", type=int, metavar="N", default=os.cpu_count() or 1, help="local processes")
    add("--dask", metavar="ADDRESS", help="run on this Dask cluster instead, such as tcp://127.0.0.1:8786")
    add("--out", default="sweep.jsonl", metavar="FILE", help="one JSON line per run; the same command again resumes")
    add("--retry-failed", action="store_true", help="do failed runs again")
    add("--report", action="store_true", help="run nothing; print a table of --out and draw it as .png next to it")
    add("--record", metavar="FILE", help="run nothing; write the best rates of --out as learning_rates.json has them")
    add("--allow-edge", action="store_true", help="let --record take a rate at the edge of the grid")


def run_sweep(args):
    """Method × rank × alpha × learning rate × seed, on processes or a Dask cluster."""
    from .files.saving import write_atomically
    from .lab import executors, figures, results, sweep
    from .lab.settings import Grid
    from .plots import png

    out, picture = Path(args.out), Path(args.out).with_suffix(".png") if args.out else Path()
    if out in (picture, Path(args.record or "")):
        raise InputError(f'--out "{out}" would be written over by --report or --record; choose another name')
    if args.report or args.record:
        lines = list(results.read(out)[0].values())
        if not lines:
            raise InputError(f'"{out}" holds no runs; do some with minilora sweep --out "{out}"')
    else:
        runs = sweep.runs_of(Grid(**given(args, Grid)))
        with executors.cluster(args.dask) if args.dask else executors.local(args.workers) as executor:
            lines = sweep.sweep(runs, executor, out, retry_failed=args.retry_failed)
    print(results.table(lines))
    if args.report:
        write_atomically(picture, png(figures.sweep(lines)))
        print(f"Written: {picture}")
    if args.record:
        results.record(lines, args.record, args.allow_edge)


def pretrain_flags(p):
    p.add_argument("--steps", type=int, help="training steps; the recipe's by default")
    p.add_argument("--out", default="pretrained.safetensors", metavar="FILE", help="the model file to write")
    device_flag(p)
    help = "data-parallel processes, one core each; the draws of dropout, and so the model, depend on it"
    p.add_argument("--workers", type=int, default=1, metavar="N", help=help)


def run_pretrain(args):
    """Make the base model again: a tiny GPT trained on modern Shakespeare."""
    from .files.base import save_model
    from .files.saving import writable_folder
    from .lab.pretrain import Recipe, pretrain

    recipe = Recipe() if args.steps is None else dataclasses.replace(Recipe(), steps=args.steps)
    writable_folder(Path(args.out).parent)
    model, history = pretrain(recipe, args.device, workers=args.workers)
    save_model(args.out, model.to("cpu"))
    print(f"Written: {args.out}, after {sum(history.seconds):.0f} s of training")


def generate_flags(p):
    from .lab.task import PROMPT

    p.add_argument("--adapter", metavar="DIR", help="folder of a train run, or of PEFT")
    p.add_argument("--prompt", default=PROMPT, help="text to continue")
    p.add_argument("--tokens", type=int, default=400, help="characters to write")
    p.add_argument("--temperature", type=float, default=0.7, help="0 is greedy")
    p.add_argument("--top-k", type=int, metavar="K", help="draw among the K likeliest characters only")
    base_flag(p)
    p.add_argument("--seed", type=int, default=0, help="seed of every random draw")
    device_flag(p)


def run_generate(args):
    """Write text with the base model, or with an adapter that train saved."""
    import numpy as np

    from .data import CharTokenizer
    from .files.adapters import load_adapter
    from .files.base import load_base

    tokenizer = CharTokenizer()
    ids = tokenizer.encode(args.prompt)[None]
    model = load_base(args.base, tokenizer.vocab_size)
    if args.adapter is not None:
        load_adapter(args.adapter, model)
    rng = np.random.default_rng(args.seed)
    text = model.to(args.device).generate(ids, args.tokens, args.temperature, args.top_k, rng)[0]
    print(args.prompt + tokenizer.decode(text))


# ------------------------------------------------------------------------------------------------- to and from PEFT


def export_flags(p):
    from .files import peft

    p.add_argument("adapter", metavar="RUN", help="folder of a train run")
    p.add_argument("folder", metavar="DIR", help="folder to write")
    help = "the method's own PEFT type, LoRA in any case, or the whole model, merged"
    p.add_argument("--form", default="adapter", choices=peft.FORMS, help=help)
    help = "names of the modules: those of transformers, or those of minilora"
    p.add_argument("--names", default="gpt2", choices=peft.NAMES, help=help)
    p.add_argument("--with-base", action="store_true", help="write the base model too, for transformers: DIR/base")
    base_flag(p)


def run_export(args):
    """Write a run's adapter for PEFT, or its merged model for transformers."""
    from .files.adapters import load_adapter
    from .files.base import load_base
    from .files.gpt2 import save_gpt2
    from .files.peft import save_peft
    from .merging import unload

    model, base = load_base(args.base), f"{args.folder}/base" if args.with_base else None
    load_adapter(args.adapter, model)
    config = save_peft(args.folder, model, args.form, args.names, base)
    if args.with_base:
        save_gpt2(base, unload(model))
    base = base or "BASE"
    if args.form == "merged":
        print(f"Written: {args.folder}, a GPT-2 for transformers without any adapter. To load it:")
        print(f'  transformers.GPT2LMHeadModel.from_pretrained("{args.folder}")')
        return
    flags = [key for key, value in config.items() if key.startswith("use_") and value]
    print(f"Written: {args.folder}, {' with '.join([config['peft_type'], *flags])}, r = {config['r']}. To load it:")
    if args.names == "gpt2":
        print(f'  model = transformers.GPT2LMHeadModel.from_pretrained("{base}")')
    else:
        print("  model = a torch model with modules named as here, and the base model's weights")
    print(f'  model = peft.PeftModel.from_pretrained(model, "{args.folder}")')
    if args.names == "gpt2" and not args.with_base:
        print("BASE is the base model as transformers has it; --with-base writes it too.")


def import_flags(p):
    p.add_argument("adapter", metavar="DIR", help="folder with adapter_config.json and adapter_model.safetensors")
    p.add_argument("--out", required=True, metavar="RUN", help="folder for adapter.safetensors")
    base_flag(p)


def run_import(args):
    """Read an adapter that PEFT wrote; save it as train does."""
    from .files.adapters import ADAPTER
    from .files.base import fingerprint, load_base
    from .files.checkpoint import save_adapter
    from .files.peft import load_peft
    from .files.saving import writable_folder
    from .surgery import adapted_layers

    model = load_base(args.base)
    mark = fingerprint(model)
    layers = adapted_layers(load_peft(args.adapter, model))
    path = writable_folder(args.out) / ADAPTER
    save_adapter(path, model, mark)
    print(f"Written: {path}, {next(iter(layers.values())).method.name} in {len(layers)} layers")


# ------------------------------------------------------------------------------------------------- look inside


def run_methods(args):
    """List the methods: what each trains, saves for backward and costs."""
    from .tools.catalogue import catalogue, show

    entries = catalogue()
    print(json.dumps(entries, indent=1) if args.json else show(entries))


def adapted_step(method, batch, recompute=False):
    """The shipped model with ``method``, and a batch (ids, targets) of the Folio."""
    from .data import CharTokenizer, fixed_batches, load_corpus
    from .files.base import pretrained
    from .surgery import adapt

    adapter = methods.create(method)
    model = pretrained().recompute(recompute)
    ids = CharTokenizer().encode(load_corpus("folio").val)
    return adapt(model, adapter, verbose=False), *fixed_batches(ids, batch, model.config.n_positions)[0]


def ledger_flags(p):
    p.add_argument("methods", nargs="+", metavar="METHOD", help="methods to audit, on the shipped model")
    p.add_argument("--batch", type=int, default=8, help="sequences of the full context")
    help = "activation checkpointing: save each block's input alone, and compute the rest again in backward"
    p.add_argument("--recompute", action="store_true", help=help)
    json_flag(p)


def run_ledger(args):
    """Show which arrays are saved for backward, in bytes, next to what the allocator says."""
    from .tools.audit import audit, show

    audits = {name: audit(*adapted_step(name, args.batch, args.recompute)) for name in args.methods}
    if not args.json:
        print("\n\n".join(show(name, found) for name, found in audits.items()))
        return
    for found in audits.values():
        found["entries"] = [dataclasses.asdict(entry) for entry in found["entries"] if entry.nbytes]
    print(json.dumps(audits, indent=1))


def trace_flags(p):
    p.add_argument("method", metavar="METHOD", help="the method that adapts it")
    p.add_argument("--batch", type=int, default=1, help="sequences of the full context")


def run_trace(args):
    """Print one training step of the shipped model, operation by operation."""
    from .tools.trace import show, trace

    print(show(trace(*adapted_step(args.method, args.batch))))


def diff_flags(p):
    p.add_argument("first", metavar="METHOD")
    p.add_argument("second", metavar="METHOD")


def run_diff(args):
    """Print what one method changes in another: the equations and lines of code."""
    from .tools.diff import difference

    print(difference(args.first, args.second))


def run_devices(args):
    """List what can compute here: the CPU, and each GPU or why there is none."""
    from .tools.devices import devices, show

    found = devices()
    print(json.dumps(found, indent=1) if args.json else show(found))


# ------------------------------------------------------------------------------------------------- check and write


def check_flags(p):
    p.add_argument("methods", nargs="*", metavar="METHOD", help="methods to check; all and the operations by default")
    p.add_argument("--file", metavar="FILE", help="a method file to grade line by line: an exercise, or your own")
    json_flag(p)
    p.add_argument("--verbose", "-v", action="store_true", help="show every array of every check, not only failures")


def run_check(args):
    """Check hand-written gradients against finite differences and the complex step."""
    from .tools.gradcheck import check_methods, check_operations

    if args.file is not None:
        from .tools.exercises import grade

        if args.methods:
            raise InputError("check: name methods, or one file with --file")
        grades = grade(args.file)
        print(json.dumps(grades.dict(), indent=1) if args.json else grades)
        return int(not grades)
    reports = [] if args.methods else check_operations()
    reports += check_methods(args.methods or None)
    if args.json:
        print(json.dumps({"ok": all(reports), "reports": [report.dict() for report in reports]}, indent=1))
        return int(not all(reports))
    for report in reports:
        print(report if args.verbose or not report else f"ok   {report.title}: worst error {report.worst_error:.1e}")
    failed = sum(not report for report in reports)
    print(f"\n{len(reports) - failed} checks passed, {failed} failed")
    return int(failed > 0)


def exercise_flags(p):
    p.add_argument("method", metavar="METHOD", help="one of those with a backward of their own")
    p.add_argument("--out", metavar="FILE", help="the file to write; METHOD_exercise.py by default")


def run_exercise(args):
    """Write a method's file without its backward, for you to fill in."""
    from .tools.exercises import write_exercise

    path = write_exercise(args.method, args.out)
    print(f"Written: {path}. Write its backward, after the equations in its first lines, and see how far you are:")
    print(f"minilora check --file {path}")


COMMANDS = {
    "compare": (compare_flags, run_compare),
    "train": (train_flags, run_train),
    "sweep": (sweep_flags, run_sweep),
    "pretrain": (pretrain_flags, run_pretrain),
    "generate": (generate_flags, run_generate),
    "export": (export_flags, run_export),
    "import": (import_flags, run_import),
    "methods": (json_flag, run_methods),
    "ledger": (ledger_flags, run_ledger),
    "trace": (trace_flags, run_trace),
    "diff": (diff_flags, run_diff),
    "devices": (json_flag, run_devices),
    "check": (check_flags, run_check),
    "exercise": (exercise_flags, run_exercise),
}
