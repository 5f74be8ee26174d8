"""Networks of a million parameters and more: CPU seconds by phase, and the peak of memory.

    python profiling/network_scale.py
    python profiling/network_scale.py mlp_lowrank mlp_hss
    python profiling/network_scale.py growth --largest 1e6
    python profiling/network_scale.py --json profiling/results/network_scale.json \
        --plot profiling/results/network_scale.png

Gauss-Newton matrices under the mean cross entropy of digits, float32, one thread, weights as
initialized from a seed. "mlp" is 784-1024-256-10, tanh, with 200 digits, at rtol 1e-2 and a rank of
300 at most; "conv" are four convolutions with 40 digits, by products alone. "growth" holds rank 64
and makes the two hidden layers of "mlp" wider; what rtol it has is then what comes out.

Every job runs in a process of its own. `peak` is the largest resident size of that process, the
libraries and the network included; `before` what it was when the compression began. A job above its
limits makes the script fail; limits of time hold on an idle core of 2020 or later.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from environment import environment
from network_data import FILE
from peak_memory import resident

RESULTS = Path(__file__).parent / "results"
RANK = 64  # of the growth
SHARES = (3, 10, 31, 90, 256, 585, 1238)  # second hidden layers, the first is four times as wide


class Job(NamedTuple):
    """What is compressed, how, and what it may take."""

    network: str
    samples: int
    options: dict[str, Any]
    seconds: float | None = None
    gigabytes: float | None = None


JOBS = {
    "mlp_lowrank": Job("mlp 256", 200, {"scheme": "lowrank"}, 40, 4),
    "mlp_hss": Job("mlp 256", 200, {"scheme": "hss"}, 120, 6),
    "conv_lowrank": Job("conv", 40, {"scheme": "lowrank"}, 40, 4),
}
DEFAULTS = {"rtol": 1e-2, "max_rank": 300}


def network(name: str) -> Any:
    """The module, with weights from a seed."""
    import torch

    nn = torch.nn
    torch.manual_seed(0)
    if name == "conv":
        return nn.Sequential(
            nn.Unflatten(1, (1, 28, 28)),
            nn.Conv2d(1, 32, 3, stride=2, padding=1), nn.Tanh(),
            nn.Conv2d(32, 128, 3, stride=2, padding=1), nn.Tanh(),
            nn.Conv2d(128, 256, 3, stride=2, padding=1), nn.Tanh(),
            nn.Conv2d(256, 292, 3, padding=1), nn.Tanh(),
            nn.AvgPool2d(4), nn.Flatten(), nn.Linear(292, 10),
        )  # fmt: skip
    width = int(name.split()[1])
    return nn.Sequential(
        nn.Linear(784, 4 * width), nn.Tanh(), nn.Linear(4 * width, width), nn.Tanh(),
        nn.Linear(width, 10),
    )  # fmt: skip


def measure(job: Job) -> dict[str, Any]:
    """Compress, multiply and factorize in this process."""
    import torch

    import gpu_hodlr as gh

    torch.set_num_threads(1)
    with np.load(FILE) as file:
        inputs = torch.from_numpy(file["images"][: job.samples] / np.float32(255))
        targets = torch.from_numpy(file["labels"][: job.samples].astype(np.int64))
    start = time.process_time()
    op = gh.GGNOperator(network(job.network), "cross_entropy", inputs, targets,
                        entries="none" if job.network == "conv" else "auto")  # fmt: skip
    made, before = time.process_time() - start, resident(peak=False) / 1e9
    start = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", gh.errors.RankCapWarning)
        K = gh.compress(op, **{**DEFAULTS, **job.options})
    compress = time.process_time() - start
    peak = resident() / 1e9
    v = np.random.default_rng(0).standard_normal((op.shape[0], 1), dtype=np.float32)
    start = time.process_time()
    K @ v
    product = time.process_time() - start
    return {
        "network": job.network, "N": op.shape[0], "samples": job.samples,
        "rows_of_the_root": op.rank_bound, "entries": op.access,
        "scheme": K.report.scheme, "sampler": K.report.sampler, "rtol": K.report.rtol,
        "error": K.report.error, "largest_rank": max(map(max, K.ranks)),
        "level_ranks": [max(level) for level in K.ranks],
        "rank_cap_hit": K.report.rank_cap_hit, "num_samples": K.report.num_samples,
        "passes": K.report.passes, "stored_GB": K.nbytes / 1e9, "operator_s": made,
        "compress_s": compress, "product_s": product, "before_GB": before, "peak_GB": peak,
        "limit_s": job.seconds, "limit_GB": job.gigabytes,
        "date": datetime.date.today().isoformat(), "wall_seconds": dict(K.report.seconds),
    }  # fmt: skip


def in_own_process(job: Job) -> dict[str, Any]:
    """`measure`, with one thread."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    found = subprocess.run(
        [sys.executable, __file__, "--job", json.dumps(job)],
        env={**os.environ, **threads}, check=True, capture_output=True, text=True,
    )  # fmt: skip
    row: dict[str, Any] = json.loads(found.stdout)
    said = ("N", "error", "largest_rank", "compress_s", "before_GB", "peak_GB")
    print("  ".join(f"{key} {row[key]:.4g}" for key in said), flush=True)
    return row


