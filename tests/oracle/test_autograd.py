"""torch's autograd and optimizers, in float64, as the judge of the hand-written gradients and of the update rules.

minilora's own checks differentiate numerically what minilora computes. Here nothing of minilora's differentiates:
torch takes each method's forward apart by itself, and the textbook formulas below are written from the papers alone.
"""

import math

import numpy as np
import pytest
from conftest import (
    STEPS,
    assert_close,
    copy_to_torch,
    make_batches,
    make_hosts,
    parameters_in_both,
    to_torch,
    torch_loss,
)

from minilora import SGD, AdamW, backward, methods
from minilora.engine import Saved
from minilora.nn import Parameter
from minilora.tools.gradcheck import method_point

torch = pytest.importorskip("torch", reason="needs torch and PEFT: pip install 'minilora[oracle]'")
pytestmark = pytest.mark.oracle

TOLERANCE = 1e-10  # relative to the largest entry; float64 leaves room for long sums, and for no wrong term
SIZES = [(5, 7, 6, 3), (1, 7, 6, 3), (5, 3, 9, 1), (4, 4, 4, 4), (64, 32, 48, 8)]  # N, d_in, d_out, r

at_each_point = pytest.mark.parametrize("at_init", [False, True], ids=["random", "initial"])
at_each_size = pytest.mark.parametrize("sizes", SIZES, ids=str)


def point(name, sizes, at_init):
    """(method, x, W, p, trained, dy) as arrays, and (x, W, p) as torch tensors that ask for the same gradients."""
    N, d_in, d_out, r = sizes
    method = methods.create(name, **methods.known(name, r=r, alpha=2.5 * r))
    x, W, p, trained, dy = method_point(method, N, d_in, d_out, at_init, seed=1)
    p = Saved((k, v.astype(np.float64)) for k, v in p.items())  # VeRA draws its matrices in float32, as PEFT does
    p_torch = Saved((k, to_torch(v, requires_grad=k in trained)) for k, v in p.items())
    return (method, x, W, p, trained, dy), (to_torch(x, requires_grad=True), to_torch(W), p_torch)


def assert_gradients_equal(method, x, W, p, trained, dy, x_torch, p_torch):
    """The backward of ``method`` against the gradients that autograd has left in the torch tensors."""
    _, saved = method.forward(x, W, p)
    dx, grads = method.backward(dy, Saved(saved), W, p)
    assert set(grads) == set(trained)
    assert_close(dx, x_torch.grad, TOLERANCE, "dx")
    for name in trained:
        assert_close(grads[name], p_torch[name].grad, TOLERANCE, f"d{name}")


# ------------------------------------------------------------------------------------------------------ each method


def lora(W, p, o):  # Hu et al. 2021, equation 3, and alpha / r from section 4.1
    return W + (o.alpha / o.r) * p.B @ p.A


def rslora(W, p, o):  # Kalajdzievski 2023: alpha / √r
    return W + (o.alpha / math.sqrt(o.r)) * p.B @ p.A


def vera(W, p, o):  # Kopiczko et al. 2024, equation 2: Λ_b B Λ_d A with diagonal matrices
    return W + torch.diag(p.b) @ p.B @ torch.diag(p.d) @ p.A


def dora(W, p, o):  # Liu et al. 2024, equation 5, a norm for each output
    V = lora(W, p, o)
    return p.m[:, None] * V / torch.linalg.vector_norm(V, dim=1, keepdim=True)


def dora_detached(W, p, o):  # section 4.3, equation 11
    V = lora(W, p, o)
    return p.m[:, None] * V / torch.linalg.vector_norm(V, dim=1, keepdim=True).detach()


TEXTBOOK = {  # the weight that takes W's place
    "full": lambda W, p, o: p.W,
    "lora": lora,
    "lora_fa": lora,
    "lora_plus": lora,
    "pissa": lora,
    "delta_lora": lora,
    "delta_lora_control": lambda W, p, o: W + (1 + o.update_ratio) * o.alpha / o.r * (p.B @ p.A),
    "rslora": rslora,
    "vera": vera,
    "dora": dora,
    "dora_detached": dora_detached,
}


@at_each_size
@at_each_point
@pytest.mark.parametrize("name", methods.names())
def test_backward_equals_autograd_through_the_own_forward_and_the_papers_formula(name, at_init, sizes):
    for judge in ("the own forward", *(("the paper",) if name in TEXTBOOK else ())):
        ours, (x, W, p) = point(name, sizes, at_init)
        method, *_, dy = ours
        if judge == "the paper":
            weight = TEXTBOOK[name](W, p, method)
            assert_close(method.merge(*ours[2:4]), weight, TOLERANCE, "the merged weight")
            y = torch.nn.functional.linear(x, weight)
        else:
            y = method.surrogate(x, W, p, at=Saved((k, v.detach()) for k, v in p.items()))
        assert_close(method.forward(*ours[1:4])[0], y, TOLERANCE, f"y by {judge}")
        y.backward(to_torch(dy))
        assert_gradients_equal(*ours, x, p)


