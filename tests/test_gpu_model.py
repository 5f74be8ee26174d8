"""profiling/gpu_model.py: sums by hand, what is recorded, and growth with N."""

from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from host_cupy import HostCupy
from host_cupy.blas import Blas, address
from matrix_cases import toeplitz
from scripts import script

import gpu_hodlr as gh

SIZES = 320, 640, 1280
KERNEL, LIBRARY, ARRAY, GRAPH, WAIT = "kernel", "library", "array", "graph", "wait"


def part(name: str) -> ModuleType:
    """A module of gpu_costs."""
    script("gpu_model")
    return import_module(f"gpu_costs.{name}")


@pytest.fixture
def gpu() -> Any:
    """A GPU of round numbers, in seconds and bytes."""
    return replace(
        part("gpus").GPUS["H100"], copy=1e3, cache=1e9, cache_copy=1e9, processor_copy=1e3,
        thread_copy=1e9, multiprocessors=4, threads=512, vector64=1e6, gemm64=1e6, least=1.0,
        barrier=0.5, node=0.25, gap=0.125, latency=2.0, launch=4.0, call=5.0, operation=6.0,
        replay=7.0, replayed_node=0.0, wait=8.0, send=9.0, pcie=100.0, mark=0.0, host_share=2.0,
    )  # fmt: skip


def step(kind: str, size: int = 0, **values: Any) -> Any:
    """A step with one operand of so many bytes."""
    steps = part("steps")
    operands = {"out": steps.Operand((size,), 1)} if size else {}
    return steps.Step(kind, operands=operands, **values)


def seconds(steps: list[Any], gpu: Any) -> Any:
    return part("clock").predicted(steps, gpu).total


# --- sums by hand ----------------------------------------------------------------------------


def test_a_kernel_takes_the_longest_of_its_bounds(gpu: Any):
    Work = part("work").Work
    assert Work(bytes=500).seconds(gpu) == 1 + 500 / 1e3
    assert Work(flops=3e6).seconds(gpu) == 1 + 3
    # One block: a multiprocessor alone has a quarter of the peak, and draws what it can.
    assert Work(flops=3e6, blocks=1).seconds(gpu) == 1 + 12
    slow = replace(gpu, processor_copy=100.0)
    assert Work(bytes=500, blocks=1).seconds(slow) == 1 + 5
    assert Work(bytes=500, blocks=4).seconds(slow) == 1 + 500 / 400
    assert Work(bytes=500, blocks=5).seconds(slow) == 1 + 2 * 100 / 100  # one has two of them
    few = replace(gpu, thread_copy=1.0)
    assert Work(bytes=640, blocks=1, threads=32).seconds(few) == 1 + 20
    # Two blocks of 256 threads fit on a multiprocessor, eight on the GPU: two waves of ten.
    assert Work(blocks=8, chain=6).seconds(gpu) == 1 + 3
    assert Work(blocks=10, chain=6).seconds(gpu) == 1 + 6
    # A second pass hits L2 where what it reads fits there.
    assert Work(bytes=500, again=500, footprint=500).seconds(gpu) == 1 + 0.5
    assert Work(bytes=500, again=500, footprint=2e9).seconds(gpu) == 1 + 1
    assert Work(bytes=500, blocks=4).times(2) == Work(bytes=1000, blocks=8)


def test_one_block_waits_for_shared_memory(gpu: Any):
    Work = part("work").Work
    most = replace(gpu, shared=100, blocks=32, threads=2048)
    assert Work(blocks=8, threads=64, shared=60, chain=2).seconds(most) == 1 + 2
    assert Work(blocks=8, threads=64, shared=50, chain=2).seconds(most) == 1 + 1


