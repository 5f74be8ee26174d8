"""Networks of any layers in the eigenbasis of their stored root, against dense matrices."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import dense_oracles
import numpy as np
import pytest

pytest.importorskip("torch")

import network_models
from host_cupy import HostCupy
from thread_ranks import on_threads

import gpu_hodlr as gh
from gpu_hodlr.devices import to_host
from gpu_hodlr.eigenbasis import LayerShape, Rotated, rotated_root
from gpu_hodlr.eigenbasis import root as root_module
from gpu_hodlr.errors import ArgumentError, MemoryEstimateError
from gpu_hodlr.networks.root import layer_shapes
from gpu_hodlr.operators.scaled import ScaledOperator
from gpu_hodlr.structures import dealt_rows

NETWORKS = (
    "lenet", "resnet", "embedding", "layer and group norm", "transformer", "adapter", "lstm",
    "language model",
)  # fmt: skip
FEW = ("lenet", "embedding")


def operator(name: str, n: int = 20, **given: Any) -> Any:
    """The Gauss-Newton matrix of a network, read by its root."""
    model, loss, inputs, targets, options = network_models.made(name, n)
    return gh.GGNOperator(model, loss, inputs, targets, **options, entries="root", **given)


def tables() -> Any:
    """A root of layers whose units keep their basis, and of some that do not."""
    return np.random.default_rng(3).standard_normal((9 * 4 + 5 * 3 + 4, 12)), [
        LayerShape(9, 4), LayerShape(5, 3, True), LayerShape(4, 1),
    ]  # fmt: skip


def oracle(matrix: Rotated, dense: np.ndarray) -> np.ndarray:
    """Q^T K Q."""
    Q = matrix.basis.rotate_back(np.eye(matrix.size))
    np.testing.assert_allclose(Q.T @ Q, np.eye(len(dense)), rtol=0, atol=1e-12)
    return Q.T @ dense @ Q


def lower(matrix: Rotated, tau: float) -> np.ndarray:
    """What the strips hold, strictly below the diagonal."""
    found = np.zeros((matrix.size, matrix.size))
    for _, strips in matrix.block_rows(range(int(matrix.first_units[-1])), tau):
        for strip in strips:
            for unit, block in enumerate(strip.entries):
                column = strip.column + unit * strip.stride
                found[strip.row : strip.row + len(block), column : column + block.shape[1]] = block
    return np.tril(found, -1)


# --- the basis -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("named", "want"),
    [
        ([("0.weight", (5, 4)), ("0.bias", (5,))], [(5, 5, True)]),
        ([("0.weight", (5, 4)), ("1.bias", (5,))], [(5, 4, False), (5, 1, False)]),
        ([("0.weight", (5, 4)), ("0.bias", (4,))], [(5, 4, False), (4, 1, False)]),
        ([("c.weight", (6, 2, 3, 3)), ("c.bias", (6,))], [(6, 19, True)]),
        ([("n.weight", (7,)), ("n.bias", (7,))], [(7, 2, True)]),
        ([("n.weight", (7,)), ("n.bias", (7,)), ("n.more", (7,))], [(7, 2, True), (7, 1, False)]),
        ([("e.weight", (9, 3))], [(9, 3, False)]),
        ([("p", (1, 8, 3)), ("s", ())], [(8, 3, False), (1, 1, False)]),
        ([("t", (1, 1, 3)), ("none", (0, 4))], [(1, 3, False)]),
        (
            [(f"l.{k}", s) for k, s in zip("whbc", [(8, 3), (8, 2), (8,), (8,)], strict=True)],
            [(8, 3, False), (8, 3, True), (8, 1, False)],
        ),
    ],
)
def test_parameters_as_matrices(named: Any, want: Any):
    assert layer_shapes(named) == want
    shape = dict(named)
    assert sum(w * f for w, f, _ in want) == sum(int(np.prod(s)) for s in shape.values())


def test_moments_of_the_root_are_diagonal_in_the_basis():
    """Of a convolution and its bias: sums over rows of G G^T and G^T G, unfolded by hand."""
    op = operator("lenet")
    first = op.eigenbasis().basis.layers[0]
    assert (first.width, first.inputs, first.bias) == (2, 10, True)
    rows = to_host(op.root()).T[:, :20]
    G = np.concatenate([rows[:, :18].reshape(-1, 2, 9), rows[:, 18:, None]], axis=2)
    for basis, moment in (
        (first.U, np.einsum("kwf,kvf->wv", G, G)), (first.V, np.einsum("kwf,kwg->fg", G, G)),
    ):  # fmt: skip
        turned = basis.T @ moment @ basis
        values = np.diagonal(turned)
        np.testing.assert_allclose(turned, np.diag(values), rtol=0, atol=1e-12 * values[0])
        assert (np.diff(values) <= 1e-12 * values[0]).all()


def test_vectors_alone_and_wide_tables_keep_their_basis(monkeypatch: pytest.MonkeyPatch):
    at, shapes = tables()
    monkeypatch.setattr(root_module, "_WIDEST", 6)
    table, layer, vector = rotated_root(at, shapes).basis.layers
    assert table.U is None
    assert vector.U is None
    assert layer.U.shape == (5, 5)
    np.testing.assert_array_equal(vector.V, [[1]])
    assert abs(table.V - np.eye(4)).max() > 0.1


@pytest.mark.parametrize("name", [*NETWORKS, "tables"])
def test_entries(name: str, monkeypatch: pytest.MonkeyPatch):
    """Diagonal, whole rows, and strips: with threshold 0 they are the whole lower triangle."""
    if name == "tables":
        monkeypatch.setattr(root_module, "_WIDEST", 6)
        matrix = rotated_root(*tables())
        dense = tables()[0] @ tables()[0].T
    else:
        op = operator(name, n=6)
        matrix, dense = op.eigenbasis(), op.to_dense()
    R = oracle(matrix, dense)
    atol = 1e-12 * abs(R).max()
    np.testing.assert_allclose(matrix.d, np.diagonal(R), rtol=0, atol=atol)
    some = np.arange(0, matrix.size, 3)
    np.testing.assert_allclose(matrix.rows(some), R[some], rtol=0, atol=atol)
    np.testing.assert_allclose(lower(matrix, 0.0), np.tril(R, -1), rtol=0, atol=atol)
    tau = 1e-2 * abs(R).max()
    above = abs(np.tril(R, -1)) > tau
    np.testing.assert_allclose(lower(matrix, tau)[above], R[above], rtol=1e-9)
    P, C = np.linalg.eigh(R)[1][:, -2:], np.linalg.eigvalsh(R)[-2:]
    rest, left = matrix.without(P, C), R - (P * C) @ P.T
    np.testing.assert_allclose(lower(rest, 0.0), np.tril(left, -1), rtol=0, atol=atol)
    np.testing.assert_allclose(rest.rows(some), left[some], rtol=0, atol=atol)
    np.testing.assert_allclose(matrix.scaled(4.0).rows(some), 4 * R[some], rtol=0, atol=4 * atol)
    single = matrix.astype(np.float32)
    assert single.dtype == single.rows(some).dtype == np.float32
    np.testing.assert_allclose(single.rows(some), R[some], rtol=0, atol=1e-5 * abs(R).max())


def test_a_root_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch):
    from gpu_hodlr import devices

    monkeypatch.setattr(devices, "free_bytes", lambda *given: 1000)
    with pytest.raises(MemoryEstimateError, match="root of 12 x 55 in the eigenbasis"):
        rotated_root(*tables())


# --- the compressed matrix -------------------------------------------------------------------


@pytest.mark.parametrize("rtol", [1e-1, 1e-3, 1e-6])
@pytest.mark.parametrize("name", NETWORKS)
def test_promise(name: str, rtol: float):
    op = operator(name)
    exact = op.to_dense()
    K = gh.compress(op, "kfe", rtol=rtol)
    error = dense_oracles.frobenius_error(K.to_dense(), exact)
    assert error <= 1.5 * rtol  # what is measured by ten vectors is at most rtol
    assert 0.5 * error <= max(K.report.error, 1e-14)
    assert K.report.error <= rtol
    assert K.num_stored >= sum(a.size for a in K.structure.basis.arrays()) + len(exact)


@pytest.mark.parametrize("name", FEW)
def test_product_diagonal_and_trace(name: str, xp: ModuleType, dtype: Any):
    op = operator(name, dtype=dtype)
    if xp is not np:
        op = op.to("cuda")
    K = gh.compress(op, "kfe", rtol=1e-2)
    rounding = {4: 2e-4, 8: 1e-11}[np.dtype(dtype).itemsize]
    dense_oracles.check_products(K, xp, rounding)


@pytest.mark.parametrize("name", NETWORKS)
def test_solve_and_logdet(name: str):
    """In the eigenbasis, where nothing lies outside its range."""
    K = gh.compress(operator(name), "kfe", rtol=1e-3)
    dense = K.to_dense()
    dense += 0.1 * np.linalg.norm(dense) * np.eye(len(dense))
    F = K.factorize(0.1 * np.linalg.norm(K.to_dense()))
    v = np.random.default_rng(1).standard_normal((len(dense), 2))
    np.testing.assert_allclose(dense @ F.solve(v), v, rtol=0, atol=1e-8)
    assert F.info.converged
    assert abs(F.logdet() - np.linalg.slogdet(dense)[1]) <= max(5 * F.logdet_error, 1e-6)


def test_solve_on_a_device(stand_in: HostCupy):
    K = gh.compress(operator("embedding", n=6).to("cuda"), "kfe", rtol=1e-3)
    dense = to_host(K.to_dense())
    damping = 0.1 * float(np.linalg.norm(dense))
    b = np.ones(len(dense))
    x = to_host(K.factorize(damping).solve(stand_in.cupy.asarray(b)))
    np.testing.assert_allclose(dense @ x + damping * x, b, rtol=0, atol=1e-8)


@pytest.mark.parametrize("rtol", [1e-1, 1e-12])
def test_diagonal_of_units_that_are_not_rotated(monkeypatch: pytest.MonkeyPatch, rtol: float):
    """Of a table: blocks of its units alone, a few units at a time."""
    monkeypatch.setattr(root_module, "_WIDEST", 5)
    op = operator("embedding")
    for together in (1, 4, 1000):
        K = gh.compress(op, "kfe", rtol=rtol)
        assert K.structure.basis.layers[0].U is None
        assert K.structure.entries > 0
        from gpu_hodlr import batched

        with monkeypatch.context() as patch:
            patch.setattr(batched, "columns_at_once", lambda *given: together)  # noqa: B023
            diagonal = K.diagonal()
        atol = 1e-13 * abs(diagonal).max()
        np.testing.assert_allclose(diagonal, np.diagonal(K.to_dense()), rtol=0, atol=atol)


@pytest.mark.parametrize("name", FEW)
def test_files(name: str, tmp_path: Path):
    K = gh.compress(operator(name), "kfe", rtol=1e-2)
    K.save(tmp_path / "K.npz")
    again = gh.load(tmp_path / "K.npz")
    assert isinstance(again, gh.KFEMatrix)
    v = np.random.default_rng(2).standard_normal((K.shape[0], 2))
    np.testing.assert_array_equal(again @ v, K @ v)
    assert again.num_stored == K.num_stored


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", FEW)
def test_ranks_have_the_same_bits(name: str, size: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dealt_rows, "A_PART", 40)
    monkeypatch.setattr(root_module, "_WIDEST", 5)  # the embedding's units keep their basis
    op = operator(name)
    v = np.random.default_rng(0).standard_normal((op.shape[0], 2))

    def job(comm: Any) -> Any:
        K = gh.compress(op, "kfe", rtol=1e-3, comm=comm)
        return K.num_stored, *K.structure.rows.gathered(), K @ v, K.diagonal()

    alone = job(None)
    for result in on_threads(size, job):
        assert isinstance(result, tuple), result
        for mine, one in zip(result[:-1], alone[:-1], strict=True):
            np.testing.assert_array_equal(mine, one)
        np.testing.assert_allclose(result[-1], alone[-1], rtol=1e-12)


def test_a_scaled_matrix_and_a_fisher_matrix_have_it():
    op = operator("lenet")
    exact = 3 * op.to_dense()
    K = gh.compress(ScaledOperator(op, 3.0), "kfe", rtol=1e-3)
    assert dense_oracles.frobenius_error(K.to_dense(), exact) <= 1.5e-3
    model, loss, inputs, targets, options = network_models.made("lenet", 10)
    fisher = gh.FisherOperator(model, loss, inputs, targets, **options, entries="root")
    K = gh.compress(fisher, "kfe", rtol=1e-3)
    assert dense_oracles.frobenius_error(K.to_dense(), fisher.to_dense()) <= 1.5e-3


def test_only_a_root_has_it():
    model, loss, inputs, targets, options = network_models.made("lenet")
    for entries in ("dense", "none"):
        op = gh.GGNOperator(model, loss, inputs, targets, **options, entries=entries)
        assert not op.has_eigenbasis
        with pytest.raises(ArgumentError, match=rf"'root'; .*entries='{entries}' has none"):
            gh.compress(op, "kfe")
    assert not operator("lenet").summand(0, 2).has_eigenbasis


def test_auto_considers_it(monkeypatch: pytest.MonkeyPatch):
    """And takes another form where the matrix in the eigenbasis does not fit."""
    op = operator("lenet")
    K = gh.compress(op, "auto", rtol=1e-1, leaf_size=16)
    assert "kfe" in K.report.choice
    assert "kfe out of reach" not in K.report.choice

    def too_large(*given: Any) -> Any:
        raise MemoryEstimateError("too large")

    monkeypatch.setattr("gpu_hodlr.networks.root.rotated_root", too_large)
    K = gh.compress(op, "auto", rtol=1e-1, leaf_size=16)
    assert "kfe out of reach" in K.report.choice
    assert K.report.scheme != "kfe"
