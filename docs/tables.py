"""Make every table about methods from the method files and the recorded results: ``python docs/tables.py``.

A page marks the place: what stands between ``<!-- NAME -->`` and ``<!-- /NAME -->`` is written by ``BLOCKS[NAME]``,
with the words behind NAME as arguments. The script also draws the picture of each method whose file has changed.
"""

import inspect
import json
import re
import sys
from pathlib import Path

import pictures

from minilora import methods
from minilora.lab.compare import cells
from minilora.lab.task import learning_rate
from minilora.tools import catalogue, methodfile, peft_table
from minilora.tools.trial import Trial

DOCS = Path(__file__).parent
ROOT = DOCS.parent

BLOCK = re.compile(r"(<!-- (\w+)((?: [^<>]+?)?) -->)(.*?)(<!-- /\2 -->)", re.DOTALL)


def table(head: list[str], rows: list[list[str]], align: str = "") -> str:
    """A Markdown table on lines of its own; ``align`` has "r" for each column that is aligned to the right."""
    rules = ["---:" if kind == "r" else "---" for kind in align.ljust(len(head), "l")]
    return "\n" + "\n".join("| " + " | ".join(cells) + " |" for cells in [head, rules, *rows]) + "\n"


def code(names) -> str:
    """The names as code, in one cell."""
    return ", ".join(f"`{name}`" for name in names)


def docstring(name: str) -> str:
    return inspect.getdoc(sys.modules[methods.get(name).__module__])


def recorded(path: str):
    """A recorded result below docs/."""
    return json.loads((DOCS / path).read_text(encoding="utf-8"))


# ------------------------------------------------------------------------------------ what a method says about itself


def trial(name: str) -> Trial:
    """The method ``name`` on a layer (17, 31) with rank 7, so that a length tells which axis it is."""
    return Trial(methods.create(name, **methods.known(name, r=7, start_step=0)), d_in=31, d_out=17)


def arrays(name: str) -> list[pictures.Array]:
    """Each array of a layer, ``W`` (the base weight) first, with its shape in letters and its state.

    "trained": it gets a gradient; "moved": training changes it without one; "frozen": training never changes it.
    """
    start = trial(name)
    end, trained = start.after(3), start.layer.arrays.trainable()
    letters = {1: "1", 7: "r", 31: "d_in", 17: "d_out"}
    stated = methodfile.stated_shapes(start.method)

    def described(array, before, after, shared=False):
        state = "trained" if array in trained else "moved" if (before != after).any() else "frozen"
        known = all(n in letters for n in before.shape) or array not in stated
        axes = [letters.get(n, str(n)) for n in before.shape] if known else stated[array]
        widest = [f"max {axis}" if shared and axis.startswith("d_") else axis for axis in axes]
        return pictures.Array(array, tuple(widest), state, shared)

    own = sorted(start.p, key=lambda array: (array not in trained, array in start.layer.shared))
    found = [described(array, start.p[array], end.p[array], array in start.layer.shared) for array in own]
    base = described("", start.W, end.W)
    return [pictures.Array("W", base.shape, base.state), *found]


def forward(name: str) -> list[pictures.Array]:
    """What a forward pass has in hand: x, what it keeps for backward, and y."""
    kept = methodfile.kept(docstring(name))
    found = {"x": ("N", "d_in")} | kept | {"y": ("N", "d_out")}
    return [pictures.Array(array, shape, "kept" if array in kept else "computed") for array, shape in found.items()]


def in_peft(name: str, ours: str) -> str:
    """PEFT's name for an array or a hyper-parameter of the method ``name``; a dash if PEFT has none."""
    method = methods.get(name)
    array, option = method.peft_arrays.get(ours, [None])[0], method.peft_names.get(ours)
    return f"`{array or option}`" if method.peft and (array or option) else "–"


def page_of(name: str) -> Path:
    return DOCS / "methods" / f"{name}.md"


# ---------------------------------------------------------------------------------------------- the blocks of the pages


def methods_table(old: str, *, page: Path) -> str:
    """README.md: what each method trains and keeps. docs/methods.md: title and first paragraph of each page."""
    if page.name == "README.md":
        return f"\n{catalogue.markdown(catalogue.catalogue())}\n"
    known = re.findall(r"\(methods/(\w+)\.md\)", old)  # a new method's row comes last; to move it, move it on the page
    names = sorted(methods.names(), key=lambda name: known.index(name) if name in known else len(known))
    rows, tree = [], []
    for name in names:
        link, what = f"`{name}`", docstring(name).partition("\n")[0].partition("   ")[0]
        if page_of(name).exists():
            title, what, *_ = page_of(name).read_text(encoding="utf-8").removeprefix("# ").split("\n\n")
            link = f"[{title}](methods/{name}.md)"
            tree.append(f"methods/{name}")
        rows.append([link, " ".join(what.split()), f"{learning_rate(name):g}"])
    toctree = "\n".join(["```{toctree}", ":maxdepth: 1", ":hidden:", "", *tree, "```"])
    return table(["method", "what it is", "learning rate"], rows, "llr") + f"\n{toctree}\n"


