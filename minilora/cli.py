"""The command line, thin: ``minilora compare``, ``train``, ``methods``, ``check`` and what ``--help`` lists beside.

It parses, calls, prints, and turns an error that the user can mend into one line and exit code 2.
"""

import argparse
import inspect
import json
import sys

from . import methods
from .errors import InputError, Interrupted, TrainingStopped


def main(argv=None) -> int:
    """Run one command; returns the exit code: 0, 1 for a failed check or a stopped run, 2 for unusable input."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        args = build_parser(argv).parse_args(argv)
        return args.run(args) or 0
    except InputError as error:
        print(f"minilora: error: {error}", file=sys.stderr)
        return 2
    except TrainingStopped as stop:
        print(f"minilora: {stop}", file=sys.stderr)
        return 1
    except Interrupted as stop:
        print(f"minilora: {stop}", file=sys.stderr)
        return 128 + stop.signum  # 130 for Ctrl-C, as shells count
    except KeyboardInterrupt:
        print("\nminilora: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
        sys.stderr.close()
        return 0


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows a default where there is one; an option without says in its own words what happens."""

    def _get_help_string(self, action):
        nothing = action.default is False or action.default in (None, [])
        return action.help if nothing else super()._get_help_string(action)


def build_parser(argv) -> argparse.ArgumentParser:
    """The parser; a method's own fields become flags of ``train`` once its name is on the command line."""
    parser = argparse.ArgumentParser(
        prog="minilora", description=inspect.getdoc(sys.modules["minilora"]).split("\n")[0]
    )
    parser.add_argument("--version", action="version", version=f"minilora {sys.modules['minilora'].__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(name, run, help):
        sub = commands.add_parser(name, help=help, description=help, allow_abbrev=False,
                                  formatter_class=Help)  # fmt: skip
        sub.set_defaults(run=run)
        return sub

    p = command("compare", run_compare, "Fine-tune on real text with every method; write a table and a figure.")
    p.add_argument("--methods", nargs="+", metavar="NAME", help="methods to compare; all by default")
    p.add_argument("--steps", type=int, default=120, help="training steps for each method")
    p.add_argument("--r", type=int, help="rank of all methods, instead of each method's own default")
    p.add_argument("--alpha", type=float, help="alpha of all methods, instead of each method's own default")
    p.add_argument("--lr", type=float, help="one learning rate for all, instead of each method's recorded one")
    p.add_argument("--batch", type=int, default=8, help="sequences per step")
    p.add_argument("--out", default="compare", metavar="DIR", help="folder for compare.json, .md and .png")
    worker_flag(p)
    common(p)

    p = command("train", run_train, "Fine-tune with one method, on the Folio or on your own text; save the adapter.")
    p.add_argument("method", metavar="METHOD", nargs="?", help="one of: " + ", ".join(methods.names()))
    p.add_argument("--data", metavar="FILE", help="your own text, UTF-8; its last tenth is held out")
    p.add_argument("--replace-unknown", metavar="CHAR", help="put CHAR for characters that the tokenizer lacks")
    p.add_argument("--target-modules", default="all-linear", metavar="NAMES",
                   help='layers to adapt: "all-linear", or names such as q,v')  # fmt: skip
    p.add_argument("--steps", type=int, default=150, help="training steps")
    p.add_argument("--lr", type=float, help="peak learning rate; the method's recorded one by default")
    p.add_argument("--batch", type=int, default=8, help="sequences per step")
    p.add_argument("--warmup", type=int, default=20, help="steps of linear warm-up, before the cosine")
    p.add_argument("--weight-decay", type=float, default=0.0, help="decoupled, on matrices")
    p.add_argument("--clip", type=float, default=1.0, help="largest norm of the gradient")
    p.add_argument("--out", default="runs/train", metavar="DIR",
                   help="folder for adapter.safetensors, history.json and checkpoint.safetensors")  # fmt: skip
    p.add_argument("--checkpoint-every", type=int, default=25, metavar="N", help="steps between two checkpoints")
    p.add_argument("--overwrite", action="store_true", help="replace an unfinished run in the folder")
    p.add_argument("--resume", metavar="DIR", help="go on with the run in this folder, with its own settings")
    p.add_argument("--micro-batches", type=int, default=1, metavar="K",
                   help="take each batch in K parts, one after another: the same step in less memory")  # fmt: skip
    recompute_flag(p)
    worker_flag(p)
    common(p)
    method_flags(p, argv)
    if any(word.split("=")[0] == "--resume" for word in argv):  # then only what is given counts
        for action in p._actions:
            action.default = argparse.SUPPRESS

    from .files import peft
    from .lab import sweep
    from .lab.task import PROMPT

    p = command(
        "sweep", sweep.run_sweep, "Method × rank × alpha × learning rate × seed, on processes or a Dask cluster."
    )
    sweep.add_arguments(p)

    p = command("pretrain", run_pretrain, "Make the base model again: a tiny GPT trained on modern Shakespeare.")
    p.add_argument("--steps", type=int, help="training steps; the recipe's by default")
    p.add_argument("--out", default="pretrained.safetensors", metavar="FILE", help="the model file to write")
    p.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="where to compute")
    worker_flag(p, "1: dropout, and so the model, depends on it")

    p = command("generate", run_generate, "Write text with the base model, or with an adapter that train saved.")
    p.add_argument("--adapter", metavar="DIR", help="folder of a train run, or of PEFT")
    p.add_argument("--prompt", default=PROMPT, help="text to go on from")
    p.add_argument("--tokens", type=int, default=400, help="characters to write")
    p.add_argument("--temperature", type=float, default=0.7, help="0 is greedy")
    p.add_argument("--top-k", type=int, metavar="K", help="draw among the K likeliest characters only")
    common(p)

    p = command("export", run_export, "Write a run's adapter for PEFT, or its merged model for transformers.")
    p.add_argument("adapter", metavar="RUN", help="folder of a train run")
    p.add_argument("folder", metavar="DIR", help="folder to write")
    p.add_argument("--form", default="adapter", choices=peft.FORMS,
                   help="the method's own kind, LoRA in any case, or the whole model, merged")  # fmt: skip
    p.add_argument("--names", default="gpt2", choices=peft.NAMES, help="of modules, as in transformers or as here")
    p.add_argument("--with-base", action="store_true", help="write the base model too, for transformers: DIR/base")
    base_flag(p)

    p = command("import", run_import, "Read an adapter that PEFT wrote; save it as train does.")
    p.add_argument("adapter", metavar="DIR", help="folder with adapter_config.json and adapter_model.safetensors")
    p.add_argument("--out", required=True, metavar="RUN", help="folder for adapter.safetensors")
    base_flag(p)

    p = command("methods", run_methods, "List the methods: what each trains, keeps and costs.")
    p.add_argument("--json", action="store_true", help="print JSON")

    p = command("ledger", run_ledger, "Who keeps which bytes for backward, beside what the allocator says.")
    p.add_argument("methods", nargs="+", metavar="METHOD", help="methods to audit, on the shipped model")
    p.add_argument("--batch", type=int, default=8, help="sequences of the full context")
    p.add_argument("--json", action="store_true", help="print JSON")
    recompute_flag(p)

    p = command("trace", run_trace, "One training step of the shipped model, operation by operation.")
    p.add_argument("method", metavar="METHOD", help="the method that adapts it")
    p.add_argument("--batch", type=int, default=1, help="sequences of the full context")

    p = command("diff", run_diff, "What one method changes in another: equations and lines of code, nothing else.")
    p.add_argument("first", metavar="METHOD")
    p.add_argument("second", metavar="METHOD")

    p = command("devices", run_devices, "What can compute here: the CPU, and each GPU or why there is none.")
    p.add_argument("--json", action="store_true", help="print JSON")

    p = command("check", run_check, "Check hand-written gradients against finite differences and the complex step.")
    p.add_argument("methods", nargs="*", metavar="METHOD", help="methods to check; all and the operations by default")
    p.add_argument("--file", metavar="FILE", help="a method file to grade line by line: an exercise, or your own")
    p.add_argument("--json", action="store_true", help="print JSON")
    p.add_argument("--verbose", "-v", action="store_true", help="show every array of every check, not only failures")

    p = command("exercise", run_exercise, "Write a method's file without its backward, for you to fill in.")
    p.add_argument("method", metavar="METHOD", help="one of those with a backward of their own")
    p.add_argument("--out", metavar="FILE", help="the file to write; METHOD_exercise.py by default")
    return parser


