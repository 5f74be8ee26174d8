"""Points and dense symmetric matrices of the zoo: functions of a generator and N."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import matrix_cases
import numpy as np
import scipy.linalg
import scipy.sparse as sp
from dense_oracles import distance_matrix
from numpy.random import Generator

Matrix = np.ndarray[Any, Any]
Build = Callable[[Generator, int], Matrix]

# --- points


def uniform(d: int, scale: float = 1.0) -> Build:
    return lambda rng, n: scale * rng.random((n, d))


def line(rng: Generator, n: int) -> Matrix:
    return np.linspace(0, 1, n)


def grid(rng: Generator, n: int) -> Matrix:
    k = max(2, int(n**0.5))
    return np.stack(np.meshgrid(np.arange(k) / k, np.arange(k) / k), axis=-1).reshape(-1, 2)


def clusters(rng: Generator, n: int) -> Matrix:
    """Three narrow ones."""
    return rng.integers(3, size=(n, 1)) * 10.0 + 0.01 * rng.standard_normal((n, 3))


def duplicates(rng: Generator, n: int) -> Matrix:
    """Every point several times."""
    return rng.random((max(1, n // 4), 2))[rng.integers(max(1, n // 4), size=n)]


def circle(rng: Generator, n: int) -> Matrix:
    t = 2 * np.pi * np.arange(n) / n
    return np.stack([np.cos(t), np.sin(t)], axis=1)


def sphere(rng: Generator, n: int) -> Matrix:
    x = rng.standard_normal((n, 3))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def curve(rng: Generator, n: int) -> Matrix:
    """A curve in ten dimensions."""
    return np.cos(np.outer(np.sort(rng.random(n)), np.arange(1, 11)))


def one_far(rng: Generator, n: int) -> Matrix:
    """All in a unit square but one."""
    x = rng.random((n, 2))
    x[n // 2] = 1e3
    return x


# --- arrays


def spectrum(values: Callable[[int], Matrix]) -> Build:
    """Random eigenvectors, given eigenvalues."""

    def build(rng: Generator, n: int) -> Matrix:
        q = np.linalg.qr(rng.standard_normal((n, n)))[0]
        return (q * values(n)) @ q.T

    return build


def permuted(build: Build) -> Build:
    def shuffled(rng: Generator, n: int) -> Matrix:
        a = build(rng, n)
        order = rng.permutation(len(a))
        return a[np.ix_(order, order)]

    return shuffled


def scaled(factor: float, build: Build) -> Build:
    return lambda rng, n: factor * build(rng, n)


def of_size(build: Callable[[int], Matrix]) -> Build:
    """A builder that draws nothing."""
    return lambda rng, n: build(n)


def distances(profile: Callable[[Matrix], Matrix]) -> Build:
    return lambda rng, n: distance_matrix(n, profile)


def isolated(rng: Generator, n: int) -> Matrix:
    """The identity and three far pairs."""
    a = np.eye(n)
    for _ in range(3):
        i, j = rng.choice(n, 2, replace=False)
        a[i, j] = a[j, i] = 0.3
    return a


def one_entry(rng: Generator, n: int) -> Matrix:
    a = np.zeros((n, n))
    a[n // 3, n // 3] = 7.0
    return a


def block_diagonal(rng: Generator, n: int) -> Matrix:
    """Wishart blocks of unequal sizes and scales."""
    blocks, left = [], n
    while left:
        m = min(left, int(rng.integers(1, max(2, n // 4))))
        a = rng.standard_normal((m, m + 2))
        blocks.append(10.0 ** rng.integers(-3, 3) * a @ a.T)
        left -= m
    return np.asarray(scipy.linalg.block_diag(*blocks))


def arrowhead(rng: Generator, n: int) -> Matrix:
    a = np.diag(2.0 + rng.random(n))
    a[0, 1:] = a[1:, 0] = rng.random(n - 1) / n**0.5
    return a


def index_matrix(entry: Callable[[Matrix, Matrix], Matrix]) -> Build:
    """entry(i, j) for i, j = 1 .. n."""

    def build(rng: Generator, n: int) -> Matrix:
        i = np.arange(1.0, n + 1)
        return entry(i[:, None], i)

    return build


def moler(n: int) -> Matrix:
    low = np.tril(-np.ones((n, n)), -1) + np.eye(n)
    return low @ low.T


def wishart(columns: float) -> Build:
    def build(rng: Generator, n: int) -> Matrix:
        a = rng.standard_normal((n, max(1, int(columns * n))))
        return a @ a.T / a.shape[1]

    return build


def goe(rng: Generator, n: int) -> Matrix:
    a = rng.standard_normal((n, n))
    return (a + a.T) / (2 * n) ** 0.5


def grid_laplacian(d: int) -> Build:
    def build(rng: Generator, n: int) -> Matrix:
        k = max(2, int(n ** (1 / d) + 1e-9))
        one = sp.diags_array([2 * np.ones(k), -np.ones(k - 1), -np.ones(k - 1)], offsets=[0, 1, -1])
        a = one
        for _ in range(d - 1):
            a = sp.kronsum(a, one)
        return a.toarray()

    return build


def shifted(build: Build, shift: float) -> Build:
    def plus_diagonal(rng: Generator, n: int) -> Matrix:
        a = build(rng, n)
        return a + shift * np.eye(len(a))

    return plus_diagonal


def inverse(build: Build, shift: float) -> Build:
    def inverted(rng: Generator, n: int) -> Matrix:
        a = np.linalg.inv(shifted(build, shift)(rng, n))
        return (a + a.T) / 2

    return inverted


def graph(edges: Callable[[Generator, int], tuple[Matrix, Matrix]]) -> Build:
    """The Laplacian of a graph, from the ends of its edges."""

    def build(rng: Generator, n: int) -> Matrix:
        i, j = edges(rng, n)
        w = np.zeros((n, n))
        w[i, j] = 1
        w = np.maximum(w, w.T)
        np.fill_diagonal(w, 0)
        return np.diag(w.sum(axis=1)) - w

    return build


def random_edges(rng: Generator, n: int) -> tuple[Matrix, Matrix]:
    i, j = rng.integers(n, size=(2, 3 * n))
    return i, j


def star_edges(rng: Generator, n: int) -> tuple[Matrix, Matrix]:
    return np.zeros(n - 1, int), np.arange(1, n)


def chord_edges(rng: Generator, n: int) -> tuple[Matrix, Matrix]:
    """A ring and a random matching: an expander."""
    order = rng.permutation(n)
    return np.append(np.arange(n), order[: n // 2]), np.append(
        (np.arange(n) + 1) % n, order[n - n // 2 :]
    )


def twice(rng: Generator, n: int) -> Matrix:
    """[[A, A], [A, A]]: every row has its double."""
    a = distance_matrix(max(1, n // 2), lambda d: np.exp(-d / 20))
    return np.kron(np.ones((2, 2)), a)


def corner(rng: Generator, n: int) -> Matrix:
    """A block in a matrix of zeros."""
    a = np.zeros((n, n))
    k = max(1, n // 3)
    a[:k, :k] = matrix_cases.toeplitz(k)
    return a


def exchange(rng: Generator, n: int) -> Matrix:
    """2 I plus the antidiagonal: no off-diagonal block has low rank, and all are sparse."""
    return 2 * np.eye(n) + np.eye(n)[::-1]


def features(d: int, function: Callable[[Matrix, Matrix], Matrix]) -> Build:
    """function(x . y, |x|^2 + 0 y) of normal points in d dimensions."""

    def build(rng: Generator, n: int) -> Matrix:
        x = rng.standard_normal((n, d))
        squares = (x**2).sum(axis=1)
        return function(x @ x.T, np.sqrt(np.outer(squares, squares)))

    return build


def arc_cosine(xy: Matrix, norms: Matrix) -> Matrix:
    """The kernel of an infinitely wide ReLU layer (Cho and Saul, 2009)."""
    theta = np.arccos(np.clip(xy / norms, -1, 1))
    return norms * (np.sin(theta) + (np.pi - theta) * np.cos(theta)) / np.pi


def monomials(rng: Generator, n: int) -> Matrix:
    """The Gram matrix of x^0 .. x^19."""
    v = np.vander(np.linspace(-1, 1, n), min(n, 20))
    return v @ v.T


def weak_halves(rng: Generator, n: int) -> Matrix:
    """Two Wishart halves, coupled by a tenth."""
    a = wishart(1.1)(rng, n) + 0.5 * np.eye(n)
    a[: n // 2, n // 2 :] *= 0.1
    a[n // 2 :, : n // 2] *= 0.1
    return a


def equal_clusters(rng: Generator, n: int) -> Matrix:
    """Blocks of halves with halves more on the diagonal: the upper levels have rank 0."""
    m = max(1, n // 8)
    return np.kron(np.eye(-(-n // m)), 0.5 + 0.5 * np.eye(m))


def random_walk(rng: Generator, n: int) -> Matrix:
    """The covariance of twenty random walks: rank 20."""
    x = np.cumsum(rng.standard_normal((n, 20)), axis=0)
    return x @ x.T / 20
