"""Steps of GaussNewton against dense linear algebra, its damping, and the age of its matrix."""

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from seeds import seeded
from torch import nn
from training_cases import digits, network, vector

import gpu_hodlr as gh


def gradient(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> np.ndarray:
    loss = nn.functional.cross_entropy(model(x), y)
    parts = torch.autograd.grad(loss, list(model.parameters()))
    return torch.cat([p.reshape(-1) for p in parts]).double().numpy()


def dense(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> np.ndarray:
    return gh.GGNOperator(model, "cross_entropy", x, y, entries="none").to_dense()


# --- the step --------------------------------------------------------------------------------


def test_one_step_of_a_quadratic_loss_is_its_minimum():
    with seeded():
        model = nn.Linear(4, 3).double()
    x, _ = digits()
    y = torch.sin(x[:, :3])
    gh.GaussNewton(model, "mse", damping=1e-20).step(x, y)
    augmented = np.c_[x.numpy(), np.ones(len(x))]
    want = np.linalg.lstsq(augmented, y.numpy(), rcond=None)[0]
    got = np.c_[model.weight.detach().numpy(), model.bias.detach().numpy()].T
    np.testing.assert_allclose(got, want, atol=1e-9)


@pytest.mark.parametrize("preconditioner", ["kronecker", "lowrank", "hss", "hodlr", "kfe"])
def test_enough_conjugate_gradients_solve_with_the_exact_matrix(preconditioner: str):
    model, (x, y), damping = network(), digits(), 0.03
    before, g, K = vector(model), gradient(model, x, y), dense(model, x, y)
    options = {} if preconditioner == "kronecker" else {"rtol": 0.3}
    optimizer = gh.GaussNewton(
        model, "cross_entropy", damping=damping, cg_steps=43, preconditioner=preconditioner,
        **options,
    )  # fmt: skip
    optimizer.step(x, y)
    assert optimizer.info.length == 1
    want = -np.linalg.solve(K + damping * np.eye(len(K)), g)
    np.testing.assert_allclose(vector(model) - before, want, atol=1e-7 * abs(want).max())


@pytest.mark.parametrize("momentum", [True, False])
def test_a_step_is_the_minimum_over_the_gradient_and_the_step_before(momentum: bool):
    """Of the exact quadratic model, for whatever the preconditioner makes of the gradient."""
    model, (x, y) = network(), digits()
    optimizer = gh.GaussNewton(
        model, "cross_entropy", damping=0.01, damping_decay=1.0, momentum=momentum
    )
    start = vector(model)
    optimizer.step(x, y)
    middle = vector(model)
    g, A = gradient(model, x, y), dense(model, x, y) + 0.01 * np.eye(len(start))
    optimizer.step(x, y)
    step, last = vector(model) - middle, middle - start
    residual = g + A @ step
    along = [abs(residual @ v) / np.linalg.norm(residual) / np.linalg.norm(v) for v in (step, last)]
    assert along[0] < 1e-9
    assert along[1] < 1e-9 if momentum else along[1] > 1e-3


def test_kronecker_factors_are_exact_of_one_layer():
    """Under squares G is constant, and A x G the matrix itself: the gradient's direction suffices.

    The shared damping is another than `damping` there, so it is small.
    """
    with seeded():
        model = nn.Linear(4, 3, bias=False).double()
    x, _ = digits()
    y = torch.cos(x[:, 1:])
    K = gh.GGNOperator(model, "mse", x, y).to_dense()
    loss = nn.functional.mse_loss(model(x), y)
    g = torch.autograd.grad(loss, model.weight)[0].reshape(-1).numpy()
    before = vector(model)
    gh.GaussNewton(model, "mse", damping=1e-14).step(x, y)
    np.testing.assert_allclose(vector(model) - before, -np.linalg.solve(K, g), rtol=1e-6)


def test_weight_decay_is_that_of_ridge_regression():
    with seeded():
        model = nn.Linear(4, 1, bias=False).double()
    x, _ = digits()
    y = x.sum(1, keepdim=True) ** 2
    optimizer = gh.GaussNewton(
        model, "mse", damping=1e-13, weight_decay=0.3, cg_steps=4, reduction="sum"
    )
    optimizer.step(x, y)
    X = x.numpy()
    want = np.linalg.solve(2 * X.T @ X + 0.3 * np.eye(4), 2 * X.T @ y.numpy())
    np.testing.assert_allclose(model.weight.detach().numpy().T, want, rtol=1e-8)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("preconditioner", ["lowrank", "kronecker"])
def test_some_samples_stand_for_all(reduction: str, preconditioner: str):
    """Half of a batch that has everything twice is the whole, whatever the reduction."""
    x, y = digits()
    steps = []
    for samples in (40, 80):
        model = network()
        before = vector(model)
        optimizer = gh.GaussNewton(
            model, "cross_entropy", damping=0.02, reduction=reduction, model_samples=samples,
            curvature_samples=40 if preconditioner == "kronecker" else samples, cg_steps=43,
            preconditioner=preconditioner,
        )  # fmt: skip
        optimizer.step(torch.cat([x, x]), torch.cat([y, y]))
        steps.append(vector(model) - before)
    np.testing.assert_allclose(*steps, atol=1e-8 * abs(steps[0]).max())


def test_a_batch_in_pieces_is_the_batch(monkeypatch: pytest.MonkeyPatch):
    found = []
    for together in (1000, 7):
        monkeypatch.setattr(
            "gpu_hodlr.networks.problem.Problem.together", property(lambda self, t=together: t)
        )
        model, (x, y) = network(), digits()
        optimizer = gh.GaussNewton(
            model, "cross_entropy", damping=0.01, cg_steps=43, preconditioner="lowrank"
        )
        optimizer.step(x, y)
        found.append(vector(model))
    np.testing.assert_allclose(*found, atol=1e-8)


def test_lr_multiplies_the_step_and_schedulers_change_it():
    model, (x, y) = network(), digits()
    half = copy.deepcopy(model)
    before = vector(model)
    gh.GaussNewton(model, "cross_entropy", damping=0.1).step(x, y)
    optimizer = gh.GaussNewton(half, "cross_entropy", damping=0.1, lr=0.5)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1)
    optimizer.step(x, y)
    np.testing.assert_allclose(vector(half) - before, 0.5 * (vector(model) - before), rtol=1e-9)
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05)


