"""Every network of the zoo: its matrices by the package, by autograd and by curvlinops."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import gpu_hodlr as gh

torch = pytest.importorskip("torch")

from network_zoo import ZOO, Net, called, dense, parameters  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402

TOLERANCE = 1e-10

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")


def close(got: Any, want: Any, tolerance: float = TOLERANCE) -> None:
    assert got.shape == want.shape
    assert np.abs(got - want).max() <= tolerance * np.abs(want).max()


def operator(kind: str, case: Net, **options: Any) -> Any:
    both = {**case.options, **options}
    if kind == "ggn":
        return gh.GGNOperator(*case.given, **both)
    if kind == "hessian":
        both.pop("entries", None)
        return gh.HessianOperator(*case.given, **both)
    return gh.FisherOperator(*case.given, kind=kind, **both)


# curvlinops, a second oracle


class Picked(nn.Module):
    """What curvlinops calls: tensors or a dict in, predictions out."""

    def __init__(self, case: Net) -> None:
        super().__init__()
        self.model, self.pick = case.model, case.pick

    def forward(self, inputs: Any) -> Any:
        if isinstance(inputs, dict) and "0" in inputs:
            inputs = tuple(inputs.values())
        return self.pick(called(self.model, inputs))


class PlainSum(nn.Module):
    reduction = "sum"

    def __init__(self, case: Net) -> None:
        super().__init__()
        self.sum = case.sum

    def forward(self, outputs: Any, targets: Any) -> Any:
        return self.sum(outputs, targets)


def theirs(kind: str, case: Net, loss: Any) -> Any:
    import curvlinops

    def batch(inputs: Any) -> Any:
        pair = isinstance(inputs, tuple)
        return {str(i): x for i, x in enumerate(inputs)} if pair else inputs

    made = {
        "ggn": curvlinops.GGNLinearOperator,
        "hessian": curvlinops.HessianLinearOperator,
        "empirical": curvlinops.EFLinearOperator,
    }[kind](
        Picked(case),
        loss,
        parameters(case),
        [(batch(inputs), targets) for inputs, targets in case.data],
        check_deterministic=False,
        batch_size_fn=lambda x: len(next(iter(x.values())) if isinstance(x, dict) else x),
    )
    with sdpa_kernel(SDPBackend.MATH):
        return (made @ torch.eye(made.shape[1], dtype=torch.float64)).numpy() / case.divisor


# What it does not have: forward mode of a layer's backward pass, targets that are a pair; and its
# Hessian of LayerNorm is off by up to a half (`torch.func.hessian` of torch 2.13 on the CPU).
NOT_THEIRS = {
    ("groups normalized", "hessian"),
    ("resnet", "hessian"),
    ("transformer", "hessian"),
    ("gpt with classes last", "hessian"),
    ("gpt transposed", "hessian"),
    ("variances", "ggn"),
    ("variances", "hessian"),
}
THEIRS = [(n, k) for n in ZOO for k in ("ggn", "hessian") if (n, k) not in NOT_THEIRS]


@pytest.fixture
def slow_attention() -> Iterator[None]:
    """Fused attention in evaluation mode has no forward mode."""
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("slow_attention")
@pytest.mark.parametrize(("name", "kind"), THEIRS)
def test_curvlinops(name: str, kind: str):
    pytest.importorskip("curvlinops")
    case = ZOO[name]()
    close(theirs(kind, case, PlainSum(case)), dense(name, kind))


EMPIRICAL: dict[str, Any] = {
    "an mlp": nn.CrossEntropyLoss(reduction="sum"),
    "own forward": nn.MSELoss(reduction="sum"),
    "lenet with batchnorm": nn.CrossEntropyLoss(reduction="sum"),
    "uneven batches of dicts": nn.CrossEntropyLoss(reduction="sum"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("slow_attention")
@pytest.mark.parametrize("name", EMPIRICAL)
def test_curvlinops_empirical_fisher(name: str):
    pytest.importorskip("curvlinops")
    case = ZOO[name]()
    close(theirs("empirical", case, EMPIRICAL[name]), dense(name, "empirical"))
