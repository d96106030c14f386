"""docs/conventions.md against the code: its tables, its numbers, and every code block on it."""

import contextlib
import importlib.metadata
import importlib.util
import io
import math
import re
from pathlib import Path

import numpy as np
import pages
import pytest

from minilora import adapt, methods
from minilora.engine import Saved
from minilora.nn import Linear, Module
from minilora.surgery import adapted_layers
from minilora.tools.trial import Trial

METHODS = methods.names()
PAGE = pages.read("conventions.md")
every_method = pytest.mark.parametrize("name", METHODS)


# ------------------------------------------------------------------------------------------------ reading the page


def rows(text: str) -> list[list[str]]:
    """The first Markdown table in ``text``: its rows' cells, without the head."""
    table = re.search(r"(?:^\|.*\|$\n?)+", text, re.MULTILINE)[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:]]


def marked(name: str) -> list[list[str]]:
    """The rows of the table below ``<!-- name -->``."""
    assert f"<!-- {name} -->" in PAGE, f"docs/conventions.md has no table marked <!-- {name} -->"
    return rows(PAGE.split(f"<!-- {name} -->", 1)[1])


def quoted(cell: str) -> list[str]:
    return re.findall(r"`([^`]*)`", cell)


def sections() -> dict[str, list[list[str]]]:
    """The table of arrays of each method, from the headings that name methods."""
    parts = re.split(r"^### (.*)$", PAGE.split("## What is each option called", 1)[0], flags=re.MULTILINE)[1:]
    return {name: rows(text) for heading, text in zip(parts[::2], parts[1::2], strict=True) for name in quoted(heading)}


def significant(value: float, printed: str) -> str:
    """``value`` with as many significant digits as ``printed`` has."""
    digits = len(printed.replace(".", "").lstrip("0")) or 1
    return f"{float(f'{value:.{digits - 1}e}'):g}"


ARRAYS = sections()


# ------------------------------------------------------------------------------------------------------ the arrays


class Two(Module):
    """Two linear layers of unlike shapes, so that shared arrays show whose size they have."""

    def __init__(self, shapes, dtype=np.float64):
        rng = np.random.default_rng(0)
        self.one, self.other = (Linear(rng.standard_normal(shape).astype(dtype)) for shape in shapes)


def adapted(name, shapes=((60, 90), (80, 70)), r=8):
    """(model, layers by name, W as they had it) for the method ``name``; Delta-LoRA moves W from the first step on."""
    model = Two(shapes)
    before = {"one": model.one.W.data.copy(), "other": model.other.W.data.copy()}
    adapt(model, name, verbose=False, seed=1, **methods.known(name, r=r, start_step=0))
    return model, adapted_layers(model), before


def described(name):
    """{array: (shape, start, state)} as the page has it."""
    assert name in ARRAYS, f"docs/conventions.md has no table of arrays for the method {name}"
    return {quoted(row[0])[0]: (quoted(row[1])[0], quoted(row[4])[0], row[5]) for row in ARRAYS[name]}


def test_the_page_names_no_method_that_is_not_there():
    assert set(ARRAYS) == set(METHODS)


@every_method
def test_arrays_and_shapes(name):
    """Every array of the layer is in the table, no other is, and it has the shape."""
    _, layers, _ = adapted(name)
    table = described(name)
    for layer in layers.values():
        assert set(table) == {"W (base)", *layer.p}
        d_out, d_in = layer.base.W.shape
        sizes = {"r": 8, "d_in": d_in, "d_out": d_out, "max_d_in": 90, "max_d_out": 80}
        arrays = {"W (base)": layer.base.W.data, **layer.p}
        for array, (shape, _, _) in table.items():
            assert arrays[array].shape == eval(shape.replace("max ", "max_"), {}, sizes), f"{name}: {array}"


def uniform(bound):
    """Is it uniform in ± bound?"""
    return lambda a: (
        0.95 * bound < np.abs(a).max() <= bound * (1.0 + 1e-6)
        and a.std() == pytest.approx(bound / math.sqrt(3.0), rel=0.07)
        and abs(a.mean()) < 0.15 * bound
    )