def scaling_table(old: str, *, page: Path) -> str:
    """The factor in front of B A, as the method's file computes it."""
    by_formula = {}
    for name in methods.names():
        scaling = getattr(methods.get(name), "scaling", None)
        if isinstance(scaling, property):
            line = re.search(r"return (.*?)(?:  #|$)", inspect.getsource(scaling.fget), re.MULTILINE)[1]
            formula = re.sub(r"math\.sqrt\((\w+)\)", r"√\1", line.replace("self.", ""))
            value = methods.create(name, **methods.known(name, r=8, alpha=16.0)).scaling
            by_formula.setdefault((formula, f"{value:.3g}"), []).append(name)
    rows = [[code(names), f"`{formula}`", value] for (formula, value), names in by_formula.items()]
    return table(["methods", "factor", "at r = 8, alpha = 16"], rows, "llr")


def arrays_table(old: str, *, page: Path) -> str:
    """Every array of every method; methods with the same arrays share their rows."""
    alike = {}
    for name in methods.names():
        base, *own = arrays(name)
        rows = [("`W` (base)", f"`{base.letters}`", base.state, "–")]
        for array in own:
            state = f"{array.state}, shared" if array.shared else array.state
            rows.append((f"`{array.name}`", f"`{array.letters}`", state, in_peft(name, array.name)))
        alike.setdefault(tuple(rows), []).append(name)
    lines = [[code(names) if i == 0 else "", *row] for rows, names in alike.items() for i, row in enumerate(rows)]
    return table(["methods", "array", "shape", "state", "in PEFT"], lines)


def options_table(old: str, *, page: Path) -> str:
    """Every hyper-parameter with its default; methods that have it with the same default share a row."""
    alike = {}
    for name in methods.names():
        for option, (_, default) in methods.options(name).items():
            shown = f"{default:g}" if isinstance(default, float) else f"{default}"
            alike.setdefault((f"`{option}`", shown, in_peft(name, option)), []).append(name)
    rows = [[code(names), *row] for row, names in alike.items()]
    return table(["methods", "option", "default", "in PEFT"], rows)


def summands(old: str, *, page: Path) -> str:
    """The methods whose update is a low-rank product, so that Adapters.combine() can add them up."""
    trials = {name: trial(name) for name in methods.names()}
    thin = [n for n, t in trials.items() if not t.method.updates_base and t.method.factors(t.W, t.p) is not None]
    return code(thin)


def in_readme(block: str) -> str:
    """README.md's own list of this name, with links that lead there from docs/."""
    listed = next(found[4] for found in BLOCK.finditer((ROOT / "README.md").read_text("utf-8")) if found[2] == block)
    return listed.replace("](", "](../")


def reading_order(old: str, *, page: Path) -> str:
    """README.md's numbered list of files."""
    return in_readme("reading")


def notebooks_table(old: str, *, page: Path) -> str:
    """README.md's table of notebooks, without the column of badges."""
    lines = in_readme("notebooks").strip().splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")][1:] for line in lines]
    return table(["notebook", "you will be able to"], rows)


PEFT_SIDE = {  # what the last column's other side is, if it is not plainly the same method
    "full": "`full` is timed against PyTorch alone.",
    "lora_fa": "`lora_fa` is timed against PEFT's LoRA with `lora_A` frozen by hand.",
    "vera": "`vera` is timed at $r = 8$ on both sides; its other figures are at $r = 64$.",
    "dora": "`dora` is timed against PEFT's, whose norm is detached.",
}


def compared(old: str, *names: str, page: Path) -> str:
    """What was measured of these methods: compare.json, and the times beside PEFT's of versus_peft.json."""
    comparison = recorded("compare.json")
    records = {row["method"]: row for row in comparison["rows"]}
    timed = [row for row in recorded("speed/versus_peft.json")["rows"] if row["size"] == "M" and row["threads"] == 1]
    beside_peft = {row["method"]: f"{row['ratio_quartiles'][1]:.2f}" for row in timed}
    first = comparison["rows"][0]
    rows = [["before", "", f"{first['loss_b_before']:.3f}", f"{first['loss_a_before']:.3f}", "", "", ""]]
    for name in names:
        if name not in records:
            rows.append([f"`{name}`", *6 * ["–"]])
            continue
        trained, _, *measured, _ = cells(records[name])
        rows.append([f"`{name}`", trained, *measured, beside_peft.get(name, "–")])
    head = ["", "trained parameters", "loss on the Folio", "loss on modern text", "kept, MiB", "a step, ms"]
    head.append("time ÷&nbsp;PEFT's")
    words = f"""
Lower is better. {first["steps"]} steps on one seed, each method at its own learning rate, on the Folio,
Shakespeare in the spelling of 1623. The loss on the Folio shows what was learnt, that on modern text what
was forgotten ([settings and samples](../compare.md)). Last column: the time of a step divided by that of
PyTorch + PEFT, for a model of [size M](../speed.md) on one thread.
"""
    notes = [PEFT_SIDE[name] for name in names if name in PEFT_SIDE]
    notes += ["– means not measured."] if not set(names) <= set(beside_peft) else []
    return table(head, rows, "lrrrrrr") + words + "".join(f"{note}\n" for note in notes)


