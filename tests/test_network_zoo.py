"""Every network of the zoo: its matrices by the package, by autograd and by curvlinops."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from test_bad_input import refused

import gpu_hodlr as gh
from gpu_hodlr.errors import DtypeError, UnsupportedLayerError
from gpu_hodlr.testing import check_operator

torch = pytest.importorskip("torch")

from network_models import CASES, GPT  # noqa: E402
from network_zoo import (  # noqa: E402
    ZOO,
    Net,
    called,
    dense,
    ggn,
    parameters,
    randint,
    seeded,
)
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
        return gh.HessianOperator(*case.given, **both)
    return gh.FisherOperator(*case.given, kind=kind, **both)


BY_LAYERS = {
    "an mlp", "a held mlp", "frozen trunk", "one of two heads", "nll after log softmax",
    "own forward",
}  # fmt: skip


@pytest.mark.parametrize("entries", ["auto", "root", "dense", "none"])
@pytest.mark.parametrize("name", ZOO)
def test_gauss_newton(name: str, entries: str):
    want = dense(name, "ggn")
    case = ZOO[name]()
    before = [(id(p), p.requires_grad, p.detach().clone()) for p in case.model.parameters()]
    op = operator("ggn", case, entries=entries)
    check_operator(op, want)
    close(op @ np.eye(len(want)), want)
    close(op.diagonal(), want.diagonal())
    if entries != "auto":
        assert op.access == entries
    else:
        assert (op.access == "khatri-rao") == (name in BY_LAYERS)
    assert op.has_entries == (entries != "none")
    for p, (own, trained, values) in zip(case.model.parameters(), before, strict=True):
        assert (id(p), p.requires_grad) == (own, trained)
        assert torch.equal(p, values)


def test_a_root_of_many_outputs_is_not_chosen():
    """Of a language model it is 25,600 x 1,300 and multiplies ten times slower than torch."""
    model = seeded(GPT(vocabulary=100, width=8, length=8))
    tokens = randint(100, 32, 9)
    op = gh.GGNOperator(model, "cross_entropy", tokens[:, :-1], tokens[:, 1:])
    assert op.access == "none"


@pytest.mark.parametrize("entries", ["auto", "dense", "none"])
@pytest.mark.parametrize("name", ZOO)
def test_hessian(name: str, entries: str):
    want = dense(name, "hessian")
    if np.abs(want - want.T).max() > 1e-3 * np.abs(want).max():  # torch's own fault
        refused(UnsupportedLayerError, lambda: operator("hessian", ZOO[name]()), "not symmetric")
        return
    op = operator("hessian", ZOO[name](), entries=entries)
    assert not op.definite
    assert entries in ("auto", op.access)
    close(op @ np.eye(len(want)), want)
    close(op.diagonal(), want.diagonal())
    check_operator(op, want)


@pytest.mark.parametrize("entries", ["auto", "none"])
@pytest.mark.parametrize("name", ZOO)
def test_empirical_fisher(name: str, entries: str):
    want = dense(name, "empirical")
    op = operator("empirical", ZOO[name](), entries=entries)
    close(op @ np.eye(len(want)), want)


SAMPLES = 2000


@pytest.mark.parametrize("entries", ["root", "none"])
@pytest.mark.parametrize("name", ["gated", "gpt with classes last", "uneven batches"])
def test_sampled_fisher(name: str, entries: str):
    """Its mean over many draws is the Gauss-Newton matrix, weights and ignored tokens included."""
    want = dense(name, "ggn")
    op = operator("mc", ZOO[name](), samples=SAMPLES, entries=entries)
    got = op @ np.eye(len(want))
    close(got, got.T)
    off = np.linalg.norm(got - want) / np.linalg.norm(want)
    assert off < 0.15
    draw = operator("mc", ZOO[name](), entries=entries) @ np.eye(len(want))
    assert np.linalg.norm(draw - want) / np.linalg.norm(want) > 3 * off
    again = operator("mc", ZOO[name](), entries=entries) @ np.eye(len(want))
    np.testing.assert_array_equal(draw, again)
    other = operator("mc", ZOO[name](), entries=entries, seed=1) @ np.eye(len(want))
    assert np.abs(draw - other).max() > 1e-3 * np.abs(want).max()


def cast(tree: Any, kind: Any) -> Any:
    if isinstance(tree, (tuple, list)):
        return type(tree)(cast(x, kind) for x in tree)
    if isinstance(tree, dict):
        return {key: cast(x, kind) for key, x in tree.items()}
    return tree.to(kind) if torch.is_tensor(tree) and tree.is_floating_point() else tree


FEW = ["an mlp", "lenet", "transformer", "gpt transposed", "lstm", "variances"]


@pytest.mark.parametrize("entries", ["auto", "none"])
@pytest.mark.parametrize("name", FEW)
def test_float32(name: str, entries: str):
    case = ZOO[name]()
    case.model.float()
    single = replace(case, data=cast(case.data, torch.float32))
    op = operator("ggn", single, entries=entries)
    assert op.dtype == np.float32
    check_operator(op)
    close(op @ np.eye(op.shape[0], dtype=np.float32), dense(name, "ggn"), 1e-5)
    got = operator("hessian", single) @ np.eye(op.shape[0], dtype=np.float32)
    close(got, dense(name, "hessian"), 1e-5)
    got = operator("ggn", single, entries=entries, dtype=np.float64) @ np.eye(op.shape[0])
    close(got, dense(name, "ggn"), 1e-5)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FEW)
def test_half_precision(name: str, half: Any):
    """Computed in float32, or the type that is asked for, of the rounded weights and data."""
    case = ZOO[name]()
    case.model.to(half)
    halved = replace(case, data=cast(case.data, half))
    refused(DtypeError, lambda: operator("ggn", halved, dtype=half), "float32 or float64")
    single = operator("ggn", halved)
    assert single.dtype == np.float32
    assert f"of a model in {single.widened}" in repr(single)
    double = operator("ggn", halved, dtype=torch.float64) @ np.eye(single.shape[0])
    case.model.double()
    want = ggn(replace(case, data=cast(halved.data, torch.float64))).numpy()
    close(double, want)
    close(single @ np.eye(len(want), dtype=np.float32), want, 1e-4)


CURVED = ["groups normalized", "resnet", "transformer", "gpt transposed"]


@pytest.mark.parametrize("name", CURVED)
def test_the_oracle_by_differences(name: str):
    """Of gradients, for the layers that curvlinops does not have."""
    case = ZOO[name]()
    theta = parameters(case)
    before = torch.nn.utils.parameters_to_vector(theta).detach()
    want = dense(name, "hessian")
    v = torch.randn(len(want), 3, generator=torch.Generator().manual_seed(0)).double()

    def gradient(at: Any) -> Any:
        torch.nn.utils.vector_to_parameters(at.detach(), theta)
        value = sum(case.sum(case.pick(called(case.model, x)), y) for x, y in case.data)
        parts = torch.autograd.grad(value / case.divisor, theta)
        return torch.nn.utils.parameters_to_vector([part.contiguous() for part in parts])

    h = 1e-5
    columns = [(gradient(before + h * x) - gradient(before - h * x)) / (2 * h) for x in v.T]
    close(torch.stack(columns, 1).numpy(), want @ v.numpy(), 1e-6)


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


# What it does not have: forward mode of a layer's backward pass, targets that are a pair, unused
# parameters; its Hessian of LayerNorm is off by up to a half (`torch.func.hessian` of torch 2.13 on
# the CPU).
NOT_THEIRS = {
    ("groups normalized", "hessian"),
    ("resnet", "hessian"),
    ("transformer", "hessian"),
    ("gpt with classes last", "hessian"),
    ("gpt transposed", "hessian"),
    ("variances", "ggn"),
    ("variances", "hessian"),
    ("scattered", "ggn"),
    ("scattered", "hessian"),
}
SHARED = {name for name in ZOO if name not in CASES} | {"lenet", "resnet", "transformer", "lstm"}
THEIRS = [(n, k) for n in sorted(SHARED) for k in ("ggn", "hessian") if (n, k) not in NOT_THEIRS]


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
    "gated": nn.MSELoss(reduction="sum"),
    "lenet": nn.CrossEntropyLoss(reduction="sum"),
    "uneven batches of dicts": nn.CrossEntropyLoss(reduction="sum"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("slow_attention")
@pytest.mark.parametrize("name", EMPIRICAL)
def test_curvlinops_empirical_fisher(name: str):
    pytest.importorskip("curvlinops")
    case = ZOO[name]()
    close(theirs("empirical", case, EMPIRICAL[name]), dense(name, "empirical"))
