"""The promise, at scale: every promise of docs/promises.md on cases drawn from the zoo.

`python tests/promises.py NUMBER` repeats one.
"""

import promises
import pytest
from marks import but_slow

BROKEN_ONCE = (351, 784, 1642, 2530, 2637, 2914, 3388)
FEW, MANY, SHARD = 62, 4_960, 62  # the second is forty times the zoo


@pytest.mark.parametrize("start", range(4))
def test_promises_are_kept(start: int):
    found = promises.failures(range(start * 2, 2 * FEW, 8))
    assert not found, "\n".join(found)


@pytest.mark.parametrize("index", but_slow(BROKEN_ONCE, 1642, 2914))
def test_what_was_broken_once(index: int):
    found = promises.failures([index])
    assert not found, "\n".join(found)


@pytest.mark.slow
@pytest.mark.scale
@pytest.mark.parametrize("start", range(0, MANY, SHARD))
def test_promises_are_kept_at_scale(start: int):
    found = promises.failures(range(start, start + SHARD))
    assert not found, "\n".join(found)
