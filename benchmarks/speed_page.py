"""Puts the recorded figures into the pages that show them: ``python benchmarks/speed_page.py``.

The text between two marks there is made from the recorded JSON files, and a test keeps it so.
"""

import json
import re
from pathlib import Path

from versus import report

ROOT, MIB = Path(__file__).resolve().parents[1], 2**20


def load(name):
    return json.loads((ROOT / name).read_text(encoding="utf-8"))


def floor(seen):
    facts = "; ".join(f"{key} {value}" for key, value in seen["machine"].items())
    heads = ["size", "matrix products alone, ms:", "GF/s:", "a step, ms:", "step ÷ products:"]
    numbers = {"products_ms": ".1f", "gflops_per_second": ".0f", "step_ms": ".1f", "step_over_floor": ".2f"}
    rows = [[size, *(format(row[key], form) for key, form in numbers.items())] for size, row in seen["results"].items()]
    return f"{report.table(heads, rows)}\n\n{facts}."


TITLES = {"tiny": "The shipped model's shape, batch 8", "M": "Size M, batch 16"}  # of the tables of memory.py
ACTIVATIONS = ["", "kept, MiB:", "÷ LoRA:", "the allocator, MiB:", "one block, MiB:", "peak, MiB:", "step ÷ LoRA:"]


def activations(seen):
    """The tables of memory.py, with what they depend on."""
    parts = []
    for size, result in seen["sizes"].items():
        vocabulary, T, d, layers, heads, batch = result["shape"]
        shape = f"{layers} layers, d {d}, {heads} heads, T {T}, {vocabulary} characters: N = {batch * T:,} tokens"
        lora, lines = result["rows"]["LoRA"]["kept_bytes"], []
        for name, row in result["rows"].items():
            again, off = row["again_bytes"], row["difference"]
            lines.append([
                name,
                f"{row['kept_bytes'] / MIB:.1f}", f"{row['kept_bytes'] / lora:.2f}",
                f"{row['allocator_bytes'] / MIB:.1f}", f"{again / MIB:.1f}" if again else "–",
                f"{row['peak_bytes'] / MIB:.0f}", f"{row['step_ratio']:.2f}",
                "–" if off is None else f"{off['gradient']:.0e}" if off["gradient"] else "0",
            ])  # fmt: skip
        lines.append(["the imports alone", *"––––", f"{result['import_peak_bytes'] / MIB:.0f}", *"––"])
        parts += [f"**{TITLES[size]}** ({shape})", report.table([*ACTIVATIONS, "gradient off by:"], lines)]
    facts = seen["machine"]
    threads = "One thread" if facts["threads"] == 1 else f"{facts['threads']} threads"
    parts.append(
        f"{threads}. {facts['CPU']}, {facts['cores']} cores, Python {facts['Python']}, NumPy {facts['numpy']} with "
        f"{facts['blas']}, {facts['date']}; step times are medians of {seen['rounds']} rounds of turns."
    )
    return "\n\n".join(parts)


def operations(times):
    heads = ["at size M", "fast form, ms:", "plain form, ms:", "ratio:"]
    rows = [
        [group, f"{t['fast']:.2f}", f"{t['plain']:.2f}", f"{t['fast'] / t['plain']:.2f}"] for group, t in times.items()
    ]
    return report.table(heads, rows)


def span(values):
    return f"{min(values):.2f} to {max(values):.2f}"


def sentences(seen):
    """What README.md says of speed, in figures."""
    lora = {n: [row for row in seen["rows"] if (row["method"], row["threads"]) == ("lora", n)] for n in (1, 2)}
    one, two = (span([row["ratio_quartiles"][1] for row in rows]) for rows in lora.values())
    peak = [100 * row["peak_mb"]["minilora"] / row["peak_mb"]["torch"] for row in lora[1]]
    compiled = span([row["compiled_ratio_quartiles"][1] for row in lora[1]])
    return f"""\
A LoRA step takes {one} of the time of PyTorch + PEFT on one core of an Intel CPU, {two} on two.
One process has {min(peak):.0f} to {max(peak):.0f} % of the peak memory, and the first step ends \
{seen["startup"]["median"]["minilora"]:.2f} s after the start of `import minilora`.
Compared with PyTorch at its best (`torch.compile`, fused AdamW), a step takes {compiled} of the time. \
[All figures, and where minilora is slower](docs/speed.md)."""


def parts():
    """{file: {mark: text}} of all that stands between marks."""
    seen = load("docs/speed/versus_peft.json")
    page = report.tables(seen) | {
        "floor": floor(load("docs/speed/floor.json")),
        "operations": operations(load("benchmarks/operations.json")["milliseconds"]),
    }
    return {
        "docs/speed.md": page,
        "docs/memory.md": {"tables": activations(load("docs/memory.json"))},
        "README.md": {"speed": sentences(seen)},
    }


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
