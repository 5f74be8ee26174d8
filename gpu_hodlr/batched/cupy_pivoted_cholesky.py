"""CuPy implementation of the pivoted Cholesky factorization of Gram matrices."""

from __future__ import annotations

import cupy
import numpy as np

from gpu_hodlr.batched.cublas import gemm
from gpu_hodlr.batched.cuda import launch
from gpu_hodlr.devices import Array, to_host

_PANEL = 32  # pivots between two products
_FIRST_LOOK = 4  # panels after which the host looks whether all nodes have ended
_HEIGHT = 8  # rows of R that a block puts into order


def pivoted_cholesky(gram: Array, stop: Array, most: int, steps: int) -> tuple[Array, Array, Array]:
    """See `blocked_id.pivoted_cholesky`; kernels/pivoted_cholesky.cu and a GEMM a panel.

    Nodes that have ended take part in the products with rows of zeros. The host looks after 4, 8,
    16, ... panels: it waits few times, and there are at most twice the panels that are needed.
    """
    nodes, m, _ = gram.shape
    squares = gram.diagonal(axis1=1, axis2=2).copy(order="C")
    rows = cupy.zeros((nodes, steps, m), np.float64)
    chosen, ranks = cupy.empty((nodes, steps), np.int32), cupy.zeros(nodes, np.int32)
    pivots = cupy.empty((nodes, m), np.int64)
    stop = cupy.ascontiguousarray(stop)
    threads, look = 32 * min(24, -(-m // 32)), _FIRST_LOOK * _PANEL
    for first in range(0, most, _PANEL):
        if first == look:
            look *= 2
            if int(to_host(ranks.max())) < first:
                break
        if first:
            last = rows[:, first - _PANEL : first]
            gemm(last, last, gram, transpose_a=True, alpha=-1.0, beta=1.0)
        launch(
            "pivoted_cholesky", "pivoted_cholesky_panel_f64", (nodes,), (threads,),
            (gram, rows, squares, chosen, ranks, stop, m, steps, first, min(_PANEL, most - first)),
            1280,
        )  # fmt: skip
    launch(
        "pivoted_cholesky", "pivoted_cholesky_order_f64", (nodes,), (32,),
        (squares, chosen, ranks, pivots, m, steps),
    )  # fmt: skip
    r = gram.ravel()[: rows.size].reshape(rows.shape)  # what is left of G is of no more use
    launch(
        "pivoted_cholesky", "pivoted_cholesky_rows_f64", (nodes * -(-steps // _HEIGHT),),
        (32, _HEIGHT), (rows, pivots, ranks, r, m, steps),
    )  # fmt: skip
    return pivots, r, ranks.astype(np.int64)