# --- damping, line search, the matrix's age ---------------------------------------------------


def steep() -> tuple[Callable[..., torch.Tensor], dict[str, torch.Tensor]]:
    """exp(w x): its quadratic model is far too hopeful where the target is large."""
    w = torch.zeros(2, dtype=torch.float64)
    return (lambda p, x: (x * p["w"]).exp()), {"w": w}


def test_the_ratio_is_the_decrease_over_that_of_the_model():
    model, (x, y), damping = network(), digits(), 0.05
    before, g, K = vector(model), gradient(model, x, y), dense(model, x, y)
    optimizer = gh.GaussNewton(model, "cross_entropy", damping=damping)
    optimizer.step(x, y)
    step, info = vector(model) - before, optimizer.info
    said = g @ step + 0.5 * step @ (K @ step + damping * step)
    after = float(nn.functional.cross_entropy(model(x), y).detach())
    assert info.new_loss == pytest.approx(after)
    assert info.ratio == pytest.approx((after - info.loss) / said)


def test_the_damping_falls_where_the_model_is_right():
    model, (x, y) = network(), digits()
    optimizer = gh.GaussNewton(model, "cross_entropy", damping=10.0)  # short steps
    optimizer.step(x, y)
    assert optimizer.info.ratio > 0.75
    assert optimizer.param_groups[0]["damping"] == pytest.approx(9.0)


