"""A progress bar that whoever works at a level moves on, without being handed it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from gpu_hodlr.errors import ArgumentError

_TICK: ContextVar[Callable[[], None] | None] = ContextVar("tick", default=None)


def check_bar(show: bool) -> None:
    """Refuse a bar that there cannot be, before the work.

    Raises:
        ArgumentError: tqdm is not installed.
    """
    if show and importlib.util.find_spec("tqdm") is None:
        raise ArgumentError("progress needs tqdm, which is not installed: pip install tqdm")


@contextmanager
def bar(show: bool, levels: int) -> Iterator[None]:
    """A bar on stderr while the block runs; further sweeps lengthen it.

    Args:
        show: whether there is one (needs tqdm); without, `tick` does nothing.
        levels: of one sweep.
    """
    if not show:
        with _ticking(None):
            yield
        return
    from tqdm import tqdm

    with tqdm(total=levels, desc="compress", unit="level", leave=False) as shown:

        def move_on() -> None:
            if shown.n == shown.total:
                shown.total += levels
            shown.update()

        with _ticking(move_on):
            yield


def tick() -> None:
    """A level is done: move the bar of this thread's `bar` on, if there is one."""
    move_on = _TICK.get()
    if move_on is not None:
        move_on()


@contextmanager
def _ticking(move_on: Callable[[], None] | None) -> Iterator[None]:
    token = _TICK.set(move_on)
    try:
        yield
    finally:
        _TICK.reset(token)
