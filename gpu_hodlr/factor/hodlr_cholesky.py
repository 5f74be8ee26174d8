"""Symmetric factorization of a matrix in HODLR form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import numpy as np

from gpu_hodlr import batched
from gpu_hodlr.batched import pair_solves
from gpu_hodlr.batched.pair_solves import Turn
from gpu_hodlr.batched.tall import inner, orthonormal
from gpu_hodlr.devices import Array, HostIndex, namespace, to_host
from gpu_hodlr.distributed import Siblings
from gpu_hodlr.factor.hodlr_steps import HODLRStep, PairStep, SpreadStep
from gpu_hodlr.factor.inverse import ExactInverse
from gpu_hodlr.factor.solver import (
    IndefiniteError,
    SymmetricFactor,
    cholesky,
    damped,
    log_determinant,
)
from gpu_hodlr.profiling import nvtx_range
from gpu_hodlr.structures import HODLR
from gpu_hodlr.structures.hodlr_blocks import columns_of
from gpu_hodlr.structures.stored import Part, Ranks, Stack, check_cholesky, check_types


class HODLRCholesky(ExactInverse, SymmetricFactor):
    """K + damping I = W W^T for a HODLR K: W = C W_depth ... W_1.

    C holds the Cholesky factors of the leaves' blocks. With C^-1 applied to all bases, and then
    W_depth^-1 .. to those of the levels above, what is left of a level is I + [[0, L R^T],
    [R L^T, 0]] for every pair of siblings (the symmetric factorization of Ambikasaran, O'Neil,
    Singh, arXiv 1405.0223, level by level: Chen, Martinsson, SC22). With L = Q S^T and P = R S
    that is W_l W_l^T, W_l = [[Z, Q P^T], [0, I]], Z Z^T = I - Q P^T P Q^T.

    Stability: norm(P) = norm(L R^T) < 1 for a positive definite matrix, so that forming I - P^T P
    loses nothing that is not lost in the matrix itself; Gram matrices of L and R themselves would
    square their condition numbers. L is the side that is made orthonormal, because it is so, or
    zero, before C^-1 is applied: then its Gram matrix is about as well conditioned as
    K_aa + damping I, and CholeskyQR is safe. The backward error is rounding times the square root
    of the condition number at most, that of C^-1.

    On many ranks each has its rows of Q and P, and where siblings span ranks all have Y: Gram
    matrices, Q^T x and P^T x are summed over the ranks. See `SymmetricFactor` for its attributes.

    Raises:
        IndefiniteError: K + damping I is not positive definite.

    Example:
        >>> x = np.linspace(0, 1, 200)
        >>> K = gh.compress(gh.KernelOperator(x, "laplace", nugget=0.1), "hodlr", leaf_size=25)
        >>> y = K.factorize().solve(K @ np.ones(200))
        >>> bool(np.allclose(y, 1.0))
        True
    """

    def __init__(self, form: HODLR, damping: float) -> None:
        super().__init__(form, damping)
        self._leaves, self._num_rows = form.leaves, form.num_rows
        self._steps: list[HODLRStep] = []  # leaf level first
        self._C = cholesky(damped(form.D, form.leaves, damping), overwrite=True)
        blocks = form.U.reshape(*form.leaves.shape, form.U.shape[1])
        U = batched.solve_triangular(self._C, blocks)
        for level in range(len(form.widths), 0, -1):
            self._add_step(U, form.widths, level)

    def _add_step(self, U: Array, widths: tuple[int, ...], level: int) -> None:
        """Factorize a level of the bases U (leaves, m, R), and apply it to those above."""
        with nvtx_range(f"factor level of {1 << level} nodes"):
            siblings = Siblings(self.owners, level)
            columns, bases = columns_of(widths)[level - 1], siblings.by_pieces(U)
            step = _factorize(bases[:, :, columns], U.shape[1], siblings)
            self._steps.append(step)
            # Bases of the levels above stand in the columns before.
            pair_solves.solve([Turn(step)], bases[:, :, : columns.start])

    def _product_step(self, step: HODLRStep, x: Array) -> None:
        """In place x <- W_l x."""
        w, p = step.sums(x)
        step.add(x, batched.matmul(step.Y, w, add_to=p) - w)

    def _transposed_product_step(self, step: HODLRStep, x: Array) -> None:
        """In place x <- W_l^T x."""
        w = step.even_sums(x)
        step.add(x, batched.matmul(step.Y, w, transpose_a=True) - w, w)

    def _gather(self, x: Array) -> Array:
        return batched.gather_rows(x, self._leaves)

    def _scatter(self, x: Array) -> Array:
        return batched.scatter_rows(x, self._leaves, self._num_rows, every=True)

    def _turns(self, *, transpose: bool) -> list[Turn]:
        """W_1^-1 .. W_depth^-1 as they are applied, or the transpose of that."""
        steps = self._steps[::-1] if transpose else self._steps
        return [Turn(step, transpose) for step in steps]

    def _solve(self, b: Array) -> Array:
        x = pair_solves.solve_leaves(self._C, b, self._leaves)
        pair_solves.solve([*self._turns(transpose=False), *self._turns(transpose=True)], x)
        return pair_solves.solve_leaves_transposed(self._C, x, self._leaves, self._num_rows)

    def _sqrt_solve(self, z: Array) -> Array:
        x = pair_solves.solve_leaves(self._C, z, self._leaves)
        pair_solves.solve(self._turns(transpose=False), x)
        return self._scatter(x)

    def _transposed_sqrt_solve(self, z: Array) -> Array:
        x = self._gather(z)
        pair_solves.solve(self._turns(transpose=True), x)
        return pair_solves.solve_leaves_transposed(self._C, x, self._leaves, self._num_rows)

    def _product(self, z: Array) -> Array:
        x = self._gather(z)
        for step in self._steps[::-1]:
            self._product_step(step, step.by_pieces(x))
        return self._scatter(batched.matmul(self._C, x))

    def _transposed_product(self, z: Array) -> Array:
        x = batched.matmul(self._C, self._gather(z), transpose_a=True)
        for step in self._steps:
            self._transposed_product_step(step, step.by_pieces(x))
        return self._scatter(x)

    def _inverse_diagonal(self) -> Array:
        """See `ExactInverse`.

        A node's block of W_l^-T .. W_1^-T W_1^-1 .. W_l^-1 is I + sum over the levels j <= l of
        F_j S_j F_j^T: from the level above F goes on as W_l^-T F, and the node's own term is
        Q (Y^-T Y^-1 - I) Q^T where it is even, P Y^-T Y^-1 P^T where it is odd. So F has the shape
        of the bases, all terms are positive semi-definite, and C^-1 on both sides is all that is
        left to do at the leaves.
        """
        steps = self._steps[::-1]
        xp, columns = namespace(self._C), columns_of(tuple(step.Y.shape[1] for step in steps))
        F = xp.empty((*self._leaves.shape, sum(c.stop - c.start for c in columns)), self.dtype)
        for step, own in zip(steps, columns, strict=True):
            pieces = step.by_pieces(F)
            pair_solves.solve([Turn(step, transpose=True)], pieces[:, :, : own.start])
            pieces[:, :, own] = step.pieces()
        F = batched.solve_triangular(self._C, F, transpose=True)
        X = batched.solve_triangular(
            self._C, batched.identities(len(self._C), self._C.shape[1], self._C)
        )
        diagonal = (X * X).sum(axis=1)
        for step, own in zip(steps, columns, strict=True):
            bases = xp.ascontiguousarray(step.by_pieces(F)[:, :, own])
            terms = (batched.matmul(bases, step.inverse_cores()) * bases).sum(axis=2)
            diagonal += terms.reshape(diagonal.shape)
        return self._scatter(diagonal[:, :, None])[:, 0]

    def _inverse_diagonal_bytes(self) -> int:
        """See `ExactInverse`: C^-1 and its squares, F and what it is solved from."""
        width = sum(step.Y.shape[1] for step in self._steps)
        return int(2 * self._C.nbytes + 2 * self._leaves.size * width * self.dtype.itemsize)

    def logdet(self) -> float:
        """Log of the determinant of K + damping I: det W_l = det Y for every pair.

        Collective: all ranks call.
        """
        own = [self._C, *(step.Y for step in self._steps if not step.siblings.spread)]
        repeated = [step.Y for step in self._steps if step.siblings.spread]
        parts = self.owners.comm.share(log_determinant(own))
        return float(sum(parts)) + log_determinant(repeated)

    @property
    def nbytes(self) -> int:
        """Bytes of the stored factor on this rank."""
        return int(sum(step.nbytes for step in self._steps) + self._C.nbytes)

    @classmethod
    def memory(cls, structure: Any) -> int:
        """See `Solver`: the blocks' factors; the bases, and what they are made of."""
        return int(1.2 * structure.D.nbytes + 2 * structure.U.nbytes)

    # --- files ---------------------------------------------------------------------------------

    def pack(self) -> dict[str, Any]:
        """See `Stored`; Q in the rows of even nodes and P in those of odd ones, leaf by leaf."""
        leaves = self.owners.all_leaves(self._leaves)
        arrays = super().pack() | {"leaves": leaves, "C": to_host(self._C)}
        for step in self._steps:
            level = step.siblings.level
            pieces = to_host(step.pieces())
            arrays[f"QP{level}"] = pieces.reshape(*self._leaves.shape, pieces.shape[2])
            pairs = self.owners.mine(level - 1) if step.siblings.spread else slice(None)
            arrays[f"Y{level}"] = to_host(step.Y)[pairs]
        return arrays

    @classmethod
    def stacks(cls, leaves: HostIndex, levels: int, read: Callable[[str], Any]) -> dict[str, Stack]:
        """See `Stored`; all levels of the tree have a step."""
        depth = len(leaves).bit_length() - 1
        stacks = {"C": Stack(depth)}
        for level in range(1, depth + 1):
            stacks |= {f"QP{level}": Stack(depth), f"Y{level}": Stack(level - 1)}
        return stacks

    @classmethod
    def _unpack(cls, part: Part, ranks: Ranks) -> Self:
        C, leaves = part["C"], part.own_leaves()
        self = cls._unpacked(part, int(np.count_nonzero(part.leaves >= 0)), C.dtype)
        if C.shape != (*leaves.shape, leaves.shape[1]):
            raise ValueError(f"C has shape {C.shape}, which does not fit the leaves")
        check_types({"C": C}, C.dtype)
        check_cholesky(C, "C")
        self._C, self._leaves = part.placed(C), part.placed(leaves)
        self._num_rows = int(np.count_nonzero(leaves >= 0))
        levels = range(part.depth, 0, -1)
        self._steps = [_unpack_step(part, level, leaves, C.dtype) for level in levels]
        return self


