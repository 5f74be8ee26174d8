"""Curvature of any network: products, entries and diagonals against reverse mode twice."""

import copy
import pickle
import warnings
from typing import Any

import numpy as np
import pytest

import gpu_hodlr as gh
from gpu_hodlr.operators import ScaledOperator

torch = pytest.importorskip("torch")
nn = torch.nn

from network_models import OwnForward, made, normal  # noqa: E402
from network_zoo import dense, dense_ggn, dense_hessian, flat_rows  # noqa: E402

WAYS = ("root", "dense", "none")


def close(got: Any, want: Any, tolerance: float = 1e-10) -> None:
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * np.abs(want).max())


def products(op: gh.Operator) -> Any:
    return op @ np.eye(op.shape[0], dtype=op.dtype)


@pytest.mark.parametrize("name", ["lenet", "transformer", "language model", "lstm"])
def test_empirical_fisher(name: str):
    """The mean over samples of gradients of the summed loss."""
    model, loss, inputs, targets, options = made(name)
    want, n = dense(name, "empirical"), len(targets)
    for entries in WAYS:
        op = gh.FisherOperator(
            model, loss, inputs, targets, kind="empirical", entries=entries, **options
        )
        close(products(op), want)
        close(op.diagonal(), want.diagonal())
        gh.testing.check_operator(op, want)
        assert op.rank_bound == n


@pytest.mark.parametrize("name", ["own forward", "two inputs", "language model"])
def test_the_expectation_of_monte_carlo_fisher_is_gauss_newton(name: str):
    """Within 5 standard deviations, which many samples make small; the same at every product."""
    model, loss, inputs, targets, options = made(name)
    want = dense_ggn(model, loss, inputs, targets, options)
    samples = 4000
    op = gh.FisherOperator(model, loss, inputs, targets, samples=samples, entries="none", **options)
    got = products(op)
    np.testing.assert_array_equal(got, products(op))
    deviation = np.sqrt((np.linalg.norm(want) ** 2 + np.trace(want) ** 2) / samples)
    assert np.linalg.norm(got - want) < 5 * deviation
    few = gh.FisherOperator(model, loss, inputs, targets, samples=2, entries="none", **options)
    other = gh.FisherOperator(
        model, loss, inputs, targets, samples=2, entries="none", seed=1, **options
    )
    assert not np.allclose(products(few), products(other))
    root = gh.FisherOperator(model, loss, inputs, targets, samples=2, entries="root", **options)
    assert root.rank_bound == 2 * len(targets)
    close(products(few), products(root))
    gh.testing.check_operator(root, products(few))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", ["resnet", "language model"])
def test_reductions(name: str, reduction: str):
    model, loss, inputs, targets, options = made(name)
    torchs = "sum" if reduction == "none" else reduction
    want = dense_ggn(model, loss, inputs, targets, options, torchs)
    op = gh.GGNOperator(
        model, loss, inputs, targets, reduction=reduction, entries="none", **options
    )
    close(products(op), want)


@pytest.mark.parametrize("name", ["lenet", "transformer", "lstm", "language model"])
def test_float32(name: str):
    """Computed in float32, also of a float64 model where that is said."""
    model, loss, inputs, targets, options = made(name)
    want = dense_ggn(model, loss, inputs, targets, options)
    for entries in WAYS:
        op = gh.GGNOperator(
            model, loss, inputs, targets, entries=entries, dtype="float32", **options
        )
        assert op.dtype == np.float32
        close(products(op), want, 2e-5)
        gh.testing.check_operator(op)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["lenet", "transformer", "language model", "lstm", "resnet"])
def test_half_precision(name: str, half: Any):
    """Computed in float32: parameters, buffers and inputs are widened, the model stays as it is."""
    model, loss, inputs, targets, options = made(name, dtype=half)
    wide = copy.deepcopy(model).double()
    given = inputs.double() if torch.is_tensor(inputs) else inputs
    wanted = targets.double() if loss == "mse" else targets
    ggn = dense_ggn(wide, loss, given, wanted, options)
    for entries in WAYS:
        op = gh.GGNOperator(model, loss, inputs, targets, entries=entries, **options)
        assert op.dtype == np.float32
        assert f"float32 of a model in {str(half).removeprefix('torch.')}" in repr(op)
        close(products(op), ggn, 2e-5)
        close(op.diagonal(), ggn.diagonal(), 2e-5)
    exact = dense_hessian(wide, loss, given, wanted, options)
    op = gh.HessianOperator(model, loss, inputs, targets, entries="none", **options)
    close(products(op), exact, 1e-4)
    fisher = gh.FisherOperator(model, loss, inputs, targets, kind="empirical", **options)
    assert fisher.widened is not None
    assert all(p.dtype is half for p in model.parameters())


def test_columns_of_every_library_come_back():
    model, loss, inputs, targets, options = made("lenet")
    op = gh.GGNOperator(model, loss, inputs, targets, entries="none")
    v = torch.randn(op.shape[0], 3, dtype=torch.float64)
    got = op @ v
    assert isinstance(got, torch.Tensor)
    close(got.numpy(), dense_ggn(model, loss, inputs, targets, options) @ v.numpy())
    close((op @ v[:, 0]).numpy(), got[:, 0].numpy())


