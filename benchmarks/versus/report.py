"""The tables, in Markdown, of what was measured."""

from shapes import SIZES

NAMES = {
    "minilora": "BLAS threads",
    "minilora_micro_batches": "4 micro-batches",
    "torch": "PyTorch + PEFT",
    "torch_compiled": "torch.compile",
}


def name(label):
    return NAMES.get(label) or label.removeprefix("minilora_").replace("_", " ")


def quartiles(values):
    q1, _, q3 = values
    return f"{q1:.2f} … {q3:.2f}"


def line(row):
    """One row as a line of text, printed while the run goes on."""
    ms, own = row["ms"], row["best"]
    times = ", ".join(f"{name(label)} {value:.1f} ms" for label, value in ms.items())
    text = f"{row['size']}, {row['method']}, {row['threads']} thread(s): ratio {row['ratio_quartiles'][1]:.2f}"
    return f"{text} ({quartiles(row['ratio_quartiles'])}), best with {name(own)}: {times}"


def table(heads, rows):
    """A Markdown table; all columns but the texts, which have no ``:`` behind their head, are set to the right."""
    lines = [[head.removesuffix(":") for head in heads], ["---:" if head.endswith(":") else "---" for head in heads]]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (*lines, *rows))


def tables(seen):
    """{name: Markdown} of all that was measured, in the order of docs/speed.md."""
    rows = seen["rows"]
    lora = [row for row in rows if "forward_ms" in row]
    facts = "; ".join(f"{key} {value}" for key, value in seen["machine"].items())
    found = {
        "sizes": sizes(dict.fromkeys(row["size"] for row in rows)),
        "steps": f"{steps(rows)}\n\n{facts}. Command: `{seen['command']}`.",
    }
    if lora:
        found |= {"others": others(lora), "forward": forward(lora), "generation": generation(lora)}
    found["memory"] = memory(rows)
    if None not in seen["imports_mb"].values():
        ours, theirs = seen["imports_mb"]["minilora"], seen["imports_mb"]["torch"]
        found["memory"] += f"\n\nOf the peak, the imports alone are {ours:.0f} MB and {theirs:.0f} MB."
    if "startup" in seen:
        start = seen["startup"]["median"]
        text = "From before the import to the end of the first training step (S): minilora "
        found["startup"] = f"{text}{start['minilora']:.2f} s, PyTorch + PEFT {start['torch']:.2f} s."
    return found


def sizes(names):
    """What the names of sizes mean."""
    heads = ["size", "layers:", "width d:", "heads:", "context T:", "sequences:", "tokens a step:", "vocabulary:"]
    out = []
    for size in names:
        vocabulary, T, d, layers, n_heads, batch = SIZES[size]
        numbers = (layers, d, n_heads, T, batch, batch * T, vocabulary)
        out.append([size, *(f"{number:,}" for number in numbers)])
    return table(heads, out)


def one_or_two(row):
    """The threads of minilora's time in a row: on two it is that of workers, or of BLAS, whichever was faster."""
    if row["threads"] == 1:
        return "1"
    return name(row["best"]) if "workers" in row["best"] else f"{row['threads']}, of BLAS"


def steps(rows):
    heads = ["size", "method", "threads", "minilora, ms:", "PyTorch + PEFT, ms:", "ratio:", "quartiles"]
    out = []
    for row in rows:
        ms = row["ms"]
        cells = [row["size"], f"`{row['method']}`", one_or_two(row), f"{ms[row['best']]:.1f}", f"{ms['torch']:.1f}"]
        out.append([*cells, f"**{row['ratio_quartiles'][1]:.2f}**", quartiles(row["ratio_quartiles"])])
    return table(heads, out)


def others(rows):
    """LoRA's step in other ways: minilora's with BLAS threads and in micro-batches, PyTorch's compiled."""
    heads = ["size", "threads:", "minilora, ms:", "with BLAS threads:", "in 4 micro-batches:"]
    heads += ["torch.compile, ms:", "minilora ÷ torch.compile:", "its first step, s:"]
    out = []
    for row in rows:
        ms = row["ms"]
        blas = ms if "workers" in row["best"] else {}
        cells = [row["size"], str(row["threads"]), f"{ms[row['best']]:.1f}", shown(blas, "minilora", ".1f")]
        cells += [shown(ms, "minilora_micro_batches", ".1f"), shown(ms, "torch_compiled", ".1f")]
        again = row.get("compiled_ratio_quartiles")
        out.append([*cells, f"{again[1]:.2f}" if again else "–", shown(row, "compile_seconds", ".1f")])
    return table(heads, out)


def shown(values, key, form):
    """values[key], or a dash where there is none."""
    return "–" if values.get(key) is None else format(values[key], form)


def forward(rows):
    heads = ["size", "threads:", "minilora, ms:", "PyTorch + PEFT, ms:", "ratio:", "quartiles"]
    out = []
    for row in rows:
        ms, ratio = row["forward_ms"], row["forward_ratio_quartiles"]
        cells = [row["size"], str(row["threads"]), f"{ms['minilora']:.1f}", f"{ms['torch']:.1f}"]
        out.append([*cells, f"{ratio[1]:.2f}", quartiles(ratio)])
    return table(heads, out)


def generation(rows):
    heads = ["size", "threads:", "minilora, tokens / s:", "PyTorch + PEFT, tokens / s:", "tokens alike"]
    out = []
    for row in rows:
        rate, said = row["tokens_per_second"], row["generated"]
        cells = [row["size"], str(row["threads"]), f"{rate['minilora']:.0f}", f"{rate['torch']:.0f}"]
        out.append([*cells, f"{said['alike_from_the_start']} of {said['tokens']}"])
    return table(heads, out)


def memory(rows):
    heads = ["size", "method", "threads:", "minilora, peak MB:", "in 4 micro-batches:", "PyTorch + PEFT, peak MB:"]
    heads += ["minilora keeps, MiB:", "PyTorch + PEFT keeps, MiB:"]
    out = []
    for row in rows:
        peak, kept = row["peak_mb"], row["kept_bytes"]
        cells = [row["size"], f"`{row['method']}`", str(row["threads"])]
        cells += [shown(peak, side, ",.0f") for side in ("minilora", "minilora_micro_batches", "torch")]
        out.append([*cells, *(f"{kept[side] / 2**20:.1f}" for side in ("minilora", "torch"))])
    return table(heads, out)
