"""ULV-Cholesky factorization of a matrix in telescoping form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from gpu_hodlr import batched
from gpu_hodlr.devices import Array, namespace, to_host
from gpu_hodlr.factor.base import SymmetricFactor, cholesky, damped, log_determinant
from gpu_hodlr.profiling import nvtx_range
from gpu_hodlr.structures import Telescope


@dataclass(frozen=True)
class _Step:
    """One level: V D V^T = [[D11, W^T L^T], [L W, L L^T]], V = [[I, 0], [-T, I]], skeleton first.

    Attributes:
        order: (nodes, rows) puts the skeleton first and padding last; None on the leaf level.
        T: (nodes, rows - r, r) of the basis [I; T], shared with the telescoping form.
        L: (nodes, rows - r, rows - r) lower Cholesky factor of the other rows.
        W: (nodes, rows - r, r).
        slots: (nodes, rows - r) where the other rows' unknowns lie in a factor coordinate
            vector (N,), -1 for padding.
    """

    order: Array | None
    T: Array
    L: Array
    W: Array
    slots: Array


class ULVCholesky(SymmetricFactor):
    """K + damping I = W W^T for a telescoping K.

    A level at a time, all nodes at once: V U = [I; 0] for a basis U = [I; T], so that in V D V^T
    the rows that are not in the skeleton are coupled to nothing outside the node; they are
    eliminated by a Cholesky factorization, and the Schur complements of two siblings and their
    coupling B make the parent's block (ULV: Chandrasekaran, Gu, Pals, SIAM J. Matrix Anal. Appl.
    28 (2006); with the sparse V of an interpolative basis in place of an orthogonal Q: Rouet, Li,
    Ghysels, Napov, ACM Trans. Math. Softw. 42 (2016); Ho, Ying, Comm. Pure Appl. Math. 69 (2016)).
    The damping enters the leaves alone. See `SymmetricFactor` for its attributes.

    Raises:
        IndefiniteError: K + damping I is not positive definite.
    """

    def __init__(self, telescope: Telescope, damping: float) -> None:
        super().__init__(telescope, damping)
        self._leaves = telescope.leaves
        self._steps: list[_Step] = []
        xp = namespace(telescope.D)
        counts = telescope.real_rows()
        D = damped(telescope.D, telescope.leaves, damping)
        first_slot = 0
        for level, real in zip(telescope.levels, counts[:-1], strict=True):
            with nvtx_range(f"factor level of {len(D)} nodes"):
                if level.order is not None:
                    D = batched.permute_both(D, level.order)
                rest = np.arange(level.rank, D.shape[1]) < real[:, None]
                slots, first_slot = _slots(rest, first_slot)
                L, W, schur = _eliminate(D, level.T)
                step = _Step(level.order, level.T, L, W, xp.asarray(slots))
                self._steps.append(step)
                D = _parent_block(schur, level.B)
        self._root = cholesky(D)
        mask = (
            _children_mask(counts[-2], telescope.levels[-1].rank)
            if telescope.levels
            else to_host(telescope.leaves) >= 0
        )
        self._root_slots = xp.asarray(_slots(mask, first_slot)[0])

    def _forward(self, b: Array) -> tuple[list[Array], Array]:
        """W^-1 b as every level's part and the root's part."""
        x = batched.gather_rows(b, self._leaves)
        parts = []
        for step in self._steps:
            skeleton, rest = _split_rows(step, x)
            batched.matmul(step.T, skeleton, subtract_from=rest)
            y = batched.solve_triangular(step.L, rest)
            x = batched.matmul(step.W, y, transpose_a=True, subtract_from=skeleton)
            parts.append(y)
            x = x.reshape(len(x) // 2, 2 * x.shape[1], x.shape[2])
        return parts, batched.solve_triangular(self._root, x)

    def _backward(self, parts: list[Array], root: Array) -> Array:
        """W^-T applied to what `_forward` gives."""
        x = batched.solve_triangular(self._root, root, transpose=True)
        for step, y in zip(self._steps[::-1], parts[::-1], strict=True):
            x = x.reshape(len(step.L), step.W.shape[2], x.shape[2])
            y = batched.matmul(step.W, x, subtract_from=y)
            y = batched.solve_triangular(step.L, y, transpose=True)
            x = batched.matmul(step.T, y, transpose_a=True, subtract_from=x)
            x = _join_rows(step, x, y)
        return batched.scatter_rows(x, self._leaves, self.shape[0])

    def _solve(self, b: Array) -> Array:
        return self._backward(*self._forward(b))

    def _product(self, z: Array) -> Array:
        parts, root = self._split(z)
        x = batched.matmul(self._root, root)
        for step, y in zip(self._steps[::-1], parts[::-1], strict=True):
            x = x.reshape(len(step.L), step.W.shape[2], x.shape[2])
            x = batched.matmul(step.W, y, transpose_a=True, add_to=x)
            y = batched.matmul(step.T, x, add_to=batched.matmul(step.L, y))
            x = _join_rows(step, x, y)
        return batched.scatter_rows(x, self._leaves, self.shape[0])

    def _transposed_product(self, z: Array) -> Array:
        x = batched.gather_rows(z, self._leaves)
        parts = []
        for step in self._steps:
            skeleton, rest = _split_rows(step, x)
            x = batched.matmul(step.T, rest, transpose_a=True, add_to=skeleton)
            y = batched.matmul(step.L, rest, transpose_a=True)
            parts.append(batched.matmul(step.W, x, add_to=y))
            x = x.reshape(len(x) // 2, 2 * x.shape[1], x.shape[2])
        return self._join(parts, batched.matmul(self._root, x, transpose_a=True))

    def _split(self, z: Array) -> tuple[list[Array], Array]:
        parts = [batched.gather_rows(z, step.slots) for step in self._steps]
        return parts, batched.gather_rows(z, self._root_slots)

    def _join(self, parts: list[Array], root: Array) -> Array:
        n = self.shape[0]
        total = batched.scatter_rows(root, self._root_slots, n)
        for step, part in zip(self._steps, parts, strict=True):
            total += batched.scatter_rows(part, step.slots, n)
        return total

    def _sqrt_solve(self, z: Array) -> Array:
        return self._join(*self._forward(z))

    def _transposed_sqrt_solve(self, z: Array) -> Array:
        return self._backward(*self._split(z))

    def logdet(self) -> float:
        """Log of the determinant of K + damping I: 2 sum log diag over all Cholesky factors."""
        return log_determinant([*(step.L for step in self._steps), self._root])

    @property
    def nbytes(self) -> int:
        """Bytes of the stored factor."""
        steps = sum(s.L.nbytes + s.W.nbytes for s in self._steps)  # T is the matrix's own
        return int(steps + self._root.nbytes)


def _split_rows(step: _Step, x: Array) -> tuple[Array, Array]:
    """Skeleton rows and the others, as copies."""
    if step.order is not None:
        x = batched.permute_rows(x, step.order)
    r = step.T.shape[2]
    return x[:, :r].copy(), x[:, r:].copy()


def _join_rows(step: _Step, skeleton: Array, rest: Array) -> Array:
    x = batched.join_rows(skeleton, rest)
    return x if step.order is None else batched.unpermute_rows(x, step.order)


def _eliminate(D: Array, T: Array) -> tuple[Array, Array, Array]:
    """L, W and the Schur complement of the skeleton's rows, for blocks with the skeleton first."""
    r = T.shape[2]
    xp = namespace(D)
    skeleton = xp.ascontiguousarray(D[:, :r, :r])
    rows = xp.ascontiguousarray(D[:, r:])
    batched.matmul(T, D[:, :r], subtract_from=rows)  # [-T I] D
    coupling = xp.ascontiguousarray(rows[:, :, :r])
    own = xp.ascontiguousarray(rows[:, :, r:])
    L = cholesky(batched.matmul(coupling, T, transpose_b=True, subtract_from=own))
    W = batched.solve_triangular(L, coupling)
    return L, W, batched.matmul(W, W, transpose_a=True, subtract_from=skeleton)


def _parent_block(schur: Array, B: Array) -> Array:
    """[[S1, B], [B^T, S2]] for every pair of siblings."""
    r = schur.shape[1]
    parent = namespace(schur).empty((len(B), 2 * r, 2 * r), schur.dtype)
    parent[:, :r, :r], parent[:, r:, r:] = schur[0::2], schur[1::2]
    parent[:, :r, r:], parent[:, r:, :r] = B, B.swapaxes(1, 2)
    return parent


def _children_mask(child_real: Any, rank: int) -> Any:
    """(nodes, 2 rank) which range rows of a node's two children are not padding."""
    real = np.minimum(child_real, rank)
    return (np.arange(rank) < real[:, None]).reshape(len(real) // 2, 2 * rank)


def _slots(mask: Any, first: int) -> tuple[Any, int]:
    """Number the True places from `first` on; -1 elsewhere."""
    count = int(mask.sum())
    slots = np.full(mask.shape, -1)
    slots[mask] = np.arange(first, first + count)
    return slots, first + count
