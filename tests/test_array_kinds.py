"""Arrays that are not plain NumPy arrays, wherever an array enters; torch's devices and dtypes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matrix_cases import toeplitz
from test_bad_input import refused

import gpu_hodlr as gh
from gpu_hodlr import devices
from gpu_hodlr.arrays import check_dtype
from gpu_hodlr.errors import ArgumentError, DeviceError, DtypeError, ShapeError

N = 30
A = toeplitz(N) + np.eye(N)
K = gh.compress(A, rtol=1e-9, leaf_size=8)
F = K.factorize(0.1)


class Own(np.ndarray):
    """A subclass that does nothing."""


def read_only(x: np.ndarray) -> np.ndarray:
    x = x.copy()
    x.setflags(write=False)
    return x


def on_disk(x: np.ndarray, folder: Path) -> np.ndarray:
    path = folder / f"{len(list(folder.iterdir()))}.npy"
    np.save(path, x)
    found: np.ndarray = np.load(path, mmap_mode="r")
    assert isinstance(found, np.memmap)
    return found


KINDS: dict[str, Callable[[np.ndarray, Path], np.ndarray]] = {
    "np.matrix": lambda x, _: x.view(np.matrix),
    "masked, nothing hidden": lambda x, _: np.ma.masked_array(x, np.zeros(x.shape, bool)),
    "masked, no mask": lambda x, _: np.ma.masked_array(x),
    "big-endian": lambda x, _: x.astype(">f8"),
    "negative strides": lambda x, _: np.ascontiguousarray(x[::-1, ::-1])[::-1, ::-1],
    "every second": lambda x, _: np.repeat(np.repeat(x, 2, 0), 2, 1)[::2, ::2],
    "column order": lambda x, _: np.asfortranarray(x),
    "read-only": lambda x, _: read_only(x),
    "own class": lambda x, _: x.view(Own),
    "on disk": on_disk,
}


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def kind(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[np.ndarray], np.ndarray]:
    return lambda x: request.param(x, tmp_path)


Kind = Callable[[np.ndarray], np.ndarray]


def same(got: Any, want: np.ndarray) -> None:
    """Equal, and a plain array in the machine's byte order."""
    assert type(got) is np.ndarray
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, want, rtol=1e-13, atol=1e-13)


def test_right_hand_sides(kind: Kind):
    v = np.random.default_rng(0).standard_normal((N, 3))
    op = gh.DenseOperator(A)
    for apply in (op.matmat, K.matmat, F.solve, F.sqrt_matmat, F.sqrt_solve):
        same(apply(kind(v)), apply(v))
    same(gh.cg(op, kind(v), x0=kind(v), M=F)[0], gh.cg(op, v, x0=v, M=F)[0])


def test_preconditioners(kind: Kind):
    """An array that multiplies, and one that a function gives."""
    op, b = gh.DenseOperator(A), np.random.default_rng(0).standard_normal((N, 3))
    inverse = np.linalg.inv(A)
    want = np.linalg.solve(A, b)

    class Own:
        def matmat(self, r: np.ndarray) -> np.ndarray:
            return kind(inverse @ r)

    for M in (kind(inverse), Own()):
        x, info = gh.cg(op, b, M=M, rtol=1e-12)
        assert info.iterations <= 3
        assert type(x) is np.ndarray
        np.testing.assert_allclose(x, want, rtol=0, atol=1e-10)


def test_preconditioners_of_torch():
    torch = pytest.importorskip("torch")
    b = np.random.default_rng(0).standard_normal((N, 3))
    x, info = gh.cg(gh.DenseOperator(A), b, M=torch.from_numpy(np.linalg.inv(A)), rtol=1e-12)
    assert info.iterations <= 3
    np.testing.assert_allclose(x, np.linalg.solve(A, b), rtol=0, atol=1e-10)


def test_preconditioners_that_give_something_else():
    class Own:
        def __init__(self, result: Any) -> None:
            self.matmat = lambda r: result

    op, b = gh.DenseOperator(A), np.ones(N)
    refused(ShapeError, lambda: gh.cg(op, b, M=Own(np.ones(N))), "result of M", "(30, 1)", "(30,)")
    refused(DtypeError, lambda: gh.cg(op, b, M=Own([1.0] * N)), "result of M", "list")


def test_dense_matrices(kind: Kind):
    same(gh.DenseOperator(kind(A)).to_dense(), A)
    same(gh.compress(kind(A), rtol=1e-9, leaf_size=8).to_dense(), K.to_dense())
    same(gh.as_operator(kind(A)) @ np.ones(N), A @ np.ones(N))


def test_points(kind: Kind):
    points = np.random.default_rng(1).random((N, 2))
    same(gh.KernelOperator(kind(points)).to_dense(), gh.KernelOperator(points).to_dense())


def test_diagonals_and_dampings(kind: Kind):
    d = np.linspace(1, 2, N)
    column = kind(d[:, None])
    if isinstance(column, np.matrix):
        pytest.skip("a np.matrix has no single axis")
    column = column[:, 0]
    same(gh.Diagonal(column).to_dense(), np.diag(d))
    same((K + gh.Diagonal(column)).to_dense(), K.to_dense() + np.diag(d))
    same(K.factorize(column).solve(d), K.factorize(d).solve(d))


