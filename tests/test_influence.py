"""Influence scores: against dense linear algebra, retraining, and their convention of signs."""

from types import ModuleType
from typing import Any

import numpy as np
import pytest
from dense_oracles import random_spd
from test_bad_input import refused
from thread_ranks import on_threads

import gpu_hodlr as gh
from gpu_hodlr.devices import to_host
from gpu_hodlr.errors import ArgumentError, DtypeError, ShapeError

N = 60
RNG = np.random.default_rng(0)
K = random_spd(N)
TRAIN, TEST = RNG.standard_normal((N, 30)), RNG.standard_normal((N, 4))
WANT = -TEST.T @ np.linalg.solve(K + 0.1 * np.eye(N), TRAIN)


def factor(exact: Any = K, **options: Any) -> Any:
    return gh.compress(exact, rtol=1e-12, leaf_size=20, max_rank=40, **options).factorize(0.1)


def test_of_gradients(xp: ModuleType, dtype: Any):
    F = gh.compress(xp.asarray(K.astype(dtype)), leaf_size=20, rtol=1e-5).factorize(0.1)
    train, test = (xp.asarray(g.astype(dtype)) for g in (TRAIN, TEST))
    found = gh.influence(F, train, test)
    assert isinstance(found, xp.ndarray)
    assert (found.shape, found.dtype) == ((4, 30), dtype)
    np.testing.assert_allclose(to_host(found), WANT, rtol=0, atol=1e-3 * abs(WANT).max())
    batches = [train[:, :7], train[:, 7:8], train[:, 8:]]
    for several in (batches, tuple(batches), iter(batches)):
        tight = 1e-5 * abs(WANT).max()
        again = gh.influence(F, several, test)
        np.testing.assert_allclose(to_host(again), to_host(found), rtol=0, atol=tight)
    one = gh.influence(F, train[:, 3], test[:, 1])
    assert one.shape == (1, 1)
    assert float(one[0, 0]) == pytest.approx(float(found[1, 3]), rel=1e-4)


def test_every_kind_of_factor_and_torch():
    for scheme in ("hss", "hodlr", "lowrank", "fmm"):
        F = gh.compress(K, scheme, rtol=1e-10, leaf_size=20, max_rank=N).factorize(0.1)
        np.testing.assert_allclose(gh.influence(F, TRAIN, TEST), WANT, rtol=1e-5, atol=1e-6)
    torch = pytest.importorskip("torch")
    found = gh.influence(factor(), torch.from_numpy(TRAIN), torch.from_numpy(TEST))
    assert isinstance(found, torch.Tensor)
    np.testing.assert_allclose(found.numpy(), WANT, rtol=1e-8)


def test_ranks():
    """Whole gradients, or this rank's rows of them; the same scores on all."""

    def run(comm: Any) -> list[Any]:
        matrix = gh.compress(K, rtol=1e-12, leaf_size=20, max_rank=40, comm=comm)
        F, rows = matrix.factorize(0.1), matrix.rows
        return [gh.influence(F, TRAIN, TEST), gh.influence(F, [TRAIN[rows]], TEST[rows])]

    for size in (2, 3):
        results = on_threads(size, run)
        for scores in results:
            for found in scores:
                np.testing.assert_array_equal(found, results[0][0])
                np.testing.assert_allclose(found, WANT, rtol=1e-8)


def test_bad_gradients():
    F = factor()
    refused(DtypeError, lambda: gh.influence(K, TRAIN, TEST), "F must be a factor")  # type: ignore[arg-type]
    refused(ShapeError, lambda: gh.influence(F, TRAIN[1:], TEST), "train_gradients must have shape")
    refused(ShapeError, lambda: gh.influence(F, TRAIN, TEST.T), "test_gradients must have shape")
    refused(ShapeError, lambda: gh.influence(F, [], TEST), "train_gradients must have a batch")
    nan = TRAIN * np.nan
    refused(
        ArgumentError,
        lambda: gh.influence(F, [TRAIN, nan], TEST),
        "train_gradients[1] has 1800 entries",
    )
    refused(DtypeError, lambda: gh.influence(F, TRAIN.astype(int), TEST), "train_gradients")