def picture_block(old: str, *, page: Path) -> str:
    """The link to the method's picture, with an alt text that says what the picture shows."""
    name, by_state = page.stem, {}
    for array in arrays(name) + forward(name):
        by_state.setdefault(pictures.WORDS[array.state], []).append(array.name)
    words = "; ".join(f"{', '.join(names)}: {state}" for state, names in by_state.items())
    return f"\n![The arrays of {name}. {words}]({name}.png)\n"


def swept(old: str, *names: str, page: Path) -> str:
    """The loss on the Folio by learning rate, mean over the seeds, at the rates that all of them share."""
    runs = [json.loads(line) for line in (DOCS / "sweep/learning_rates.jsonl").read_text("utf-8").splitlines()]
    losses = {}
    for run in runs:
        losses.setdefault((run["method"], run["lr"]), []).append(run["loss_b"])
    rates = sorted(set.intersection(*({lr for method, lr in losses if method == name} for name in names)))
    rows = [[f"`{name}`", *(f"{sum(of) / len(of):.3f}" for of in (losses[name, lr] for lr in rates))] for name in names]
    return table(["learning rate", *(f"{lr:g}" for lr in rates)], rows, "l" + "r" * len(rates))


def kept_and_peak(old: str, *, page: Path) -> str:
    """Bytes kept and at the peak, for the shipped model, of the rows that the page has: by memory.json."""
    rows = recorded("memory.json")["sizes"]["tiny"]["rows"]
    names = re.findall(r"^\| (\w.*?) \|", old, re.MULTILINE)
    kept, peak = ([rows[name][key] / 2**20 for name in names] for key in ("kept_bytes", "peak_bytes"))
    lines = [[name, f"{k:.1f}", f"{p:.0f}"] for name, k, p in zip(names, kept, peak, strict=True)]
    return table(["", "kept for backward, MiB", "peak, MiB"], lines, "lrr")


def members_table(old: str, *, page: Path) -> str:
    """The table of the contract's optional members as it is, with the methods that define each in the last column."""

    def row(found) -> str:
        names = [name for name in methods.names() if found[2] in vars(methods.get(name))]
        others = [name for name in methods.names() if name not in names]
        many = f"all but {code(others)}" if others else "every method"
        where = many if len(names) > len(others) else code(names) or "no shipped method"
        return f"{found[1]} {where} |"

    return re.sub(r"^(\| `(\w+)` \|.*\|) [^|]* \|$", row, old, flags=re.MULTILINE)


def in_peft_table(old: str, *, page: Path) -> str:
    """What each method is in PEFT's files, found by writing and reading one."""
    return f"\n{peft_table.table()}\n"


BLOCKS = {
    "methods": methods_table,
    "scaling": scaling_table,
    "arrays": arrays_table,
    "options": options_table,
    "summands": summands,
    "peft": in_peft_table,
    "members": members_table,
    "reading": reading_order,
    "notebooks": notebooks_table,
    "compared": compared,
    "picture": picture_block,
    "swept": swept,
    "recorded": kept_and_peak,
}
HAVE_BLOCKS = ["README.md", "docs/methods.md", "docs/conventions.md", "docs/adapters.md", "docs/start.md",
               "docs/learn.md", "docs/peft.md", "docs/contract.md", "docs/why/lora-memory.md"]  # fmt: skip


def pages() -> list[Path]:
    """The pages whose blocks are made here."""
    return [*(ROOT / page for page in HAVE_BLOCKS), *sorted((DOCS / "methods").glob("*.md"))]


def filled(page: Path) -> str:
    """The text of ``page`` with every block made anew. README.md's own lists are a source: they stay."""

    def make(found) -> str:
        opening, name, arguments, old, closing = found.groups()
        source = page.name == "README.md" and name in ("reading", "notebooks")
        if name not in BLOCKS or source:
            return found[0]
        return opening + BLOCKS[name](old, *arguments.split(), page=page) + closing

    return BLOCK.sub(make, page.read_text(encoding="utf-8"))


def picture_of(name: str) -> tuple[str, list, list]:
    """What the picture of the method ``name`` shows."""
    return name, arrays(name), forward(name)


def main():
    for page in pages():
        page.write_text(filled(page), encoding="utf-8")
    for name in methods.names():
        file, shown = page_of(name).with_suffix(".png"), picture_of(name)
        if pictures.described(file) != pictures.description(*shown):
            pictures.write(file, *shown)


if __name__ == "__main__":
    main()
