"""The stand-in's functions with a recorder beside them: what is asked for, with its sizes."""

from __future__ import annotations

import ctypes
import gc
import importlib
import inspect
import re
import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache, partial
from typing import Any
from unittest.mock import patch

from gpu_steps.entry_points import stem
from host_cuda import runner
from host_cupy import array, cuda, functions, generators, kernels, memory, state

from gpu_costs import steps as kinds
from gpu_costs.quick_gemm import multiplied
from gpu_costs.record import Recorder
from gpu_costs.steps import Operand, Step
from gpu_costs.twins import ReadsError
from gpu_hodlr import profiling

_COUNTED = {
    "launches": kinds.KERNEL, "library_calls": kinds.LIBRARY, "array_operations": kinds.ARRAY,
    "graph_launches": kinds.GRAPH, "synchronizations": kinds.WAIT, "host_to_device": kinds.COPY,
}  # fmt: skip
_SETTINGS = re.compile(r"cublas(Set|Get|Create|Destroy)")
_FLOAT32 = re.compile(r"_f32(_\d+)?$")
Function = Callable[..., Any]


def watching(recorder: Recorder) -> ExitStack:
    """Watch the stand-in, which is installed, until the stack is closed."""
    stack = ExitStack()
    _watch_counters(stack, recorder)
    for original, watch in (
        (array.apply, _apply), (array.product, _product), (functions.array, _array),
        (functions.eigh, _set_aside), (functions.eigvalsh, _set_aside),
        (functions.svd, _set_aside),
    ):  # fmt: skip
        _replace_everywhere(stack, original, watch(recorder, original))
    stack.enter_context(patch.object(array.ndarray, "_apply", staticmethod(array.apply)))
    for owner, name, watch in (
        (kernels.RawKernel, "__call__", _launch),
        (array.ndarray, "get", _get), (array.ndarray, "__init__", _init),
        (array.ndarray, "__setitem__", _setitem), (array.ndarray, "set", _set_aside),
        (array.ndarray, "_view_or_copy", _set_aside), (generators.Generator, "_draw", _set_aside),
        (memory.PooledMemory, "__del__", _set_aside),
        (kernels.RawModule, "compile", _set_aside), (kernels.RawModule, "get_function", _set_aside),
        (state, "enqueue", _enqueue), (state, "read", _read), (state, "is_capturing", _capturing),
        (cuda.Stream, "begin_capture", _begin), (cuda.Stream, "end_capture", _end),
        (cuda.Stream, "wait_event", _follow), (cuda.Event, "record", _mark),
        (cuda.Graph, "launch", _replay), (ctypes, "CDLL", _load),
    ):  # fmt: skip
        watched = watch(recorder, getattr(owner, name))
        stack.enter_context(patch.object(owner, name, watched))
    cusolver = importlib.import_module("cupy_backends.cuda.libs").cusolver
    for name, function in list(vars(cusolver).items()):
        if inspect.isroutine(function):
            watched = _library_call(recorder, name, function, None)
            stack.enter_context(patch.object(cusolver, name, watched))
    gc.callbacks.append(recorder.collecting)
    stack.callback(gc.callbacks.remove, recorder.collecting)
    stack.enter_context(patch.object(profiling, "_DOMAIN", recorder))
    profiling.nvtx_range.cache_clear()
    stack.callback(profiling.nvtx_range.cache_clear)
    return stack


def _watch_counters(stack: ExitStack, recorder: Recorder) -> None:
    class Noting(state.Counters):
        def __setattr__(self, name: str, value: int) -> None:
            grown = name in _COUNTED and value > getattr(self, name)
            super().__setattr__(name, value)
            if grown:
                recorder.note(_COUNTED[name])

    counters = state.counters
    stack.callback(setattr, counters, "__class__", type(counters))
    counters.__class__ = Noting  # type: ignore[assignment]


