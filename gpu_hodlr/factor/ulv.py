"""ULV-Cholesky factorization of a matrix in telescoping form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from gpu_hodlr import batched
from gpu_hodlr.arrays import Array, as_columns, device_of, namespace, to_host
from gpu_hodlr.checks import check_count
from gpu_hodlr.profiling import nvtx_range
from gpu_hodlr.telescope import Telescope


class IndefiniteError(Exception):
    """A Cholesky factorization failed: the matrix plus damping is not positive definite."""


@dataclass(frozen=True)
class _Step:
    """One level: Q^T D Q = [[D11, W^T L^T], [L W, L L^T]], range rows first.

    Attributes:
        order: (nodes, rows) puts padding last, or None where it is last already.
        Q: (nodes, rows, rows) orthogonal, U = Q [R; 0].
        L: (nodes, rows - r, rows - r) lower Cholesky factor of the complement.
        W: (nodes, rows - r, r).
        slots: (nodes, rows - r) where the complement's unknowns lie in a factor coordinate
            vector (N,), -1 for padding.
    """

    order: Array | None
    Q: Array
    L: Array
    W: Array
    slots: Any


class ULVCholesky:
    """K + damping I = W W^T for a telescoping K.

    A level at a time, all nodes at once: rotate by the full Q of the basis, U = Q [R; 0]; the
    complement's rows of the rotated block are coupled to nothing else and are eliminated by a
    Cholesky factorization; the Schur complements of two siblings and R1 B R2^T make the parent's
    block (Chandrasekaran, Gu, Pals, SIAM J. Matrix Anal. Appl. 28 (2006); Xia, Chandrasekaran, Gu,
    Li, Numer. Linear Algebra Appl. 17 (2010)). The damping enters the leaves alone.

    Attributes:
        shape: (N, N).
        dtype: float32 or float64.
        device: "cpu" or "cuda".
        damping: what was added to the diagonal.

    Raises:
        IndefiniteError: K + damping I is not positive definite.
    """

    def __init__(self, telescope: Telescope, damping: float) -> None:
        self.shape = (telescope.n, telescope.n)
        self.dtype = telescope.D.dtype
        self.device = device_of(telescope.D)
        self.damping = damping
        self._leaves = telescope.leaves
        self._steps: list[_Step] = []
        xp = namespace(telescope.D)
        counts = telescope.real_rows()
        D = telescope.D.copy()
        diagonal = np.arange(D.shape[1])
        D[:, diagonal, diagonal] += xp.where(
            xp.asarray(telescope.leaves >= 0), D.dtype.type(damping), D.dtype.type(1)
        )
        R = None
        first_slot = 0
        for level, real in zip(telescope.levels, counts[:-1], strict=True):
            with nvtx_range(f"factor level of {len(D)} nodes"):
                U = level.basis(real)
                order = None
                if R is not None:
                    rows = U.shape[1]
                    by_child = U.reshape(len(R), rows // 2, level.rank)
                    U = batched.matmul(R, by_child).reshape(len(D), rows, level.rank)
                    order = _padding_last(counts[len(self._steps) - 1], rows // 2)
                    if order is not None:
                        U = batched.permute_rows(U, order)
                        D = batched.permute_both(D, order)
                step, schur, R, first_slot = _eliminate(D, U, order, real, first_slot)
                self._steps.append(step)
                D = _parent_block(schur, R, level.B)
        self._root, info = batched.cholesky(D)
        _check(info)
        mask = (
            _children_mask(counts[-2], telescope.levels[-1].rank)
            if telescope.levels
            else telescope.leaves >= 0
        )
        self._root_slots, _ = _slots(mask, first_slot)

    def _forward(self, b: Array) -> tuple[list[Array], Array]:
        """W^-1 b as the complement's part of every level and the root's part."""
        x = batched.gather_rows(b, self._leaves)
        parts = []
        for step in self._steps:
            if step.order is not None:
                x = batched.permute_rows(x, step.order)
            x = batched.matmul(step.Q, x, transpose_a=True)
            r = step.W.shape[2]
            y = batched.solve_triangular(step.L, x[:, r:])
            x = x[:, :r] - batched.matmul(step.W, y, transpose_a=True)
            parts.append(y)
            x = x.reshape(len(x) // 2, 2 * r, x.shape[2])
        return parts, batched.solve_triangular(self._root, x)

    def _backward(self, parts: list[Array], root: Array) -> Array:
        """W^-T applied to what `_forward` gives."""
        x = batched.solve_triangular(self._root, root, transpose=True)
        for step, y in zip(self._steps[::-1], parts[::-1], strict=True):
            x = x.reshape(len(step.Q), step.W.shape[2], x.shape[2])
            y = batched.solve_triangular(step.L, y - batched.matmul(step.W, x), transpose=True)
            x = self._rotate_back(step, x, y)
        return batched.scatter_rows(x, self._leaves, self.shape[0])

    @staticmethod
    def _rotate_back(step: _Step, x: Array, y: Array) -> Array:
        x = batched.matmul(step.Q, namespace(x).concatenate([x, y], axis=1))
        return x if step.order is None else batched.unpermute_rows(x, step.order)

    def _split(self, z: Array) -> tuple[list[Array], Array]:
        parts = [batched.gather_rows(z, step.slots) for step in self._steps]
        return parts, batched.gather_rows(z, self._root_slots)

    def _join(self, parts: list[Array], root: Array) -> Array:
        n = self.shape[0]
        total = batched.scatter_rows(root, self._root_slots, n)
        for step, part in zip(self._steps, parts, strict=True):
            total += batched.scatter_rows(part, step.slots, n)
        return total

    def solve(self, b: Any) -> Any:
        """(K + damping I)^-1 b for b (N,) or (N, k); the result is like b.

        Raises:
            ShapeError, DtypeError, DeviceError, ArgumentError: see `arrays.as_columns`.
        """
        columns, restore = as_columns(b, self.shape[0], self.dtype, self.device, "b")
        with nvtx_range("solve"):
            return restore(self._backward(*self._forward(columns)))

    def logdet(self) -> float:
        """Log of the determinant of K + damping I: 2 sum log diag over all Cholesky factors."""
        xp = namespace(self._root)
        total = 0.0
        for L in [*(step.L for step in self._steps), self._root]:
            diagonal = L.diagonal(axis1=1, axis2=2).astype(np.float64)
            total += 2.0 * float(xp.log(diagonal).sum())
        return total

    def sqrt_matmat(self, z: Any, *, transpose: bool = False) -> Any:
        """W z, or W^T z; W W^T = K + damping I, W is (N, N) and not triangular.

        Raises:
            ShapeError, DtypeError, DeviceError, ArgumentError: see `arrays.as_columns`.
        """
        columns, restore = as_columns(z, self.shape[0], self.dtype, self.device, "z")
        if transpose:
            return restore(self._transposed_product(columns))
        parts, root = self._split(columns)
        x = batched.matmul(self._root, root)
        for step, y in zip(self._steps[::-1], parts[::-1], strict=True):
            x = x.reshape(len(step.Q), step.W.shape[2], x.shape[2])
            x = x + batched.matmul(step.W, y, transpose_a=True)
            x = self._rotate_back(step, x, batched.matmul(step.L, y))
        return restore(batched.scatter_rows(x, self._leaves, self.shape[0]))

    def _transposed_product(self, z: Array) -> Array:
        x = batched.gather_rows(z, self._leaves)
        parts = []
        for step in self._steps:
            if step.order is not None:
                x = batched.permute_rows(x, step.order)
            x = batched.matmul(step.Q, x, transpose_a=True)
            r = step.W.shape[2]
            y = batched.matmul(step.L, x[:, r:], transpose_a=True)
            x = x[:, :r]
            parts.append(batched.matmul(step.W, x, add_to=y))
            x = x.reshape(len(x) // 2, 2 * r, x.shape[2])
        return self._join(parts, batched.matmul(self._root, x, transpose_a=True))

    def sqrt_solve(self, z: Any, *, transpose: bool = False) -> Any:
        """W^-1 z (whitening: z ~ N(0, K + damping I) becomes white), or W^-T z.

        Raises:
            ShapeError, DtypeError, DeviceError, ArgumentError: see `arrays.as_columns`.
        """
        columns, restore = as_columns(z, self.shape[0], self.dtype, self.device, "z")
        if transpose:
            return restore(self._backward(*self._split(columns)))
        return restore(self._join(*self._forward(columns)))

    def sample(self, num: int, seed: int = 0, *, inverse: bool = False) -> Array:
        """Samples of N(0, K + damping I), or of N(0, (K + damping I)^-1), as (N, num).

        Raises:
            ArgumentError, DtypeError: num is not an integer >= 1, seed not one >= 0.
        """
        check_count(num, "num")
        check_count(seed, "seed", least=0)
        rng = np.random.default_rng(seed)
        xp = namespace(self._root)
        white = xp.asarray(rng.standard_normal((self.shape[0], num)).astype(self.dtype))
        if inverse:
            return self.sqrt_solve(white, transpose=True)
        return self.sqrt_matmat(white)

    @property
    def nbytes(self) -> int:
        """Bytes of the stored factor."""
        steps = sum(s.Q.nbytes + s.L.nbytes + s.W.nbytes for s in self._steps)
        return int(steps + self._root.nbytes)


def _check(info: Array) -> None:
    if to_host(info).any():
        raise IndefiniteError


def _eliminate(
    D: Array, U: Array, order: Array | None, real: Any, first_slot: int
) -> tuple[_Step, Array, Array, int]:
    """Rotate, factorize the complement; also the Schur complement, R and the next free slot."""
    r = U.shape[2]
    Q, R = batched.full_qr(U)
    rotated = batched.matmul(Q, batched.matmul(D, Q), transpose_a=True)
    L, info = batched.cholesky(rotated[:, r:, r:])
    _check(info)
    W = batched.solve_triangular(L, rotated[:, r:, :r])
    schur = rotated[:, :r, :r] - batched.matmul(W, W, transpose_a=True)
    real_complement = np.arange(r, U.shape[1]) < real[:, None]
    slots, first_slot = _slots(real_complement, first_slot)
    return _Step(order, Q, L, W, slots), schur, R, first_slot


def _parent_block(schur: Array, R: Array, B: Array) -> Array:
    """[[S1, R1 B R2^T], [., S2]] for every pair of siblings."""
    xp = namespace(schur)
    r = schur.shape[1]
    cross = batched.matmul(R[0::2], batched.matmul(B, R[1::2], transpose_b=True))
    parent = xp.empty((len(B), 2 * r, 2 * r), schur.dtype)
    parent[:, :r, :r], parent[:, r:, r:] = schur[0::2], schur[1::2]
    parent[:, :r, r:], parent[:, r:, :r] = cross, cross.swapaxes(1, 2)
    return parent


def _children_mask(child_real: Any, rank: int) -> Any:
    """(nodes, 2 rank) which range rows of a node's two children are not padding."""
    real = np.minimum(child_real, rank)
    return (np.arange(rank) < real[:, None]).reshape(len(real) // 2, 2 * rank)


def _padding_last(child_real: Any, rank: int) -> Any | None:
    """The order (nodes, 2 rank) that moves the padding of two children to the end, or None."""
    mask = _children_mask(child_real, rank)
    return None if mask.all() else np.argsort(~mask, axis=1, kind="stable")


def _slots(mask: Any, first: int) -> tuple[Any, int]:
    """Number the True places from `first` on; -1 elsewhere."""
    count = int(mask.sum())
    slots = np.full(mask.shape, -1)
    slots[mask] = np.arange(first, first + count)
    return slots, first + count
