"""A Gauss-Newton matrix compressed as closely as a prior needs it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from gpu_hodlr import streams
from gpu_hodlr.applications.laplace.prior import Prior
from gpu_hodlr.compressed.structured import StructuredMatrix
from gpu_hodlr.compression import compress
from gpu_hodlr.compression.options import CAP
from gpu_hodlr.compression.tolerance import SHARE
from gpu_hodlr.devices import Array, move, to_host
from gpu_hodlr.errors import AccuracyWarning, ArgumentError
from gpu_hodlr.factor.probing import trace_probes
from gpu_hodlr.operators import Operator
from gpu_hodlr.schemes.lowrank import few_rows

_SMALL = 5000  # up to where HSS is taken unasked
_MOST_RANK = 2500  # by default: no block row of a small matrix has more
_MOST_ROWS = 10_000  # of a root, whose eigenvectors take minutes then
_REACHED = {4: 1e-6, 8: 1e-12}  # relative error by bytes of a number: no closer
_MISSED = 5e-4  # Frobenius norm over the prior, of what low rank of few rows may leave out
_MARGIN = 2.0  # a smaller prior is likely followed by a smaller one
_MEASURED = 1.1  # the spectral error, from below, is mostly within so much


class Curvature:
    """G, and the factors of G + P.

    Args:
        op: G; None where it is not known any more, as of what was loaded.
        matrix: G compressed; None for not yet.
        options: of `compress`; scheme among them.

    Attributes:
        matrix: G compressed.
    """

    def __init__(
        self, op: Operator | None, matrix: StructuredMatrix | None, options: Mapping[str, Any]
    ) -> None:
        self._op, self._options, self._closer = op, dict(options), False
        if op is not None:
            self._set_defaults(op)
        self._made: StructuredMatrix | None = matrix
        self._least: float | None = None if matrix is None else matrix.report.damping

    @property
    def matrix(self) -> StructuredMatrix:
        """G compressed."""
        assert self._made is not None
        return self._made

    def factor(self, prior: Prior) -> Any:
        """The factor of G + P, of a G whose error is a tenth of the smallest precision.

        Raises:
            NotPositiveDefiniteError: see `CompressedMatrix.factorize`; a rank cap keeps the error
                larger than that.
        """
        least = prior.least
        # Of what is closer than its spectral error must be, that does not say enough.
        if self._made is None or (
            self._may_be_closer(least) and (self._closer or not self._keeps(least))
        ):
            wanted = least if self._made is None else least / _MARGIN
            op, closer = self._op, dict[str, Any]()
            if self._closer and op is not None:
                closer = {"atol": _MISSED * wanted, "rtol": _REACHED[op.dtype.itemsize]}
            made: Any = compress(op, damping=wanted, **(self._options | closer))
            self._made, self._least = made, wanted
        matrix = self.matrix
        damping: float | Array = prior.damping
        if not isinstance(damping, float):
            damping = move(damping.astype(matrix.dtype), matrix.device)
        return matrix.factorize(damping)

    def warn(self, prior: Prior, frames: int) -> None:
        """Say so where the error is larger than the prior allows.

        Warns:
            AccuracyWarning: see there.
        """
        error, ranks = self.matrix.report.spectral_error, self.matrix.owners.comm
        if self._keeps(prior.least) or ranks.rank:
            return
        why = "give dtype=torch.float64" if self.matrix.dtype.itemsize == 4 else "raise max_rank"
        if self.matrix.report.rank_cap_hit:
            why = "raise max_rank"
        if self._op is None:
            why = "a loaded posterior has no data to compress it more closely: make it again"
        warnings.warn(
            f"the Gauss-Newton matrix is compressed with an error of {error:.3g} in the spectral "
            f"norm, more than a tenth of the smallest prior precision, {prior.least:.3g}: marginal "
            f"likelihood and variances may be off; {why}",
            AccuracyWarning,
            stacklevel=frames + 1,
        )

    def missed(self, factor: Any, num_probes: int, seed: int) -> tuple[float, float]:
        """Half of tr((K + P)^-1 (G - K)), and its standard error.

        Raises:
            ArgumentError: G is not known any more.
        """
        if self._op is None:
            raise ArgumentError("a loaded posterior has no data to be compared with")
        n, K = factor.shape[0], self.matrix
        z = trace_probes(n, num_probes, (seed, streams.TRACE), K.dtype, K.device)
        y = factor.solve(z)
        exact = self._op.to(K.device) @ y
        dots = to_host(((exact - K @ y) * z).sum(axis=0, dtype=np.float64))
        error = dots.std(ddof=1) / np.sqrt(len(dots)) if num_probes < n else 0.0
        return 0.5 * float(dots.mean()), 0.5 * float(error)

    def _set_defaults(self, op: Operator) -> None:
        """What is taken where the user gives nothing.

        A prior is small against G: ranks are larger than those that products need, and the smallest
        form need not be the cheapest to factorize again and again: the eigenbasis is not where many
        entries count. Low rank is where a root has few rows: its eigenvalues are exact, a number
        that is added to all of them costs nothing, and so little is left out that its trace, of one
        sign and missed in a log-determinant, does not count. Of other low rank the diagonal of the
        rest is kept, which mends that.
        """
        n, found = op.shape[0], self._options
        most = min(max(n // 2, CAP), _MOST_RANK)
        if found["scheme"] == "auto" and n <= _SMALL:
            found["scheme"] = "hss"
        elif found["scheme"] in ("auto", "lowrank") and "max_rank" not in found:
            root = op.dual()
            if root is not None and root.rows <= _MOST_ROWS and few_rows(op, root.rows) is not None:
                found["scheme"], most = "lowrank", root.rows
                self._closer = not {"rtol", "atol", "tail"} & set(found)
        found.setdefault("max_rank", most)
        if op.has_diagonal and found["scheme"] in ("auto", "lowrank") and not self._closer:
            found.setdefault("tail", "diagonal")

    def _keeps(self, least: float) -> bool:
        error = self.matrix.report.spectral_error
        return error is None or error <= _MEASURED * SHARE * least

    def _may_be_closer(self, least: float) -> bool:
        """Whether it was never compressed for so small a precision."""
        return self._op is not None and (self._least is None or least < self._least)
