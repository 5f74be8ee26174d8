"""What networks of many parameters need: low rank from A A^T, and memory that never holds A."""

import json
import subprocess
import sys
import tracemalloc
import warnings
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from matrix_cases import toeplitz
from thread_ranks import on_threads

import gpu_hodlr as gh
from gpu_hodlr.devices import namespace_on, to_host
from gpu_hodlr.operators import ScaledOperator, SketchColumns, sketch
from gpu_hodlr.schemes import few_rows, hss
from gpu_hodlr.schemes.nystrom import Grams, Nystrom
from gpu_hodlr.tree import rows_tree

torch = pytest.importorskip("torch")
nn = torch.nn
from network_cases import NETWORKS, data, network  # noqa: E402
from network_models import made  # noqa: E402
from seeds import seeded  # noqa: E402

from gpu_hodlr.networks import problem  # noqa: E402


def mlp(dtype: Any = np.float64, samples: int = 12, outputs: int = 4, **options: Any) -> Any:
    """N = 6 * 9 + 9 + 9 * 7 + 7 + ..., cross entropy of classes."""
    kind = torch.float64 if dtype == np.float64 else torch.float32
    with seeded():
        layers = (nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, outputs))
        model = nn.Sequential(*layers).to(kind)
        inputs = torch.randn(samples, 6, dtype=kind)
        targets = torch.randint(outputs, (samples,))
    return gh.GGNOperator(model, "cross_entropy", inputs, targets, **options)


def check_dual(op: gh.Operator, dtype: Any = np.float64, dense: Any = None) -> None:
    """A^T A = K and A A^T are of one A; K is the operator's, if it is not given."""
    dual = op.dual()
    assert dual is not None
    tolerance = 1e-12 if dtype == np.float64 else 1e-5
    unit = namespace_on(op.device).eye(dual.rows, dtype=dtype)
    root = to_host(dual.combine(unit)).T.astype(np.float64)
    gram, dense = to_host(dual.gram()), to_host(op.to_dense()) if dense is None else dense
    assert gram.dtype == np.float64
    np.testing.assert_allclose(root.T @ root, dense, rtol=0, atol=tolerance * abs(dense).max())
    np.testing.assert_allclose(root @ root.T, gram, rtol=0, atol=tolerance * abs(gram).max())


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
@pytest.mark.parametrize("name", NETWORKS)
def test_rows_by_layers(name: str, loss: str):
    model = network(name)
    inputs, targets = data(NETWORKS[name][1], NETWORKS[name][2], loss)
    op = gh.GGNOperator(model, loss, inputs, targets, entries="khatri-rao")
    check_dual(op)
    check_dual(ScaledOperator(op, 4.0))


@pytest.mark.parametrize("entries", ["root", "none"])
@pytest.mark.parametrize("name", ["lenet", "resnet", "transformer", "language model", "adapter"])
def test_rows_of_any_network(name: str, entries: str, monkeypatch: pytest.MonkeyPatch):
    """All rows together, and a few at a time."""
    model, loss, inputs, targets, options = made(name)
    op = gh.GGNOperator(model, loss, inputs, targets, entries=entries, **options)
    dense = op.to_dense()
    check_dual(op, dense=dense)
    monkeypatch.setattr(problem, "_WORKING_BYTES", 1 << 14)  # products would take seconds
    few = gh.GGNOperator(model, loss, inputs, targets, entries=entries, **options)
    check_dual(few, dense=dense)


@pytest.mark.parametrize("kind", ["mc", "empirical"])
def test_rows_of_the_fisher_matrix(kind: str):
    model, loss, inputs, targets, options = made("lenet")
    for entries in ("root", "none"):
        check_dual(gh.FisherOperator(model, loss, inputs, targets, kind=kind, entries=entries,
                                     **options))  # fmt: skip


def test_what_has_no_rows():
    """The Hessian, a stored K, and batches that come in another order every time."""
    model, loss, inputs, targets, _ = made("lenet")
    assert gh.HessianOperator(model, loss, inputs, targets).dual() is None
    assert gh.GGNOperator(model, loss, inputs, targets, entries="dense").dual() is None
    samples = torch.utils.data.TensorDataset(inputs, targets)
    for shuffle in (False, True):
        loader = torch.utils.data.DataLoader(samples, batch_size=2, shuffle=shuffle)
        op = gh.GGNOperator(model, loss, loader, entries="none")
        assert (op.dual() is None) == shuffle