def _replace_everywhere(stack: ExitStack, original: Function, watched: Function) -> None:
    """Under whatever name a module of the stand-in calls the function."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in ("host_cupy", "cupy"):
            for key, value in list(vars(module).items()):
                if value is original:
                    stack.enter_context(patch.object(module, key, watched))


def _operand(x: Any) -> Operand:
    return Operand(tuple(x.shape), int(x.dtype.itemsize))


def _operands(xs: Any) -> dict[str, Operand]:
    arrays = [x for x in xs if isinstance(x, array.ndarray)]
    return {f"in{i}": _operand(x) for i, x in enumerate(arrays)}


def _function_name(function: Any) -> str:
    """Of a function, or of the one a lambda is written in."""
    name = getattr(function, "__qualname__", type(function).__name__)
    return [part for part in name.split(".") if not part.startswith("<")][-1]


# ---- CuPy's own operations, copies, reads ----------------------------------------------------


def _apply(recorder: Recorder, original: Function) -> Function:
    def apply(compute: Any, *operands: Any, out: Any = None, **options: Any) -> Any:
        step = Step(kinds.ARRAY, _function_name(compute), operands=_operands(operands))
        with recorder.described(step):
            result = original(compute, *operands, out=out, **options)
        step.operands["out"] = _operand(result)
        return result

    return apply


def _product(recorder: Recorder, original: Function) -> Function:
    """CuBLAS by CuPy: the stand-in counts the array that it makes as well."""

    def product(compute: Any, *operands: Any, out: Any = None) -> Any:
        step = Step(kinds.LIBRARY, _function_name(compute), operands=_operands(operands))
        with recorder.described(step):
            result = original(compute, *operands, out=out)
        step.operands["out"] = _operand(result)
        noted = recorder.list
        if len(noted) > 1 and noted[-2] is step:
            noted.pop()
        return result

    return product


def _array(recorder: Recorder, original: Function) -> Function:
    def make(*args: Any, **kwargs: Any) -> Any:
        step = Step(kinds.COPY, "asarray")
        with recorder.described(step):
            result = original(*args, **kwargs)
        step.operands["out"] = _operand(result)
        recorder.uncomputed.discard(id(result))
        return result

    return make


def _init(recorder: Recorder, original: Function) -> Function:
    def init(this: Any, *args: Any, **kwargs: Any) -> None:
        with recorder.aside():
            original(this, *args, **kwargs)
        if recorder.is_hollow:
            recorder.uncomputed.add(id(this))

    return init


def _setitem(recorder: Recorder, original: Function) -> Function:
    """By indices; what is assigned without them is an operation like others."""

    def setitem(this: Any, key: Any, value: Any) -> None:
        parts = key if isinstance(key, tuple) else (key,)
        step = Step(kinds.ARRAY, "setitem", operands=_operands((*parts, value)))
        with recorder.described(step):
            original(this, key, value)

    return setitem


def _set_aside(recorder: Recorder, original: Function) -> Function:
    def aside(*args: Any, **kwargs: Any) -> Any:
        with recorder.aside():
            return original(*args, **kwargs)

    return aside


def _get(recorder: Recorder, original: Function) -> Function:
    def get(this: Any, *args: Any, **kwargs: Any) -> Any:
        owner = this if this.base is None else this.base
        if recorder.is_hollow and id(owner) in recorder.uncomputed:
            raise ReadsError
        with recorder.described(Step(kinds.WAIT, "get", operands={"out": _operand(this)})):
            return original(this, *args, **kwargs)

    return get


def _read(recorder: Recorder, original: Function) -> Function:
    def read(what: str) -> None:
        if recorder.is_hollow and what != "get":  # masks: of how many values is not known
            raise ReadsError(what)
        original(what)

    return read


# ---- Kernels and libraries -------------------------------------------------------------------


@cache
def _parameters(code: str) -> dict[str, list[str]]:
    """Names of the parameters of a source's kernels."""
    text = runner._run([runner.COMPILER, "-E", "-P", "-x", "c++", "-"], code)
    found = runner._ENTRY_POINT.findall(re.sub(r"\s+", " ", text))
    return {
        name: [one.split()[-1].lstrip("*") for one in given.split(",")] for name, given in found
    }


