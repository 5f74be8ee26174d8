"""Torch's own generator, of which a module draws its weights, for ranks that are threads too."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_LOCK = threading.Lock()


@contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """Draws that depend on the seed alone, also where other threads draw; none are left of it.

    Every thread has the same generator: two networks made at once would share its numbers.
    """
    with _LOCK, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