# --- networks --------------------------------------------------------------------------------

torch = pytest.importorskip("torch")
from seeds import seeded  # noqa: E402


def trained(kind: Any = torch.float64) -> tuple[Any, Any, Any, Any, Any]:
    """A classifier of three clouds, and data of it."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(66) % 3
    x = torch.randn(66, 6, dtype=kind, generator=generator)
    x[:, 0] += 1.5 * y
    with seeded():
        layers = torch.nn.Linear(6, 12), torch.nn.Tanh(), torch.nn.Linear(12, 3)
    model = torch.nn.Sequential(*layers).to(kind)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(30):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x[:60]), y[:60]).backward()
        optimizer.step()
    return model, x[:60], y[:60], x[60:], y[60:]


def slopes(model: Any, function: Any, x: Any, y: Any) -> np.ndarray:
    """Gradients of single samples, one backward pass each."""
    columns = []
    for i in range(len(x)):
        model.zero_grad()
        function(model(x[i : i + 1]), y[i : i + 1]).backward()
        columns.append(torch.cat([p.grad.ravel() for p in model.parameters()]).double().numpy())
    return np.stack(columns, axis=1)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_of_a_classifier(reduction: str):
    """Correlated with the exact scores, of every form; those of plain gradient products are not."""
    model, x, y, new, classes = trained()
    loss = torch.nn.functional.cross_entropy
    op = gh.GGNOperator(model, "cross_entropy", x, y, reduction=reduction)
    damping = 0.02 if reduction == "mean" else 1.2
    exact = to_host(op.to_dense()) + damping * np.eye(op.shape[0])
    train, test = slopes(model, loss, x, y), slopes(model, loss, new, classes)
    want = -test.T @ np.linalg.solve(exact, train)
    given = {"reduction": reduction, "leaf_size": 32, "max_rank": 128}
    for scheme in ("auto", "hss", "lowrank"):
        found = gh.influence_of(
            model, "cross_entropy", (x, y), (new, classes), damping, scheme=scheme, **given
        )
        assert isinstance(found, torch.Tensor)
        assert found.shape == (6, 60)
        correlation = np.corrcoef(found.numpy().ravel(), want.ravel())[0, 1]
        assert correlation > 0.998
        np.testing.assert_allclose(found, want, rtol=0, atol=0.1 * abs(want).max())
    assert np.corrcoef((-test.T @ train).ravel(), want.ravel())[0, 1] < 0.99


def test_batches_float32_and_params():
    model, x, y, new, classes = trained(torch.float32)
    whole = gh.influence_of(
        model, "cross_entropy", (x, y), (new, classes), 0.05, params=["2.weight", "2.bias"]
    )
    assert whole.dtype == torch.float32
    data = torch.utils.data.TensorDataset(x, y)
    loader = torch.utils.data.DataLoader(data, batch_size=17)
    tests = [(new[:2], classes[:2]), (new[2:], classes[2:])]
    again = gh.influence_of(
        model, torch.nn.CrossEntropyLoss(), loader, tests, 0.05, params=["2.weight", "2.bias"]
    )
    np.testing.assert_allclose(again, whole, rtol=0, atol=2e-3 * float(whole.abs().max()))
    exact = gh.influence_of(
        model, "cross_entropy", (x, y), (new, classes), 0.05, params=["2.weight", "2.bias"],
        dtype=np.float64,
    )  # fmt: skip
    assert exact.dtype == torch.float64
    np.testing.assert_allclose(whole, exact, rtol=0, atol=1e-2 * float(exact.abs().max()))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_sign_and_the_size_are_those_of_training_again(reduction: str):
    """Ridge regression of two outputs, where the Gauss-Newton matrix is the Hessian.

    The score is the derivative of a test sample's loss in a sample's weight, and tells what
    leaving a sample out does.
    """
    rng = np.random.default_rng(0)
    X, Y = np.c_[rng.standard_normal((80, 4)), np.ones(80)], rng.standard_normal((80, 2))
    fresh, answer = np.r_[rng.standard_normal(4), 1.0], rng.standard_normal(2)
    mean = reduction == "mean"
    damping, share = (0.1, 1 / 80) if mean else (8.0, 1.0)
    each = 1.0 if not mean else 0.5  # a mean over both outputs

    def weights(w: np.ndarray) -> np.ndarray:
        """Of the minimum of sum w_i each |f(x_i) - y_i|^2 + damping / 2 norm(theta)^2."""
        gram = 2 * each * (X.T * w) @ X + damping * np.eye(5)
        return np.linalg.solve(gram, 2 * each * (X.T * w) @ Y)

    def test_loss(theta: np.ndarray) -> float:
        return float(each * ((fresh @ theta - answer) ** 2).sum())

    plain = np.full(80, share)
    theta = weights(plain)
    model = torch.nn.Linear(4, 2).double()
    with torch.no_grad():
        model.weight.copy_(torch.from_numpy(theta[:4].T.copy()))
        model.bias.copy_(torch.from_numpy(theta[4].copy()))
    data = (torch.from_numpy(X[:, :4].copy()), torch.from_numpy(Y))
    new = (torch.from_numpy(fresh[None, :4].copy()), torch.from_numpy(answer[None]))
    scores = gh.influence_of(
        model, "mse", data, new, damping, reduction=reduction, atol=1e-10
    ).numpy()[0]
    for i in (0, 7, 41):
        step = 1e-6 * np.eye(80)[i]
        slope = (test_loss(weights(plain + step)) - test_loss(weights(plain - step))) / 2e-6
        assert scores[i] == pytest.approx(slope, rel=1e-5)
    without = [test_loss(weights(plain - share * unit)) - test_loss(theta) for unit in np.eye(80)]
    assert np.corrcoef(-share * scores, without)[0, 1] > 0.99
    assert np.linalg.norm(-share * scores - without) < 0.3 * np.linalg.norm(without)


def test_a_network_on_ranks():
    """Each with a model of its own, as processes have: torch puts parameters into the module."""
    given = [trained() for _ in range(2)]

    def run(comm: Any = None) -> Any:
        model, x, y, new, classes = given[comm.rank if comm else 0]
        return gh.influence_of(
            model, "cross_entropy", (x, y), (new, classes), 0.05, scheme="hss", leaf_size=32,
            max_rank=64, atol=1e-9, comm=comm,
        ).numpy()  # fmt: skip

    alone, results = run(), on_threads(2, run)
    for found in results:
        np.testing.assert_array_equal(found, results[0])
        np.testing.assert_allclose(found, alone, rtol=0, atol=1e-6 * abs(alone).max())


def test_bad_networks():
    model, x, y, new, classes = trained()

    def scores(train: Any = (x, y), test: Any = (new, classes), damping: Any = 0.1) -> Any:
        return gh.influence_of(model, "cross_entropy", train, test, damping)

    refused(ArgumentError, lambda: scores(damping=0.0), "damping must be > 0")
    refused(DtypeError, lambda: scores(damping="x"), "damping must be a real number")
    refused(ArgumentError, lambda: scores(train=x), "targets are missing")
    refused(ShapeError, lambda: scores(test=(new, classes[1:])), "targets")
    data = torch.utils.data.TensorDataset(x, y)
    shuffled = torch.utils.data.DataLoader(data, batch_size=20, shuffle=True)
    refused(
        ArgumentError, lambda: scores(train=shuffled), "train must give its samples in the same"
    )
    refused(ArgumentError, lambda: scores(test=shuffled), "test must give its samples in the same")
