"""Branches of captured products and solves, and the longest path that they leave.

On the host stand-in for CuPy (not a GPU run), which counts a graph's dependencies and replays it by
turns in two orders that they allow.
"""

from typing import Any

import numpy as np
import pytest
from host_cupy import HostCupy
from host_cupy.state import (
    CAPTURED_EVENT,
    IMPLICIT,
    ISOLATION,
    MERGE,
    UNJOINED,
    UNMATCHED,
    Captured,
    CUDARuntimeError,
)
from matrix_cases import toeplitz
from scripts import script

import gpu_hodlr as gh
from gpu_hodlr import batched
from gpu_hodlr.batched.branches import branch
from gpu_hodlr.batched.level_products import NARROW
from gpu_hodlr.batched.replay import Replay
from gpu_hodlr.devices import to_host
from gpu_hodlr.errors import GraphWarning

launches = script("launches")


def forked(cupy: Any, join: bool = True) -> Any:
    """A function of two chains, of two launches and of one, and a launch of both."""

    def function(x: Any) -> Any:
        aside = branch(x)
        y = x + 1.0
        with aside:
            z = x * 2.0
            z *= 3.0
        y *= 5.0
        if join:
            aside.join()
        return y + z

    return function


def columns(cupy: Any, n: int, k: int, seed: int = 0) -> Any:
    return cupy.asarray(np.random.default_rng(seed).standard_normal((n, k)))


# --- branches --------------------------------------------------------------------------------


def test_branches_give_the_same_on_every_library(xp: Any):
    x = xp.asarray(np.arange(6.0).reshape(3, 2))
    want = 5.0 * (np.arange(6.0).reshape(3, 2) + 1.0) + 6.0 * np.arange(6.0).reshape(3, 2)
    replay = Replay()
    for _ in range(3):
        np.testing.assert_array_equal(to_host(replay(forked(xp), x)), want)


def test_branches_stand_side_by_side_in_a_graph(stand_in: HostCupy):
    """x + 1, times 5, beside x times 2, times 3: of five launches three wait for each other."""
    replay, function = Replay(), forked(stand_in.cupy)
    replay(function, columns(stand_in.cupy, 4, 1))
    # The branch begins when the first launch of the rest has been asked for, and waits for it.
    assert stand_in.captured == [Captured(nodes=5, depth=4)]
    for seed in range(4):  # in both orders
        x = columns(stand_in.cupy, 4, 1, seed)
        np.testing.assert_array_equal(
            to_host(replay(function, x)), to_host(5.0 * (x + 1.0) + 6.0 * x)
        )


def test_a_branch_that_is_not_joined_makes_no_graph(stand_in: HostCupy):
    replay, x = Replay(), columns(stand_in.cupy, 4, 1)
    with pytest.warns(GraphWarning, match="cudaErrorStreamCaptureUnjoined"):
        replay(forked(stand_in.cupy, join=False), x)
    want = to_host(5.0 * (x + 1.0) + 6.0 * x)
    np.testing.assert_array_equal(to_host(replay(forked(stand_in.cupy, join=False), x)), want)


def test_a_result_used_before_the_join_comes_out_wrong(stand_in: HostCupy):
    """The stand-in's other order: what was asked for last goes first."""
    wrong = []

    def early(x: Any) -> Any:
        aside = branch(x)
        y = x + 1.0
        with aside:
            z = x * 2.0
        used = y + z
        aside.join()
        return used

    replay = Replay()
    replay(early, columns(stand_in.cupy, 4, 1))
    for seed in range(1, 4):
        x = columns(stand_in.cupy, 4, 1, seed)
        wrong.append(not np.array_equal(to_host(replay(early, x)), to_host(3.0 * x + 1.0)))
    assert any(wrong)


