"""Dense SPD test matrices of the kinds in the GOFMM paper, generated at any size.

The names and kinds are those of Yu, Levitt, Reiz and Biros, Geometry-oblivious FMM for compressing
dense SPD matrices (SC17); there is no K11. The paper names the operators and kernels with few of
their parameters, and takes G01-G05 from real graphs: those here are chosen and generated to be of
the same kind, so that numbers measured with them are not those of the paper's tables.

Every matrix is K / mean(diag K) + 1e-5 I: the shift keeps it positive definite when its entries
are rounded, to float32 too. Rows are in the order of the grid (first
axis slowest), of points drawn at random, or of a graph's vertices. A grid has k^2 or k^3 points:
the most that are no more than n, so that N = operator.shape[0] may be less than n.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import DTypeLike
from scipy.sparse.linalg import SuperLU, splu
from scipy.spatial import cKDTree

from gpu_hodlr.arrays import check_dtype
from gpu_hodlr.checks import check_count
from gpu_hodlr.devices import HostArray, check_memory
from gpu_hodlr.errors import ArgumentError
from gpu_hodlr.operators import DenseOperator, KernelOperator, Operator

Matrix = HostArray
Generator = np.random.Generator
Coefficient = Callable[[int, int, Generator], Matrix]

NUGGET = 1e-5
LEAST = 64  # 8 x 8 or 4 x 4 x 4 grid points
_STRIP = 512  # columns of a matrix formed together


# --- from an array to an operator


def _regularized(K: Matrix, dtype: np.dtype[Any]) -> Matrix:
    """K / mean(diag K) + 1e-5 I of a dtype, its lower triangle mirrored: K is overwritten."""
    n = len(K)
    K /= K.diagonal().mean()
    K.reshape(-1)[:: n + 1] += NUGGET
    for start in range(0, n, _STRIP):
        stop = start + _STRIP
        K[start:stop, stop:] = K[stop:, start:stop].T
        square = K[start:stop, start:stop]
        square[:] = np.tril(square) + np.tril(square, -1).T
    return K.astype(dtype, copy=False)


def dense(build: Callable[..., Matrix]) -> Callable[..., Operator]:
    """Of a function that gives K in float64, one that gives the operator."""

    @wraps(build)
    def operator(n: int, rng: Generator, dtype: np.dtype[Any], **options: object) -> Operator:
        check_memory(12 * n * n, f"a dense {n} x {n} matrix", "n")  # float64, then float32
        return DenseOperator(_regularized(build(n, rng, **options), dtype))

    return operator


# --- grids


def side(n: int, dimension: int) -> int:
    """The largest k with k^dimension <= n."""
    k: int = round(n ** (1 / dimension))
    return k if k**dimension <= n else k - 1


def _along(matrix: HostArray | sp.sparray, axis: int, dimension: int, k: int) -> sp.sparray:
    """I x ... x matrix x ... x I: a matrix that acts along one axis of a grid."""
    before, after = (sp.diags_array(np.ones(k**m)) for m in (axis, dimension - 1 - axis))
    return sp.kron(sp.kron(before, matrix), after, format="csr")


def _rough(k: int, dimension: int, rng: Generator) -> Matrix:
    """10^u, u uniform in [-1, 1], drawn for each grid point."""
    return np.asarray(10.0 ** rng.uniform(-1, 1, size=(k,) * dimension))


def _patches(k: int, dimension: int, rng: Generator) -> Matrix:
    """0.1 or 10, drawn for each patch of 4 grid points a side."""
    patches = rng.choice([0.1, 10.0], size=(-(-k // 4),) * dimension)
    every = np.arange(k) // 4
    return np.asarray(patches[np.ix_(*[every] * dimension)])


def _waves(k: int, dimension: int, rng: Generator) -> Matrix:
    """Eight random periodic waves of 1 to 3 periods an axis, of mean square one."""
    grid = np.stack(np.meshgrid(*[2 * np.pi * np.arange(k) / k] * dimension, indexing="ij"))
    waves = np.zeros((k,) * dimension)
    for _ in range(8):
        vector = rng.integers(1, 4, dimension) * rng.choice([-1, 1], dimension)
        waves += 0.5 * np.cos(np.tensordot(vector, grid, 1) + 2 * np.pi * rng.random())
    return waves


def _smooth(k: int, dimension: int, rng: Generator) -> Matrix:
    """The exponential of `_waves`."""
    return np.asarray(np.exp(_waves(k, dimension, rng)))


# --- inverses of difference operators on grids with Dirichlet boundaries, h = 1 / (k + 1)


def _function_of_laplacian(k: int, function: Callable[[Matrix], Matrix]) -> Matrix:
    """f(h^2 L), L the 5-point Laplacian: sum over p, q of f(mu_p + mu_q) times two sine waves.

    mu_p = 4 sin^2(p pi h / 2) with eigenvector S[:, p] = sqrt(2 h) sin(p i pi h). Block (i, j) of
    k x k blocks is sum_p S[i, p] S[j, p] (S diag f(mu_p + mu) S).
    """
    p = np.arange(1, k + 1)
    mu = 4 * np.sin(0.5 * np.pi * p / (k + 1)) ** 2
    S = np.sqrt(2 / (k + 1)) * np.sin(np.pi * np.outer(p, p) / (k + 1))
    modes = ((S * function(mu[:, None] + mu)[:, None]) @ S).reshape(k, k * k)
    K = np.empty((k, k, k, k))
    for i in range(k):
        K[i] = ((S[i] * S) @ modes).reshape(k, k, k).swapaxes(0, 1)
    return K.reshape(k * k, k * k)


@dense
def inverse_laplacian_squared(n: int, rng: Generator) -> Matrix:
    """(L + I)^-2 in the unit square."""
    k = side(n, 2)
    return _function_of_laplacian(k, lambda mu: ((k + 1) ** 2 * mu + 1.0) ** -2)


@dense
def helmholtz(n: int, rng: Generator) -> Matrix:
    """((L - w^2)^2 + (w^2 / 20)^2)^-1, the wavelength 2 pi / w being ten grid points.

    It is (A A^H)^-1 of the damped operator A = L - (1 + i / 20) w^2.
    """
    w2 = (2 * np.pi / 10) ** 2
    return _function_of_laplacian(side(n, 2), lambda mu: 1 / ((mu - w2) ** 2 + (w2 / 20) ** 2))


def diffusion(a: Matrix, flow: list[Matrix]) -> sp.sparray:
    """-div(a grad u) + flow . grad u: finite volumes, 2 a a' / (a + a') on faces, upwind.

    An M-matrix whatever a > 0 and the flow are, so that it is factored without pivoting.

    Args:
        a: (k, ..., k) at the grid points, continued to the boundary.
        flow: an array like a for each axis, or none at all.
    """
    d, k = a.ndim, len(a)
    difference = sp.csr_array((k + 1) * (np.eye(k + 1, k) - np.eye(k + 1, k, -1)))
    A = 0
    for axis in range(d):
        resistance = 1 / np.take(a, [0, *range(k), k - 1], axis)
        ahead, behind = (np.take(resistance, range(s, k + 1 + s), axis) for s in (0, 1))
        faces = sp.diags_array((2 / (ahead + behind)).ravel())
        gradient = _along(difference, axis, d, k)
        A = A + gradient.T @ faces @ gradient
    for axis, b in enumerate(flow):
        for side_of, rows in ((np.maximum, slice(None, -1)), (np.minimum, slice(1, None))):
            upwind = _along(difference[rows], axis, d, k)
            A = A + sp.diags_array(side_of(b, 0).ravel()) @ upwind
    return A


def _inverse(A: sp.sparray, squared: bool) -> Matrix:
    """A^-1, or A^-1 A^-T = (A^T A)^-1, of an M-matrix with a symmetric pattern, in strips."""
    # the diagonal is the pivot: orderings for A + A^T fill in least
    lu: SuperLU = splu(
        sp.csc_array(A),
        permc_spec="MMD_AT_PLUS_A",
        diag_pivot_thresh=0.0,
        options={"SymmetricMode": True},
    )
    n = A.shape[0]
    K = np.empty((n, n))
    for start in range(0, n, _STRIP):
        unit = np.eye(n, min(_STRIP, n - start), -start)
        K[start : start + _STRIP] = lu.solve(lu.solve(unit, "T") if squared else unit).T
    return K


@dense
def advection_diffusion(
    n: int, rng: Generator, *, coefficient: Coefficient, speed: float
) -> Matrix:
    """(A^T A)^-1, A u = -div(a grad u) + b . grad u, b a random flow around eddies."""
    k = side(n, 2)
    a = coefficient(k, 2, rng)
    dx, dy = np.gradient(_waves(k, 2, rng))
    scale = speed / np.hypot(dx, dy).max()
    return _inverse(diffusion(a, [scale * dy, -scale * dx]), squared=True)


@dense
def inverse_diffusion_squared(n: int, rng: Generator) -> Matrix:
    """A^-2, A u = -div(a grad u) in the unit cube, a as in `_rough`."""
    return _inverse(diffusion(_rough(side(n, 3), 3, rng), []), squared=True)


# --- pseudo-spectral operators, periodic in (0, 2 pi)^d


def fourier_differentiation(k: int) -> Matrix:
    """D u = u' at k even points of (0, 2 pi), exact for waves of less than k / 2 periods.

    Trefethen, Spectral Methods in MATLAB (2000), chapter 3: D[i, j] = (-1)^(i-j) / (2 t) with
    t = tan(h (i - j) / 2), or sin where k is odd.
    """
    i = np.arange(k)
    gap = i[:, None] - i
    t = (np.sin if k % 2 else np.tan)(np.pi * gap / k)
    np.fill_diagonal(t, np.inf)
    return np.asarray(0.5 * (1 - 2 * (gap % 2)) / t)


def pseudo_spectral_operator(a: Matrix, flow: list[Matrix], reaction: Matrix) -> sp.sparray:
    """-div(a grad u) + flow . grad u + reaction u, each derivative by Fourier differentiation."""
    d, k = a.ndim, len(a)
    D = sp.csr_array(fourier_differentiation(k))
    A = sp.diags_array(reaction.ravel())
    for axis in range(d):
        derivative = _along(D, axis, d, k)
        A = A - derivative @ sp.diags_array(a.ravel()) @ derivative
        A = A + sp.diags_array(flow[axis].ravel()) @ derivative
    return A.tocsr()


@dense
def pseudo_spectral(
    n: int, rng: Generator, *, dimension: int, coefficient: Coefficient, speed: float
) -> Matrix:
    """A^T A of a pseudo-spectral operator, whose entries fall off slowly along grid lines.

    A couples points of one line: in 3-D, A^T A is 0 between points that share no coordinate.
    """
    k = side(n, dimension)
    a = coefficient(k, dimension, rng)
    flow = [speed * _waves(k, dimension, rng) for _ in range(dimension)]
    A = pseudo_spectral_operator(a, flow, _smooth(k, dimension, rng))
    transposed = A.T.tocsr()
    K = np.empty(A.shape)
    for start in range(0, len(K), _STRIP):
        K[start : start + _STRIP] = (transposed[start : start + _STRIP] @ A).toarray()
    return K


# --- kernels of points drawn uniformly in the unit cube of six dimensions


def profile(
    n: int, rng: Generator, dtype: np.dtype[Any], *, kernel: str, lengthscale: float
) -> Operator:
    """A kernel that the package has; its entries are formed when they are asked for."""
    points = rng.uniform(size=(n, 6)).astype(dtype)
    return KernelOperator(points, kernel, lengthscale, NUGGET)


@dense
def of_inner_products(
    n: int, rng: Generator, *, kernel: Callable[[Matrix, Matrix, Matrix], Matrix]
) -> Matrix:
    """k(x . y, x . x, y . y)."""
    points = rng.uniform(size=(n, 6))
    squares = (points**2).sum(axis=1)
    K = np.empty((n, n))
    for start in range(0, n, _STRIP):
        rows = slice(start, start + _STRIP)
        K[rows] = kernel(points[rows] @ points.T, squares[rows, None], squares)
    return K


# --- graphs


def geometric(
    n: int, rng: Generator, *, dimension: int, neighbours: int, width: float = np.inf
) -> tuple[Matrix, Matrix]:
    """Points in the unit cube, joined within the radius of a ball of so many points on average.

    Edges weigh exp(-(r / (width radius))^2 / 2).
    """
    points = rng.uniform(size=(n, dimension))
    unit_ball = math.pi ** (dimension / 2) / math.gamma(dimension / 2 + 1)
    radius = (neighbours / (n * unit_ball)) ** (1 / dimension)
    pairs = cKDTree(points).query_pairs(radius, output_type="ndarray")
    r2 = ((points[pairs[:, 0]] - points[pairs[:, 1]]) ** 2).sum(axis=1)
    return pairs, np.exp(-0.5 * r2 / (width * radius) ** 2)


def nearest_neighbours(n: int, rng: Generator) -> tuple[Matrix, Matrix]:
    """Points in the unit square, each joined to its 3 nearest."""
    points = rng.uniform(size=(n, 2))
    _, nearest = cKDTree(points).query(points, 4)  # the first is the point itself
    pairs = np.stack([np.repeat(np.arange(n), 3), np.ravel(np.asarray(nearest)[:, 1:])], axis=1)
    return pairs, np.ones(len(pairs))


def preferential_attachment(n: int, rng: Generator) -> tuple[Matrix, Matrix]:
    """Each vertex joins the end of an earlier edge: degrees follow a power law.

    Batagelj and Brandes, Efficient generation of large random networks (Phys. Rev. E 71, 2005).
    """
    ends = np.zeros(2 * (n - 1), dtype=np.int64)
    ends[0] = 1
    for vertex, u in enumerate(rng.random(n - 2), 2):
        ends[2 * vertex - 2] = vertex
        ends[2 * vertex - 1] = ends[int(u * (2 * vertex - 2))]
    return ends.reshape(-1, 2), np.ones(n - 1)


@dense
def inverse_graph_laplacian(
    n: int, rng: Generator, *, edges: Callable[[int, Generator], tuple[Matrix, Matrix]]
) -> Matrix:
    """(L + I / 100)^-1, L = diag(W 1) - W for the symmetric weights W of the edges."""
    pairs, weights = edges(n, rng)
    W = sp.csr_array((weights, tuple(pairs.T)), shape=(n, n))
    W = W.maximum(W.T)
    return _inverse(sp.diags_array(W.sum(axis=1) + 0.01) - W, squared=False)


# --- the table


@dataclass(frozen=True)
class Case:
    """A matrix: what it is, and build(n, rng, dtype) -> operator."""

    description: str
    build: Callable[..., Operator]


CASES = {
    "K02": Case("(L + I)^-2, 2-D Laplacian", inverse_laplacian_squared),
    "K03": Case("inverse squared 2-D Helmholtz, 10 points a wavelength", helmholtz),
    "K04": Case("6-D Gaussian, wide", partial(profile, kernel="gaussian", lengthscale=2.0)),
    "K05": Case("6-D Gaussian, medium", partial(profile, kernel="gaussian", lengthscale=0.7)),
    "K06": Case("6-D Gaussian, narrow", partial(profile, kernel="gaussian", lengthscale=0.2)),
    "K07": Case("6-D Green's function of the Laplacian, softened: (1 + r^2 / 4)^-2",
                partial(profile, kernel="rational_quadratic", lengthscale=1.0)),
    "K08": Case("6-D polynomial, (1 + x.y)^3",
                partial(of_inner_products, kernel=lambda xy, xx, yy: (1 + xy) ** 3)),
    "K09": Case("6-D cosine similarity",
                partial(of_inner_products, kernel=lambda xy, xx, yy: xy / np.sqrt(xx * yy))),
    "K10": Case("6-D exponential", partial(profile, kernel="laplace", lengthscale=1.0)),
    "K12": Case("inverse squared 2-D advection-diffusion, rough coefficient, slow flow",
                partial(advection_diffusion, coefficient=_rough, speed=10.0)),
    "K13": Case("inverse squared 2-D advection-diffusion, patches, medium flow",
                partial(advection_diffusion, coefficient=_patches, speed=100.0)),
    "K14": Case("inverse squared 2-D advection-diffusion, rough coefficient, fast flow",
                partial(advection_diffusion, coefficient=_rough, speed=1000.0)),
    "K15": Case("squared 2-D pseudo-spectral operator, smooth coefficient",
                partial(pseudo_spectral, dimension=2, coefficient=_smooth, speed=1.0)),
    "K16": Case("squared 2-D pseudo-spectral operator, rough coefficient, fast flow",
                partial(pseudo_spectral, dimension=2, coefficient=_rough, speed=100.0)),
    "K17": Case("squared 3-D pseudo-spectral operator, smooth coefficient",
                partial(pseudo_spectral, dimension=3, coefficient=_smooth, speed=1.0)),
    "K18": Case("inverse squared 3-D diffusion, rough coefficient", inverse_diffusion_squared),
    "G01": Case("inverse Laplacian of a 3-nearest-neighbour graph in 2-D",
                partial(inverse_graph_laplacian, edges=nearest_neighbours)),
    "G02": Case("inverse Laplacian of a power-law tree",
                partial(inverse_graph_laplacian, edges=preferential_attachment)),
    "G03": Case("inverse Laplacian of a unit-disk graph, 10 neighbours",
                partial(inverse_graph_laplacian,
                        edges=partial(geometric, dimension=2, neighbours=10))),
    "G04": Case("inverse Laplacian of a weighted geometric graph in 2-D, 40 neighbours",
                partial(inverse_graph_laplacian,
                        edges=partial(geometric, dimension=2, neighbours=40, width=0.4))),
    "G05": Case("inverse Laplacian of a unit-ball graph in 3-D, 12 neighbours",
                partial(inverse_graph_laplacian,
                        edges=partial(geometric, dimension=3, neighbours=12))),
}  # fmt: skip
NAMES = tuple(CASES)


def matrix(name: str, n: int, seed: int = 0, dtype: DTypeLike = np.float64) -> Operator:
    """A test matrix: the same bits for the same arguments.

    Args:
        name: one of NAMES.
        n: rows wanted, at least 64; a grid has the largest k^2 or k^3 that is no more.
        seed: of points, coefficients and graphs; K02 and K03 have none.
        dtype: float32 or float64; dense matrices are formed in float64.

    Returns:
        A KernelOperator for K04-K07, else a DenseOperator.

    Raises:
        ArgumentError: an unknown name, n < 64, a negative seed.
        DtypeError: n or the seed is not an integer, or another dtype.
        MemoryEstimateError: a dense matrix does not fit.
    """
    if name not in CASES:
        raise ArgumentError(f"name must be one of {', '.join(NAMES)}, got {name!r}")
    n, seed = check_count(n, "n", LEAST), check_count(seed, "seed", 0)
    return CASES[name].build(n, np.random.default_rng(seed), check_dtype(dtype, "dtype"))
