"""Bytes, operations and dependent steps of every raw kernel, from the arguments of its launch.

The formulas are those of the header comments in kernels/*.cu. A new kernel needs a line in KERNELS:
a test says so. An argument is known by the name of its parameter.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from gpu_costs.steps import Operand, Step
from gpu_costs.work import Work

_SUBSTITUTION = 1.5  # dependent steps of 32 unknowns: the solve by one warp, and a barrier
_DRAWN_FLOPS = 100.0  # of a normal number: ten rounds of Philox, logarithm, sine
_POINT_FLOPS = 20.0  # of an entry: a root and an exponential; and 3 a dimension
_SCAN = 5.0  # dependent steps of a block's scan: a load, shuffles, two barriers, the warps' sums
_UNDER_WAY = 8.0  # loads of a thread that do not wait for each other
_BUSY = 0.45  # share of the peak of kernels that feed plain multiply-adds from shared memory


class UnknownKernelError(KeyError):
    """A kernel without a cost model, or one whose parameters are others than its model's."""

    def __str__(self) -> str:
        return str(self.args[0])


class _Launch:
    """A step whose arguments are read by name; an unknown name says which kernel lacks it."""

    def __init__(self, step: Step) -> None:
        self._step = step
        self.itemsize = step.itemsize
        self.blocks = math.prod(step.grid)

    def n(self, name: str) -> float:
        return self._of(self._step.numbers, name)

    def known(self, name: str, otherwise: float) -> float:
        """A number that the recorder adds where it can."""
        return self._step.numbers.get(name, otherwise)

    def array(self, name: str) -> Operand:
        return self._of(self._step.operands, name)

    def _of(self, where: dict[str, Any], name: str) -> Any:
        if name not in where:
            raise UnknownKernelError(
                f"the cost model of kernel {self._step.name} wants its parameter {name!r};"
                f" it was launched with {', '.join([*self._step.operands, *self._step.numbers])}"
            )
        return where[name]

    def work(self, **values: Any) -> Work:
        step = self._step
        given = {"blocks": self.blocks, "threads": math.prod(step.block), "shared": step.shared}
        return Work(**given | {"itemsize": self.itemsize} | values)


def _steps(x: _Launch) -> tuple[float, float, float, float]:
    """Nodes, rows, columns and steps of a pivoted QR."""
    nodes, m, s = x.array("samples").shape
    steps = min(m, s, x.n("max_rank"))
    return nodes, m, s, min(steps, x.known("done", steps))


def _pivoted_qr(x: _Launch) -> Work:
    """A step goes over what is left of the samples: read, and written. R leaves once."""
    nodes, m, s, k = _steps(x)
    v = x.itemsize
    flops = nodes * (4 * s * m * k - 2 * (s + m) * k**2 + 4 * k**3 / 3)
    written = nodes * k * m * v
    return x.work(
        bytes=x.array("samples").nbytes + written, flops=flops, chain=k,
        again=flops / 4 * 2 * v, footprint=nodes * m * s * v,
    )  # fmt: skip


def _pivoted_cholesky_panel(x: _Launch) -> Work:
    """A step reads a row of G, writes one of R, and reads those that the panel has so far."""
    nodes, m, _ = x.array("gram").shape
    width, row = x.n("width"), nodes * m * x.itemsize
    return x.work(
        bytes=2 * (width + 1) * row, flops=nodes * m * width * (width + 2), chain=width,
        again=width**2 / 2 * row, footprint=width * row,
    )  # fmt: skip


def _pivoted_cholesky_order(x: _Launch) -> Work:
    """One warp goes over the columns of a node."""
    nodes, m = x.array("pivots").shape
    return x.work(bytes=nodes * m * 20, chain=4 + m / 128)


def _pivoted_cholesky_rows(x: _Launch) -> Work:
    """What is below the diagonal is not read."""
    return x.work(bytes=1.5 * x.array("r").nbytes + x.array("pivots").nbytes)


def _sample_powers(x: _Launch) -> Work:
    """A block goes over the samples of a node, a few at a time."""
    samples = x.array("samples")
    length = samples.size / max(1, len_of(samples))
    chain = 4 + length / math.prod(x._step.block) / _UNDER_WAY
    return x.work(bytes=samples.nbytes, chain=chain)


def _round_tails(x: _Launch) -> Work:
    """One warp goes over the rows of a node twice: a sum, and sums from the end."""
    k = x.array("squares").shape[1]
    return x.work(bytes=x._step.nbytes, chain=6 + 2 * k / 32)


