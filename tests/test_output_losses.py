"""Losses: values against torch's, Hessians and roots against autograd, drawn gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
from test_bad_input import refused

from gpu_hodlr.errors import ArgumentError

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402, N812

from gpu_hodlr.networks.losses import read_loss  # noqa: E402

N, C, T = 4, 3, 5


def drawn(*shape: int, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def classes(*shape: int, most: int = C) -> Any:
    return torch.randint(most, shape, generator=torch.Generator().manual_seed(1))


def shares(*shape: int, seed: int = 2) -> Any:
    return drawn(*shape, seed=seed).sigmoid()


W = torch.tensor([1.0, 3.0, 0.2], dtype=torch.float64)
SPARSE = torch.tensor([[1, 2, -100, 0, 1], [1] * 5, [-100] * 5, [0, 0, -100, 2, 2]])
OFF = torch.tensor([[0.0, 0.9, -1.5], [4.0, -0.3, 1.1], [-0.1, -5.0, 0.0], [0.5, 2.0, 0.4]])
OFF = OFF.double()


class Case(NamedTuple):
    """What torch computes, with the same loss as a module."""

    module: Any
    outputs: Any
    targets: Any
    torch_order: Callable[[Any], Any] = lambda outputs: outputs  # as torch would have them


def tokens(**options: Any) -> Case:
    return Case(nn.CrossEntropyLoss(**options), drawn(N, T, C), SPARSE, lambda o: o.movedim(-1, 1))


CE, BCE, POISSON = nn.CrossEntropyLoss, nn.BCEWithLogitsLoss, nn.PoissonNLLLoss
GAUSS, HUBER, L1 = nn.GaussianNLLLoss, nn.HuberLoss, nn.SmoothL1Loss
LOG_P = drawn(N, C).log_softmax(1)
CASES: dict[str, Case] = {
    "mse": Case(nn.MSELoss(), drawn(N, C), drawn(N, C, seed=1)),
    "mse, images": Case(nn.MSELoss(), drawn(N, 2, 3, 2), drawn(N, 2, 3, 2, seed=1)),
    "mse, one output": Case(nn.MSELoss(), drawn(N), drawn(N, seed=1)),
    "mse, whole numbers": Case(nn.MSELoss(), drawn(N, C), classes(N, C)),
    "classes": Case(CE(), drawn(N, C), classes(N)),
    "classes, int32": Case(CE(), drawn(N, C), classes(N).int()),
    "weights": Case(CE(weight=W), drawn(N, C), classes(N)),
    "float32 weights": Case(CE(weight=W.float()), drawn(N, C), classes(N)),
    "ignored": Case(CE(ignore_index=1), drawn(N, C), classes(N)),
    "smoothing": Case(CE(label_smoothing=0.3), drawn(N, C), classes(N)),
    "ignored, weights and smoothing": Case(
        CE(ignore_index=1, weight=W, label_smoothing=0.3), drawn(N, C), classes(N)
    ),
    "probabilities": Case(CE(), drawn(N, C), drawn(N, C, seed=3).softmax(1)),
    "probabilities of any sum": Case(CE(), drawn(N, C), 2 * shares(N, C)),
    "probabilities, weights and smoothing": Case(
        CE(weight=W, label_smoothing=0.3), drawn(N, C), shares(N, C)
    ),
    "pixels": Case(CE(weight=W), drawn(N, C, 2, 3), classes(N, 2, 3)),
    "pixels, probabilities": Case(CE(), drawn(N, C, 2, 3), shares(N, C, 2, 3)),
    "pixels, all as many": Case(CE(), drawn(N, C, C), classes(N, C)),
    "tokens": tokens(),
    "tokens, all options": tokens(weight=W, label_smoothing=0.2),
    "tokens, another ignored": Case(
        CE(ignore_index=2), drawn(N, T, C), classes(N, T), lambda o: o.movedim(-1, 1)
    ),
    "large logits": Case(CE(), 300 * drawn(N, C), classes(N)),
    "binary": Case(BCE(), drawn(N, C), shares(N, C)),
    "binary, one output": Case(BCE(), drawn(N), classes(N, most=2).double()),
    "binary, many labels": Case(
        BCE(weight=W, pos_weight=2 * W.flip(0)), drawn(N, C), classes(N, C, most=2).double()
    ),
    "binary, a weight": Case(BCE(weight=torch.tensor([2.5])), drawn(N, C), classes(N, C, most=2)),
    "binary, large": Case(BCE(), 40 * drawn(N, C), shares(N, C)),
    "nll": Case(nn.NLLLoss(), LOG_P, classes(N)),
    "nll, all options": Case(nn.NLLLoss(weight=W, ignore_index=0), LOG_P, classes(N)),
    "nll, pixels": Case(nn.NLLLoss(), drawn(N, C, 2).log_softmax(1), classes(N, 2)),
    "poisson": Case(POISSON(), drawn(N, C), classes(N, C, most=5)),
    "poisson, full": Case(POISSON(full=True), drawn(N, C), classes(N, C, most=5).double()),
    "poisson, rates": Case(
        POISSON(log_input=False, full=True, eps=1e-3), shares(N, C), classes(N, C, most=5)
    ),
    "gaussian": Case(GAUSS(), drawn(N, C), (drawn(N, C, seed=1), shares(N, C))),
    "gaussian, a variance a sample": Case(
        GAUSS(full=True), drawn(N, C), (drawn(N, C, seed=1), shares(N, 1))
    ),
    "gaussian, without the axis": Case(GAUSS(), drawn(N, C), (drawn(N, C, seed=1), shares(N))),
    "gaussian, small variances": Case(
        GAUSS(eps=0.5), drawn(N, C), (drawn(N, C, seed=1), shares(N, C))
    ),
    "huber": Case(HUBER(delta=0.8), OFF, torch.zeros(N, C)),
    "smooth_l1": Case(L1(beta=0.7), OFF, torch.zeros(N, C)),
}


def of_torch(case: Case, outputs: Any, reduction: str) -> Any:
    module = copy.deepcopy(case.module).double()
    module.reduction = reduction
    targets = case.targets if isinstance(case.targets, tuple) else (case.targets,)
    indices = isinstance(module, (CE, nn.NLLLoss)) and not targets[0].is_floating_point()
    return module(
        case.torch_order(outputs), *(t.long() if indices else t.double() for t in targets)
    )


def hessian(function: Callable[[Any], Any], outputs: Any) -> Any:
    """Reverse over reverse, row by row."""
    x = outputs.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(x), x, create_graph=True)
    rows = [
        torch.autograd.grad(part, x, retain_graph=True, materialize_grads=True)[0].reshape(-1)
        for part in gradient.reshape(-1)
    ]
    return torch.stack(rows)


def close(got: Any, want: Any, tolerance: float = 1e-12) -> None:
    assert got.shape == want.shape
    assert (got - want).abs().max() <= tolerance * max(1.0, float(want.abs().max()))


every = pytest.mark.parametrize("name", CASES)


@every
def test_values(name: str):
    case = CASES[name]
    loss = read_loss(case.module)
    loss.check(case.outputs, case.targets)
    value = loss.value(case.outputs, case.targets)
    close(value, of_torch(case, case.outputs, "sum"))
    for reduction in ("mean", "sum"):
        case.module.reduction = reduction
        factor = read_loss(case.module).factor(loss.total(case.outputs, case.targets))
        close(factor * value, of_torch(case, case.outputs, reduction))


def log_p_of(case: Case) -> Callable[[Any], Any]:
    """The value in logits: the Hessian of nll is that of the logits before log_softmax."""
    if isinstance(case.module, nn.NLLLoss):
        return lambda z: of_torch(case, z.log_softmax(1), "sum")
    return lambda z: of_torch(case, z, "sum")


@every
def test_hessians(name: str):
    case = CASES[name]
    loss, size = read_loss(case.module), case.outputs.numel()
    want = hessian(log_p_of(case), case.outputs)
    own = hessian(lambda z: loss.value(z, case.targets), case.outputs)
    close(own, want)
    z = torch.eye(size, dtype=torch.float64).reshape(size, *case.outputs.shape)
    got = loss.hessian_matmat(case.outputs, case.targets, z)
    assert got.shape == z.shape
    close(got.reshape(size, size), want)
    root = loss.hessian_root(case.outputs, case.targets)
    r = loss.root_size(case.outputs, case.targets)
    assert root.shape == (N, r, *case.outputs.shape[1:])
    root = root.reshape(N, r, size // N)
    close(torch.block_diag(*(root.mT @ root)), want)
    w = drawn(2, N, r, seed=7)
    pulled = loss.root_transpose_matmat(case.outputs, case.targets, w)
    close(pulled.reshape(2, N, -1), (w[:, :, None] @ root)[:, :, 0])


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@every
def test_values_can_be_transformed(name: str):
    """Forward over reverse for many directions at once, and a sample at a time."""
    from torch.func import grad, jvp, vmap

    case = CASES[name]
    loss = read_loss(case.module)
    gradient = grad(lambda z: loss.value(z, case.targets))
    z = drawn(2, *case.outputs.shape, seed=9)
    got = vmap(lambda v: jvp(gradient, (case.outputs,), (v,))[1])(z)
    close(got, loss.hessian_matmat(case.outputs, case.targets, z), 1e-11)

    def alone(outputs: Any, targets: Any) -> Any:
        one = tuple(t[None] for t in targets) if isinstance(targets, tuple) else targets[None]
        return loss.value(outputs[None], one)

    close(vmap(alone)(case.outputs, case.targets).sum(), loss.value(case.outputs, case.targets))


@every
def test_float32(name: str):
    case = CASES[name]
    loss = read_loss(case.module)
    outputs = case.outputs.float()
    if name.startswith("nll"):
        outputs = outputs.log_softmax(1)
    loss.check(outputs, case.targets)
    z = drawn(2, *outputs.shape)
    got = loss.hessian_matmat(outputs, case.targets, z.float())
    assert got.dtype == torch.float32
    close(got.double(), loss.hessian_matmat(case.outputs, case.targets, z), 1e-4)
    assert loss.hessian_root(outputs, case.targets).dtype == torch.float32
    assert loss.value(outputs, case.targets).dtype == torch.float32


DRAWS = 20_000


@every
def test_drawn_gradients(name: str):
    """E g g^T is the Hessian; of a loss whose Hessian depends on the targets their mean Hessian."""
    case = CASES[name]
    if name in ("large logits", "binary, large"):
        pytest.skip("its gradients are nearly always zero")
    loss, size = read_loss(case.module), case.outputs.numel()
    g = loss.sampled_gradients(
        case.outputs, case.targets, torch.Generator().manual_seed(0), DRAWS
    ).reshape(DRAWS, size)
    targets = case.targets
    if name in ("poisson, rates", "huber", "smooth_l1"):
        targets = loss.sample(case.outputs, torch.Generator().manual_seed(1), DRAWS)
        want = loss.curvature(case.outputs.expand(DRAWS, N, C), targets).mean(0)
        want = want.reshape(-1).diag()
    else:
        z = torch.eye(size, dtype=torch.float64).reshape(size, *case.outputs.shape)
        want = loss.hessian_matmat(case.outputs, targets, z).reshape(size, size)
    moments = g.T @ g / DRAWS
    deviation = ((g**2).T @ (g**2) / DRAWS - moments**2).clamp(min=0).sqrt() / DRAWS**0.5
    off = (moments - want).abs() / (deviation + 1e-3 * want.abs().max())
    assert off.max() < 5
    drift = g.mean(0).abs() / (g.std(0) / DRAWS**0.5 + 1e-9)
    assert drift.max() < 5  # a likelihood's gradient has the mean 0


SAMPLED = [
    "mse",
    "mse, images",
    "mse, one output",
    "classes",
    "pixels, all as many",
    "binary",
    "nll",
    "poisson",
    "poisson, rates",
    "huber",
    "smooth_l1",
]


@pytest.mark.parametrize("name", SAMPLED)
def test_gradients_at_samples(name: str):
    """The same draws: where nothing weighs, gradients are those of the value at the samples."""
    case = CASES[name]
    loss = read_loss(case.module)
    first, second = (torch.Generator().manual_seed(3) for _ in range(2))
    got = loss.sampled_gradients(case.outputs, case.targets, first, 2)
    x = case.outputs.clone().requires_grad_()
    for g, y in zip(got, loss.sample(case.outputs, second, 2), strict=True):
        (want,) = torch.autograd.grad(loss.value(x, y), x)
        close(g, want)


def test_one_variance_of_all():
    outputs, target = drawn(N, C), drawn(N, C, seed=1)
    loss = read_loss(partial(F.gaussian_nll_loss, var=0.3, full=True, reduction="sum"))
    loss.check(outputs, target)
    want = F.gaussian_nll_loss(outputs, target, 0.3 * torch.ones(N, C).double(), full=True)
    close(loss.value(outputs, target) / (N * C), want, 1e-6)  # torch's default mean
    close(loss.hessian_matmat(outputs, target, outputs[None])[0], outputs / 0.3)
    samples = loss.sample(outputs, torch.Generator().manual_seed(0), DRAWS)
    assert abs(float((samples - outputs).var()) - 0.3) < 0.01


# Forms: names, torch's modules and functions


FUNCTIONS = {
    "mse": F.mse_loss,
    "cross_entropy": F.cross_entropy,
    "binary_cross_entropy_with_logits": F.binary_cross_entropy_with_logits,
    "nll": F.nll_loss,
    "poisson_nll": F.poisson_nll_loss,
    "gaussian_nll": F.gaussian_nll_loss,
    "huber": F.huber_loss,
    "smooth_l1": F.smooth_l1_loss,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_names_and_functions(name: str):
    for loss in (name, FUNCTIONS[name], partial(FUNCTIONS[name])):
        read = read_loss(loss)
        assert (read.name, read.reduction, read.convex) == (name, "mean", True)
        assert read_loss(loss, "sum").reduction == "sum"
        assert read_loss(read, "none").reduction == "none"
        assert read_loss(read) is read
    assert read_loss(partial(FUNCTIONS[name], reduction="sum")).reduction == "sum"


def test_options_of_functions():
    loss = read_loss(partial(F.cross_entropy, weight=W, ignore_index=1, label_smoothing=0.2))
    assert (loss.weight is W, loss.ignore_index, loss.label_smoothing) == (True, 1, 0.2)
    loss = read_loss(partial(F.smooth_l1_loss, beta=0.5, size_average=None))
    assert (loss.delta, loss.scale) == (0.5, 0.5)
    assert read_loss(partial(F.huber_loss, delta=0.5)).delta == 0.5


class Renamed(nn.HuberLoss):
    """A subclass that changes nothing."""


class Moved(nn.HuberLoss):
    """Its delta is another."""

    delta = property(lambda self: 7.0, lambda self, value: None)


class MyLoss(nn.Module):
    def forward(self, outputs: Any, targets: Any) -> Any:
        return ((outputs - targets) ** 2).mean()


def hooked() -> Any:
    loss = nn.HuberLoss()
    loss.register_forward_hook(lambda module, inputs, output: 2 * output)
    return loss


def wrapped(outputs: Any, targets: Any) -> Any:
    return F.mse_loss(outputs, targets)


wrapped.__name__ = wrapped.__qualname__ = "mse_loss"  # torch's name


def test_a_subclass_that_changes_nothing():
    assert read_loss(Renamed(delta=0.3)).delta == 0.3


UNKNOWN: dict[str, tuple[Any, str]] = {
    "another delta": (Moved(), "Moved, which changes what torch's HuberLoss computes"),
    "hooks": (hooked(), "HuberLoss with forward hooks"),
    "own module": (MyLoss(), "test_output_losses.MyLoss"),
    "another of torch's": (nn.L1Loss(), "L1Loss"),
    "a class": (nn.HuberLoss, "the class HuberLoss"),
    "torch's name": (wrapped, "the function mse_loss"),
    "another function": (F.l1_loss, "the function l1_loss"),
    "a name": ("MSELoss", "'MSELoss'"),
    "nothing": (None, "NoneType"),
    "a partial of another": (partial(F.l1_loss), "partial"),
}


@pytest.mark.parametrize(("loss", "said"), UNKNOWN.values(), ids=UNKNOWN)
def test_unknown_losses(loss: Any, said: str):
    refused(ArgumentError, lambda: read_loss(loss), "loss must be one of mse, cross_entropy", said)


WRONG_OPTIONS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "an option of another": (partial(F.mse_loss, weight=W), ("mse_loss", "reduction, got weight")),
    "by position": (partial(F.cross_entropy, drawn(2, 2)), ("cross_entropy", "by name")),
    "reduction": (partial(F.mse_loss, reduction="max"), ("mean, sum, none", "'max'")),
    "delta": (partial(F.huber_loss, delta=0.0), ("loss.delta", "> 0", "0.0")),
    "beta": (nn.SmoothL1Loss(beta=0.0), ("loss.beta", "> 0", "0.0")),
    "eps": (nn.PoissonNLLLoss(eps=0.0), ("loss.eps", "> 0")),
    "gaussian's eps": (partial(F.gaussian_nll_loss, eps=-1.0), ("loss.eps", "> 0", "-1.0")),
    "variance": (partial(F.gaussian_nll_loss, var=-1.0), ("loss.var", ">= 0", "-1.0")),
    "variances": (partial(F.gaussian_nll_loss, var=shares(N, C)), ("loss.var", "one number")),
    "smoothing": (partial(F.cross_entropy, label_smoothing=2.0), ("label_smoothing", "0 .. 1")),
}


@pytest.mark.parametrize(("loss", "words"), WRONG_OPTIONS.values(), ids=WRONG_OPTIONS)
def test_options_that_cannot_be(loss: Any, words: tuple[str, ...]):
    refused(ArgumentError, lambda: read_loss(loss), *words)
