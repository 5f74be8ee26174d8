"""Which cases of a test are left to `-m slow`."""

from collections.abc import Iterable
from typing import Any

import pytest


def but_slow(cases: Iterable[Any], *slow: Any) -> list[Any]:
    """Cases for `parametrize`, some of which are slow ones."""
    return [pytest.param(c, marks=pytest.mark.slow) if c in slow else c for c in cases]
