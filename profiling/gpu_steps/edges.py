"""Limits of shapes and numbers, each against NumPy in float64 on the host or against itself.

What is asked for is the contract of gpu_hodlr/batched/__init__.py. What does not fit into the
memory is skipped with a reason.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cupy
import numpy as np

from gpu_hodlr import batched
from gpu_hodlr.batched import tall
from gpu_hodlr.devices import Array, free_bytes, to_host
from gpu_steps.kernel_calls import Inputs
from gpu_steps.report import Report, Skipped

BOTH = (np.float64, np.float32)
MANY = {"full": 70_000, "small": 70}  # nodes: CUDA's grids end at 65,535 in two directions
ROWS = {"full": (60_000, 1 << 20), "small": (150,)}  # of a sample: half of enco's, the most
LISTS = {"full": 4000, "small": 40}  # entries: of float64 more than 48 KB
TALL = {"full": (2000, 5000, 12_500), "small": (30, 70)}  # rows, full QR
TRIANGLES = {"full": (300, 3000), "small": (40,)}
PIVOTED = {
    "full": ((4000, 300), (30_000, 64), (9800, 2450), (3000, 2900)),
    "small": ((60, 20), (90, 8), (30, 26), (260, 270)),
}  # fmt: skip
HUGE = {"full": 2**31 + 2**20, "small": 2**12 + 2**6}  # elements
_ROUNDING = 10  # times the square root of a length times rounding: what a sum may be off


def run(report: Report) -> None:
    for dtype in BOTH:
        _wide_shared_memory(report, dtype)
        _many_nodes(report, dtype)
        _numbers(report, dtype)
    for name, edge in (("gather and permute", _huge_rows), ("product", _huge_product),
                       ("normal numbers", _huge_normal)):  # fmt: skip
        with report.case(f"more than 2^31 elements: {name}", elements=HUGE[report.size]) as found:
            edge(HUGE[report.size], found)
        cupy.get_default_memory_pool().free_all_blocks()


# ---- How far off ----------------------------------------------------------------------------


def within(found: dict[str, Any], name: str, error: float, allowed: float) -> None:
    """Note an error; it must not exceed what is allowed, nor be NaN."""
    found[name], found[f"{name}_allowed"] = float(error), float(allowed)
    if not error <= allowed:
        raise AssertionError(f"{name}: {error:.3g}, allowed {allowed:.3g}")


def rounding(dtype: Any, length: int) -> float:
    """What a sum of so many products may be off, relative to the norms of its factors."""
    return _ROUNDING * float(np.finfo(dtype).eps) * max(length, 1) ** 0.5


def _relative(difference: Any, scale: Any) -> float:
    return float(np.linalg.norm(difference) / np.linalg.norm(scale))


def _exact(x: Array) -> np.ndarray[Any, Any]:
    return to_host(x).astype(np.float64)


def need(elements: float, itemsize: int) -> None:
    """Skip a case for which the memory is too small."""
    needed = elements * itemsize
    if needed > 0.8 * free_bytes("cuda"):
        raise Skipped(f"needs {needed / 1e9:.3g} GB on the GPU")


# ---- More shared memory than a kernel has without asking ------------------------------------


def _wide_shared_memory(report: Report, dtype: Any) -> None:
    about = {"dtype": np.dtype(dtype).name}
    for m, s in PIVOTED[report.size]:
        with report.case("pivoted QR", m=m, s=s, **about) as found:
            _pivoted(batched.pivoted_qr, m, s, dtype, found)
    for m in ROWS[report.size]:
        with report.case("pivoted QR of very many rows", m=m, s=40, **about) as found:
            _pivoted(tall.pivoted_qr, m, 40, dtype, found)
        with report.case("interpolation", m=m, rank=32, **about) as found:
            _interpolation(m, dtype, found)
    with report.case("merge of long lists", count=LISTS[report.size], **about):
        _long_lists(LISTS[report.size], dtype)
    for m in TALL[report.size]:
        with report.case("full QR", m=m, **about) as found:
            _full_qr(m, 24, dtype, found)
    for m in TRIANGLES[report.size]:
        for k in (1, 8, 9):
            with report.case("triangular solves", m=m, columns=k, **about) as found:
                _triangular(2, m, k, dtype, found)
        with report.case("Cholesky", m=m, **about) as found:
            _cholesky(2, m, dtype, found)


def _pivoted(
    factorize: Callable[[Array], Any], m: int, s: int, dtype: Any, found: dict[str, Any]
) -> None:
    """R^T R is the Gram matrix of the rows in pivot order, tails are R's rest and what it leaves.

    That is no more than the rounding of the samples.
    """
    S = Inputs(dtype).normal(2, m, s)
    S *= cupy.asarray(0.9 ** np.arange(s), dtype)  # graded: tails fall
    qr = factorize(S)
    exact, pivots, r, tails = _exact(S), to_host(qr.pivots), _exact(qr.r), to_host(qr.tails)
    v = np.random.default_rng(0).standard_normal((m, 3))
    for t in range(2):
        if not np.array_equal(np.sort(pivots[t]), np.arange(m)):
            raise AssertionError("pivots are no permutation")
        rows = exact[t][pivots[t]]
        want = rows @ (rows.T @ v)
        within(found, "gram", _relative(r[t].T @ (r[t] @ v) - want, want), rounding(dtype, s + m))
        rest = np.cumsum(np.sum(r[t] ** 2, axis=1)[::-1])[::-1]
        well = rest > 1e3 * m * np.finfo(dtype).eps ** 2 * rest[0]
        left = tails[t][-1] / float(batched.squared_rounding(rest[0], np.dtype(dtype)))
        within(found, "left", left, 1.0)
        off = np.abs(tails[t][:-1] - tails[t][-1] - rest)[well] / rest[well]
        within(found, "tails", off.max(), 30 * m**0.5 * np.finfo(dtype).eps)


def _interpolation(m: int, dtype: Any, found: dict[str, Any], rank: int = 32) -> None:
    """S[order] = [I; T] S[order[:rank]] for samples of that rank, padding last."""
    inputs = Inputs(dtype)
    S = batched.matmul(inputs.normal(2, m, rank), inputs.normal(2, rank, rank + 8))
    S[:, -3:] = 0
    padding = cupy.zeros((2, m), bool)
    padding[:, -3:] = True
    qr = tall.pivoted_qr(S)
    order, T, ranks = batched.interpolation(qr, rank, padding)
    order, T, S = to_host(order), _exact(T), _exact(S)
    found["ranks"] = to_host(ranks)
    for t in range(2):
        if not np.array_equal(np.sort(order[t, -3:]), np.arange(m - 3, m)):
            raise AssertionError("padding does not come last")
        rows = S[t][order[t]]
        growth = float(np.abs(T[t]).max())
        allowed = rounding(dtype, m) * max(1.0, growth)
        within(found, "rows", _relative(T[t] @ rows[:rank] - rows[rank:], rows), allowed)


def _full_qr(m: int, k: int, dtype: Any, found: dict[str, Any]) -> None:
    """Q has orthonormal columns (of random products) and Q [R; 0] is the matrix."""
    need(3.0 * m * m, np.dtype(dtype).itemsize)
    A = Inputs(dtype).normal(1, m, k)
    q, r = batched.full_qr(A)
    v = Inputs(dtype).normal(1, m, 2)
    back = batched.matmul(q, batched.matmul(q, v), transpose_a=True)
    within(found, "orthogonal", _relative(_exact(back - v), _exact(v)), rounding(dtype, m))
    first = _exact(q[:, :, :k])
    within(found, "rebuilt", _relative(first @ _exact(r) - _exact(A), _exact(A)),
           rounding(dtype, m))  # fmt: skip


def _triangular(nodes: int, m: int, k: int, dtype: Any, found: dict[str, Any]) -> None:
    """Residuals of L x = b and L^T x = b; L also as a transposed view."""
    inputs = Inputs(dtype)
    L, b = inputs.lower(nodes, m), inputs.normal(nodes, m, k)
    turned = cupy.ascontiguousarray(L.swapaxes(1, 2)).swapaxes(1, 2)
    for form, lower in (("", L), ("_view", turned)):
        for transpose in (False, True):
            x = batched.solve_triangular(lower, b, transpose=transpose)
            product = batched.matmul(L, x, transpose_a=transpose)
            name = f"residual{form}" + "_transposed" * transpose
            within(found, name, _relative(_exact(product - b), _exact(b)), rounding(dtype, m))


def _cholesky(nodes: int, m: int, dtype: Any, found: dict[str, Any]) -> None:
    K = Inputs(dtype).spd(nodes, m)
    lower, info = batched.cholesky(K)
    if to_host(info).any():
        raise AssertionError(f"info {to_host(info)[:10]}")
    rebuilt = batched.matmul(lower, lower, transpose_b=True)
    within(found, "rebuilt", _relative(_exact(rebuilt - K), _exact(K)), rounding(dtype, m))


def _long_lists(count: int, dtype: Any) -> None:
    """The smallest of all values found for a row, its own index left out."""
    n, c = 6, count + 30
    found = cupy.abs(Inputs(dtype).normal(1, n, c))
    values, index = cupy.full((n, count), np.inf, dtype), cupy.full((n, count), -1, np.int64)
    rows, candidates = cupy.arange(n)[None], cupy.arange(c)[None]
    want = to_host(found)[0].copy()
    batched.merge_smallest(values, index, rows, found, candidates)
    want[np.arange(n), np.arange(n)] = np.inf
    order = np.argsort(want, axis=1, kind="stable")[:, :count]
    if not np.array_equal(to_host(values), np.take_along_axis(want, order, axis=1)):
        raise AssertionError("values")
    if not np.array_equal(to_host(index), order):
        raise AssertionError("indices")


# ---- More nodes than a grid has blocks in two of its directions -----------------------------


def _many_nodes(report: Report, dtype: Any) -> None:
    nodes, about = MANY[report.size], {"dtype": np.dtype(dtype).name}
    inputs = Inputs(dtype)
    for k in (1, 5):
        with report.case("many products", nodes=nodes, columns=k, **about) as found:
            a, b = inputs.normal(nodes, 6, 4), inputs.normal(nodes, 4, k)
            want = _exact(a) @ _exact(b)
            off = _exact(batched.matmul(a, b)) - want
            within(found, "product", np.abs(off).max(), rounding(dtype, 4) * np.abs(want).max())
    for k in (2, 9):
        with report.case("many triangular solves", nodes=nodes, columns=k, **about) as found:
            _triangular(nodes, 5, k, dtype, found)
    with report.case("many Cholesky factors", nodes=nodes, **about) as found:
        _cholesky(nodes, 5, dtype, found)
    with report.case("many QR factors", nodes=nodes, **about) as found:
        a = inputs.normal(nodes, 6, 3)
        q, r = batched.full_qr(a)
        within(found, "rebuilt", _relative(_exact(q[:, :, :3]) @ _exact(r) - _exact(a), _exact(a)),
               rounding(dtype, 6))  # fmt: skip
    with report.case("many interpolations", nodes=nodes, **about) as found:
        S = batched.matmul(inputs.normal(nodes, 8, 3), inputs.normal(nodes, 3, 5))
        qr = batched.pivoted_qr(S)
        order, T, _ = batched.interpolation(qr, 3, cupy.zeros((nodes, 8), bool))
        rows = _exact(batched.permute_rows(S, order))
        within(found, "rows", _relative(_exact(T) @ rows[:, :3] - rows[:, 3:], rows),
               100 * rounding(dtype, 8))  # fmt: skip


# ---- Numbers --------------------------------------------------------------------------------


def _numbers(report: Report, dtype: Any) -> None:
    about = {"dtype": np.dtype(dtype).name}
    for m in (6, 200):
        with report.case("Cholesky of NaN and of an indefinite block", m=m, **about) as found:
            K = Inputs(dtype).spd(5, m)
            K[1, 0, 0] = K[2, m - 1, m - 1] = np.nan
            K[3, m // 2, m // 2] = -1
            info = to_host(batched.cholesky(K)[1])
            found["info"] = info
            if not (info[[1, 2, 3]] > 0).all() or info[[0, 4]].any():
                raise AssertionError(f"info {info}: blocks 1, 2, 3 fail, 0 and 4 do not")
    tiny = np.finfo(dtype).smallest_subnormal
    with report.case("subnormal numbers are moved to the bit", **about):
        x = cupy.asarray(tiny * np.arange(1, 13, dtype=dtype).reshape(4, 3))
        index = cupy.asarray([[3, 1], [0, 2]])
        got = to_host(batched.gather_rows(x, index))
        if not np.array_equal(got, to_host(x)[[[3, 1], [0, 2]]]):
            raise AssertionError(f"{got}")
    with report.case("subnormal products", **about) as found:
        a, b = Inputs(dtype).normal(2, 5, 4), Inputs(dtype).normal(2, 4, 3)
        small = np.finfo(dtype).tiny
        got = _exact(batched.matmul(a * dtype(small), b) / dtype(small))
        want = _exact(a) @ _exact(b)
        allowed = rounding(dtype, 4) * np.abs(want).max() + 8 * float(tiny) / float(small)
        within(found, "product", np.abs(got - want).max(), allowed)
    # Squares of these are subnormal, or nothing, in the type itself.
    scale = dtype(2.0) ** (np.finfo(dtype).minexp // 2 - 4)
    with report.case("factors of tiny numbers", scale=float(scale), **about) as found:
        A = Inputs(dtype).normal(1, 40, 6)
        for name, factor in (("full QR", _full_parts), ("pivoted QR", _pivoted_part)):
            want, got = factor(A), factor(A * scale) / float(scale)
            within(found, name, _relative(got - want, want), rounding(dtype, 40))


def _full_parts(A: Array) -> np.ndarray[Any, Any]:
    """What grows with A: R up to the signs of its rows."""
    return np.abs(_exact(batched.full_qr(A)[1]))


def _pivoted_part(A: Array) -> np.ndarray[Any, Any]:
    return np.abs(_exact(batched.pivoted_qr(A).r))


# ---- More elements than an int counts -------------------------------------------------------


def _numbered(n: int, k: int, dtype: Any = np.float32) -> Array:
    """(n, k) with the row's number, below 2^24, in every column."""
    x = cupy.empty((n, k), dtype)
    x[:] = cupy.arange(n, dtype=dtype)[:, None]
    return x


