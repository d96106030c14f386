"""What is exactly true of each method and of no other: the papers' identities, and what follows from them."""

import numpy as np
import pytest

from minilora import adapt, methods
from minilora.engine import Saved
from minilora.nn import Linear, Module
from minilora.tools.gradcheck import check_method
from minilora.tools.trial import Trial, verdicts

pytestmark = pytest.mark.quick
every_method = pytest.mark.parametrize("name", methods.names())


def trial(name, **options):
    return Trial(methods.create(name, **methods.known(name, **{"r": 3, **options})))


def rank(matrix):
    return np.linalg.matrix_rank(matrix, tol=1e-9 * np.abs(matrix).max())


@every_method
def test_each_method_makes_one_to_three_claims_and_they_hold(name):
    claims = verdicts(name)
    assert 1 <= len(claims) <= 3
    assert all(claims.values()), claims


def test_a_claim_that_does_not_hold_is_seen():
    """The claims are not true of everything: each of LoRA-FA's that LoRA breaks is false for LoRA."""
    claims = methods.get("lora_fa").claims
    assert not claims["keeps no N × d_in array"](trial("lora"))
    assert not claims["what it keeps does not grow with d_in"](trial("lora"))
    assert not claims["A never moves"](trial("lora"))
    projected = methods.get("lora_fa_corrected").claims[
        "with SGD, W moves along the full gradient projected on the rows of A"
    ]
    assert not projected(trial("lora_fa"))
    assert not methods.get("dora").claims["each row of the merged weight has the length m"](
        type("Bent", (Trial,), {"merged": property(lambda t: 1.01 * t.method.merge(t.W, t.p))})(
            methods.create("dora", r=3)
        )
    )


# ---------------------------------------------------------------------------------------------------------- PiSSA