@at_each_size
@at_each_point
def test_the_corrected_gradient_is_the_best_step_that_A_allows(at_init, sizes):
    """LoRA-FA version 2: dB minimises ‖s dB A − dW‖ over all dB; here by least squares, without (A Aᵀ)⁻¹."""
    (method, x_ours, W_ours, p_ours, _, dy), (x, W, p) = point("lora_fa_corrected", sizes, at_init)
    y = torch.nn.functional.linear(x, lora(W, p, method))
    y.backward(to_torch(dy))
    dW = to_torch(dy).T @ x.detach()
    s = method.alpha / method.r
    dB = torch.linalg.lstsq(s * p.A.T, dW.T).solution.T
    y_ours, saved = method.forward(x_ours, W_ours, p_ours)
    dx_ours, grads = method.backward(dy, Saved(saved), W_ours, p_ours)
    assert_close(y_ours, y, TOLERANCE, "y")
    assert_close(dx_ours, x.grad, TOLERANCE, "dx")
    assert_close(grads["B"], dB, TOLERANCE, "dB")


# --------------------------------------------------------------------------------------------------- the whole model


def test_loss_and_every_gradient_of_the_gpt_equal_those_of_a_torch_gpt():
    ours, theirs = make_hosts("gpt", np.float64)
    theirs.double()
    copy_to_torch(ours, theirs)
    inputs, targets = make_batches("gpt", np.float64, steps=1)[0]
    targets = targets.copy()
    targets[0, :3] = -100  # not counted, and the mean is over the rest
    loss, loss_torch = ours.loss(inputs, targets), torch_loss(theirs, inputs, targets)
    assert_close(ours(inputs).data, theirs(to_torch(inputs)), TOLERANCE, "logits")
    assert_close(loss.data, loss_torch, TOLERANCE, "loss")
    backward(loss)
    loss_torch.backward()
    rows = parameters_in_both(ours, theirs)
    assert len(rows) == len(dict(ours.named_parameters())) == 2 + 2 * 16 + 2
    for name, p, other in rows:
        # The bias of k adds the same to all scores of a query, which softmax does not see: 0 up to rounding.
        assert_close(p.grad, other.grad, TOLERANCE, name, scale=1.0 if name.endswith(".k.b") else None)


# ---------------------------------------------------------------------------------------------------- the optimizers

SHAPES = {"W": (3, 4), "b": (3,), "B": (5, 2), "scale": (1,)}
RATES = {"W": 1.0, "b": 0.5, "B": 16.0, "scale": 2.0}


def parameters():
    """Ours and theirs, by name, with the same random values."""
    rng = np.random.default_rng(0)
    ours = {k: Parameter(rng.standard_normal(shape), lr_scale=RATES[k]) for k, shape in SHAPES.items()}
    return ours, {k: torch.nn.Parameter(to_torch(p.data)) for k, p in ours.items()}


def assert_steps_equal(make_ours, make_theirs, tolerance=1e-12):
    ours, theirs = parameters()
    optimizer, optimizer_torch = make_ours(ours), make_theirs(theirs)
    rng = np.random.default_rng(1)
    for step in range(STEPS):
        for name, p in ours.items():
            gradient = rng.standard_normal(p.shape) * 2.0 ** (step % 5 - 3)
            p.node.grad += gradient
            theirs[name].grad = to_torch(gradient)
        optimizer.step()
        optimizer.zero()
        optimizer_torch.step()
        for name, p in ours.items():
            assert_close(p.data, theirs[name], tolerance, f"{name} after step {step + 1}")


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_equals_torchs_over_twenty_steps(weight_decay):
    """One group for each array: minilora scales the rate of each, and decays matrices only."""
    group = lambda k, p: {"params": [p], "lr": 0.02 * RATES[k], "weight_decay": weight_decay * (p.ndim == 2)}
    assert_steps_equal(
        lambda ours: AdamW(ours, lr=0.02, betas=(0.8, 0.95), eps=1e-6, weight_decay=weight_decay),
        lambda theirs: torch.optim.AdamW([group(*i) for i in theirs.items()], betas=(0.8, 0.95), eps=1e-6),
    )


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_equals_torchs_over_twenty_steps(momentum):
    """Without weight decay: torch adds it to the gradient, minilora applies it to the weight as AdamW does."""
    group = lambda k, p: {"params": [p], "lr": 0.02 * RATES[k]}
    assert_steps_equal(
        lambda ours: SGD(ours, lr=0.02, momentum=momentum),
        lambda theirs: torch.optim.SGD([group(*i) for i in theirs.items()], momentum=momentum),
    )


@pytest.mark.parametrize("factor", [0.25, 1.5], ids=["clipped", "shorter than the limit"])
def test_clipping_equals_torchs_up_to_its_epsilon(factor):
    """torch scales to clip · norm / (norm + 1e-6), minilora to clip: where it acts, the ratio is known exactly."""
    ours, theirs = parameters()
    rng = np.random.default_rng(2)
    gradients = {k: rng.standard_normal(shape) for k, shape in SHAPES.items()}
    norm = math.sqrt(sum((g * g).sum() for g in gradients.values()))
    optimizer = SGD(ours, lr=1.0, clip=factor * norm)
    before = {k: p.data.copy() for k, p in ours.items()}
    for name, p in theirs.items():
        p.grad = to_torch(gradients[name])
        ours[name].node.grad += gradients[name]
    norm_torch = torch.nn.utils.clip_grad_norm_(theirs.values(), factor * norm)
    assert_close(optimizer.step(), norm_torch.double(), 1e-12, "the norm")
    epsilon = 1.0 if factor > 1 else (norm + 1e-6) / norm
    for name, p in ours.items():
        moved = (before[name] - p.data) / RATES[name]
        assert_close(moved, theirs[name].grad * epsilon, 1e-12, f"the clipped gradient of {name}")
