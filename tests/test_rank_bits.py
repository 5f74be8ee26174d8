"""The bits that do not depend on the number of ranks: orders, ranks, bases, couplings, error.

BLAS sums in another order for another shape, and near-equal pivots then change places: what the
ranks share out they compute in the same pieces, whatever their number.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import distributed_cases as cases
import numpy as np
import pytest
from matrix_cases import entries_only, toeplitz
from thread_ranks import on_threads

import gpu_hodlr as gh
from gpu_hodlr.compression.probe import ErrorProbe
from gpu_hodlr.distributed import Communicator, Ownership
from gpu_hodlr.operators import ProductColumns, SketchColumns
from gpu_hodlr.operators.product import column_blocks
from gpu_hodlr.ordering import auto, build_tree
from gpu_hodlr.tree import rows_tree

SIZES = (2, 3, 5)


@cache
def network(dtype: Any = np.float64) -> gh.GGNOperator:
    """N = 457."""
    pytest.importorskip("torch")
    from network_cases import data, image_network, images

    targets = data((64,), 10, "cross_entropy", n=25)[1]
    model = image_network(64, 6, 10)
    return gh.GGNOperator(model, "cross_entropy", images(8, n=25, border=1), targets, dtype=dtype)


def in_six_dimensions(n: int = 400) -> gh.KernelOperator:
    """Whose entries are a matrix product."""
    return gh.KernelOperator(np.random.default_rng(1).random((n, 6)), "gaussian", 0.7, 0.1)


def of_two_kinds(n: int = 400) -> gh.KernelOperator:
    """A line and a square, which needs more columns."""
    square = np.random.default_rng(0).random((n // 4, 2))
    line = np.stack([np.linspace(0, 1, n - len(square)), np.full(n - len(square), 2.0)], axis=1)
    return gh.KernelOperator(np.concatenate([line, square]), "matern32", 0.2, nugget=0.1)


def by_products(exact: np.ndarray) -> gh.FunctionOperator:
    """Of one BLAS thread, which a user's own product need not be."""
    return gh.FunctionOperator(len(exact), matmat=gh.DenseOperator(exact).matmat)


NESTED: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "dense": (lambda: toeplitz(500), {}),
    "dense, float32": (lambda: toeplitz(300).astype(np.float32), {"rtol": 1e-3}),
    "dense, angle": (lambda: cases.plane(400).to_dense(), {"ordering": "angle"}),
    "entries": (lambda: entries_only(toeplitz(300)), {"ordering": "gram"}),
    "plane": (cases.plane, {}),
    "some nodes grow": (lambda: of_two_kinds(1000), {"rtol": 1e-10, "leaf_size": 125}),
    "six dimensions": (in_six_dimensions, {"rtol": 1e-3}),
    "six dimensions, products": (
        in_six_dimensions, {"rtol": 1e-3, "sampler": "products+entries", "ordering": "gram"},
    ),
    "products": (lambda: by_products(toeplitz(300)), {}),
    "fmm": (
        lambda: gh.DenseOperator(cases.plane(400).to_dense()),
        {"scheme": "fmm", "budget": 0.2, "ordering": "angle"},
    ),
    "fmm, six dimensions": (in_six_dimensions, {"scheme": "fmm", "budget": 0.2, "rtol": 1e-3}),
    "network": (network, {"ordering": "auto", "rtol": 1e-3}),
    "network, float32": (lambda: network(np.float32), {"ordering": "angle", "rtol": 1e-2}),
    "network, a few columns more": (network, {"rtol": 1e-6, "max_rank": 101}),  # 160 + 1
    "network, entries": (network, {"sampler": "entries", "rtol": 1e-3, "ordering": "auto"}),
}  # fmt: skip


@pytest.mark.parametrize("name", NESTED)
def test_nested_bases_are_those_of_one_rank(name: str):
    make, options = NESTED[name]
    op = make()

    def compressed(*comm: Communicator) -> gh.CompressedMatrix:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return gh.compress(op, **{**cases.DEFAULTS, **options}, comm=comm[0] if comm else None)

    serial = compressed()
    assert any(serial.ranks)
    sums = name.startswith("network")  # of which more than 4 ranks may form a part each
    for size in (2, 3, 4) if sums else SIZES:
        for K in on_threads(size, compressed):
            assert not isinstance(K, Exception), K
            np.testing.assert_array_equal(K.tree.leaves, serial.tree.leaves)
            assert K.report.ordering == serial.report.ordering
            assert K.ranks == serial.ranks
            assert {type(r) for level in K.ranks for r in level} == {int}
            assert K.report.error == serial.report.error
            assert K.report.frobenius_norm == serial.report.frobenius_norm
            same_levels(K, serial)


