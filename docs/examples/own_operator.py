"""An operator of one's own: the covariance of images under a blur, never formed.

K = B B^T + I / 100 for a blur B of a signal: `_matmat` convolves, `_block` reads the
autocorrelation of the blur. `check_operator` says whether the two agree, and what is wrong where
they do not.
"""

import numpy as np
from scipy.ndimage import correlate1d

import gpu_hodlr as gh

KERNEL = np.exp(-0.5 * (np.arange(-15, 16) / 5.0) ** 2)
SHIFT = 0.01


class Blurred(gh.Operator):
    """K = B B^T + SHIFT I, B the circular convolution of n numbers with KERNEL."""

    definite = True

    def __init__(self, n: int) -> None:
        super().__init__(n, np.float64)
        spectrum = np.abs(np.fft.rfft(KERNEL, n)) ** 2
        self.row = np.fft.irfft(spectrum, n)  # K is circulant: its first row, but for the shift

    def _matmat(self, v: np.ndarray) -> np.ndarray:
        once = correlate1d(v, KERNEL, axis=0, mode="wrap")
        return correlate1d(once, KERNEL, axis=0, mode="wrap") + SHIFT * v

    def _block(self, rows: np.ndarray, cols: np.ndarray) -> np.ndarray:
        gap = np.abs(rows[:, None] - cols)
        return self.row[gap] + SHIFT * (gap == 0)


class Forgetful(Blurred):
    """The same, whose entries forget the shift."""

    def _block(self, rows: np.ndarray, cols: np.ndarray) -> np.ndarray:
        return self.row[np.abs(rows[:, None] - cols)]


n = 3000
op = Blurred(n)
gh.testing.check_operator(Blurred(300))
print(op, "keeps the contract")

try:
    gh.testing.check_operator(Forgetful(300))
except AssertionError as error:
    print("check_operator:", error)
else:
    raise AssertionError("a wrong operator went unnoticed")

K = gh.compress(op, rtol=1e-8, leaf_size=128)
print(K)
F = K.factorize()
signal = np.sin(np.linspace(0, 20, n))
error = np.abs(F.solve(op @ signal) - signal).max()
print(f"largest error of the deblurred signal {error:.1e}")

eigenvalues = np.fft.fft(op.row).real + SHIFT  # of a circulant matrix
print(f"log-determinant {F.logdet():.4f}, exactly {np.log(eigenvalues).sum():.4f}")

assert error < 1e-3
assert abs(F.logdet() - np.log(eigenvalues).sum()) < 1e-2
