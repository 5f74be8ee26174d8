"""How near a compressed matrix is to the one it stands for, as far as that was measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from gpu_hodlr.checks import check_number

_SURE = 1.3  # times a spectral norm measured: 0.8 to 1 of what it is (0.8 where all is noise)


@dataclass(frozen=True)
class Accuracy:
    """What is known of E = K - K~.

    Attributes:
        rtol: to which K was compressed.
        error: norm(E)_F / norm(K)_F, measured; None where it is not known, as the next.
        norm: norm(K)_F.
        spectral: norm(E)_2.
        sampled: whether that was estimated without products of K, to a factor of two or so.
    """

    rtol: float
    error: float | None = None
    norm: float | None = None
    spectral: float | None = None
    sampled: bool = False

    @property
    def frobenius(self) -> float | None:
        """norm(E)_F."""
        return None if self.error is None or self.norm is None else self.error * self.norm

    @property
    def bound(self) -> float | None:
        """What norm(E)_2 does not exceed: 1.3 times what was measured, or else norm(E)_F."""
        known = self.spectral is not None and not self.sampled
        return _SURE * self.spectral if known and self.spectral is not None else self.frobenius

    @classmethod
    def read(cls, said: Mapping[str, Any]) -> Self:
        """From what a file says.

        Raises:
            KeyError, TypeError, ValueError: it says something that cannot be.
        """

        def optional(name: str) -> float | None:
            return None if said[name] is None else check_number(said[name], name)

        return cls(
            check_number(said["rtol"], "rtol"),
            optional("error"),
            optional("norm"),
            optional("spectral"),
            bool(said["sampled"]),
        )
