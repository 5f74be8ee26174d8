"""SciPy with compressed matrices and factors: eigsh, cg and lobpcg take them as they are."""

import numpy as np
from scipy.sparse.linalg import cg, eigsh, lobpcg

import gpu_hodlr as gh

N, DAMPING = 1500, 1e-2

rng = np.random.default_rng(0)
points = rng.random((N, 2))
op = gh.KernelOperator(points, "matern32", 0.5)
K = gh.compress(op, rtol=1e-5, leaf_size=64)
F = K.factorize(damping=DAMPING)

# Eigenvalues of the compressed matrix: about those of the exact one.
largest = eigsh(K, k=4, v0=np.ones(N), return_eigenvectors=False)
A = op.to_dense()
exact = eigsh(A, k=4, v0=np.ones(N), return_eigenvectors=False)
print("eigsh  of K   ", np.sort(largest)[::-1].round(3))
print("eigsh  exactly", np.sort(exact)[::-1].round(3))

# CG on the exact matrix plus damping; a factor is a preconditioner as SciPy means it.
damped = gh.DenseOperator(A + DAMPING * np.eye(N))
b = rng.standard_normal(N)
iterations = {}
for name, M in (("alone", None), ("with M=F", F)):
    steps: list[np.ndarray] = []
    x, failed = cg(damped, b, M=M, rtol=1e-8, maxiter=5000, callback=steps.append)
    assert not failed
    iterations[name] = len(steps)
    residual = np.linalg.norm(damped @ x - b) / np.linalg.norm(b)
    print(f"cg {name}: {len(steps)} iterations, residual {residual:.1e}")

# The largest eigenvalues once more, by products with blocks of vectors.
values, _ = lobpcg(K, rng.standard_normal((N, 4)), tol=1e-6, maxiter=200)
print("lobpcg of K   ", np.sort(values)[::-1].round(3))

np.testing.assert_allclose(np.sort(largest), np.sort(exact), rtol=1e-3)
np.testing.assert_allclose(np.sort(values), np.sort(largest), rtol=1e-4)
assert iterations["with M=F"] < iterations["alone"] / 5
