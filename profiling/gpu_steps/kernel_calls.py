"""Every kernel of the package called at least once, through the primitives that launch them.

    python -m gpu_steps.kernel_calls [--no-pool] [--tall]

calls them all on tiny stacks of both types: what compute-sanitizer looks at. Without a pool every
array is memory of its own, whose ends the sanitizer knows. `--tall` adds the variants for matrices
that the shared memory cannot hold.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import cupy
import numpy as np

from gpu_hodlr import batched
from gpu_hodlr.batched import (
    blocked_id,
    cupy_blocks,
    cupy_level_solves,
    cupy_linalg,
    dots,
    draws,
    level_products,
    level_solves,
    pair_solves,
    quarters,
    ranking,
    splits,
    stored,
)
from gpu_hodlr.batched.cuda import most_shared
from gpu_hodlr.devices import Array, synchronize

DIMENSION = 3  # of points
UNITS = 40  # of the network of Khatri-Rao entries
LIST = 16  # entries of the lists that are merged


@dataclass(frozen=True)
class Shapes:
    """A level: nodes of m rows with s samples, of which r rows are skeleton rows.

    Attributes:
        depth: samples behind a Khatri-Rao entry.
    """

    nodes: int
    m: int
    s: int
    r: int
    depth: int = 1000

    @property
    def n(self) -> int:
        """Rows of all nodes."""
        return self.nodes * self.m


_EACH = 32  # entries of a sparse row
LONG = 3000  # entries of a list that stays in global memory
TINY = Shapes(4, 36, 44, 13, 33)
# Of mnist low: leaves, the middle and the top of its tree.
LEVELS = (Shapes(128, 128, 450, 99), Shapes(16, 426, 450, 245), Shapes(2, 698, 450, 410))
CHOLESKY = (*(f"pivoted_cholesky_{part}" for part in ("panel", "order", "rows")), "sample_powers",
            "scaled_samples", "round_limits", "round_tails", "round_seen")  # fmt: skip
DEEP = Shapes(4, 1650, 1810, 1000)  # of enco high, near its top


@dataclass(frozen=True)
class Call:
    """A call of a primitive, with the least it must move and do.

    Attributes:
        kernels: stems of the kernels that it launches (see entry_points.stem); none: a library.
    """

    name: str
    kernels: tuple[str, ...]
    work: Callable[[], object]
    bytes: float
    flops: float


class Inputs:
    """Random arrays on the device."""

    def __init__(self, dtype: Any) -> None:
        self.dtype = np.dtype(dtype)
        self._normal = batched.normal_source((5,), "cuda")
        self._rng = np.random.default_rng(5)

    def normal(self, *shape: int) -> Array:
        """N(0, 1)."""
        size = int(np.prod(shape))
        return self._normal((size, 1), self.dtype).T.reshape(shape)

    def lower(self, nodes: int, m: int) -> Array:
        """Well conditioned lower triangles."""
        return batched.cholesky(self.spd(nodes, m))[0]

    def spd(self, nodes: int, m: int) -> Array:
        """Well conditioned symmetric positive definite blocks."""
        g = self.normal(nodes, m, m)
        gram = batched.matmul(g, g, transpose_b=True) / self.dtype.type(m)
        return gram + cupy.eye(m, dtype=self.dtype)

    def orders(self, nodes: int, m: int) -> Array:
        """A permutation a node."""
        return cupy.asarray(np.argsort(self._rng.random((nodes, m)), axis=1))

    def leaves(self, nodes: int, m: int) -> Array:
        """The rows of all nodes, permuted as a whole."""
        return cupy.asarray(self._rng.permutation(nodes * m).reshape(nodes, m))


class _Units:
    """G[u, v, k] as an array, as `batched.khatri_rao_entries` asks for it."""

    def __init__(self, g: Array) -> None:
        self._g = g

    def pairs(self, u: Any, v: Any) -> Array:
        return self._g[cupy.asarray(u), cupy.asarray(v)]

    def coupled(self, u: Any, v: Any) -> Any:
        return np.ones(len(u), bool)


def calls(at: Shapes, dtype: Any, columns: tuple[int, ...] = (1, 8, 64)) -> Iterator[Call]:
    """All calls on a level's shapes; the arrays of one are freed before those of the next."""
    inputs = Inputs(dtype)
    yield from decompositions(at, inputs)
    yield from _entries(at, inputs)
    yield from _splits(at, inputs)
    yield from _ranking(at, inputs)
    yield from _draws(at, inputs)
    for k in columns:
        yield from _sums(at, inputs, k)
        yield from _products(at, inputs, k)
        yield from _sparse(at, inputs, k)
        yield from _triangles(at, inputs, k)
        yield from _solves(at, inputs, k)
        yield from _pairs(at, inputs, k)
        yield from _rows(at, inputs, k)