def test_launches_one_by_one(gpu: Any):
    """The host issues at 6, 12; an idle GPU starts 2 later, and takes 1 + bytes / 1000."""
    one = seconds([step(ARRAY, 1000)], gpu)
    assert one.seconds == 6 + 2 + 1 + 1
    assert (one.busy, one.steps, one.bytes, one.depth) == (2, 1, 1000, 1)
    assert seconds([step(ARRAY, 1000)] * 2, gpu).seconds == 12 + 2 + 2
    # A busy one after a gap: 8 + 11, 0.125, 11.
    assert seconds([step(ARRAY, 10_000)] * 2, gpu).seconds == 8 + 11 + 0.125 + 11
    # What is read has been waited for; the host goes on then.
    waited = seconds([step(ARRAY, 1000), step(WAIT, 100), step(ARRAY, 1000)], gpu)
    assert waited.seconds == (10 + 8 + 100 / 100) + 6 + 2 + 2
    assert waited.waits == 1
    copied = seconds([step("copy", 200), step(ARRAY, 1000)], gpu)
    assert copied.seconds == (9 + 2) + 6 + 2 + 2
    assert copied.copies == 1
    own = seconds([step("host", seconds=1.5), step(ARRAY, 1000)], gpu)
    assert (own.seconds, own.host) == (3 + 10, 3)


def test_a_graph_is_launched_once(gpu: Any):
    chain = step(GRAPH, inside=[step(ARRAY, 1000)] * 3)
    found = seconds([chain], gpu)
    assert found.seconds == 7 + 2 + 3 * (0.25 + 2)
    assert (found.graphs, found.steps, found.depth) == (1, 3, 3)


@pytest.mark.parametrize("side_by_side", [False, True])
def test_a_fork_in_a_graph_shortens_the_chain(gpu: Any, side_by_side: bool):
    """Two steps beside each other, joined by a third; the GPU has room for both, or not."""
    size = 0 if side_by_side else 4000  # nothing but the least time, or the whole bandwidth
    inside = [
        step("event", event=1), step("follow", event=1, stream=1),
        step(ARRAY, size), step(ARRAY, size, stream=1), step("event", event=2, stream=1),
        step("follow", event=2), step(ARRAY, 1000),
    ]  # fmt: skip
    found = seconds([step(GRAPH, inside=inside)], gpu)
    assert found.depth == 2
    both = 0.25 + 1 if side_by_side else 0.25 + 2 * 4
    assert found.seconds == pytest.approx(7 + 2 + both + 0.25 + 2)


def test_phases_add_up_to_the_whole(gpu: Any):
    steps = [step(ARRAY, 500, phase="a"), step(WAIT, phase="b"), step(ARRAY, 1000, phase="a")]
    clock = part("clock").predicted(steps, gpu)
    assert sum(phase.seconds for phase in clock.phases.values()) == clock.total.seconds
    assert clock.phases["b"].waits == clock.total.waits == 1
    assert clock.phases["a"].steps == 2


def test_a_step_of_another_kind(gpu: Any):
    for steps in ([step("dance")], [step(GRAPH, inside=[step(WAIT)])]):
        with pytest.raises(ValueError, match=r"kind '(dance|wait)'"):
            seconds(steps, gpu)


def test_gemms(gpu: Any):
    """Large ones reach the rate that is assumed, small ones pay for tiles and for idle units."""
    libraries = part("libraries")
    gpu = part("gpus").GPUS["H200"]
    n = 8192
    large = libraries.gemm_work(gpu, n, n, n, 1, 8).seconds(gpu)
    assert 2 * n**3 / large == pytest.approx(gpu.gemm64, rel=0.04)
    thin = libraries.gemm_work(gpu, n, 1, n, 1, 8).seconds(gpu)
    assert n * n * 8 / gpu.copy < thin < 5 * n * n * 8 / gpu.copy
    one, few, many = (
        libraries.gemm_work(gpu, 64, 64, 64, q, 8).seconds(gpu) for q in (1, 100, 9000)
    )
    assert one <= few < 2 * one  # the GPU has room for a hundred
    assert many > 10 * few
    split = libraries.gemm_work(gpu, 64, 64, 65_536, 1, 8)
    assert split.blocks > 100
    # As cuBLAS and CuPy are called: the same work.
    places = {"3": 30.0, "4": 20.0, "5": 10.0, "17": 7.0}
    called = step(LIBRARY, name="cublasDgemmStridedBatched", numbers=places)
    assert libraries.library_work(called, gpu) == libraries.gemm_work(gpu, 30, 20, 10, 7, 8)
    called = step(LIBRARY, name="cublasSgemm_v2", numbers=places)
    assert libraries.library_work(called, gpu) == libraries.gemm_work(gpu, 30, 20, 10, 1, 4)
    Operand = part("steps").Operand
    shapes = {"in0": (7, 30, 10), "in1": (7, 10, 20), "out": (7, 30, 20)}
    for name in ("matmul", "einsum"):
        called = step(LIBRARY, name=name)
        called.operands = {key: Operand(shape, 8) for key, shape in shapes.items()}
        assert libraries.library_work(called, gpu) == libraries.gemm_work(gpu, 30, 20, 10, 7, 8)


