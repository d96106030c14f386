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

from minilora import GPT, AdamW, GPTConfig, Tensor, adapt, backward, merge, merge_and_unload, methods, no_grad, unmerge
from minilora.adapter import AdaptedLinear
from minilora.engine import Saved
from minilora.nn import Linear
from minilora.surgery import adapted_layers
from minilora.tools.gradcheck import check_method, method_point
from minilora.training.trainer import train

METHODS = methods.names()
SIZES = {"N": 5, "d_in": 7, "d_out": 6, "r": 3}  # all different, so that no axis can stand in for another
every_method = pytest.mark.parametrize("name", METHODS)


def create(name, **options):
    return methods.create(name, **methods.known(name, **{"r": SIZES["r"], **options}))


def point(method, at_init=False, dtype=np.float64, seed=0, **sizes):
    """(x, W, p, trainable names, dy) for ``method`` at SIZES or the given ones."""
    sizes = {**{k: SIZES[k] for k in ("N", "d_in", "d_out")}, **sizes}
    x, W, p, names, dy = method_point(method, at_init=at_init, seed=seed, **sizes)
    cast = lambda a: a.astype(dtype)
    return cast(x), cast(W), Saved((k, cast(v)) for k, v in p.items()), names, cast(dy)


def tiny_model(seed=0, dtype=np.float32):
    return GPT(GPTConfig(vocab_size=17, n_positions=8, n_embd=16, n_layer=2, n_head=2), rng=seed, dtype=dtype)


def tiny_batches(seed=0):
    rng = np.random.default_rng(seed)
    while True:
        ids = rng.integers(0, 17, (3, 9))
        yield ids[:, :-1], ids[:, 1:]


def digest(*arrays):
    h = hashlib.sha256()
    for a in arrays:
        h.update(np.ascontiguousarray(a).tobytes())
    return h.hexdigest()


# ------------------------------------------------------------------------------------------------- the gradients


@pytest.mark.quick
@every_method
@pytest.mark.parametrize("at_init", [False, True], ids=["random", "initial"])
@pytest.mark.parametrize(
    "sizes", [{}, {"N": 1}, {"d_in": 3, "d_out": 9}, {"d_in": 9, "d_out": 3}, {"d_in": 4, "d_out": 4}], ids=str
)
@pytest.mark.parametrize("rank", [1, 3])
def test_gradients_equal_finite_differences_and_the_complex_step(name, sizes, at_init, rank):
    sizes = {**{k: SIZES[k] for k in ("N", "d_in", "d_out")}, **sizes}
    report = check_method(create(name, r=rank), at_init=at_init, **sizes)
    assert report, report
    assert {row.array for row in report.rows} == {"x", *point(create(name, r=rank), **sizes)[3]}


@every_method
@settings(max_examples=25, deadline=None)
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
    text = source.path_of(name).read_text()
    broken = list(source.mutants(text))
    tagged = {t for t in source.tags(source.docstring_and_code(text)[1], "code") if t.startswith("B")}
    assert {description.split()[0] for description, _ in broken} == tagged  # no tagged line escapes
    for description, mutant in broken:
        method = source.load(mutant, name)(**methods.known(name, r=3))
        assert not check_method(method), f"{name}: the mutant {description} passes the gradient check"


class Mutant:
    """A method with its backward, or what it saved, spoilt; in all else the method."""

    def __init__(self, method, spoil_grads=None, spoil_saved=None):
        self.method, self.spoil_grads, self.spoil_saved = method, spoil_grads, spoil_saved

    def __getattr__(self, name):
        return getattr(self.method, name)

    def backward(self, dy, saved, W, p):
        saved = Saved(self.spoil_saved(saved, W, p)) if self.spoil_saved else saved
        dx, grads = self.method.backward(dy, saved, W, p)
        return self.spoil_grads(dx, dict(grads), dy, W, p) if self.spoil_grads else (dx, grads)


def spoilt_arrays(report):
    return {row.array for row in report.rows if not row.ok}