@pytest.mark.parametrize("entries", WAYS)
def test_copies_multiply_alike(entries: str):
    model, loss, inputs, targets, _ = made("resnet")
    op = gh.GGNOperator(model, loss, inputs, targets, entries=entries)
    want = products(op)
    for other in (pickle.loads(pickle.dumps(op)), copy.deepcopy(op)):
        assert repr(other) == repr(op)
        np.testing.assert_array_equal(products(other), want)


def function(params: Any, x: Any) -> Any:
    """A network without a module."""
    return torch.tanh(x @ params["w"].T + params["b"]) @ params["v"]


def test_a_function_of_its_parameters():
    generator = torch.Generator().manual_seed(0)
    params = {
        name: torch.randn(*shape, generator=generator, dtype=torch.float64)
        for name, shape in (("w", (4, 3)), ("b", (4,)), ("v", (4, 2)))
    }
    x, y = (normal(k)(generator, 6, torch.float64) for k in (3, 2))
    leaves = [p.clone().requires_grad_() for p in params.values()]
    rows = flat_rows(function(dict(zip(params, leaves, strict=True)), x), leaves)
    want = (2 / 12 * rows.T @ rows).numpy()
    for entries in WAYS:
        op = gh.GGNOperator(function, "mse", x, y, params=params, entries=entries)
        close(products(op), want)
        gh.testing.check_operator(op, want)


def test_runs_are_units():
    """What has one output unit, or one channel, stands together; each parameter once."""
    model, loss, inputs, targets, _ = made("lenet")
    runs = gh.GGNOperator(model, loss, inputs, targets).runs()
    n = sum(p.numel() for p in model.parameters())
    np.testing.assert_array_equal(np.sort(runs.permutation), np.arange(n))
    lengths = np.diff(np.append(runs.starts, n))
    np.testing.assert_array_equal(lengths, [10] * 2 + [2] * 2 + [19] * 5 + [6] * 3)
    np.testing.assert_array_equal(runs.permutation[:10], [*range(9), 18])


@pytest.mark.parametrize("entries", ["root", "none"])
@pytest.mark.parametrize("name", ["lenet", "language model"])
def test_gram_vectors(name: str, entries: str):
    """E[X X^T] = K, within 5 standard deviations of the mean of `num` outer products."""
    model, loss, inputs, targets, options = made(name)
    op = gh.GGNOperator(model, loss, inputs, targets, entries=entries, **options)
    num, dense = 3000, products(op)
    X = op.gram_vectors(num, seed=0)
    deviation = np.sqrt((np.linalg.norm(dense) ** 2 + np.trace(dense) ** 2) / num)
    assert np.linalg.norm(X @ X.T - dense) < 5 * deviation
    np.testing.assert_array_equal(X, op.gram_vectors(num, seed=0))
    assert not np.array_equal(X, op.gram_vectors(num, seed=1))


@pytest.mark.parametrize("entries", ["root", "none"])
def test_summands(entries: str):
    model, loss, inputs, targets, _ = made("lenet")
    op = gh.GGNOperator(model, loss, inputs, targets, entries=entries)
    v = np.random.default_rng(0).standard_normal((op.shape[0], 2))
    for count in (2, 3, 7):
        found = [op.summand(i, count) for i in range(count)]
        close(sum(part @ v for part in found), op @ v)


def test_blocks_of_columns_change_none_of_their_bits():
    """As a rank that has but one of them multiplies it."""
    model, loss, inputs, targets, _ = made("resnet")
    for entries in WAYS:
        op = gh.GGNOperator(model, loss, inputs, targets, entries=entries)
        v = np.random.default_rng(0).standard_normal((op.shape[0], 24))
        together = op._matmat_by_blocks(v, 8)
        for start in (0, 8, 16):
            alone = op._matmat_by_blocks(v[:, start : start + 8].copy(), 8)
            np.testing.assert_array_equal(together[:, start : start + 8], alone)


@pytest.mark.parametrize("working", [1, 40_000])
def test_in_pieces(working: int, monkeypatch: pytest.MonkeyPatch):
    """One sample and one column at a time, and some."""
    from gpu_hodlr.networks import problem

    model, loss, inputs, targets, _ = made("lenet")
    want = dense_ggn(model, loss, inputs, targets, {})
    monkeypatch.setattr(problem, "_WORKING_BYTES", working)
    for entries in WAYS:
        close(products(gh.GGNOperator(model, loss, inputs, targets, entries=entries)), want)
    op = gh.HessianOperator(model, loss, inputs, targets, entries="none")
    close(products(op), dense_hessian(model, loss, inputs, targets, {}))
    fisher = gh.FisherOperator(model, loss, inputs, targets, samples=3, entries="none")
    close(products(fisher), products(gh.FisherOperator(model, loss, inputs, targets, samples=3)))