def test_what_has_no_cost_model_is_named(gpu: Any):
    libraries, kernels = part("libraries"), part("kernels")
    with pytest.raises(libraries.UnknownCallError, match="cublasDsyrk_v2 has no cost model"):
        seconds([step(LIBRARY, name="cublasDsyrk_v2", numbers={"1": 0.0})], gpu)
    with pytest.raises(kernels.UnknownKernelError, match="kernel shuffle has no cost model"):
        seconds([step(KERNEL, name="shuffle")], gpu)
    with pytest.raises(kernels.UnknownKernelError, match="solve_lower wants its parameter 'lower'"):
        seconds([step(KERNEL, name="solve_lower", grid=(1,), block=(32,))], gpu)


# --- kernels ---------------------------------------------------------------------------------


def test_every_kernel_has_a_cost_model():
    entry_points = import_module_of_steps("entry_points")
    known = part("kernels").KERNELS
    stems = {entry_points.stem(k) for ks in entry_points.all_entry_points().values() for k in ks}
    assert stems - set(known) == set(), "add them to KERNELS in profiling/gpu_costs/kernels.py"
    assert set(known) - stems == set(), "these kernels are gone"


def import_module_of_steps(name: str) -> ModuleType:
    script("gpu_model")
    return import_module(f"gpu_steps.{name}")


@pytest.fixture
def recorder(host_library_folder: Path) -> Iterator[Any]:
    with part("record").recording(host_library_folder) as found:
        yield found


def test_every_launch_has_the_parameters_that_its_model_wants(recorder: Any):
    """All kernels on tiny levels: time, bytes and blocks of each; a row a primitive."""
    prediction, clock = part("prediction"), part("clock")
    calls = prediction.kernel_calls()
    gpus = prediction.chosen(["H100", "H200"])
    met: dict[str, Any] = {}

    def note(work: Any) -> None:
        for one in prediction.asked(recorder, work):
            if one.kind == KERNEL:
                met[one.name] = clock.work_of(one, gpus[0])

    for dtype in (np.float64, np.float32):
        for call in calls.calls(calls.TINY, dtype):
            note(call.work)
        for _, work in calls.tall_calls(dtype):
            note(work)
    assert set(met) == set(part("kernels").KERNELS)
    for name, work in met.items():
        assert work.bytes > 0, name
        assert 0 < work.blocks < 1e6, name
        assert 2e-6 <= work.seconds(gpus[1]) <= work.seconds(gpus[0]) < 1e-2, name
    # The same sum, over ten calls in a row.
    rows = prediction.kernel_rows(recorder, [(calls.TINY, "float64", False)], gpus, (1,))
    assert {row["call"] for row in rows} >= {"full QR", "Cholesky", "leaf product, 1 column"}
    assert all(row["seconds"]["H100"] >= row["seconds"]["H200"] > 2e-6 for row in rows)


# --- what is recorded ------------------------------------------------------------------------


def compression(host: HostCupy, n: int = 130, **options: Any) -> Any:
    """A job: the compression of a fixed matrix, all ranks equal."""
    op = gh.DenseOperator(host.cupy.asarray(toeplitz(n)))
    how = {"leaf_size": 20, "rtol": 1e-3, "seed": 3, "ordering": "natural", **options}
    return lambda: gh.compress(op, **how)


def asked(steps: list[Any]) -> list[Any]:
    """What was asked for, without the host's own time."""
    return [(s.kind, s.name, s.phase, s.level, s.grid, s.block) for s in steps if s.kind != "host"]


