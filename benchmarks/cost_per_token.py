"""What a token costs in a LoRA step of minilora as the model widens and the context grows, beside the products alone.

Two rows of sizes around one: width d at T = 128, and T at d = 128; 4 layers, heads of 32, vocabulary 65, and as many
sequences as make 2048 tokens a step. In microseconds per token, since a step's time alone grows with its batch.
The products are those of floor.py; what is between the two lines is the cost of all else. Only the linears' products
grow with d², so the lines draw together as d grows; not so as T grows, since a softmax grows with T like its products.
"""

import json

from floor import measure  # before NumPy: sets its threads
from sizes import machine, new_file, parser, print_machine

# isort: split
from minilora import plots

TOKENS, LAYERS, HEAD, VOCABULARY = 2048, 4, 32, 65
WIDTHS, CONTEXTS = [64, 128, 256, 384, 512, 768], [64, 128, 256, 512, 1024]


def size(d, T):
    """A row as in SIZES."""
    return (VOCABULARY, T, d, LAYERS, d // HEAD, TOKENS // T)


def per_token(milliseconds):
    return 1e3 * milliseconds / TOKENS


def picture(points, threads):
    """Cost per token against d, and against T, log-log; step and products."""
    from matplotlib import rc_context

    with rc_context(plots.STYLE):
        figure = plots.new_figure(8, 4)
        panels = figure.subplots(1, 2, sharey=True)
        lines = {"step_ms": ("LoRA step", "#0072B2", "o"), "products_ms": ("its matrix products alone", "#D55E00", "s")}
        for axes, (name, values) in zip(panels, {"d": WIDTHS, "T": CONTEXTS}.items(), strict=True):
            rows = {v: points[v, 128] if name == "d" else points[128, v] for v in values}
            for key, (label, colour, marker) in lines.items():
                costs = [per_token(row[key]) for row in rows.values()]
                axes.plot(values, costs, color=colour, marker=marker, label=label)
            for value, row in rows.items():
                cost, text = per_token(row["step_ms"]), f"{row['step_over_floor']:.1f}×"
                axes.annotate(text, (value, cost), (-3, 6), textcoords="offset points", ha="right", fontsize=9.5)
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.set_xticks(values, values, fontsize=10)
            axes.minorticks_off()
            axes.set_xlim(values[0] / 1.6, values[-1] * 1.2)
            axes.margins(y=0.12)
        panels[0].set(xlabel="width d, at T = 128", ylabel="µs per token")
        panels[1].set(xlabel="context T, at d = 128")
        low, high = panels[0].get_ylim()
        ticks = [tick for power in range(5) for tick in (10**power, 2 * 10**power, 5 * 10**power) if low < tick < high]
        panels[0].set_yticks(ticks, ticks)
        panels[1].legend(loc="upper left")
        figure.suptitle(
            f"Cost per token of a LoRA step, 4 layers, 2048 tokens, {threads} thread{'s' if threads > 1 else ''}\n"
            "(at each point: step ÷ products)",
            fontsize=12,
        )
        return figure


def main():
    options = parser(__doc__, rounds=3)
    options.add_argument("--out", type=new_file, required=True, metavar="STEM", help="write STEM.png and STEM.json")
    args = options.parse_args()
    print_machine()
    print("|   d |    T | step, µs/token | products, µs/token | step ÷ products |")
    print("|----:|-----:|---------------:|-------------------:|----------------:|")
    points = {}
    for d, T in sorted({(d, 128) for d in WIDTHS} | {(128, T) for T in CONTEXTS}):
        row = points[d, T] = measure(size(d, T), args.rounds)
        step, products = per_token(row["step_ms"]), per_token(row["products_ms"])
        print(f"| {d:3} | {T:4} | {step:14.1f} | {products:18.1f} | {row['step_over_floor']:15.2f} |", flush=True)
    settings = {"tokens": TOKENS, "layers": LAYERS, "head_width": HEAD, "vocabulary": VOCABULARY, "rounds": args.rounds}
    results = [{"d": d, "T": T, **row} for (d, T), row in points.items()]
    report = {"machine": machine(), **settings, "results": results}
    args.out.with_name(args.out.name + ".json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    args.out.with_name(args.out.name + ".png").write_bytes(plots.png(picture(points, args.threads)))


if __name__ == "__main__":
    main()
