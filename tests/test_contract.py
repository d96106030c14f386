"""The contract of a method file, held for every method that the registry finds; a new file joins by being there."""

import ast
import dataclasses
import hashlib
import json
import re
import sys
import tracemalloc

import numpy as np
import pytest
import source
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora import GPT, AdamW, GPTConfig, InputError, adapt, merge, merge_and_unload, methods, no_grad, unmerge
from minilora.backend import to_host
from minilora.cli import main
from minilora.engine import Saved
from minilora.errors import AdapterFormatError
from minilora.files.base import fingerprint, load_model, save_model
from minilora.files.checkpoint import load_adapter, load_training, open_training, save_adapter, save_training
from minilora.files.peft import load_peft
from minilora.files.tensorfile import write_tensors
from minilora.surgery import adapted_layers
from minilora.tools.contract import CHECKS, Case
from minilora.tools.exercises import grade
from minilora.tools.gradcheck import check_method, method_point
from minilora.tools.methodfile import kept, length, shape_comments, sizes_of, stated_shapes
from minilora.training.loop import History
from minilora.training.trainer import train

METHODS = methods.names()
SIZES = {"N": 5, "d_in": 7, "d_out": 6}  # and r = 3: all different, so that no axis can stand in for another
SHAPES = [{}, {"N": 1}, {"d_in": 3, "d_out": 9}, {"d_in": 9, "d_out": 3}, {"d_in": 4, "d_out": 4}]
every_method = pytest.mark.parametrize("name", METHODS)


def create(name, **options):
    return methods.create(name, **methods.known(name, **{"r": 3, **options}))


def text_of(name):
    return source.path_of(name).read_text(encoding="utf-8")


def point(method, at_init=False, seed=0, **sizes):
    """(x, W, p, trainable names, dy) for ``method`` at SIZES or the given ones."""
    return method_point(method, at_init=at_init, seed=seed, **{**SIZES, **sizes})


def tiny_model(seed=0, dtype=np.float32):
    return GPT(GPTConfig(vocab_size=17, n_positions=8, n_embd=16, n_layer=2, n_head=2), rng=seed, dtype=dtype)


def tiny_batches(seed=0):
    rng = np.random.default_rng(seed)
    while True:
        ids = rng.integers(0, 17, (3, 9))
        yield ids[:, :-1], ids[:, 1:]


# ------------------------------------------------------------------------------------------------- the gradients


@pytest.mark.quick
@every_method
@pytest.mark.parametrize("sizes", SHAPES, ids=str)
def test_gradients_equal_finite_differences_and_the_complex_step(name, sizes):
    for rank in (1, 3):
        for at_init in (False, True):
            report = check_method(create(name, r=rank), at_init=at_init, **{**SIZES, **sizes})
            assert report, report
            assert {row.array for row in report.rows} == {"x", *point(create(name, r=rank), **sizes)[3]}


@every_method
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_gradients_at_shapes_that_hypothesis_draws(name, data):
    # d_in of 1 is left out: a row norm over one entry has derivative zero, and zero has no relative error.
    N, d_in, d_out = (data.draw(st.integers(low, 9), label=k) for k, low in (("N", 1), ("d_in", 2), ("d_out", 1)))
    r = data.draw(st.integers(1, min(d_in, d_out)), label="r")
    alpha = data.draw(st.floats(0.1, 4.0), label="alpha")  # a large one bends DoRA beyond differences
    report = check_method(create(name, r=r, alpha=alpha), N, d_in, d_out, seed=data.draw(st.integers(0, 99)))
    assert report, report


@every_method
def test_each_tagged_backward_line_matters_and_the_check_sees_it(name):
    broken = list(source.mutants(text_of(name)))
    tagged = {t for t in source.tags(source.docstring_and_code(text_of(name))[1], "code") if t.startswith("B")}
    assert {description.split()[0] for description, _ in broken} == tagged  # no tagged line escapes
    for description, mutant in broken:
        method = source.load(mutant, name)(**methods.known(name, r=3))
        assert not check_method(method), f"{name}: the mutant {description} passes the gradient check"


