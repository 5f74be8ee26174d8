"""Products of networks of Linear layers by their own formulas, against dense matrices."""

from typing import Any

import dense_oracles
import numpy as np
import pytest
from seeds import seeded

import gpu_hodlr as gh
from gpu_hodlr.devices import to_host

torch = pytest.importorskip("torch")
nn = torch.nn

from network_cases import NETWORKS, case, data, network  # noqa: E402
from network_zoo import dense_hessian  # noqa: E402

from gpu_hodlr.networks import khatri_rao, layer_hessian, layer_products, unit_products  # noqa: E402
from gpu_hodlr.networks.functional import Functional  # noqa: E402
from gpu_hodlr.networks.layer_hessian import LayerHessian  # noqa: E402
from gpu_hodlr.networks.modules import ELEMENTWISE  # noqa: E402
from gpu_hodlr.networks.unit_products import UnitProducts  # noqa: E402
from gpu_hodlr.networks.unit_root import UnitRoot  # noqa: E402

LOSSES = ("mse", "cross_entropy")
COLUMNS = (1, 3, 16, 70, 150)  # one; few; a GEMM a unit; threads share them; in two chunks


def close(got: Any, want: np.ndarray, tolerance: float = 1e-12) -> None:
    """Equal within `tolerance` of the largest entry."""
    got = np.asarray(got)
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * np.abs(want).max())


def check_products(op: Any, want: np.ndarray, tolerance: float = 1e-12) -> None:
    """For all ways that numbers of columns take; shares of the samples add up."""
    for columns in COLUMNS:
        v = np.random.default_rng(columns).standard_normal((len(want), columns)).astype(op.dtype)
        close(op @ v, want @ v, tolerance)
        close(sum(op.summand(i, 3) @ v for i in range(3)), want @ v, tolerance)


def hessian(given: tuple[Any, ...], **options: Any) -> gh.HessianOperator:
    """By the layers."""
    op = gh.HessianOperator(*given, entries="none", **options)
    assert isinstance(op._access, LayerHessian)
    return op


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", NETWORKS)
def test_gauss_newton_both_ways(name: str, loss: str, monkeypatch: pytest.MonkeyPatch):
    """By the units' root, and through the layers."""
    model, inputs, targets = case(name, loss)
    want = dense_oracles.ggn(model, dense_oracles.loss_function(loss, "mean"), inputs, targets)
    check_products(gh.GGNOperator(model, loss, inputs, targets), want)
    monkeypatch.setattr(khatri_rao, "BY_UNIT", 1000)
    check_products(gh.GGNOperator(model, loss, inputs, targets), want)


@pytest.mark.parametrize("by_unit", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_gemm_a_unit_and_one_for_all(name: str, by_unit: bool, monkeypatch: pytest.MonkeyPatch):
    """Of any number of columns; by the units' root, through the layers and of the Hessian."""
    for module in (layer_products, unit_products):
        monkeypatch.setattr(module, "by_unit", lambda *_: by_unit)
    model, inputs, targets = case(name, "cross_entropy")
    given = (model, "cross_entropy", inputs, targets)
    fisher = gh.FisherOperator(*given, kind="empirical", entries="khatri-rao")
    assert isinstance(fisher._access, UnitRoot)
    check_products(fisher, fisher.to_dense())  # by its entries
    loss = dense_oracles.loss_function("cross_entropy", "mean")
    check_products(gh.GGNOperator(*given), dense_oracles.ggn(model, loss, inputs, targets))
    check_products(hessian(given), dense_hessian(*given, {}))


def test_copies_pay_for_few_columns_of_many_samples():
    """One GEMM for all units up to a quarter as many columns as samples, and up to 15 always."""
    assert [layer_products.by_unit(columns, 256) for columns in (1, 63, 64)] == [False, False, True]
    assert [layer_products.by_unit(columns, 7) for columns in (1, 15, 16)] == [False, False, True]


def test_the_root_is_taken_where_it_is_less():
    """Of few outputs above wide layers; not of one layer, or of as many outputs as units."""
    with seeded():
        deep = nn.Sequential(
            nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 9), nn.Tanh(), nn.Linear(9, 2)
        ).double()
    for model, outputs, root in ((deep, 2, True), (network("wide output"), 10, False)):
        op = gh.GGNOperator(model, "mse", *data((6,), outputs, "mse"))
        assert isinstance(op._access._products(16), UnitProducts) is root
        assert not isinstance(op._access._products(15), UnitProducts)
    many = gh.GGNOperator(deep, "mse", *data((6,), 2, "mse", n=15_000))
    assert not isinstance(many._access._products(16), UnitProducts)
    v = np.random.default_rng(0).standard_normal((many.shape[0], 16))
    close(many @ v, np.column_stack([many @ v[:, i] for i in range(16)]))


