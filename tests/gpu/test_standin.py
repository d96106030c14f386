"""The stand-in for CuPy is strict, its names and keywords are CuPy's, and a training step waits for the device once."""

import importlib
import inspect
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import standin_cupy
from standin_cupy import frames, kernels
from standin_cupy.array import IMPLICIT, ndarray

from minilora import GPT, SGD, AdamW, GPTConfig, adapt, backward, merge, methods, no_grad, pretrained
from minilora.backend import fetch, to_host
from minilora.errors import InputError, TrainingStopped
from minilora.surgery import unload
from minilora.tools.gradcheck import check_model, gradcheck
from minilora.training.loop import History
from minilora.training.trainer import evaluate, train

every_method = pytest.mark.parametrize("name", methods.names())


@pytest.fixture
def cupy(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", standin_cupy.module())
    frames.syncs.clear()
    return sys.modules["cupy"]


def in_the_library(code, **names):
    """The value of ``code`` as if it stood in a file of minilora."""
    return eval(compile(code, str(frames.LIBRARY / "pretend.py"), "eval"), {"np": np, **names})


# -------------------------------------------------------------------------------- what is refused to the library

REFUSED = {
    "np.asarray(x)": IMPLICIT,
    "np.array(x)": IMPLICIT,
    "np.sqrt(x)": IMPLICIT,
    "np.add(x, x)": IMPLICIT,
    "np.add.at(h, 0, x)": "Unsupported type",
    "np.sum(x)": IMPLICIT,
    "np.concatenate([x, x])": IMPLICIT,
    "np.isfinite(x).all()": IMPLICIT,
    "h[:].__setitem__(slice(None), x)": IMPLICIT,
    "x + h": "Unsupported type <class 'numpy.ndarray'>",
    "h + x": "Unsupported type",
    "h @ x": "Unsupported type",
    "x @ h": "Unsupported type",
    "x * np.array(2.0)": "Unsupported type",
    "x == h": "Unsupported type",
    "x.__iadd__(h)": "Unsupported type",
    "h.__iadd__(x)": "Unsupported type",
    "x.__setitem__(0, h)": "Unsupported type",
    "x[np.array([0, 1])]": "Unsupported type",
    "x.fill(np.array(1.0))": "Unsupported type",
    "xp.add(x, h)": "Unsupported type",
    "xp.multiply(x, 2.0, out=h)": "Unsupported type",
    "xp.exp(h)": "Unsupported type",
    "xp.exp([1.0])": "Unsupported type <class 'list'>",
    "xp.add.at(x, 0, h)": "Unsupported type",
    "xp.add.at(h, 0, x)": "Unsupported type",
    "xp.add.at(x.astype(complex), i, x)": "scatter_add only supports",
    "xp.matmul(x, h)": "Unsupported type",
    "xp.matmul(x, x, out=h)": "Unsupported type",
    "xp.matmul(x, x, axes=[(0, 1)] * 3)": "axes",
    "xp.concatenate([x, h])": "Unsupported type",
    "xp.stack([1.0, 2.0])": "Unsupported type",
    "xp.where(x > 0, h, x)": "Unsupported type",
    "xp.einsum('i,i->', x, h)": "Unsupported type",
    "xp.tile(h, 2)": "Unsupported type",
    "xp.zeros_like(h)": "Unsupported type",
    "x.sum(where=x > 0)": "where",
    "x.max(initial=0.0)": "initial",
    "xp.exp(x, where=x > 0)": "where",
    "xp.zeros(3, device='cuda')": "device",
    "hash(x)": "unhashable",
}  # fmt: skip


@pytest.mark.parametrize("code", REFUSED)
def test_what_cupy_refuses_is_refused_to_the_library(cupy, code):
    with pytest.raises(TypeError, match=re.escape(REFUSED[code])):
        in_the_library(code, x=cupy.ones(3), h=np.ones(3), i=cupy.arange(3), xp=cupy)


@pytest.mark.parametrize("name", ["errstate", "random", "testing", "RawKernel"])
def test_what_is_not_there_is_an_error(cupy, name):
    assert not hasattr(cupy, name)


@pytest.mark.parametrize("name", ["std", "tobytes", "cumsum", "flat"])
def test_what_the_array_has_not_the_library_does_without(cupy, name):
    assert not in_the_library("hasattr(x, name)", x=cupy.ones(3), name=name)


def test_a_test_is_served(cupy):
    x, h = cupy.arange(3.0), np.arange(3.0)
    np.testing.assert_array_equal(x, h)
    assert type(x + h) is np.ndarray and type(np.sqrt(x)) is np.ndarray and type(x + x) is ndarray
    assert x.sum() == pytest.approx(3.0) and f"{x.sum():.1f}" == "3.0" and x.std() == h.std()
    h += x
    assert h.tolist() == [0.0, 2.0, 4.0]


def test_a_reduction_is_an_array(cupy):
    x = cupy.ones((2, 3))
    for code in ("x.sum()", "x.max()", "x.mean()", "x.any()", "x[0] @ x[0]", "-x.sum()", "xp.exp(x.sum())", "x[0, 0]"):
        y = in_the_library(code, x=x, xp=cupy)
        assert type(y) is ndarray and y.shape == ()


def test_numbers_may_be_mixed_in(cupy):
    x = cupy.ones(3, np.float32)
    for code in ("x * 2", "2.0 * x", "np.float32(2) * x", "xp.subtract(1.0, x)", "xp.where(x > 0, x, 0)"):
        y = in_the_library(code, x=x, xp=cupy)
        assert type(y) is ndarray and y.dtype == np.float32


def test_views_share_memory_and_name_their_owner_and_the_host_s_memory_is_never_shared(cupy):
    h = np.ones((2, 3))
    x = cupy.asarray(h)
    for view in (x[0], x.T, x.reshape(6), x.ravel(), x.swapaxes(0, 1), x[:, 1:][0], x.view()):
        assert view.base is x
    assert cupy.asarray(x) is x and x.astype(np.float64, copy=False) is x and x.copy().base is None
    x[0] = 7.0
    assert (h == 1.0).all() and x.get()[0, 0] == 7.0
    assert np.isnan(cupy.empty(3).get()).all()  # what is read before it was written is seen


WAITS = ["float(x)", "int(x)", "bool(x)", "x.item()", "x.get()", "x.tolist()", "xp.asnumpy(x)", "f'{x:.1f}'"]


@pytest.mark.parametrize("code", [*WAITS, "1 if x else 0", "[*x.reshape(1)]", "1.0 in x.reshape(1)", "max(x, x)"])
def test_each_wait_is_counted_where_it_happens(cupy, code):
    in_the_library(code, x=cupy.ones(()), xp=cupy)
    assert frames.syncs and {file for file, _ in frames.syncs} == {str(frames.LIBRARY / "pretend.py")}


def test_what_does_not_wait_is_not_counted(cupy):
    in_the_library("xp.exp(x[0] @ x.T).sum() + x.shape[0] + len(x)", x=cupy.ones((2, 2)), xp=cupy)
    float(cupy.ones(()))  # a test's own
    assert not frames.syncs


# -------------------------------------------------------------------------------- its names and keywords are CuPy's


@pytest.fixture(scope="module")
def real_cupy():
    """CuPy itself, which can be imported and asked for its signatures without a GPU."""
    try:
        module = importlib.import_module("cupy")
    except ImportError:
        pytest.skip("CuPy is not installed: pip install cupy-cuda12x, then its signatures are compared without a GPU")
    return module


def keywords(function):
    """The names by which a function of Python takes arguments."""
    kinds = inspect.Parameter
    taken = inspect.signature(function).parameters.values()
    return {p.name for p in taken if p.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)} - {"self"}


