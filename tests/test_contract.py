"""The contract of a method file, held for every method that the registry finds; a new file joins by being there."""

import ast
import dataclasses
import hashlib
import re
import sys
import tracemalloc

import numpy as np
import pytest
import source
from hypothesis import given, settings
from hypothesis import strategies as st
from source import text_of

from minilora import GPT, AdamW, GPTConfig, adapt, merge, merge_and_unload, methods, no_grad, unmerge
from minilora.backend import to_host
from minilora.engine import Saved
from minilora.surgery import adapted_layers
from minilora.tools.contract import CHECKS, Case
from minilora.tools.gradcheck import check_method, method_point
from minilora.tools.methodfile import (
    code_tags,
    docstring_and_code,
    kept,
    length,
    shape_comments,
    sizes_of,
    stated_shapes,
)
from minilora.training.trainer import train

METHODS = methods.names()
SIZES = {"N": 5, "d_in": 7, "d_out": 6}  # and r = 3: all different, so that no axis can stand in for another
every_method = pytest.mark.parametrize("name", METHODS)


def create(name, **options):
    return methods.create(name, **methods.known(name, **{"r": 3, **options}))


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
def test_gradients_equal_finite_differences_and_the_complex_step(name):
    """Off the initial point; CHECKS has the initial point, and the same for one row."""
    for sizes in ({}, {"N": 1}, {"d_in": 3, "d_out": 9}, {"d_in": 9, "d_out": 3}, {"d_in": 4, "d_out": 4}):
        method = create(name, r=1 if sizes == {"N": 1} else 3)
        report = check_method(method, **{**SIZES, **sizes})
        assert report, report
        assert {row.array for row in report.rows} == {"x", *point(method, **sizes)[3]}


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
    tagged = {t for t in code_tags(docstring_and_code(text_of(name))[1]) if t.startswith("B")}
    assert {description.split()[0] for description, _ in broken} == tagged  # no tagged line escapes
    for description, mutant in broken:
        method = source.load(mutant, name)(**methods.known(name, r=3))
        assert not check_method(method, complex_step=False), (
            f"{name}: the mutant {description} passes the gradient check"
        )


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
    stated = kept(docstring_and_code(text_of(name))[0])
    expected = sum(8 * np.prod([length(axis, letters) for axis in shape]) for shape in stated.values())
    assert grown == pytest.approx(expected, rel=0.02)


@pytest.mark.quick
@every_method
def test_the_file_is_plain_and_holds_no_array(name):
    text, method = text_of(name), methods.get(name)
    assert dataclasses.is_dataclass(method) and method.__dataclass_params__.frozen
    assert stated_shapes(create(name)) or "forward" not in vars(method)
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


def trained(name, steps=4):
    model = adapt(tiny_model(), name, verbose=False, **methods.known(name, r=2))
    if steps:
        train(model, AdamW(model.trainable(), 1e-2), tiny_batches(), steps)
    return model


@every_method
def test_training_moves_the_adapter_and_leaves_the_base_bit_identical_twice(name):
    """A LostGradientWarning would be an error: each array that is trained receives a gradient."""
    frozen = {n: p.data.copy() for n, p in tiny_model().named_parameters()}
    fresh, model, again = (dict(trained(name, steps).named_parameters()) for steps in (0, 4, 4))
    for path, p in model.items():
        original = path.replace(".base.", ".")
        if original in frozen and not (methods.get(name).updates_base and path.endswith("base.W")):
            assert np.array_equal(p.data, frozen[original]), f"{name} changed {path}"
        assert np.array_equal(p.data, again[path].data), f"{path} depends on more than the seed"
        assert not (p.requires_grad and np.array_equal(p.data, fresh[path].data)), f"{name} trains nothing in {path}"


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


def test_all_methods_draw_the_same_A_and_each_seed_another():
    drawn = {0: set(), 1: set()}
    for name in METHODS:
        for seed, found in drawn.items():
            model = adapt(tiny_model(), name, seed=seed, verbose=False, **methods.known(name, r=2))
            layer = model.blocks[1].up
            if "A" in layer.p and not layer.shared and type(layer.method).init is methods.get("lora").init:
                found.add(hashlib.sha256(to_host(layer.p.A).tobytes()).hexdigest())
    assert len(drawn[0]) == len(drawn[1]) == 1 and drawn[0] != drawn[1]


@pytest.mark.quick
def test_no_file_outside_the_folder_names_a_method():
    package = source.path_of("lora").parents[1]
    for path in package.rglob("*.py"):
        if path.parent.name == "methods":
            continue
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        names = {n.value for n in nodes if isinstance(n, ast.Constant)}
        names |= {(n.module or "").rpartition(".")[2] for n in nodes if isinstance(n, ast.ImportFrom)}
        if path.name.startswith("peft"):  # a form of file, for users
            names -= {"lora"}
        assert not names & set(METHODS), f"{path.name} names {names & set(METHODS)}"