def starts(layer, W0, sizes):
    """What each word of the column *start* means, as a test of an array."""
    r, d_in, max_d_in, s = sizes["r"], W0.shape[1], sizes["max_d_in"], getattr(layer.method, "scaling", None)
    U, sigma, Vt = np.linalg.svd(W0, full_matrices=False)
    p = layer.p
    exactly = lambda value: lambda a: np.allclose(a, value(), rtol=1e-12, atol=1e-12)
    return {
        "U(±1/√d_in)": uniform(1.0 / math.sqrt(d_in)),
        "U(±√6/√(max d_in))": uniform(math.sqrt(6.0 / max_d_in)),
        "U(±√6/√r)": uniform(math.sqrt(6.0 / r)),
        "W": exactly(lambda: W0),
        "W − s B A": exactly(lambda: W0 - s * p.B @ p.A),
        "A": exactly(lambda: p.A),
        "B": exactly(lambda: p.B),
        "(A Aᵀ)⁻¹ / s²": exactly(lambda: np.linalg.inv(p.A @ p.A.T) / s**2),
        "‖W_i‖": exactly(lambda: np.linalg.norm(W0, axis=1)),
        "√(Σ_r / s) V_rᵀ": exactly(lambda: np.sqrt(sigma[:r] / s)[:, None] * Vt[:r]),
        "U_r √(Σ_r / s)": exactly(lambda: U[:, :r] * np.sqrt(sigma[:r] / s)),
    }


@every_method
def test_start(name):
    _, layers, before = adapted(name)
    for path, layer in layers.items():
        words = starts(layer, before[path], {"r": 8, "max_d_in": 90})
        arrays = {"W (base)": layer.base.W.data, **layer.p}
        for array, (_, start, _) in described(name).items():
            if re.fullmatch(r"[\d.]+", start):
                assert (arrays[array] == float(start)).all(), f"{name}: {array} does not start at {start}"
            else:
                assert start in words, f'{name}: the start of {array} is "{start}", which this test does not know'
                assert words[start](arrays[array]), f"{name}: {array} does not start as {start}"


@every_method
def test_state(name):
    """Trained, frozen or moved, and shared: by what the optimizer gets and by what three steps change."""
    _, layers, _ = adapted(name)
    shared = {array for layer in layers.values() for array in layer.shared}
    start = Trial(methods.create(name, **methods.known(name, r=3, start_step=0)))
    end = start.after(3)
    trained = start.layer.arrays.trainable()
    assert set(start.layer.shared) == shared
    for array, (_, _, state) in described(name).items():
        one, two = (t.W if array == "W (base)" else t.p[array] for t in (start, end))
        word = "trained" if array in trained else "frozen" if (one == two).all() else "moved"
        assert state == word + (", shared" if array in shared else ""), f"{name}: {array}"
        assert word != "trained" or (one != two).any()


# ---------------------------------------------------------------------------------------------- options and factors


def methods_of(cell: str) -> set[str]:
    """The methods that a cell names, or all but those."""
    named = set(quoted(cell))
    return set(METHODS) - named if cell.startswith("all but ") else named


@every_method
def test_options_and_defaults(name):
    """Each option stands once in the table for the method, with its default, and none that the method lacks."""
    table = [(quoted(row[1])[0], float(row[2])) for row in marked("options") if name in methods_of(row[0])]
    assert len(table) == len(dict(table))
    assert dict(table) == {option: default for option, (_, default) in methods.options(name).items()}


def test_the_options_name_no_method_that_is_not_there():
    assert {name for row in marked("options") for name in quoted(row[0])} <= set(METHODS)


def test_factors():
    """The numbers follow from the formulas, and minilora's from the code."""
    seen = set()
    for code, formula, printed in marked("factors"):
        expression = quoted(formula)[0].replace("√r", "math.sqrt(r)")
        value = eval(expression, {"math": math}, {"r": 8, "alpha": 16.0})
        assert significant(value, printed) == printed, f"{code}: {formula} is {value}"
        for name in set(quoted(code)) & set(METHODS):
            assert methods.create(name, r=8, alpha=16.0).scaling == pytest.approx(value, rel=1e-12), name
            seen.add(name)
    assert seen == {name for name in METHODS if "alpha" in methods.options(name)}