def keywords_of_cupy(function):
    """The same of one of CuPy's, which is Python, or is compiled and says so in its docstring's first line."""
    if type(function).__name__ in ("ufunc", "_GUFunc"):
        return {"out", "casting", "dtype", "order"}
    try:
        found = keywords(function)
        if any(p.kind is p.VAR_KEYWORD for p in inspect.signature(function).parameters.values()):
            found |= set(re.findall(r"(\w+)=", function.__doc__.split("\n\n")[0] + inspect.getsource(function)))
            found |= set(re.findall(r"kwargs.pop\(['\"](\w+)", inspect.getsource(function)))
        return found
    except ValueError:
        return set(re.findall(r"(\w+)(?=[,=)])", function.__doc__.split("\n")[0].partition("(")[2])) | {"in_params"}


def test_every_function_and_keyword_is_cupy_s(real_cupy):
    standin = standin_cupy.module()
    for name, function in vars(standin).items():
        if name.startswith("__"):
            continue
        theirs = getattr(real_cupy, name)  # AttributeError: CuPy has no such name
        if inspect.isfunction(function):
            assert keywords(function) <= keywords_of_cupy(theirs), name
        elif isinstance(function, standin_cupy.Ufunc):
            assert {"out", "dtype"} <= keywords_of_cupy(theirs) and callable(theirs.at), name
    assert keywords(standin.linalg.pinv) <= keywords(real_cupy.linalg.pinv)
    assert callable(real_cupy.cuda.runtime.getDeviceCount)


