"""A loss of one's own: an object with a value and its Hessian, or a root of that."""

from __future__ import annotations

from typing import Any

import pytest
from test_bad_input import refused

from gpu_hodlr.errors import ArgumentError, ShapeError

torch = pytest.importorskip("torch")

from test_output_losses import C, N, classes, close, drawn, hessian  # noqa: E402

from gpu_hodlr.networks.losses import read_loss  # noqa: E402


class LogCosh:
    """sum log cosh(o - t), by its root."""

    def value(self, outputs: Any, targets: Any) -> Any:
        return (outputs - targets).cosh().log().sum()

    def hessian_root(self, outputs: Any, targets: Any) -> Any:
        root = 1 / (outputs - targets).cosh()
        return torch.diag_embed(root.flatten(1)).reshape(len(root), -1, *root.shape[1:])


class LogCoshHessian:
    """The same by its products."""

    name = "log cosh"
    convex = True
    reduction = "sum"
    value = LogCosh.value

    def hessian_matmat(self, outputs: Any, targets: Any, z: Any) -> Any:
        return z / (outputs - targets).cosh() ** 2


class Softmax:
    """Cross entropy of class indices by a root of fewer rows: pairs of classes."""

    convex = True

    def value(self, outputs: Any, targets: Any) -> Any:
        return (outputs.logsumexp(1) - outputs.gather(1, targets[:, None])[:, 0]).sum()

    def hessian_matmat(self, outputs: Any, targets: Any, z: Any) -> Any:
        p = outputs.softmax(1)
        return p * (z - (p * z).sum(-1, keepdim=True))

    def hessian_root(self, outputs: Any, targets: Any) -> Any:
        """diag(p) - p p^T = sum over pairs of p_i p_j (e_i - e_j)(e_i - e_j)^T."""
        p = outputs.softmax(1)
        i, j = torch.triu_indices(C, C, 1)
        pairs = torch.eye(C, dtype=p.dtype)[i] - torch.eye(C, dtype=p.dtype)[j]
        return (p[:, i] * p[:, j]).sqrt()[:, :, None] * pairs

    def sample(self, outputs: Any, generator: Any, num: int) -> Any:
        return torch.multinomial(outputs.softmax(1), num, True, generator=generator).T

    def total(self, outputs: Any, targets: Any) -> float:
        return 7.0 * len(outputs)


OWN: dict[str, tuple[Any, Any, Any]] = {
    "root": (LogCosh(), drawn(N, C), drawn(N, C, seed=1)),
    "products": (LogCoshHessian(), drawn(N, C), drawn(N, C, seed=1)),
    "products, images": (LogCoshHessian(), drawn(N, 2, C), drawn(N, 2, C, seed=1)),
    "both": (Softmax(), drawn(N, C), classes(N)),
}


@pytest.mark.parametrize("name", OWN)
def test_own_losses(name: str):
    own, outputs, targets = OWN[name]
    loss = read_loss(own)
    loss.check(outputs, targets)
    assert loss.convex
    close(loss.value(outputs, targets), own.value(outputs, targets))
    size = outputs.numel()
    want = hessian(lambda z: own.value(z, targets), outputs)
    z = torch.eye(size, dtype=torch.float64).reshape(size, *outputs.shape)
    close(loss.hessian_matmat(outputs, targets, z).reshape(size, size), want)
    r = loss.root_size(outputs, targets)
    root = loss.hessian_root(outputs, targets)
    assert root.shape == (N, r, *outputs.shape[1:])
    flat = root.flatten(2)
    close(torch.block_diag(*(flat.mT @ flat)), want)
    w = drawn(2, N, r)
    pulled = loss.root_transpose_matmat(outputs, targets, w)
    close(pulled.flatten(2), (w[:, :, None] @ flat)[:, :, 0])


def test_what_it_says_of_itself():
    outputs, targets = drawn(N, C), classes(N)
    loss = read_loss(Softmax())
    assert (loss.name, loss.reduction, loss.total(outputs, targets)) == ("Softmax", "mean", 28.0)
    assert read_loss(Softmax(), "none").reduction == "none"
    loss = read_loss(LogCoshHessian())
    assert (loss.name, loss.reduction, loss.total(outputs, targets)) == ("log cosh", "sum", 4.0)
    assert read_loss(read_loss(LogCoshHessian()), "mean").factor(4.0) == 0.25


def test_own_samples():
    outputs = drawn(N, C)
    loss = read_loss(Softmax())
    got, want = (
        one.sampled_gradients(outputs, classes(N), torch.Generator().manual_seed(2), 3)
        for one in (loss, read_loss("cross_entropy"))
    )
    close(got, want)
    refused(
        ArgumentError,
        lambda: read_loss(LogCosh()).sampled_gradients(outputs, outputs, torch.Generator(), 1),
        "LogCosh must have sample",
    )


