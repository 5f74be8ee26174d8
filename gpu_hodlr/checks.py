"""Checks of plain arguments at the door."""

from __future__ import annotations

import numpy as np

from gpu_hodlr.errors import ArgumentError, DtypeError


def check_number(value: object, name: str, *, positive: bool = False) -> float:
    """A finite real number >= 0, or > 0.

    Raises:
        DtypeError: not a real number.
        ArgumentError: negative (or zero), NaN or infinite.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, np.floating, np.integer)):
        raise DtypeError(f"{name} must be a real number, got {type(value).__name__}")
    if not np.isfinite(value) or value < 0 or (positive and value == 0):
        bound = "> 0" if positive else ">= 0"
        raise ArgumentError(f"{name} must be {bound} and finite, got {value}")
    return float(value)


def check_count(value: object, name: str, least: int = 1) -> int:
    """An integer >= least.

    Raises:
        DtypeError: not an integer.
        ArgumentError: less than that.
    """
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise DtypeError(f"{name} must be an integer, got {type(value).__name__}")
    if value < least:
        raise ArgumentError(f"{name} must be >= {least}, got {value}")
    return int(value)