def test_sentences_about_the_factors():
    """From 1 to 20; mlx's 20 as an alpha; the two defaults."""
    printed = [float(row[2]) for row in marked("factors")]
    assert f"any factor from {min(printed):g} to {max(printed):g}" in PAGE
    assert f"`scale = 20` at `r = 8` is `alpha = {8 * 20}`" in PAGE
    r, alpha = (methods.options("lora")[option][1] for option in ("r", "alpha"))
    assert f"this code `{alpha:g} / {r} = {alpha / r:g}`" in PAGE
    assert not hasattr(methods.create("vera"), "scaling")


# ------------------------------------------------------------------------------------------------------ the numbers

DRAWS = {  # (standard deviation of one entry, a draw of A) at d_in, r
    "U(±1/√d_in)": (lambda d, r: 1 / math.sqrt(3 * d), lambda g, d, r: g.uniform(-1, 1, (r, d)) / math.sqrt(d)),
    "U(±1/√r)": (lambda d, r: 1 / math.sqrt(3 * r), lambda g, d, r: g.uniform(-1, 1, (r, d)) / math.sqrt(r)),
    "U(±√6/√d_in)": (lambda d, r: math.sqrt(2 / d), lambda g, d, r: g.uniform(-1, 1, (r, d)) * math.sqrt(6 / d)),
    "N(0, 0.02²)": (lambda d, r: 0.02, lambda g, d, r: g.normal(0, 0.02, (r, d))),
    "N(0, 1/r²)": (lambda d, r: 1 / r, lambda g, d, r: g.normal(0, 1 / r, (r, d))),
    "N(0, 1/r)": (lambda d, r: 1 / math.sqrt(r), lambda g, d, r: g.normal(0, 1 / math.sqrt(r), (r, d))),
}


def test_std_of_A_x():
    """Printed = √d_in times an entry's standard deviation = measured, and minilora's own A is the first row."""
    d, r, rng = 768, 8, np.random.default_rng(0)
    x = rng.standard_normal((500, d))
    assert "at d_in = 768 and r = 8" in PAGE
    table = {quoted(row[0])[0]: row[1] for row in marked("inits")}
    assert set(table) == set(DRAWS)
    for entries, printed in table.items():
        deviation, draw = DRAWS[entries]
        assert significant(deviation(d, r) * math.sqrt(d), printed) == printed, entries
        measured = np.std([x @ draw(rng, d, r).T for _ in range(4)])
        assert measured == pytest.approx(float(printed), rel=0.05), entries
    W = np.zeros((5, d))
    A = methods.create("lora", r=r).init(W, rng, {})[0]["A"]
    assert np.std(x @ A.T) == pytest.approx(float(table["U(±1/√d_in)"]), rel=0.08)
    A = methods.create("vera", r=64).init_shared([W.shape], rng)["A"]
    assert np.std(x @ A.T) == pytest.approx(float(table["U(±√6/√d_in)"]), rel=0.08)
    stds = [float(printed) for printed in table.values()]
    ratio, sentences = max(stds) / min(stds), PAGE.replace("\n", " ")
    assert f"differ by up to {ratio:.0f} under Adam, and by its square, some {round(ratio**2, -2):.0f}," in sentences


def test_both_zero_is_a_dead_start_and_one_is_not():
    t = Trial(methods.create("lora", r=3))
    gradients = lambda p: t.method.backward(t.x @ t.W.T - t.c, Saved(t.method.forward(t.x, t.W, p)[1]), t.W, p)[1]
    zero = {k: np.zeros_like(a) for k, a in t.p.items()}
    assert not any(g.any() for g in gradients(Saved(zero)).values())
    assert gradients(Saved(zero, A=t.p.A))["B"].any()
    assert gradients(Saved(zero, B=np.ones_like(t.p.B)))["A"].any()


@pytest.mark.parametrize("row", marked("merge"), ids=lambda row: row[0])
def test_float32_merge_error(row):
    d = int(row[0])
    for name, printed in zip(("lora", "dora"), row[1:], strict=True):
        rng, method = np.random.default_rng(0), methods.create(name)
        W = rng.standard_normal((d, d))
        arrays, _ = method.init(W, rng, {})
        arrays["B"] = 0.1 * rng.standard_normal(arrays["B"].shape)
        p = Saved((k, a.astype(np.float32)) for k, a in arrays.items())
        x, W = rng.standard_normal((64, d)).astype(np.float32), W.astype(np.float32)
        y, _ = method.forward(x, W, p)
        error = np.linalg.norm(y - x @ method.merge(W, p).T) / np.linalg.norm(y)
        assert float(printed) / 2.5 <= error <= float(printed) * 2.5, f"{name}: {error:.1e}"