def growth(smallest: float, largest: float) -> list[dict[str, Any]]:
    """Rank 64 of wider and wider networks."""
    options = {"scheme": "lowrank", "rtol": 1e-6, "max_rank": RANK}
    jobs = [Job(f"mlp {width}", 200, options) for width in SHARES]
    return [
        in_own_process(job)
        for job in jobs
        if smallest / 1.1 <= parameters(job.network) <= 1.1 * largest
    ]


def parameters(name: str) -> int:
    """N of a network of linear layers."""
    width = int(name.split()[1])
    sizes = (784, 4 * width, width, 10)
    return sum((a + 1) * b for a, b in pairwise(sizes))


def slopes(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Log-log slopes over the networks from 100,000 parameters on."""
    large = [row for row in rows if row["N"] > 9e4]
    if len(large) < 2:
        return {}
    x = np.log([row["N"] for row in large])
    return {
        key: float(np.polyfit(x, np.log([value(row) for row in large]), 1)[0])
        for key, value in (
            ("compress_s", lambda row: row["compress_s"]),
            ("grown_GB", lambda row: row["peak_GB"] - row["before_GB"]),
        )
    }


def merged(path: Path, rows: dict[str, Any], grown: list[dict[str, Any]]) -> dict[str, Any]:
    """What a file has, with what was measured now in the place of the same of before."""
    old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    by_size = {row["N"]: row for row in [*old.get("growth", []), *grown]}
    every = [by_size[n] for n in sorted(by_size)]
    return {
        "environment": environment(), "rows": {**old.get("rows", {}), **rows}, "growth": every,
        "slopes": slopes(every),
    }  # fmt: skip


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """CPU seconds and gigabytes over N."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    n, found = np.array([row["N"] for row in rows]), slopes(rows)
    seconds = [row["compress_s"] for row in rows]
    label = f"compress: slope {found['compress_s']:.2f} from 1e5 on" if found else "compress"
    left.loglog(n, seconds, "o-", label=label)
    left.loglog(n, [row["product_s"] for row in rows], "s-", label="product, one column")
    left.loglog(n, seconds[-1] * n / n[-1], "k--", lw=1, label="N")
    left.set_ylabel("CPU seconds, one thread")
    grown = [row["peak_GB"] - row["before_GB"] for row in rows]
    right.loglog(n, grown, "o-", label="compress: growth of the resident peak")
    right.loglog(n, [row["stored_GB"] for row in rows], "s-", label="stored")
    root = np.array([4e-9 * row["N"] * row["rows_of_the_root"] for row in rows])
    right.loglog(n, root, "k--", lw=1, label="n * outputs * N, not stored")
    right.set_ylabel("GB")
    for axes in (left, right):
        axes.set_xlabel("N, parameters")
        axes.legend(loc="upper left", fontsize=8)
        axes.grid(alpha=0.3)
    figure.suptitle(f"Low rank {RANK} of 784-4w-w-10, 200 samples, float32", fontsize=10)
    figure.savefig(path, dpi=200)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [*JOBS, "growth"]
    parser.add_argument("names", nargs="*", help=f"of {', '.join(names)}; all by default")
    parser.add_argument("--smallest", type=float, default=1e4, help="N of the growth, default 1e4")
    parser.add_argument("--largest", type=float, default=1e7, help="N of the growth, default 1e7")
    parser.add_argument("--json", type=Path, help="rows of a file that is there stay")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.job:
        print(json.dumps(measure(Job(*json.loads(options.job)))))
        return 0
    chosen = options.names or names
    if not set(chosen) <= set(names):
        parser.error(f"names are of {', '.join(names)}, got {', '.join(chosen)}")
    rows = {name: in_own_process(JOBS[name]) for name in chosen if name in JOBS}
    grown = growth(options.smallest, options.largest) if "growth" in chosen else []
    if options.json:
        content = merged(options.json, rows, grown)
        grown = content["growth"]
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if options.plot and grown:
        plot(grown, options.plot)
    above = [
        f"{name}: {row['compress_s']:.3g} CPU-s (<= {row['limit_s']}), "
        f"{row['peak_GB']:.3g} GB (<= {row['limit_GB']})"
        for name, row in rows.items()
        if row["compress_s"] > row["limit_s"] or row["peak_GB"] > row["limit_GB"]
    ]
    print(*above, sep="\n", end="\n" if above else "")
    return 1 if above else 0


if __name__ == "__main__":
    sys.exit(main())