@pytest.mark.quick
@every_method
def test_a_transposed_gradient_is_seen(name):
    """All sizes are 4, so that a transpose has the right shape."""
    square = {"N": 4, "d_in": 4, "d_out": 4}
    turn = lambda dx, grads, *_: (dx.T, {k: g.T for k, g in grads.items()})
    method = create(name, r=4)
    matrices = {"x", *(k for k in point(method, **square)[3] if point(method, **square)[2][k].ndim == 2)}
    assert spoilt_arrays(check_method(Mutant(method, turn), **square)) == matrices


@pytest.mark.quick
@every_method
def test_a_forgotten_scale_is_seen(name):
    """Each gradient without its factor s, one at a time; where there is no alpha, without a factor of 2."""
    method = create(name)
    s = getattr(method, "scaling", 2.0)
    assert s != 1.0
    for key in point(method)[3]:
        forget = lambda dx, grads, *_, key=key: (dx, {**grads, key: grads[key] / s})
        assert spoilt_arrays(check_method(Mutant(method, forget))) == {key}


@pytest.mark.quick
@every_method
def test_a_missing_term_is_seen(name):
    """dx through W alone, without what the adapter adds."""
    method = create(name)
    assert spoilt_arrays(check_method(Mutant(method, lambda dx, grads, dy, W, p: (dy @ W, grads)))) == {"x"}


@pytest.mark.quick
@every_method
def test_what_another_batch_saved_is_seen(name):
    method = create(name)
    other = point(method, seed=5)[0]
    stale = lambda saved, W, p: method.forward(other, W, p)[1]
    report = check_method(Mutant(method, spoil_saved=stale))
    assert spoilt_arrays(report) and "x" not in spoilt_arrays(report)  # dx needs no input


@pytest.mark.quick
@every_method
def test_an_input_that_is_overwritten_after_forward_is_seen_where_it_is_kept(name):
    method = create(name)
    x, W, p, names, dy = point(method)
    right = method.backward(dy, Saved(method.forward(x, W, p)[1]), W, p)[1]
    _, saved = method.forward(x, W, p)
    x *= 0.5
    wrong = method.backward(dy, Saved(saved), W, p)[1]
    changed = {k for k in names if not np.array_equal(wrong[k], right[k])}
    keeps_x = any(np.shares_memory(a, x) for a in saved.values())
    assert bool(changed) == keeps_x


@pytest.mark.quick
@every_method
def test_backward_twice_is_bit_identical_and_leaves_everything_untouched(name):
    method = create(name)
    x, W, p, _, dy = point(method)
    _, saved = method.forward(x, W, p)
    saved = Saved(saved)
    before = digest(x, W, dy, *p.values(), *saved.values())
    dx1, grads1 = method.backward(dy, saved, W, p)
    dx2, grads2 = method.backward(dy, saved, W, p)
    assert np.array_equal(dx1, dx2)
    assert all(np.array_equal(grads1[k], grads2[k]) for k in grads1)
    assert digest(x, W, dy, *p.values(), *saved.values()) == before


@pytest.mark.quick
@every_method
def test_arrays_that_are_not_contiguous_give_the_same(name):
    method = create(name)
    x, W, p, _, dy = point(method)
    stretched = lambda a: (
        np.repeat(np.repeat(a, 2, axis=0), 2, axis=-1)[::2, ..., ::2] if a.ndim > 1 else np.repeat(a, 2)[::2]
    )
    loose = [stretched(x), np.asfortranarray(W), Saved((k, stretched(v)) for k, v in p.items()), stretched(dy)]
    assert not loose[0].flags.c_contiguous
    y1, saved1 = method.forward(x, W, p)
    y2, saved2 = method.forward(*loose[:3])
    np.testing.assert_allclose(y2, y1, rtol=1e-12, atol=1e-12)
    dx1, grads1 = method.backward(dy, Saved(saved1), W, p)
    dx2, grads2 = method.backward(loose[3], Saved(saved2), loose[1], loose[2])
    np.testing.assert_allclose(dx2, dx1, rtol=1e-12, atol=1e-12)
    for key in grads1:
        np.testing.assert_allclose(grads2[key], grads1[key], rtol=1e-12, atol=1e-12)


@pytest.mark.quick
@every_method
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_dtype_in_is_dtype_out(name, dtype):
    method = create(name)
    x, W, p, _, dy = point(method, dtype=dtype)
    y, saved = method.forward(x, W, p)
    dx, grads = method.backward(dy, Saved(saved), W, p)
    arrays = {"y": y, "dx": dx, "merged": method.merge(W, p), **saved, **grads}
    assert {k: a.dtype for k, a in arrays.items()} == dict.fromkeys(arrays, np.dtype(dtype))