def test_what_is_chosen_by_itself(monkeypatch: pytest.MonkeyPatch):
    """The root, where it is smaller than K; K, where that is; neither, where memory is short."""
    from gpu_hodlr.networks import curvature

    model, loss, inputs, targets, _ = made("lenet", n=5)
    assert gh.GGNOperator(model, loss, inputs, targets).access == "root"
    many = made("lenet", n=100)
    assert gh.GGNOperator(*many[:4]).access == "dense"
    monkeypatch.setattr(curvature, "free_bytes", lambda device: 1000)
    assert gh.GGNOperator(model, loss, inputs, targets).access == "none"
    op = gh.GGNOperator(model, loss, inputs, targets)
    assert not op.has_entries
    assert "products," in repr(op)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_low_rank_of_a_root_is_exact(dtype: str):
    """The best approximation of every rank, whatever the seed."""
    model, loss, inputs, targets, _ = made("lenet", n=12)
    op = gh.GGNOperator(model, loss, inputs, targets, entries="root", dtype=dtype)
    dense = products(op).astype(np.float64)
    values = np.linalg.eigvalsh(dense)[::-1]
    for rank in (3, 20, 137):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", gh.errors.RankCapWarning)
            found = [
                gh.compress(op, "lowrank", rtol=1e-5, max_rank=rank, seed=seed) for seed in (0, 1)
            ]
        np.testing.assert_array_equal(found[0].to_dense(), found[1].to_dense())
        kept = found[0].ranks[0][0] if rank == 137 else rank
        best = np.linalg.norm(values[kept:])
        error = np.linalg.norm(found[0].to_dense() - dense)
        slack = 1e-5 if dtype == "float32" else 1e-12
        assert error <= best * (1 + 1e-8) + slack * values[0]
    scaled = ScaledOperator(op, 4.0)
    close(scaled.root() @ scaled.root().T, 4 * dense, 1e-5)
    assert gh.GGNOperator(model, loss, inputs, targets, entries="none").root() is None


def test_linear_columns_of_a_dense_oracle():
    """The oracle itself: a linear model's matrix by hand."""
    model = nn.Linear(2, 1, bias=False).double()
    x = torch.tensor([[1.0, 2.0], [0.0, 1.0]], dtype=torch.float64)
    want = (x.T @ x).numpy()  # 2 / n, n = 2
    close(dense_ggn(model, "mse", x, x[:, :1], {}), want)
    close(dense_hessian(model, "mse", x, x[:, :1], {}), want)


def test_every_scheme(capsys: pytest.CaptureFixture[str]):
    """Compression with entries and of products alone."""
    model, loss, inputs, targets, _ = made("lenet", n=12)
    for entries in ("root", "none"):
        op = gh.GGNOperator(model, loss, inputs, targets, entries=entries)
        dense = products(op)
        for scheme in ("hss", "hodlr", "lowrank", "auto", *(["kfe"] if entries == "root" else [])):
            K = gh.compress(op, scheme, rtol=1e-6, leaf_size=16, max_rank=137)
            error = np.linalg.norm(K.to_dense() - dense) / np.linalg.norm(dense)
            assert error < 3e-6, (entries, scheme)
    with pytest.raises(gh.errors.ArgumentError, match="Linear layers"):
        gh.compress(op, "kfe")
    hessian = gh.HessianOperator(model, loss, inputs, targets, entries="none")
    K = gh.compress(hessian, "hodlr", rtol=1e-6, leaf_size=16, max_rank=137)
    want = products(hessian)
    assert np.linalg.norm(K.to_dense() - want) < 3e-6 * np.linalg.norm(want)


@pytest.mark.parametrize("kind", [gh.GGNOperator, gh.HessianOperator])
def test_the_first_evaluation_is_kept_of_few_samples(kind: Any, monkeypatch: pytest.MonkeyPatch):
    """The same bits at the second product, in copies, where it does not fit, and of batches."""
    from gpu_hodlr.networks import functional

    class Counted(OwnForward):
        calls = 0

        def forward(self, x: Any) -> Any:
            Counted.calls += 1
            return super().forward(x)

    torch.manual_seed(0)
    model = Counted().double()
    x, y = torch.randn(6, 5, dtype=torch.float64), torch.arange(6) % 3
    op = kind(model, "cross_entropy", x, y, entries="none")
    v = np.random.default_rng(0).standard_normal(op.shape[0])

    def evaluations(op: Any) -> tuple[Any, int]:
        before = Counted.calls
        return op @ v, Counted.calls - before

    want, first = evaluations(op)
    again, second = evaluations(op)
    np.testing.assert_array_equal(again, want)
    assert second < first
    with torch.no_grad():
        model.first.weight.add_(1)
    for other in (op, copy.deepcopy(op)):
        np.testing.assert_array_equal(other @ v, want)
    close(sum(op.summand(i, 2) @ v for i in range(2)), want)
    with torch.no_grad():
        model.first.weight.sub_(1)
    monkeypatch.setattr(functional, "_KEPT_BYTES", 0)
    short = kind(model, "cross_entropy", x, y, entries="none")
    batches = kind(model, "cross_entropy", [(x, y)], entries="none")
    for op in (short, batches):
        (got, first), (again, second) = evaluations(op), evaluations(op)
        close(got, want)
        np.testing.assert_array_equal(got, again)
        assert first == second
