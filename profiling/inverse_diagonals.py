"""What the inverse's diagonal, its trace and many dampings take beside a factorization.

    python profiling/inverse_diagonals.py
    python profiling/inverse_diagonals.py hss lowrank --runs 5
    python profiling/inverse_diagonals.py --json profiling/results/inverse_diagonals.json

The Gauss-Newton matrix of the classifier mnist, N = 16,330, as in benchmark.py, a damping of the
compression's error. CPU seconds of all threads, the least of several runs that alternate; the
diagonal is compared with solves for unit vectors.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from benchmark import operator, timed
from environment import environment

import gpu_hodlr as gh
from gpu_hodlr.devices import namespace_on, to_host

RUNS = 3
ENTRIES = 64  # of the diagonal that are checked
DAMPINGS = 8
CASES: dict[str, dict[str, Any]] = {
    "hss": {"rtol": 1e-2, "max_rank": 512, "leaf_size": 128},
    "hss_high": {"rtol": 1e-3, "max_rank": 1200, "leaf_size": 128},
    "lowrank": {"scheme": "lowrank", "rtol": 1e-2, "max_rank": 1200},
    "lowrank_tail": {"scheme": "lowrank", "rtol": 1e-2, "max_rank": 1200, "tail": "diagonal"},
    "hodlr": {"scheme": "hodlr", "rtol": 1e-2, "max_rank": 512, "leaf_size": 128},
    "fmm": {"scheme": "fmm", "rtol": 1e-2, "max_rank": 512, "leaf_size": 128, "budget": 0.004},
    "kfe": {"scheme": "kfe", "rtol": 1e-2},
}


def measured(op: Any, options: dict[str, Any], runs: int, device: str) -> dict[str, Any]:
    """Of one form."""
    K, _, compress_cpu = timed(lambda: gh.compress(op, **options), device)
    damping = K.report.error * K.report.frobenius_norm
    F = K.factorize(damping)
    dampings = [damping * 2.0**i for i in range(DAMPINGS)]
    jobs = {
        "factorize": lambda: K.factorize(damping),
        "inverse_diagonal": F.inverse_diagonal,
        "quadratic_form_64": lambda: F.quadratic_form(unit),
        "solve_64": lambda: F.solve(unit),
        "one_by_one": lambda: [K.factorize(d) for d in dampings],
        "factorize_many": lambda: K.factorize_many(dampings),
    }
    index = np.random.default_rng(0).permutation(K.shape[0])[:ENTRIES]
    unit = np.zeros((K.shape[0], ENTRIES))
    unit[index, np.arange(ENTRIES)] = 1
    if device == "cuda":
        unit = namespace_on(device).asarray(unit)
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(runs):
        for name, job in jobs.items():
            seconds[name].append(timed(job, device)[2])
    got, errors = to_host(F.inverse_diagonal())[index], to_host(F.inverse_diagonal_error)[index]
    want = np.diagonal(to_host(F.inverse_block(index)))
    return {
        "N": K.shape[0],
        "error": K.report.error,
        "damping": damping,
        "stored_percent": 100 * K.storage_fraction,
        "ranks": [max(level) for level in K.ranks],
        "compress_cpu_s": compress_cpu,
        **{f"{name}_cpu_s": min(each) for name, each in seconds.items()},
        "relative_difference": float(np.max(np.abs(got - want) / want)),
        "relative_standard_error": float(np.median(errors / want)),
        "trace": F.logdet_gradient(),
        "trace_error": F.logdet_gradient_error,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", help=f"of {', '.join(CASES)}; all by default")
    parser.add_argument("--runs", type=int, default=RUNS)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    unknown = set(options.cases) - set(CASES)
    if unknown:
        parser.error(f"no case {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    op = operator("mnist", "float64", options.device)
    results: dict[str, Any] = {}
    for name in options.cases or CASES:
        results[name] = measured(op, CASES[name], options.runs, options.device)
        print(name, json.dumps(results[name], indent=1), flush=True)
        if options.json is not None:
            content = {"environment": environment(), "results": results}
            options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
