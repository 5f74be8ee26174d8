"""The HSS matrix: a compressed symmetric matrix and its whole algebra."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from gpu_hodlr.arrays import as_columns
from gpu_hodlr.batched.replay import Replay
from gpu_hodlr.checks import check_number
from gpu_hodlr.devices import (
    Array,
    check_memory,
    device_of,
    memory_errors,
    namespace,
    resolve_device,
    to_host,
)
from gpu_hodlr.errors import NotPositiveDefiniteError
from gpu_hodlr.factor import IndefiniteError, ULVCholesky
from gpu_hodlr.formats.report import CompressionReport
from gpu_hodlr.formats.storage import load_telescope, save_telescope
from gpu_hodlr.krylov import extreme_eigenvalues
from gpu_hodlr.profiling import nvtx_range
from gpu_hodlr.telescope import Telescope
from gpu_hodlr.tree import ClusterTree

_DENSE_CHUNK = 256  # columns of the identity multiplied together by to_dense
_DAMPING_TRIES = 30


class HSSMatrix:
    """A symmetric matrix K~ in hierarchically semiseparable (telescoping) form.

    Made by `gpu_hodlr.compress`. Rows and columns are in the user's order everywhere.

    Attributes:
        shape: (N, N).
        dtype: float32 or float64, of the vectors; the stored arrays may be narrower.
        device: "cpu" or "cuda".
        tree: the cluster tree.
        telescope: the stored arrays.
        report: what the compression did and the error it reached.
    """

    def __init__(self, telescope: Telescope, report: CompressionReport, dtype: Any = None) -> None:
        self.telescope = telescope
        self.report = report
        self.tree = ClusterTree(to_host(telescope.leaves))
        self.shape = (telescope.n, telescope.n)
        self.dtype: np.dtype[Any] = np.dtype(telescope.D.dtype if dtype is None else dtype)
        self.device = device_of(telescope.D)
        self._product = Replay()

    def __repr__(self) -> str:
        n = self.shape[0]
        return (
            f"HSSMatrix({n} x {n}, {self.dtype}, {self.device}, "
            f"{100 * self.storage_fraction:.3g} % stored, error {self.report.error:.2g})"
        )

    def _matmat(self, v: Array) -> Array:
        """K~ v for v (N, k) on this device, computed in the type of the stored blocks."""
        stored = v.astype(self.telescope.D.dtype, copy=False)
        return self.telescope.matmat(stored).astype(self.dtype, copy=False)

    def matmat(self, v: Any) -> Any:
        """K~ v for v (N,) or (N, k); the result is like v.

        Raises:
            ShapeError, DtypeError, DeviceError, ArgumentError: see `arrays.as_columns`.
        """
        columns, restore = as_columns(v, self.shape[0], self.dtype, self.device, "v")
        with nvtx_range("product"), memory_errors("a product", "the columns of v", self.device):
            return restore(self._product(self._matmat, columns))

    def __matmul__(self, v: Any) -> Any:
        return self.matmat(v)

    def diagonal(self) -> Array:
        """The diagonal of K~, (N,); exact where the entries were."""
        return self.telescope.diagonal()

    def trace(self) -> float:
        """The trace of K~."""
        return float(self.diagonal().sum(dtype=np.float64))

    def to_dense(self) -> Array:
        """K~ as an (N, N) array (free memory is checked first).

        Raises:
            MemoryEstimateError: it does not fit.
        """
        n = self.shape[0]
        xp = namespace(self.telescope.D)
        needed = 2 * n * n * self.dtype.itemsize
        check_memory(needed, f"a dense {n} x {n} matrix", "N", self.device)
        dense = xp.empty(self.shape, self.dtype)
        for start in range(0, n, _DENSE_CHUNK):
            unit = xp.eye(n, min(_DENSE_CHUNK, n - start), -start, dtype=self.dtype)
            dense[:, start : start + _DENSE_CHUNK] = self._matmat(unit)
        return dense

    @property
    def ranks(self) -> tuple[tuple[int, ...], ...]:
        """Numerical ranks of all nodes, one tuple a level, leaves first, the root left out."""
        return tuple(level.ranks for level in self.telescope.levels)

    @property
    def num_stored(self) -> int:
        """Floating numbers stored, padding included."""
        return int(sum(a.size for a in self.telescope.arrays()))

    @property
    def storage_fraction(self) -> float:
        """Stored numbers / N^2 (may exceed 1 for tiny or incompressible matrices)."""
        return self.num_stored / self.shape[0] ** 2

    @property
    def nbytes(self) -> int:
        """Bytes of all stored arrays, index arrays included."""
        t = self.telescope
        orders = sum(a.order.nbytes for a in t.levels if a.order is not None)
        return int(sum(a.nbytes for a in t.arrays()) + orders + t.leaves.nbytes)

    def factorize(self, damping: float = 0.0) -> ULVCholesky:
        """ULV-Cholesky factorization of K~ + damping I, in the matrix's dtype.

        Another damping costs another factorization and no compression.

        Args:
            damping: added to the diagonal, >= 0.

        Raises:
            NotPositiveDefiniteError: K~ + damping I is not positive definite; it carries the
                damping that would do and the rtol the wanted damping needs.
            ArgumentError: damping negative, NaN or infinite.
        """
        damping = check_number(damping, "damping")
        telescope = self.telescope.astype(self.dtype)
        try:
            with memory_errors("the factorization", "max_rank, or use float32", self.device):
                return ULVCholesky(telescope, damping)
        except IndefiniteError:
            pass
        raise self._not_positive_definite(telescope, damping)

    def _not_positive_definite(
        self, telescope: Telescope, damping: float
    ) -> NotPositiveDefiniteError:
        """Look for the smallest damping that does, by Lanczos and trial factorizations."""
        smallest, largest = extreme_eigenvalues(self)
        rounding = self.shape[0] * np.finfo(self.dtype).eps * max(largest, -smallest)
        enough = max(-1.02 * smallest, 1.02 * damping, rounding) or 1.0  # any for a zero matrix
        for _ in range(_DAMPING_TRIES):  # Ritz values lie inside the spectrum: verify
            try:
                ULVCholesky(telescope, enough)
                break
            except IndefiniteError:
                enough *= 1.1
        rtol = None
        advice = "no tolerance makes damping 0 safe for a matrix with eigenvalues near 0"
        if damping > 0:
            # The negative eigenvalues are the compression's error: it shrinks with rtol.
            rtol = 0.5 * self.report.rtol * damping / enough
            advice = f"for damping {damping:.3g} compress with rtol about {rtol:.1e}"
        return NotPositiveDefiniteError(
            f"the compressed matrix plus damping {damping:.3g} is not positive definite (smallest "
            f"eigenvalue about {smallest:.3g}); damping {enough:.3g} would do, or {advice}",
            enough,
            rtol,
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one .npz file (format version inside, no pickle).

        The file is complete or absent: an interrupted save leaves an old file whole.
        """
        save_telescope(path, self.telescope, self.report, self.dtype)


def load(path: str | os.PathLike[str], device: str = "cpu") -> HSSMatrix:
    """Read a compressed matrix that `HSSMatrix.save` wrote.

    Args:
        path: of the file; files do not depend on the device.
        device: "cpu" or "cuda", where the matrix is to be.

    Raises:
        DeviceError: the device cannot be used.
        FileNotFoundError: there is no such file.
        FileFormatError: not such a file, damaged, or of a newer format version.
    """
    resolve_device(device)
    telescope, report, dtype = load_telescope(path)
    return HSSMatrix(telescope.to(device), report, dtype)
