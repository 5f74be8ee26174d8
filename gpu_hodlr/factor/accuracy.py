"""How near a compressed matrix is to the one it stands for, as far as that was measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from gpu_hodlr.checks import check_number

_SURE = 1.25  # times a spectral norm: Ritz values lie below it, by a few per cent where it counts


@dataclass(frozen=True)
class Accuracy:
    """What is known of E = K - K~.

    Attributes:
        rtol: to which K was compressed.
        error: norm(E)_F / norm(K)_F, measured; None where it is not known, as the next.
        norm: norm(K)_F.
        spectral: norm(E)_2, measured with products of K.
    """

    rtol: float
    error: float | None = None
    norm: float | None = None
    spectral: float | None = None

    @property
    def frobenius(self) -> float | None:
        """norm(E)_F."""
        return None if self.error is None or self.norm is None else self.error * self.norm

    @property
    def bound(self) -> float | None:
        """What norm(E)_2 does not exceed: a quarter more than measured, or else norm(E)_F."""
        return self.frobenius if self.spectral is None else _SURE * self.spectral

    @classmethod
    def read(cls, said: Mapping[str, Any]) -> Self:
        """From what a file says.

        Raises:
            KeyError, TypeError, ValueError: it says something that cannot be.
        """
        return cls(
            check_number(said["rtol"], "rtol"),
            *(
                None if said[name] is None else check_number(said[name], name)
                for name in ("error", "norm", "spectral")
            ),
        )
