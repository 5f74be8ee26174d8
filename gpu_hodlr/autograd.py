"""Gradients of torch through products and solves: maps that are linear in one vector.

A map x -> A x has the derivative A, and what a gradient g is pulled back by is A^T g: one more
product or solve with the same matrix. The matrix itself is a constant. torch is not imported by
this module before a tensor comes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial, wraps
from inspect import signature
from typing import TYPE_CHECKING, Any, TypeVar

from gpu_hodlr.devices import is_torch
from gpu_hodlr.errors import ShapeError

if TYPE_CHECKING:
    import torch

Method = TypeVar("Method", bound=Callable[..., Any])
Map = Callable[[Any], Any]


def linear(x: Any, apply: Map, again: Map, adjoint: Map) -> Any:
    """apply(x); where x is a torch tensor as a function that torch can differentiate.

    Any number of derivatives, in reverse and forward mode, and `torch.func.vmap`, which multiplies
    by all vectors at once.

    Args:
        x: (N,) or (N, k), of any library.
        apply: the map, of tensors without gradients.
        again: the same of what is to be differentiated again: it calls this function.
        adjoint: its transpose, likewise.
    """
    return _call()(x, apply, again, adjoint) if is_torch(x) else apply(x)


def symmetric(method: Method) -> Method:
    """Of a method f(self, x, ...), symmetric in x, one that torch can differentiate in x."""
    return _differentiable(method, lambda options: options)


def transposable(method: Method) -> Method:
    """The same of a method f(self, x, *, transpose=False), which can transpose itself."""
    return _differentiable(
        method, lambda options: {**options, "transpose": not options.get("transpose", False)}
    )


def _differentiable(
    method: Method, transposed: Callable[[dict[str, Any]], dict[str, Any]]
) -> Method:
    """See `symmetric`; `transposed` gives the options that make it its transpose."""
    name = list(signature(method).parameters)[1]

    @wraps(method)
    def differentiable(self: Any, *args: Any, **options: Any) -> Any:
        if not args and name in options:
            args = (options.pop(name),)
        if not args or not is_torch(args[0]):
            return method(self, *args, **options)
        x, *others = args
        again = partial(differentiable, self)
        return linear(
            x,
            lambda z: method(self, z, *others, **options),
            lambda z: again(z, *others, **options),
            lambda z: again(z, *others, **transposed(options)),
        )

    return differentiable  # type: ignore[return-value]


_CALLS: dict[bool, Callable[..., Any]] = {}  # made when the first tensor comes


def _call() -> Callable[..., Any]:
    """What makes an application a node of torch's graph; torch.compile leaves it alone.

    It would trace what is done in NumPy, and sum in another order.
    """
    compiling = "torch._dynamo" in sys.modules
    if compiling not in _CALLS:
        call = _function().apply
        _CALLS[compiling] = sys.modules["torch"].compiler.disable(call) if compiling else call
    return _CALLS[compiling]


def _function() -> type[torch.autograd.Function]:
    import torch

    class Linear(torch.autograd.Function):  # type: ignore[misc]  # of no type
        @staticmethod
        def forward(x: torch.Tensor, apply: Map, again: Map, adjoint: Map) -> Any:
            return apply(x)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            x, _, ctx.again, ctx.adjoint = inputs
            ctx.dtype = x.dtype

        @staticmethod
        def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
            return ctx.adjoint(gradients[0]).to(ctx.dtype), None, None, None

        @staticmethod
        def jvp(ctx: Any, tangent: torch.Tensor, *others: None) -> Any:
            return ctx.again(tangent)

        @staticmethod
        def vmap(
            info: Any, places: Any, x: torch.Tensor, apply: Map, again: Map, adjoint: Map
        ) -> tuple[torch.Tensor, int]:
            x = x.movedim(places[0], -1)
            if x.ndim not in (2, 3):
                raise ShapeError(
                    f"under vmap a vector must have shape (N,) or (N, k), got {tuple(x.shape[:-1])}"
                )
            y = again(x.reshape(len(x), -1))  # as the columns of one matrix
            return y.reshape(len(y), *x.shape[1:]), x.ndim - 1

    return Linear
