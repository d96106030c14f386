"""PEFT's add_weighted_adapter as the judge of combine(): "cat" is the weighted sum, and "linear" is something else.

Two adapters with the same random arrays in both libraries, on the GPT.
"""

import numpy as np
import pytest
from conftest import assert_close, copy_to_torch, make_batches, make_hosts, to_numpy, to_torch, torch_name

from minilora import Adapters
from minilora.engine import no_grad
from minilora.surgery import adapted_layers

REASON = "needs torch and PEFT: pip install 'minilora[oracle]'"
torch = pytest.importorskip("torch", reason=REASON)
peft = pytest.importorskip("peft", reason=REASON)
pytestmark = pytest.mark.oracle

NAMES = ("first", "second")
TARGETS = (["q", "v", "down"], ["q", "k", "v"])
TOLERANCE = {np.float32: 1e-6, np.float64: 1e-12}  # relative to the largest entry
every_case = pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])


def make_banks(dtype, ranks=(2, 2), methods=("lora", "lora"), targets=TARGETS):
    """(bank, PEFT model), each with the adapters of NAMES, random and alike; alpha is 6 and 5."""
    ours, theirs = make_hosts("gpt", dtype)
    theirs.to(torch.float32 if dtype is np.float32 else torch.float64)
    copy_to_torch(ours, theirs)
    bank, wrapped, rng = Adapters(ours), None, np.random.default_rng(3)
    rows = zip(NAMES, methods, ranks, (6, 5), targets, strict=True)
    for name, method, r, alpha, chosen in rows:
        bank.add(name, method, chosen, verbose=False, r=r, alpha=float(alpha))
        config = peft.LoraConfig(r=r, lora_alpha=alpha, target_modules=chosen, use_rslora=method == "rslora")
        if wrapped is None:
            wrapped = peft.get_peft_model(theirs, config, adapter_name=name, autocast_adapter_dtype=False)
        else:
            wrapped.add_adapter(name, config, autocast_adapter_dtype=False)
        wrapped.set_adapter(name)
        in_torch = dict(wrapped.named_parameters())
        for path, p in bank.model.trainable().items():
            p.data = (0.3 * rng.standard_normal(p.shape)).astype(dtype)
            other = in_torch["base_model.model." + torch_name(path).replace("default", name)]
            with torch.no_grad():
                other.copy_(to_torch(p.data))
    return bank, wrapped


def deltas(bank) -> dict:
    """The update of the active adapter, by path."""
    layers = adapted_layers(bank.model).items()
    return {path: layer.method.merge(0.0 * layer.base.W.data, layer.p) for path, layer in layers}


def torch_deltas(wrapped, name) -> dict:
    """The same for the adapter ``name`` of a PEFT model."""
    modules = wrapped.base_model.model.named_modules()
    return {path: to_numpy(m.get_delta_weight(name)) for path, m in modules if name in getattr(m, "lora_A", {})}


def with_cross_terms(bank, weights) -> dict:
    """What "linear" makes of adapters: (Σ √|w s| B_i) (Σ ±√|w s| A_i), the sign that of w."""
    A, B = {}, {}
    for name, w in weights.items():
        bank.use(name)
        for path, layer in adapted_layers(bank.model).items():
            root = np.sqrt(abs(w) * layer.method.scaling)
            A[path] = A.get(path, 0.0) + np.sign(w) * root * layer.p.A
            B[path] = B.get(path, 0.0) + root * layer.p.B
    return {path: (B[path] @ A[path]).astype(bank.model.trainable()[f"{path}.arrays.A"].dtype) for path in A}


# ------------------------------------------------------------------------------------------------------------ cat


@every_case
@pytest.mark.parametrize(
    ("second", "ranks", "weights"),
    [("lora", (2, 2), (0.7, 0.3)), ("lora", (3, 2), (0.7, -0.3)), ("rslora", (3, 2), (0.7, 0.3))],
    ids=str,
)
def test_cat_is_combine(dtype, second, ranks, weights):
    """The updates, and what the models compute with them; the layers that only one of the two adapts included."""
    bank, wrapped = make_banks(dtype, ranks, ("lora", second))
    bank.combine("sum", dict(zip(NAMES, weights, strict=True)))
    wrapped.add_weighted_adapter([*NAMES], list(weights), "sum", combination_type="cat")
    ours, theirs = deltas(bank), torch_deltas(wrapped, "sum")
    assert ours.keys() == theirs.keys()
    for path in ours:
        assert_close(ours[path], theirs[path], TOLERANCE[dtype], path)
    wrapped.set_adapter("sum")
    inputs, _ = make_batches("gpt", dtype, steps=2)[1]
    with no_grad(), torch.no_grad():
        assert_close(bank.model(inputs).data, wrapped(to_torch(inputs)), 5 * TOLERANCE[dtype], "output")


def test_cat_of_an_rslora_that_comes_first_is_too_large_by_the_root_of_the_rank():
    """The new adapter takes use_rslora from the first one, and so a factor √r that belongs to none of them."""
    bank, wrapped = make_banks(np.float64, methods=("rslora", "lora"))
    bank.combine("sum", dict.fromkeys(NAMES, 1.0))
    wrapped.add_weighted_adapter([*NAMES], [1.0, 1.0], "sum", combination_type="cat")
    theirs = torch_deltas(wrapped, "sum")
    for path, update in deltas(bank).items():
        assert_close(update * np.sqrt(wrapped.peft_config["sum"].r), theirs[path], 1e-12, path)


# --------------------------------------------------------------------------------------------------------- linear


@every_case
@pytest.mark.parametrize("weights", [(0.7, 0.3), (0.7, -0.3)], ids=str)
def test_linear_has_the_cross_terms_and_is_far_from_the_sum(dtype, weights):
    weights = dict(zip(NAMES, weights, strict=True))
    bank, wrapped = make_banks(dtype, targets=[TARGETS[0]] * 2)
    wrapped.add_weighted_adapter([*weights], [*weights.values()], "linear", combination_type="linear")
    theirs, formula = torch_deltas(wrapped, "linear"), with_cross_terms(bank, weights)
    bank.combine("sum", weights)
    exact = deltas(bank)
    assert theirs.keys() == formula.keys() == exact.keys()
    for path, update in theirs.items():
        assert_close(formula[path], update, max(TOLERANCE[dtype], 1e-7), path)  # PEFT's roots are float32 numbers
        assert np.linalg.norm(update - exact[path]) > 0.5 * np.linalg.norm(exact[path]), path
