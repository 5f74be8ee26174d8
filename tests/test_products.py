"""Products formed by all ranks together: who draws, multiplies and has what."""

import importlib
import weakref
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from matrix_cases import entries_only, toeplitz
from thread_ranks import on_threads

import gpu_hodlr as gh
from gpu_hodlr.bases.samplers import regression_inflation, samples_for
from gpu_hodlr.compression import probe as probe_module
from gpu_hodlr.compression.probe import ErrorProbe
from gpu_hodlr.devices import namespace, to_host
from gpu_hodlr.distributed import ALONE, OneRank, Ownership, shares
from gpu_hodlr.operators import ProductColumns, ScaledOperator, SketchColumns, dense
from gpu_hodlr.operators.product import column_blocks
from gpu_hodlr.structures import LowRank
from gpu_hodlr.tree import rows_tree

N, COLUMNS = 201, 7
RANKS = (1, 2, 3, 5, 9)  # the last: more than columns, and 5 than blocks of them


class Sum(gh.DenseOperator):
    """A matrix that is a sum, of factor factor^T by columns of the factor."""

    def __init__(self, factor: Any) -> None:
        super().__init__(factor @ factor.T)
        self._factor = factor

    def summand(self, index: int, count: int) -> gh.Operator:
        return Sum(self._factor[:, shares(self._factor.shape[1], count)[index]])


def exact_sum(scale: float = 1.0) -> Any:
    factor = np.linalg.cholesky(scale * toeplitz(N))
    return factor @ factor.T, Sum(factor)


def spread(comm: Any, n: int = N) -> Ownership:
    """Rows dealt out, in a random order."""
    leaves = rows_tree(n, 16).leaves
    order = np.random.default_rng(0).permutation(n)
    return Ownership(comm, np.where(leaves >= 0, order[leaves], -1))


def whole(owners: Ownership, x: Any) -> Any:
    return owners.rows.whole(np.ascontiguousarray(x))


