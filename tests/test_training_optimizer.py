"""GaussNewton as an optimizer of torch, and what it refuses."""

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
from training_cases import digits, network, vector

import gpu_hodlr as gh
from gpu_hodlr import errors

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
        (
            lambda x, y: (lambda: x.sum(),),
            errors.ArgumentError,
            "a closure must .* got Tensor: loss",
        ),
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