def test_branches_of_branches_and_errors_in_them(stand_in: HostCupy):
    def nested(x: Any) -> Any:
        outer, inner = branch(x), branch(x)
        with outer:
            y = x + 1.0
            with inner:
                z = y * 2.0
            y = y * 3.0
            inner.join()
            y = y + z
        outer.join()
        return y

    def failing(x: Any) -> Any:
        with branch(x):
            raise ZeroDivisionError

    cupy, replay = stand_in.cupy, Replay()
    for seed in range(3):
        x = columns(cupy, 3, 1, seed)
        np.testing.assert_allclose(to_host(replay(nested, x)), 5.0 * (to_host(x) + 1.0))
    assert stand_in.captured == [Captured(nodes=4, depth=3)]
    before = cupy.cuda.get_current_stream()
    with pytest.raises(ZeroDivisionError):
        Replay()(failing, columns(cupy, 3, 1))
    assert cupy.cuda.get_current_stream() == before


def test_more_branches_than_streams(stand_in: HostCupy):
    """Those that find none stay in the row; a stream is another branch's once it is joined."""

    def many(x: Any) -> Any:
        branches, parts = [branch(x) for _ in range(5)], []
        for i, aside in enumerate(branches):
            with aside:
                parts.append(x * float(i + 1))
        for aside in branches:
            aside.join()
        total = parts[0]
        for part in parts[1:]:
            again = branch(x)
            with again:
                part = part + 1.0
            again.join()
            total = total + part
        return total

    replay = Replay()
    for seed in range(3):
        x = columns(stand_in.cupy, 4, 1, seed)
        np.testing.assert_allclose(to_host(replay(many, x)), 15.0 * to_host(x) + 4.0)
    assert stand_in.captured == [Captured(nodes=13, depth=10)]


def test_a_callers_own_capture_is_not_forked(stand_in: HostCupy):
    """Memory of a pool may be given to two streams there."""
    cupy = stand_in.cupy
    x, stream = columns(cupy, 4, 1), cupy.cuda.Stream(non_blocking=True)
    with stream:
        out = cupy.empty_like(x)
        kept = [cupy.empty_like(x) for _ in range(4)]
        del kept
        stream.begin_capture()
        out[...] = forked(cupy)(x)
        stream.end_capture()
    [graph] = stand_in.captured
    assert graph.nodes == graph.depth


def test_cublas_on_a_branch_has_a_workspace_of_its_own(stand_in: HostCupy):
    """Two streams at a time; each call's is set on its stream."""

    def function(x: Any) -> Any:
        aside = branch(x)
        stack = x[None]
        with aside:
            y = batched.matmul(stack, stack)
        z = batched.matmul(stack, stack, transpose_a=True)
        aside.join()
        return (y + z)[0]

    replay = Replay()
    for seed in range(3):
        x = columns(stand_in.cupy, 12, 12, seed)
        stand_in.counters.reset()
        got, want = to_host(replay(function, x)), to_host(x)
        np.testing.assert_allclose(got, want @ want + want.T @ want, atol=1e-12)
        assert stand_in.counters.captured_without_workspace == 0
    assert stand_in.captured == [Captured(nodes=3, depth=2)]


# --- the longest path ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["hss, entries, points", "fmm, entries", "hodlr, entries"])
def test_launches_that_a_product_waits_for(stand_in: HostCupy, name: str):
    """At most two a level and three: rows in, up, across at the top, down, rows out.

    Of HSS rows are gathered and scattered by the launches of the leaf level.
    """
    kind = launches.COMPRESSED[name][0]
    _, K = launches.compression(stand_in, name, launches.operators(stand_in)[kind])
    dense = to_host(K.to_dense())
    for k in (1, 8, 20):
        stand_in.captured.clear()
        v = columns(stand_in.cupy, launches.N, k)
        first = K @ v
        [graph] = stand_in.captured
        a_level = 2 if k <= NARROW else 6  # rows are ordered, multiplied and put back one by one
        more = 1 if name.startswith("hss") else 3
        assert graph.depth <= a_level * launches.depth_of(K) + more
        assert graph.nodes > graph.depth
        for _ in range(2):  # both orders
            np.testing.assert_array_equal(to_host(K @ v), to_host(first))
        w = columns(stand_in.cupy, launches.N, k, 1)
        for _ in range(2):
            np.testing.assert_allclose(to_host(K @ w), dense @ to_host(w), atol=1e-9)