def test_pissa_takes_the_best_rank_r_approximation_out_of_w():
    t = trial("pissa")
    U, sigma, Vt = np.linalg.svd(t.W0)
    best = (U[:, :3] * sigma[:3]) @ Vt[:3]
    np.testing.assert_allclose(t.method.scaling * t.p.B @ t.p.A, best, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(np.linalg.svd(t.W)[1], [*sigma[3:], 0, 0, 0], atol=1e-10)


# ------------------------------------------------------------------------------------------------------------ VeRA


class Net(Module):
    def __init__(self):
        rng = np.random.default_rng(0)
        self.wide, self.tall = (Linear(rng.standard_normal(s).astype(np.float32)) for s in ((4, 9), (7, 5)))


def test_vera_layers_share_one_pair_of_matrices_counted_once():
    model = adapt(Net(), "vera", verbose=False, r=3)
    assert model.shared.A.shape == (3, 9) and model.shared.B.shape == (7, 3)
    assert np.shares_memory(model.wide.p.A, model.tall.p.A) and np.shares_memory(model.wide.p.B, model.tall.p.B)
    names = [name for name, _ in model.named_parameters()]
    assert names.count("shared.A") == 1 and not any(n.endswith("arrays.A") for n in names)
    assert sum(p.data.size for p in model.trainable().values()) == (3 + 4) + (3 + 7)


def test_vera_s_key_alone_draws_its_matrices():
    def draw(**options):
        return adapt(Net(), "vera", verbose=False, r=3, **options).shared.A.data

    assert (draw() == draw()).all() and not (draw() == draw(projection_prng_key=1)).all()
    assert (draw() == draw(seed=9)).all()  # not the run's seed
    bound = np.sqrt(6 / 9)  # Kaiming uniform with gain √2: √3 · √2 / √fan_in
    many = adapt(Net(), "vera", verbose=False, r=4000).shared.A.data
    assert np.abs(many).max() <= bound and many.std() == pytest.approx(bound / np.sqrt(3), rel=0.01)


# ------------------------------------------------------------------------------------------------------ Delta-LoRA


@pytest.mark.parametrize(("start", "adam"), [(0, True), (4, False)])
def test_delta_lora_telescopes_and_its_change_has_rank_2r_at_most(start, adam):
    t = trial("delta_lora", start_step=start).resized(N=20)
    lr = 0.01 if adam else 0.0001
    early, late = t.after(start, lr, adam), t.after(start + 12, lr, adam)
    lam, update = t.method.update_ratio, t.method.update
    np.testing.assert_allclose(
        late.W - t.W0, lam * (update(late.p.A, late.p.B) - update(early.p.A, early.p.B)), rtol=1e-12, atol=1e-14
    )
    assert rank(late.W - t.W0) == (3 if start == 0 else 6)
    assert rank(late.merged - t.W0) <= 6  # never high-rank, whatever the title says
    assert (early.W == t.W0).all()


def test_delta_lora_from_step_0_under_sgd_is_that_lora_at_a_smaller_rate():
    delta = trial("delta_lora", start_step=0, alpha=6.0, update_ratio=2.0).after(20, lr=0.003, adam=False)
    lora = trial("lora", alpha=18.0).after(20, lr=0.001, adam=False)
    np.testing.assert_allclose(delta.merged, lora.merged, rtol=1e-9, atol=1e-12)


def test_delta_lora_from_a_later_step_is_not():
    delta = trial("delta_lora", start_step=10, alpha=6.0).after(30, eps=1e-30)
    assert not np.allclose(delta.merged, trial("lora", alpha=18.0).after(30, eps=1e-30).merged, rtol=1e-3)


# ------------------------------------------------------------------------------------------------------------ DoRA


def test_dora_is_the_paper_s_equation_6():
    """dV = m / n (I − V Vᵀ / n²) G for each row, n = ‖V‖: orthogonal to V; the part along V, ⟨m / n G, V⟩, is m dm."""
    t = trial("dora").after(5, lr=0.1)
    V, G = t.W + t.method.scaling * t.p.B @ t.p.A, t.dW
    n = np.linalg.norm(V, axis=1)
    rows = zip(t.p.m / n, V / n[:, None], G, strict=True)
    dV = np.stack([ratio * (np.eye(len(v)) - np.outer(v, v)) @ g for ratio, v, g in rows])
    np.testing.assert_allclose(t.grads.B, t.method.scaling * dV @ t.p.A.T, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(t.grads.A, t.method.scaling * t.p.B.T @ dV, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose((dV * V).sum(axis=1), 0.0, atol=1e-12 * np.abs(dV).max() * np.abs(V).max())
    np.testing.assert_allclose(t.p.m / n * (G * V).sum(axis=1), t.p.m * t.grads.m, rtol=1e-10, atol=1e-12)


def test_the_detached_gradient_is_not_the_gradient_of_the_loss():
    method = methods.create("dora_detached", r=3)
    object.__setattr__(method, "surrogate", lambda x, W, p, at: method.forward(x, W, p)[0])
    report = check_method(method)
    assert {row.array for row in report.rows if not row.ok} == {"A", "B"}  # x and m are the same either way


@pytest.mark.parametrize("name", ["dora", "dora_detached"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_row_of_zeros_gives_no_nan(name, dtype):
    method = methods.create(name, r=2)
    rng = np.random.default_rng(0)
    W = rng.standard_normal((4, 5)).astype(dtype)
    W[1] = 0.0
    trainable, _ = method.init(W, rng, {})
    p = Saved((k, v.astype(dtype)) for k, v in trainable.items())
    for B in (p.B, rng.standard_normal(p.B.shape).astype(dtype)):  # at the start, and after B has moved
        p["B"] = B
        x, dy = rng.standard_normal((3, 5)).astype(dtype), rng.standard_normal((3, 4)).astype(dtype)
        y, saved = method.forward(x, W, p)
        dx, grads = method.backward(dy, Saved(saved), W, p)
        arrays = [y, dx, method.merge(W, p), *grads.values()]
        assert all(np.isfinite(a).all() for a in arrays) and (y[:, 1] == 0).all()
