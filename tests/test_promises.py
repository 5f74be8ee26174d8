"""The promise, at scale: every promise of docs/promises.md on cases drawn from the zoo.

`python tests/promises.py NUMBER` repeats one.
"""

import promises
import pytest

FEW, MANY, SHARD = 62, 4_960, 62  # the second is forty times the zoo


@pytest.mark.parametrize("start", range(4))
def test_promises_are_kept(start: int):
    found = promises.failures(range(start * 2, 2 * FEW, 8))
    assert not found, "\n".join(found)


@pytest.mark.slow
@pytest.mark.scale
@pytest.mark.parametrize("start", range(0, MANY, SHARD))
def test_promises_are_kept_at_scale(start: int):
    found = promises.failures(range(start, start + SHARD))
    assert not found, "\n".join(found)