@pytest.mark.quick
@every_method
def test_arrays_that_are_not_contiguous_give_the_same(name):
    def loose(array):
        return np.repeat(np.repeat(array, 2, axis=0), 2, axis=-1)[::2, ..., ::2] if array.ndim > 1 else array

    method = create(name)
    x, W, p, _, dy = point(method)
    results = []
    for arrays in ((x, W, p, dy), (loose(x), np.asfortranarray(W), {k: loose(a) for k, a in p.items()}, loose(dy))):
        y, saved = method.forward(*arrays[:2], Saved(arrays[2]))
        dx, grads = method.backward(arrays[3], Saved(saved), arrays[1], Saved(arrays[2]))
        results.append({"y": y, "dx": dx, **grads})
    for key, array in results[0].items():
        np.testing.assert_allclose(results[1][key], array, rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------------------------------- what the file itself says


@pytest.mark.quick
@every_method
@pytest.mark.parametrize("what", CHECKS)
def test_a_method_file_holds_what_check_asks_of_any(name, what):
    assert CHECKS[what](Case.of(create(name), text_of(name))) == ""


@pytest.mark.quick
@every_method
def test_shape_comments_are_true_while_the_code_runs(name):
    method, seen = create(name), {}
    path, text = source.path_of(name), text_of(name)
    comments = shape_comments(text)
    targets = {n: m[1] for n, line in enumerate(text.splitlines(), 1) if (m := source.TARGET.match(line))}

    def watch(frame, event, value):
        if event != "return" or frame.f_code.co_filename != str(path):
            return
        last = max((line for _, _, line in frame.f_code.co_lines() if line), default=0)
        for number, shape in comments.items():
            if frame.f_code.co_firstlineno <= number <= last:
                array = frame.f_locals[targets[number]] if number in targets else value
                seen[number] = (shape, np.shape(array))

    x, W, p, _, dy = point(method)
    sys.setprofile(watch)
    try:
        method.init(W, np.random.default_rng(0), Saved(method.init_shared([W.shape], np.random.default_rng(0))))
        _, saved = method.forward(x, W, p)
        method.backward(dy, Saved(saved), W, p)
        method.surrogate(x, W, p, p)
        method.factors(W, p)
        method.merge(W, p)
        method.after_step(W, p)
    finally:
        sys.setprofile(None)
    assert set(seen) == set(comments)
    sizes = sizes_of(method, **SIZES)
    for number, (shape, actual) in seen.items():
        assert tuple(length(axis, sizes) for axis in shape) == actual, f"{path.name}:{number} says {shape}"
    for number, line in enumerate(text.splitlines(), 1):
        if "  # " in line and re.search(r"\b[FB]\d", line.rsplit("  # ", 1)[1]):
            assert number in comments, f"{name}:{number} has a tag and no shape"


@every_method
def test_kept_bytes_are_what_the_allocator_says(name):
    sizes = {"N": 400, "d_in": 192, "d_out": 160}
    method = create(name, r=8)
    _, W, p, _, _ = point(method, **sizes)
    for _ in range(2):  # the first round pays for what Python itself keeps
        tracemalloc.start()
        x = np.ones((sizes["N"], sizes["d_in"]))
        y, _saved = method.forward(x, W, p)  # alive while we count
        del x, y
        grown = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
    letters = sizes_of(method, **sizes)
    stated = kept(source.docstring_and_code(text_of(name))[0])
    expected = sum(8 * np.prod([length(axis, letters) for axis in shape]) for shape in stated.values())
    assert grown == pytest.approx(expected, rel=0.02)


@pytest.mark.quick
@every_method
def test_the_file_is_plain_and_holds_no_array(name):
    text, method = text_of(name), methods.get(name)
    assert dataclasses.is_dataclass(method) and method.__dataclass_params__.frozen
    assert (
        stated_shapes(create(name))
        or method.forward is methods.get(method.__base__.__module__.rpartition(".")[2]).forward
    )
    tree = ast.parse(text)
    imported = {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    imported |= {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    assert imported <= {"__future__", "math", "numpy", "dataclasses", "adapter", "lora"}, imported
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef) and function.name in ("forward", "backward", "merge", "after_step"):
            used = {n.id for n in ast.walk(function) if isinstance(n, ast.Name)}
            assert "np" not in used, f"{name}.{function.name} uses NumPy by name, so CuPy arrays could not pass"
            stores = [n for n in ast.walk(function) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)]
            assert not stores, f"{name}.{function.name} stores into an attribute"
    title = text.split('"""')[1].splitlines()[0]
    assert re.fullmatch(r"\S.*\.   .*\d{4}, arXiv \d{4}\.\d{5}.*", title) or name == "full"


def test_the_methods_without_factors_are_those_whose_update_is_of_full_rank():
    for name in METHODS:
        _, W, p, _, _ = point(create(name))
        rank = np.linalg.matrix_rank(create(name).merge(W, p) - W)
        assert (create(name).factors(W, p) is None) == (rank == min(W.shape)), name


# ----------------------------------------------------------------------------------------------------- in a model


def trained(name, steps=4, seed=0):
    model = adapt(tiny_model(), name, verbose=False, **methods.known(name, r=2))
    train(model, AdamW(model.trainable(), 1e-2), tiny_batches(), steps)
    return model


@every_method
def test_training_moves_the_adapter_and_leaves_the_base_bit_identical_twice(name):
    frozen = {n: p.data.copy() for n, p in tiny_model().named_parameters()}
    fresh, model, again = (
        adapt(tiny_model(), name, verbose=False, **methods.known(name, r=2)),
        trained(name),
        trained(name),
    )
    for path, parameter in model.named_parameters():
        original = path.replace(".base.", ".")
        if original in frozen and not (methods.get(name).updates_base and path.endswith("base.W")):
            assert np.array_equal(parameter.data, frozen[original]), f"{name} changed {path}"
        assert np.array_equal(parameter.data, dict(again.named_parameters())[path].data), (
            f"{path} depends on more than the seed"
        )
    before = {n: p.data for n, p in fresh.trainable().items()}
    still = [n for n, p in model.trainable().items() if np.array_equal(p.data, before[n])]
    assert not still, f"{name} trains nothing in {still}"


@every_method
def test_merge_and_exact_unmerge(name):
    model = trained(name)
    ids = next(tiny_batches())[0]
    before = {n: p.data.copy() for n, p in model.named_parameters()}
    with no_grad():
        unmerged = model(ids).data
        merge(model)
        merged = model(ids).data
        unmerge(model)
        again = model(ids).data
    np.testing.assert_allclose(merged, unmerged, rtol=1e-4, atol=1e-5)  # float32: W + sBA is rounded once more
    assert np.array_equal(again, unmerged)
    assert all(np.array_equal(p.data, before[n]) for n, p in model.named_parameters())
    plain = merge_and_unload(model)
    assert not adapted_layers(plain)
    with no_grad():
        assert np.array_equal(plain(ids).data, merged)


def test_a_merged_model_refuses_to_train():
    model = trained("lora", steps=1)
    merge(model)
    with pytest.raises(RuntimeError, match="unmerge"):
        model.loss(*next(tiny_batches()))


def test_all_methods_draw_the_same_A_and_each_seed_another():
    drawn = {0: set(), 1: set()}
    for name in METHODS:
        for seed, found in drawn.items():
            model = adapt(tiny_model(), name, seed=seed, verbose=False, **methods.known(name, r=2))
            layer = model.blocks[1].up
            if "A" in layer.p and not layer.shared and type(layer.method).init is methods.get("lora").init:
                found.add(hashlib.sha256(layer.p.A.tobytes()).hexdigest())
    assert len(drawn[0]) == len(drawn[1]) == 1 and drawn[0] != drawn[1]


# ------------------------------------------------------------------------------------------- options of any type


@pytest.fixture
def dropped_in(monkeypatch):
    """As if the files of tests/dropped_in were in the folder of methods."""
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(source.DROPPED_IN)])