class WrongHessian(LogCoshHessian):
    def hessian_matmat(self, outputs: Any, targets: Any, z: Any) -> Any:
        return 2 * super().hessian_matmat(outputs, targets, z)


class WrongRoot(LogCosh):
    def hessian_root(self, outputs: Any, targets: Any) -> Any:
        return super().hessian_root(outputs, targets) ** 2


class WrongShape(LogCoshHessian):
    def hessian_matmat(self, outputs: Any, targets: Any, z: Any) -> Any:
        return super().hessian_matmat(outputs, targets, z).flatten(1)


class Mean(LogCosh):
    def value(self, outputs: Any, targets: Any) -> Any:
        return super().value(outputs, targets) / len(outputs)


class Coupled(LogCoshHessian):
    """Its value is a sum of halves; neighbours in a half depend on each other."""

    def value(self, outputs: Any, targets: Any) -> Any:
        return (outputs.reshape(-1, 2, C).sum(1) ** 2).sum()

    def hessian_matmat(self, outputs: Any, targets: Any, z: Any) -> Any:
        both = 2 * z.reshape(len(z), -1, 2, C).sum(2, keepdim=True)
        return both.expand(-1, -1, 2, -1).reshape(z.shape)


class NoScalar(LogCosh):
    def value(self, outputs: Any, targets: Any) -> Any:
        return super().value(outputs, targets).reshape(1)


class Detached(LogCosh):
    def value(self, outputs: Any, targets: Any) -> Any:
        return super().value(outputs.detach(), targets)


class OwnCheck(LogCosh):
    def check(self, outputs: Any, targets: Any) -> None:
        raise ShapeError("targets are not for OwnCheck")


REFUSED: dict[str, tuple[Any, Any, tuple[str, ...]]] = {
    "products": (ArgumentError, WrongHessian, ("log cosh: hessian_matmat", "differs by")),
    "root": (ArgumentError, WrongRoot, ("WrongRoot: hessian_root", "differs by")),
    "shape": (ShapeError, WrongShape, ("log cosh: hessian_matmat", "(2, 4, 3)", "(2, 12)")),
    "mean": (ArgumentError, Mean, ("Mean: its value", "sum over samples", "halves")),
    "coupled": (ArgumentError, Coupled, ("its value must be a sum over samples",)),
    "no scalar": (ArgumentError, NoScalar, ("NoScalar: its value", "scalar")),
    "no gradient": (ArgumentError, Detached, ("Detached: its value", "differentiate")),
    "own check": (ShapeError, OwnCheck, ("not for OwnCheck",)),
}


@pytest.mark.parametrize(("kind", "own", "words"), REFUSED.values(), ids=REFUSED)
def test_a_hessian_is_held_to_its_value(kind: Any, own: Any, words: tuple[str, ...]):
    loss = read_loss(own())
    refused(kind, lambda: loss.check(drawn(N, C), drawn(N, C, seed=1)), *words)


class NoHessian:
    value = LogCosh.value


class NothingSaid(NoHessian):
    hessian_matmat = LogCoshHessian.hessian_matmat


class Welsch:
    """Not convex: sum 1 - exp(-e^2 / 2)."""

    convex = False

    def value(self, outputs: Any, targets: Any) -> Any:
        return (1 - (-((outputs - targets) ** 2) / 2).exp()).sum()

    def hessian_matmat(self, outputs: Any, targets: Any, z: Any) -> Any:
        squares = (outputs - targets) ** 2
        return (1 - squares) * (-squares / 2).exp() * z


def test_what_must_be_said():
    refused(ArgumentError, lambda: read_loss(NoHessian()), "NoHessian", "hessian_matmat or hess")
    refused(ArgumentError, lambda: read_loss(NothingSaid()), "NothingSaid", "convex = True")
    refused(ArgumentError, lambda: read_loss(NoHessian), "the class NoHessian")


def test_not_convex():
    loss = read_loss(Welsch())
    outputs, targets = drawn(N, C), torch.zeros(N, C, dtype=torch.float64)
    loss.check(outputs, targets)
    assert not loss.convex
    want = hessian(lambda z: loss.value(z, targets), outputs)
    z = torch.eye(N * C, dtype=torch.float64).reshape(-1, N, C)
    close(loss.hessian_matmat(outputs, targets, z).reshape(N * C, -1), want)
    refused(
        ArgumentError,
        lambda: loss.hessian_root(outputs, targets),
        "Welsch is not convex in the outputs",
    )
