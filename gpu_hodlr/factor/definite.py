"""Cholesky factors of one level after the other, and whether all blocks were positive definite."""

from __future__ import annotations

from gpu_hodlr import batched
from gpu_hodlr.devices import Array, reads_wait, to_hosts
from gpu_hodlr.factor.solver import IndefiniteError


class Definite:
    """Cholesky factors of one level after the other: a GPU is asked at the end whether all were.

    Where reading costs nothing every stack is looked at, and the work ends with the first that is
    not positive definite.

    Args:
        device: of the stacks.
    """

    def __init__(self, device: str) -> None:
        self._later = reads_wait(device)
        self._info: list[Array] = []

    def cholesky(self, a: Array) -> Array:
        """Stack of lower Cholesky factors, in the memory of a, where that can be.

        Raises:
            IndefiniteError: a block is not positive definite, and is known to be.
        """
        lower, info = batched.cholesky(a, overwrite=True)
        self._info.append(info)
        if not self._later:
            self.check()
        return lower

    def check(self) -> None:
        """Wait for what was not looked at.

        Raises:
            IndefiniteError: a block was not positive definite.
        """
        if any(info.any() for info in to_hosts(*self._info)):
            raise IndefiniteError
        self._info.clear()
