"""Compressions by two threads of one process: the bits of one alone, whatever BLAS may do."""

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import sys, threading
import numpy as np
import gpu_hodlr as gh
from matrix_cases import toeplitz

points = np.random.default_rng(0).random((600, 6))
operators = {
    "dense": gh.DenseOperator(toeplitz(600)),
    "points": gh.KernelOperator(points, "gaussian", 0.7, 0.1),
}

def bits(op, scheme):
    K = gh.compress(op, scheme, rtol=1e-4, leaf_size=40, seed=3)
    F, v = K.factorize(0.5), np.random.default_rng(1).standard_normal((600, 3))
    numbers = K.report.error, K.report.frobenius_norm, F.logdet()
    arrays = *K.structure.arrays(), K @ v, F.solve(v), K.diagonal(), F.sample(2, seed=1)
    return numbers, [a.tobytes() for a in arrays]

def run(name, scheme, alone, others):
    for _ in range(3):
        others.append(bits(operators[name], scheme) != alone)

for name in operators:
    for scheme in ("lowrank", "hss", "hodlr", "auto"):
        alone, others = bits(operators[name], scheme), []
        threads = [
            threading.Thread(target=run, args=(name, scheme, alone, others)) for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        print(name, scheme, len(others), sum(others))
"""


def test_the_bits_of_one_alone():
    folder = Path(__file__).parent
    paths = [str(folder), str(folder.parent), *sys.path]
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=os.environ
        | {"OPENBLAS_NUM_THREADS": "2", "OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"}
        | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    found = [line.split() for line in ran.stdout.splitlines()]
    assert len(found) == 8
    assert [line for line in found if line[2:] != ["6", "0"]] == []
