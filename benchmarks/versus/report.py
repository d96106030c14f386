"""The tables, in Markdown, of what was measured."""

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
    """The whole report."""
    rows = seen["rows"]
    facts = "; ".join(f"{key} {value}" for key, value in seen["machine"].items())
    parts = ["# minilora beside PyTorch + PEFT", f"{facts}.", f"```sh\npython benchmarks/{seen['command']}\n```"]
    parts += ["## One training step", steps(rows)]
    notes = [f"- {r['size']}, {r['method']}, {r['threads']} thread(s): {note}" for r in rows for note in r["notes"]]
    parts += ["\n".join(notes)] if notes else []
    lora = [row for row in rows if "forward_ms" in row]
    if lora:
        parts += ["## Forward alone, and generation (LoRA, not merged)", forward(lora)]
    parts += ["## Memory", memory(rows)]
    if None not in seen["imports_mb"].values():
        ours, theirs = (f"{seen['imports_mb'][side]:.0f} MB" for side in ("minilora", "torch"))
        parts += [f"Of the peak, the imports alone: minilora {ours}, PyTorch + PEFT {theirs}."]
    if "startup" in seen:
        s = seen["startup"]["median"]
        text = f"minilora {s['minilora']:.2f} s, PyTorch + PEFT {s['torch']:.2f} s: "
        text += f"{s['torch'] / s['minilora']:.0f} times as long. From before the import to the end of the first"
        parts += ["## Start-up", f"{text} training step; size S, LoRA, 1 thread, a fresh process each time."]
    parts += ["## The same work", same(rows)]
    return "\n\n".join(parts)


def steps(rows):
    compiled = any("torch_compiled" in row["ms"] for row in rows)
    heads = ["size", "method", "threads:", "minilora, ms:", "with", "PyTorch + PEFT, ms:", "ratio:", "quartiles"]
    heads += ["torch.compile, ms:", "ratio:", "first step, s:"] if compiled else []
    out = []
    for row in rows:
        ms, best = row["ms"], row["best"]
        ways = [label for label in ms if label == "minilora" or "workers" in label]
        how = "1 thread" if row["threads"] == 1 else name(best)
        how += "".join(f" ({name(label)}: {ms[label]:.1f})" for label in ways if label != best)
        cells = [row["size"], f"`{row['method']}`", str(row["threads"]), f"{ms[best]:.1f}", how, f"{ms['torch']:.1f}"]
        cells += [f"**{row['ratio_quartiles'][1]:.2f}**", quartiles(row["ratio_quartiles"])]
        if "torch_compiled" in ms:
            again = row["compiled_ratio_quartiles"][1]
            cells += [f"{ms['torch_compiled']:.1f}", f"{again:.2f}", f"{row['compile_seconds']:.1f}"]
        elif compiled:
            cells += ["–", "–", "–"]
        out.append(cells)
    return table(heads, out)


def forward(rows):
    heads = ["size", "threads:", "minilora, ms:", "PyTorch + PEFT, ms:", "ratio:", "quartiles"]
    heads += ["minilora, tokens / s:", "PyTorch + PEFT, tokens / s:", "tokens alike"]
    out = []
    for row in rows:
        ms, rate, said = row["forward_ms"], row["tokens_per_second"], row["generated"]
        cells = [row["size"], str(row["threads"]), f"{ms['minilora']:.1f}", f"{ms['torch']:.1f}"]
        cells += [f"{row['forward_ratio_quartiles'][1]:.2f}", quartiles(row["forward_ratio_quartiles"])]
        cells += [
            f"{rate['minilora']:.0f}",
            f"{rate['torch']:.0f}",
            f"{said['alike_from_the_start']} of {said['tokens']}",
        ]
        out.append(cells)
    return table(heads, out)


def memory(rows):
    heads = ["size", "method", "threads:", "minilora, peak MB:", "4 micro-batches:", "PyTorch + PEFT, peak MB:"]
    heads += ["step with 4 micro-batches, ms:", "whole, ms:", "minilora keeps, MiB:", "PyTorch + PEFT keeps, MiB:"]
    out = []
    for row in rows:
        peak, kept, micro = row["peak_mb"], row["kept_bytes"], "minilora_micro_batches"
        shown = lambda values, key, form: "–" if values.get(key) is None else format(values[key], form)
        cells = [row["size"], f"`{row['method']}`", str(row["threads"]), shown(peak, "minilora", ",.0f")]
        cells += [shown(peak, micro, ",.0f"), shown(peak, "torch", ",.0f"), shown(row["ms"], micro, ".1f")]
        cells += [f"{row['ms']['minilora']:.1f}", *(f"{kept[side] / 2**20:.1f}" for side in ("minilora", "torch"))]
        out.append(cells)
    return table(heads, out)


def same(rows):
    heads = ["size", "method", "threads:", "numbers trained:", "loss of step 1:", "of step 5:", "apart by at most:"]
    heads += ["PyTorch's AdamW"]
    out = []
    for row in rows:
        first, *_, last = row["losses"]["torch"]
        cells = [row["size"], f"`{row['method']}`", str(row["threads"]), f"{row['trained']:,}", f"{first:.4f}"]
        apart = f"{row['loss_distance']:.0e}" + (" (step 1 alone)" if row["method"] == "dora" else "")
        out.append([*cells, f"{last:.4f}", apart, row["torch_adamw"]])
    return table(heads, out)