@pytest.mark.parametrize("entries", ["khatri-rao", "root", "none"])
def test_the_best_of_every_rank(entries: str, dtype: Any):
    """Whatever the seed; nothing is drawn."""
    op = mlp(dtype, entries=entries)
    dense = np.asarray(op.to_dense(), np.float64)
    values = np.linalg.eigvalsh(dense)[::-1]
    slack = 1e-5 if dtype == np.float32 else 1e-12
    for rank in (2, 10, 48):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", gh.errors.RankCapWarning)
            found = [
                gh.compress(op, "lowrank", rtol=1e-5, max_rank=rank, seed=seed) for seed in (0, 1)
            ]
        np.testing.assert_array_equal(found[0].to_dense(), found[1].to_dense())
        K = found[0]
        assert K.report.num_samples == 0
        kept = K.ranks[0][0]
        assert kept == rank or values[kept] <= 1e-5 * np.linalg.norm(values)
        error = np.linalg.norm(K.to_dense() - dense)
        assert error <= np.linalg.norm(values[kept:]) * (1 + 1e-8) + slack * values[0]
        U = K.structure.U.astype(np.float64)
        np.testing.assert_allclose(U.T @ U, np.eye(kept), rtol=0, atol=100 * slack)


def test_on_a_device(cupy: ModuleType, dtype: Any):
    op = mlp(dtype, entries="khatri-rao")
    check_dual(op.to("cuda"), dtype)
    K = gh.compress(op.to("cuda"), "lowrank", rtol=1e-3)
    assert K.report.num_samples == 0
    dense = op.to_dense()
    assert np.linalg.norm(to_host(K.to_dense()) - dense) <= 1.5e-3 * np.linalg.norm(dense)


@pytest.mark.parametrize("entries", ["khatri-rao", "root", "none"])
@pytest.mark.parametrize("tail", ["none", "diagonal"])
def test_on_ranks(entries: str, tail: str):
    op = mlp(entries=entries)

    def job(*comm: Any) -> gh.CompressedMatrix:
        return gh.compress(op, "lowrank", rtol=1e-2, tail=tail, comm=comm[0] if comm else None)

    alone = job().to_dense()
    for size in (2, 3):
        for dense in on_threads(size, lambda comm: job(comm).to_dense()):
            assert not isinstance(dense, Exception), dense
            np.testing.assert_allclose(dense, alone, rtol=0, atol=1e-12 * abs(alone).max())


def test_many_rows_are_left_to_random_columns():
    """A A^T of more rows costs more than it is worth."""
    few, many = mlp(samples=12), mlp(samples=1000)
    assert few_rows(few, 100) is not None
    assert few_rows(many, 100) is None
    assert gh.compress(many, "lowrank", rtol=1e-2).report.num_samples > 0
    assert few_rows(gh.DenseOperator(np.eye(5)), 3) is None


def wide(samples: int = 40, width: int = 64) -> Any:
    """N = 21,450 in float32, and 400 rows."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(100, 2 * width), nn.Tanh(), nn.Linear(2 * width, width), nn.Tanh(),
        nn.Linear(width, 10),
    )  # fmt: skip
    inputs = torch.randn(samples, 100) * 0.9 ** torch.arange(100)
    return model, "cross_entropy", inputs, torch.randint(10, (samples,))


def traced(op: gh.Operator, scheme: str, **options: Any) -> tuple[gh.CompressedMatrix, int]:
    """Compressed, and the most bytes allocated on the way."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        K = gh.compress(op, scheme, **options)
        return K, tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


def test_low_rank_does_not_hold_the_root():
    """By layers: U, the block of vectors that goes into it, and those errors are measured with."""
    op = gh.GGNOperator(*wide())
    assert op.access == "khatri-rao"
    root = op.rank_bound * op.shape[0] * op.dtype.itemsize
    K, peak = traced(op, "lowrank", rtol=0.4, max_rank=60)
    assert K.report.error <= 0.4
    assert peak < root / 2
    numbers = K.num_stored + (32 + 100) * op.shape[0] + 4 * op.rank_bound**2
    assert peak < 2 * numbers * op.dtype.itemsize
    assert "down" not in vars(op._access.gram)


def test_hss_does_not_hold_the_root():
    """With twice the samples the root has twice the rows, and memory is the same."""
    few, many = (gh.GGNOperator(*wide(samples)) for samples in (30, 60))
    options = {"rtol": 1e-8, "max_rank": 40, "ordering": "natural", "leaf_size": 128}
    with pytest.warns(gh.errors.RankCapWarning):
        peaks = [traced(op, "hss", **options)[1] for op in (few, many)]
    more = (many.rank_bound - few.rank_bound) * many.shape[0] * many.dtype.itemsize
    assert peaks[1] - peaks[0] < more / 4
    assert "down" not in vars(many._access.gram)


