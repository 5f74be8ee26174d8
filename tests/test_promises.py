"""The promise, at scale: every promise of docs/promises.md on cases drawn from the zoo.

`python tests/promises.py NUMBER` repeats one.
"""

import promises
import pytest

FEW, MANY, SHARD = 62, 1_736, 31  # the second is fourteen times the zoo


@pytest.mark.parametrize("start", range(0, FEW, SHARD))
def test_promises_are_kept(start: int):
    found = promises.failures(range(start * 2, (start + SHARD) * 2, 2))
    assert not found, "\n".join(found)


@pytest.mark.slow
@pytest.mark.parametrize("start", range(0, MANY, SHARD))
def test_promises_are_kept_at_scale(start: int):
    found = promises.failures(range(start, start + SHARD))
    assert not found, "\n".join(found)
