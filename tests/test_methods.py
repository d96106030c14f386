"""What is exactly true of each method and of no other: the papers' identities, and what follows from them."""

import numpy as np
import pytest

from minilora import AdamW, adapt, methods
from minilora.engine import Saved
from minilora.nn import Linear, Module
from minilora.tools.gradcheck import check_method, method_point
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
    assert not methods.get("dora").claims["each row of the merged weight has the length m"](
        type("Bent", (Trial,), {"merged": property(lambda t: 1.01 * t.method.merge(t.W, t.p))})(
            methods.create("dora", r=3)
        )
    )


# --------------------------------------------------------------------------------------------------------- LoRA-FA


def test_corrected_gradient_is_the_least_squares_step():
    """argmin over D of ‖s D A − dW‖ is what B2 returns: NumPy's own least squares agrees."""
    t = trial("lora_fa_corrected")
    best, *_ = np.linalg.lstsq((t.method.scaling * t.p.A).T, t.dW.T, rcond=None)
    np.testing.assert_allclose(t.grads.B, best.T, rtol=1e-10, atol=1e-12)


def test_uncorrected_lora_fa_does_not_move_along_the_projected_gradient():
    """The control: without the correction the step is dW AᵀA, which is another direction."""
    t = trial("lora_fa")
    moved = t.after(1, lr=0.1, adam=False).merged - t.W0
    projected = t.dW @ np.linalg.pinv(t.p.A) @ t.p.A
    cosine = -(moved * projected).sum() / np.linalg.norm(moved) / np.linalg.norm(projected)
    assert cosine < 0.99


def test_adam_nearly_hides_the_correction():
    """An honest note on version 2: at a width of 768 almost all signs of Adam's first step are the same with it."""
    plain, corrected = (
        Trial(methods.create(n, r=8), N=40, d_in=768, d_out=64) for n in ("lora_fa", "lora_fa_corrected")
    )
    signs = np.sign(plain.grads.B) == np.sign(corrected.grads.B)
    assert 0.93 < signs.mean() < 1.0
    AAt = plain.p.A @ plain.p.A.T
    assert np.linalg.cond(AAt) < 2.0  # near a multiple of the identity, which is why


# ----------------------------------------------------------------------------------------------------------- LoRA+


def test_lora_plus_with_ratio_1_is_lora():
    assert (trial("lora_plus", lr_ratio=1.0).after(5).merged == trial("lora").after(5).merged).all()


# ------------------------------------------------------------------------------------------------- rsLoRA and PiSSA


def test_rslora_keeps_the_update_s_size_as_the_rank_grows():
    """After one Adam step of equal length, s ‖B A x‖ shrinks like 1/√r under alpha / r, and stays under alpha / √r."""

    def growth(name):
        sizes = [
            np.linalg.norm((t := Trial(methods.create(name, r=r), 4, 256, 256)).after(1).merged - t.W0) for r in (4, 64)
        ]
        return sizes[1] / sizes[0]

    assert growth("lora") == pytest.approx(1 / 4, rel=0.25)  # √(4 / 64)
    assert growth("rslora") == pytest.approx(1.0, rel=0.25)


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


@pytest.mark.parametrize("start", [0, 4])
@pytest.mark.parametrize("adam", [True, False])
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


def test_delta_lora_gives_each_model_its_own_w():
    net = Net()
    original = net.wide.W.data
    before = original.copy()
    model = adapt(net, "delta_lora", verbose=False, r=2, start_step=0)
    assert not np.shares_memory(model.wide.base.W.data, original)
    optimizer = AdamW(model.trainable(), 0.1)
    for _ in range(2):
        optimizer.grad += 1.0
        optimizer.step()
        model.after_step()
    assert not (model.wide.base.W.data == before).all() and (original == before).all()


# ------------------------------------------------------------------------------------------------------------ DoRA


def at_random(name, **sizes):
    method = methods.create(name, r=3)
    x, W, p, _, dy = method_point(method, **{"N": 5, "d_in": 7, "d_out": 6, **sizes}, at_init=False, seed=0)
    return method, x, W, p, dy


def full_gradient_of_V(p, V, dy, x):
    """DoRA's gradient of V by its equation 6, with (I − V Vᵀ / ‖V‖²) written out for each row."""
    n = np.linalg.norm(V, axis=1)
    G = dy.T @ x  # of the merged weight
    return np.stack(
        [p.m[i] / n[i] * (np.eye(V.shape[1]) - np.outer(V[i], V[i]) / n[i] ** 2) @ G[i] for i in range(len(V))]
    )


def test_dora_is_the_paper_s_equation_6_and_its_rows_are_orthogonal_to_v():
    method, x, W, p, dy = at_random("dora")
    V = W + method.scaling * p.B @ p.A
    dV = full_gradient_of_V(p, V, dy, x)
    _, grads = method.backward(dy, Saved(method.forward(x, W, p)[1]), W, p)
    np.testing.assert_allclose(grads["B"], method.scaling * dV @ p.A.T, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(grads["A"], method.scaling * p.B.T @ dV, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose((dV * V).sum(axis=1), 0.0, atol=1e-12 * np.abs(dV).max() * np.abs(V).max())


def test_the_inner_product_that_the_full_gradient_removes_is_m_times_dm():
    """c_i = ⟨g_i G_i, V_i⟩ = m_i dm_i: this is why the full gradient needs nothing that the detached one lacks."""
    method, x, W, p, dy = at_random("dora")
    V = W + method.scaling * p.B @ p.A
    n = np.linalg.norm(V, axis=1)
    c = ((p.m / n)[:, None] * (dy.T @ x) * V).sum(axis=1)
    _, grads = method.backward(dy, Saved(method.forward(x, W, p)[1]), W, p)
    np.testing.assert_allclose(c, p.m * grads["m"], rtol=1e-10, atol=1e-12)


def test_dora_and_its_detached_form_have_gradients_that_differ_in_direction():
    full, detached = (at_random(name) for name in ("dora", "dora_detached"))
    full, detached = (m.backward(dy, Saved(m.forward(x, W, p)[1]), W, p)[1] for m, x, W, p, dy in (full, detached))
    np.testing.assert_array_equal(full["m"], detached["m"])
    cosine = (full["A"] * detached["A"]).sum() / np.linalg.norm(full["A"]) / np.linalg.norm(detached["A"])
    assert 0.0 < cosine < 0.99


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
