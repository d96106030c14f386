"""The stand-in for CuPy is as strict as CuPy, with CuPy's names and keywords; a training on it waits once a step."""

import inspect
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import standin_cupy
from standin_cupy import IMPLICIT, LIBRARY, ndarray, waits

from minilora import GPT, AdamW, GPTConfig, adapt, backward, merge, methods, no_grad, train
from minilora.backend import fetch, to_host
from minilora.errors import InputError, TrainingStopped
from minilora.merging import unload

ROOT = Path(__file__).parents[2]


@pytest.fixture
def cupy(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", standin_cupy.module())
    waits.clear()
    return sys.modules["cupy"]


def in_the_library(code, **names):
    """The value of ``code`` as if it were in a file of minilora."""
    return eval(compile(code, str(LIBRARY / "pretend.py"), "eval"), {"np": np, **names})


# -------------------------------------------------------------------------------- what is refused to the library

MIXED = "Unsupported type <class 'numpy.ndarray'>"
REFUSED = {
    "np.asarray(x)": IMPLICIT,
    "np.sqrt(x)": IMPLICIT,
    "np.sum(x)": IMPLICIT,
    "x + h": MIXED,
    "x == h": MIXED,
    "x.__iadd__(h)": MIXED,
    "x.__setitem__(0, h)": MIXED,
    "h.__iadd__(x)": MIXED,
    "x[np.array([0, 1])]": MIXED,
    "x.fill(np.array(1.0))": MIXED,
    "xp.multiply(x, 2.0, out=h)": MIXED,
    "xp.exp(h)": MIXED,
    "xp.exp([1.0])": "Unsupported type <class 'list'>",
    "xp.add.at(x, 0, h)": MIXED,
    "xp.add.at(x.astype(complex), i, x)": "scatter_add only supports",
    "xp.matmul(x, x, axes=[(0, 1)] * 3)": "axes",
    "xp.concatenate([x, h])": MIXED,
    "xp.stack([1.0, 2.0])": "Unsupported type <class 'float'>",
    "x.sum(where=x > 0)": "where",
    "xp.zeros(3, device='cuda')": "device",
    "hash(x)": "unhashable",
}


@pytest.mark.parametrize("code", REFUSED)
def test_the_library_is_refused_what_cupy_refuses(cupy, code):
    with pytest.raises(TypeError, match=re.escape(REFUSED[code])):
        in_the_library(code, x=cupy.ones(3), h=np.ones(3), i=cupy.arange(3), xp=cupy)


def test_what_cupy_or_the_tables_do_not_have_is_missing(cupy):
    for code in ("xp.errstate", "xp.random", "xp.RawKernel", "x.std", "x.tobytes", "x.cumsum", "x.flat"):
        with pytest.raises(AttributeError):
            in_the_library(code, x=cupy.ones(3), xp=cupy)


def test_results_are_arrays_in_the_dtype_of_arrays(cupy):
    x = cupy.ones((2, 3), np.float32)
    for code in ("x.sum()", "x.max()", "x[0] @ x[0]", "-x.sum()", "xp.exp(x.sum())", "x[0, 0]"):
        y = in_the_library(code, x=x, xp=cupy)
        assert type(y) is ndarray and y.shape == () and y.dtype == np.float32
    for code in ("x * 2", "2.0 * x", "np.float32(2) * x", "xp.subtract(1.0, x)", "xp.where(x > 0, x, 0)"):
        y = in_the_library(code, x=x, xp=cupy)
        assert type(y) is ndarray and y.shape == (2, 3) and y.dtype == np.float32


def test_views_share_memory_and_name_its_owner_and_the_host_s_memory_is_never_shared(cupy):
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
def test_each_wait_is_recorded_where_it_happens(cupy, code):
    in_the_library("xp.exp(x[0] @ x.T).sum() + x.shape[0] + len(x)", x=cupy.ones((2, 2)), xp=cupy)
    assert not waits
    in_the_library(code, x=cupy.ones(()), xp=cupy)
    assert set(waits) == {str(LIBRARY / "pretend.py")}


# -------------------------------------------------------------------------------- its names and keywords are CuPy's


def signature_of_cupy(function):
    """The words in the signature of one of CuPy's functions; one that is compiled has it in its docstring."""
    try:
        words = str(inspect.signature(function))
    except ValueError:
        words = ""
    return set(re.findall(r"\w+", words + function.__doc__.partition("\n\n")[0]))


def test_every_name_and_keyword_is_cupy_s():
    real = pytest.importorskip("cupy", reason="compared where CuPy is installed: pip install 'minilora[kernels]'")
    for owner, table in ((real, standin_cupy.FUNCTIONS), (real.ndarray, standin_cupy.METHODS)):
        for name, keywords in table.items():
            function = getattr(owner, name)  # AttributeError: CuPy has no such name
            if type(function).__name__ not in ("ufunc", "_GUFunc"):  # they take out and dtype
                assert {*keywords.split()} <= signature_of_cupy(function), name
    for name in vars(standin_cupy.module()):
        assert hasattr(real, name) or name.startswith("__"), name
    for name in vars(ndarray):
        assert hasattr(real.ndarray, name) or name.startswith("__"), name
    assert callable(real.cuda.runtime.getDeviceCount) and callable(real.add.at) and callable(real.linalg.pinv)


# -------------------------------------------------------------------------------- the library on it


def model(name="lora", device="cuda", **config):
    gpt = GPT(GPTConfig(**{"vocab_size": 17, "n_positions": 8, "n_embd": 16, "n_layer": 1, "n_head": 2, **config}))
    gpt.to(device)
    return adapt(gpt, name, verbose=False, **methods.known(name, r=3)) if name else gpt


def batch(seed=0):
    ids = np.random.default_rng(seed).integers(0, 17, (4, 9))
    return ids[:, :-1], ids[:, 1:]


def run(gpt, optimizer, steps, **options):
    return train(gpt, optimizer, map(batch, range(steps)), steps=steps, progress=False, **options)


def arrays_of(gpt):
    return {k: to_host(p.data).copy() for k, p in gpt.named_parameters()}


def assert_same(there, here):
    for name, array in here.items():
        np.testing.assert_array_equal(to_host(there[name]), array, err_msg=name)


@pytest.mark.parametrize("name", methods.names())
def test_a_training_is_the_host_s_and_waits_once_a_step(cupy, name):
    losses = []
    for device in ("cpu", "cuda"):
        gpt = model(name, device)
        optimizer = AdamW(gpt.trainable(), 0.01, weight_decay=0.1, clip=1.0)
        waits.clear()
        losses.append(run(gpt, optimizer, 3, rng=np.random.default_rng(0), micro_batches=2).loss)
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    assert len(waits) == 3 + len(gpt.trainable())  # once in a run it looks for lost gradients
    assert [Path(file).name for file in waits[:2]] == ["backend.py"] * 2  # fetch
    tokens = [model(name, device).generate(batch()[0][:, :3], 4, 0.0) for device in ("cpu", "cuda")]
    np.testing.assert_array_equal(*tokens)


def test_the_page_s_python_runs(cupy):
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8"), re.DOTALL)
    names, small = {}, block.replace("batch=8, context=128", "batch=1, context=16")
    assert small != block
    exec(compile(small, "docs/gpu.md", "exec"), names)
    assert type(next(iter(names["model"].trainable().values())).data) is ndarray
    assert np.isfinite(names["history"].loss).all()


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_moves_nothing(cupy, value, where, monkeypatch):
    gpt = model()
    optimizer = AdamW(gpt.trainable(), 0.01)
    run(gpt, optimizer, 1)
    if where == "loss":
        gpt.norm.b.data[0] = value
    else:
        monkeypatch.setattr(optimizer, "squared_norm", lambda: cupy.full((), value, np.float32))
    before, state = arrays_of(gpt), {k: to_host(v).copy() for k, v in optimizer.state().items() if hasattr(v, "shape")}
    with pytest.raises(TrainingStopped, match=f"{where}.* is (inf|nan); lower the learning rate"):
        run(gpt, optimizer, 1, micro_batches=2)
    assert_same(arrays_of(gpt), before)
    assert_same(optimizer.state(), state)


def test_ids_are_checked_on_the_host_and_on_the_device(cupy):
    gpt, (ids, targets) = model(), batch()
    for there in (np.asarray, cupy.asarray):
        with pytest.raises(InputError, match="ids run from 17"):
            gpt.loss(there(np.full_like(ids, 17)), there(targets))
        with pytest.raises(InputError, match="every target is ignore_index"):
            gpt.loss(there(ids), there(np.full_like(ids, -100)))
    same = float(gpt.loss(cupy.asarray(ids), cupy.asarray(targets)).data)
    assert same == float(gpt.loss(ids, targets).data)


def test_a_model_moves_with_all_that_it_remembers(cupy):
    gpt = model("pissa", "cpu")
    merge(gpt)
    original = arrays_of(unload(model("pissa", "cpu")))
    gpt.to("cuda")
    with no_grad():
        assert type(gpt(batch()[0]).data) is ndarray
    assert all(type(p.data) is ndarray for _, p in unload(gpt).named_parameters())
    assert_same(arrays_of(gpt), original)
    gpt = model(None, "cpu")  # and a gradient that was added
    backward(gpt.loss(*batch()))
    backward(gpt.to("cuda").loss(*batch()))
    assert all(type(p.grad) is ndarray for p in gpt.trainable().values())


def test_numbers_are_fetched_together(cupy):
    assert fetch(1.5, np.float32(2.0), np.array(3.0)) == [1.5, 2.0, 3.0] and not waits
    assert fetch(cupy.full((), 4.0, np.float32), 1.0, cupy.full((), 5.0)) == [4.0, 1.0, 5.0]
    assert len(waits) == 1
