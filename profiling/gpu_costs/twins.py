"""Values without the stand-in's slow kernels, so that matrices of true size can be recorded.

The stand-in executes kernels thread by thread. A primitive of `batched` with a NumPy implementation
of the same name, its twin, runs hollow instead: launches are noted and not executed; the values of
its results then come from the twin. An operator's blocks come from the same operator on the CPU.
What has no twin, reads what it has computed, or takes functions as arguments is executed as ever.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
from host_cupy import array, state

from gpu_costs.record import Recorder
from gpu_hodlr import batched


class ReadsError(Exception):
    """A hollow call wants a value that has not been computed."""


def _on_host(x: Any) -> Any:
    """Device arrays as the NumPy arrays they lie in; of a record of arrays, likewise."""
    if isinstance(x, array.ndarray):
        return x._host
    if type(x) in (tuple, list):
        moved = [_on_host(item) for item in x]
        return type(x)(moved) if any(a is not b for a, b in zip(moved, x, strict=True)) else x
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        values = {f.name: getattr(x, f.name) for f in dataclasses.fields(x) if f.init}
        on_host = {name: _on_host(value) for name, value in values.items()}
        changed = {name: on_host[name] for name in values if on_host[name] is not values[name]}
        return dataclasses.replace(x, **changed) if changed else x
    return x


def _filled(result: Any, values: Any) -> bool:
    """Whether the values, those of a twin, fit into the result's arrays, where they are put."""
    if isinstance(result, array.ndarray):
        if isinstance(values, tuple) and values:  # (x, D x), of which the kernel gives the second
            values = values[-1]
        if not isinstance(values, np.ndarray) or values.shape != result.shape:
            return False
        if not np.may_share_memory(result._host, values):
            result._host[...] = values
        return True
    if isinstance(result, (tuple, list)):
        if not isinstance(values, (tuple, list)) or len(values) != len(result):
            return False
        return all(_filled(r, v) for r, v in zip(result, values, strict=True))
    return True


def _steps_done(result: Any) -> float:
    """Of a factorization that may end early, the most: rows of R (nodes, k, m) that are not 0."""
    stacks = [x._host for x in result if isinstance(x, array.ndarray) and x.ndim == 3]
    return float(max((x.any(axis=2).sum(axis=1).max() for x in stacks if x.size), default=0))


def substituted(
    recorder: Recorder, name: str, on_device: Callable[..., Any], twin: Callable[..., Any],
    by_name: bool = False,
) -> Callable[..., Any]:  # fmt: skip
    """The function on the device, hollow, with the values of its twin.

    Args:
        recorder: which notes the launches.
        name: for `recorder.executed`.
        on_device: the function.
        twin: the same of NumPy arrays.
        by_name: whether the twin is called by keywords.
    """
    signature = inspect.signature(on_device)

    def values_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if by_name:
            args, kwargs = (), dict(signature.bind(*args, **kwargs).arguments)
        try:
            return twin(*_on_host(args), **{k: _on_host(v) for k, v in kwargs.items()})
        except (TypeError, IndexError):  # its arguments are others, or objects with device arrays
            return None

    def call(*args: Any, **kwargs: Any) -> Any:
        given = (*args, *kwargs.values())
        plain = recorder.is_hollow or recorder.muted or state.captures
        of_arrays = any(isinstance(x, np.ndarray) or _on_host(x) is not x for x in given)
        if plain or not of_arrays or any(inspect.isroutine(x) for x in given):
            return on_device(*args, **kwargs)
        before = len(recorder.steps)
        try:
            with recorder.hollow():
                result = on_device(*args, **kwargs)
        except ReadsError:  # what is called within may have twins
            del recorder.steps[before:]
            recorder.executed.add(name)
            return on_device(*args, **kwargs)
        with recorder.unseen():
            if not _filled(result, values_of(args, kwargs)):
                recorder.executed.add(name)
                return on_device(*args, **kwargs)
            for step in recorder.steps[before:]:
                if step.numbers.get("threshold", -1.0) >= 0.0:
                    step.numbers["done"] = _steps_done(result)
        return result

    return call


def use_twins(recorder: Recorder) -> None:
    """All primitives that have a twin; they are imported anew once the stand-in is gone.

    Those of cupy_X have it in numpy_X. Where there are only raw kernels for narrow products, X has
    the wide ones of the same names, which take any columns.
    """
    names = {module.name for module in pkgutil.iter_modules(batched.__path__)}
    for name in sorted(names):
        library, _, rest = name.partition("_")
        twin = next((other for other in (f"numpy_{rest}", rest) if other in names), None)
        if library == "cupy" and twin is not None:
            _use(recorder, _module(name), _module(twin), by_name=twin == rest)


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"{batched.__name__}.{name}")


def _use(recorder: Recorder, on_device: ModuleType, on_host: ModuleType, by_name: bool) -> None:
    for name, mine in list(vars(on_device).items()):
        twin = getattr(on_host, name, None)
        theirs = getattr(mine, "__module__", "") != on_device.__name__
        if name.startswith("_") or theirs:
            continue
        where = f"{on_device.__name__}.{name}"
        if inspect.isfunction(twin) and inspect.isfunction(mine):
            setattr(on_device, name, substituted(recorder, where, mine, twin, by_name))
        elif inspect.isclass(twin) and inspect.isclass(mine):
            _use_class(recorder, where, mine, twin)


def _use_class(recorder: Recorder, where: str, on_device: Any, on_host: Any) -> None:
    """Every object has a twin made of copies of its arguments: they may be overwritten."""
    init = on_device.__init__

    def made(this: Any, *args: Any) -> None:
        init(this, *args)
        with recorder.unseen():
            copies = (x.copy() if isinstance(x, np.ndarray) else x for x in map(_on_host, args))
            this.twin = on_host(*copies)

    def method(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(this: Any, *args: Any) -> Any:
            bound = original.__get__(this)
            twin = getattr(this.twin, name)
            return substituted(recorder, f"{where}.{name}", bound, twin)(*args)

        return call

    on_device.__init__ = made
    for name, original in list(vars(on_device).items()):
        if inspect.isfunction(original) and hasattr(on_host, name) and not name.startswith("_"):
            setattr(on_device, name, method(name, original))


def blocks_by(recorder: Recorder, operator: Any, twin: Any) -> None:
    """Blocks of an operator get their values from the same operator on the CPU."""
    operator._blocks = substituted(recorder, "_blocks", operator._blocks, twin._blocks)