def test_all_that_is_counted_is_recorded(host_library_folder: Path):
    """As many launches, waits and copies as the stand-in counts, with twins and without."""
    launches = script("launches")
    with launches.installed(host_library_folder) as host:
        job = compression(host)
        job()
        want, K = launches.counted(host, "", job)
    found = {}
    for twins in (False, True):
        with part("record").recording(host_library_folder, twins=twins) as recorder:
            job = compression(recorder.host)
            job()
            found[twins], made = recorder.of(job)
            assert made.ranks == K.ranks
        kinds = [s.kind for s in found[twins]]
        assert kinds.count(WAIT) == want.waits
        assert kinds.count("copy") == want.copies
        products = sum(
            s.kind == LIBRARY and bool(s.operands) for s in found[twins]
        )  # counted twice
        executed = sum(map(kinds.count, (KERNEL, LIBRARY, ARRAY, GRAPH)))
        assert executed + products == want.launches
        assert {s.level for s in found[twins]} >= {0, 8, 4, 2}
        assert {"pivoted QR", "couplings"} <= {s.phase for s in found[twins]}
    assert asked(found[True]) == asked(found[False])


def test_products_are_graphs_with_their_dependencies(recorder: Any):
    job = compression(recorder.host)
    jobs = part("jobs")
    K = job()
    v = recorder.host.cupy.ones((130, 1))
    want = K.matmat(v).get()
    steps = jobs._replayed(recorder, K.matmat, v)
    (graph,) = [one for one in steps if one.kind == GRAPH]
    executed = [one for one in graph.inside if one.kind in (KERNEL, LIBRARY, ARRAY)]
    total = seconds(steps, part("gpus").GPUS["H200"])
    assert total.depth <= len(executed) + 2  # the input's copy, and the output's
    assert total.waits == total.copies == 0
    assert 10e-6 < total.seconds < 1e-3
    np.testing.assert_allclose(K.matmat(v).get(), want, rtol=1e-13)  # nothing is left behind


@pytest.mark.parametrize("scheme", ["hss", "fmm", "hodlr"])
def test_the_clock_follows_the_dependencies_that_the_stand_in_counts(
    host_library_folder: Path, scheme: str
):
    """As many launches in a graph, and on its longest path; that path is what time it takes."""
    launches, options = script("launches"), {"scheme": scheme}
    columns: tuple[int, ...] = (1, 8)
    found: dict[tuple[int, int], Any] = {}
    with launches.installed(host_library_folder) as host:
        K = compression(host, **options)()
        calls = [K.matmat] if scheme == "fmm" else [K.matmat, K.factorize(0.5).solve]
        for i, call in enumerate(calls):
            for k in columns:
                host.captured.clear()
                call(host.cupy.ones((130, k)))
                [found[i, k]] = host.captured
    with part("record").recording(host_library_folder) as recorder:
        K = compression(recorder.host, **options)()
        calls = [K.matmat] if scheme == "fmm" else [K.matmat, K.factorize(0.5).solve]
        for (i, k), captured in found.items():
            steps = part("jobs")._replayed(recorder, calls[i], recorder.host.cupy.ones((130, k)))
            (graph,) = [one for one in steps if one.kind == GRAPH]
            gpu = replace(part("gpus").GPUS["H200"], least=1.0, node=3.0)
            total = seconds([graph], gpu)
            assert (total.steps, total.depth) == (captured.nodes, captured.depth)
            assert total.seconds == pytest.approx(4.0 * captured.depth, rel=1e-3)
            row = part("prediction").job_row([graph], [gpu])
            assert row["chain"] == {"H200": 4.0 * captured.depth}


def test_objects_of_the_batched_primitives_have_twins(recorder: Any):
    """Sparse rows: the product's launch is noted, its values are NumPy's."""
    xp = recorder.host.cupy
    starts, columns, values = np.array([0, 2, 3]), np.array([0, 2, 1], np.int32), np.arange(3.0)
    given = [xp.asarray(x) for x in (starts, columns, values)]
    rows = gh.batched.sparse_rows(*given, 3)
    del given
    x = xp.asarray(np.arange(6.0).reshape(3, 2))
    steps, y = recorder.of(lambda: rows.matmul(x))
    np.testing.assert_array_equal(y.get(), [[4.0, 5.0], [4.0, 6.0]])
    assert [one.name for one in steps if one.kind == KERNEL] == ["sparse_rows_narrow"]
    assert recorder.executed == set()
    z = rows.transposed_matmul(y)
    np.testing.assert_array_equal(z.get(), [[0.0, 0.0], [8.0, 12.0], [4.0, 5.0]])