def _round_seen(x: _Launch) -> Work:
    """One warp goes over the nodes."""
    return x.work(bytes=x._step.nbytes, chain=4 + x.n("nodes") / 32)


def _householder(x: _Launch, flops: float, **values: Any) -> Work:
    """3 numbers moved for each 32 operations, mostly in L2."""
    return x.work(flops=flops, again=flops / 32 * 3 * x.itemsize, **values)


def _householder_qr(x: _Launch) -> Work:
    m, k, nodes = x.n("m"), x.n("k"), x.array("r").shape[0]
    a = nodes * m * k * x.itemsize
    return _householder(
        x, nodes * 2 * k**2 * (m - k / 3), bytes=2 * a + x.array("r").nbytes, chain=k, footprint=a
    )


def _householder_q(x: _Launch) -> Work:
    m, k, q = x.n("m"), x.n("k"), x.array("q")
    flops = len_of(q) * 4 * k * (m**2 - m * k + k**2 / 3)
    moved = q.nbytes + len_of(q) * m * k * x.itemsize
    return _householder(x, flops, bytes=moved, chain=k / 8, footprint=q.nbytes)


def len_of(x: Operand) -> int:
    """Matrices of a stack."""
    return x.shape[0]


def _interpolation_order(x: _Launch) -> Work:
    nodes, m = x.array("pivots").shape
    return x.work(bytes=nodes * (m * 25 + x.n("rank") * 16), chain=4 + m / 512)


def _interpolation(x: _Launch) -> Work:
    """Back substitution of 32 columns a block; R1 is read by every block."""
    rank, nodes = x.n("rank"), len_of(x.array("basis"))
    columns = x.n("m") - rank
    r1 = nodes * rank**2 / 2 * x.itemsize
    strips = math.ceil(columns / 32)
    return x.work(
        bytes=r1 + 3 * x.array("basis").nbytes, flops=nodes * columns * rank**2, rate=_BUSY,
        chain=_SUBSTITUTION * rank / 32, again=r1 * max(0, strips - 1), footprint=r1,
    )  # fmt: skip


def _triangular(x: _Launch) -> Work:
    """One block a matrix: 32 unknowns after 32 others."""
    lower, k = x.array("lower"), x.n("k")
    nodes, m, _ = lower.shape
    return x.work(
        bytes=lower.nbytes / 2 + 2 * nodes * m * k * x.itemsize, flops=lower.size * k,
        chain=_SUBSTITUTION * m / 32,
    )  # fmt: skip


def _hodlr_step(x: _Launch) -> Work:
    """Bases of both levels and x once; Y and the parts of the sums by every block that applies."""
    r, next_r, k, item = x.n("r"), x.n("next_r"), x.n("k"), x.itemsize
    vectors, forward = x.array("x"), "p" in x._step.operands
    n = vectors.size / k
    # Forward Q is applied, to the even nodes; and back Q^T x is the next level's sum.
    applied = n * r * (0.5 if forward else 1.0)
    added = n * next_r * (1.0 if "next_p" in x._step.operands else 0.5)
    sides = 2 if forward else 1
    again = (r * r / 2 + sides * x.n("parts") * r * k) * item * x.blocks / sides if r else 0.0
    return x.work(
        bytes=(applied + added) * item + 2 * vectors.nbytes, again=again,
        flops=2 * (applied + added) * k, chain=2 + _SUBSTITUTION * r / 32 + (3 if next_r else 0),
    )  # fmt: skip


def _ulv_step(x: _Launch) -> Work:
    """T, W and half of L once, by one block a node; two products beside the substitution."""
    basis, lower, y = (x.array(name) for name in ("basis", "lower", "y"))
    vectors = 2 * (y.nbytes + x.array("w").nbytes)
    return x.work(
        bytes=2 * basis.nbytes + lower.nbytes / 2 + vectors + x.array("index").nbytes,
        flops=(4 * basis.size + lower.size) * x.n("k"), chain=_SUBSTITUTION * y.shape[1] / 32,
    )  # fmt: skip


