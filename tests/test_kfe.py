"""Scheme "kfe" against dense matrices: promise, products, diagonal, arithmetic, files, ranks."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType
from typing import Any

import dense_oracles
import numpy as np
import pytest

pytest.importorskip("torch")

from eigenbasis_cases import CASES, network, operator
from matrix_cases import toeplitz
from test_memory import estimates
from thread_ranks import on_threads
from torch import nn

import gpu_hodlr as gh
from gpu_hodlr import batched
from gpu_hodlr.devices import to_host
from gpu_hodlr.distributed import ALONE, Ownership
from gpu_hodlr.errors import ArgumentError, FileFormatError
from gpu_hodlr.schemes import kfe, rotated_ranks
from gpu_hodlr.schemes.rotated_ranks import RotatedRanks
from gpu_hodlr.structures import dealt_rows, rotated_sparse
from gpu_hodlr.tree import rows_tree

FLOOR = {np.dtype(np.float64): 1e-13, np.dtype(np.float32): 2e-6}


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch):
    """Rows in parts of few entries, as those of large matrices are in parts of many."""
    monkeypatch.setattr(dealt_rows, "A_PART", 40)


@pytest.mark.parametrize("rtol", [1e-1, 1e-3, 1e-8])
@pytest.mark.parametrize("name", CASES)
def test_promise(name: str, rtol: float):
    op = operator(name)
    exact = op.to_dense()
    K = gh.compress(op, "kfe", rtol=rtol, ordering="random", leaf_size=16)  # of no use
    assert isinstance(K, gh.KFEMatrix)
    report = K.report
    assert (report.scheme, report.ordering, report.rank_cap_hit) == ("kfe", "natural", False)
    error = dense_oracles.frobenius_error(K.to_dense(), exact)
    assert error <= 1.5 * rtol  # what is measured by ten vectors is at most rtol
    assert 0.5 * error <= max(K.report.error, 1e-14)
    assert K.report.error <= 2 * error + 1e-14


@pytest.mark.parametrize("name", CASES)
def test_rtol_is_kept_without_slack(name: str):
    """Where the error measured is larger all the same, the threshold is lowered."""
    for seed in range(6):
        for rtol in (3e-1, 1e-1, 1e-2):
            assert gh.compress(operator(name), "kfe", rtol=rtol, seed=seed).report.error <= rtol


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("rtol", [0.5, 1e-2])
def test_the_largest_entries_in_the_basis_are_kept(name: str, rtol: float):
    """And no others; rows of some units have none."""
    op = operator(name)
    form = gh.compress(op, "kfe", rtol=rtol).structure
    Q = form.basis.rotate_back(np.eye(form.basis.size))
    exact = Q.T @ op.to_dense() @ Q
    np.testing.assert_allclose(form.D, np.diagonal(exact), rtol=0, atol=1e-13)
    kept, lengths = np.zeros_like(exact), np.diff(form.starts)
    assert len(form.columns) == len(form.values) == lengths.sum()
    kept[np.repeat(np.arange(len(lengths)), lengths), form.columns] = form.values
    assert not np.triu(kept).any()
    below, atol = (
        np.tril(exact, -1),
        1e-6 * abs(exact).max(initial=0.0),
    )  # some are formed in float32
    np.testing.assert_allclose(kept[kept != 0], below[kept != 0], rtol=0, atol=atol)
    smallest = abs(form.values).min(initial=np.inf)
    assert abs(below[kept == 0]).max(initial=0.0) <= smallest + atol


@pytest.mark.parametrize("room", [1, 300, 1 << 30], ids=["each alone", "some", "all"])
@pytest.mark.parametrize("name", ["autoencoder", "larger classifier", "frozen outputs"])
def test_strips_are_looked_at_together(
    xp: ModuleType, name: str, room: int, monkeypatch: pytest.MonkeyPatch
):
    """However many, whatever units they are cut at, the same rows come of them."""
    op = operator(name, device="cpu" if xp is np else "cuda")
    want = gh.compress(op, "kfe", rtol=1e-2).structure
    at_once = batched.columns_at_once

    def columns_at_once(like: Any, nbytes: int, **more: Any) -> int:
        own = nbytes in (4 * kfe._COPIES, 8 * kfe._COPIES)
        return room if own else at_once(like, nbytes, **more)

    monkeypatch.setattr(batched, "columns_at_once", columns_at_once)
    got = gh.compress(op, "kfe", rtol=1e-2).structure
    assert got.entries > 20
    for one, other in zip(
        got.arrays() + got.index_arrays(), want.arrays() + want.index_arrays(), strict=True
    ):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(to_host(one), to_host(other))


def test_the_entries_are_counted_before_they_are_made(monkeypatch: pytest.MonkeyPatch):
    """Two indices of 32 bits each, and twice, as they are sorted."""
    said = estimates(monkeypatch, kfe)
    K = gh.compress(operator("autoencoder"), "kfe", rtol=1e-3)
    assert said[-1] == pytest.approx(K.structure.entries * 2 * (8 + 4), rel=0.2)


def test_a_second_pass_corrects_the_first():
    reports = [
        gh.compress(operator("autoencoder"), "kfe", rtol=0.1, seed=s).report for s in range(8)
    ]
    assert {report.passes for report in reports} >= {1, 2}
    assert max(report.error for report in reports) <= 0.1


def test_product_diagonal_and_trace(xp: ModuleType, dtype: Any):
    """Of every kind of array, against the dense matrix it stands for."""
    for name in CASES:
        op = operator(name, dtype=dtype, device="cpu" if xp is np else "cuda")
        K = gh.compress(op, "kfe", rtol=1e-2)
        dense_oracles.check_products(K, xp, 100 * FLOOR[np.dtype(dtype)])


def of_two_features() -> Any:
    """Outputs that depend on one hidden unit: each has a weight and a bias, which are coupled."""
    inputs = np.random.default_rng(0).standard_normal((30, 5))
    return gh.GGNOperator(network((5, 1, 4), nn.Tanh), "mse", inputs, np.zeros((30, 4)))


@pytest.mark.parametrize("name", [*CASES, "two features"])
def test_the_diagonal_in_parts_and_of_what_lies_outside_the_basis(
    name: str, monkeypatch: pytest.MonkeyPatch
):
    """Few rows of U and V and few units at a time; what was added has eigenvalues everywhere."""
    op = of_two_features() if name == "two features" else operator(name)
    form = gh.compress(op, "kfe", rtol=1e-2).structure
    d = np.random.default_rng(0).uniform(1, 2, form.n)
    cases = [
        (made, made.matmat(np.eye(form.n))) for made in (form, form.plus_diagonal(d).absorbed()[0])
    ]
    monkeypatch.setattr(rotated_sparse, "_FEATURES", 3)
    monkeypatch.setattr(batched, "columns_at_once", lambda like, nbytes: 1)
    for made, dense in cases:
        np.testing.assert_allclose(made.diagonal(), np.diagonal(dense), rtol=0, atol=1e-12)


def test_a_low_rank_part_takes_the_place_of_entries(monkeypatch: pytest.MonkeyPatch):
    """The same promise with fewer entries; never for outputs that are not coupled."""
    op = operator("larger classifier")
    exact, given = op.to_dense(), {"rtol": 1e-4}
    K = gh.compress(op, "kfe", max_rank=200, **given)
    plain = gh.compress(op, "kfe", max_rank=1, **given)
    for made in (K, plain):
        assert dense_oracles.frobenius_error(made.to_dense(), exact) <= 1.2e-4  # of ten vectors
    assert 5 <= K.ranks[0][0] <= 200
    assert plain.ranks[0][0] <= 1
    assert K.structure.entries < 0.8 * plain.structure.entries
    assert K.num_stored < plain.num_stored
    np.testing.assert_allclose(K.diagonal(), np.diagonal(K.to_dense()), rtol=0, atol=1e-14)
    monkeypatch.setattr(rotated_ranks, "_SPARSE", 0)
    assert gh.compress(operator("autoencoder"), "kfe", rtol=1e-2).ranks == ((0,),)


def test_the_low_rank_part_is_made_again_for_a_much_tighter_tolerance():
    """What a loose one made has too few columns; the energies of the old one are not kept."""
    op, owners = operator("larger classifier"), Ownership(ALONE.comm, rows_tree(693, 1).leaves)
    ranks = RotatedRanks(op, 200, 0, owners)
    norm = np.linalg.norm(op.to_dense())
    found = [ranks.least(rtol * norm) for rtol in (3e-4, 1e-6, 3e-4)]
    fresh = [RotatedRanks(op, 200, 0, owners).least(rtol * norm) for rtol in (3e-4, 1e-6)]
    sizes = [rest.matrix.P.shape[1] for rest in found]
    assert sizes[0] < sizes[1]
    for one, again, rtol in zip(found, fresh, (3e-4, 1e-6), strict=False):
        assert one.numbers(rtol * norm) == again.numbers(rtol * norm)


def test_storage_counts_the_basis_and_the_indices():
    K = gh.compress(operator("classifier"), "kfe", rtol=1e-2)
    basis = sum(a.size for a in K.structure.basis.arrays())
    entries = K.structure.entries
    assert K.structure.columns.dtype == np.uint16  # a quarter of a number
    M = K.structure.basis.size
    assert K.num_stored == basis + M + int(entries + (2 * entries + 4 * M) / 8)


def test_stored_in_single_precision():
    op, exact = operator("classifier"), operator("classifier").to_dense()
    K = gh.compress(op, "kfe", rtol=1e-4, storage_dtype="float32")
    assert K.dtype == np.float64
    assert K.structure.dtype == np.float32
    assert dense_oracles.frobenius_error(K.to_dense(), exact) <= 2e-4


def test_in_a_wider_type_the_basis_is_orthonormal_again():
    form = gh.compress(operator("classifier"), "kfe", rtol=1e-2).structure
    assert form.astype(np.dtype(np.float64)) is form
    narrow = form.astype(np.dtype(np.float32))
    wide = narrow.astype(np.dtype(np.float64))
    assert (narrow.dtype, wide.dtype) == (np.float32, np.float64)
    for layer, stored in zip(wide.basis.layers, narrow.basis.layers, strict=True):
        np.testing.assert_allclose(layer.V.T @ layer.V, np.eye(layer.features), rtol=0, atol=1e-13)
        np.testing.assert_allclose(layer.V, stored.V, rtol=0, atol=1e-6)
    again = wide.astype(np.dtype(np.float32))
    for layer, given in zip(again.basis.layers, wide.basis.layers, strict=True):
        np.testing.assert_array_equal(layer.V, given.V.astype(np.float32))


def test_arithmetic():
    K = gh.compress(operator("autoencoder"), "kfe", rtol=1e-2)
    dense = K.to_dense()
    d = np.random.default_rng(0).random(len(dense))
    for made, want in (
        (2 * K, 2 * dense), (-K, -dense), (K + gh.Diagonal(d), dense + np.diag(d)),
        (3 * (K + gh.Diagonal(d)), 3 * (dense + np.diag(d))),
    ):  # fmt: skip
        np.testing.assert_allclose(made.to_dense(), want, rtol=0, atol=1e-13)
        np.testing.assert_allclose(made.diagonal(), np.diagonal(want), rtol=0, atol=1e-13)


def test_torch_in_torch_out():
    import torch

    K = gh.compress(operator("classifier"), "kfe", rtol=1e-2)
    v = torch.ones(K.shape[0], dtype=torch.float64)
    assert torch.equal(K @ v, torch.from_numpy(K @ v.numpy()))


@pytest.mark.parametrize("name", ["autoencoder", "classifier", "one layer"])
def test_files(name: str, tmp_path: Path, small_parts: None):
    """The same bits from a file, with a diagonal of the user's order and without."""
    K = gh.compress(operator(name), "kfe", rtol=1e-2)
    for made in (K, K + gh.Diagonal(np.arange(1.0, K.shape[0] + 1))):
        made.save(tmp_path / "K.npz")
        again = gh.load(tmp_path / "K.npz")
        assert isinstance(again, gh.KFEMatrix)
        v = np.random.default_rng(2).standard_normal((K.shape[0], 2))
        np.testing.assert_array_equal(again @ v, made @ v)
        assert again.num_stored == made.num_stored
        assert again.report == made.report


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("D", lambda a: a[:-1]),
        ("values", lambda a: a[:-1]),
        ("columns", lambda a: a + 60_000),
        ("lengths", lambda a: -a),
        ("cuts", lambda a: a[1:]),
        ("cuts", lambda a: a[:0]),
        ("columns", lambda a: a.astype(float)),
        ("lengths", lambda a: a.astype(float)),
        ("P", lambda a: a[:-1]),
        ("V0", lambda a: a[:-1]),
        ("U0", lambda a: a[:-1]),
        ("layers", lambda a: a[:, :1]),
        ("D", lambda a: a.astype(np.float32)),
    ],
)
def test_damaged_files_are_refused(name: str, change: Any, tmp_path: Path):
    gh.compress(operator("classifier"), "kfe", rtol=1e-2).save(tmp_path / "K.npz")
    with np.load(tmp_path / "K.npz") as file:
        arrays = {key: file[key] for key in file}
    [key] = [key for key in arrays if key.rpartition("/")[2] == name]
    arrays[key] = change(arrays[key])
    np.savez(tmp_path / "damaged.npz", **arrays)
    with pytest.raises(FileFormatError):
        gh.load(tmp_path / "damaged.npz")


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("name", ["autoencoder", "classifier"])
@pytest.mark.parametrize("parts", ["many", "one"])
def test_ranks_have_the_same_bits(
    name: str, size: int, parts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Entries, error and products are those of one rank; files too."""
    if parts == "many":
        monkeypatch.setattr(dealt_rows, "A_PART", 40)
    op, path = operator(name), tmp_path / "K.npz"
    v = np.random.default_rng(0).standard_normal((op.shape[0], 2))

    def job(comm: Any) -> Any:
        K = gh.compress(op, "kfe", rtol=1e-2, comm=comm)
        K.save(path)
        again = gh.load(path, comm=comm)
        return (
            K.report.error, K.num_stored, K.structure.rows.gathered(), K @ v, again @ v,
            K @ v[K.rows], K.diagonal(), len(K.structure.cuts), K.rows,
        )  # fmt: skip

    error, stored, rows, product, _, _, diagonal, cuts, _ = job(None)
    assert (cuts > 2) == (parts == "many")
    for result in on_threads(size, job):
        assert isinstance(result, tuple), result
        assert result[0] == pytest.approx(error, rel=1e-12)  # summed over other blocks of rows
        assert result[1] == stored
        for mine, one in zip(result[2], rows, strict=True):
            np.testing.assert_array_equal(mine, one)
        for whole in result[3:5]:
            np.testing.assert_array_equal(whole, product)
        np.testing.assert_array_equal(result[5], product[result[8]])
        np.testing.assert_allclose(result[6], diagonal, rtol=1e-13)
    np.testing.assert_array_equal(gh.load(path) @ v, product)


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_have_the_same_low_rank_part(size: int):
    op = operator("larger classifier")

    def job(comm: Any) -> Any:
        K = gh.compress(op, "kfe", rtol=1e-4, max_rank=200, comm=comm)
        return K.structure.P, K.structure.C, *K.structure.rows.gathered(), K.to_dense()

    alone = job(None)
    assert alone[0].shape[1] > 5
    for result in on_threads(size, job):
        assert isinstance(result, tuple), result
        for mine, one in zip(result, alone, strict=True):
            np.testing.assert_array_equal(mine, one)


def test_other_matrices_are_refused_by_name():
    with pytest.raises(ArgumentError, match=r"eigenbasis of a network.*DenseOperator.*has none"):
        gh.compress(toeplitz(50), "kfe")


def test_auto_finds_it():
    """An autoencoder's matrix takes a tenth of what any other form needs."""
    K = gh.compress(operator("autoencoder"), "auto", rtol=1e-2, leaf_size=32)
    assert K.report.scheme == "kfe"
    predicted = re.search(r"kfe ([\d.]+) %", K.report.choice)
    assert float(predicted[1]) == pytest.approx(100 * K.storage_fraction, rel=0.1)


def test_auto_counts_on_the_low_rank_part():
    """Without it the form would store more than low rank alone, with it less."""
    op, rtol = operator("larger classifier"), 1e-4
    stored = {
        name: gh.compress(op, scheme, rtol=rtol, max_rank=max_rank).storage_fraction
        for name, scheme, max_rank in (
            ("plain", "kfe", 1), ("kfe", "kfe", 200), ("lowrank", "lowrank", 200),
        )
    }  # fmt: skip
    assert stored["kfe"] < stored["lowrank"] < stored["plain"]
    K = gh.compress(op, "auto", rtol=rtol, max_rank=200, leaf_size=64)
    assert K.report.scheme == "kfe"
    assert K.storage_fraction == stored["kfe"]
    predicted = re.search(r"kfe ([\d.]+) %", K.report.choice)
    assert float(predicted[1]) == pytest.approx(100 * stored["kfe"], rel=0.1)