def test_what_reads_its_own_results_is_executed(recorder: Any):
    """A primitive that looks at what it has computed cannot run hollow: its steps are the same."""
    twins, cupy = part("twins"), recorder.host.cupy

    def doubled(x: Any) -> Any:
        y = x * 2.0
        return y + float(y.sum())

    def wrong(x: Any) -> Any:
        raise AssertionError("the values must be its own")

    call = twins.substituted(recorder, "doubled", doubled, wrong)
    x = cupy.asarray(np.arange(3.0))
    steps, result = recorder.of(lambda: call(x))
    np.testing.assert_array_equal(result.get(), [6.0, 8.0, 10.0])
    assert recorder.executed == {"doubled"}
    assert [one.kind for one in steps if one.kind != "host"] == [ARRAY, ARRAY, WAIT, ARRAY]


def test_the_hosts_own_time_is_the_less_of_two_runs():
    quieter = part("jobs").quieter

    def run(*host: float, name: str = "x") -> list[Any]:
        steps = []
        for seconds in host:
            steps += [step("host", seconds=seconds)] * (seconds > 0) + [step(ARRAY, name=name)]
        return steps

    def times(steps: list[Any]) -> list[float]:
        return [one.seconds for one in steps if one.kind == "host"]

    assert times(quieter(run(1, 2, 0), run(3, 1, 5))) == [1, 1]  # the third was noise
    assert len(quieter(run(1, 2, 0), run(3, 1, 5))) == 5
    other = run(3, 1, 5, name="y")
    assert quieter(run(1, 2, 0), other) == other


def test_a_factorization_that_ends_early_costs_its_steps(recorder: Any):
    """The rows of R that are not 0, where the launch has a threshold to end at."""
    xp, twins, kernels = recorder.host.cupy, part("twins"), part("kernels")
    rank, m, s = 3, 20, 30
    values = np.random.default_rng(0).standard_normal((2, m, rank)) @ np.ones((2, rank, s))
    r = np.zeros((2, m, m))
    r[:, :rank] = 1.0
    twin = [np.zeros((2, m), np.int64), r, np.zeros((2, m + 1))]
    launch = import_module("gpu_hodlr.batched.cuda").launch

    def factorize(samples: Any, threshold: float) -> Any:
        out = [xp.empty(x.shape, x.dtype) for x in twin]
        ranks = xp.empty(2, np.int32)
        sizes = (m, s, m, np.float64(threshold))
        launch("pivoted_qr", "pivoted_qr_f64", (2,), (64,), (samples, *out, ranks, *sizes), 4096)
        return out

    call = twins.substituted(recorder, "qr", factorize, lambda samples, threshold: twin)
    flops = []
    for threshold in (-1.0, 0.5):
        samples = xp.asarray(values)
        steps, _ = recorder.of(lambda: call(samples, threshold))  # noqa: B023
        (step,) = [one for one in steps if one.kind == KERNEL]
        flops.append(kernels.kernel_work(step).flops)
    assert recorder.executed == set()
    assert 0 < 2 * flops[1] < flops[0]
    assert step.numbers["done"] == rank


@pytest.mark.parametrize("twin", [lambda x: x[:1], lambda x, more: x])
def test_a_twin_that_does_not_fit_is_not_used(recorder: Any, twin: Any):
    call = part("twins").substituted(recorder, "twice", lambda x: x * 2.0, twin)
    steps, result = recorder.of(lambda: call(recorder.host.cupy.asarray(np.arange(3.0))))
    np.testing.assert_array_equal(result.get(), [0.0, 2.0, 4.0])
    assert [one.kind for one in steps if one.kind == ARRAY] == [ARRAY]