# ---------------------------------------------------------------------------------------- what the file itself says


@pytest.mark.quick
@every_method
def test_equation_tags_of_docstring_and_code_are_the_same(name):
    docstring, code = source.docstring_and_code(source.path_of(name).read_text())
    stated = source.tags(docstring, "docstring")
    assert stated and len(stated) == len(set(stated))
    assert ("def forward" in code) == ("F1" in stated) and ("def backward" in code) == ("B1" in stated)
    assert sorted(source.tags(code, "code")) == sorted(stated)


@pytest.mark.quick
@every_method
def test_shape_comments_are_true_while_the_code_runs(name):
    method, seen = create(name), {}
    path = source.path_of(name)
    text = path.read_text()
    comments = source.shape_comments(text)
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
    for number, (shape, actual) in seen.items():
        stated = tuple(SIZES[d] if d in SIZES else int(d) for d in shape)
        assert stated == actual, f"{path.name}:{number} says {shape}, it is {actual}"


@pytest.mark.quick
@every_method
def test_forward_and_backward_lines_state_their_shapes(name):
    text = source.path_of(name).read_text()
    comments = source.shape_comments(text)
    for number, line in enumerate(text.splitlines(), 1):
        if "  # " in line and re.search(r"\b[FB]\d", line.rsplit("  # ", 1)[1]):
            assert number in comments, f"{name}:{number} has a tag and no shape"


@pytest.mark.quick
@every_method
def test_kept_names_and_shapes_are_those_of_the_docstring(name):
    method = create(name)
    x, W, p, _, _ = point(method)
    _, saved = method.forward(x, W, p)
    stated = source.kept(source.docstring_and_code(source.path_of(name).read_text())[0])
    assert {k: a.shape for k, a in saved.items()} == {k: tuple(SIZES[d] for d in s) for k, s in stated.items()}


@every_method
def test_kept_bytes_are_what_the_allocator_says(name):
    sizes = {"N": 400, "d_in": 192, "d_out": 160, "r": 8}
    method = create(name, r=8)
    _, W, p, _, _ = point(method, **{k: sizes[k] for k in ("N", "d_in", "d_out")})
    for _ in range(2):  # the first round pays for what Python itself keeps
        tracemalloc.start()
        x = np.ones((sizes["N"], sizes["d_in"]))
        y, _saved = method.forward(x, W, p)  # alive while we count
        del x, y
        grown = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
    stated = source.kept(source.docstring_and_code(source.path_of(name).read_text())[0])
    expected = sum(8 * int(np.prod([sizes[d] for d in shape])) for shape in stated.values())
    assert grown == pytest.approx(expected, rel=0.02)


@pytest.mark.quick
@every_method
def test_the_file_is_short_plain_and_holds_no_array(name):
    text = source.path_of(name).read_text()
    assert len(text.splitlines()) <= 120
    method = methods.get(name)
    assert dataclasses.is_dataclass(method) and method.__dataclass_params__.frozen
    assert all(f.type in (int, float, bool, str) for f in dataclasses.fields(method))
    tree = ast.parse(text)
    imported = {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    imported |= {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    assert imported <= {"math", "numpy", "dataclasses", "adapter", "lora"}, imported
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef) and function.name in ("forward", "backward", "merge", "after_step"):
            used = {n.id for n in ast.walk(function) if isinstance(n, ast.Name)}
            assert "np" not in used, f"{name}.{function.name} uses NumPy by name, so CuPy arrays could not pass"
            stores = [n for n in ast.walk(function) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)]
            assert not stores, f"{name}.{function.name} stores into an attribute"
    title = text.split('"""')[1].splitlines()[0]
    assert re.fullmatch(r"\S.*\.   .*\d{4}, arXiv \d{4}\.\d{5}.*", title) or name == "full"


# ------------------------------------------------------------------------------------------- merging and the host


