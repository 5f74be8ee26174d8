"""Build the test matrices of the GOFMM paper, and tell what they are and what that takes.

python profiling/matrices.py                     every matrix at N = 4,096
python profiling/matrices.py K02 G03 --n 16384   some
"""

from __future__ import annotations

import argparse
import sys
import time

import numpy as np

import gpu_hodlr as gh
from gpu_hodlr.matrices import CASES, NAMES, matrix


def _asymmetry(operator: gh.Operator, samples: int = 256) -> float:
    """The largest |K - K^T| among sampled rows and columns."""
    rng = np.random.default_rng(0)
    rows, cols = rng.integers(operator.shape[0], size=(2, samples))
    return float(abs(operator.entries(rows, cols) - operator.entries(cols, rows).T).max())


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--n", type=int, default=4096, help="rows, default 4096")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    options = parser.parse_args()
    for name in options.names or NAMES:
        start = time.process_time()
        try:
            operator = matrix(name, options.n, options.seed)
        except gh.errors.GpuHodlrError as error:
            parser.error(str(error))
        seconds = time.process_time() - start
        diagonal = operator.diagonal()
        print(
            f"{name}  N {operator.shape[0]:,}  {seconds:.2f} CPU s  "
            f"diagonal {diagonal.min():.3g} .. {diagonal.max():.3g}  "
            f"|K - K^T| {_asymmetry(operator):.1g}  {CASES[name].description}",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