def _unpack_step(part: Part, level: int, leaves: Any, dtype: np.dtype[Any]) -> HODLRStep:
    """The step of a level.

    Raises:
        KeyError, ValueError: arrays are missing, or do not fit.
    """
    siblings = Siblings(part.owners, level)
    QP, name = part[f"QP{level}"], f"Y{level}"
    Y = part.whole(name) if siblings.spread else part[name]
    pairs, r = siblings.pairs.stop - siblings.pairs.start, QP.shape[2]
    if QP.shape[:2] != leaves.shape or Y.shape != (pairs, r, r):
        raise ValueError(f"level {level} has shapes {QP.shape} and {Y.shape}")
    check_types({f"QP{level}": QP, name: Y}, dtype)
    check_cholesky(Y, name)
    if QP[leaves < 0].any():
        raise ValueError(f"QP{level} is not zero on the padding")
    pieces, Y, chunk = siblings.by_pieces(part.placed(QP)), part.placed(Y), leaves.shape[1]
    if siblings.spread:
        return SpreadStep(siblings, pieces, Y, chunk)
    xp = namespace(pieces)
    Q, P = (xp.ascontiguousarray(side(pieces)) for side in (siblings.even, siblings.odd))
    return PairStep(Q, P, Y, chunk, siblings)


def _factorize(bases: Array, chunk: int, siblings: Siblings) -> HODLRStep:
    """The step of a level, of its bases (pieces, rows, r): L in even nodes, R in odd ones."""
    Q, S, info = orthonormal(siblings.even(bases), chunk, siblings.sum_even, siblings.to_even)
    if to_host(info).any():  # L was orthonormal: it is K_aa that is singular to rounding
        raise IndefiniteError
    P = batched.matmul(siblings.odd(bases), siblings.to_odd(S))
    Y = -siblings.sum_odd(inner(P, P, chunk))
    place = namespace(Y).arange(Y.shape[1])
    Y[:, place, place] += Y.dtype.type(1)
    Y = cholesky(Y)
    if siblings.spread:
        return SpreadStep(siblings, siblings.merged(Q, P), Y, chunk)
    return PairStep(Q, P, Y, chunk, siblings)
