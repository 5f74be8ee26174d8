"""Launches, waits and copies that the CUDA path asks for, counted on the host: not a GPU run.

    python profiling/launches.py [--json FILE]

The tests' stand-in for CuPy (tests/host_cupy) is put in the place of CuPy, so that no GPU is needed
and the numbers are the same everywhere. The cases are fixed: N = 512 in 16 leaves, float64. A wait
is a read of device memory by the host (`.get()`, float(), a boolean mask, ...) or a
synchronization. A copy is one of host memory to the device, which CuPy stages in pinned memory and
does not wait for. "waits a level" are those inside the ranges "level of ... nodes" of the sweep,
over the number of levels. "path" is the longest chain of launches in the graph of a product or
solve of one column, each of which must wait for the one before; a level of the tree may add two.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from host_cupy import HostCupy, installed  # noqa: E402
from matrix_cases import toeplitz  # noqa: E402

import gpu_hodlr as gh  # noqa: E402
from gpu_hodlr import profiling  # noqa: E402

N, LEAF = 512, 32
OPTIONS: dict[str, Any] = {"leaf_size": LEAF, "rtol": 1e-4}
COMPRESSED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "hss, products+entries, dense": ("dense", "hss", {"sampler": "products+entries"}),
    "hss, products+entries, network": ("network", "hss", {"sampler": "products+entries"}),
    "hss, entries, points": ("points", "hss", {"sampler": "entries"}),
    "hss, products": ("products", "hss", {}),
    "fmm, products+entries": ("dense", "fmm", {"sampler": "products+entries", "budget": 0.1}),
    "fmm, entries": ("points", "fmm", {"sampler": "entries", "budget": 0.1}),
    "hodlr, products+entries": ("dense", "hodlr", {"sampler": "products+entries"}),
    "hodlr, entries": ("points", "hodlr", {"sampler": "entries"}),
    "hodlr, products": ("products", "hodlr", {}),
    "lowrank": ("smooth", "lowrank", {}),
    "kfe, network": ("network", "kfe", {}),
}
MULTIPLIED = ("hss, entries, points", "fmm, entries", "hodlr, entries", "lowrank")


@dataclass
class Levels:
    """Takes the place of the NVTX domain: the waits inside the levels of a sweep."""

    host: HostCupy
    count: int = 0
    waits: int = 0
    _open: list[int | None] = field(default_factory=list)

    def get_event_attributes(self, message: str) -> str:
        """As nvtx's."""
        return message

    def push_range(self, name: str) -> None:
        """As nvtx's."""
        level = name.startswith("level of")
        self._open.append(self.host.counters.synchronizations if level else None)

    def pop_range(self) -> None:
        """As nvtx's."""
        before = self._open.pop()
        if before is not None:
            self.count += 1
            self.waits += self.host.counters.synchronizations - before


@dataclass(frozen=True)
class Counts:
    """What one job asked for.

    Attributes:
        job: its name.
        launches: kernels, calls of cuBLAS and cuSOLVER, CuPy's own operations, graphs.
        waits: for the device.
        copies: of host memory to the device.
        waits_a_level: of the sweep; None where there is none.
        iterations: of CG; None for other jobs.
        path: launches of its graph that wait for each other; None where there is none.
        levels: of the tree.
    """

    job: str
    launches: int
    waits: int
    copies: int
    waits_a_level: float | None = None
    iterations: int | None = None
    path: int | None = None
    levels: int | None = None


@contextmanager
def counted_levels(host: HostCupy) -> Iterator[Levels]:
    """The levels of the sweeps made inside."""
    levels, before = Levels(host), profiling._DOMAIN
    profiling.nvtx_range.cache_clear()
    profiling._DOMAIN = levels
    try:
        yield levels
    finally:
        profiling._DOMAIN = before
        profiling.nvtx_range.cache_clear()


def counted(host: HostCupy, name: str, job: Callable[[], Any]) -> tuple[Counts, Any]:
    """The counts of a job, and what it gave."""
    with counted_levels(host) as levels:
        host.counters.reset()
        result = job()
        c = host.counters
        launches = c.launches + c.library_calls + c.array_operations + c.graph_launches
        a_level = round(levels.waits / levels.count, 1) if levels.count else None
        return Counts(name, launches, c.synchronizations, c.host_to_device, a_level), result


