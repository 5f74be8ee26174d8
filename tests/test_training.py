"""GaussNewton against dense linear algebra, and as an optimizer of torch."""

import copy
import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from seeds import seeded
from torch import nn
from torch.nn.utils import parameters_to_vector

import gpu_hodlr as gh
from gpu_hodlr import errors


def network(dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Sequential:
    with seeded(seed):
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    return model.to(dtype)


def digits(dtype: torch.dtype = torch.float64, n: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    with seeded(1):
        x = torch.randn(n, 4, dtype=dtype)
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long()


def vector(model: nn.Module) -> np.ndarray:
    return parameters_to_vector(model.parameters()).detach().double().numpy().copy()


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
    assert optimizer.param_groups[0]["damping"] == pytest.approx(9.5)


def test_the_damping_rises_where_the_model_is_wrong_and_the_step_is_halved():
    model, params = steep()
    x = torch.ones(8, 2, dtype=torch.float64)
    optimizer = gh.GaussNewton(model, "mse", params, damping=1e-6)
    loss = optimizer.step(x, 5 * x)  # w = 4 of the model, log 5 of the loss
    assert loss == pytest.approx(16.0)
    assert optimizer.info.ratio < 0
    assert optimizer.info.length == 0.5
    assert optimizer.info.new_loss < 16.0
    assert optimizer.param_groups[0]["damping"] == pytest.approx(1e-6 / 0.95)
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
    """Least squares of a network that can be fitted: faster than linearly, to the last digits."""
    x, _ = digits()
    with torch.no_grad():
        y = network(seed=3)(x)
    model = network()
    optimizer = gh.GaussNewton(model, "mse", cg_steps=15, damping_decay=0.5)
    for _ in range(60):
        optimizer.step(x, y)
    assert optimizer.info.new_loss < 1e-12


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


# --- an optimizer of torch --------------------------------------------------------------------


def trained(steps: int, optimizer: Any, batches: list[Any], first: int = 0) -> list[float]:
    return [optimizer.step(*batches[i % len(batches)]) for i in range(first, first + steps)]


def batches() -> list[Any]:
    x, y = digits(torch.float32, 90)
    return [(x[i : i + 30], y[i : i + 30]) for i in (0, 30, 60)]


def test_reruns_have_the_same_bits_and_take_no_random_numbers():
    found = []
    for _ in range(2):
        model = network(torch.float32)
        state = torch.get_rng_state()
        losses = trained(8, gh.GaussNewton(model, "cross_entropy"), batches())
        assert torch.equal(state, torch.get_rng_state())
        found.append((losses, vector(model).tobytes()))
    assert found[0] == found[1]
    assert found[0][0][-1] < found[0][0][0]


@pytest.mark.parametrize("preconditioner", ["kronecker", "lowrank"])
def test_state_dict(preconditioner: str):
    """What goes on elsewhere has the same bits; of a compressed matrix, where it is made anew."""

    def made(model: nn.Module) -> gh.GaussNewton:
        return gh.GaussNewton(
            model, "cross_entropy", preconditioner=preconditioner, refresh_every=5
        )

    model, first = network(torch.float32), 5 if preconditioner == "lowrank" else 7
    optimizer = made(model)
    trained(first, optimizer, batches())
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = network(torch.float32, seed=5)
    other.load_state_dict(saved["model"])
    again = made(other)
    again.load_state_dict(saved["optimizer"])
    assert trained(4, optimizer, batches(), first) == trained(4, again, batches(), first)
    assert vector(model).tobytes() == vector(other).tobytes()


def test_a_copy_goes_on_alone():
    model = network(torch.float32)
    optimizer = gh.GaussNewton(model, "cross_entropy")
    trained(3, optimizer, batches())
    other_model, other = copy.deepcopy((model, optimizer))
    before = vector(model)
    losses = trained(3, other, batches(), 3)
    np.testing.assert_array_equal(vector(model), before)
    assert trained(3, optimizer, batches(), 3) == losses
    np.testing.assert_array_equal(vector(model), vector(other_model))


def test_closures_pairs_and_hooks():
    found = []
    x, y = digits()
    for given in ((x, y), ((x, y),), ([x, y],), (lambda: (x, y),)):
        model = network()
        optimizer = gh.GaussNewton(model, "cross_entropy")
        calls: list[int] = []
        optimizer.register_step_post_hook(lambda *_, calls=calls: calls.append(1))
        found.append((optimizer.step(*given), vector(model).tobytes(), len(calls)))
    assert len(set(found)) == 1
    assert found[0][2] == 1
    assert isinstance(optimizer, torch.optim.Optimizer)


def test_frozen_parameters_modes_and_gradients_stay():
    model = network(torch.float32)
    model[0].requires_grad_(False)
    model.train()
    frozen = model[0].weight.clone()
    optimizer = gh.GaussNewton(model, "cross_entropy")
    trained(3, optimizer, batches())
    assert torch.equal(model[0].weight, frozen)
    assert all(module.training for module in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert model[2].weight.requires_grad
    assert sum(p.numel() for p in optimizer.param_groups[0]["params"]) == 18


def test_what_changes_outside_is_seen():
    """Weights set by hand, and a layer that is frozen but not constant."""
    model, (x, y) = network(), digits()
    optimizer = gh.GaussNewton(model, "cross_entropy", params=["2.weight", "2.bias"])
    optimizer.step(x, y)
    with torch.no_grad():
        model[0].weight.mul_(-1.0)
        model[2].bias.add_(1.0)
    want = float(nn.functional.cross_entropy(model(x), y).detach())
    assert optimizer.step(x, y) == pytest.approx(want)


def test_a_convolution_is_trained_by_low_rank():
    with seeded():
        model = nn.Sequential(
            nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 2)
        ).eval()
        x = torch.randn(30, 1, 6, 6)
    y = (x.mean((1, 2, 3)) > 0).long()
    optimizer = gh.GaussNewton(model, "cross_entropy")
    losses = [optimizer.step(x, y) for _ in range(8)]
    assert losses[-1] < 0.5 * losses[0]
    assert "inputs_moment" not in optimizer.state[model[0].weight]


def test_layers_used_twice_are_trained_by_low_rank():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(torch.tanh(self.layer(x)))

    with seeded():
        model = Twice()
    x, _ = digits(torch.float32)
    optimizer = gh.GaussNewton(model, "mse")
    losses = [optimizer.step(x, torch.sin(x)) for _ in range(5)]
    assert losses[-1] < losses[0]
    with pytest.raises(errors.UnsupportedLayerError, match="called once"):
        gh.GaussNewton(model, "mse", preconditioner="kronecker").step(x, x)


def test_half_precision_is_computed_in_float32():
    model = network(torch.bfloat16)
    x, y = digits(torch.float32)
    optimizer = gh.GaussNewton(model, "cross_entropy")
    losses = [optimizer.step(x, y) for _ in range(5)]
    assert losses[-1] < losses[0]
    assert model[0].weight.dtype is torch.bfloat16


# --- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layer", [nn.BatchNorm1d(5), nn.Dropout(0.5), nn.BatchNorm1d(5, track_running_stats=False)]
)
def test_layers_that_depend_on_the_batch_or_chance(layer: nn.Module):
    model = nn.Sequential(nn.Linear(4, 5), layer, nn.Linear(5, 3)).double()
    x, y = digits()
    before = vector(model)
    with pytest.raises(errors.UnsupportedLayerError, match="layer 1"):
        gh.GaussNewton(model, "cross_entropy").step(x, y)
    np.testing.assert_array_equal(vector(model), before)
    assert model.training


def test_a_mode_that_changes_between_steps_is_seen():
    model = nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.Linear(5, 3)).double().eval()
    x, y = digits()
    optimizer = gh.GaussNewton(model, "cross_entropy")
    optimizer.step(x, y)
    model.train()
    with pytest.raises(errors.UnsupportedLayerError, match="Dropout"):
        optimizer.step(x, y)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"preconditioner": "diagonal"}, "preconditioner must be one of auto, kronecker"),
        ({"preconditioner": "kronecker", "rtol": 0.1}, "no option of compress, got rtol"),
        ({"damping": 0.0}, "damping must be > 0"),
        ({"damping_decay": 1.5}, "damping_decay must be <= 1"),
        ({"lr": -1.0}, "lr must be >= 0"),
        ({"weight_decay": math.nan}, "weight_decay must be"),
        ({"cg_steps": 0}, "cg_steps must be >= 1"),
        ({"curvature_samples": 0}, "curvature_samples must be >= 1"),
        ({"model_samples": 0}, "model_samples must be >= 1"),
        ({"refresh_every": 0}, "refresh_every must be >= 1"),
        ({"seed": -1}, "seed must be >= 0"),
        ({"params": ["3.weight"]}, "no parameter '3.weight'"),
        ({"reduction": "median"}, "reduction must be one of"),
    ],
)
def test_options(options: dict[str, Any], said: str):
    with pytest.raises(errors.ArgumentError, match=said):
        gh.GaussNewton(network(), "cross_entropy", **options)


