"""Gradients of torch through products and solves, against torch's own finite differences."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from matrix_cases import toeplitz
from thread_ranks import on_threads

import gpu_hodlr as gh
from gpu_hodlr.errors import AccuracyWarning, DtypeError, ShapeError

torch = pytest.importorskip("torch")
# torch's own use of torch.jit, at the first forward mode
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")

N = 24
A = toeplitz(N) + np.eye(N)


def compressed(scheme: str) -> gh.CompressedMatrix:
    options = {"budget": 0.2} if scheme == "fmm" else {}
    return gh.compress(A, scheme, rtol=1e-9, max_rank=N, leaf_size=6, **options)


K = compressed("hss")
FMM = compressed("fmm").factorize(0.1)
FACTORS = {
    "hss": K.factorize(0.1),
    "hodlr": compressed("hodlr").factorize(0.1),
    "lowrank": compressed("lowrank").factorize(0.1),
    "every row": K.factorize(np.linspace(0.1, 1.0, N)),
}
OPERATOR = gh.DenseOperator(A)


def cg(b: Any) -> Any:
    return gh.cg(OPERATOR, b, rtol=1e-12)[0]


MAPS: dict[str, Callable[[Any], Any]] = {
    "operator": OPERATOR.matmat,
    "kernel": gh.KernelOperator(np.linspace(0, 1, N), nugget=0.1).matmat,
    "function": gh.FunctionOperator(N, matmat=lambda v: A @ v).matmat,
    "torch function": gh.FunctionOperator(
        N, matmat=lambda v: torch.tensor(A) @ torch.tensor(v)
    ).matmat,
    "from the left": lambda v: v @ K if v.ndim == 1 else (v.T @ K).T,
    "matvec": lambda v: K.matvec(v),
    "sum": (K + gh.Diagonal(np.linspace(1, 2, N))).matmat,
    "scaled": (-2 * K).matmat,
    "fmm solve": lambda v: FMM.solve(v, rtol=1e-13),
    "F @": lambda v: FACTORS["hss"] @ v,
    "cg": cg,
}
MAPS |= {scheme: compressed(scheme).matmat for scheme in ("hss", "hodlr", "fmm", "lowrank")}
for name, factor in FACTORS.items():
    MAPS[f"{name}: solve"] = factor.solve
    for method in (factor.sqrt_matmat, factor.sqrt_solve):
        for transpose in (False, True):
            kind = f"{name}: {method.__name__}{', transposed' if transpose else ''}"
            MAPS[kind] = partial(method, transpose=transpose)


def vectors(columns: int | None = 2, seed: int = 0) -> Any:
    shape = (N,) if columns is None else (N, columns)
    found = torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))
    return found.requires_grad_()


@pytest.mark.parametrize("apply", MAPS.values(), ids=MAPS)
def test_gradients(apply: Callable[[Any], Any]):
    """First and second, in reverse and forward mode; not linear in the second, to have any."""
    v = vectors()
    assert apply(v).requires_grad
    assert torch.autograd.gradcheck(apply, (v,), check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda z: apply(z) ** 2, (v,), fast_mode=True)
    assert torch.autograd.gradcheck(apply, (vectors(None),), fast_mode=True)


@pytest.mark.parametrize("apply", MAPS.values(), ids=MAPS)
def test_transforms_of_torch_func(apply: Callable[[Any], Any]):
    """`vmap` multiplies by all vectors at once; Jacobians are the matrix, transposed or not."""
    v = vectors(5).detach()
    want = apply(v)
    torch.testing.assert_close(torch.func.vmap(apply, in_dims=1, out_dims=1)(v), want)
    torch.testing.assert_close(torch.func.vmap(apply)(v.T), want.T)
    batch = torch.stack([v[:, :2], v[:, 2:4]])
    torch.testing.assert_close(torch.func.vmap(apply)(batch)[1], want[:, 2:4])
    matrix = apply(torch.eye(N, dtype=torch.float64))
    for jacobian in (torch.func.jacrev, torch.func.jacfwd):
        torch.testing.assert_close(jacobian(apply)(v[:, 0]), matrix, rtol=0, atol=1e-8)


def test_the_gradient_of_a_quadratic_form():
    """(t . K t) has the gradient 2 K t, and not half of it."""
    t = vectors(None)
    (t * (K @ t)).sum().backward()
    np.testing.assert_allclose(t.grad.numpy(), 2 * A @ t.detach().numpy(), rtol=1e-7)
    hessian = torch.func.hessian(lambda z: z @ (K @ z))(t.detach())
    np.testing.assert_allclose(hessian.numpy(), 2 * A, rtol=0, atol=1e-7)


def test_a_gradient_has_the_type_of_its_vector():
    t = vectors(None).detach().float().requires_grad_()
    u = K @ t
    assert u.dtype == torch.float64
    u.sum().backward()
    assert t.grad.dtype == torch.float32


def test_vectors_by_name():
    t = vectors()
    F = FACTORS["hss"]
    for got, want in (
        (K.matmat(v=t), K @ t),
        (F.solve(b=t), F.solve(t)),
        (F.sqrt_matmat(z=t, transpose=True), F.sqrt_matmat(t, transpose=True)),
        (FMM.solve(t, 1e-13, 200), FMM.solve(b=t, rtol=1e-13, maxiter=200)),
    ):
        assert got.requires_grad
        torch.testing.assert_close(got, want, rtol=0, atol=0)
    np.testing.assert_array_equal(K.matmat(v=np.ones(N)), K @ np.ones(N))
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'v'"):
        K.matmat()
    with pytest.raises(TypeError, match="positional"):
        F.sqrt_matmat(t, True)


def test_warnings_are_of_the_line_that_calls():
    with pytest.warns(AccuracyWarning) as caught:
        FMM.solve(np.ones(N), rtol=1e-30, maxiter=1)
    assert caught[0].filename == __file__


def test_nothing_is_recorded_where_nothing_is_asked_for():
    assert not (K @ vectors().detach()).requires_grad
    with torch.no_grad():
        assert not FACTORS["hss"].solve(vectors()).requires_grad


def test_the_same_bits_with_and_without_gradients():
    t = vectors()
    for apply in (K.matmat, FACTORS["hss"].solve, FACTORS["hss"].sqrt_matmat):
        np.testing.assert_array_equal(apply(t).detach().numpy(), apply(t.detach().numpy()))


def test_matrices_are_constants():
    """No gradient goes to what a matrix or a damping is made of."""
    a, damping = (torch.tensor(x, requires_grad=True) for x in (A, np.full(N, 0.5)))
    op = gh.DenseOperator(a)
    F = gh.compress(op, leaf_size=6).factorize(damping)
    (op @ vectors() + F.solve(vectors())).sum().backward()
    assert a.grad is None
    assert damping.grad is None


RANKED = {
    "product": lambda K, F, t: K @ t,
    "solve": lambda K, F, t: F.solve(t),
    "square root": lambda K, F, t: F.sqrt_matmat(t),
    "square root, transposed": lambda K, F, t: F.sqrt_solve(t, transpose=True),
    "cg": lambda K, F, t: gh.cg(K, t, M=F)[0],
}


@pytest.mark.parametrize("apply", RANKED.values(), ids=RANKED)
@pytest.mark.parametrize("ranks", [2, 3])
def test_on_many_ranks(ranks: int, apply: Any):
    """Vectors that are whole on every rank, and each rank's rows of them."""
    t = vectors()
    weight = vectors(seed=1).detach()
    F = K.factorize(0.1)
    (weight * apply(K, F, t) ** 2).sum().backward()

    def run(comm: Any) -> Any:
        there = gh.compress(A, "hss", rtol=1e-9, max_rank=N, leaf_size=6, comm=comm)
        factor = there.factorize(0.1)
        whole = t.detach().clone().requires_grad_()
        (weight * apply(there, factor, whole) ** 2).sum().backward()
        return there.rows, whole.grad.numpy()

    for rows, whole in on_threads(ranks, run):
        assert len(rows) < N
        np.testing.assert_allclose(whole, t.grad.numpy(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["product", "solve", "cg"])
def test_of_the_rows_of_each_rank(name: str):
    """The loss is the sum over the ranks, and each gets its rows of the gradient."""
    t = vectors()
    (RANKED[name](K, K.factorize(0.1), t) ** 2).sum().backward()

    def run(comm: Any) -> Any:
        there = gh.compress(A, "hss", rtol=1e-9, max_rank=N, leaf_size=6, comm=comm)
        own = t.detach()[there.rows].clone().requires_grad_()
        (RANKED[name](there, there.factorize(0.1), own) ** 2).sum().backward()
        return there.rows, own.grad.numpy()

    for rows, own in on_threads(2, run):
        np.testing.assert_allclose(own, t.grad.numpy()[rows], rtol=0, atol=1e-9)


def test_cg_gives_its_info_and_its_gradient_warns():
    t = vectors(None)
    x, info = gh.cg(OPERATOR, t, maxiter=2, x0=np.linalg.solve(A, t.detach().numpy()))
    assert info.converged
    with pytest.warns(AccuracyWarning, match="residual of a gradient is .* raise maxiter"):
        (x * vectors(None, 1)).sum().backward()


@pytest.mark.filterwarnings("ignore")  # of torch, while it traces
def test_compiled_functions_leave_it_alone():
    """torch.compile would else trace, and change, what is done in NumPy."""
    t = vectors(None)
    function = torch.compile(lambda v: (v * (K @ v)).sum(), backend="eager")
    function(t).backward()
    np.testing.assert_array_equal(t.grad.numpy(), (2 * (K @ t.detach())).numpy())


def test_vectors_that_vmap_cannot_have():
    with pytest.raises(ShapeError, match=r"under vmap .* \(N,\) or \(N, k\), got \(24, 2, 2\)"):
        torch.func.vmap(K.matmat)(torch.ones(3, N, 2, 2, dtype=torch.float64))
    with pytest.raises(ShapeError, match="under vmap"):
        torch.func.vmap(K.matmat)(torch.ones(N, dtype=torch.float64))
    with pytest.raises(ShapeError, match=r"\(24,\) or \(24, k\), got \(23, 3\)"):
        torch.func.vmap(K.matmat)(torch.ones(3, N - 1, dtype=torch.float64))


def test_the_old_batches_of_torch_are_named():
    t = vectors(None)
    with pytest.raises(DtypeError, match="numbers cannot be read"):
        torch.autograd.functional.jacobian(K.matmat, t.detach(), vectorize=True)