@pytest.mark.parametrize("k", [1, 3])
def test_launches_that_an_hss_solve_waits_for(stand_in: HostCupy, dtype: Any, k: int):
    """One a level each way, two at the root."""
    matrix = stand_in.cupy.asarray(toeplitz(240).astype(dtype))
    K = gh.compress(gh.DenseOperator(matrix), "hss", rtol=1e-4, leaf_size=15)
    F, b = K.factorize(0.3), columns(stand_in.cupy, 240, k).astype(dtype)
    stand_in.captured.clear()
    first = F.solve(b)
    [graph] = stand_in.captured
    assert graph.nodes == graph.depth == 2 * launches.depth_of(K) + 2
    np.testing.assert_array_equal(to_host(F.solve(b)), to_host(first))
    dense = to_host(K.to_dense()).astype(float) + 0.3 * np.eye(240)
    c = columns(stand_in.cupy, 240, k, 1).astype(dtype)
    atol = 1e3 * float(np.finfo(dtype).eps)
    np.testing.assert_allclose(to_host(F.solve(c)), np.linalg.solve(dense, to_host(c)), atol=atol)


@pytest.mark.parametrize("k", [1, 3, 12])
def test_launches_that_a_hodlr_solve_waits_for(stand_in: HostCupy, dtype: Any, k: int):
    """One a level each way, the leaves' triangles, and the sums that the first level needs.

    Of many columns rows, sums over leaves, a triangle and an update are launches of their own.
    """
    matrix = stand_in.cupy.asarray(toeplitz(240).astype(dtype))
    K = gh.compress(gh.DenseOperator(matrix), "hodlr", rtol=1e-4, leaf_size=30)
    F, b = K.factorize(0.3), columns(stand_in.cupy, 240, k).astype(dtype)
    stand_in.captured.clear()
    first = F.solve(b)
    [graph] = stand_in.captured
    if k <= NARROW:
        assert graph.nodes == graph.depth == 2 * launches.depth_of(K) + 3
    else:
        assert graph.nodes > graph.depth
    for _ in range(2):
        np.testing.assert_array_equal(to_host(F.solve(b)), to_host(first))
    dense = to_host(K.to_dense()).astype(float) + 0.3 * np.eye(240)
    c = columns(stand_in.cupy, 240, k, 1).astype(dtype)
    atol = 1e3 * float(np.finfo(dtype).eps)
    np.testing.assert_allclose(to_host(F.solve(c)), np.linalg.solve(dense, to_host(c)), atol=atol)


# --- what the stand-in refuses ---------------------------------------------------------------


def status_of(call: Any) -> int:
    with pytest.raises(CUDARuntimeError) as caught:
        call()
    return int(caught.value.status)


def test_forks_that_cuda_refuses(stand_in: HostCupy):
    cuda = stand_in.cupy.cuda
    first, second, third = (cuda.Stream(non_blocking=True) for _ in range(3))
    outside = third.record()
    first.begin_capture()
    assert status_of(lambda: first.wait_event(outside)) == ISOLATION
    inside = first.record()
    assert status_of(lambda: cuda.Stream.null.wait_event(inside)) == IMPLICIT
    second.wait_event(inside)
    assert second.is_capturing()
    assert status_of(second.end_capture) == UNMATCHED
    third.begin_capture()
    assert status_of(lambda: third.wait_event(inside)) == MERGE
    third.end_capture()
    assert status_of(first.end_capture) == UNJOINED
    assert not first.is_capturing()
    assert not second.is_capturing()
    assert status_of(lambda: second.wait_event(inside)) == CAPTURED_EVENT


def test_work_after_a_join_is_not_joined(stand_in: HostCupy):
    cupy = stand_in.cupy
    first, second = (cupy.cuda.Stream(non_blocking=True) for _ in range(2))
    x, y = cupy.zeros(3), cupy.zeros(3)
    for again in (False, True):
        first.begin_capture()
        second.wait_event(first.record())
        with second:
            x += 1.0
        first.wait_event(second.record())
        with second:
            y += 1.0
        if again:
            first.wait_event(second.record())
            first.end_capture()
        else:
            assert status_of(first.end_capture) == UNJOINED
    assert stand_in.captured == [Captured(nodes=2, depth=2)]