def test_results_of_functions(kind: Kind):
    """Also for a torch tensor, which such a result has to become."""
    torch = pytest.importorskip("torch")
    op = gh.FunctionOperator(
        N, matmat=lambda v: kind(A @ v), entries=lambda i, j: kind(A[np.ix_(i, j)])
    )
    v = np.random.default_rng(0).standard_normal((N, 2))
    same(op.to_dense(), A)
    np.testing.assert_allclose(op @ v, A @ v, rtol=1e-13)
    got = op @ torch.from_numpy(v)
    assert isinstance(got, torch.Tensor)
    np.testing.assert_allclose(got.numpy(), A @ v, rtol=1e-13)


def test_network_data(kind: Kind):
    torch = pytest.importorskip("torch")
    from network_cases import case

    model, inputs, targets = case("two layers", "mse")
    want = gh.GGNOperator(model, "mse", inputs, targets).to_dense()
    got = gh.GGNOperator(model, "mse", kind(inputs.numpy()), kind(targets.numpy()))
    same(got.to_dense(), want)
    assert torch.is_tensor(got @ torch.ones(len(want), dtype=torch.float64))


def test_hidden_entries_are_nowhere_taken_for_numbers():
    torch = pytest.importorskip("torch")
    from network_cases import case

    hidden = np.ma.masked_array(np.linspace(1, 2, N), np.arange(N) == 3)
    points = np.ma.masked_array(np.ones((N, 2)), np.eye(N, 2) == 1)
    model, inputs, targets = case("two layers", "mse")
    masked = np.ma.masked_array(inputs.numpy(), inputs.numpy() > 1)
    for name, call in (
        ("points", lambda: gh.KernelOperator(points)),
        ("d", lambda: gh.Diagonal(hidden)),
        ("damping", lambda: K.factorize(hidden)),
        ("rows", lambda: gh.DenseOperator(A).entries(np.ma.masked_less(np.arange(4), 2), [1])),
        ("M", lambda: gh.cg(A, np.ones(N), M=np.ma.masked_less(A, 0.1))),
        ("x0", lambda: gh.cg(A, np.ones(N), x0=hidden)),
        ("the result of matmat", lambda: gh.FunctionOperator(N, lambda v: hidden) @ np.ones(N)),
        ("inputs", lambda: gh.GGNOperator(model, "mse", masked, targets)),
    ):
        message = refused(ArgumentError, call, "masked array", "masked entries")
        assert message.startswith(f"{name} is")
    assert torch.is_tensor(inputs)


# --- torch's devices and dtypes ---------------------------------------------------------------


@pytest.mark.parametrize("name", ["float32", "float64"])
def test_dtypes(name: str):
    torch = pytest.importorskip("torch")
    given, want = getattr(torch, name), np.dtype(name)
    assert check_dtype(given, "dtype") == want
    assert gh.compress(A, rtol=1e-4, leaf_size=8, dtype=given).dtype == want
    stored = gh.compress(A, rtol=1e-4, leaf_size=8, storage_dtype=given)
    assert stored.structure.dtype == want
    assert gh.FunctionOperator(N, matmat=lambda v: v, dtype=given).dtype == want
    assert check_dtype(want.newbyteorder(">"), "dtype") == want


@pytest.mark.parametrize("name", ["float16", "bfloat16", "int64", "complex64"])
def test_dtypes_that_cannot_be(name: str):
    torch = pytest.importorskip("torch")
    given = getattr(torch, name)
    calls = [
        lambda: gh.compress(A, dtype=given),
        lambda: gh.FunctionOperator(N, matmat=lambda v: v, dtype=given),
    ]
    if name != "bfloat16":  # which a far field can be kept in
        calls.append(lambda: gh.compress(A, storage_dtype=given))
    for call in calls:
        refused(DtypeError, call, "dtype must be float32 or float64", name)


@pytest.mark.parametrize("number", ["", ":0"])
def test_devices(number: str, tmp_path: Path):
    torch = pytest.importorskip("torch")
    K.save(tmp_path / "K.npz")
    for given in (f"cpu{number}", torch.device(f"cpu{number}")):
        op = gh.FunctionOperator(N, matmat=lambda v: A @ v, device=given)
        assert op.to(given) is op
        for found in (op, gh.compress(A, device=given), gh.load(tmp_path / "K.npz", given)):
            assert found.device == "cpu"


@pytest.mark.usefixtures("cupy")
def test_numbers_of_gpus():
    torch = pytest.importorskip("torch")
    for given in ("cuda", "cuda:0", torch.device("cuda"), torch.device("cuda:0")):
        assert devices.resolve_device(given) == "cuda"
        assert gh.DenseOperator(A).to(given).device == "cuda"
    assert gh.compress(A, leaf_size=8, device=torch.device("cuda:0")).device == "cuda"
    for other in ("cuda:1", torch.device("cuda", 1)):
        said = ("device 'cuda:1'", "current GPU is number 0", "cupy.cuda.Device(1).use()")
        refused(DeviceError, lambda other=other: devices.resolve_device(other), *said)
        refused(DeviceError, lambda other=other: gh.compress(A, device=other), *said)


def test_devices_that_cannot_be():
    torch = pytest.importorskip("torch")
    for wrong in (torch.device("meta"), torch.device("mps"), "mps", "meta"):
        refused(ArgumentError, lambda wrong=wrong: gh.compress(A, device=wrong), "device must be")
