"""Whether products and entries are of one symmetric matrix, before any work is put into it."""

from __future__ import annotations

import numpy as np

from gpu_hodlr import streams
from gpu_hodlr.devices import HostArray, namespace_on, to_host
from gpu_hodlr.errors import ArgumentError
from gpu_hodlr.operators.operator import Operator

_SIDE = 32  # rows and columns whose entries are looked at
_CLOSE_SIDE = 1024  # where a result is not what it should be, and the cause is looked for
_ROUNDING = 1e4  # times eps: more than any summation of a matrix loses
_SHARE = 0.1  # of rtol: a smaller difference cannot break the promise


def check_consistent(
    operator: Operator,
    rtol: float,
    seed: int,
    *,
    products: bool,
    entries: bool,
    closely: bool = False,
) -> None:
    """Compare a few entries with a product, and both with their transposes.

    Differences up to a tenth of rtol are let pass: of the largest entry looked at, and of norm(K x)
    in x^T K y - y^T K x for Gaussian x and y, both of the size of norm(K)_F.

    Args:
        operator: K.
        rtol: of the compression.
        seed: of the choice of entries and vectors.
        products: whether products are to be used; one with two unit vectors, x and y is made.
        entries: whether entries are to be used.
        closely: read 1,024 x 1,024 entries, others, and not 32 x 32.

    Raises:
        ArgumentError: they differ; says both numbers.
    """
    rng = np.random.default_rng((seed + closely, streams.CONSISTENCY))
    n, name = operator.shape[0], type(operator).__name__
    allowed = max(_ROUNDING * float(np.finfo(operator.dtype).eps), _SHARE * rtol)
    index = np.sort(rng.choice(n, size=min(n, _CLOSE_SIDE if closely else _SIDE), replace=False))
    block = None
    if entries and operator.has_entries:
        block = to_host(operator.reader.blocks(index[None], index[None]))[0].astype(np.float64)
        scale = np.abs(block).max(initial=0.0)
        i, j = _worst(block - block.T)
        if abs(block[i, j] - block[j, i]) > allowed * scale:
            raise ArgumentError(
                f"{name} is not symmetric: entry ({index[i]}, {index[j]}) is {block[i, j]:.6g}, "
                f"entry ({index[j]}, {index[i]}) is {block[j, i]:.6g}, "
                f"{abs(block[i, j] - block[j, i]):.2g} apart"
            )
    if not (products and operator.has_products):
        return
    vectors = np.zeros((n, 4), operator.dtype)
    vectors[index[:2], [0, 1]] = 1
    vectors[:, 2:] = rng.standard_normal((n, 2))
    xp = namespace_on(operator.device)
    y = to_host(operator.reader.matmat(xp.asarray(vectors))).astype(np.float64)
    if block is not None:
        i, j = _worst(y[index, :2] - block[:, :2])
        scale = max(np.abs(block).max(initial=0.0), np.abs(y[index, :2]).max(initial=0.0))
        if abs(y[index[i], j] - block[i, j]) > allowed * scale:
            raise ArgumentError(
                f"{name}: products and entries are of different matrices: entry ({index[i]}, "
                f"{index[j]}) is {block[i, j]:.6g}, the product with unit vector {index[j]} has "
                f"{y[index[i], j]:.6g} there"
            )
    largest = np.abs(y[:, 2:]).max() or 1.0  # squares might overflow
    left, right = (float(vectors[:, i] @ (y[:, 5 - i] / largest)) * largest for i in (2, 3))
    size = float(np.linalg.norm(y[:, 2:] / largest, axis=0).max()) * largest
    if abs(left - right) > allowed * size:
        raise ArgumentError(
            f"{name} is not symmetric: x^T (K y) is {left:.6g} and y^T (K x) is {right:.6g} for "
            f"random x and y, {abs(left - right):.2g} apart (norm(K x) is {size:.3g})"
        )


def _worst(difference: HostArray) -> tuple[int, int]:
    i, j = np.unravel_index(np.abs(difference).argmax(), difference.shape)
    return int(i), int(j)