def test_options_are_real_types_and_python_values(dropped_in):
    assert methods.options("marked") == {
        **methods.options("lora"), "start": (float, 0.5), "shift": (float, 0.0), "flipped": (bool, False),
        "wording": (str, "none"), "cuts": (list[int], []), "cap": (int | None, None),
    }  # fmt: skip
    given = {
        "r": np.int64(2),
        "alpha": np.float32(4),
        "shift": 0,
        "flipped": np.bool_(True),
        "wording": "x",
        "cuts": "1,2",
    }
    method = methods.create("marked", **given)
    found = dataclasses.asdict(method)
    assert found == {
        "r": 2,
        "alpha": 4.0,
        "start": 0.5,
        "shift": 0.0,
        "flipped": True,
        "wording": "x",
        "cuts": (1, 2),
        "cap": None,
    }
    assert [type(value) for value in found.values()] == [int, float, float, float, bool, str, tuple, type(None)]
    assert methods.create("marked", **json.loads(json.dumps(found))) == method  # as it stands in a file
    assert methods.create("marked", cuts=[np.int64(3)], cap=7).cuts == (3,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "r is 0; the rank must be an integer of at least 1"),
        ({"r": True}, "r is True; the rank"),
        ({"r": 2.0}, r"r is 2\.0; the rank"),
        ({"r": 2**32}, "r is 4294967296; it must be an integer of at least 0 and below 2³²"),
        ({"alpha": 0.0}, r"alpha is 0\.0; it must be a finite number above 0$"),
        ({"alpha": float("nan")}, "alpha is nan; it must be a finite number"),
        ({"alpha": np.float64("inf")}, "alpha is inf; it must be a finite number"),
        ({"alpha": 10**400}, "alpha is 1000.*; it must be a finite number"),
        ({"alpha": True}, "alpha is True; it must be a finite number"),
        ({"shift": -1.0}, r"shift is -1\.0; it must be a finite number above 0, or 0$"),
        ({"flipped": 1}, "flipped is 1; it must be True or False"),
        ({"wording": 3}, "wording is 3; it must be text"),
        ({"cuts": "1,b"}, "cuts is '1,b'; it must be a list such as 1,2"),
        ({"cuts": 3}, "cuts is 3; it must be a list"),
        ({"cuts": None}, "cuts is None; it must be a list"),
        ({"cap": "1"}, "cap is '1'; it must be an integer"),
        ({"flip": True}, r'marked has no option "flip" \(did you mean "flipped"\?\)'),
    ],
)
def test_an_option_that_cannot_be_used_is_one_error(dropped_in, options, message):
    with pytest.raises(InputError, match=message):
        methods.create("marked", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"r": 8}, "has its options already, and r would be ignored"), ({"lora_alpha": 16}, 'did you mean "alpha"')],
)
def test_options_beside_a_method_that_has_its_own_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        adapt(tiny_model(), methods.create("lora", r=2), verbose=False, **options)


