"""The cluster tree: which indices share a leaf, and the padding of a level."""

from __future__ import annotations

import numpy as np

from gpu_hodlr.batched import splits
from gpu_hodlr.devices import HostIndex

_BLOCKS = 4  # leaves a rank at least, where rows are dealt out: none has much more than its share


class ClusterTree:
    """A perfect binary tree over 0 .. N-1; leaves may differ in size and are padded with -1.

    Node t of level l (root = 0) has the children 2t and 2t + 1 of level l + 1; the leaves are
    level `depth`.

    Attributes:
        leaves: (2^depth, m) indices of each leaf in the user's numbering, real ones first.
        depth: levels below the root.
        n: N.
    """

    def __init__(self, leaves: HostIndex) -> None:
        self.leaves = np.ascontiguousarray(leaves, dtype=np.int64)
        self.depth = (len(leaves) - 1).bit_length()
        assert len(leaves) == 1 << self.depth
        self.n = int(np.count_nonzero(self.leaves >= 0))

    def __repr__(self) -> str:
        nodes, rows = self.leaves.shape
        return f"{type(self).__name__}({self.n} rows in {nodes} leaves of at most {rows})"

    @classmethod
    def from_permutation(cls, permutation: HostIndex, offsets: HostIndex) -> ClusterTree:
        """Leaf t holds permutation[offsets[t] : offsets[t + 1]]."""
        return cls(pad_segments(permutation, offsets))

    @property
    def leaf_sizes(self) -> HostIndex:
        """(2^depth,) indices in each leaf."""
        return np.count_nonzero(self.leaves >= 0, axis=1)

    @property
    def permutation(self) -> HostIndex:
        """(N,) all indices in tree order."""
        return self.leaves[self.leaves >= 0]

    def nodes(self, level: int) -> HostIndex:
        """(2^level, rows) indices of the nodes of a level, padded with -1 anywhere in a row."""
        return self.leaves.reshape(1 << level, -1)


def rows_tree(n: int, ranks: int) -> ClusterTree:
    """A tree that deals out consecutive rows to the ranks; a single leaf for one rank."""
    blocks = 1 if ranks == 1 else _BLOCKS << (ranks - 1).bit_length()
    return ClusterTree.from_permutation(np.arange(n), balanced_offsets(n, blocks))


def num_leaves(n: int, leaf_size: int) -> int:
    """The smallest power of two with n / leaves <= leaf_size."""
    return 1 << max(0, (-(-n // leaf_size) - 1).bit_length())


def balanced_offsets(n: int, parts: int) -> HostIndex:
    """(parts + 1,) offsets of parts whose sizes differ by one at most."""
    return np.arange(parts + 1) * n // parts


def pad_segments(values: HostIndex, offsets: HostIndex) -> HostIndex:
    """The segments values[offsets[t] : offsets[t + 1]] as rows, padded with -1; host arrays.

    The rows are as long as the longest segment, and have one column at least.
    """
    width = max(1, int(np.diff(offsets).max()))
    return np.asarray(splits.pad_segments(values, offsets, width))
