"""A thread pool over the nodes of a level: one node a task, one BLAS thread a task.

LAPACK and NumPy release the GIL, so threads over nodes scale, while BLAS's own threads on many
small matrices do not (on a busy machine they cost a factor 30 and more).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from itertools import pairwise
from typing import Any

from threadpoolctl import ThreadpoolController

FEW_MULTIPLICATIONS = 1 << 16  # take less time than to hand them to a thread, 30 us, and to wait

_limit_lock = threading.Lock()
_limit_depth = 0
_limiter: Any = None


@lru_cache(maxsize=1)
def num_threads() -> int:
    """Threads used: the processors this process may run on, at most OMP_NUM_THREADS if set."""
    try:
        available = len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        available = os.cpu_count() or 1
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    return min(available, int(wanted)) if wanted.isdigit() and int(wanted) > 0 else available


@lru_cache(maxsize=1)
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(num_threads(), thread_name_prefix="gpu_hodlr")


if hasattr(os, "register_at_fork"):  # a forked child has the pool's object but not its threads
    os.register_at_fork(after_in_child=_pool.cache_clear)


@lru_cache(maxsize=1)
def _controller() -> ThreadpoolController:
    import scipy.linalg  # noqa: F401  SciPy's BLAS must be loaded to be found and limited

    return ThreadpoolController()


@lru_cache(maxsize=1)
def _blas() -> list[Any]:
    return [one for one in _controller().lib_controllers if one.user_api == "blas"]


def _take_control() -> None:
    """Let this thread change the limits, whichever changed them before; call with the lock.

    Newer threadpoolctl leaves OpenBLAS's limit to the first thread that sets one, and does nothing
    for the others, without a word.
    """
    for library in _controller().lib_controllers:
        clear = getattr(library, "clear_controlling_thread", None)
        if clear is not None:
            clear(force=True)


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Limit every BLAS to one thread; re-entrant over threads, the last one out restores.

    The limit is the process's: BLAS called outside has one thread or more as another thread is in
    here or not, and other bits. So every call of the package's own goes through here.
    """
    global _limit_depth, _limiter
    with _limit_lock:
        # To set a limit takes longer than most small products do.
        if _limit_depth == 0 and any(library.num_threads != 1 for library in _blas()):
            _take_control()
            _limiter = _controller().limit(limits=1, user_api="blas")
        _limit_depth += 1
    try:
        yield
    finally:
        with _limit_lock:
            _limit_depth -= 1
            if _limit_depth == 0 and _limiter is not None:
                _take_control()
                _limiter.restore_original_limits()
                _take_control()  # and keep none: users may have limits of their own
                _limiter = None


def over_nodes(work: Callable[[int], None], count: int) -> None:
    """Call work(0), ..., work(count - 1), spread over the pool; the first exception is raised."""
    with one_blas_thread():
        if count == 1 or num_threads() == 1:
            for i in range(count):
                work(i)
        else:
            # Four tasks a thread: little overhead, and an uneven task does not hold up the level.
            _run(lambda start, stop: _each(work, start, stop), _spans(count, 4 * num_threads()))


def over_spans(
    work: Callable[[int, int], None], count: int, multiplications: int = FEW_MULTIPLICATIONS
) -> None:
    """Call work(start, stop) on about equal spans of range(count), one span a thread.

    Of fewer `multiplications` than FEW_MULTIPLICATIONS in all the calling thread does everything.
    """
    with one_blas_thread():
        spans = _spans(count, num_threads() if multiplications >= FEW_MULTIPLICATIONS else 1)
        if len(spans) == 1:
            work(*spans[0])
        else:
            _run(work, spans)


def _run(work: Callable[[int, int], None], spans: list[tuple[int, int]]) -> None:
    for future in [_pool().submit(work, *span) for span in spans]:
        future.result()


def _each(work: Callable[[int], None], start: int, stop: int) -> None:
    for i in range(start, stop):
        work(i)


def _spans(count: int, parts: int) -> list[tuple[int, int]]:
    parts = max(1, min(parts, count))
    edges = [count * p // parts for p in range(parts + 1)]
    return list(pairwise(edges))
