"""Which error a compression may have."""

from __future__ import annotations

from dataclasses import dataclass

DEFAULT_RTOL = 1e-4
SHARE = 0.1  # of the damping, that the spectral error may be
_FROBENIUS = 3.0  # over the spectral error, at first: 1.1 to 7 of point kernels and networks
_LARGEST = 0.3  # relative, where a damping would allow more
_AIM = 0.8  # of what is allowed, after a miss


@dataclass(frozen=True)
class Tolerance:
    """What is allowed of E = K - K~.

    Attributes:
        rtol: norm(E)_F / norm(K)_F, aimed at first where there is a `spectral` one.
        spectral: norm(E)_2; None: any.
    """

    rtol: float
    spectral: float | None

    @classmethod
    def asked(
        cls, rtol: float | None, atol: float | None, damping: float | None, norm: float
    ) -> Tolerance:
        """From the arguments of `compress`.

        Args:
            rtol: relative to norm(K)_F; 1e-4 where nothing is given.
            atol: of norm(E)_F; with an rtol the larger of the two counts.
            damping: the spectral error is to be a tenth of it at most, whatever else is given.
            norm: norm(K)_F.
        """
        scale = norm or 1.0
        given = [] if rtol is None else [float(rtol)]
        given += [] if atol is None else [float(atol) / scale]
        if damping is None:
            return cls(max(given, default=DEFAULT_RTOL), None)
        spectral = SHARE * damping
        first = min(_FROBENIUS * spectral / scale, _LARGEST)
        return cls(min(first, max(given, default=first)), spectral)

    def keeps(self, spectral_error: float) -> bool:
        """Whether it is no larger than allowed."""
        return self.spectral is None or spectral_error <= self.spectral

    def tighter(self, rtol: float, spectral_error: float) -> float:
        """The rtol to try next."""
        assert self.spectral is not None
        return rtol * _AIM * self.spectral / spectral_error