def test_options_that_are_changed_later_are_checked():
    optimizer = gh.GaussNewton(network(), "cross_entropy")
    optimizer.param_groups[0]["lr"] = math.inf
    with pytest.raises(errors.ArgumentError, match="lr"):
        optimizer.step(*digits())


def test_options_of_compress_are_its_own():
    optimizer = gh.GaussNewton(network(), "cross_entropy", preconditioner="hss", rtoll=0.1)
    with pytest.raises(TypeError, match="rtoll"):
        optimizer.step(*digits())


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (lambda x, y: (x * math.nan, y), errors.ArgumentError, "NaN|finite"),
        (lambda x, y: (x, y + 7), errors.ArgumentError, "targets"),
        (lambda x, y: (x, y[:-1]), errors.ShapeError, "targets"),
        (lambda x, y: (x,), errors.ArgumentError, "targets are missing"),
        (lambda x, y: ([(x, y), (x, y)],), errors.GpuHodlrError, "inputs|targets"),
        (lambda x, y: (x[:, :3], y), errors.ArgumentError, "fails at the first sample"),
    ],
)
def test_data(change: Callable[..., Any], error: type[Exception], said: str):
    model = network()
    before = vector(model)
    with pytest.raises(error, match=said):
        gh.GaussNewton(model, "cross_entropy").step(*change(*digits()))
    np.testing.assert_array_equal(vector(model), before)


def test_later_batches_are_checked_as_well():
    x, y = digits()
    model = network()
    optimizer = gh.GaussNewton(model, "cross_entropy")
    optimizer.step(x, y)
    before = vector(model)
    with pytest.raises(errors.ArgumentError, match="targets"):
        optimizer.step(x, y + 7)
    with pytest.raises(errors.ArgumentError, match="NaN or infinite"):
        optimizer.step(x * math.inf, y)
    np.testing.assert_array_equal(vector(model), before)
    optimizer.step(x, y)


def test_a_loss_that_is_not_convex_in_the_outputs():
    class Cosine:
        convex = False

        def value(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return (outputs - targets).cos().sum()

        def hessian_matmat(self, outputs: Any, targets: Any, z: torch.Tensor) -> torch.Tensor:
            return -(outputs - targets).cos() * z

    with pytest.raises(errors.ArgumentError, match="not convex"):
        gh.GaussNewton(network(), Cosine())


def test_kronecker_needs_linear_layers():
    model = nn.Sequential(nn.Conv1d(1, 1, 1))
    with pytest.raises(errors.UnsupportedLayerError, match="Linear layers"):
        gh.GaussNewton(model, "mse", preconditioner="kronecker")
