"""A matrix spread over ranks of MPI: products, solves, save and load.

    mpirun -n 2 python docs/examples/two_ranks.py

pip install "gpu-hodlr[mpi-local]" brings mpi4py and an MPI with mpirun.
"""

import tempfile
from pathlib import Path

import numpy as np
from mpi4py import MPI

import gpu_hodlr as gh

comm = MPI.COMM_WORLD
points = np.random.default_rng(0).random((4000, 2))  # the same on every rank
op = gh.KernelOperator(points, "laplace", 0.1, nugget=1e-2)
K = gh.compress(op, rtol=1e-4, leaf_size=128, comm=comm)
F = K.factorize(damping=0.1)

# Every rank gives its rows of the right-hand side, and gets its rows of the solution.
b = np.sin(10 * points[K.rows, 0])
x = F.solve(b)
residual = K @ x + 0.1 * x - b
squares = comm.allreduce(np.array([residual @ residual, b @ b]))
relative = float(np.sqrt(squares[0] / squares[1]))

counts = comm.gather((len(K.rows), K.nbytes))
folder = comm.bcast(tempfile.mkdtemp() if comm.rank == 0 else None)
path = Path(folder) / "spread.npz"
K.save(path)  # an index, and a file a rank
again = gh.load(path, comm=comm)
same = bool(np.array_equal(again @ b, K @ b))
same = comm.allreduce(same, op=MPI.LAND)
comm.barrier()

logdet = F.logdet()  # a collective call: every rank makes it
if comm.rank == 0:
    alone = gh.load(path)  # on one rank, without MPI
    whole = np.sin(10 * points[:, 0])
    difference = np.abs(alone.factorize(0.1).solve(whole)[K.rows] - x).max()
    for rank, (rows, nbytes) in enumerate(counts):
        print(f"rank {rank}: {rows} rows, {nbytes / 1e6:.2f} MB")
    print(f"residual {relative:.1e}, log-determinant {logdet:.4f}")
    print(f"files: {sorted(p.suffix for p in Path(folder).iterdir())}")
    print(f"loaded on as many ranks: the same products {same}")
    print(f"solved on one rank: differs by {difference:.1e}")
    assert relative < 1e-10
    assert same
    assert difference < 1e-8
    for file in Path(folder).iterdir():
        file.unlink()
    Path(folder).rmdir()