def test_no_tensor_holds_the_root_by_products_alone(monkeypatch: pytest.MonkeyPatch):
    from torch.utils._python_dispatch import TorchDispatchMode

    monkeypatch.setattr(problem, "_WORKING_BYTES", 1 << 22)
    op = gh.GGNOperator(*wide(), entries="none")
    largest = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(
            self, function: Any, types: Any, args: Any = (), options: Any = None
        ):
            nonlocal largest
            made = function(*args, **(options or {}))
            for x in made if isinstance(made, (tuple, list)) else (made,):
                if isinstance(x, torch.Tensor):
                    largest = max(largest, x.untyped_storage().nbytes())
            return made

    with Largest():
        K = gh.compress(op, "lowrank", rtol=0.4, max_rank=60)
    assert K.report.num_samples == 0
    assert K.report.error <= 0.4
    n, size = op.shape[0], op.dtype.itemsize
    assert 0 < largest <= 33 * n * size < op.rank_bound * n * size / 10


def test_the_estimate_of_few_rows(monkeypatch: pytest.MonkeyPatch):
    """Within 1.5 times of the peak, once the rank is known."""
    from test_memory import estimates, peak

    from gpu_hodlr.compression import memory
    from gpu_hodlr.schemes import lowrank

    op = gh.GGNOperator(*wide(samples=20))
    said, then = estimates(monkeypatch, memory), estimates(monkeypatch, lowrank)
    _, used = peak(lambda: gh.compress(op, "lowrank", rtol=1e-2, max_rank=150))
    assert len(said) == len(then) == 1
    assert used / 1.5 <= max(said[0], then[0] + said[0] / 3) <= 1.5 * used


# --- random columns ---------------------------------------------------------------------------


def test_gram_matrices_grow(xp: ModuleType, dtype: Any):
    """Blocks of new columns are those of all at once, in double."""
    exact = toeplitz(90)
    omega = np.random.default_rng(0).standard_normal((90, 12)).astype(dtype)
    y = exact.astype(dtype) @ omega
    grams = Grams()
    for columns in (5, 5, 9, 12):
        grams.update(*(xp.ascontiguousarray(xp.asarray(a[:, :columns])) for a in (omega, y)))
    wide_omega, wide_y = omega.astype(np.float64), y.astype(np.float64)
    for got, a, b in (
        (grams.omega, wide_omega, wide_omega), (grams.cross, wide_omega, wide_y),
        (grams.y, wide_y, wide_y),
    ):  # fmt: skip
        assert got.dtype == np.float64
        tolerance = 1e-12 if a is b or dtype == np.float64 else 1e-6  # Y is not quite K Omega
        np.testing.assert_allclose(
            to_host(got), a.T @ b, rtol=0, atol=tolerance * abs(a.T @ b).max()
        )


@pytest.mark.parametrize("tolerance", [1e-3, 1e-11])
def test_eigenvalues_before_the_vectors(tolerance: float, xp: ModuleType):
    """From Gram matrices, and where these do not see them from all vectors."""
    Q = np.linalg.qr(np.random.default_rng(0).standard_normal((200, 200)))[0]
    values = 0.7 ** np.arange(200)
    exact = (Q * values) @ Q.T
    omega = np.random.default_rng(1).standard_normal((200, 100))
    grams = Grams()
    omega, y = xp.asarray(omega), xp.asarray(exact @ omega)
    grams.update(omega, y)
    found = Nystrom(omega, y, grams, 90, tolerance)
    seen = int((values > 10 * tolerance).sum())
    np.testing.assert_allclose(found.eigenvalues[:seen], values[:seen], atol=tolerance)
    held = slice(90, 100)
    missed = np.linalg.norm(to_host(found.products(held) - y[:, held])) / 10**0.5
    assert missed <= tolerance
    for rank in (0, 3, seen):
        form = found.form(rank)
        assert form.U.shape == (200, rank)
        inner = to_host(form.U.T @ form.U)
        np.testing.assert_allclose(inner, np.eye(rank), rtol=0, atol=1e-13)
        error = np.linalg.norm(to_host(form.matmat(xp.eye(200))) - exact)
        assert error <= 1.01 * np.linalg.norm(values[rank:]) + tolerance