# ------------------------------------------------------------------------------------------- a new method is a file


@pytest.mark.parametrize("name", ["square", "marked"])
def test_a_file_in_the_folder_is_a_method_everywhere(dropped_in, name, tmp_path, capsys):
    for check in (
        test_each_tagged_backward_line_matters_and_the_check_sees_it,
        test_shape_comments_are_true_while_the_code_runs,
        test_kept_bytes_are_what_the_allocator_says,
        test_the_file_is_plain_and_holds_no_array,
        test_training_moves_the_adapter_and_leaves_the_base_bit_identical_twice,
        test_merge_and_exact_unmerge,
    ):
        check(name)
    assert main(["check", name]) == main(["check", "--file", str(source.path_of(name))]) == 0
    base, out, form = (str(tmp_path / part) for part in ("tiny.safetensors", "out", "form"))
    save_model(base, GPT(GPTConfig(n_positions=32, n_embd=16, n_layer=1, n_head=2)))
    flags = ["--flipped", "--cuts", "1", "--no-flipped", "--shift", "0"] if name == "marked" else []
    common = ["--base", base, "--steps", "2"]
    assert main(["train", name, *common, "--r", "3", "--lr", "0.1", "--out", out, *flags]) == 0
    assert main(["train", "--resume", out]) == 0
    assert main(["export", out, form, "--form", "merged", "--base", base]) == 0
    lora = ["export", out, f"{form}_lora", "--form", "lora", "--base", base]
    assert main(lora) == (0 if name == "marked" else 2)  # only a method with factors is a LoRA
    assert main(["compare", *common, "--methods", name, "lora", "--r", "2", "--out", f"{out}_compare"]) == 0
    assert main(["diff", "lora", name]) == main(["methods"]) == 0
    printed = capsys.readouterr().out
    assert {"square": "trains M (m, m)", "marked": "trains A (r, d_in), B (d_out, r)"}[name] in printed
    if name == "marked":
        loaded = load_peft(f"{form}_lora", load_model(base))
        assert adapted_layers(loaded)["blocks.0.o"].p.A.shape == (3, 16)