@pytest.mark.quick
@every_method
def test_forward_equals_the_merged_weight(name):
    method = create(name)
    x, W, p, _, _ = point(method)
    y, _ = method.forward(x, W, p)
    merged = method.merge(W, p)
    np.testing.assert_allclose(y, x @ merged.T, rtol=1e-12, atol=1e-12)
    assert not np.allclose(merged, W)  # at a random point the method does something
    assert not any(np.shares_memory(merged, a) for a in [W, *p.values()])


@pytest.mark.quick
@every_method
def test_the_factors_if_there_are_any_make_the_update(name):
    method = create(name)
    _, W, p, _, _ = point(method)
    if (factors := method.factors(W, p)) is not None:
        B, A = factors
        np.testing.assert_allclose(W + B @ A, method.merge(W, p), rtol=1e-12, atol=1e-12)


def test_the_methods_without_factors_are_those_whose_update_is_of_full_rank():
    def rank(method):
        _, W, p, _, _ = point(method)
        return np.linalg.matrix_rank(method.merge(W, p) - W)

    full = [name for name in METHODS if create(name).factors(*point(create(name))[1:3]) is None]
    assert full == [name for name in METHODS if rank(create(name)) == min(point(create(name))[1].shape)]


@pytest.mark.quick
@every_method
def test_starts_as_the_base_model(name):
    method = create(name)
    x, original, _, _, _ = point(method, at_init=True)
    W = original.copy()  # init may change it where the method updates the base
    shared = Saved(method.init_shared([W.shape], np.random.default_rng(0)))
    trainable, buffers = method.init(W, np.random.default_rng(0), shared)
    assert method.updates_base or np.array_equal(W, original)
    y, _ = method.forward(x, W, Saved({**shared, **trainable, **buffers}))
    np.testing.assert_allclose(y, x @ original.T, rtol=1e-12, atol=1e-12)


@pytest.mark.quick
@every_method
def test_host_adds_the_bias_and_gives_the_methods_own_gradients(name):
    method = create(name)
    x, W, _, names, dy = point(method)
    rng = np.random.default_rng(1)
    bias = rng.standard_normal(SIZES["d_out"])
    shared = {k: Tensor(v) for k, v in method.init_shared([W.shape], rng).items()}
    layer = AdaptedLinear(Linear(W, bias), method, seed=0, shared=shared)
    for parameter in layer.arrays.trainable().values():
        parameter.data = parameter.data + rng.standard_normal(parameter.shape)
    p, input = layer.p, Tensor(x, requires_grad=True)
    y = layer(input)
    own_y, own_saved = method.forward(x, layer.base.W.data, p)
    assert not any(np.shares_memory(own_y, a) for a in own_saved.values())  # the host adds the bias in place
    np.testing.assert_array_equal(y.data, own_y + bias)
    assert set(y.node.saved) == set(own_saved)
    backward(y, dy)
    dx, grads = method.backward(dy, Saved(own_saved), layer.base.W.data, p)
    np.testing.assert_array_equal(input.grad, dx)
    assert list(layer.arrays.trainable()) == names
    for key, parameter in layer.arrays.trainable().items():
        np.testing.assert_array_equal(parameter.grad, grads[key])


def trained(name, steps=4):
    model = adapt(tiny_model(), name, verbose=False, **methods.known(name, r=2))
    train(model, AdamW(model.trainable(), 1e-2), tiny_batches(), steps)
    return model


@every_method
def test_training_moves_the_adapter_and_leaves_the_base_bit_identical(name):
    frozen = {n: p.data.copy() for n, p in tiny_model().named_parameters()}
    fresh, model = adapt(tiny_model(), name, verbose=False, **methods.known(name, r=2)), trained(name)
    for path, parameter in model.named_parameters():
        original = path.replace(".base.", ".")
        if original in frozen and not (methods.get(name).updates_base and path.endswith("base.W")):
            assert np.array_equal(parameter.data, frozen[original]), f"{name} changed {path}"
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


@every_method
def test_a_merged_model_refuses_to_train(name):
    model = trained(name, steps=1)
    merge(model)
    with pytest.raises(RuntimeError, match="unmerge"):
        model.loss(*next(tiny_batches()))