def test_every_method_and_keyword_is_that_of_cupy_s_array(real_cupy):
    for name, value in vars(ndarray).items():
        if name.startswith("_") and not (name.startswith("__") and callable(value)):
            continue
        theirs = getattr(real_cupy.ndarray, name, None)
        if name in ("__getattr__", "__deepcopy__", "__reduce__", "__contains__", "__init__", "__module__"):
            continue
        assert hasattr(real_cupy.ndarray, name), name
        if inspect.isfunction(value) and not name.startswith("__"):
            assert keywords(value) <= keywords_of_cupy(theirs), name


@pytest.mark.parametrize("name", ["ElementwiseKernel", "ReductionKernel"])
def test_the_kernels_take_cupy_s_arguments(real_cupy, name):
    theirs = re.sub(r"\s", "", getattr(real_cupy, name).__doc__.split("\n\n")[0])
    for keyword in keywords(getattr(kernels, name)) - {"loop_prep", "after_loop"}:  # CuPy's **kwargs
        assert f"{keyword}" in theirs or keyword == "options", keyword


# -------------------------------------------------------------------------------- the library on it


def model(name="lora", device="cuda", **config):
    gpt = GPT(GPTConfig(**{"vocab_size": 17, "n_positions": 8, "n_embd": 16, "n_layer": 2, "n_head": 2, **config}))
    gpt.to(device)
    return adapt(gpt, name, verbose=False, **methods.known(name, r=3)) if name else gpt


def batch(seed=0):
    ids = np.random.default_rng(seed).integers(0, 17, (4, 9))
    return ids[:, :-1], ids[:, 1:]


def arrays_of(gpt):
    return {k: to_host(p.data).copy() for k, p in gpt.named_parameters()}


@pytest.mark.parametrize("micro_batches", [1, 2])
@every_method
def test_a_training_step_waits_for_the_device_once(cupy, name, micro_batches):
    gpt = model(name, dropout=0.1)
    optimizer, rng = AdamW(gpt.trainable(), 0.01, weight_decay=0.1, clip=1.0), np.random.default_rng(0)
    training_step(gpt, optimizer, *batch(), rng)
    for seed in range(3):
        frames.syncs.clear()
        loss, norm = training_step(gpt, optimizer, *batch(seed), rng, micro_batches=micro_batches)
        assert isinstance(loss, float) and isinstance(norm, float)
        assert [file.rpartition("/")[2] for file, _ in frames.syncs] == ["backend.py"]  # fetch


def test_a_step_launches_as_often_as_notebook_10_says(cupy, monkeypatch):
    text = (Path(__file__).parents[2] / "notebooks" / "10_gpu.py").read_text(encoding="utf-8")
    (said,) = re.findall(r"^LAUNCHES = (\d+)$", text, re.MULTILINE)
    array, gathers = sys.modules["standin_cupy.array"], []
    index_of, empty = array.index_of, cupy.empty

    def noted(index):
        if any(isinstance(part, ndarray) for part in (index if isinstance(index, tuple) else (index,))):
            gathers.append(index)
        return index_of(index)

    gpt = adapt(pretrained().to("cuda"), "lora", verbose=False)
    optimizer, ids = AdamW(gpt.trainable(), 5e-3), np.random.default_rng(0).integers(0, 96, (8, 129))
    # Memory that is only taken and views launch nothing: what a test's function passes on is not counted.
    monkeypatch.setattr(cupy, "empty", lambda *args, **options: empty(*args, **options))
    monkeypatch.setattr(array, "index_of", noted)
    before = frames.calls
    training_step(gpt, optimizer, ids[:, :-1], ids[:, 1:])
    assert frames.calls - before + len(gathers) == int(said)


def test_a_run_waits_once_for_each_step_and_once_to_look_for_lost_gradients(cupy):
    gpt = model()
    optimizer = AdamW(gpt.trainable(), 0.01)
    frames.syncs.clear()
    train(gpt, optimizer, (batch(seed) for seed in range(9)), steps=9, progress=False)
    assert len(frames.syncs) == 9 + len(gpt.trainable())


