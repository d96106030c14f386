"""Puts the recorded figures into docs/speed.md and README.md, between their marks: ``python benchmarks/speed_page.py``.

What is printed there is what the JSON files in docs/speed/ say, and a test holds it so.
"""

import json
import re
import statistics
from pathlib import Path

from versus import report

ROOT = Path(__file__).resolve().parents[1]


def load(name):
    return json.loads((ROOT / name).read_text(encoding="utf-8"))


def facts(machine):
    return "; ".join(f"{key} {value}" for key, value in machine.items()) + "."


def versus(seen):
    """The tables of versus_peft.py, by mark."""
    rows = seen["rows"]
    imports, start = seen["imports_mb"], seen["startup"]["median"]
    under = f"Of the peak, the imports alone are {imports['minilora']:.0f} MB and {imports['torch']:.0f} MB."
    startup = f"From before the import to the end of the first training step (S): minilora {start['minilora']:.2f} s, "
    return {
        "sizes": report.sizes(dict.fromkeys(row["size"] for row in rows)),
        "steps": f"{report.steps(rows)}\n\n{facts(seen['machine'])} Command: `{seen['command']}`.",
        "others": report.others([row for row in rows if row["method"] == "lora"]),
        "forward": report.forward([row for row in rows if "forward_ms" in row]),
        "generation": report.generation([row for row in rows if "forward_ms" in row]),
        "memory": f"{report.memory(rows)}\n\n{under}",
        "startup": f"{startup}PyTorch + PEFT {start['torch']:.2f} s.",
    }


def floor(seen):
    heads = ["size", "matrix products alone, ms:", "GF/s:", "a step, ms:", "step ÷ products:"]
    numbers = {"products_ms": ".1f", "gflops_per_second": ".0f", "step_ms": ".1f", "step_over_floor": ".2f"}
    rows = [[size, *(format(row[key], form) for key, form in numbers.items())] for size, row in seen["results"].items()]
    return f"{report.table(heads, rows)}\n\n{facts(seen['machine'])}"


def profile(seen):
    sizes = list(seen["ms"])
    heads = ["part of a step"] + [f"{size}, {unit}:" for size in sizes for unit in ("ms", "%")]
    total = {size: sum(seen["ms"][size].values()) for size in sizes}
    cells = lambda part: [
        text
        for size in sizes
        for text in (f"{seen['ms'][size][part]:.1f}", f"{100 * seen['ms'][size][part] / total[size]:.0f}")
    ]
    rows = [[part, *cells(part)] for part in seen["ms"][sizes[0]]]
    products = {size: sum(ms for part, ms in seen["ms"][size].items() if part.endswith("products")) for size in sizes}
    bold = [f"**{x}**" for s, ms in products.items() for x in (f"{ms:.1f}", f"{100 * ms / total[s]:.0f}")]
    return report.table(heads, [*rows, ["**the three products**", *bold]])


def operations(seen):
    times = {}
    for row in seen["benchmarks"]:
        times.setdefault(row["group"], {})[row["params"]["side"]] = 1e3 * row["stats"]["min"]
    heads = ["at size M", "minilora, ms:", "textbook, ms:", "ratio:"]
    rows = [
        [group, f"{t['minilora']:.2f}", f"{t['textbook']:.2f}", f"{t['minilora'] / t['textbook']:.2f}"]
        for group, t in times.items()
    ]
    return report.table(heads, rows)


def range_of(rows, threads):
    """ "0.84 to 1.00" of the ratios of LoRA on so many threads."""
    ratios = [row["ratio_quartiles"][1] for row in rows if (row["method"], row["threads"]) == ("lora", threads)]
    return f"{min(ratios):.2f} to {max(ratios):.2f}"


def sentences(seen):
    """What README.md says of speed, in figures."""
    rows = seen["rows"]
    at = lambda threads: range_of(rows, threads)
    lora = [row for row in rows if (row["method"], row["threads"]) == ("lora", 1)]
    peak = [row["peak_mb"]["minilora"] / row["peak_mb"]["torch"] for row in lora]
    compiled = [row["compiled_ratio_quartiles"][1] for row in lora if "compiled_ratio_quartiles" in row]
    start = statistics.median(seen["startup"]["seconds"]["minilora"])
    text = f"A LoRA step takes {at(1)} of the time of PyTorch + PEFT on one core of an Intel CPU, {at(2)} on two.\n"
    text += f"One process takes {100 * min(peak):.0f} to {100 * max(peak):.0f} % of the peak memory; "
    text += "from `import` to the end of "
    text += f"the first step it is {start:.2f} s.\n"
    if compiled:
        text += f"Beside PyTorch at its best (`torch.compile`, fused AdamW) it is {min(compiled):.2f} to "
        text += f"{max(compiled):.2f}. "
    return text + "[All figures, and where they fall short](docs/speed.md)."


def parts():
    """{file: {mark: text}} of all that stands between marks."""
    seen = load("docs/speed/versus_peft.json")
    page = versus(seen) | {
        "floor": floor(load("docs/speed/floor.json")),
        "profile": profile(load("docs/speed/profile.json")),
        "operations": operations(load("benchmarks/operations.json")),
    }
    return {"docs/speed.md": page, "README.md": {"speed": sentences(seen)}}


def filled(text, marks):
    """``text`` with what stands between <!-- NAME --> and <!-- /NAME --> replaced. Raises KeyError for a lost mark."""
    for name, content in marks.items():
        between = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if not between.search(text):
            raise KeyError(f"there is no <!-- {name} --> … <!-- /{name} -->")
        text = between.sub(lambda found, content=content: f"{found[1]}{content}\n{found[2]}", text)
    return text


if __name__ == "__main__":
    for name, marks in parts().items():
        path = ROOT / name
        path.write_text(filled(path.read_text(encoding="utf-8"), marks), encoding="utf-8")
        print(f"{name}: {', '.join(marks)}")
