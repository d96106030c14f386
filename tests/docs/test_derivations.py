"""docs/methods, docs/why and docs/glossary.md: every tag derived, every quoted line the file's own, all code run."""

import ast
import importlib
import json
import re

import numpy as np
import pages
import pytest
import source
from PIL import Image

from minilora import methods
from minilora.engine import Saved
from minilora.tools.trial import Trial

METHODS = methods.names()
WHY = sorted(path.name for path in (pages.DOCS / "why").glob("*.md"))
ALL = ["glossary.md", *(f"methods/{name}.md" for name in METHODS), *(f"why/{name}" for name in WHY)]
PARTS = [
    "The problem",
    "The idea",
    "The picture",
    "Equations",
    "Derivation",
    "What it keeps, and why",
    "How it compares",
    "What is exactly true",
    "In the paper and in PEFT",
    "Traps",
]
ON_THE_HOST = {"why/lora-memory.md"}  # counts bytes of the plain attention, which on a GPU are half
every_method = pytest.mark.parametrize("name", METHODS)
every_page = pytest.mark.parametrize("name", ALL)


def page_of(name: str) -> str:
    return pages.read(f"methods/{name}.md")


def quoted(text: str) -> list[str]:
    """The lines of code that a page quotes from a method's file: those of its ```py blocks."""
    return "".join(re.findall(r"^```py\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)).splitlines()


@pytest.fixture(scope="module")
def pictures():
    """docs/methods/pictures.py, which is no part of the package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(pages.DOCS / "methods")
        yield importlib.import_module("pictures")


# ------------------------------------------------------------------------------------------------- the derivations


def test_each_method_has_a_page_and_no_page_is_left_over():
    assert sorted(path.stem for path in (pages.DOCS / "methods").glob("*.md")) == METHODS


@every_method
def test_a_page_has_all_its_parts_in_order(name):
    parts = pages.sections(page_of(name), 2)
    assert list(parts) == PARTS
    assert all(len(text.split()) > 8 or part == "The picture" for part, text in parts.items())


@every_method
def test_every_tag_is_derived_and_the_derivation_ends_in_its_line(name):
    """A heading for each tag of the file, with mathematics or a reason below it and the tagged code line at the end.

    Lines that the tagged one needs may stand above it, in the file's order.
    """
    docstring, code = source.docstring_and_code(source.path_of(name).read_text(encoding="utf-8"))
    derivation = pages.sections(pages.sections(page_of(name), 2)["Derivation"], 3)
    tags = source.tags(docstring, "docstring")
    assert [heading for heading in derivation if re.fullmatch(r"[FBIU]\d+", heading)] == tags
    lines = [line.strip() for line in code.splitlines()]
    tagged = lambda line: re.findall(r"\b[FBIU]\d+\b", line.rpartition("  # ")[2])
    for tag in tags:
        block = quoted(derivation[tag])
        for line in block:
            assert line in lines, f"{name}: the page quotes {line!r}, which is no line of the file"
        assert sorted(block, key=lines.index) == block, f"{name}: the lines of {tag} stand in another order"
        assert [tag in tagged(line) for line in block] == [False] * (len(block) - 1) + [True], f"{name}: {tag}: {block}"
        assert not any(tagged(line) for line in block[:-1]), f"{name}: {tag} quotes another equation's line"
        before = derivation[tag].partition("```py\n")[0]
        assert "$$" in before or len(before.split()) >= 10, f"{name}: nothing is derived for {tag}"


@every_method
def test_the_table_of_equations_has_every_tag_in_order(name):
    docstring, _ = source.docstring_and_code(source.path_of(name).read_text(encoding="utf-8"))
    table = re.findall(r"^\| ([FBIU]\d+) \|", pages.sections(page_of(name), 2)["Equations"], re.MULTILINE)
    assert table == source.tags(docstring, "docstring")


@every_method
def test_a_page_shows_the_chain_rule_for_every_gradient(name):
    """Each B equation of LoRA and of the methods with a backward of their own has an equation in index form."""
    derivation = pages.sections(pages.sections(page_of(name), 2)["Derivation"], 3)
    for tag in (tag for tag in derivation if re.fullmatch(r"B\d+", tag)):
        displays = re.findall(r"^\$\$\n(.*?)\n\$\$$", derivation[tag], re.MULTILINE | re.DOTALL)
        assert any(re.search(r"_\{?[a-z]", display) for display in displays), f"{name}: {tag} is not in index form"


@every_method
def test_what_is_kept_and_the_claims_are_the_file_s(name):
    docstring, _ = source.docstring_and_code(source.path_of(name).read_text(encoding="utf-8"))
    kept = re.search(r"^Kept for backward: (.*)$", docstring, re.MULTILINE)[1]
    parts = pages.sections(page_of(name), 2)
    assert f"Kept for backward: `{kept}`" in parts["What it keeps, and why"]
    true = " ".join(parts["What is exactly true"].split())
    for claim in methods.get(name).claims:
        assert f"- {claim}" in true, f"{name}: the page lacks the claim {claim!r}"
    for array in source.kept(docstring):  # each has its reason
        assert re.search(rf"`{array}`( for|,)", parts["What it keeps, and why"]), f"{name}: why is {array} kept?"


def test_the_options_named_have_the_defaults_named():
    """``alpha`` = 16 and the like, in the first column, "here", of the tables beside the paper and PEFT."""
    seen = set()
    for name in METHODS:
        known = methods.options(name)
        table = pages.sections(page_of(name), 2)["In the paper and in PEFT"]
        for cell in re.findall(r"^\| (.*?) \|", table, re.MULTILINE):
            for option, value in re.findall(r"`(\w+)` = ([\d.]+)", cell):
                if option in known:
                    assert float(value) == float(known[option][1]), f"{name}: {option} = {value}"
                    seen.add((name, option))
    assert {("lora", "r"), ("lora", "alpha"), ("lora_plus", "lr_ratio"), ("vera", "d_initial")} <= seen


def test_the_list_of_methods_has_each_one_once():
    """methods.md: the table, with a few words to each, and the site's navigation, in one order."""
    page = pages.read("methods.md")
    listed = re.findall(r"^\| \[.+\]\(methods/(\w+)\.md\) \| .{20,} \|$", page, re.MULTILINE)
    assert sorted(listed) == METHODS
    assert listed == re.findall(r"^methods/(\w+)$", page, re.MULTILINE)


# ---------------------------------------------------------------------------------------------------- code and links


@pytest.mark.parametrize("name", [name for name in ALL if name not in ON_THE_HOST])
def test_code_blocks_print_what_the_page_says(name):
    pages.run(pages.read(name), f"docs/{name}")


@pytest.mark.parametrize("name", sorted(ON_THE_HOST))
def test_code_blocks_that_count_the_plain_forms_bytes(name):
    pages.run(pages.read(name), f"docs/{name}")


@every_page
def test_links_lead_to_files_and_headings(name):
    assert not pages.broken_links(name)


@every_page
def test_the_mathematics_is_what_github_and_the_site_both_read(name):
    """$$ on lines of their own and in pairs; nothing that Markdown eats, no macro, no label."""
    text = pages.FENCED.sub("", pages.read(name))
    text = re.sub(r"`[^`\n]*`", "", text)
    displays = re.findall(r"^\$\$\n(.*?)\n\$\$$", text, re.MULTILINE | re.DOTALL)
    assert text.count("$$") == 2 * len(displays)
    inline = re.sub(r"^\$\$\n.*?\n\$\$$", "", text, flags=re.MULTILINE | re.DOTALL)
    for line in inline.splitlines():
        assert line.count("$") % 2 == 0, f"{name}: an odd number of $ in {line!r}"
    within = re.findall(r"\$([^$]+)\$", inline)
    for formula in displays + within:
        assert not re.search(r"\\(label|newcommand|def|tag)\b|\\[,;!{}_]|\n\n", formula), f"{name}: {formula}"
        assert formula.count("{") == formula.count("}"), f"{name}: {formula}"
    assert all(formula == formula.strip() for formula in within), f"{name}: a space beside a $"


@pytest.mark.parametrize("name", WHY)
def test_a_question_is_asked_and_answered_first(name):
    """The title, the question in people's words, and then the short answer, before any heading."""
    head = pages.read(f"why/{name}").split("\n## ", 1)[0].split("\n\n")
    assert head[0].startswith("# ") and head[1].startswith('*"') and len(head[2].split()) > 40
    assert pages.blocks(pages.read(f"why/{name}"))


@pytest.mark.parametrize("name", WHY)
def test_the_list_of_questions_has_it_by_its_title_and_with_a_line(name):
    title = pages.read(f"why/{name}").splitlines()[0].removeprefix("# ")
    line = re.search(rf"^- \[{re.escape(title)}\]\(why/{name}\) (.+)", pages.read("why.md"), re.MULTILINE)
    assert line and len(line[1].split()) > 5


# ------------------------------------------------------------------------------------------------------ the pictures


def test_there_is_a_picture_for_each_method_as_the_script_draws_it(pictures, tmp_path):
    """It says the same, and hardly a pixel is another: a change of the script shows, another version's fonts do not."""
    assert sorted(pictures.WEIGHTS) == sorted(pictures.LINES) == sorted(pictures.MADE) == METHODS
    for name in METHODS:
        pictures.write(name, tmp_path)
        drawn, stored = (Image.open(folder / f"{name}.png") for folder in (tmp_path, pages.DOCS / "methods"))
        redraw = f"{name}.png is another picture: run docs/methods/pictures.py"
        assert stored.info["Description"] == pictures.description(name), redraw
        assert drawn.size == stored.size and drawn.width >= 700
        assert np.abs(np.asarray(drawn, float) - np.asarray(stored, float)).mean() < 1.0, redraw  # of 255
        assert re.search(rf"!\[.{{20,}}\]\({name}\.png\)", page_of(name))


@every_method
def test_a_picture_shows_what_is_so(pictures, name):
    """What is trained, frozen, moved and kept, with which shape, is what the code says of one layer."""
    method = methods.create(name, **methods.known(name, r=3, start_step=0))
    start = Trial(method)
    end, sizes = start.after(3), {"N": 5, "d_in": 12, "d_out": 9, "r": 3}
    drawn = {part.name: part for part in pictures.WEIGHTS[name] if isinstance(part, pictures.Array)}
    trained = set(start.layer.arrays.trainable())
    assert {array for array, part in drawn.items() if part.state == "trained"} == trained
    for array, part in drawn.items():
        if part.state == "kept":  # what forward makes and the weight is made of: DoRA's n, below
            assert (array, part.shape) in pictures.MADE[name][0], f"{name}: {array} has two states"
            continue
        one, two = (t.p.get(array, t.W) for t in (start, end))
        assert one.shape == tuple(sizes[d] for d in part.shape), f"{name}: {array}"
        assert part.state == ("trained" if array in trained else "moved" if (one != two).any() else "frozen"), array
    kept, freed = pictures.MADE[name]
    saved = Saved(method.forward(start.x, start.W, start.p)[1])
    assert {array: tuple(sizes[d] for d in shape) for array, shape in kept} == {k: a.shape for k, a in saved.items()}
    assert not {array for array, _ in freed} & set(saved)


# ----------------------------------------------------------------------------------------------- what was measured


@every_method
def test_the_table_of_what_was_measured_is_the_recorded_one(pictures, name):
    page = page_of(name)
    assert f"<!-- compared {name} " in page
    assert pictures.fill(page, *pictures.recorded()) == page, "run docs/methods/pictures.py"


def test_a_table_that_is_not_the_recorded_one_is_filled(pictures):
    results, speed = pictures.recorded()
    page = "a\n<!-- compared lora full -->\nold\n<!-- /compared -->\nb\n"
    filled = pictures.fill(page, results, speed)
    assert "old" not in filled and "| `lora` | 73,728 |" in filled and filled.endswith("b\n")
    results["rows"][0]["loss_b_before"] = 9.0
    assert "9.000" in pictures.fill(page, results, speed)


def test_what_the_pages_say_of_the_comparison():
    """The sentences below the tables, by the recorded numbers."""
    rows = {row["method"]: row for row in json.loads(pages.read("compare.json"))["rows"]}
    learnt = {name: row["loss_b_after"] for name, row in rows.items()}
    kept = {name: row["kept_bytes"] for name, row in rows.items()}
    rates = json.loads(pages.read("compare.json"))["settings"]["learning_rates"]
    assert min(learnt, key=learnt.get) == "full" and rates["full"] == 0.002 and rates["lora"] == 0.005  # full.md
    assert rates["lora_plus"] == 0.002  # lora_plus.md
    assert 0.6 < kept["lora_fa"] / kept["lora"] < 0.7 and rows["lora"]["trainable"] == 2 * rows["lora_fa"]["trainable"]
    assert (rates["lora_fa_corrected"], rates["lora_fa"]) == (0.02, 0.01)  # lora_fa_corrected.md
    assert rows["lora"]["trainable"] == 12 * rows["vera"]["trainable"]  # vera.md
    assert max(learnt, key=learnt.get) == "vera" and rates["vera"] == 0.2 == 40 * rates["lora"]
    assert 1.4 < kept["dora"] / kept["lora"] < 1.5  # dora.md
    assert round(learnt["dora"] - learnt["dora_detached"], 3) == 0.002  # five-doras.md
    ms = [round(1e3 * rows[name]["seconds_per_step"]) for name in ("dora_detached", "dora")]  # dora_detached.md
    assert "{} ms against {} above".format(*ms) in " ".join(page_of("dora_detached").split())
    assert rates["pissa"] == rates["lora"] == rates["delta_lora"] == rates["delta_lora_control"]


PAIRED = {  # page: the method and the other one whose differences, learning first and forgetting second, it states
    "delta_lora": ("delta_lora", "delta_lora_control"),
    "delta_lora_control": ("delta_lora", "delta_lora_control"),
    "dora": ("dora", "lora"),
    "dora_detached": ("dora_detached", "dora"),
    "full": ("full", "lora"),
    "lora_fa": ("lora_fa", "lora"),
    "lora_fa_corrected": ("lora_fa_corrected", "lora_fa"),
    "lora_plus": ("lora_plus", "lora"),
    "pissa": ("pissa", "lora"),
    "rslora": ("rslora", "lora"),
    "vera": ("vera", "lora"),
}


def three_seeds() -> dict:
    """The losses (on the Folio, on modern spelling) of each method for seeds 0, 1, 2, from notebook 09."""
    source_of_09 = (pages.DOCS.parent / "notebooks/09_family.py").read_text(encoding="utf-8")
    return ast.literal_eval(re.search(r"^recorded = (\{.*?^\})", source_of_09, re.MULTILINE | re.DOTALL)[1])


@every_method
def test_differences_over_three_seeds_are_the_recorded_ones(name):
    """Each "0.042 ± 0.019": the mean of the differences seed by seed, and the half width by Student's t."""
    said = re.findall(r"(\d\.\d{3}) ± (\d\.\d{3})", pages.sections(page_of(name), 2)["How it compares"])
    if name not in PAIRED:
        assert not said
        return
    losses = three_seeds()
    computed = []
    for one, other in zip(*(losses[method] for method in PAIRED[name]), strict=True):
        delta = np.subtract(one, other)
        computed.append((abs(delta.mean()), 4.303 * delta.std(ddof=1) / 3**0.5))
    assert said and np.abs(np.array(said, float) - computed[: len(said)]).max() < 0.0005 + 1e-9  # 0.0345 may be 0.035


def test_what_the_pages_call_noise_is_noise():
    """And what they state as a difference is one: whether the 95 % interval holds 0."""
    losses = three_seeds()

    def differs(one, other, on):
        delta = np.subtract(losses[one][on], losses[other][on])
        clear = abs(delta.mean()) > 4.303 * delta.std(ddof=1) / 3**0.5
        return np.sign(delta.mean()) if clear else 0

    learns, forgets = ({page: differs(*pair, on) for page, pair in PAIRED.items()} for on in (0, 1))
    assert {page for page, sign in learns.items() if sign < 0} == {"full"}
    noise = {"dora", "dora_detached", "lora_fa_corrected", "lora_plus", "rslora"}
    assert {page for page, sign in learns.items() if not sign} == noise
    noise = {"delta_lora", "delta_lora_control", "dora_detached", "lora_fa", "vera"}
    assert {page for page, sign in forgets.items() if not sign} == noise
    assert {sign for page, sign in forgets.items() if page not in noise} == {1}


def test_what_the_pages_say_of_the_sweep():
    """lora_plus.md's table, and the sentences of full.md and lora_fa_corrected.md, by the recorded runs."""
    runs = [json.loads(line) for line in pages.read("sweep/learning_rates.jsonl").splitlines()]

    def mean(method, rate, on="loss_b"):
        losses = {run["seed"]: run[on] for run in runs if (run["method"], run["lr"]) == (method, rate)}
        assert sorted(losses) == [0, 1]
        return f"{np.mean(list(losses.values())):.3f}"

    table = page_of("lora_plus").split("<!-- sweep -->\n", 1)[1].split("\n\n", 1)[0]
    head, _, *rows = ([cell.strip(" `") for cell in row.strip("|").split("|")] for row in table.splitlines())
    assert head[1:] and [row[0] for row in rows] == ["lora_plus", "lora"]
    for method, *cells in rows:
        assert cells == [mean(method, float(rate)) for rate in head[1:]]
    folio, modern = "loss_b", "loss_a"
    full = [mean(*run, on) for on in (folio, modern) for run in (("full", 0.0005), ("lora", 0.005))]
    corrected = [mean(name, 0.01, on) for on in (folio, modern) for name in ("lora_fa", "lora_fa_corrected")]
    for name, numbers, words in [
        ("full", full, "{} against {} on the Folio, and {} against {} on modern text"),
        ("lora_fa_corrected", corrected, "at 0.01 they end at {} and {} on the Folio, and at {} and {} on modern text"),
    ]:
        assert words.format(*numbers) in " ".join(page_of(name).split())


def test_pissas_first_step_grows_with_alpha_as_its_page_says():
    """Like alpha under gradient descent, like its root under Adam."""
    for adam, factor in ((False, 4.0), (True, 2.0)):
        moved = []
        for alpha in (16.0, 64.0):
            trial = Trial(methods.create("pissa", r=3, alpha=alpha), N=20)
            moved.append(abs(trial.after(1, lr=1e-7, adam=adam, eps=1e-30).merged - trial.merged).sum())
        assert abs(moved[1] / moved[0] - factor) < 0.01


def test_what_the_pages_say_of_memory_and_speed():
    """The table of why/lora-memory.md, its sentences, and lora_fa.md's, by the recorded numbers."""
    recorded = json.loads(pages.read("memory.json"))["sizes"]["tiny"]["rows"]
    page = pages.read("why/lora-memory.md")
    table = page.split("<!-- recorded -->", 1)[1].split("\n\n", 1)[0]
    lines = [
        f"| {name} | {recorded[name]['kept_bytes'] / 2**20:.1f} | "
        for name in re.findall(r"^\| (\w.*?) \|", table, re.M)
    ]
    assert len(lines) == 5
    for line in lines:
        name = line.split("|")[1].strip()
        assert f"{line}{recorded[name]['peak_bytes'] / 2**20:.0f} |" in table
    kept = {name: row["kept_bytes"] for name, row in recorded.items()}
    assert kept["LoRA"] > kept["full"] and kept["LoRA, recompute all three"] < kept["LoRA-FA"]
    assert 1.05 < recorded["LoRA, recompute all three"]["step_ratio"] < 1.15  # about a tenth of a step
    speed = {
        row["method"]: row for row in json.loads(pages.read("speed/versus_peft.json"))["rows"] if row["size"] == "M"
    }
    ours, theirs = ({n: speed[n]["kept_bytes"][side] for n in ("vera", "lora")} for side in ("minilora", "torch"))
    for side, name in ((ours, "lora"), (theirs, "lora"), (ours, "vera"), (theirs, "vera")):
        assert re.search(rf"\b{side[name] / 2**20:.1f}\b", page.split("**A framework is not the formula.**", 1)[1])
    assert theirs["lora"] < ours["lora"] and theirs["vera"] > ours["vera"]  # "beyond the formula"
    assert round((recorded["full"]["peak_bytes"] - recorded["LoRA"]["peak_bytes"]) / 2**20) == 11
    compared = {row["method"]: row["trainable"] for row in json.loads(pages.read("compare.json"))["rows"]}
    fewer = compared["full"] - compared["lora"]
    assert f"8.2 are gradients and moments, of {fewer:,} numbers" in page and round(12 * fewer / 2**20, 1) == 8.2
    assert round(4 * compared["full"] / 2**20, 1) == 3.0
    keeps = "78.3 MiB for VeRA, and 42.3 for LoRA"  # vera.md
    torch = [f"{speed[name]['kept_bytes']['torch'] / 2**20:.1f}" for name in ("vera", "lora_fa")]
    assert keeps in page_of("vera") and re.findall(r"\d+\.\d", keeps) == torch
    more = speed["vera"]["kept_bytes"]["torch"] - speed["lora_fa"]["kept_bytes"]["torch"]
    N, all_d_out = 16 * 128, 4 * (5 * 128 + 512)  # of size M: 4 blocks of q, k, v, o, down and up
    assert more == 4 * N * all_d_out
    assert {round(speed[name]["ms"]["minilora"]) for name in ("dora", "dora_detached")} == {170}  # dora_detached.md
    slower = [name for name, row in speed.items() if row["ratio_quartiles"][0] > 1.0]
    assert slower == ["full"]  # full.md


def test_the_table_of_merge_differences_is_what_its_code_measures():
    """By width and format; another BLAS library may move float32 by a factor of 2.5."""
    page = pages.read("why/merge-difference.md")
    namespace = {}
    for code, _ in pages.blocks(page)[:2]:
        exec(code.split("\nprint(", 1)[0], namespace)
    table = page.split("<!-- measured -->", 1)[1].split("\n\n", 1)[0]
    rows = re.findall(r"^\| (\d+) \| (\S+) \| (\S+) \| (\S+) \|$", table, re.MULTILINE)
    assert [int(row[0]) for row in rows] == [64, 256, 768]
    for d, *printed in rows:
        for round_, number in zip(namespace["ROUND"].values(), printed, strict=True):
            measured, _ = namespace["compare"](round_, 0.1, d=int(d))
            assert float(number) / 2.5 <= measured <= float(number) * 2.5
            assert float(number) < 1e-6 or f"{measured:.0e}".replace("e-0", "e-") == number
    expected = r"times $10^{-7}$ in float32, $4 \cdot 10^{-4}$ in float16 and $3 \cdot 10^{-3}$ in bfloat16"
    assert expected in page and "a third of a weak adapter's effect" in page


def test_bfloat16_is_rounded_as_hardware_does():
    """To the nearest, ties to even, by ml_dtypes' rule written out: against exact arithmetic on the spacing."""
    namespace = {}
    exec(pages.blocks(pages.read("why/merge-difference.md"))[0][0].split("\nprint(", 1)[0], namespace)
    x = np.random.default_rng(0).standard_normal(4000).astype(np.float32)
    spacing = 2.0 ** (np.floor(np.log2(np.abs(x.astype(float)))) - 7)
    expected = np.rint(x / spacing) * spacing  # rint takes ties to even
    assert np.array_equal(namespace["bfloat16"](x), expected.astype(np.float32))
    ties = namespace["bfloat16"](np.array([1 + 2.0**-8, 1 + 3 * 2.0**-8]))
    assert ties.tolist() == [1.0, 1 + 2.0**-6]