def _huge_rows(elements: int, found: dict[str, Any]) -> None:
    """Rows in the opposite order: each and what stands there now add up to the last number."""
    k = 256
    n = elements // k
    need(6.0 * n * k, 4)
    x = _numbered(n, k)
    order = cupy.arange(n, dtype=np.int64)[::-1].copy().reshape(1, n)
    for name, move in (
        ("gather", lambda: batched.gather_rows(x, order)[0]),
        ("permute", lambda: batched.permute_rows(x[None], order)[0]),
        ("unpermute", lambda: batched.unpermute_rows(x[None], order)[0]),
        ("scatter", lambda: batched.scatter_rows(x[None], order, n)),
    ):
        wrong = cupy.abs(move() + x - np.float32(n - 1)).max()
        within(found, name, float(wrong), 0.0)


def _huge_product(elements: int, found: dict[str, Any]) -> None:
    """Entries of a stack of products whose result has so many elements."""
    m = 64
    nodes = elements // m**2
    need(1.3 * elements, 4)
    inputs = Inputs(np.float32)
    a, b = inputs.normal(nodes, m, 2), inputs.normal(nodes, 2, m)
    c = batched.matmul(a, b)
    for t in (0, nodes // 2, nodes - 1):
        want = _exact(a[t]) @ _exact(b[t])
        off = np.abs(_exact(c[t]) - want).max()
        within(found, f"node_{t}", off, rounding(np.float32, 2) * np.abs(want).max())


def _huge_normal(elements: int, found: dict[str, Any]) -> None:
    """Columns of a random block are the same as drawn alone, the last one too."""
    k = 64
    n = elements // k
    need(1.2 * n * k, 4)
    block = batched.normal_source((9,), "cuda")((n, k), np.float32)
    alone = batched.normal_source((9,), "cuda")
    last = alone((n, k), np.float32, slice(k - 1, k))
    within(found, "last_column", float(cupy.abs(block[:, k - 1 :] - last).max()), 0.0)
    within(found, "mean", abs(float(last.mean())), 6 / n**0.5)