@pytest.mark.parametrize("name", ["square", "marked"])
def test_arrays_of_any_size_and_integers_come_back_as_they_were(dropped_in, name, tmp_path):
    def make_optimizer(parameters):
        return AdamW(parameters, 1e-2)

    model = adapt(tiny_model(), name, verbose=False, **methods.known(name, r=3, cuts=(1, 2)))
    optimizer = make_optimizer(model.trainable())
    history = train(model, optimizer, tiny_batches(), 2)
    mark = fingerprint(tiny_model())
    save_adapter(tmp_path / "adapter", model, mark)
    save_training(tmp_path / "training", model, mark, optimizer, history, np.random.default_rng(0), {})
    loaded, resumed = load_adapter(tmp_path / "adapter", tiny_model()), tiny_model()
    load_training(open_training(tmp_path / "training")[0], resumed, make_optimizer, History(), np.random.default_rng(1))
    for path, layer in adapted_layers(model).items():
        for other in (loaded, resumed):
            found = adapted_layers(other)[path]
            assert found.method == layer.method
            assert {k: a.dtype for k, a in found.p.items()} == {k: a.dtype for k, a in layer.p.items()}
            assert all(np.array_equal(found.p[k], a) for k, a in layer.p.items())
        assert all(layer.p[k].dtype.kind == "i" for k in layer.method.integers)
    if name == "square":
        assert layer.p.rows.dtype == np.int32 and layer.p.columns.dtype == np.int64
        arrays = {n: to_host(p.data) for n, p in model.named_parameters() if ".arrays." in n}
        metadata = open_training(tmp_path / "training")[0].metadata | {"format": "minilora adapter 2"}
        for key, kind in (("columns", float), ("M", int)):
            wrong = {n: a.astype(kind) if n.endswith(f"blocks.0.q.arrays.{key}") else a for n, a in arrays.items()}
            write_tensors(tmp_path / "wrong", wrong, metadata)
            with pytest.raises(AdapterFormatError, match=rf"arrays\.{key}.*its dtype is"):
                load_adapter(tmp_path / "wrong", tiny_model())


def changed(name, *pairs):
    text = (source.DROPPED_IN / f"{name}.py" if name != "lora" else source.path_of(name)).read_text(encoding="utf-8")
    for old, new in pairs:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