@pytest.mark.parametrize("beta", [0.0, 0.5])
@pytest.mark.parametrize(("op_a", "op_b"), [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_gemms_by_numpy_are_those_of_the_stand_in(
    stand_in: HostCupy, dtype: Any, op_a: int, op_b: int, beta: float
):
    """Any layout; C is not read where beta is 0, and nothing between its columns is written."""
    blas = Blas(stand_in.cupy, dtype)
    a, b = (
        blas.store(blas.random(2, *(shape[::-1] if op else shape)), 1, 3)
        for op, shape in ((op_a, (5, 4)), (op_b, (4, 3)))
    )
    results = []
    for quick in (False, True):
        c = blas.random(2, 5, 3) if beta else np.full((2, 5, 3), np.nan, dtype)
        C = blas.store(c, 2, 1)
        args = (
            op_a, op_b, 5, 3, 4, blas.number(-2.0), address(a[0]), *a[1:], address(b[0]), *b[1:],
            blas.number(beta), address(C[0]), *C[1:], 2,
        )  # fmt: skip
        if quick:
            name = f"cublas{'S' if dtype == np.float32 else 'D'}gemmStridedBatched"
            assert part("quick_gemm").multiplied(name, (blas.handle, *args))
        else:
            assert blas("gemmStridedBatched", *args) == 0
        results.append(C[0].get())
    np.testing.assert_allclose(results[1], results[0], rtol=blas.rtol, atol=blas.rtol)
    assert not part("quick_gemm").multiplied("cublasDgemvStridedBatched", ())


def test_a_launch_past_the_recorder_is_an_error(recorder: Any):
    state = import_module("host_cupy.state")
    with pytest.raises(RuntimeError, match="kernel was asked for in a way"):
        state.counters.launches += 1


# --- another N -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def doubled(host_library_folder: Path) -> dict[int, Any]:
    """The same kind of matrix at N = 320, 640, 1280: leaves of 20, ranks that do not grow."""
    jobs, found = part("jobs"), {}
    with part("record").recording(host_library_folder) as recorder:
        for n in SIZES:
            points = (np.arange(n)[:, None] + 0.5) / n
            op, twin = (
                gh.KernelOperator(xp.asarray(points), "matern32", 0.2, 0.5)
                for xp in (recorder.host.cupy, np)
            )
            part("twins").blocks_by(recorder, op, twin)
            how = {"leaf_size": 20, "rtol": 1e-3, "ordering": "natural", "sampler": "entries"}
            found[n] = jobs.record_matrix(recorder, jobs.Case("line", "", "hss", n), op, how)
    return found


def test_growing_gives_what_a_larger_matrix_asks_for(doubled: dict[int, Any]):
    """Of compress the levels: so small a matrix is measured on all rows, by N^2 entries."""
    growth, gpu = part("growth"), part("gpus").GPUS["H200"]
    half, steps, double = (doubled[n].jobs for n in SIZES)
    for job in steps:
        grown = growth.grown(steps[job], half[job], 1)
        got, want = (
            seconds([s for s in some if s.level or job != "compress"], gpu)
            for some in (grown, double[job])
        )
        assert got.steps == pytest.approx(want.steps, rel=0.15), job
        assert got.waits == pytest.approx(want.waits, abs=2), job
        assert got.bytes == pytest.approx(want.bytes, rel=0.3), job
        assert got.seconds - got.host == pytest.approx(want.seconds - want.host, rel=0.25), job
        assert got.depth == pytest.approx(want.depth, rel=0.15), job


@pytest.mark.parametrize("job", ["compress", "product, 1 column", "factor", "solve, 64 columns"])
def test_a_larger_matrix_takes_longer(doubled: dict[int, Any], job: str):
    growth, gpu = part("growth"), part("gpus").GPUS["H100"]
    recorded = [seconds(doubled[n].jobs[job], gpu) for n in SIZES]
    half, steps = (doubled[n].jobs[job] for n in SIZES[1:])
    more = [seconds(growth.grown(steps, half, p), gpu) for p in range(12)]
    for rows in (recorded, more):
        for what in ("steps", "bytes", "flops"):
            values = [getattr(row, what) for row in rows]
            assert values == sorted(values)
        spent = [row.seconds - row.host for row in rows]
        assert (np.diff(spent) > 0).all()
    assert more[0].seconds == recorded[-1].seconds
    assert more[-1].bytes > 500 * more[0].bytes


def test_nothing_shrinks(doubled: dict[int, Any]):
    steps = doubled[SIZES[0]].jobs["factor"]
    with pytest.raises(ValueError, match="0 or more, got -1"):
        part("growth").grown(steps, steps, -1)