# -------------------------------------------------------------------------------------------------- the code blocks

BLOCKS = pages.blocks(PAGE)


def test_code_blocks_print_what_the_page_says():
    """All blocks, top to bottom in one namespace, each printing exactly the text block below it."""
    assert len(BLOCKS) >= 5
    pages.run(PAGE, "docs/conventions.md")


def test_each_other_dora_differs_and_the_same_one_does_not():
    """Variant 1 is this code's; 2 to 5 differ from it by a printed number, PEFT's way with the bias apart."""
    part = PAGE.split("**1. Per output", 1)[1].split("## Which LoRA-FA", 1)[0]
    variants = [re.findall(r"^```text\n(.*?)^```$", v, re.M | re.S)[0] for v in re.split(r"\*\*[2-5]\. ", part)]
    assert len(variants) == 5
    numbers = [[float(n) for n in re.findall(r"\d+\.\d+", text)] for text in variants]
    assert not any(numbers[0])
    assert all(min(n) >= 0.05 for n in numbers[1:4])
    assert numbers[4][0] == 0.0 and min(numbers[4][1:]) >= 0.05


def test_dora_variants_one_and_two_are_the_two_methods():
    """The page's ``dV`` is dora_detached's gradient, and its ``dV_full`` dora's."""
    namespace = {}
    for code, _ in BLOCKS[:2]:
        with contextlib.redirect_stdout(io.StringIO()):
            exec(code, namespace)
    page, p = Saved(namespace), namespace["p"]
    for name, dV in {"dora_detached": page.dV, "dora": page.dV_full}.items():
        method = methods.create(name, r=page.r, alpha=page.alpha)
        _, saved = method.forward(page.x, page.W, p)
        _, grads = method.backward(page.dy, Saved(saved), page.W, p)
        np.testing.assert_allclose(grads["B"], page.s * dV @ p.A.T, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(grads["A"], page.s * p.B.T @ dV, rtol=1e-9, atol=1e-9)


def test_vera_s_line():
    """W + diag(b) B diag(d) A, with the corner that fits."""
    _, layers, before = adapted("vera")
    for path, layer in layers.items():
        p = Saved(layer.p, b=np.arange(len(before[path]), dtype=float))
        d_out, d_in = before[path].shape
        expected = before[path] + np.diag(p.b) @ p.B[:d_out] @ np.diag(p.d) @ p.A[:, :d_in]
        np.testing.assert_allclose(layer.method.merge(before[path], p), expected, rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------------------- PEFT's side, where it is installed


def peft_source() -> Path:
    """PEFT's folder, found without importing it (and torch); skips where it is another version than the page's."""
    spec, (version,) = importlib.util.find_spec("peft"), re.findall(r"huggingface/peft, release ([\d.]+)", PAGE)
    if spec is None or importlib.metadata.version("peft") != version:
        pytest.skip(f"needs PEFT {version}")
    return Path(spec.origin).parent


def test_peft_s_defaults():
    folder = peft_source()
    for row in marked("options"):
        config, _, field = quoted(row[3])[0].partition(".") if quoted(row[3]) else ("", "", "")
        if field:
            path = {"LoraConfig": "tuners/lora/config.py", "VeraConfig": "tuners/vera/config.py"}[config]
            source = (folder / path).read_text(encoding="utf-8")
            default = re.search(rf"^    {field}: .*?= field\(\s*default=([\w.]+)", source, re.MULTILINE | re.DOTALL)[1]
            assert float(default) == float(row[4]), field


def test_peft_s_names():
    folder = peft_source()
    source = "".join((folder / "tuners" / f).read_text(encoding="utf-8") for f in ("lora/layer.py", "vera/layer.py"))
    names = {quoted(row[3])[0] for table in ARRAYS.values() for row in table if quoted(row[3])}
    assert names == {
        *("lora_A.weight", "lora_B.weight", "lora_magnitude_vector"),
        *("base_model.vera_A", "base_model.vera_B", "vera_lambda_b", "vera_lambda_d"),
    }
    for name in names:
        assert f"self.{name.removeprefix('base_model.').removesuffix('.weight')}" in source, name