def _product(*matrices: str, reads: int = 1) -> Callable[[_Launch], Work]:
    """A narrow product: matrices and vectors once, two operations for a number and column."""

    def cost(x: _Launch) -> Work:
        blocks = [x.array(name) for name in matrices]
        size, moved = sum(b.size for b in blocks), sum(b.nbytes for b in blocks)
        again = (reads - 1) * moved
        return x.work(
            bytes=x._step.nbytes, flops=2 * reads * size * x.n("k"), again=again, footprint=moved
        )

    return cost


def _block_sparse_wide(x: _Launch) -> Work:
    flops = 4 * x.array("blocks").size * x.n("k")
    return x.work(bytes=x._step.nbytes, flops=flops, rate=_BUSY)


def _add_terms(x: _Launch) -> Work:
    z = x.array("z")
    return x.work(bytes=z.nbytes + 2 * x.array("y").nbytes, flops=z.size)


def _scaled_panels(x: _Launch) -> Work:
    """Rows of both are read once for each of the result's, and where they are."""
    out = x.array("out")
    return x.work(bytes=3 * out.nbytes + 24 * x.n("count"), flops=out.size)


def _examine_cells(x: _Launch) -> Work:
    """Cells and what is said of them once, boxes from L2, and what a row leaves out."""
    cells, d = x.array("cell").size, x.n("d")
    moved = cells * (8 + 16 + x.itemsize)
    again = cells * (16 + 2 * d * x.itemsize + 16 * x.n("left_out"))
    return x.work(
        bytes=moved + x.array("low").nbytes + x.array("high").nbytes, again=again,
        flops=cells * (12 * d + 8 * x.n("left_out")), footprint=again,
    )  # fmt: skip


def _divide_cells(x: _Launch) -> Work:
    """What was seen of every cell goes to one place."""
    cells = x.array("cell").size
    return x.work(bytes=cells * (24 + 2 * (16 + x.itemsize)))


def _scans(x: _Launch, q: int) -> float:
    """Of a block over so many numbers, a thread each at a time: dependent steps of one scan."""
    return _SCAN * math.ceil(q / math.prod(x._step.block))


def _draw_chances(x: _Launch) -> Work:
    """A block a row scans its cells four times."""
    rows, q = x.array("count").shape
    return x.work(bytes=rows * q * 16, again=rows * q * 40, chain=4 * _scans(x, q) + 4)


def _draw_systematic(x: _Launch) -> Work:
    """A block a row scans its cells; what it draws leaves once."""
    rows, q = x.array("count").shape
    drawn = x.n("wanted")
    chain = _scans(x, q) + drawn / math.prod(x._step.block) + 2
    return x.work(bytes=rows * (q * 24 + drawn * 16), chain=chain)


def _pair_dots(x: _Launch) -> Work:
    """The rows of both units for each pair."""
    out, outputs = x.array("out"), x.n("outputs")
    c = x.array("c")
    return x.work(
        bytes=c.nbytes + out.nbytes, flops=2 * out.size * outputs,
        again=max(0.0, 2 * out.nbytes * outputs - c.nbytes), footprint=c.nbytes,
    )  # fmt: skip


def _khatri_rao(x: _Launch) -> Work:
    return x.work(bytes=x._step.nbytes, flops=2 * x.array("out").size * x.n("n"), rate=_BUSY)


def _point_entries(x: _Launch) -> Work:
    size = x.array("out").size
    return x.work(bytes=size * x.itemsize, flops=size * (_POINT_FLOPS + 3 * x.n("d")), rate=_BUSY)


def _inner_products(x: _Launch) -> Work:
    out = x.array("out")
    nodes, m, count = out.shape
    moved = nodes * m * ((x.n("d") + count) * x.itemsize + 8)
    return x.work(bytes=moved, flops=2 * out.size * x.n("d"))


def _merge_smallest(x: _Launch) -> Work:
    """What is found, once; the lists; insertions one after the other where a list is new."""
    found, count = x.array("found"), x.n("count")
    rows, c = found.size / max(1, found.shape[-1]), found.shape[-1]
    insertions = min(c, count * (1 + math.log(max(1.0, c / count))))
    return x.work(bytes=found.nbytes + 2 * rows * count * (8 + x.itemsize), chain=insertions / 16)


def _moved(name: str) -> Callable[[_Launch], Work]:
    """Rows read and written once, and their indices."""

    def cost(x: _Launch) -> Work:
        return x.work(bytes=2 * x.array(name).nbytes + 8 * x.n("count"))

    return cost


