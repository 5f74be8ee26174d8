"""How kernels of factors and decompositions are launched; see `launches`."""

from __future__ import annotations

import numpy as np
from host_cuda.launches import NDArray, _poisoned, _suffix, _width
from host_cuda.runner import HostKernels

from gpu_hodlr.batched import PivotedQR


def pivoted_qr(
    kernels: HostKernels,
    samples: NDArray,
    *,
    threshold: float = -1.0,
    max_rank: int = 1 << 30,
    threads: int = 96,
    tall: bool = False,
    **schedule: int,
) -> tuple[NDArray, NDArray, NDArray, NDArray]:
    """Pivots, R, tails and ranks; `tall`: worked on in global memory."""
    nodes, m, s = samples.shape
    steps, dtype = min(m, s), samples.dtype
    pivots = _poisoned((nodes, m), np.int64)
    r = _poisoned((nodes, steps, m), dtype)
    tails = _poisoned((nodes, steps + 1), np.float64)
    ranks = _poisoned((nodes,), np.int32)
    shared = 8 * (steps + 33) + dtype.itemsize * (2 * m + steps) + 4 * m
    work_bytes = -(-shared // 16) * 16
    work = (_poisoned((nodes, work_bytes), np.uint8), work_bytes) if tall else ()
    kernels.launch(
        f"pivoted_qr_{'tall_' if tall else ''}{_suffix(dtype)}", (nodes,), (threads,),
        (samples.copy(), pivots, r, tails, ranks, *work, m, s, max_rank, threshold),
        shared_bytes=0 if tall else shared, **schedule,
    )  # fmt: skip
    return pivots, r, tails, ranks


def pivoted_cholesky(
    kernels: HostKernels,
    gram: NDArray,
    stop: NDArray,
    most: int,
    steps: int,
    *,
    threads: int = 96,
    **schedule: int,
) -> tuple[NDArray, NDArray, NDArray]:
    """See `blocked_id.pivoted_cholesky`; the products between the panels are NumPy's."""
    nodes, m, _ = gram.shape
    gram, rows = gram.copy(), np.zeros((nodes, steps, m))
    squares = np.diagonal(gram, axis1=1, axis2=2).copy()
    chosen, ranks = _poisoned((nodes, steps), np.int32), np.zeros(nodes, np.int32)
    for first in range(0, most, 32):
        kernels.launch(
            "pivoted_cholesky_panel_f64", (nodes,), (threads,),
            (gram, rows, squares, chosen, ranks, stop, m, steps, first, min(32, most - first)),
            shared_bytes=1280, **schedule,
        )  # fmt: skip
        panel = rows[:, first : first + 32]
        gram -= panel.swapaxes(1, 2) @ panel
    pivots, r = _poisoned((nodes, m), np.int64), _poisoned((nodes, steps, m), np.float64)
    kernels.launch(
        "pivoted_cholesky_order_f64", (nodes,), (32,),
        (squares, chosen, ranks, pivots, m, steps), **schedule,
    )  # fmt: skip
    kernels.launch(
        "pivoted_cholesky_rows_f64", (nodes * -(-steps // 8),), (32, 8),
        (rows, pivots, ranks, r, m, steps), **schedule,
    )  # fmt: skip
    return pivots, r, ranks


def solve_lower(
    kernels: HostKernels,
    lower: NDArray,
    b: NDArray,
    *,
    transpose: bool = False,
    index: NDArray | None = None,
    threads: int = 96,
    **schedule: int,
) -> NDArray:
    """See `batched.solve_triangular`; with an index b, or x if transposed, has the rows of both."""
    (nodes, m, _), k = lower.shape, b.shape[-1]
    n = b.shape[:-1] if index is None else (nodes * m,) if transpose else (nodes, m)
    x, width = _poisoned((*n, k), b.dtype), _width(k)
    name = "solve_lower_transposed" if transpose else "solve_lower"
    kernels.launch(
        f"{name}_{_suffix(b.dtype)}_{width}", (nodes,), (threads,), (lower, b, index, x, m, k),
        shared_bytes=b.dtype.itemsize * (4224 + 32 * width * -(-m // 32)), **schedule,
    )  # fmt: skip
    return x


def ulv_step(
    kernels: HostKernels,
    name: str,
    arrays: tuple[NDArray, ...],
    index: NDArray,
    vectors: tuple[NDArray, ...],
    out: tuple[NDArray, ...],
    step: int,
    *,
    threads: int = 96,
    **schedule: int,
) -> tuple[NDArray, ...]:
    """`level_solves.eliminate` or `substitute` of (T, L, W) and x or (y, w), written to `out`."""
    (nodes, rest, r), k = arrays[0].shape, vectors[-1].shape[-1]
    itemsize, width, out = out[0].dtype.itemsize, _width(k), tuple(x.copy() for x in out)
    kernels.launch(
        f"{name}_{_suffix(out[0].dtype)}_{width}", (nodes,), (threads,),
        (*arrays, *vectors, index, *out, rest + r, r, k, step),
        shared_bytes=itemsize * (4224 + 32 * width * (-(-r // 32) + -(-rest // 32))), **schedule,
    )  # fmt: skip
    return out


def hodlr_step(
    kernels: HostKernels,
    applied: tuple[NDArray, ...] | None,
    sums: tuple[NDArray | None, ...],
    following: tuple[NDArray, ...] | None,
    x: NDArray,
    *,
    chunk: int,
    transpose: bool = False,
    threads: int = 96,
    **schedule: int,
) -> tuple[NDArray, ...]:
    """X and the sums of the next level, of levels (Q, P, Y) and sums (pairs, parts, r, k).

    Args:
        transpose: whether the next level's is W^-T, which needs the even nodes' sums alone.
    """
    x, k = x.copy(), x.shape[1]
    levels = [level for level in (applied, following) if level is not None]
    nodes = max(2 * len(level[0]) for level in levels)
    rows = len(x) // nodes
    chunks = -(-rows // chunk)
    shifts, ranks = [0, 0], [0, 0]
    for i, level in enumerate((applied, following)):
        if level is not None:
            shifts[i] = (nodes // (2 * len(level[0]))).bit_length() - 1
            ranks[i] = level[0].shape[2]
    left: list[NDArray | None] = [None, None]
    if following is not None:
        shape = (len(following[0]), chunks << shifts[1], ranks[1], k)
        left = [_poisoned(shape, x.dtype), None if transpose else _poisoned(shape, x.dtype)]
    parts = 1 if sums[0] is None else sums[0].shape[1]
    tiles = 2 * -(-ranks[0] // 32) + -(-ranks[1] // 32) + -(-min(chunk, 2048 // _width(k)) // 32)
    kernels.launch(
        f"hodlr_step_{_suffix(x.dtype)}_{_width(k)}", (nodes * chunks,), (threads,),
        (*(applied or (None,) * 3), *sums, *(following or (None,) * 3)[:2], *left, x, rows, chunk,
         *shifts, ranks[0], parts, ranks[1], k),
        shared_bytes=x.itemsize * (4224 + 32 * _width(k) * tiles), **schedule,
    )  # fmt: skip
    return (x, *(part for part in left if part is not None))


def householder_qr(
    kernels: HostKernels,
    a: NDArray,
    *,
    sharers: int = 2,
    groups: int = 2,
    tall: bool = False,
    **schedule: int,
) -> tuple[NDArray, NDArray]:
    """See `batched.full_qr`; `tall`: the panels lie in global memory."""
    nodes, m, k = a.shape
    suffix, itemsize = _suffix(a.dtype), a.dtype.itemsize
    group = 16 // itemsize  # rows
    panel = 9 * group * -(-m // group)
    shared = itemsize * (336 + 8 * 32 * sharers * groups + (0 if tall else panel))
    reflectors, panels = a.copy(), -(-k // 8)
    q, r = _poisoned((nodes, m, m), a.dtype), _poisoned((nodes, k, k), a.dtype)
    factors = _poisoned((nodes, panels, 8, 8), a.dtype)
    outside = (_poisoned((nodes, panels, panel), a.dtype),) if tall else ()
    tall_, block = "tall_" if tall else "", (32, sharers, groups)
    kernels.launch(
        f"householder_qr_{tall_}{suffix}", (nodes,), block,
        (reflectors, *outside, r, factors, m, k), shared_bytes=shared, **schedule,
    )  # fmt: skip
    kernels.launch(
        f"householder_q_{tall_}{suffix}", (nodes, -(-m // (32 * groups))), block,
        (*(outside or (reflectors,)), factors, q, m, k), shared_bytes=shared, **schedule,
    )  # fmt: skip
    return q, r


def finish_cholesky(
    kernels: HostKernels, a: NDArray, found: NDArray, piece: int, *, threads: int = 64,
    **schedule: int,
) -> tuple[NDArray, NDArray]:  # fmt: skip
    """Lower triangles and info, as `batched.cholesky` gives them; `found` (pieces, nodes)."""
    (nodes, n, _), lower, info = a.shape, a.copy(), _poisoned((len(a),), np.int32)
    kernels.launch(
        f"finish_cholesky_{_suffix(a.dtype)}", (nodes * -(-n // 32),), (threads,),
        (lower, found, info, n, piece), **schedule,
    )  # fmt: skip
    return lower, info


def interpolation(
    kernels: HostKernels,
    qr: PivotedQR,
    noise: NDArray,
    rank: int,
    padding: NDArray,
    *,
    warps: int = 8,
    **schedule: int,
) -> tuple[NDArray, NDArray, NDArray]:
    """Order, T and ranks; see `batched.interpolation`."""
    (nodes, k, m), dtype = qr.r.shape, qr.r.dtype
    order, ranks = _poisoned((nodes, m), np.int64), _poisoned((nodes,), np.int64)
    place, basis = _poisoned((nodes, m), np.int32), _poisoned((nodes, m - rank, rank), dtype)
    kernels.launch(
        f"interpolation_order_{_suffix(dtype)}", (nodes,), (32 * warps,),
        (qr.pivots, qr.r, qr.tails, noise, padding.view(np.uint8), order, place, ranks, m, k, rank),
        shared_bytes=4 * warps, **schedule,
    )  # fmt: skip
    if basis.size:
        kernels.launch(
            f"interpolation_{_suffix(dtype)}", (nodes * -(-(m - rank) // 32),), (32, warps),
            (qr.r, place, ranks, basis, _poisoned(basis.shape, dtype), m, k, rank),
            shared_bytes=2112 * dtype.itemsize, **schedule,
        )  # fmt: skip
    return order, basis, ranks


def quartered(
    kernels: HostKernels, blocks: NDArray, r: int, order: NDArray | None, added: NDArray | None,
    **schedule: int,
) -> tuple[NDArray, ...]:  # fmt: skip
    """See `quarters.quartered`."""
    nodes, m, _ = blocks.shape
    shapes = (r, r), (m - r, r), (r, m - r), (m - r, m - r)
    parts = tuple(_poisoned((nodes, *shape), blocks.dtype) for shape in shapes)
    kernels.launch(
        f"quartered_{_suffix(blocks.dtype)}", (-(-blocks.size // 64),), (64,),
        (blocks, order, added, *parts, m, r, blocks.size), **schedule,
    )  # fmt: skip
    return parts


def paired(kernels: HostKernels, d: NDArray, b: NDArray, **schedule: int) -> NDArray:
    """See `quarters.paired`."""
    pairs, r, _ = b.shape
    out = _poisoned((pairs, 2 * r, 2 * r), d.dtype)
    kernels.launch(
        f"paired_{_suffix(d.dtype)}", (-(-out.size // 64),), (64,), (d, b, out, r, out.size),
        **schedule,
    )  # fmt: skip
    return out


def sample_powers(
    kernels: HostKernels, samples: NDArray, *, threads: int = 96, **schedule: int
) -> tuple[NDArray, NDArray]:
    """The powers that `blocked_id.scaled` multiplies by, and their inverses."""
    down, up = (_poisoned((len(samples),), np.float64) for _ in range(2))
    kernels.launch(
        f"sample_powers_{_suffix(samples.dtype)}", (len(samples),), (threads,),
        (samples, down, up, samples[0].size), shared_bytes=512, **schedule,
    )  # fmt: skip
    return down, up


def scaled_samples(
    kernels: HostKernels, samples: NDArray, down: NDArray, **schedule: int
) -> NDArray:
    """Samples in double, times the powers."""
    out = _poisoned(samples.shape, np.float64)
    kernels.launch(
        f"scaled_samples_{_suffix(samples.dtype)}", (-(-samples.size // 64),), (64,),
        (samples, down, out, samples[0].size, samples.size), **schedule,
    )  # fmt: skip
    return out


def round_limits(
    kernels: HostKernels, energy: NDArray, enough: NDArray, rounding: float, reach: float,
    **schedule: int,
) -> tuple[NDArray, NDArray, NDArray]:  # fmt: skip
    """See `blocked_id.limits`."""
    unknown, stop = (_poisoned(energy.shape, np.float64) for _ in range(2))
    exact = _poisoned(energy.shape, np.uint8)
    kernels.launch(
        "round_limits_f64", (-(-len(energy) // 64),), (64,),
        (energy, enough, unknown, stop, exact, rounding, reach, len(energy)), **schedule,
    )  # fmt: skip
    return unknown, exact.astype(bool), stop


def round_tails(
    kernels: HostKernels, energy: NDArray, unknown: NDArray, squares: NDArray, **schedule: int
) -> tuple[NDArray, NDArray]:
    """See `blocked_id.left_and_tails`."""
    nodes, k = squares.shape
    left, tails = _poisoned((nodes,), np.float64), _poisoned((nodes, k + 1), np.float64)
    kernels.launch(
        "round_tails_f64", (nodes,), (32,), (energy, unknown, squares, left, tails, k), **schedule
    )
    return left, tails


def round_seen(
    kernels: HostKernels, exact: NDArray, ranks: NDArray, done: NDArray, most: int, **schedule: int
) -> tuple[NDArray, NDArray]:
    """See `blocked_id.seen`; and `done` afterwards."""
    done, out = done.copy(), _poisoned((3,), np.int64)
    kernels.launch(
        "round_seen_f64", (1,), (32,),
        (exact.view(np.uint8), ranks, done, out, most, len(done)), **schedule,
    )  # fmt: skip
    return out, done
