"""NumPy and SciPy implementation of products with sparse rows."""

from __future__ import annotations

import numpy as np
from scipy.sparse import csc_matrix, csr_matrix

from gpu_hodlr.batched.threads import over_spans
from gpu_hodlr.devices import HostArray


def sparse_matmul(
    starts: HostArray, columns: HostArray, values: HostArray, x: HostArray
) -> HostArray:
    """See `batched.sparse_matmul`; rows are independent, a span of them a thread."""
    result = np.empty((len(starts) - 1, x.shape[1]), x.dtype)

    def work(start: int, stop: int) -> None:
        edges = starts[start : stop + 1]
        here = slice(int(edges[0]), int(edges[-1]))
        rows = csr_matrix(
            (values[here], columns[here].astype(np.int32, copy=False), (edges - edges[0]).astype(np.int32)),
            shape=(stop - start, len(x)), copy=False,
        )  # fmt: skip
        result[start:stop] = rows @ x

    over_spans(work, len(result))
    return result


def sparse_matmul_transposed(
    starts: HostArray, columns: HostArray, values: HostArray, x: HostArray, n: int
) -> HostArray:
    """See `batched.sparse_matmul_transposed`; a span of the columns of x a thread."""
    result = np.empty((n, x.shape[1]), x.dtype)
    index = columns.astype(np.int32, copy=False), starts.astype(np.int32)
    turned = csc_matrix((values, *index), shape=(n, len(x)), copy=False)

    def work(start: int, stop: int) -> None:
        result[:, start:stop] = turned @ np.ascontiguousarray(x[:, start:stop])

    over_spans(work, x.shape[1])
    return result