def test_columns_that_are_not_kept_are_drawn_again():
    op = gh.DenseOperator(toeplitz(80))
    owners = gh.distributed.Ownership(gh.distributed.ALONE.comm, rows_tree(80, 1).leaves)
    whole = SketchColumns(op, 30, seed=3).to_rows(owners)
    forgets = SketchColumns(op, 20, seed=3).to_rows(owners)
    forgets.kept = False
    for _ in range(2):
        omega, y = forgets.drawn()
        np.testing.assert_array_equal(omega, whole.omega[:, :20])
        np.testing.assert_allclose(y, toeplitz(80) @ omega)
        [(omega, y)] = forgets.more(10)
        np.testing.assert_array_equal(omega, whole.omega[:, 20:])
        assert forgets.num == 30
        for part, omega in forgets.omegas():
            np.testing.assert_array_equal(omega, whole.omega[:, part])
        assert part.stop == 30
    forgets.kept = True
    assert forgets.omega.shape == forgets.y.shape == (80, 20)
    forgets.grow(10)
    np.testing.assert_array_equal(forgets.omega, whole.omega)


def test_a_sketch_that_is_not_kept_gives_the_same_form(monkeypatch: pytest.MonkeyPatch):
    """With less memory: Omega and Y of all columns are not there beside the samples."""
    op = gh.GGNOperator(*wide(), dtype=np.float64)
    peaks, forms = [], []
    for kept in (1 << 30, 0):
        monkeypatch.setattr(hss, "_KEPT", kept)
        K, peak = traced(op, "hss", rtol=3e-2, leaf_size=128, ordering="natural")
        peaks.append(peak)
        forms.append(K)
    assert forms[0].report.num_samples > 160
    assert forms[0].ranks == forms[1].ranks
    v = np.random.default_rng(0).standard_normal((op.shape[0], 3))
    want = forms[0] @ v
    np.testing.assert_allclose(forms[1] @ v, want, rtol=0, atol=1e-8 * abs(want).max())
    assert peaks[1] < 0.8 * peaks[0]


@pytest.mark.parametrize("scheme", ["hss", "fmm"])
def test_ranks_draw_again_what_one_draws(scheme: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hss, "_KEPT", 0)
    monkeypatch.setattr(sketch, "_AT_ONCE", 48)
    exact = gh.KernelOperator(
        np.random.default_rng(0).random((500, 2)), "matern32", 0.3, nugget=0.1
    ).to_dense()
    options: dict[str, Any] = {"rtol": 1e-6, "leaf_size": 64}
    if scheme == "fmm":
        options["budget"] = 0.1

    def job(*comm: Any) -> Any:
        K = gh.compress(exact, scheme, **options, comm=comm[0] if comm else None)
        return K.ranks, K.report.error, K.to_dense()

    alone = job()
    assert alone[1] <= 1e-6
    for found in on_threads(2, job):
        assert not isinstance(found, Exception), found
        assert found[:2] == alone[:2]
        np.testing.assert_allclose(found[2], alone[2], rtol=0, atol=1e-12)


# --- the resident peak ------------------------------------------------------------------------

RESIDENT = """
import json, re, sys, warnings
import numpy as np, torch
import gpu_hodlr as gh
warnings.simplefilter("ignore", gh.errors.RankCapWarning)
torch.manual_seed(0)
torch.set_num_threads(1)
nn, entries, scheme = torch.nn, sys.argv[1], sys.argv[2]
model = nn.Sequential(
    nn.Linear(784, 360), nn.Tanh(), nn.Linear(360, 90), nn.Tanh(), nn.Linear(90, 10)
)
samples = 100 if entries == "none" else 200
inputs = torch.rand(samples, 784) * (torch.rand(samples, 784) < 0.2)
op = gh.GGNOperator(model, "cross_entropy", inputs, torch.randint(10, (samples,)), entries=entries)
def status(name):  # getrusage tells the peak of the parent where that is more
    told = open("/proc/self/status").read()
    return 1024 * int(re.search(rf"{name}:\\s+(\\d+)", told)[1])
before = status("VmRSS")
K = gh.compress(op, scheme, rtol=1e-2, max_rank=100)
print(json.dumps([op.shape[0], op.rank_bound, status("VmHWM") - before, K.nbytes]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
@pytest.mark.parametrize(
    ("entries", "scheme", "vectors"),
    [("khatri-rao", "lowrank", 240), ("none", "lowrank", 750), ("khatri-rao", "hss", 1000)],
)
def test_resident_peak(entries: str, scheme: str, vectors: float):
    """Of 316,000 parameters: what is stored, and so many numbers a parameter."""
    run = subprocess.run(
        [sys.executable, "-c", RESIDENT, entries, scheme],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    n, rows, grown, bytes_stored = json.loads(run.stdout)
    assert grown <= bytes_stored + 4 * n * vectors < 4 * n * rows
