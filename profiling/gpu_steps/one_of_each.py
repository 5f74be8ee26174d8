"""One launch of each kernel that takes time, for ncu: python -m gpu_steps.one_of_each [--tiny]."""

from __future__ import annotations

import sys

import numpy as np

from gpu_hodlr.devices import synchronize
from gpu_steps.kernel_calls import LEVELS, TINY, calls
from gpu_steps.ncu import KERNELS


def main() -> int:
    level = TINY if "--tiny" in sys.argv[1:] else LEVELS[0]
    left = set(KERNELS)
    for call in calls(level, np.float64, (8, 64)):
        mine = {name for name in left if any(stem.startswith(name) for stem in call.kernels)}
        if mine:
            call.work()
            left -= mine
    synchronize("cuda")
    print(f"not launched: {', '.join(sorted(left)) or 'none'}", flush=True)
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
