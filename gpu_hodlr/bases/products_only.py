"""Compression from products alone: no entry of the matrix is ever asked for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gpu_hodlr import batched, progress, streams
from gpu_hodlr.bases.samplers import (
    OVERSAMPLING,
    Sample,
    regression_inflation,
    samples_for,
)
from gpu_hodlr.bases.sweep import (
    choose_rank,
    fold_leaf_order,
    seen_tails,
    with_ranks_of_all,
)
from gpu_hodlr.batched import level_products
from gpu_hodlr.devices import Array, HostIndex, namespace, to_hosts
from gpu_hodlr.distributed import ALONE, Ownership
from gpu_hodlr.operators import SketchRows
from gpu_hodlr.profiling import nvtx_range, phase
from gpu_hodlr.structures import Level, Telescope
from gpu_hodlr.tree import ClusterTree


@dataclass(frozen=True)
class _Done:
    """A level whose bases are known.

    Attributes:
        order: (nodes, rows), skeleton first.
        T: (nodes, rows - r, r).
        E: (nodes, rows, rows) what is known of the nodes' own blocks, in that order.
        skeleton: (nodes, r) order[:, :r]; a host array, read once.
        ranks: numerical ones of the nodes.
    """

    order: Array
    T: Array
    E: Array
    skeleton: HostIndex
    ranks: tuple[int, ...]


class _Node:
    """The block rows of one level: Y = K Omega on the rows kept so far, K = 0 on padding."""

    def __init__(self, y: Array, omega: Array, padding: Array) -> None:
        self.y, self.omega, self.padding = y, omega, padding


def sweep_products_only(
    sketch: SketchRows,
    tree: ClusterTree,
    tolerance: float,
    max_rank: int,
    seed: int,
    owners: Ownership = ALONE,
) -> tuple[Telescope, tuple[int, ...]]:
    """Nested bases, couplings and diagonal blocks from Y = K Omega.

    Levitt and Martinsson, SIAM J. Sci. Comput. 46 (2024), with interpolative bases. For node t
    the null space P of Omega_t hides the node's own block: Y_t P samples K(t, outside t). With
    U = [I; T] and X = K_tt(skeleton, skeleton) unknown, the rows of [-T I] Y_t Omega_t^+ give
    K_tt = E + U X U^T; X is left to the parent, whose rows are the skeletons. At the root all of
    K is known, and X is handed down. Needs rows + 1.5 rank + 10 columns, and 2 rank above.

    Args:
        sketch: of the matrix; it is grown in place.
        tree: the cluster tree.
        tolerance: absolute Frobenius error aimed at.
        max_rank: cap of the rank.
        seed: of the values that stand on padded rows of Omega.
        owners: which rank has what; the sketch is of this rank's rows.
    """
    spent = tolerance**2 / max(tree.depth, 1)
    capped: list[int] = []
    done: list[_Done] = []
    for depth in range(tree.depth, 0, -1):
        with nvtx_range(f"level of {len(tree.leaves) >> (tree.depth - depth)} nodes"):
            while True:
                with phase("sampling"):
                    node = _at_level(sketch, tree, done, seed, owners)
                    rows = node.y.shape[1]
                    free = sketch.num - rows
                    if free <= OVERSAMPLING:
                        sketch.grow(samples_for(min(max_rank, max(2, rows // 2))) - free)
                        continue
                    sample, Q, R = _hide_own_block(node)
                with phase("pivoted QR"):
                    qr = batched.pivoted_qr(sample.S, max_rank)
                tail = owners.sum_of_nodes(seen_tails(sample, qr.tails), depth)
                rank, reached, trusted = choose_rank(sample, tail, spent, max_rank)
                if trusted or free >= samples_for(min(max_rank, rows)):
                    break
                with phase("sampling"):
                    sketch.grow(min(free, samples_for(min(max_rank, rows)) - free))
            if reached > spent:
                if rank >= max_rank:
                    capped.append(depth)
                spent = reached
            with phase("interpolation"):
                order, T, ranks = batched.interpolation(qr, rank, node.padding, sample.noise)
                E = _own_block(node, order, T, Q, R)
            skeleton, numerical = to_hosts(order[:, :rank], ranks)
            done.append(_Done(order, T, E, skeleton, tuple(numerical.tolist())))
            progress.tick()
    with phase("couplings"):
        root = _at_level(sketch, tree, done, seed, owners)
        while root.omega.shape[2] < root.omega.shape[1] + OVERSAMPLING:
            sketch.grow(root.omega.shape[1] + OVERSAMPLING - root.omega.shape[2])
            root = _at_level(sketch, tree, done, seed, owners)
        K = _solve_right(root.y, *batched.full_qr(root.omega.swapaxes(1, 2)))
        K = (K + K.swapaxes(1, 2)) / 2 * real_blocks(root.padding, K)
        D, levels = _hand_down(K, done, tree.depth, owners)
    levels = with_ranks_of_all(levels, tree.depth, owners)
    return fold_leaf_order(tree.leaves, D, levels, owners), tuple(capped)


def real_blocks(padding: Array, like: Array) -> Array:
    """Which entries of blocks (nodes, m, m) are not padding, of their rows (nodes, m)."""
    real = ~namespace(like).asarray(padding)
    return real[:, :, None] & real[:, None, :]


def _at_level(
    sketch: SketchRows,
    tree: ClusterTree,
    done: list[_Done],
    seed: int,
    owners: Ownership,
) -> _Node:
    """Y and Omega lifted through the levels that are done."""
    mine = owners.mine(tree.depth)
    leaves = owners.local(tree.leaves[mine])
    y = batched.gather_rows(sketch.y, leaves)
    omega = batched.gather_rows(sketch.omega, leaves)
    padded, every = leaves < 0, tree.leaves < 0
    if every.any():  # any values will do there, but Omega_t must have full rank
        rng = np.random.default_rng((seed, streams.PRODUCTS_ONLY))
        xp = namespace(omega)
        fill = rng.standard_normal((omega.shape[2], int(every.sum())), dtype=omega.dtype)
        first = int(every[: mine.start].sum())
        node, row = (xp.asarray(i) for i in np.nonzero(padded))
        omega[node, row] = xp.asarray(fill[:, first : first + len(node)].T)
    for i, level in enumerate(done):
        r = level.T.shape[2]
        y, omega = (batched.permute_rows(x, level.order) for x in (y, omega))
        y = y[:, :r] - batched.matmul(level.E[:, :r], omega)
        omega = level_products.restrict(level.T, None, omega)
        kept: Array = np.take_along_axis(padded, level.skeleton, axis=1)
        y, omega, kept = owners.complete(tree.depth - i, y, omega, kept)
        pairs = (len(y) // 2, 2 * r, y.shape[2])
        y, omega = y.reshape(pairs), omega.reshape(pairs)
        padded = kept.reshape(len(kept) // 2, 2 * r)
    return _Node(y, omega, padded)


def _hide_own_block(node: _Node) -> tuple[Sample, Array, Array]:
    """The sample Y_t P, and the full QR of Omega_t^T = Q [R; 0], P the last columns of Q."""
    rows = node.y.shape[1]
    Q, R = batched.full_qr(namespace(node.y).ascontiguousarray(node.omega.swapaxes(1, 2)))
    S = batched.matmul(node.y, Q[:, :, rows:])
    energy = (node.y**2).sum(axis=(1, 2), dtype=np.float64)
    noise = batched.squared_rounding(energy, S.dtype)
    return Sample(S, regression_inflation(S.shape[2], 1.0), noise), Q, R


def _solve_right(y: Array, Q: Array, R: Array) -> Array:
    """Y Omega^+ = Y Q1 R^-T for Omega^T = Q1 R."""
    rows = R.shape[1]
    projected = batched.matmul(y, Q[:, :, :rows])
    xp = namespace(y)
    lower = xp.ascontiguousarray(R.swapaxes(1, 2))
    rhs = xp.ascontiguousarray(projected.swapaxes(1, 2))
    return batched.solve_triangular(lower, rhs, transpose=True).swapaxes(1, 2)


def _own_block(node: _Node, order: Array, T: Array, Q: Array, R: Array) -> Array:
    """E, rows and columns in skeleton-first order, E(skeleton, skeleton) = 0.

    It is 0 on padding, where regression on the values that fill Omega there leaves some.
    """
    r = T.shape[2]
    y = batched.permute_rows(node.y, order)
    reduced = y[:, r:] - batched.matmul(T, y[:, :r])
    G = _solve_right(reduced, Q, R)  # K(rest, :) - T K(skeleton, :), columns not yet in order
    G = batched.permute_rows(namespace(G).ascontiguousarray(G.swapaxes(1, 2)), order)
    cross = G[:, :r]  # K(skeleton, rest) - X T^T
    E = namespace(G).zeros((len(G), G.shape[1], G.shape[1]), G.dtype)
    E[:, :r, r:] = cross
    E[:, r:, :r] = cross.swapaxes(1, 2)
    corner = G[:, r:].swapaxes(1, 2) + batched.matmul(T, cross)
    E[:, r:, r:] = (corner + corner.swapaxes(1, 2)) / 2
    xp = namespace(E)
    return E * real_blocks(xp.take_along_axis(xp.asarray(node.padding), order, axis=1), E)


def _hand_down(
    root: Array,
    done: list[_Done],
    depth: int,
    owners: Ownership,
) -> tuple[Array, list[Level]]:
    """From the root's block down: off-diagonal parts are couplings, diagonal parts go on as X."""
    K = root
    levels: list[Level] = []
    for i, level in reversed(list(enumerate(done))):
        order, T = level.order, level.T
        r = T.shape[2]
        B = K[:, :r, r:].copy()
        xp = namespace(K)
        X = xp.stack([K[:, :r, :r], K[:, r:, r:]], axis=1).reshape(2 * len(K), r, r)
        X = owners.own(X, depth - i)
        XT = batched.matmul(X, T, transpose_b=True)
        K = level.E.copy()
        K[:, :r, :r] += X
        K[:, :r, r:] += XT
        K[:, r:, :r] += XT.swapaxes(1, 2)
        batched.matmul(T, XT, add_to=K[:, r:, r:])
        K = batched.unpermute_rows(K, order).swapaxes(1, 2)
        K = batched.unpermute_rows(xp.ascontiguousarray(K), order)
        levels.insert(0, Level(order, T, B, level.ranks))
    return K, levels
