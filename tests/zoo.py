"""A hundred symmetric matrices, seeded, each with an operator of the package and a dense oracle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import dense_oracles
import matrix_cases
import numpy as np
import zoo_arrays as arrays
from numpy.random import Generator
from zoo_arrays import Build, Matrix

import gpu_hodlr as gh
from gpu_hodlr import matrices


@dataclass
class Specimen:
    """A matrix: what `compress` is given, and what it should be.

    Attributes:
        operator: of a dtype, declared definite or not.
        exact: the dense float64 matrix of the operator of that dtype.
    """

    operator: Callable[[Any, bool], gh.Operator]
    exact: Callable[[Any], Matrix]


Draw = Callable[[Generator, int], Specimen]


# --- how a builder's result becomes a specimen: what the operator has to go by


def dense(build: Build) -> Draw:
    """Of an array: entries and products."""

    def specimen(rng: Generator, n: int) -> Specimen:
        a = build(rng, n)
        a = (a + a.T) / 2
        return Specimen(
            lambda dtype, definite: gh.DenseOperator(a.astype(dtype), definite=definite),
            lambda dtype: a.astype(dtype).astype(np.float64),
        )

    return specimen


def behind(build: Build, entries: bool, products: bool) -> Draw:
    """Of an array that is seen by its entries alone, or its products alone."""

    def specimen(rng: Generator, n: int) -> Specimen:
        a = build(rng, n)

        def operator(dtype: Any, definite: bool) -> gh.Operator:
            b = a.astype(dtype)
            return gh.FunctionOperator(
                len(b),
                matmat=(lambda v: b @ v) if products else None,
                entries=(lambda rows, cols: b[np.ix_(rows, cols)]) if entries else None,
                dtype=dtype,
                definite=definite,
            )

        return Specimen(operator, lambda dtype: a.astype(dtype).astype(np.float64))

    return specimen


def kernel(points: Build, name: str, lengthscale: float, nugget: float = 0.0) -> Draw:
    """Of points."""

    def specimen(rng: Generator, n: int) -> Specimen:
        x = points(rng, n)

        def exact(dtype: Any) -> Matrix:
            return dense_oracles.kernel_matrix(x.astype(dtype), name, lengthscale, nugget)

        return Specimen(
            lambda dtype, definite: gh.KernelOperator(x.astype(dtype), name, lengthscale, nugget),
            exact,
        )

    return specimen


def network(layers: tuple[Any, ...], loss: str, samples: int) -> Draw:
    """The GGN of a network of widths and activations, whatever n is."""

    def specimen(rng: Generator, n: int) -> Specimen:
        import network_cases
        import torch
        from torch import nn

        seed = int(rng.integers(1 << 31))
        torch.manual_seed(seed)
        parts: list[Any] = []
        width = layers[0]
        for layer in layers[1:]:
            parts.append(nn.Linear(width, layer) if isinstance(layer, int) else layer())
            width = layer if isinstance(layer, int) else width
        model = nn.Sequential(*parts)
        inputs, targets = network_cases.data(layers[:1], width, loss, samples, torch.float32, seed)
        inputs[:, : layers[0] // 4] = 0  # as the border pixels of images

        def operator(dtype: Any, definite: bool) -> gh.Operator:
            return gh.GGNOperator(model, loss, inputs, targets, dtype=dtype)

        def exact(dtype: Any) -> Matrix:
            function = dense_oracles.loss_function(loss, "mean")
            return dense_oracles.ggn(model, function, inputs, targets)

        return Specimen(operator, exact)

    return specimen


def activation(name: str) -> Callable[[], Any]:
    """Of torch, by name: torch is imported where a network is built."""

    def make() -> Any:
        from torch import nn

        return getattr(nn, name)()

    return make


TANH, RELU, SILU = activation("Tanh"), activation("ReLU"), activation("SiLU")


def in_runs(rng: Generator, n: int) -> Specimen:
    """An operator whose natural order is a permutation in runs."""
    a, seed = matrix_cases.toeplitz(n), int(rng.integers(100))

    def operator(dtype: Any, definite: bool) -> gh.Operator:
        return matrix_cases.Clustered(a.astype(dtype), seed)

    return Specimen(operator, lambda dtype: a.astype(dtype).astype(np.float64))


def of_the_paper(name: str) -> Draw:
    """One of `gpu_hodlr.matrices`, as an array."""
    return dense(
        lambda rng, n: matrices.matrix(name, max(n, 64), int(rng.integers(100))).to_dense()
    )


toeplitz, kms = arrays.of_size(matrix_cases.toeplitz), arrays.distances(lambda d: 0.7**d)
min_index = arrays.index_matrix(np.minimum)

ZOO: dict[str, Draw] = {
    # kernels of points
    "gaussian line": kernel(arrays.line, "gaussian", 0.1),
    "gaussian line, nugget": kernel(arrays.line, "gaussian", 0.3, 0.01),
    "laplace line": kernel(arrays.line, "laplace", 0.2),
    "matern32 unsorted line": kernel(arrays.uniform(1), "matern32", 0.3),
    "matern52 line": kernel(arrays.line, "matern52", 0.05, 1e-4),
    "rational quadratic line": kernel(arrays.line, "rational_quadratic", 0.2),
    "gaussian 2-D": kernel(arrays.uniform(2), "gaussian", 0.5),
    "laplace 2-D": kernel(arrays.uniform(2), "laplace", 0.3, 0.1),
    "matern32 2-D": kernel(arrays.uniform(2), "matern32", 0.5),
    "matern52 grid": kernel(arrays.grid, "matern52", 0.3, 1e-6),
    "gaussian grid, narrow": kernel(arrays.grid, "gaussian", 0.05),
    "matern32 3-D": kernel(arrays.uniform(3), "matern32", 1.0, 0.01),
    "gaussian 3-D": kernel(arrays.uniform(3), "gaussian", 1.0),
    "rational quadratic 3-D": kernel(arrays.uniform(3), "rational_quadratic", 0.4),
    "gaussian 6-D": kernel(arrays.uniform(6), "gaussian", 1.0),
    "gaussian 6-D, narrow": kernel(arrays.uniform(6), "gaussian", 0.2),
    "laplace 10-D": kernel(arrays.uniform(10), "laplace", 2.0),
    "points far apart": kernel(arrays.uniform(2, 1e6), "gaussian", 1.0),
    "points close together": kernel(arrays.uniform(2, 1e-3), "gaussian", 1.0, 1e-3),
    "three clusters": kernel(arrays.clusters, "matern32", 0.1),
    "duplicate points": kernel(arrays.duplicates, "gaussian", 0.5, 1e-2),
    "duplicate points, no nugget": kernel(arrays.duplicates, "laplace", 0.5),
    "circle": kernel(arrays.circle, "matern52", 1.0),
    "sphere": kernel(arrays.sphere, "gaussian", 0.7),
    "curve in 10-D": kernel(arrays.curve, "matern32", 1.0),
    "one point far": kernel(arrays.one_far, "laplace", 0.5),
    # Gauss-Newton matrices
    "tanh classifier": network((8, 10, TANH, 5), "cross_entropy", 60),
    "relu classifier": network((6, 20, RELU, 10), "cross_entropy", 40),
    "deep regression": network((5, 8, TANH, 8, SILU, 8, TANH, 2), "mse", 80),
    "autoencoder": network((16, 4, TANH, 16), "mse", 50),
    "linear regression": network((30, 4), "mse", 20),
    "logistic regression": network((25, 6), "cross_entropy", 100),
    "one sample": network((10, 12, TANH, 3), "cross_entropy", 1),
    "wide output": network((4, 6, RELU, 40), "mse", 10),
    # smooth, structured
    "toeplitz": dense(toeplitz),
    "cauchy": dense(arrays.of_size(matrix_cases.cauchy)),
    "logarithm": dense(arrays.of_size(matrix_cases.logarithm)),
    "banded": dense(arrays.of_size(matrix_cases.banded)),
    "hilbert": dense(arrays.index_matrix(lambda i, j: 1 / (i + j - 1))),
    "lehmer": dense(arrays.index_matrix(lambda i, j: np.minimum(i, j) / np.maximum(i, j))),
    "moler": dense(arrays.of_size(arrays.moler)),
    "kms": dense(kms),
    "min(i, j)": dense(min_index),
    "brownian bridge": dense(
        lambda rng, n: min_index(rng, n) - np.outer(np.arange(1, n + 1), np.arange(1, n + 1)) / n
    ),
    "fractional brownian": dense(
        arrays.index_matrix(lambda i, j: (i**1.4 + j**1.4 - np.abs(i - j) ** 1.4) / 2)
    ),
    "oscillating": dense(arrays.of_size(matrix_cases.oscillating)),
    "prolate": dense(arrays.distances(lambda d: 0.4 * np.sinc(0.4 * d))),
    "fiedler": dense(arrays.distances(lambda d: d)),
    "hankel": dense(arrays.index_matrix(lambda i, j: np.cos((i + j) / 7))),
    "kronecker": dense(lambda rng, n: np.kron(matrix_cases.toeplitz(max(1, n // 8)), kms(rng, 8))),
    "hadamard": dense(lambda rng, n: toeplitz(rng, n) * arrays.wishart(0.1)(rng, n)),
    "siblings of their own": dense(
        lambda rng, n: matrix_cases.siblings_of_their_own(max(64, n // 64 * 64))
    ),
    "twice": dense(arrays.twice),
    "exchange": dense(arrays.exchange),
    # low rank
    "rank 1": dense(arrays.of_size(matrix_cases.rank_one)),
    "rank 1, tiny, plus I": dense(lambda rng, n: np.eye(n) + 1e-8 * np.ones((n, n))),
    "ones": dense(lambda rng, n: np.ones((n, n))),
    "low rank + diagonal": dense(arrays.of_size(matrix_cases.low_rank_plus_diagonal)),
    "random walk": dense(arrays.random_walk),
    "monomials": dense(arrays.monomials),
    "inner products": dense(arrays.features(8, lambda xy, norms: xy)),
    "polynomial kernel": dense(arrays.features(3, lambda xy, norms: (1 + xy) ** 3)),
    "cosine similarity": dense(arrays.features(4, lambda xy, norms: xy / norms)),
    "arc cosine": dense(arrays.features(5, arrays.arc_cosine)),
    "wishart of rank n / 10": dense(arrays.wishart(0.1)),
    # spectra
    "wishart": dense(arrays.wishart(2.0)),
    "flat spectrum": dense(arrays.of_size(dense_oracles.random_spd)),
    "exponential spectrum": dense(arrays.spectrum(lambda n: 0.8 ** np.arange(n))),
    "algebraic spectrum": dense(arrays.spectrum(lambda n: 1 / np.arange(1.0, n + 1) ** 2)),
    "step spectrum": dense(arrays.spectrum(lambda n: np.where(np.arange(n) < n // 5, 1.0, 1e-6))),
    "indefinite spectrum": dense(arrays.spectrum(lambda n: np.linspace(-1.0, 2.0, n))),
    "one negative eigenvalue": dense(arrays.spectrum(lambda n: np.append(-0.1, np.ones(n - 1)))),
    "goe": dense(arrays.goe),
    # diagonal, zero
    "identity": dense(arrays.of_size(np.eye)),
    "zero": dense(lambda rng, n: np.zeros((n, n))),
    "one entry": dense(arrays.one_entry),
    "diagonal of a huge range": dense(lambda rng, n: np.diag(10.0 ** np.linspace(-12, 0, n))),
    "diagonal of both signs": dense(lambda rng, n: np.diag(rng.standard_normal(n))),
    "isolated pairs": dense(arrays.isolated),
    "block diagonal": dense(arrays.block_diagonal),
    "equal clusters": dense(arrays.equal_clusters),
    "weakly coupled halves": dense(arrays.weak_halves),
    "zero blocks": dense(arrays.of_size(lambda n: matrix_cases.with_zero_blocks(max(n, 6)))),
    "zero quarter": dense(arrays.of_size(matrix_cases.zero_quarter)),
    "corner": dense(arrays.corner),
    "heavy rows": dense(arrays.of_size(matrix_cases.heavy_rows)),
    "arrowhead": dense(arrays.arrowhead),
    # grids and graphs
    "1-D Laplacian": dense(arrays.grid_laplacian(1)),
    "2-D Laplacian": dense(arrays.grid_laplacian(2)),
    "3-D Laplacian": dense(arrays.grid_laplacian(3)),
    "inverse 1-D Laplacian": dense(arrays.inverse(arrays.grid_laplacian(1), 0.0)),
    "inverse 2-D Laplacian": dense(arrays.inverse(arrays.grid_laplacian(2), 0.01)),
    "2-D Helmholtz": dense(arrays.shifted(arrays.grid_laplacian(2), -0.8)),
    "random graph": dense(arrays.graph(arrays.random_edges)),
    "star": dense(arrays.graph(arrays.star_edges)),
    "expander": dense(arrays.graph(arrays.chord_edges)),
    "inverse random graph": dense(arrays.inverse(arrays.graph(arrays.random_edges), 0.1)),
    # permuted and scaled
    "permuted toeplitz": dense(arrays.permuted(toeplitz)),
    "permuted banded": dense(arrays.permuted(arrays.of_size(matrix_cases.banded))),
    "permuted moler": dense(arrays.permuted(arrays.of_size(arrays.moler))),
    "in runs": in_runs,
    "negative toeplitz": dense(arrays.scaled(-1.0, toeplitz)),
    "shifted toeplitz": dense(arrays.shifted(toeplitz, -0.6)),
    "toeplitz 1e-30": dense(arrays.scaled(1e-30, toeplitz)),
    "toeplitz 1e30": dense(arrays.scaled(1e30, toeplitz)),
    # entries alone, products alone
    "entries of toeplitz": behind(toeplitz, entries=True, products=False),
    "entries of isolated pairs": behind(arrays.isolated, entries=True, products=False),
    "entries of a permuted kms": behind(arrays.permuted(kms), entries=True, products=False),
    "entries of an inverse Laplacian": behind(
        arrays.inverse(arrays.grid_laplacian(2), 0.1), entries=True, products=False
    ),
    "products of toeplitz": behind(toeplitz, entries=False, products=True),
    "products of a Wishart matrix": behind(arrays.wishart(0.1), entries=False, products=True),
    "products of min(i, j)": behind(min_index, entries=False, products=True),
    "products of weakly coupled halves": behind(arrays.weak_halves, entries=False, products=True),
    # of the GOFMM paper
    **{name: of_the_paper(name) for name in ("K02", "K03", "K08", "K12", "K18", "G02", "G03")},
}
FLOAT64_ONLY = {
    "toeplitz 1e-60": dense(arrays.scaled(1e-60, toeplitz)),
    "toeplitz 1e60": dense(arrays.scaled(1e60, toeplitz)),
    "low rank 1e-60": dense(arrays.scaled(1e-60, arrays.random_walk)),
    "banded 1e60": dense(arrays.scaled(1e60, arrays.of_size(matrix_cases.banded))),
}
ZOO |= FLOAT64_ONLY
