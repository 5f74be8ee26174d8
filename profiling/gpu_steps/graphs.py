"""Products and solves of every form as CUDA graphs: equal to what is not replayed, fast, frugal."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from typing import Any

import cupy
import numpy as np
from roofline import median_seconds

import gpu_hodlr as gh
from gpu_hodlr import batched
from gpu_hodlr.devices import Array, synchronize, to_host
from gpu_hodlr.errors import AccuracyWarning, GraphWarning, RankCapWarning
from gpu_steps.edges import within
from gpu_steps.report import Report, Skipped

N = {"full": 16_384, "small": 100}
LEAF = {"full": 128, "small": 25}
REPLAYS = {"full": 200, "small": 4}
REPEATS = {"full": 5, "small": 1}
ROUNDS = {"full": 5, "small": 1}  # over the four streams
COLUMNS = (1, 8, 64)
FORMS: dict[str, dict[str, Any]] = {
    "hss": {}, "fmm": {}, "hodlr": {}, "lowrank": {"max_rank": 128},
}  # fmt: skip
BUDGET = {"full": 0.03, "small": 0.5}
DAMPING = 1.0
# Between two runs of the same launches: cuBLAS may take another algorithm where it is captured.
SAME = 1e-12
SAME_BY_CG = 1e-6  # an FMM form is solved by CG, to a residual


def run(report: Report) -> None:
    points = np.random.default_rng(0).random((N[report.size], 2))
    for scheme, options in FORMS.items():
        if scheme == "fmm":
            options = {"budget": BUDGET[report.size]}
        with report.case("compress and factorize", scheme=scheme) as found:
            op = gh.KernelOperator(cupy.asarray(points), "laplace", 0.2, 0.1)
            K = _compressed(op, scheme, LEAF[report.size], options)
            F = K.factorize(DAMPING)
            found.update(error=K.report.error, stored_bytes=K.nbytes)
        if found:
            _form(report, scheme, K, F)
            with report.case("freed while running", scheme=scheme) as found:
                _freed_while_running(_compressed(op, scheme, LEAF[report.size], options), found)


def _compressed(op: Any, scheme: str, leaf: int, options: dict[str, Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RankCapWarning)
        warnings.simplefilter("ignore", AccuracyWarning)
        how = {"rtol": 1e-4, "leaf_size": leaf, **options}
        return gh.compress(op, scheme, **how)


def _form(report: Report, scheme: str, K: Any, F: Any) -> None:
    """All cases of one form."""
    by_cg = scheme == "fmm"
    for name, call in (("product", K.matmat), ("solve", F.solve)):
        same = SAME_BY_CG if by_cg and name == "solve" else SAME
        for k in COLUMNS:
            with report.case(f"{name} replayed", scheme=scheme, columns=k) as found:
                _replayed(call, _columns(K, k), same, REPEATS[report.size], found)
        with report.case(f"memory of {name}s", scheme=scheme) as found:
            _memory(call, _columns(K, 2), REPLAYS[report.size], found)
        with report.case(f"{name}s on four streams", scheme=scheme) as found:
            _streams(call, K, same, ROUNDS[report.size], found)
    with report.case("residual of the solve", scheme=scheme) as found:
        b = _columns(K, 8)
        x = F.solve(b)
        off = np.linalg.norm(to_host(K.matmat(x) + DAMPING * x - b)) / np.linalg.norm(to_host(b))
        within(found, "residual", off, 1e-5 if by_cg else 1e-10)
    with report.case("on torch's side stream", scheme=scheme) as found:
        _torch(K, found)


def _columns(K: Any, k: int, seed: int = 1) -> Array:
    return batched.normal_source((seed,), "cuda")((K.shape[0], k), K.dtype)


def _distance(got: Array, want: Array) -> float:
    got, want = to_host(got), to_host(want)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def _replayed(
    call: Callable[[Array], Array], b: Array, same: float, repeats: int, found: dict[str, Any]
) -> None:
    """The first call runs as it is, the next ones replay its graph, with other numbers too.

    A warning that no graph could be made fails.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", GraphWarning)
        eager = call(b)
        again = call(b)
        call(-2 * b)
        last = call(b)
        found["same_bits"] = bool(np.array_equal(to_host(eager), to_host(again)))
        within(found, "first_replay", _distance(again, eager), same)
        within(found, "later_replay", _distance(last, eager), same)
        found["microseconds"] = 1e6 * median_seconds(lambda: call(b), "cuda", repeats)


def _memory(call: Callable[[Array], Array], b: Array, replays: int, found: dict[str, Any]) -> None:
    """Neither CuPy's pool nor the driver's memory grows over many replays."""
    for _ in range(3):
        call(b)
    synchronize("cuda")
    gc.collect()
    pool, free = cupy.get_default_memory_pool(), cupy.cuda.runtime.memGetInfo()[0]
    before = pool.used_bytes(), pool.total_bytes()
    for _ in range(replays):
        call(b)
    synchronize("cuda")
    found["replays"] = replays
    within(found, "used_bytes", pool.used_bytes() - before[0], 0)
    within(found, "pool_bytes", pool.total_bytes() - before[1], 0)
    within(found, "driver_bytes", free - cupy.cuda.runtime.memGetInfo()[0], 4 << 20)


def _streams(
    call: Callable[[Array], Array], K: Any, same: float, rounds: int, found: dict[str, Any]
) -> None:
    """Four streams in turn, without a wait between them."""
    vectors = [_columns(K, 1, seed) for seed in range(4)]
    want = [call(v) for v in vectors]
    streams = [cupy.cuda.Stream(non_blocking=True) for _ in vectors]
    cupy.cuda.Device().synchronize()
    results: list[tuple[int, Array]] = []
    for _ in range(rounds):
        for i, (stream, v) in enumerate(zip(streams, vectors, strict=True)):
            with stream:
                results.append((i, call(v)))
    cupy.cuda.Device().synchronize()
    within(found, "off", max(_distance(got, want[i]) for i, got in results), same)


def _torch(K: Any, found: dict[str, Any]) -> None:
    """A tensor made on a stream of torch's, and used there, without a wait."""
    try:
        import torch
    except ImportError:
        raise Skipped("torch is not installed") from None
    if not torch.cuda.is_available():
        raise Skipped("this torch has no CUDA")
    v = torch.randn(K.shape[0], 4, dtype=torch.float64, device="cuda")
    want = K @ v
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    offs = []
    for _ in range(3):
        with torch.cuda.stream(side):
            doubled = v.clone()
            for _ in range(20):  # enough that a product which did not wait would come too early
                doubled = doubled * 1.0
            offs.append((K @ (2 * doubled) - 2 * want).norm() / want.norm())
        torch.cuda.synchronize()
    within(found, "off", max(float(off) for off in offs), SAME)


def _freed_while_running(K: Any, found: dict[str, Any]) -> None:
    """The matrix and its graph go while replays are at work; their memory is written over."""
    b = _columns(K, 64)
    K.matmat(b)
    want = K.matmat(b)
    size = K.nbytes
    synchronize("cuda")
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        results = [K.matmat(b) for _ in range(20)]
    del K
    gc.collect()
    rubbish = cupy.full(size // 8, np.nan)
    cupy.cuda.Device().synchronize()
    del rubbish
    within(found, "off", max(_distance(got, want) for got in results), SAME)
