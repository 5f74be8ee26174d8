"""NumPy/LAPACK implementation of the pivoted Cholesky factorization of Gram matrices."""

from __future__ import annotations

import numpy as np
from scipy.linalg import lapack

from gpu_hodlr.batched.threads import over_nodes
from gpu_hodlr.devices import HostArray

_BLOCK = 64  # rows whose left part is set to 0 at a time
_BELOW = np.tri(_BLOCK, k=-1, dtype=bool)


def pivoted_cholesky(
    gram: HostArray, stop: HostArray, most: int, steps: int
) -> tuple[HostArray, HostArray, HostArray]:
    """See `blocked_id.pivoted_cholesky`; PSTRF, whose work is in SYRK. In the memory of `gram`."""
    nodes, m, _ = gram.shape
    pivots, ranks = np.empty((nodes, m), np.int64), np.empty(nodes, np.int64)

    def work(t: int) -> None:
        # The lower factor by columns is R by rows. No pivot above stop / m: no trace above stop.
        factor, order, rank, _ = lapack.dpstrf(
            gram[t].T, tol=float(stop[t]) / m, lower=1, overwrite_a=1
        )
        r = factor.T
        if not np.may_share_memory(r, gram):
            gram[t] = r
            r = gram[t]
        ranks[t] = rank = min(rank, most)
        pivots[t] = order - 1
        r[rank:] = 0
        for start in range(0, rank, _BLOCK):
            rows = slice(start, min(start + _BLOCK, rank))
            r[rows, :start] = 0
            corner = r[rows, rows]
            np.copyto(corner, 0, where=_BELOW[: len(corner), : len(corner)])

    over_nodes(work, nodes)
    return pivots, np.ascontiguousarray(gram[:, :steps]), ranks