@every_method
def test_one_seed_gives_one_run_to_the_bit(name):
    first, second = trained(name), trained(name)
    other = adapt(tiny_model(), name, seed=1, verbose=False, **methods.known(name, r=2))
    assert all(np.array_equal(p.data, dict(second.named_parameters())[n].data) for n, p in first.named_parameters())
    if {"A"} <= set(other.trainable()):
        assert not np.array_equal(other.blocks[0].q.p.A, first.blocks[0].q.p.A)


def test_all_methods_draw_the_same_A():
    drawn = {}
    for name in METHODS:
        layer = adapt(tiny_model(), name, verbose=False, **methods.known(name, r=2)).blocks[1].up
        if "A" in layer.p and not layer.shared and type(layer.method).init is methods.get("lora").init:
            drawn[name] = digest(layer.p.A)
    assert len(set(drawn.values())) == 1


# ------------------------------------------------------------------------------------------- a new method is a file

NEW_METHOD = '''"""Scale: one number for each output.   A test, 2026, arXiv 0000.00000

  F1  y = (x Wᵀ) ∘ c             (N, d_out)

  B1  dc = Σ_N dy ∘ (x Wᵀ)       (d_out,)
  B2  dx = (dy ∘ c) W            (N, d_in)

Kept for backward: z (N, d_out)
"""

from dataclasses import dataclass

from ..adapter import Adapter


@dataclass(frozen=True)
class Scale(Adapter):
    def init(self, W, rng, shared):
        return {"c": W[:, 0] * 0.0 + 1.0}, {}

    def forward(self, x, W, p):
        z = x @ W.T  # (N, d_out)
        y = z * p.c  # (N, d_out) F1
        return y, {"z": z}

    def backward(self, dy, saved, W, p):
        dc = (dy * saved.z).sum(axis=0)  # (d_out,) B1
        dx = (dy * p.c) @ W  # (N, d_in) B2
        return dx, {"c": dc}

    def merge(self, W, p):
        return W * p.c[:, None]  # (d_out, d_in)
'''


@pytest.fixture
def with_new_method(tmp_path, monkeypatch):
    (tmp_path / "scale.py").write_text(NEW_METHOD)
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])
    yield
    sys.modules.pop("minilora.methods.scale", None)


def test_a_file_in_the_folder_is_a_method_everywhere(with_new_method, tmp_path, capsys):
    from minilora.cli import main
    from minilora.files.base import save_model

    assert "scale" in methods.names()
    for check in (
        test_each_tagged_backward_line_matters_and_the_check_sees_it,
        test_equation_tags_of_docstring_and_code_are_the_same,
        test_shape_comments_are_true_while_the_code_runs,
        test_kept_names_and_shapes_are_those_of_the_docstring,
        test_forward_equals_the_merged_weight,
        test_training_moves_the_adapter_and_leaves_the_base_bit_identical,
        test_merge_and_exact_unmerge,
    ):
        check("scale")
    assert main(["check", "scale"]) == 0
    assert main(["methods"]) == 0
    assert "scale: Scale: one number for each output" in capsys.readouterr().out
    base, out = str(tmp_path / "tiny.safetensors"), str(tmp_path / "out")
    save_model(base, GPT(GPTConfig(n_positions=32, n_embd=16, n_layer=1, n_head=2)))
    assert (
        main(["compare", "--base", base, "--methods", "scale", "lora", "--r", "2", "--steps", "2", "--out", out]) == 0
    )
    assert "| scale " in (tmp_path / "out" / "compare.md").read_text()
    assert main(["train", "scale", "--base", base, "--steps", "2", "--lr", "0.1", "--out", out]) == 0
    assert main(["train", "--resume", out]) == 0
    assert main(["export", out, str(tmp_path / "merged"), "--form", "merged", "--base", base]) == 0
    assert main(["diff", "full", "scale"]) == 0
    assert "+ dc = Σ_N dy ∘ (x Wᵀ)" in capsys.readouterr().out


@pytest.mark.quick
def test_no_file_outside_the_folder_names_a_method():
    package = source.path_of("lora").parents[1]
    for path in package.rglob("*.py"):
        if path.parent.name == "methods":
            continue
        strings = {n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant)}
        if path.name == "peft.py":  # a form of file, and a value of PEFT's init_lora_weights
            strings -= {"lora", "pissa"}
        assert not strings & set(METHODS), f"{path.name} names {strings & set(METHODS)}"
