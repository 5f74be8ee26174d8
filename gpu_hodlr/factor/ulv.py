"""ULV-Cholesky factorization of a matrix in telescoping form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np

from gpu_hodlr import batched
from gpu_hodlr.batched import level_solves
from gpu_hodlr.batched.quarters import paired
from gpu_hodlr.devices import Array, HostIndex, namespace, to_host
from gpu_hodlr.distributed import Rows
from gpu_hodlr.factor.definite import Definite
from gpu_hodlr.factor.inverse import ExactInverse
from gpu_hodlr.factor.solver import (
    SymmetricFactor,
    damped,
    log_determinant,
    ridge,
)
from gpu_hodlr.factor.ulv_coordinates import ULVCoordinates
from gpu_hodlr.factor.ulv_leaves import UncoupledLeaves, uncoupled
from gpu_hodlr.profiling import nvtx_range
from gpu_hodlr.structures import Level, Telescope
from gpu_hodlr.structures.nested import check_order
from gpu_hodlr.structures.stored import Part, Ranks, Stack, check_cholesky, check_types


@dataclass(frozen=True)
class _Step:
    """One level: V D V^T = [[D11, W^T L^T], [L W, L L^T]], V = [[I, 0], [-T, I]], skeleton first.

    Attributes:
        order: (nodes, rows) puts the skeleton first and padding last; None on the leaf level.
        T: (nodes, rows - r, r) of the basis [I; T], shared with the telescoping form.
        L: (nodes, rows - r, rows - r) lower Cholesky factor of the other rows.
        W: (nodes, rows - r, r).
        depth: of the level (root = 0).
    """

    order: Array | None
    T: Array
    L: Array
    W: Array
    depth: int


class ULVCholesky(ExactInverse, SymmetricFactor):
    """K + damping I = W W^T for a telescoping K.

    A level at a time, all nodes at once: V U = [I; 0] for a basis U = [I; T], so that in V D V^T
    the rows that are not in the skeleton are coupled to nothing outside the node; they are
    eliminated by a Cholesky factorization, and the Schur complements of two siblings and their
    coupling B make the parent's block (ULV: Chandrasekaran, Gu, Pals, SIAM J. Matrix Anal. Appl.
    28 (2006); with the sparse V of an interpolative basis in place of an orthogonal Q: Rouet, Li,
    Ghysels, Napov, ACM Trans. Math. Softw. 42 (2016); Ho, Ying, Comm. Pure Appl. Math. 69 (2016)).
    The damping enters the leaves alone, and `leaves` is what does not depend on it there. On many
    ranks each eliminates the nodes it works on; from the cut up their siblings' Schur complements
    come from other ranks. See `SymmetricFactor` for its attributes.

    Raises:
        IndefiniteError: K + damping I is not positive definite.

    Example:
        >>> x = np.linspace(0, 1, 200)
        >>> F = gh.compress(gh.KernelOperator(x, nugget=0.1), leaf_size=25).factorize(damping=0.5)
        >>> F.shape, F.damping
        ((200, 200), 0.5)
    """

    def __init__(
        self, telescope: Telescope, damping: float, leaves: UncoupledLeaves | None = None
    ) -> None:
        super().__init__(telescope, damping)
        self._leaves = telescope.leaves
        self._num_rows = telescope.num_rows
        self._steps: list[_Step] = []
        self._coordinates = ULVCoordinates(
            telescope.all_leaves, [a.rank for a in telescope.levels], self.owners, self.device
        )
        owners, depth = self.owners, telescope.depth
        D, added = telescope.D, ridge(telescope.leaves, damping, telescope.D.dtype)
        definite = Definite(self.device)
        for i, level in enumerate(telescope.levels):
            first = (added, leaves) if i == 0 else (None, None)
            schur = self._eliminate_level(definite, D, level, depth - i, *first)
            [schur] = owners.complete(depth - i, schur)
            D = paired(schur, level.B)
        if not telescope.levels:
            D = damped(D, telescope.leaves, damping)
        self._root = definite.cholesky(D)
        definite.check()

    def _eliminate_level(
        self,
        definite: Definite,
        D: Array,
        level: Level,
        depth: int,
        added: Array | None,
        leaves: UncoupledLeaves | None,
    ) -> Array:
        """Add a level's step; the Schur complements of its skeletons."""
        with nvtx_range(f"factor level of {len(D)} nodes"):
            if leaves is not None and added is not None:
                skeleton, coupling, own = leaves.damped(self.damping, added)
            else:
                skeleton, coupling, own = uncoupled(D, level.T, added, level.order)
            L = definite.cholesky(own)
            W = batched.solve_triangular(L, coupling, overwrite=True)
            self._steps.append(_Step(level.order, level.T, L, W, depth))
            return batched.matmul(W, W, transpose_a=True, subtract_from=skeleton)

    def _to_parents(self, x: Array, step: _Step) -> Array:
        """Rows of the parents from those of a level's skeletons."""
        [x] = self.owners.complete(step.depth, x)
        return x.reshape(len(x) // 2, 2 * x.shape[1], x.shape[2])

    def _to_children(self, x: Array, step: _Step) -> Array:
        """The reverse of `_to_parents`."""
        r = step.W.shape[2]
        return self.owners.own(x.reshape(2 * len(x), r, x.shape[2]), step.depth)

    def _index(self, step: _Step) -> Array:
        """The rows of a step's nodes, skeletons first: on the leaf level those of vectors."""
        return self._leaves if step.order is None else step.order

    def _forward(self, b: Array) -> tuple[list[Array], Array]:
        """W^-1 b as every level's part and the root's part."""
        x = b if self._steps else batched.gather_rows(b, self._leaves)
        parts = []
        for step in self._steps:
            y, x = level_solves.eliminate(step.T, step.L, step.W, self._index(step), x)
            parts.append(y)
            x = self._to_parents(x, step)
        return parts, batched.solve_triangular(self._root, x)

    def _backward(self, parts: list[Array], root: Array) -> Array:
        """W^-T applied to what `_forward` gives, which may be overwritten."""
        x = batched.solve_triangular(self._root, root, transpose=True)
        for step, y in zip(self._steps[::-1], parts[::-1], strict=True):
            x = self._to_children(x, step)
            n = self._num_rows if step.order is None else None
            x = level_solves.substitute(step.T, step.L, step.W, self._index(step), y, x, n)
        if self._steps:
            return x
        return batched.scatter_rows(x, self._leaves, self._num_rows, every=True)

    def _solve(self, b: Array) -> Array:
        return self._backward(*self._forward(b))

    def _product(self, z: Array) -> Array:
        parts, root = self._coordinates.split(z)
        x = batched.matmul(self._root, root)
        for step, y in zip(self._steps[::-1], parts[::-1], strict=True):
            x = self._to_children(x, step)
            x = batched.matmul(step.W, y, transpose_a=True, add_to=x)
            y = batched.matmul(step.T, x, add_to=batched.matmul(step.L, y))
            x = _join_rows(step, x, y)
        return batched.scatter_rows(x, self._leaves, self._num_rows)

    def _transposed_product(self, z: Array) -> Array:
        x = batched.gather_rows(z, self._leaves)
        parts = []
        for step in self._steps:
            skeleton, rest = _split_rows(step, x)
            x = batched.matmul(step.T, rest, transpose_a=True, add_to=skeleton)
            y = batched.matmul(step.L, rest, transpose_a=True)
            parts.append(batched.matmul(step.W, x, add_to=y))
            x = self._to_parents(x, step)
        root = batched.matmul(self._root, x, transpose_a=True)
        return self._coordinates.join(parts, root)

    def _sqrt_solve(self, z: Array) -> Array:
        return self._coordinates.join(*self._forward(z))

    def _transposed_sqrt_solve(self, z: Array) -> Array:
        return self._backward(*self._coordinates.split(z))

    @cached_property
    def coordinates(self) -> Rows:
        """See `SymmetricFactor`."""
        return self._coordinates.rows

    # --- the inverse's diagonal ------------------------------------------------------------------

    def _inverse_diagonal(self) -> Array:
        """See `ExactInverse`: top down, the diagonal blocks of the inverse on every level.

        Selected inversion (Lin, Lu, Ying, Car, E, Commun. Math. Sci. 7 (2009)): with G the inverse
        of the level above in a node's skeleton, and J = L^-1 [-T I], Y = L^-T W, the node's block
        of the inverse is H G H^T + J^T J, H = [I + T^T Y; -Y]: both terms are positive
        semi-definite, and nothing cancels.
        """
        unit = batched.identities(1, self._root.shape[1], self._root)
        J = batched.solve_triangular(self._root, unit).swapaxes(1, 2)
        terms = [(J, J)]  # a block is the sum of their X Y^T
        for step in self._steps[::-1]:
            G = self._skeleton_blocks(terms, step)
            terms.clear()  # memory, before the next level takes as much
            terms = _inverse_terms(step, G)
        diagonal = namespace(J).zeros(self._leaves.shape, J.dtype)
        for X, Y in terms:
            diagonal += (X * Y).sum(axis=2)
        return batched.scatter_rows(diagonal[:, :, None], self._leaves, self._num_rows)[:, 0]

    def _skeleton_blocks(self, terms: list[tuple[Array, Array]], step: _Step) -> Array:
        """(nodes, r, r) of the parents' blocks, those in the rows of a level's skeletons."""
        xp, blocks = namespace(step.W), None
        for pair in terms:
            X, Y = (xp.ascontiguousarray(self._to_children(x, step)) for x in pair)
            blocks = batched.matmul(X, Y, transpose_b=True, add_to=blocks)
        assert blocks is not None
        return blocks

    def _inverse_diagonal_bytes(self) -> int:
        """See `ExactInverse`: the terms of a level, while they are brought to the rows' order."""
        most = 3 * self._root.shape[1] ** 2
        for step in self._steps:
            nodes, rest, r = step.T.shape
            most = max(most, nodes * (rest + r) * (3 * rest + 4 * r))
        return int(most * self.dtype.itemsize)

    def logdet(self) -> float:
        """Log of the determinant of K + damping I: 2 sum log diag over all Cholesky factors.

        Collective: all ranks call.
        """
        own = [self.owners.once(step.L, step.depth) for step in self._steps]
        parts = self.owners.comm.share(log_determinant(own))
        return float(sum(parts)) + log_determinant([self._root])

    @property
    def nbytes(self) -> int:
        """Bytes of the stored factor on this rank."""
        steps = sum(s.L.nbytes + s.W.nbytes for s in self._steps)
        shared = sum(s.T.nbytes for s in self._steps) if self._loaded else 0  # the matrix's own
        return int(steps + shared + self._root.nbytes)

    @classmethod
    def memory(cls, structure: Any) -> int:
        """See `Solver`: a level's blocks, turned above the leaves, and all factors below them."""
        peak, kept, turned = structure.D.size, 0, 0
        for level in structure.levels:
            nodes, rest, r = level.T.shape
            work = rest * (rest + 2 * r) + 2 * r * r + turned * (rest + r) ** 2
            peak = max(peak, kept + nodes * work)
            kept += nodes * rest * (rest + r)
            turned = 2
        return int(peak * structure.D.itemsize)

    # --- files ---------------------------------------------------------------------------------

    def pack(self) -> dict[str, Any]:
        """See `Stored`."""
        leaves = self.owners.all_leaves(self._leaves)
        arrays = super().pack() | {"leaves": leaves, "root": to_host(self._root)}
        for i, step in enumerate(self._steps):
            for name in ("T", "L", "W"):
                arrays[f"{name}{i}"] = to_host(getattr(step, name))
            if step.order is not None:
                arrays[f"order{i}"] = to_host(step.order)
        return arrays

    @classmethod
    def stacks(cls, leaves: HostIndex, levels: int, read: Callable[[str], Any]) -> dict[str, Stack]:
        """See `Stored`; all levels of the tree have a step."""
        depth = len(leaves).bit_length() - 1
        names = ("T", "L", "W", "order")
        return {f"{name}{i}": Stack(depth - i) for i in range(depth) for name in names}

    @classmethod
    def _unpack(cls, part: Part, ranks: Ranks) -> Self:
        root, leaves = part["root"], part.own_leaves()
        n = int(np.count_nonzero(part.leaves >= 0))
        self = cls._unpacked(part, n, root.dtype)
        rows, widths = leaves.shape[1], []
        self._steps = []
        for i in range(part.depth):
            self._steps.append(_unpack_step(part, i, rows, root.dtype))
            widths.append(self._steps[-1].W.shape[2])
            rows = 2 * widths[-1]
        if root.shape != (1, rows, rows):
            raise ValueError(f"the root has shape {root.shape}, it should have {rows} rows")
        check_types({"root": root}, root.dtype)
        check_cholesky(root, "root")
        self._root, self._leaves = part.placed(root), part.placed(leaves)
        self._num_rows = int(np.count_nonzero(leaves >= 0))
        self._coordinates = ULVCoordinates(part.leaves, widths, part.owners, part.device)
        return self


def _unpack_step(part: Part, index: int, rows: int, dtype: np.dtype[Any]) -> _Step:
    """The step of a level whose nodes have so many rows.

    Raises:
        KeyError, ValueError: arrays are missing, or do not fit.
    """
    order = part.get(f"order{index}")
    names = [f"{name}{index}" for name in "TLW"]
    T, L, W = (part[name] for name in names)
    nodes, r = part.count(names[0]), T.shape[2]
    if (T.shape, L.shape, W.shape) != (
        (nodes, rows - r, r), (nodes, rows - r, rows - r), (nodes, rows - r, r),
    ):  # fmt: skip
        raise ValueError(f"level {index} has shapes {T.shape}, {L.shape}, {W.shape}")
    check_order(order, index, nodes, rows)
    check_types(dict(zip(names, (T, L, W), strict=True)), dtype)
    check_cholesky(L, names[1])
    placed = None if order is None else part.placed(order)
    return _Step(placed, part.placed(T), part.placed(L), part.placed(W), part.depth - index)


def _split_rows(step: _Step, x: Array) -> tuple[Array, Array]:
    """Skeleton rows and the others, as copies."""
    if step.order is not None:
        x = batched.permute_rows(x, step.order)
    r = step.T.shape[2]
    return x[:, :r].copy(), x[:, r:].copy()


def _join_rows(step: _Step, skeleton: Array, rest: Array) -> Array:
    x = batched.join_rows(skeleton, rest)
    return x if step.order is None else batched.unpermute_rows(x, step.order)


def _inverse_terms(step: _Step, G: Array) -> list[tuple[Array, Array]]:
    """X and Y (nodes, rows, k) with the sum of X Y^T the nodes' blocks of the inverse.

    Args:
        step: of their level.
        G: (nodes, r, r) the inverse of the level above in their skeletons.
    """
    xp, (nodes, rest, r) = namespace(G), step.T.shape
    J = xp.zeros((nodes, rest, r + rest), G.dtype)
    J[:, :, :r] = -step.T
    own = xp.arange(rest)
    J[:, own, r + own] = 1
    J = xp.ascontiguousarray(batched.solve_triangular(step.L, J).swapaxes(1, 2))
    Y = batched.solve_triangular(step.L, step.W, transpose=True)

    def lifted(skeleton: Array, others: Array) -> Array:
        """[S + T^T X; -X]."""
        both = batched.join_rows(skeleton, -others)
        batched.matmul(step.T, others, transpose_a=True, add_to=both[:, :r])
        return both

    H, HG = lifted(batched.identities(nodes, r, G), Y), lifted(G, batched.matmul(Y, G))
    if step.order is not None:
        J, H, HG = (batched.unpermute_rows(x, step.order) for x in (J, H, HG))
    return [(J, J), (H, HG)]
