"""NumPy implementation of stacks of blocks in quarters."""

from __future__ import annotations

import numpy as np

from gpu_hodlr.batched.numpy_linalg import permute_both
from gpu_hodlr.devices import HostArray, HostIndex


def quartered(
    blocks: HostArray, r: int, order: HostIndex | None, added: HostArray | None
) -> tuple[HostArray, HostArray, HostArray, HostArray]:
    """See `quarters.quartered`."""
    if order is not None:
        blocks = permute_both(blocks, order)
    # Copies even where a slice is all of them, as ascontiguousarray would not make.
    upper, lower, own = (
        np.array(part, order="C")
        for part in (blocks[:, :r, :r], blocks[:, r:, :r], blocks[:, r:, r:])
    )
    if added is not None:
        for part, its in ((upper, added[:, :r]), (own, added[:, r:])):
            diagonal = np.arange(part.shape[1])
            part[:, diagonal, diagonal] += its
    return upper, lower, blocks[:, :r, r:], own


def paired(d: HostArray, b: HostArray) -> HostArray:
    """See `quarters.paired`."""
    r = d.shape[1]
    out = np.empty((len(b), 2 * r, 2 * r), d.dtype)
    out[:, :r, :r], out[:, r:, r:] = d[0::2], d[1::2]
    out[:, :r, r:], out[:, r:, :r] = b, b.swapaxes(1, 2)
    return out