def _farthest(x: _Launch) -> Work:
    """A block goes over the members of a node, a few at a time, and reduces what it has found."""
    m = x.array("distance").shape[1]
    return x.work(
        bytes=x._step.nbytes, chain=3 + m / math.prod(x._step.block) / _UNDER_WAY
    )  # fmt: skip


def _normal(x: _Launch) -> Work:
    out = x.array("out")
    return x.work(bytes=out.nbytes, flops=_DRAWN_FLOPS * out.size)


def _streamed(x: _Launch) -> Work:
    """Every operand once."""
    return x.work(bytes=x._step.nbytes)


def _finish_cholesky(x: _Launch) -> Work:
    return x.work(bytes=x.array("lower").nbytes / 2)


def _sparse_rows(x: _Launch) -> Work:
    """Entries once for 32 columns; rows of x where the columns say, from L2."""
    entries, k = x.array("values"), x.n("k")
    stored = entries.nbytes + x.array("columns").nbytes
    passes = math.ceil(k / 32)
    dense = x.array("x").nbytes
    return x.work(
        bytes=stored + dense + x.array("y").nbytes, flops=2 * entries.size * k,
        again=(passes - 1) * stored + entries.size * k * x.itemsize, footprint=dense,
    )  # fmt: skip


KERNELS: dict[str, Callable[[_Launch], Work]] = {
    "add_terms": _add_terms,
    "angle_distances": _streamed,
    "block_diagonal": _product("d"),
    "block_sparse_narrow": _product("blocks", reads=2),
    "block_sparse_wide": _block_sparse_wide,
    "column_dots": _streamed,
    "couple": _product("b", reads=2),
    "divide_cells": _divide_cells,
    "draw_chances": _draw_chances,
    "draw_systematic": _draw_systematic,
    "eliminate": _ulv_step,
    "examine_cells": _examine_cells,
    "farthest": _farthest,
    "finish_cholesky": _finish_cholesky,
    "gather_rows": _moved("out"),
    "gram_distances": _streamed,
    "hodlr_step": _hodlr_step,
    "householder_q": _householder_q,
    "householder_q_tall": _householder_q,
    "householder_qr": _householder_qr,
    "householder_qr_tall": _householder_qr,
    "inner_products": _inner_products,
    "interpolation": _interpolation,
    "interpolation_order": _interpolation_order,
    "join_segments": _streamed,
    "khatri_rao_entries": _khatri_rao,
    "merge_smallest": _merge_smallest,
    "merge_smallest_long": _merge_smallest,
    "normal": _normal,
    "pad_segments": _streamed,
    "pair_dots": _pair_dots,
    "paired": _streamed,
    "permute_rows": _moved("out"),
    "pivoted_cholesky_order": _pivoted_cholesky_order,
    "pivoted_cholesky_panel": _pivoted_cholesky_panel,
    "pivoted_cholesky_rows": _pivoted_cholesky_rows,
    "pivoted_qr": _pivoted_qr,
    "pivoted_qr_tall": _pivoted_qr,
    "point_entries_gaussian": _point_entries,
    "point_entries_laplace": _point_entries,
    "point_entries_matern32": _point_entries,
    "point_entries_matern52": _point_entries,
    "point_entries_rational_quadratic": _point_entries,
    "point_entries_spherical": _point_entries,
    "point_entries_squared_distance": _point_entries,
    "prolong_rows": _product("basis"),
    "quartered": _streamed,
    "restrict_rows": _product("basis"),
    "round_limits": _streamed,
    "round_seen": _round_seen,
    "round_tails": _round_tails,
    "sample_powers": _sample_powers,
    "scaled_panels": _scaled_panels,
    "scaled_samples": _streamed,
    "scatter_rows": _moved("blocks"),
    "solve_lower": _triangular,
    "solve_lower_transposed": _triangular,
    "sort_keys": _streamed,
    "sparse_rows_narrow": _sparse_rows,
    "sparse_rows_wide": _sparse_rows,
    "split_keys": _streamed,
    "squared_rows": _streamed,
    "substitute": _ulv_step,
    "sum_columns": _streamed,
    "unpermute_rows": _moved("out"),
}


def kernel_work(step: Step) -> Work:
    """Of a raw kernel's launch.

    Raises:
        UnknownKernelError: it has no cost model.
    """
    if step.name not in KERNELS:
        raise UnknownKernelError(
            f"kernel {step.name} has no cost model: add one to KERNELS in {__file__}"
        )
    return KERNELS[step.name](_Launch(step)).times(step.times)
