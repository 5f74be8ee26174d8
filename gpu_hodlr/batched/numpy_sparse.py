"""NumPy and SciPy implementation of sparse rows."""

from __future__ import annotations

import numpy as np
from scipy.sparse import csc_matrix, csr_matrix

from gpu_hodlr.batched.threads import over_spans
from gpu_hodlr.devices import HostArray


class SparseRows:
    """See `batched.SparseRows`."""

    def __init__(
        self, starts: HostArray, columns: HostArray, values: HostArray, width: int
    ) -> None:
        self.starts, self.columns, self.values, self.width = starts, columns, values, width

    def matmul(self, x: HostArray) -> HostArray:
        """See `batched.SparseRows`; rows are independent, a span of them a thread."""
        result = np.empty((len(self.starts) - 1, x.shape[1]), x.dtype)

        def work(start: int, stop: int) -> None:
            edges = self.starts[start : stop + 1]
            here = slice(int(edges[0]), int(edges[-1]))
            # SciPy wants indices of one type; of a span they are few.
            index = (a.astype(np.int32, copy=False) for a in (self.columns[here], edges - edges[0]))
            shape = stop - start, self.width
            result[start:stop] = csr_matrix((self.values[here], *index), shape, copy=False) @ x

        over_spans(work, len(result), self.values.size * x.shape[1])
        return result

    def transposed_matmul(self, x: HostArray) -> HostArray:
        """See `batched.SparseRows`; a span of the columns of x a thread."""
        result = np.empty((self.width, x.shape[1]), x.dtype)
        index = (a.astype(np.int32, copy=False) for a in (self.columns, self.starts))
        turned = csc_matrix((self.values, *index), (self.width, len(x)), copy=False)

        def work(start: int, stop: int) -> None:
            result[:, start:stop] = turned @ np.ascontiguousarray(x[:, start:stop])

        over_spans(work, x.shape[1], self.values.size * x.shape[1])
        return result


def sums_by_key(keys: HostArray, values: HostArray) -> tuple[HostArray, HostArray]:
    """See `batched.sums_by_key`."""
    there = keys >= 0
    found, place = np.unique(keys[there], return_inverse=True)
    return found, np.bincount(place, values[there], len(found)).astype(values.dtype)