def operators(host: HostCupy) -> dict[str, gh.Operator]:
    """A matrix of each kind on the device."""
    xp, rng = host.cupy, np.random.default_rng(0)
    points, matrix = rng.random((N, 2)), xp.asarray(toeplitz(N))
    found: dict[str, gh.Operator] = {
        "dense": gh.DenseOperator(matrix),
        "points": gh.KernelOperator(xp.asarray(points), "laplace", 0.4, 0.5),
        "smooth": gh.KernelOperator(xp.asarray(points), "gaussian", 2.0),
        "products": gh.FunctionOperator(N, matmat=lambda v: matrix @ v, device="cuda"),
    }
    try:
        from network_cases import case
    except ImportError:  # no torch
        return found
    model, inputs, targets = case("deep", "cross_entropy")
    found["network"] = gh.GGNOperator(model, "cross_entropy", inputs, targets, device="cuda")
    return found


def compression(host: HostCupy, name: str, op: gh.Operator) -> tuple[Counts, Any]:
    """One of COMPRESSED, and the matrix."""
    kind, scheme, options = COMPRESSED[name]
    options = {**OPTIONS, **options}
    if kind == "network":  # a small one
        options["leaf_size"] = 8
    return counted(host, f"compress: {name}", lambda: gh.compress(op, scheme, **options))


def of_compression(host: HostCupy, made: dict[str, Any]) -> Iterator[Counts]:
    """Every form and sampler; what was compressed is put into `made`."""
    ops = operators(host)
    for name, (kind, _, _) in COMPRESSED.items():
        if kind in ops:
            counts, made[name] = compression(host, name, ops[kind])
            yield counts


def depth_of(K: Any) -> int:
    """Levels of the tree below the root; of low rank 0."""
    leaves = getattr(K.structure, "leaves", None)
    return 0 if leaves is None else (len(leaves) - 1).bit_length()


def replayed(host: HostCupy, name: str, call: Callable[[Any], Any], v: Any, levels: int) -> Counts:
    """A product or solve from the second call on, with the path of the graph of the first."""
    host.captured.clear()
    call(v)
    path = host.captured[-1].depth if host.captured else None
    counts, _ = counted(host, name, lambda: call(v))
    return replace(counts, path=path, levels=levels)


def of_use(host: HostCupy, made: dict[str, Any]) -> Iterator[Counts]:
    """Products, factors and solves from the second call on, and CG."""
    v = host.cupy.asarray(np.random.default_rng(1).standard_normal((N, 1)))
    for name in MULTIPLIED:
        K = made[name]
        yield replayed(host, f"product: {name}", K.matmat, v, depth_of(K))
        counts, F = counted(host, f"factorize: {name}", lambda: K.factorize(0.1))  # noqa: B023
        yield counts
        yield replayed(host, f"solve: {name}", F.solve, v, depth_of(K))
    K = made["hss, entries, points"]
    for what, M in (("without M", None), ("with M", K.factorize(1.0))):
        gh.cg(K, v, damping=0.1, M=M, rtol=1e-10)
        counts, (_, info) = counted(
            host,
            f"cg {what}",
            lambda: gh.cg(K, v, damping=0.1, M=M, rtol=1e-10),  # noqa: B023
        )
        yield replace(counts, iterations=info.iterations)


def count_all(folder: Path) -> list[Counts]:
    """Every job; compiled libraries are kept in the folder."""
    with warnings.catch_warnings(), installed(folder) as host:
        warnings.simplefilter("ignore")
        made: dict[str, Any] = {}
        return [*of_compression(host, made), *of_use(host, made)]


def table(rows: list[Counts]) -> str:
    """In Markdown."""
    lines = ["| job | launches | waits | copies | waits a level | CG iterations | path | levels |",
             "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for row in rows:
        numbers = (row.launches, row.waits, row.copies, row.waits_a_level, row.iterations,
                   row.path, row.levels)  # fmt: skip
        cells = ["" if x is None else str(x) for x in numbers]
        lines.append(f"| {' | '.join([row.job, *cells])} |")
    return "\n".join(lines)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the rows here")
    arguments = parser.parse_args()
    folder = ROOT / ".pytest_cache" / "d" / "host_cuda"  # where the tests keep them too
    folder.mkdir(parents=True, exist_ok=True)
    rows = count_all(folder)
    print(table(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps([vars(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