def decompositions(at: Shapes, inputs: Inputs) -> Iterator[Call]:
    """Those of a level's samples and blocks."""
    nodes, m, s, r, v = at.nodes, at.m, at.s, at.r, inputs.dtype.itemsize
    k = min(m, s)
    S = inputs.normal(nodes, m, s)
    negligible = 1e-9 * s * m
    for name, kernels, function in (
        ("pivoted QR, a block a matrix", ("pivoted_qr",), cupy_linalg.pivoted_qr_by_blocks),
        ("pivoted QR by products", CHOLESKY, blocked_id.pivoted_qr),
    ):
        yield Call(
            name, kernels, lambda f=function: f(S, k, negligible), S.nbytes + nodes * k * m * v,
            nodes * (4 * s * m * k - 2 * (s + m) * k**2 + 4 * k**3 / 3),
        )  # fmt: skip
    qr, padding = batched.pivoted_qr(S), cupy.zeros((nodes, m), bool)
    yield Call(
        "interpolation", ("interpolation_order", "interpolation"),
        lambda: batched.interpolation(qr, r, padding),
        nodes * (r * m + (m - r) * r) * v, nodes * (m - r) * r**2,
    )  # fmt: skip
    A = inputs.normal(nodes, m, r)
    yield Call(
        "full QR", ("householder_qr", "householder_q"), lambda: batched.full_qr(A),
        nodes * (2 * m * r + r**2 + m**2) * v,
        nodes * (4 * (m**2 * r - m * r**2 + r**3 / 3) + 2 * m * r**2 - 2 * r**3 / 3),
    )  # fmt: skip
    K = inputs.spd(nodes, m)
    factorize = lambda: batched.cholesky(K)  # noqa: E731
    yield Call("Cholesky", ("finish_cholesky",), factorize, 2 * K.nbytes, nodes * m**3 / 3)
    order, (d, b) = inputs.orders(nodes, m), (inputs.normal(n, r, r) for n in (nodes, nodes // 2))
    for name, work, moved in (
        ("quartered", lambda: quarters.quartered(K, r, order), 2 * K.nbytes),
        ("paired", lambda: quarters.paired(d, b), 3 * d.nbytes + b.nbytes),
    ):
        yield Call(f"blocks {name}", (name,), work, moved, 0.0)
    yield Call("normal numbers", ("normal",), lambda: inputs.normal(at.n, s), at.n * s * v, 0.0)


def _entries(at: Shapes, inputs: Inputs) -> Iterator[Call]:
    nodes, m, n, dtype = at.nodes, at.m, at.n, inputs.dtype
    size, v = nodes * m * m, dtype.itemsize
    rows, cols = inputs.leaves(nodes, m), inputs.leaves(nodes, m)
    points = inputs.normal(n, DIMENSION)
    nugget = inputs.normal(n, 1)[:, 0] ** 2
    for profile in (
        "gaussian", "laplace", "matern32", "matern52", "rational_quadratic", "spherical",
        "squared_distance",
    ):  # fmt: skip
        yield Call(
            f"point entries, {profile}", (f"point_entries_{profile}",),
            lambda p=profile: batched.point_entries(
                points, batched.PointKernel(p), nugget, rows, cols
            ),
            size * v, size * (20 + 3 * DIMENSION),
        )  # fmt: skip
    few = cols[:, :4]
    x = inputs.normal(n, at.r)
    yield Call(
        "inner products", ("inner_products",), lambda: batched.inner_products(x, rows, few),
        x.nbytes + nodes * m * 4 * v, 2 * nodes * m * 4 * at.r,
    )  # fmt: skip
    features, unit_of = inputs.normal(-(-n // UNITS), at.depth), np.arange(n) % UNITS
    feature_of, units = np.arange(n) // UNITS, _Units(inputs.normal(UNITS, UNITS, at.depth))
    yield Call(
        "Khatri-Rao entries", ("khatri_rao_entries",),
        lambda: batched.khatri_rao_entries(features, feature_of, unit_of, units, rows, cols),
        size * v, size * 2 * at.depth,
    )  # fmt: skip
    # Rows of one unit a node: the panels pay.
    wide, other = (x.reshape(nodes // 2, 2 * m) for x in (cupy.arange(n), cols))
    wide_unit = np.arange(n) // (2 * m)
    wide_units = _Units(inputs.normal(nodes // 2, nodes // 2, at.depth))
    yield Call(
        "Khatri-Rao entries by GEMM", ("gather_rows", "scaled_panels", "scatter_rows"),
        lambda: batched.khatri_rao_entries(
            features, feature_of, wide_unit, wide_units, wide, other
        ),
        2 * size * v, 4 * size * at.depth,
    )  # fmt: skip
    root = inputs.normal(UNITS, 10, at.depth)
    u, w = (x.ravel() for x in np.indices((UNITS, UNITS)))
    yield Call(
        "pair dots", ("pair_dots",), lambda: dots.pair_dots(root, u, w),
        root.nbytes + len(u) * at.depth * v, 20 * len(u) * at.depth,
    )  # fmt: skip
    found = cupy.abs(inputs.normal(nodes, m, m))
    values, index = cupy.full((n, LIST), np.inf, dtype), cupy.full((n, LIST), -1, np.int64)
    yield Call(
        "merge smallest", ("merge_smallest",),
        lambda: batched.merge_smallest(values, index, rows, found, cols),
        found.nbytes + 2 * values.nbytes + 2 * index.nbytes, 0.0,
    )  # fmt: skip


def _splits(at: Shapes, inputs: Inputs) -> Iterator[Call]:
    """A level of a bisection by distances to four members."""
    nodes, m, v = at.nodes, at.m, inputs.dtype.itemsize
    index, members = inputs.leaves(nodes, m), inputs.leaves(nodes, m)[:, :4]
    inner, norms = inputs.normal(nodes, m, 4), inputs.normal(at.n) ** 2
    near, far = inputs.normal(nodes, m), inputs.normal(nodes, m)
    offsets, order = cupy.arange(nodes + 1) * m, cupy.empty(at.n, np.int64)
    each = index.nbytes + index.size * v
    moved = each + inner.nbytes
    for name, kernels, work, nbytes in (
        ("gram distances", ("gram_distances",),
         lambda: splits.distances("gram", inner, norms, index, members, True), moved),
        ("angle distances", ("angle_distances",),
         lambda: splits.distances("angle", inner, norms, index, members, True), moved),
        ("farthest", ("farthest",), lambda: splits.farthest(index, near), each),
        ("split keys", ("split_keys",), lambda: splits.split_keys(near, far, norms, index),
         each + 2 * near.nbytes),
        ("pad segments", ("pad_segments",), lambda: splits.pad_segments(index.ravel(), offsets, m),
         2 * index.nbytes),
        ("sort segments", ("sort_keys", "join_segments"),
         lambda: splits.sort_segments(index, near, offsets, order), each + index.nbytes),
    ):  # fmt: skip
        yield Call(name, kernels, work, nbytes, 0.0)


def _ranking(at: Shapes, inputs: Inputs) -> Iterator[Call]:
    """A level of cells as its own nodes' block rows see it."""
    nodes, dtype, cells = at.nodes, inputs.dtype, np.arange(at.nodes)
    low = inputs.normal(nodes, DIMENSION)
    offsets, every = cupy.arange(nodes + 1) * at.m, cupy.asarray(np.tile(cells, (nodes, 1)))
    run = cupy.asarray(np.tile([0, at.n], (nodes, 1)))
    own, size = cupy.asarray(cells[:, None] * at.m), cupy.full((nodes, 1), at.m)
    boxes = ranking.Boxes(offsets, low, low + dtype.type(1))
    rows = ranking.Rows(low, boxes.high, run, own, size)
    seen = ranking.examined(every, boxes, rows)
    kept = tuple(cupy.empty((nodes, nodes), x.dtype) for x in seen)
    split, each = max(1, nodes // 2), every.size * (16 + dtype.itemsize)
    for name, work, nbytes in (
        ("examine_cells", lambda: ranking.examined(every, boxes, rows), every.nbytes),
        ("divide_cells", lambda: ranking.divided(every, split, every, seen, kept, 0),
         3 * every.nbytes),
    ):  # fmt: skip
        yield Call(name.replace("_", " "), (name,), work, nbytes + each, 0.0)


def _draws(at: Shapes, inputs: Inputs) -> Iterator[Call]:
    """As many columns as a sample has, of m cells of four."""
    nodes, m = at.nodes, at.m
    count, first = cupy.full((nodes, m), 4), cupy.asarray(np.tile(4 * np.arange(m), (nodes, 1)))
    start = cupy.abs(inputs.normal(nodes, 1)).astype(np.float64) % 1.0
    chance = draws.chances(count, at.r)
    cells = first.nbytes + count.nbytes
    for name, work, nbytes in (
        ("draw_chances", lambda: draws.chances(count, at.r), cells),
        ("draw_systematic", lambda: draws.systematic(first, count, chance, at.r, start),
         cells + chance.nbytes + 16 * nodes * at.r),
    ):  # fmt: skip
        yield Call(name.replace("_", " "), (name,), work, nbytes, 0.0)


def _sums(at: Shapes, inputs: Inputs, k: int) -> Iterator[Call]:
    u, v = inputs.normal(at.n, k), inputs.normal(at.n, k)
    yield Call(
        f"column dots, {k} column{'s' * (k > 1)}", ("column_dots",),
        lambda: batched.column_dots(u, v), 2 * u.nbytes, 2 * u.size,
    )  # fmt: skip
    blocks = inputs.normal(at.nodes, at.m, k)
    yield Call(
        f"squared norms, {k} column{'s' * (k > 1)}", ("squared_rows",),
        lambda: batched.squared_norms(blocks), blocks.nbytes, 2 * blocks.size,
    )  # fmt: skip


def _products(at: Shapes, inputs: Inputs, k: int) -> Iterator[Call]:
    nodes, m, r, v = at.nodes, at.m, at.r, inputs.dtype.itemsize
    narrow = k <= level_products.NARROW
    T, D, B = (inputs.normal(*shape) for shape in ((nodes, m - r, r), (nodes, m, m),
                                                   (nodes // 2, r, r)))  # fmt: skip
    order, leaves = inputs.orders(nodes, m), inputs.leaves(nodes, m)
    x, w, vectors = inputs.normal(nodes, m, k), inputs.normal(nodes, r, k), inputs.normal(at.n, k)
    ends = (x.nbytes + w.nbytes, 2 * T.size * k)
    name = f"{k} column{'s' * (k > 1)}"

    def stems(kernel: str, *wide: str) -> tuple[str, ...]:
        return (kernel,) if narrow else wide

    yield Call(
        f"leaf product, {name}", ("gather_rows", *stems("block_diagonal")),
        lambda: level_products.leaf_product(D, vectors, leaves), D.nbytes + 2 * x.nbytes,
        2 * D.size * k,
    )  # fmt: skip
    yield Call(
        f"restrict, {name}", stems("restrict_rows", "permute_rows"),
        lambda: level_products.restrict(T, order, x), T.nbytes + ends[0], ends[1],
    )  # fmt: skip
    if inputs.dtype == np.float32:
        yield from _far_products(T, B, order, x, w, narrow)
    yield Call(
        f"couple, {name}", stems("couple"), lambda: level_products.couple(B, w),
        B.nbytes + 2 * w.nbytes, 4 * B.size * k,
    )  # fmt: skip
    yield Call(
        f"prolong, {name}", stems("prolong_rows", "unpermute_rows"),
        lambda: level_products.prolong(T, order, w), T.nbytes + ends[0], ends[1],
    )  # fmt: skip
    pairs = np.stack([np.arange(nodes), (np.arange(nodes) + 1) % nodes], axis=1)[: nodes - 1]
    pattern, blocks = batched.block_pattern(pairs, nodes, D), D[: nodes - 1]
    y = inputs.normal(nodes, m, k)
    kind = "narrow" if narrow else "wide"
    ways = [("", f"block_sparse_{kind}", cupy_blocks.by_kernel)]
    if not narrow:
        ways.append((" by GEMM", "add_terms", cupy_blocks.by_products))
    for way, kernel, multiply in ways:
        yield Call(
            f"block sparse{way}, {name}", (kernel,),
            lambda multiply=multiply: multiply(blocks, pattern, x, y),
            blocks.nbytes + 3 * nodes * m * k * v, 4 * blocks.size * k,
        )  # fmt: skip


def _far_products(
    T: Array, B: Array, order: Array, x: Array, w: Array, narrow: bool
) -> Iterator[Call]:
    """Products with bases and couplings kept in bfloat16 and TF32; x and w of a level."""
    k, ends = x.shape[2], x.nbytes + w.nbytes
    for kind in stored.WIDTHS:
        basis, coupling = (stored.packed(a, kind) for a in (T, B))
        said = f"{kind}, {k} column{'s' * (k > 1)}"
        yield Call(
            f"restrict, {said}", ("restrict_rows",) if narrow else ("permute_rows",),
            lambda basis=basis: level_products.restrict(basis, order, x),
            basis.nbytes + ends, 2 * basis.size * k,
        )  # fmt: skip
        yield Call(
            f"prolong, {said}", ("prolong_rows",) if narrow else ("unpermute_rows",),
            lambda basis=basis: level_products.prolong(basis, order, w),
            basis.nbytes + ends, 2 * basis.size * k,
        )  # fmt: skip
        yield Call(
            f"couple, {said}", ("couple",) if narrow else (),
            lambda coupling=coupling: level_products.couple(coupling, w),
            coupling.nbytes + 2 * w.nbytes, 4 * coupling.size * k,
        )  # fmt: skip


def _sparse(at: Shapes, inputs: Inputs, k: int) -> Iterator[Call]:
    starts, values = cupy.arange(at.n + 1) * _EACH, inputs.normal(at.n * _EACH)
    columns = cupy.asarray(np.random.default_rng(0).integers(0, at.n, len(values), np.int32))
    rows, x = batched.sparse_rows(starts, columns, values, at.n), inputs.normal(at.n, k)
    kind = "narrow" if k <= level_products.NARROW else "wide"
    for name, product in (("", rows.matmul), (", transposed", rows.transposed_matmul)):
        yield Call(
            f"sparse rows{name}, {k} column{'s' * (k > 1)}", (f"sparse_rows_{kind}",),
            lambda product=product: product(x),
            values.nbytes + columns.nbytes + 2 * x.nbytes, 2 * values.size * k,
        )  # fmt: skip


def _triangles(at: Shapes, inputs: Inputs, k: int) -> Iterator[Call]:
    nodes, m = at.nodes, at.m
    L, b = inputs.lower(nodes, m), inputs.normal(nodes, m, k)
    for transpose in (False, True):
        stem = "solve_lower_transposed" if transpose else "solve_lower"
        yield Call(
            f"{stem.replace('_', ' ')}, {k} column{'s' * (k > 1)}",
            (stem,) if k <= level_products.NARROW else (),
            lambda t=transpose: batched.solve_triangular(L, b, transpose=t),
            L.nbytes / 2 + 2 * b.nbytes, nodes * m**2 * k,
        )  # fmt: skip


def _solves(at: Shapes, inputs: Inputs, k: int) -> Iterator[Call]:
    """A level of a ULV solve; where a node is too large for one block, by other kernels."""
    nodes, m, r = at.nodes, at.m, at.r
    T, W = inputs.normal(nodes, m - r, r), inputs.normal(nodes, m - r, r)
    L, order = inputs.lower(nodes, m - r), inputs.orders(nodes, m)
    x, y, w = (inputs.normal(nodes, rows, k) for rows in (m, m - r, r))
    fits = k <= level_products.NARROW and cupy_level_solves.fits(T, x)
    moved = 2 * T.nbytes + L.nbytes / 2 + 2 * x.nbytes + order.nbytes
    flops = (4 * T.size + L.size) * k
    for name, work in (
        ("eliminate", lambda: level_solves.eliminate(T, L, W, order, x)),
        ("substitute", lambda: level_solves.substitute(T, L, W, order, y, w)),
    ):
        kernels = (name,) if fits else ()
        yield Call(f"{name}, {k} column{'s' * (k > 1)}", kernels, work, moved, flops)


def _pairs(at: Shapes, inputs: Inputs, k: int) -> Iterator[Call]:
    """W^-T W^-1 of a HODLR factor's level of siblings; of many columns by other kernels."""
    pairs, m, r = at.nodes // 2, at.m, at.r
    Q, P = (inputs.normal(pairs, m, r) / inputs.dtype.type(m) for _ in "QP")
    level = pair_solves.Pairs(Q, P, inputs.lower(pairs, r), m)
    turns = [pair_solves.Turn(level, transpose) for transpose in (False, True)]
    x = inputs.normal(at.nodes, m, k)
    yield Call(
        f"HODLR level, {k} column{'s' * (k > 1)}",
        ("hodlr_step",) if k <= level_products.NARROW else (),
        lambda: pair_solves.solve(turns, x),
        3 * (Q.nbytes + P.nbytes) + level.Y.nbytes + 6 * x.nbytes, 12 * Q.size * k,
    )  # fmt: skip


def _rows(at: Shapes, inputs: Inputs, k: int) -> Iterator[Call]:
    nodes, m, n = at.nodes, at.m, at.n
    x, leaves, order = inputs.normal(n, k), inputs.leaves(nodes, m), inputs.orders(nodes, m)
    blocks = x.reshape(nodes, m, k)
    moved = 2 * x.nbytes + leaves.nbytes
    for name, work in (
        ("gather_rows", lambda: batched.gather_rows(x, leaves)),
        ("scatter_rows", lambda: batched.scatter_rows(blocks, leaves, n)),
        ("permute_rows", lambda: batched.permute_rows(blocks, order)),
        ("unpermute_rows", lambda: batched.unpermute_rows(blocks, order)),
    ):
        yield Call(
            f"{name.replace('_', ' ')}, {k} column{'s' * (k > 1)}", (name,), work, moved, 0.0
        )


def tall_calls(dtype: Any) -> Iterator[tuple[str, Callable[[], object]]]:
    """The kernels of matrices and lists that a block's shared memory cannot hold: stem, call."""
    inputs = Inputs(dtype)
    item, most = inputs.dtype.itemsize, most_shared(cupy.cuda.Device().id)
    # Pivoted QR keeps two numbers and an index a row there, full QR a panel of 8 columns and more.
    yield "pivoted_qr_tall", lambda: batched.pivoted_qr(inputs.normal(2, most // (2 * item + 4), 2))
    m = most // (8 * item)
    for stem in ("householder_qr_tall", "householder_q_tall"):
        yield stem, lambda: batched.full_qr(inputs.normal(1, m, 2))
    values, index = cupy.full((2, LONG), np.inf, dtype), cupy.full((2, LONG), -1, np.int64)
    rows, columns = cupy.arange(2)[None], cupy.arange(50)[None]
    yield (
        "merge_smallest_long",
        lambda: batched.merge_smallest(
            values, index, rows, cupy.abs(inputs.normal(1, 2, 50)), columns
        ),
    )


def main() -> int:
    if "--no-pool" in sys.argv[1:]:
        cupy.cuda.set_allocator(None)
    for dtype in (np.float64, np.float32):
        for call in calls(TINY, dtype):
            call.work()
        if "--tall" in sys.argv[1:]:
            for _, work in tall_calls(dtype):
                work()
    synchronize("cuda")
    print("all kernels ran", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