def base_flag(p):
    help = "a model file from pretrain, or a folder of transformers' GPT-2; the shipped one by default"
    p.add_argument("--base", metavar="FILE", help=help)


def common(p):
    base_flag(p)
    p.add_argument("--seed", type=int, default=0, help="of every random draw")
    p.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="where to compute")


def worker_flag(p, usual="as many as there are cores, at most 4; 1 where there is no fork"):
    help = f"processes that share each batch out, one core each; by default {usual}"
    p.add_argument("--workers", type=int, default=argparse.SUPPRESS, metavar="N", help=help)


def recompute_flag(p):
    help = "activation checkpointing: save each block's input alone, and compute the rest again in backward"
    p.add_argument("--recompute", action="store_true", help=help)


def workers(args):
    from .training.workers import usual_workers

    return args.workers if "workers" in args else usual_workers(args.device)


def method_flags(p, argv):
    """Add a flag for each field of the method that the command line names, such as --r and --alpha."""
    named = [word for word in argv if word in methods.names()]
    group = p.add_argument_group("the method's own options")
    for name, (kind, default) in (methods.options(named[0]) if named else {}).items():
        group.add_argument(f"--{name.replace('_', '-')}", type=kind, default=default, help="see minilora methods")


def run_compare(args):
    from .lab.compare import compare

    names = args.methods and [name for word in args.methods for name in word.split(",") if name]
    compare(names, args.steps, args.seed, args.device, args.r, args.alpha, args.out, args.lr, args.batch, args.base,
            workers=workers(args))  # fmt: skip