class Beside(nn.Module):
    """Two layers side by side: no chain, but one that every sample goes through once."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.one, self.other, self.last = nn.Linear(6, 9), nn.Linear(6, 9), nn.Linear(9, outputs)

    def forward(self, x: Any) -> Any:
        return self.last(torch.tanh(self.one(x)) + torch.sigmoid(self.other(x)))


@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("chain", [True, False])
def test_few_outputs(chain: bool, outputs: int):
    """A sample has one row, or more: products, and A^T times some columns, with K = A^T A."""
    with seeded():
        layers = nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 9), nn.Tanh(), nn.Linear(9, outputs)
        model = (nn.Sequential(*layers) if chain else Beside(outputs)).double()
    given = (model, "mse", *data((6,), outputs, "mse"))
    op = gh.GGNOperator(*given, entries="khatri-rao")
    want = dense_oracles.ggn(model, dense_oracles.loss_function("mse", "mean"), *given[2:])
    check_products(op, want)
    dual = op.dual()
    assert dual is not None
    root = dual.combine(np.eye(dual.rows))
    close(root @ root.T, want)
    close(dual.combine(np.eye(dual.rows, 1)), root[:, :1])


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", NETWORKS)
def test_hessian_of_every_network(name: str, loss: str):
    model, inputs, targets = case(name, loss)
    want = dense_hessian(model, loss, inputs, targets, {})
    op = hessian((model, loss, inputs, targets))
    check_products(op, want)
    close(op.diagonal(), want.diagonal())
    by_torch = gh.HessianOperator(model, loss, [(inputs, targets)], entries="none")
    assert isinstance(by_torch._access, Functional)  # streamed: nothing of it is kept
    np.testing.assert_array_equal(op.runs().permutation, by_torch.runs().permutation)


@pytest.mark.parametrize("activation", sorted({*ELEMENTWISE} - {"Hardsigmoid"}))
def test_hessian_of_every_activation(activation: str):
    """Torch has no second derivative of Hardsigmoid."""
    with seeded():
        options = (0.1, 0.2) if activation == "Threshold" else ()
        layers = [nn.Linear(6, 5), getattr(nn, activation)(*options)]
        model = nn.Sequential(*layers, nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    given = (model, "cross_entropy", *data((6,), 3, "cross_entropy"))
    check_products(hessian(given), dense_hessian(*given, {}))


@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5]).double(), label_smoothing=0.1),
        nn.CrossEntropyLoss(ignore_index=1, reduction="sum"),
        nn.MSELoss(reduction="sum"),
        nn.BCEWithLogitsLoss(pos_weight=torch.tensor([1.0, 2.0, 0.5]).double()),
        nn.PoissonNLLLoss(),
        nn.HuberLoss(delta=0.7),
    ],
    ids=lambda loss: type(loss).__name__,
)
def test_hessian_of_every_loss(loss: Any):
    model = network("deep")
    kind = "cross_entropy" if isinstance(loss, nn.CrossEntropyLoss) else "mse"
    inputs, targets = data((6,), 3, kind)
    if kind == "mse":
        targets = (targets > 0).double()
    sizes = {name: p.shape for name, p in model.named_parameters()}

    def value(theta: Any) -> Any:
        parts = theta.split([shape.numel() for shape in sizes.values()])
        named = {k: x.reshape(sizes[k]) for k, x in zip(sizes, parts, strict=True)}
        return loss(torch.func.functional_call(model, named, inputs), targets)

    theta = nn.utils.parameters_to_vector(model.parameters()).detach()
    want = torch.autograd.functional.hessian(value, theta).numpy()
    check_products(hessian((model, loss, inputs, targets)), want)


@pytest.mark.parametrize(
    "params",
    [
        ["0.weight"],
        ["2.bias", "4.weight"],
        ["0.bias", "2.weight", "6.bias"],
        ["0.weight", "6.weight"],
    ],
)
def test_hessian_of_some_of_the_parameters(params: list[str]):
    model, inputs, targets = case("deep", "cross_entropy")
    given = (model, "cross_entropy", inputs, targets)
    want = dense_hessian(*given, {"params": params})
    check_products(hessian(given, params=params), want)


def test_hessian_of_few_samples_at_a_time(monkeypatch: pytest.MonkeyPatch):
    """As of all; a mean over more data; another dtype."""
    model, inputs, targets = case("deep", "cross_entropy")
    given = (model, "cross_entropy", inputs, targets)
    want = dense_hessian(*given, {})
    units = 5 + 4 + 6 + 3
    monkeypatch.setattr(layer_hessian, "_COLUMN_BYTES", 3 * 8 * units)
    op = hessian(given)
    assert [piece.num_samples for piece in op._access._pieces()] == [3, 3, 1]
    check_products(op, want)
    check_products(hessian(given, num_data=14), want / 2)
    check_products(hessian(given, dtype=np.float32), want, 1e-5)


@pytest.mark.parametrize("kind", [gh.GGNOperator, gh.HessianOperator])
def test_blocks_of_columns_have_the_bits_they_have_alone(kind: Any):
    model, inputs, targets = case("deep", "cross_entropy")
    op = kind(model, "cross_entropy", inputs, targets)
    v = np.random.default_rng(0).standard_normal((op.shape[0], 200))
    for width in (4, 20, 100):
        many = op._access.matmat_by_blocks(v, width)
        for start in range(0, 200, width):
            alone = op._access.matmat_by_blocks(v[:, start : start + width], width)
            np.testing.assert_array_equal(many[:, start : start + width], alone)


def test_the_root_serves_few_columns_on_a_gpu(cupy: Any):
    """There a GEMM is a launch, and the layers' passes have three times as many."""
    with seeded():
        deep = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 2)).double()
    op = gh.GGNOperator(deep, "mse", *data((6,), 2, "mse"))
    there = op.to("cuda")
    assert not isinstance(op._access._products(1), UnitProducts)
    for columns in (1, 2, 8):
        assert isinstance(there._access._products(columns), UnitProducts)
        v = np.random.default_rng(columns).standard_normal((op.shape[0], columns))
        close(to_host(there @ cupy.asarray(v)), op @ v)


def test_on_a_gpu(cupy: Any):
    """The arrays move, the network does not."""
    model, inputs, targets = case("deep", "cross_entropy")
    given = (model, "cross_entropy", inputs, targets)
    for op in (gh.GGNOperator(*given), hessian(given)):
        there = op.to("cuda")
        for columns in (1, 3, 20):
            v = np.random.default_rng(0).standard_normal((op.shape[0], columns))
            close(to_host(there @ cupy.asarray(v)), op @ v)