def _launch(recorder: Recorder, original: Function) -> Function:
    def launch(kernel: Any, grid: Any, block: Any, args: Any, *, shared_mem: int = 0) -> None:
        with recorder.aside():
            names = _parameters(kernel._module._code)[kernel.name]
        given = dict(zip(names, args, strict=False))  # a wrong number is the stand-in's to refuse
        arrays = {k: _operand(x) for k, x in given.items() if isinstance(x, array.ndarray)}
        numbers = {k: float(x) for k, x in given.items() if k not in arrays}
        numbers["itemsize"] = 4.0 if _FLOAT32.search(kernel.name) else 8.0
        step = Step(
            kinds.KERNEL, stem(kernel.name), grid=grid, block=block, shared=shared_mem,
            operands=arrays, numbers=numbers,
        )  # fmt: skip
        with recorder.described(step):
            original(kernel, grid, block, args, shared_mem=shared_mem)

    return launch


def _library_call(
    recorder: Recorder, name: str, original: Function, success: int | None
) -> Function:
    """A call of cuBLAS's or cuSOLVER's interface, whose numbers are known by their place."""

    def call(*args: Any) -> Any:
        plain = [getattr(x, "value", x) for x in args]
        numbers = {str(i): float(x) for i, x in enumerate(plain) if isinstance(x, (int, float))}
        with recorder.described(Step(kinds.LIBRARY, name, numbers=numbers)):
            if recorder.is_hollow or (not state.captures and multiplied(name, args)):
                state.counters.library_calls += 1
                return success
            return original(*args)

    return call


class _CuBlas:
    """The loaded library; its settings are passed on."""

    def __init__(self, recorder: Recorder, library: ctypes.CDLL) -> None:
        self._recorder, self._library = recorder, library

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._library, name)
        if not _SETTINGS.match(name):
            function = _library_call(self._recorder, name, function, 0)
        setattr(self, name, function)
        return function


def _load(recorder: Recorder, original: Any) -> Any:
    def load(name: Any, *args: Any, **kwargs: Any) -> Any:
        library = original(name, *args, **kwargs)
        return _CuBlas(recorder, library) if "cublas" in str(name) else library

    return load


# ---- Graphs, streams, events, and what is not executed ---------------------------------------


def _enqueue(recorder: Recorder, original: Function) -> Function:
    def enqueue(*args: Any) -> None:
        if not recorder.is_hollow:
            with recorder.aside():
                original(*args)

    return enqueue


def _capturing(recorder: Recorder, original: Function) -> Function:
    """While hollow CuPy's operations compute a shape alone, as in a capture."""
    return lambda: recorder.is_hollow or original()


def _begin(recorder: Recorder, original: Function) -> Function:
    def begin(stream: Any, *args: Any) -> None:
        original(stream, *args)
        recorder.capture = []

    return begin


def _end(recorder: Recorder, original: Function) -> Function:
    def end(stream: Any) -> Any:
        captured, recorder.capture = recorder.capture, None
        graph = original(stream)
        graph.steps = captured
        return graph

    return end


def _replay(recorder: Recorder, original: Function) -> Function:
    def launch(graph: Any, stream: Any = None) -> None:
        with recorder.described(Step(kinds.GRAPH, "graph", inside=list(graph.steps))):
            original(graph, stream)

    return launch


def _event(recorder: Recorder, original: Function, kind: str) -> Function:
    def call(this: Any, other: Any = None) -> None:
        original(this, other)
        event, stream = (this, other) if kind == kinds.EVENT else (other, this)
        recorder.append(Step(kind, event=int(event.ptr)), stream)

    return call


_mark = partial(_event, kind=kinds.EVENT)
_follow = partial(_event, kind=kinds.FOLLOW)
