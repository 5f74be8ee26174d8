"""NumPy implementation of block-sparse products."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy.linalg import blas

from gpu_hodlr.batched.stored import unpacked
from gpu_hodlr.batched.threads import over_nodes
from gpu_hodlr.devices import HostArray

if TYPE_CHECKING:
    from gpu_hodlr.batched import BlockPattern


def block_sparse_matmul(
    blocks: HostArray, pattern: BlockPattern, x: HostArray, add_to: HostArray
) -> HostArray:
    """See `batched.block_sparse_matmul`.

    GEMM adds into the row's own slice of the result, one call a term: in LAPACK's order the
    transposes of C-ordered arrays, y_i^T += x_j^T B^T.
    """
    gemm = blas.sgemm if x.dtype == np.float32 else blas.dgemm
    x = np.ascontiguousarray(x)
    starts, terms = pattern.starts, pattern.terms

    def work(i: int) -> None:
        row = np.ascontiguousarray(add_to[i]).T
        for p, j, transposed in terms[starts[i] : starts[i + 1]].tolist():
            block = unpacked(blocks[p], x.dtype)
            row = gemm(1.0, x[j].T, block.T, 1.0, row, trans_b=transposed, overwrite_c=1)
        add_to[i] = row.T

    if x.shape[1] and x.shape[2]:
        over_nodes(work, len(add_to))
    return add_to
