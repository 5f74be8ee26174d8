"""CuPy implementation of what is around the factorization of Gram matrices; gram_rounds.cu."""

from __future__ import annotations

import cupy
import numpy as np

from gpu_hodlr.batched.cuda import launch, launch_each, suffix
from gpu_hodlr.devices import Array

_MOST_THREADS = 1024


def scaled(samples: Array) -> tuple[Array, Array, Array]:
    """See `blocked_id.scaled`."""
    samples = cupy.ascontiguousarray(samples)
    nodes, length = len(samples), samples[0].size
    down, up = cupy.empty(nodes, np.float64), cupy.empty(nodes, np.float64)
    out = cupy.empty(samples.shape, np.float64)
    kind = suffix(samples.dtype)
    launch(
        "gram_rounds", f"sample_powers_{kind}", (nodes,), (_MOST_THREADS,),
        (samples, down, up, np.int64(length)), 512,
    )  # fmt: skip
    arguments = (samples, down, out, np.int64(length))
    launch_each("gram_rounds", f"scaled_samples_{kind}", out.size, arguments)
    return out, down, up


def limits(
    energy: Array, enough: Array, rounding: float, reach: float
) -> tuple[Array, Array, Array]:
    """See `blocked_id.limits`."""
    nodes = len(energy)
    unknown, stop = cupy.empty(nodes, np.float64), cupy.empty(nodes, np.float64)
    exact = cupy.empty(nodes, bool)
    bounds = np.float64(rounding), np.float64(reach)
    arguments = (energy, enough, unknown, stop, exact.view(np.uint8), *bounds)
    launch_each("gram_rounds", "round_limits_f64", nodes, arguments)
    return unknown, exact, stop


def left_and_tails(energy: Array, unknown: Array, squares: Array) -> tuple[Array, Array]:
    """See `blocked_id.left_and_tails`; a warp a node."""
    nodes, k = squares.shape
    left, tails = cupy.empty(nodes, np.float64), cupy.empty((nodes, k + 1), np.float64)
    launch(
        "gram_rounds", "round_tails_f64", (nodes,), (32,),
        (energy, unknown, cupy.ascontiguousarray(squares), left, tails, k),
    )  # fmt: skip
    return left, tails


def seen(exact: Array, ranks: Array, done: Array, most: int) -> Array:
    """See `blocked_id.seen`; a warp."""
    out = cupy.empty(3, np.int64)
    launch(
        "gram_rounds", "round_seen_f64", (1,), (32,),
        (exact.view(np.uint8), ranks, done, out, np.int64(most), np.int64(len(done))),
    )  # fmt: skip
    return out