def run_train(args):
    from .lab.finetune import finetune, resume

    if "resume" in args and args.resume is not None:
        given = sorted(set(vars(args)) - {"run", "resume", "workers", "device"})
        if given:
            raise InputError(
                f"--resume goes on with the run's own settings; leave out {', '.join(given)}, "
                "or begin another run with another --out"
            )
        resume(args.resume, vars(args).get("workers"), vars(args).get("device"))
        return
    if args.method is None:
        raise InputError(f"name a method, one of {', '.join(methods.names())}; or --resume DIR")
    methods.get(args.method)
    options = {name: getattr(args, name) for name in methods.options(args.method)}
    targets = args.target_modules if args.target_modules == "all-linear" else args.target_modules.split(",")
    finetune(
        methods.create(args.method, **options), targets, data=args.data, replace=args.replace_unknown, steps=args.steps,
        lr=args.lr, batch=args.batch, warmup=args.warmup, weight_decay=args.weight_decay, clip=args.clip, out=args.out,
        base=args.base, seed=args.seed, device=args.device, workers=workers(args), micro_batches=args.micro_batches,
        recompute=args.recompute, every=args.checkpoint_every, overwrite=args.overwrite,
    )  # fmt: skip


def run_pretrain(args):
    from dataclasses import replace
    from pathlib import Path

    from .files.base import save_model
    from .files.saving import writable_folder
    from .lab.pretrain import Recipe, pretrain

    recipe = Recipe() if args.steps is None else replace(Recipe(), steps=args.steps)
    writable_folder(Path(args.out).parent)
    model, history = pretrain(recipe, args.device, workers=vars(args).get("workers", 1))
    save_model(args.out, model.to("cpu"))
    print(f"Written: {args.out}, after {sum(history.seconds):.0f} s of training")