MISTAKES = {  # what is changed in a method file, and what is said about it
    "another size": ("square", 'return {"M": (m, m)}', 'return {"M": (m, self.r)}',
                     "init makes  M (trainable) is (6, 3) by shapes, and init makes (6, 6)"),
    "a forgotten array": ("square", '"slots": (m,), ', "", "slots (a buffer) is None by shapes, and init makes (6,)"),
    "forgotten integers": ("square", '"slots", "inputs")', '"slots")', "integers is ('columns', 'rows', 'slots'), "
                           "the integers that init makes are in ['columns', 'inputs', 'rows', 'slots']: inputs"),
    "docstring": ("square", "M (m, m), columns", "M (m, r), columns", "docstring has M (m, r), and shapes (6, 6)"),
    "kept": ("square", "backward: h (N, m)", "backward: h (N, 2 m)", "states h (N, 2 m); forward keeps h (5, 6)"),
    "letter": ("square", "backward: h (N, m)", "backward: h (N, k)", 'the axis "k" has the letter k; there are'),
    "no reason": ("marked", 'starts_elsewhere = "B', 'why = "B', "it does not, and starts_elsewhere is ''"),
    "a reason for nothing": ("lora", "    claims", '    starts_elsewhere = "x"\n    claims',
                             "it does, and starts_elsewhere is 'x'"),
    "factors": ("lora", "        return sB, p.A", "        return p.B, p.A", "merge(W, p) is not W + B @ A"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_check_says_what_a_file_gets_wrong(mistake, tmp_path):
    name, old, new, hint = MISTAKES[mistake]
    (tmp_path / "mine.py").write_text(changed(name, (old, new)), encoding="utf-8")
    assert hint in str(grade(tmp_path / "mine.py"))


@pytest.mark.parametrize(
    ("saved", "read", "stated"),
    [
        ("{\"x\": x.T, \"h\": h}", "dh.T @ saved.x.T", "x (d_in, N), h (N, r)"),
        ("{\"x\": x[::-1], \"h\": h}", "dh.T @ saved.x[::-1]", "x (N, d_in), h (N, r)"),
        ("{\"x\": x, \"h\": h, \"y\": y}", "dh.T @ saved.x", "x (N, d_in), h (N, r), y (N, d_out)"),
    ],
)  # fmt: skip
def test_backward_receives_just_what_forward_returned(saved, read, stated, tmp_path):
    """Views of x, and y itself, which the host must not write into; N = d_in gives x and its transpose one shape."""
    text = changed("lora", ("{\"x\": x, \"h\": h}", saved), ("dh.T @ saved.x", read),
                   ("backward: x (N, d_in), h (N, r)", f"backward: {stated}"))  # fmt: skip
    (tmp_path / "lora.py").write_text(text, encoding="utf-8")
    grades = grade(tmp_path / "lora.py")
    assert grades, grades
    method = source.load(text, "lora")(r=3)
    case = Case(method, text, *method_point(method, 7, 7, 6, at_init=False, seed=0))
    assert CHECKS["a layer with a bias does the same"](case) == ""


@pytest.mark.parametrize(
    ("axis", "expected"), [("N", 5), ("2 k", 8), ("r r", 9), ("r²", 9), ("2 r^3", 54), ("k·r", 12), ("7", 7)]
)
def test_the_length_of_an_axis(axis, expected):
    assert length(axis, {"N": 5, "k": 4, "r": 3}) == expected


@pytest.mark.quick
def test_no_file_outside_the_folder_names_a_method():
    package = source.path_of("lora").parents[1]
    for path in package.rglob("*.py"):
        if path.parent.name == "methods":
            continue
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        names = {n.value for n in nodes if isinstance(n, ast.Constant)}
        names |= {(n.module or "").rpartition(".")[2] for n in nodes if isinstance(n, ast.ImportFrom)}
        if path.name.startswith("peft"):  # a form of file, and a value of PEFT's init_lora_weights
            names -= {"lora", "pissa"}
        assert not names & set(METHODS), f"{path.name} names {names & set(METHODS)}"