@every_method
def test_the_same_run_as_on_the_host(cupy, name):
    curves = []
    for device in ("cpu", "cuda"):
        gpt, history = model(name, device), History()
        optimizer = SGD(gpt.trainable(), 0.01, momentum=0.5)
        for seed in range(4):
            history.loss.append(training_step(gpt, optimizer, *batch(seed), history=history)[0])
        curves.append([*history.loss, evaluate(gpt, [batch(9)]), *gpt.generate(batch()[0][:, :3], 4, 0.0).ravel()])
    np.testing.assert_allclose(curves[1], curves[0], rtol=1e-5)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_loss_that_is_not_finite_moves_nothing(cupy, value):
    gpt = model()
    optimizer = AdamW(gpt.trainable(), 0.01)
    training_step(gpt, optimizer, *batch())
    gpt.norm.b.data[0] = value
    before, state = arrays_of(gpt), {k: np.array(to_host(v)) for k, v in optimizer.state().items()}
    with pytest.raises(TrainingStopped, match=r"the loss is (nan|inf); lower the learning rate or look at the data"):
        training_step(gpt, optimizer, *batch(), micro_batches=2)
    for k, a in arrays_of(gpt).items():
        np.testing.assert_array_equal(a, before[k])
    for k, a in optimizer.state().items():
        np.testing.assert_array_equal(to_host(a), state[k])
    assert not optimizer.grad.any()


def test_a_gradient_that_is_not_finite_moves_nothing(cupy, monkeypatch):
    gpt = model()
    optimizer = AdamW(gpt.trainable(), 0.01)
    before = arrays_of(gpt)
    monkeypatch.setattr(optimizer, "squared_norm", lambda: cupy.full((), math.inf, np.float32))
    with pytest.raises(TrainingStopped, match="the gradient's norm is inf; lower the learning rate"):
        training_step(gpt, optimizer, *batch())
    for k, a in arrays_of(gpt).items():
        np.testing.assert_array_equal(a, before[k])
    assert not optimizer.grad.any()


def test_ids_are_checked_on_the_host_and_on_the_device(cupy):
    gpt, (ids, targets) = model(), batch()
    for there in (lambda a: a, cupy.asarray):
        with pytest.raises(InputError, match="ids run from 17"):
            gpt.loss(there(np.full_like(ids, 17)), there(targets))
        with pytest.raises(InputError, match="cross_entropy: ids run from 17"):
            gpt.loss(there(ids), there(np.full_like(ids, 17)))
        with pytest.raises(InputError, match="every target is ignore_index"):
            gpt.loss(there(ids), there(np.full_like(ids, -100)))
    same = float(gpt.loss(cupy.asarray(ids), cupy.asarray(targets)).data)
    assert same == float(gpt.loss(ids, targets).data)


def test_an_adapted_model_moves_with_all_that_it_remembers(cupy):
    gpt = model("pissa", "cpu")
    merge(gpt)
    original = arrays_of(unload(model("pissa", "cpu")))
    gpt.to("cuda")
    with no_grad():
        merged = gpt(batch()[0]).data
    assert type(merged) is ndarray
    unload(gpt)
    for k, p in gpt.named_parameters():
        assert type(p.data) is ndarray, k
        np.testing.assert_array_equal(p.data, original[k])


def test_a_gradient_that_was_added_moves_too(cupy):
    gpt = model(None, "cpu")
    backward(gpt.loss(*batch()))
    backward(gpt.to("cuda").loss(*batch()))
    assert all(type(p.grad) is ndarray for p in gpt.trainable().values())


def test_the_gradient_check_computes_on_the_device(cupy):
    gpt = GPT(GPTConfig(vocab_size=7, n_positions=4, n_embd=4, n_layer=1, n_head=2), dtype=np.float64).to("cuda")
    ids = np.random.default_rng(0).integers(0, 7, (2, 4))
    report = check_model(gpt, ids, ids)
    assert report, report
    x = cupy.asarray(np.array([1.0, 2.0]))
    wrong = gradcheck(lambda x: (x * x).sum(), {"x": 3.0 * x}, {"x": x})
    assert not wrong and "factor 1.5" in wrong.rows[0].advice


def test_numbers_are_fetched_together(cupy):
    assert fetch(1.5, np.float32(2.0), np.array(3.0)) == [1.5, 2.0, 3.0] and not frames.syncs
    assert fetch(cupy.full((), 4.0, np.float32), 1.0, cupy.full((), 5.0)) == [4.0, 1.0, 5.0]
    assert len(frames.syncs) == 1