def run_generate(args):
    import numpy as np

    from .data import CharTokenizer
    from .files.base import load_base

    tokenizer = CharTokenizer()
    ids = tokenizer.encode(args.prompt)[None]
    model = load_base(args.base, tokenizer.vocab_size)
    if args.adapter is not None:
        load_folder(args.adapter, model)
    rng = np.random.default_rng(args.seed)
    text = model.to(args.device).generate(ids, args.tokens, args.temperature, args.top_k, rng)[0]
    print(args.prompt + tokenizer.decode(text))


def load_folder(folder, model):
    """The adapter of a train run's folder, or of PEFT's."""
    from pathlib import Path

    from .files.checkpoint import load_adapter
    from .files.peft import CONFIG, load_peft
    from .lab.finetune import ADAPTER

    own, theirs = Path(folder) / ADAPTER, Path(folder) / CONFIG
    if theirs.exists() and not own.exists():
        load_peft(folder, model)
    else:
        load_adapter(own, model)


def run_export(args):
    from .files.base import load_base
    from .files.gpt2 import save_gpt2
    from .files.peft import save_peft
    from .surgery import unload

    model, base = load_base(args.base), f"{args.folder}/base" if args.with_base else None
    load_folder(args.adapter, model)
    config = save_peft(args.folder, model, args.form, args.names, base)
    if args.with_base:
        save_gpt2(base, unload(model))
    base = base or "BASE"
    if args.form == "merged":
        print(f"Written: {args.folder}, a GPT-2 for transformers without any adapter. To load it:")
        print(f'  transformers.GPT2LMHeadModel.from_pretrained("{args.folder}")')
        return
    flags = [name for name in ("use_rslora", "use_dora") if config.get(name)]
    print(f"Written: {args.folder}, {' with '.join([config['peft_type'], *flags])}, r = {config['r']}. To load it:")
    if args.names == "gpt2":
        print(f'  model = transformers.GPT2LMHeadModel.from_pretrained("{base}")')
    else:
        print("  model = a torch model with modules named as here, and the base model's weights")
    print(f'  model = peft.PeftModel.from_pretrained(model, "{args.folder}")')
    if args.names == "gpt2" and not args.with_base:
        print("BASE is the base model as transformers has it; --with-base writes it too.")


def run_import(args):
    from .files.base import fingerprint, load_base
    from .files.checkpoint import save_adapter
    from .files.peft import load_peft
    from .files.saving import writable_folder
    from .lab.finetune import ADAPTER
    from .surgery import adapted_layers

    model = load_base(args.base)
    mark = fingerprint(model)
    layers = adapted_layers(load_peft(args.adapter, model))
    path = writable_folder(args.out) / ADAPTER
    save_adapter(path, model, mark)
    print(f"Written: {path}, {next(iter(layers.values())).method.name} in {len(layers)} layers")


def run_methods(args):
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


def run_ledger(args):
    from dataclasses import asdict

    from .tools.audit import audit, show

    audits = {name: audit(*adapted_step(name, args.batch, args.recompute)) for name in args.methods}
    if args.json:
        plain = lambda a: {**a, "entries": [asdict(e) for e in a["entries"] if e.nbytes]}
        print(json.dumps({name: plain(a) for name, a in audits.items()}, indent=1))
    else:
        print("\n\n".join(show(name, a) for name, a in audits.items()))


def run_trace(args):
    from .tools.trace import show, trace

    print(show(trace(*adapted_step(args.method, args.batch))))


def run_diff(args):
    from .tools.diff import difference

    print(difference(args.first, args.second))


def run_devices(args):
    from .tools.devices import devices, show

    found = devices()
    print(json.dumps(found, indent=1) if args.json else show(found))


def run_check(args):
    from .tools.gradcheck import check_methods, check_operations

    if args.file is not None:
        return run_grade(args)
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


def run_grade(args):
    from .tools.exercises import grade

    if args.methods:
        raise InputError("check: name methods, or one file with --file")
    grades = grade(args.file)
    print(json.dumps(grades.dict(), indent=1) if args.json else grades)
    return int(not grades)


def run_exercise(args):
    from .tools.exercises import write_exercise

    path = write_exercise(args.method, args.out)
    print(f"Written: {path}. Write its backward, after the equations in its first lines, and see how far you are:")
    print(f"minilora check --file {path}")
