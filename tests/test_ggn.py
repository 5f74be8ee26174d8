"""The Gauss-Newton matrix against J^T H J made by torch.func."""

from typing import Any

import dense_oracles
import numpy as np
import pytest

import gpu_hodlr as gh

torch = pytest.importorskip("torch")
nn = torch.nn

from network_cases import NETWORKS, case, data, network  # noqa: E402

from gpu_hodlr.networks.modules import ELEMENTWISE  # noqa: E402
from gpu_hodlr.testing import check_operator  # noqa: E402

LOSSES = ("mse", "cross_entropy")
TOLERANCE = {np.dtype(np.float64): 1e-12, np.dtype(np.float32): 1e-5}


def close(got: Any, want: np.ndarray, tolerance: float = 1e-12) -> None:
    """Equal within `tolerance` of the largest entry."""
    got = np.asarray(got)
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * np.abs(want).max())


def check(op: gh.GGNOperator, want: np.ndarray) -> None:
    """Products, entries, diagonal and dense form agree with a dense matrix."""
    check_operator(op, want)
    n = len(want)
    tolerance = TOLERANCE[op.dtype]
    assert op.shape == (n, n)
    assert np.abs(want).max() > 0
    v = np.random.default_rng(0).standard_normal((n, 3)).astype(op.dtype)
    product = op.matmat(v)
    assert product.dtype == op.dtype
    close(product, want @ v, tolerance)
    close(op @ v[:, 0], want @ v[:, 0], tolerance)
    close(op.diagonal(), np.diagonal(want), tolerance)
    close(op.to_dense(), want, tolerance)
    order = np.random.default_rng(1).permutation(n)
    rows, cols = order[: n // 2], order[n // 3 :]
    close(op.entries(rows, cols), want[np.ix_(rows, cols)], tolerance)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", NETWORKS)
def test_every_network(name: str, loss: str):
    model, inputs, targets = case(name, loss)
    op = gh.GGNOperator(model, loss, inputs, targets)
    assert op.dtype == np.float64
    check(op, dense_oracles.ggn(model, dense_oracles.loss_function(loss, "mean"), inputs, targets))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", ["deep", "wide output, deep", "one layer", "inplace"])
def test_float32(name: str, loss: str):
    model, inputs, targets = case(name, loss, torch.float32)
    op = gh.GGNOperator(model, loss, inputs, targets)
    assert op.dtype == np.float32
    check(op, dense_oracles.ggn(model, dense_oracles.loss_function(loss, "mean"), inputs, targets))


@pytest.mark.parametrize("dtype", [torch.float64, np.float64, "float64"])
def test_dtype_overrides_the_models(dtype: Any):
    """A float32 model evaluated and differentiated in float64."""
    model, inputs, targets = case("deep", "cross_entropy", torch.float32)
    op = gh.GGNOperator(model, "cross_entropy", inputs, targets, dtype=dtype)
    loss = dense_oracles.loss_function("cross_entropy", "mean")
    check(op, dense_oracles.ggn(model, loss, inputs, targets))


@pytest.mark.parametrize("activation", ELEMENTWISE)
def test_every_activation(activation: str):
    """Also with the activation after the last layer."""
    torch.manual_seed(3)
    arguments = (0.1, 0.3) if activation == "Threshold" else ()
    kind = getattr(nn, activation)
    model = nn.Sequential(
        nn.Linear(6, 5), kind(*arguments), nn.Linear(5, 4), kind(*arguments)
    ).double()
    inputs, targets = data((6,), 4, "mse", n=9)
    loss = dense_oracles.loss_function("mse", "mean")
    check(
        gh.GGNOperator(model, "mse", 3 * inputs, targets),
        dense_oracles.ggn(model, loss, 3 * inputs, targets),
    )


def test_saturated_softmax():
    """Logits of several hundred: probabilities underflow, nothing overflows."""
    model, inputs, targets = case("two layers", "cross_entropy")
    op = gh.GGNOperator(model, "cross_entropy", 1e4 * inputs, targets)
    assert np.isfinite(op.to_dense()).all()
    assert np.isfinite(op @ np.ones(op.shape[0])).all()


def test_numpy_data_and_frozen_parameters():
    model, inputs, targets = case("deep", "mse")
    for p in model[0].parameters():
        p.requires_grad_(False)
    op = gh.GGNOperator(model, "mse", inputs.numpy(), targets.numpy())
    loss = dense_oracles.loss_function("mse", "mean")
    check(op, dense_oracles.ggn(model, loss, inputs, targets))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", ["two layers", "activation first"])
def test_modes_without_gradients(name: str, mode: Any):
    """Made inside the mode, and of inputs that were made inside it."""
    model, inputs, targets = case(name, "mse")
    want = gh.GGNOperator(model, "mse", inputs, targets).to_dense()
    with mode():
        copied = inputs.clone()
        inside = gh.GGNOperator(model, "mse", copied, targets).to_dense()
    np.testing.assert_array_equal(inside, want)
    outside = gh.GGNOperator(model, "mse", copied, targets).to_dense()
    np.testing.assert_array_equal(outside, want)


def test_the_model_is_left_as_it_was_and_not_kept():
    model, inputs, targets = case("inplace", "mse")
    before = {name: p.clone() for name, p in model.named_parameters()}
    kept = inputs.clone()
    op = gh.GGNOperator(model, "mse", inputs, targets)
    assert torch.equal(inputs, kept)
    assert all(p.grad is None and torch.equal(p, before[k]) for k, p in model.named_parameters())
    dense = op.to_dense()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    inputs.zero_()
    np.testing.assert_array_equal(op.to_dense(), dense)
    np.testing.assert_allclose(op @ np.eye(op.shape[0]), dense, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["bias in some layers", "nested", "wide output, deep"])
def test_parameter_order_is_torchs(name: str):
    model, inputs, targets = case(name, "mse")
    op = gh.GGNOperator(model, "mse", inputs, targets)
    v = torch.randn(op.shape[0], dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    loss = dense_oracles.loss_function("mse", "mean")
    want = dense_oracles.ggn_product(model, loss, inputs, targets, v)
    got = op @ v
    assert isinstance(got, torch.Tensor)
    assert torch.nn.utils.parameters_to_vector(model.parameters()).shape == got.shape
    close(got, want.numpy())


def test_runs_are_the_units():
    """A unit's weights, then its bias, unit after unit; every parameter once."""
    model, inputs, targets = case("bias in some layers", "mse")  # 6 -4- 4 - 5 - 3
    runs = gh.GGNOperator(model, "mse", inputs, targets).runs()
    n = 6 * 4 + (4 + 1) * 5 + 5 * 3
    np.testing.assert_array_equal(np.sort(runs.permutation), np.arange(n))
    lengths = np.diff(np.append(runs.starts, n))
    np.testing.assert_array_equal(lengths, [6] * 4 + [5] * 5 + [5] * 3)
    np.testing.assert_array_equal(runs.permutation[24:29], [24, 25, 26, 27, 24 + 20])


@pytest.mark.parametrize("name", ["two layers", "wide output"])
def test_batches_of_blocks(name: str):
    model, inputs, targets = case(name, "cross_entropy")
    op = gh.GGNOperator(model, "cross_entropy", inputs, targets)
    dense = op.to_dense()
    rng = np.random.default_rng(0)
    rows, cols = (rng.integers(op.shape[0], size=(5, m)) for m in (4, 9))
    got = op.entries(rows, cols)
    assert got.shape == (5, 4, 9)
    for block, r, c in zip(got, rows, cols, strict=True):
        close(block, dense[np.ix_(r, c)])


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", NETWORKS)
def test_rows_of_the_units_gram_by_pairs(name: str, loss: str):
    """What the GPU tabulates is what the CPU multiplies with; pairs left out are zero."""
    model, inputs, targets = case(name, loss)
    gram = gh.GGNOperator(model, loss, inputs, targets)._access.gram
    units = gram.num_units
    u, v = (x.ravel() for x in np.indices((units, units)))
    want = np.stack([gram.rows(i, np.arange(units)) for i in range(units)]).reshape(len(u), -1)
    close(gram.pairs(u, v), want)
    assert not want[~gram.coupled(u, v)].any()


def stored_numbers(gram: Any) -> int:
    """Numbers in all arrays of a UnitGram that grow with the samples."""
    return sum(a.size for a in vars(gram).values() if isinstance(a, np.ndarray) and a.ndim == 3)


@pytest.mark.parametrize("loss", LOSSES)
def test_entries_of_a_wide_network_do_not_cost_its_outputs(loss: str):
    """100 outputs and 5 hidden units: n * hidden numbers a hidden unit, none an output."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 5), nn.Tanh(), nn.Linear(5, 100), nn.Sigmoid()).double()
    inputs, targets = data((20,), 100, loss, n=12)
    op = gh.GGNOperator(model, loss, inputs, targets)
    assert op._access.gram.tabulated
    assert stored_numbers(op._access.gram) == 2 * 5 * 5 * 12
    assert op.entry_cost == 2.0 * 12


def test_entries_of_a_narrow_network_use_the_root():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 50), nn.Tanh(), nn.Linear(50, 3)).double()
    op = gh.GGNOperator(model, "cross_entropy", *data((20,), 3, "cross_entropy", n=4))
    assert not op._access.gram.tabulated
    assert op._access.gram._stored.root.size == 53 * 3 * 4


def test_output_units_of_an_mse_autoencoder_share_nothing():
    """The block of the last layer is block diagonal, one block an output unit."""
    model, inputs, targets = case("wide output, activated", "mse")
    op = gh.GGNOperator(model, "mse", inputs, targets)
    last = np.arange(3 * 6 + 3, op.shape[0])
    unit = np.concatenate([np.repeat(np.arange(10), 3), np.arange(10)])
    block = op.entries(last, last)
    np.testing.assert_array_equal(block[unit[:, None] != unit], 0)
    assert block[unit[:, None] == unit].all()


@pytest.mark.parametrize("loss", LOSSES)
def test_gram_vectors(loss: str):
    """E[X X^T] = K: 5 standard deviations of the mean of `num` outer products."""
    model, inputs, targets = case("two layers", loss)
    op = gh.GGNOperator(model, loss, inputs, targets)
    num = 3000
    X = op.gram_vectors(num, seed=0)
    assert X.shape == (op.shape[0], num)
    dense = op.to_dense()
    deviation = np.sqrt((np.linalg.norm(dense) ** 2 + np.trace(dense) ** 2) / num)
    assert np.linalg.norm(X @ X.T - dense) < 5 * deviation
    np.testing.assert_array_equal(X, op.gram_vectors(num, seed=0))
    assert not np.array_equal(X, op.gram_vectors(num, seed=1))


@pytest.mark.parametrize("loss", LOSSES)
def test_rank_bound(loss: str):
    model = network("two layers")
    inputs, targets = data((6,), 3, loss, n=4)
    op = gh.GGNOperator(model, loss, inputs, targets)
    assert op.rank_bound == 12
    assert np.linalg.matrix_rank(op.to_dense(), tol=1e-12) <= 12
    assert op.shape[0] > 12


def test_unused_inputs_give_zero_rows():
    model, inputs, targets = case("two layers", "mse")
    inputs = inputs.clone()
    inputs[:, [0, 3]] = 0
    op = gh.GGNOperator(model, "mse", inputs, targets)
    dead = (np.arange(5)[:, None] * 6 + [0, 3]).ravel()
    assert not op.diagonal()[dead].any()
    assert not op.to_dense()[dead].any()
    assert not (op @ np.ones(op.shape[0]))[dead].any()


def test_many_columns_are_the_columns_one_by_one():
    """More columns than go into one chunk."""
    model, inputs, targets = case("deep", "mse")
    op = gh.GGNOperator(model, "mse", inputs, targets)
    v = np.random.default_rng(0).standard_normal((op.shape[0], 131))
    together = op.matmat(v)
    for j in (0, 63, 64, 130):
        close(together[:, j], op.matmat(v[:, j].copy()))