def test_samples_do_not_depend_on_the_number_of_ranks():
    """Of a root that is not unique: another order of near-equal pivots gives others."""

    def job(*comm: Communicator) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", gh.errors.RankCapWarning)
            options = {**cases.DEFAULTS, "rtol": 1e-6, "max_rank": 101, "scheme": "hss"}
            K = gh.compress(network(), **options, comm=comm[0] if comm else None)
        return K.factorize(0.01).sample(2, seed=1)

    alone = job()
    for size in (2, 3, 4):
        for got in on_threads(size, job):
            np.testing.assert_allclose(got, alone, rtol=0, atol=1e-9 * np.abs(alone).max())


def same_levels(K: Any, serial: Any) -> None:
    owners, depth = K.owners, K.tree.depth
    for i, (level, alone) in enumerate(
        zip(K.structure.levels, serial.structure.levels, strict=True)
    ):
        mine, family = owners.mine(depth - i), owners.family(depth - i)
        np.testing.assert_array_equal(level.T, alone.T[mine])
        if i:
            np.testing.assert_array_equal(level.order, alone.order[mine])
        if K.report.scheme == "hss":
            pairs = slice(family.start // 2, family.stop // 2)
            np.testing.assert_array_equal(level.B, alone.B[pairs])


@pytest.mark.parametrize("num", [1, 3, 10, 33, 160])
def test_a_product_is_that_of_one_rank(num: int):
    """Of every matrix, and by user's functions; also where ranks outnumber the blocks."""
    op = network()
    dense = op.to_dense()
    operators = {
        "network": op,
        "dense": gh.DenseOperator(dense),
        "points": in_six_dimensions(),
        "function": by_products(dense),
        "entries": entries_only(dense),
    }
    for name, operator in operators.items():
        v = np.random.default_rng(0).standard_normal((operator.shape[0], num))

        def job(comm: Any, operator: Any = operator, v: Any = v) -> Any:
            product = ProductColumns.shared(operator, num, lambda part: v[:, part], comm)
            assert product.v.shape[1] == product.widths[comm.rank]
            return product.y

        (alone,) = on_threads(1, job)
        np.testing.assert_allclose(alone, operator @ v, rtol=0, atol=1e-12 * np.abs(alone).max())
        for size in (2, 3, 11):
            y = np.concatenate(on_threads(size, job), axis=1)
            # Several ranks sum a block.
            if name == "network" and num >= 40 and size > len(column_blocks(num)):
                np.testing.assert_allclose(y, alone, rtol=0, atol=1e-13 * np.abs(alone).max())
            else:
                np.testing.assert_array_equal(y, alone)


@pytest.mark.parametrize("kind", ["products", "entries"])
def test_a_probe_and_a_sketch_are_those_of_one_rank(kind: str):
    op = in_six_dimensions()

    def job(comm: Any) -> tuple[float, Any, Any]:
        probe = ErrorProbe(op, kind == "products", 3, comm)
        sketch = SketchColumns(op, 40, 3, comm)
        energy, rows = sketch.energy(), sketch.sampled_rows(np.array([[3, -1], [7, 0]]))
        probe.to_rows(Ownership(comm, rows_tree(op.shape[0], 16).leaves))
        return probe.norm, energy, rows

    (alone,) = on_threads(1, job)
    for size in SIZES:
        for norm, energy, rows in on_threads(size, job):
            assert norm == alone[0]
            np.testing.assert_array_equal(energy, alone[1])
            for mine, want in zip(rows, alone[2], strict=True):
                np.testing.assert_array_equal(mine, want)


@pytest.mark.parametrize("name", ["network", "six dimensions"])
def test_auto_reads_the_same_entries(name: str):
    """The ranks read the blocks of whole nodes: the same ones for any number of ranks."""
    op = network() if name == "network" else in_six_dimensions()
    tree = build_tree(op, "gram", 20, 0, 1.0)[0]

    def entries(comm: Any) -> Any:
        return auto._DrawnNodes(op, 0, None)(tree, tree.depth, 3).entries(op, comm)

    (alone,) = on_threads(1, entries)
    assert alone.shape[2] == 160
    for size in (*SIZES, 17):
        for got in on_threads(size, entries):
            np.testing.assert_array_equal(got, alone)


def test_a_log_determinant_counts_shared_siblings_once():
    def job(*comm: Communicator) -> float:
        options = {**cases.DEFAULTS, "scheme": "hodlr"}
        K = gh.compress(cases.plane(400), **options, comm=comm[0] if comm else None)
        return K.factorize(0.01).logdet()

    serial = job()
    for size in SIZES:
        assert on_threads(size, job) == pytest.approx([serial] * size, rel=1e-12)