def sketched(comm: Any, summable: bool = False) -> dict[str, Any]:
    """A sketch as drawn, spread by rows and grown."""
    exact, op = exact_sum()
    columns = SketchColumns(op if summable else gh.DenseOperator(exact), COLUMNS, 5, comm)
    drawn = columns.product.v.nbytes
    seen = {
        "energy": columns.energy(),
        "sampled": columns.sampled_rows(np.array([[3, -1, 90], [0, 100, 2]])),
    }
    owners = spread(comm)
    sketch = columns.to_rows(owners)
    sketch.grow(4)
    assert sketch.omega.shape == sketch.y.shape == (len(owners.rows.mine), COLUMNS + 4)
    omega, y = whole(owners, sketch.omega), whole(owners, sketch.y)
    np.testing.assert_allclose(y, exact @ omega, rtol=0, atol=1e-12 * np.abs(y).max())
    return {"drawn": drawn, "omega": omega, **seen}


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("summable", [False, True])
def test_a_sketch_is_the_same_on_any_number_of_ranks(summable: bool, ranks: int):
    """A rank draws the blocks it multiplies, no more; the numbers are those of one rank."""
    (alone,) = on_threads(1, sketched)
    blocks = column_blocks(COLUMNS)
    assert [block.stop - block.start for block in blocks] == [2, 2, 2, 1]
    for seen in on_threads(ranks, lambda comm: sketched(comm, summable)):
        assert seen["drawn"] <= N * 2 * -(-len(blocks) // ranks) * 8
        np.testing.assert_array_equal(seen["omega"], alone["omega"])
        np.testing.assert_allclose(seen["energy"], alone["energy"], rtol=1e-13)
        for mine, want in zip(seen["sampled"], alone["sampled"], strict=True):
            np.testing.assert_allclose(mine, want, rtol=0, atol=1e-12)
    omega, y = alone["sampled"]
    exact = toeplitz(N)
    np.testing.assert_array_equal(omega[1, 1], alone["omega"][100, :COLUMNS])
    np.testing.assert_allclose(y[1, 1], exact[100] @ alone["omega"][:, :COLUMNS], atol=1e-12)
    assert not omega[0, 1].any()
    assert not y[0, 1].any()


@pytest.mark.parametrize("ranks", RANKS)
def test_few_columns_of_a_large_matrix_are_one_block(ranks: int, monkeypatch: pytest.MonkeyPatch):
    """It is read once for all of them; the bits are those of one rank, as ever."""
    monkeypatch.setattr(dense, "_CACHED", 0)
    exact, seen = toeplitz(N), []
    op = gh.DenseOperator(exact)
    multiply = op._matmat
    monkeypatch.setattr(op, "_matmat", lambda v: (seen.append(v.shape[1]), multiply(v))[1])
    v = np.random.default_rng(1).standard_normal((N, 24))

    def job(comm: Any, num: int) -> Any:
        columns = ProductColumns.shared(op, num, lambda part: v[:, part], comm)
        return whole(spread(comm), columns.to_rows(spread(comm)).y)

    for num, blocks in ((1, [1]), (7, [7]), (10, [10]), (24, [10, 10, 4])):
        (want,) = on_threads(1, lambda comm, num=num: job(comm, num))
        assert seen == blocks
        np.testing.assert_allclose(want, exact @ v[:, :num], atol=1e-12)
        for got in on_threads(ranks, lambda comm, num=num: job(comm, num)):
            np.testing.assert_array_equal(got, want)
        seen.clear()


@pytest.mark.parametrize("ranks", RANKS)
def test_one_exchange_spreads_both_factors(ranks: int):
    v = np.random.default_rng(1).standard_normal((N, COLUMNS))
    exact = toeplitz(N)

    def job(comm: Any) -> tuple[int, Any, Any]:
        owners = spread(comm)
        before = sum(comm.messages.values())
        columns = ProductColumns.shared(
            gh.DenseOperator(exact), COLUMNS, lambda part: v[:, part], comm
        )
        assert sum(comm.messages.values()) == before
        product = columns.to_rows(owners)
        exchanges = sum(comm.messages.values()) - before
        return exchanges, whole(owners, product.v), whole(owners, product.y)

    for exchanges, got_v, got_y in on_threads(ranks, job):
        assert exchanges == (ranks > 1)
        np.testing.assert_array_equal(got_v, v)
        np.testing.assert_allclose(got_y, exact @ v, rtol=0, atol=1e-12)


def probed(op: Any, comm: Any) -> tuple[float, float, Any, Any]:
    probe = ErrorProbe(op, True, 3, comm)
    norm, factor = probe.norm, probe.scale_to_one()
    owners = spread(comm)
    exact = probe.to_rows(owners)
    assert exact.norm == probe.norm
    return norm, factor, whole(owners, exact.product.v), whole(owners, exact.product.y)


@pytest.mark.parametrize("ranks", [2, 3, 13])
@pytest.mark.parametrize("scale", [1.0, 2.0**200])
@pytest.mark.parametrize("kind", ["products", "sum"])
def test_a_probe_is_the_same_on_any_number_of_ranks(kind: str, scale: float, ranks: int):
    exact, op = exact_sum(scale)
    if kind != "sum":
        op = gh.DenseOperator(exact)
    norm, factor, v, y = probed(op, ALONE.comm)
    assert norm == pytest.approx(np.linalg.norm(exact), rel=0.5)
    assert (factor == 1) == (scale == 1)
    np.testing.assert_allclose(y, factor * (exact @ v), rtol=0, atol=1e-12 * np.abs(y).max())
    for seen in on_threads(ranks, lambda comm: probed(op, comm)):
        assert seen[0] == pytest.approx(norm, rel=1e-13)
        assert seen[1] == factor
        np.testing.assert_array_equal(seen[2], v)
        np.testing.assert_allclose(seen[3], y, rtol=0, atol=1e-12 * np.abs(y).max())


@pytest.mark.parametrize("ranks", [1, 2, 3, 13])
@pytest.mark.parametrize("scale", [1.0, 2.0**200])
@pytest.mark.parametrize("every", [True, False])
def test_a_probe_by_rows_is_the_same_on_any_number_of_ranks(
    monkeypatch: pytest.MonkeyPatch, every: bool, scale: float, ranks: int
):
    """Of a structure of rank one, exactly where every row is read."""
    monkeypatch.setattr(probe_module, "EVERY_ROW", N if every else 1)
    monkeypatch.setattr(probe_module, "_AT_ONCE", 40 * N)
    exact = scale * toeplitz(N)

    def job(comm: Any) -> tuple[Any, ...]:
        probe = ErrorProbe(entries_only(exact), False, 3, comm, rows=90)
        norm, factor = probe.norm, probe.scale_to_one()
        owners = spread(comm)
        u = np.ones((N, 1))[owners.rows.mine] / N**0.5
        seen = probe.to_rows(owners)
        found = seen.measure(LowRank(u, np.array([2.0 * N**0.5]), owners=owners))
        return norm, factor, found.error, found.bound, probe.how

    norm, factor, error, bound, how = job(ALONE.comm)
    approximate = np.full((N, N), 2.0 / N**0.5)
    true_norm = np.linalg.norm(exact)
    true_error = np.linalg.norm(factor * exact - approximate) / np.linalg.norm(factor * exact)
    assert how == ("all rows" if every else how)
    assert every or "of 201 rows" in how
    assert (factor == 1) == (scale == 1)
    assert norm == pytest.approx(true_norm, rel=1e-12 if every else 0.2)
    assert error == pytest.approx(true_error, rel=1e-12 if every else 0.2)
    assert bound >= true_error * (1 - 1e-12)
    for seen in on_threads(ranks, job):
        assert seen[:2] == (norm, factor)
        assert seen[2:4] == pytest.approx((error, bound), rel=1e-13)


@pytest.mark.parametrize(("ranks", "columns"), [(5, 40), (9, 41), (9, 50)])
def test_ranks_that_outnumber_the_blocks_share_the_samples(ranks: int, columns: int):
    """Of a network, scaled; with more ranks a column than samples too. All of them multiply."""
    pytest.importorskip("torch")
    from network_cases import case

    model, inputs, targets = case("two layers", "mse")
    op = ScaledOperator(gh.GGNOperator(model, "mse", inputs, targets), 0.5)
    n = op.shape[0]
    v = np.random.default_rng(2).standard_normal((n, columns))

    def job(comm: Any) -> tuple[Any, Any, Any]:
        product = ProductColumns.shared(op, columns, lambda part: v[:, part], comm)
        every = comm.share((product.v, product.y))
        return product.widths, *(np.concatenate(x, axis=1) for x in zip(*every, strict=True))

    for widths, got_v, got_y in on_threads(ranks, job):
        assert (len(widths), sum(widths)) == (ranks, columns)
        np.testing.assert_array_equal(got_v, v)
        want = op @ v
        np.testing.assert_allclose(got_y, want, rtol=0, atol=1e-13 * np.abs(want).max())


@pytest.mark.parametrize("ranks", [1, 2, 9])
def test_columns_from_rows(ranks: int):
    """Every rank gets the slice it asks for, also where slices overlap or are empty."""
    x = np.random.default_rng(3).standard_normal((N, COLUMNS))
    parts = [slice(0, 3), slice(2, 7), slice(4, 4)]

    def job(comm: Any) -> Any:
        rows = spread(comm).rows
        return rows.to_columns(x[rows.mine], parts[comm.rank % 3])

    for rank, got in enumerate(on_threads(ranks, job)):
        np.testing.assert_array_equal(got, x[:, parts[rank % 3]])


class Twin(OneRank):
    """The first of two ranks; the other one has what this one has."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 2

    def share(self, x: Any) -> list[Any]:
        return [x, x]

    def allgather(self, x: Any, counts: Any) -> Any:
        return namespace(x).concatenate([x, x[: counts[1]]])

    def exchange(self, x: Any, sent: Any, received: Any) -> Any:
        return namespace(x).concatenate([x[: sent[0]][:count] for count in received])


def test_on_every_library(xp: ModuleType, dtype: Any, monkeypatch: pytest.MonkeyPatch):
    """The first of a group of two has twice its half of the sum, of the rows that it adds."""
    monkeypatch.setattr("gpu_hodlr.operators.product._BLOCK", 1)
    n = 200
    factor = np.linalg.cholesky(toeplitz(n)).astype(dtype)
    op, twin = Sum(xp.asarray(factor)), Twin()
    sketch = SketchColumns(op, 1, 0, twin)
    half = factor[:, : n // 2]
    omega, y = to_host(sketch.product.v), to_host(sketch.product.y)
    rows = slice(n // 2)
    want = 2 * half @ (half.T @ omega)
    close = {"rtol": 0, "atol": 100 * float(np.finfo(dtype).eps) * np.abs(want).max()}
    np.testing.assert_allclose(y[rows], want[rows], **close)
    omega, y = (to_host(x) for x in sketch.sampled_rows(np.array([[3, -1]])))
    assert omega.shape == y.shape == (1, 2, 1)
    owners = spread(twin, n)
    mine = to_host(sketch.product.y)[owners.rows.mine]
    np.testing.assert_array_equal(to_host(sketch.to_rows(owners).y), mine)
    own = xp.asarray(np.eye(n, 3, dtype=dtype)[owners.rows.mine])
    got = owners.rows.to_columns(own, slice(0, 3))
    assert isinstance(got, xp.ndarray)
    assert got.shape == (n, 3)


@pytest.mark.parametrize("ranks", [2, 12])
@pytest.mark.parametrize(
    ("scheme", "sampler"),
    [("hodlr", "products+entries"), ("hodlr", "products"), ("lowrank", "products")],
)
def test_compressed_by_ranks_that_share_samples(
    scheme: str, sampler: str, ranks: int, monkeypatch: pytest.MonkeyPatch
):
    """Twelve ranks outnumber the blocks of columns."""
    module = importlib.import_module("gpu_hodlr.compression.compress")
    monkeypatch.setattr(module, "communicator", lambda comm, device: comm)
    exact, op = exact_sum()
    options: dict[str, Any] = {
        "rtol": 1e-6, "leaf_size": 12, "scheme": scheme, "sampler": sampler, "max_rank": N,
    }  # fmt: skip
    v = np.random.default_rng(4).standard_normal((N, 2))

    def job(comm: Any) -> tuple[Any, ...]:
        K = gh.compress(op, **options, comm=comm)
        return K.ranks, K.report.error, K @ v

    found, error, y = job(ALONE.comm)
    np.testing.assert_allclose(y, exact @ v, rtol=0, atol=1e-5 * np.abs(y).max())
    for seen in on_threads(ranks, job):
        assert seen[0] == found
        assert seen[1] == pytest.approx(error, rel=1e-3)
        np.testing.assert_allclose(seen[2], y, rtol=0, atol=1e-11 * np.abs(y).max())


def test_what_is_held_by_columns_is_let_go():
    """Of a sketch and a probe spread by rows nothing refers to the columns."""
    exact, op = exact_sum()
    owners = spread(ALONE.comm)
    columns, probe = SketchColumns(op, 40, 0), ErrorProbe(op, True, 0)
    held = [weakref.ref(columns.product.v), weakref.ref(columns.product.y)]
    held += [weakref.ref(probe._seen.product.v), weakref.ref(probe._seen.product.y)]
    rows, _spread = columns.to_rows(owners), probe.to_rows(owners)
    assert all(ref() is not None for ref in held)
    del columns, probe
    assert all(ref() is None for ref in held)
    rows.grow(3)
    np.testing.assert_allclose(rows.y, exact @ rows.omega, atol=1e-12 * np.abs(rows.y).max())


def test_what_random_columns_say_of_a_rank():
    """The mean of 1 / chi^2 with s - k degrees of freedom, which one or none have not."""
    inflation = regression_inflation(10, 2.0)
    assert inflation.shape == (11,)
    np.testing.assert_allclose(inflation[[0, 3, 8]], 2 * 9 / np.array([90, 42, 2]), rtol=1e-15)
    assert np.isinf(inflation[9:]).all()
    assert [samples_for(rank) for rank in (0, 1, 40)] == [10, 11, 70]