def test_the_damping_begins_at_the_mean_of_the_diagonal_and_can_be_set():
    """Of one layer under squares the Kronecker factors have the exact diagonal."""
    with seeded():
        model = nn.Linear(4, 3).double()
    x, _ = digits()
    mean = gh.GGNOperator(model, "mse", x, x[:, :3]).diagonal().mean()
    optimizer = gh.GaussNewton(model, "mse")
    optimizer.step(x, x[:, :3])
    assert optimizer.info.damping == pytest.approx(mean)
    for damping, want in ((7.0, 7.0), (None, mean)):
        optimizer.param_groups[0]["damping"] = damping
        optimizer.step(x, x[:, :3])
        assert optimizer.info.damping == pytest.approx(want)
    assert not optimizer.info.refreshed


def test_the_damping_rises_where_the_model_is_wrong_and_the_step_is_halved():
    model, params = steep()
    x = torch.ones(8, 2, dtype=torch.float64)
    optimizer = gh.GaussNewton(model, "mse", params, damping=1e-6)
    loss = optimizer.step(x, 5 * x)  # w = 4 of the model, log 5 of the loss
    assert loss == pytest.approx(16.0)
    assert optimizer.info.ratio < 0
    assert optimizer.info.length == 0.5
    assert optimizer.info.new_loss < 16.0
    assert optimizer.param_groups[0]["damping"] == pytest.approx(1e-6 / 0.9)
    optimizer.step(x, 5 * x)
    assert optimizer.info.refreshed  # as the model failed


def test_a_step_that_only_harms_is_given_up():
    model, params = steep()
    x = torch.ones(8, 2, dtype=torch.float64)
    optimizer = gh.GaussNewton(model, "mse", params, damping=1e-6)
    optimizer.step(x, 2000 * x)  # w = 1999, and a 16th of it is too much by far
    assert optimizer.info.length == 0
    assert optimizer.info.new_loss == optimizer.info.loss
    assert not params["w"].any()
    assert optimizer.param_groups[0]["damping"] == pytest.approx(4e-6)
    assert not any("last_step" in state for state in optimizer.state.values())
    optimizer.step(x, 2000 * x)
    assert optimizer.info.refreshed


def test_the_matrix_lasts_for_some_steps():
    model, (x, y) = network(), digits()
    optimizer = gh.GaussNewton(model, "cross_entropy", damping=1.0, refresh_every=3)
    made = []
    for _ in range(7):
        optimizer.step(x, y)
        made.append(optimizer.info.refreshed)
    assert made == [True, False, False, True, False, False, True]


def test_training_ends_where_the_gradient_does():
    """Least squares of a network that can be fitted: the damping goes with the loss."""
    x, _ = digits()
    with torch.no_grad():
        y = network(seed=3)(x)
    model = network()
    optimizer = gh.GaussNewton(model, "mse", cg_steps=12, damping_decay=0.3)
    for _ in range(30):
        optimizer.step(x, y)
    assert optimizer.info.new_loss < 1e-9


def test_a_loss_at_its_minimum_stays():
    x, _ = digits()
    with torch.no_grad():
        y = network()(x)
    model = network()
    before = vector(model)
    optimizer = gh.GaussNewton(model, "mse")
    for _ in range(2):
        assert optimizer.step(x, y) < 1e-25
    np.testing.assert_allclose(vector(model), before, atol=1e-10)
    assert optimizer.step(x, y) < 1e-25


def test_layers_without_a_gradient_do_not_disturb():
    """All units of a layer are dead: its factors are 0."""
    with seeded():
        model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    with torch.no_grad():
        model[0].bias.fill_(-100.0)
    x, y = digits()
    losses = []
    optimizer = gh.GaussNewton(model, "cross_entropy")
    for _ in range(5):
        losses.append(optimizer.step(x, y))
    assert losses[-1] < losses[0]
