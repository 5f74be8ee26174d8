"""Derivatives of a network's predictions in its parameters, many columns at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gpu_hodlr import streams
from gpu_hodlr.errors import UnsupportedLayerError
from gpu_hodlr.networks.data import Batch, mapped, tensors
from gpu_hodlr.networks.model import Network, Theta

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Derivatives:
    """How J t and J^T e are computed of a network, and rows of e^T J sample by sample.

    `torch.func` has two ways to J t: forward mode, and reverse mode twice, for layers that have no
    forward mode. Columns and samples go through together (`vmap`), or one after the other where a
    layer's operations do not know that. `of` finds out what works and is right.

    Attributes:
        forward: whether J t is by forward mode.
        together: whether columns go through together.
        samples_together: whether samples do, where each has rows of its own.
    """

    forward: bool = True
    together: bool = True
    samples_together: bool = True

    @classmethod
    def of(cls, network: Network, batch: Batch, seed: int) -> Derivatives:
        """What works and is right: <u, J t> = <J^T u, t> for random u, t at some samples.

        A layer may be there and wrong: nested forward modes of LayerNorm are in torch 2.13 on the
        CPU. Within `Network.plain`.

        Raises:
            UnsupportedLayerError: nothing is; says what torch says.
        """
        first: Exception | None = None
        for forward, together in ((True, True), (False, True), (True, False), (False, False)):
            trial = cls(forward, together)
            try:
                if trial._adjoint(network, batch, seed):
                    return trial._with_samples(network, batch, seed)
            except (RuntimeError, NotImplementedError, ValueError) as e:
                first = first or e
        said = "J and its transpose disagree" if first is None else str(first).partition("\n")[0]
        raise UnsupportedLayerError(
            f"the model cannot be differentiated by torch.func, in whichever mode: {said}"
        ) from first

    def _adjoint(self, network: Network, batch: Batch, seed: int) -> bool:
        """Whether J and J^T are of one matrix."""
        outputs, push, pull = self.linearized(network, batch)
        u = _random((2, *outputs.shape), outputs, seed)
        t = _random((2, network.n), outputs, seed + 1)
        pushed, pulled = push(t), pull(u)
        left, right = (u * pushed).flatten(1).sum(1), (pulled * t).sum(1)
        sizes = (u.flatten(1).norm(dim=1) * pushed.flatten(1).norm(dim=1)).clamp_min(
            pulled.norm(dim=1) * t.norm(dim=1)
        )
        allowed = outputs.new_tensor(1e-9 if outputs.dtype.itemsize == 8 else 1e-3) * sizes
        return bool(((left - right).abs() <= allowed).all())

    def _with_samples(self, network: Network, batch: Batch, seed: int) -> Derivatives:
        """Whether rows of samples are right that go through together."""
        import torch

        with torch.no_grad():
            outputs = network(network.theta, batch.inputs)
        root = _random((batch.size, 1, *outputs.shape[1:]), outputs, seed)
        apart = Derivatives(self.forward, self.together, samples_together=False)
        want = apart.rows(network, batch, root)
        try:
            got = Derivatives(self.forward, self.together).rows(network, batch, root)
        except (RuntimeError, NotImplementedError, ValueError):
            return apart
        allowed = 1e-9 if outputs.dtype.itemsize == 8 else 1e-3
        right = bool((got - want).norm() <= allowed * want.norm())
        return self if right else apart

    def linearized(
        self, network: Network, batch: Batch
    ) -> tuple[
        torch.Tensor,
        Callable[[torch.Tensor], torch.Tensor],
        Callable[[torch.Tensor], torch.Tensor],
    ]:
        """The outputs, J: (k, N) -> (k, *outputs.shape), and its transpose."""
        import torch

        def f(theta: Theta) -> torch.Tensor:
            return network(theta, batch.inputs)

        theta = network.theta
        outputs, transpose = torch.func.vjp(f, theta)

        def pull(e: torch.Tensor) -> torch.Tensor:
            return network.joined(self._each(lambda x: transpose(x)[0], e))

        def push(vt: torch.Tensor) -> torch.Tensor:
            tangents = network.split(vt)
            if self.forward:
                pushed = self._each(lambda t: torch.func.jvp(f, (theta,), (t,))[1], tangents)
            else:
                # J^T is linear in e, and the transpose of that map is J.
                again = torch.func.vjp(
                    lambda e: torch.func.vjp(f, theta)[1](e)[0], torch.zeros_like(outputs)
                )[1]
                pushed = self._each(lambda t: again(t)[0], tangents)
            return pushed  # type: ignore[no-any-return]

        return outputs, push, pull

    def hessian(
        self, network: Network, value: Callable[[Theta], torch.Tensor]
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """H: (k, N) -> (k, N) of a scalar function of the parameters, by reverse mode twice.

        Right for every layer that is twice differentiable, and it costs no more than forward over
        reverse: what is linear in the columns alone goes through again.
        """
        import torch

        again = torch.func.vjp(torch.func.grad(value), network.theta)[1]

        def product(vt: torch.Tensor) -> torch.Tensor:
            return network.joined(self._each(lambda t: again(t)[0], network.split(vt)))

        return product

    def rows(self, network: Network, batch: Batch, root: torch.Tensor) -> torch.Tensor:
        """S_i J_i of every sample i, (n, r, N), for S (n, r, *outputs.shape[1:])."""
        import torch

        def batched(x: torch.Tensor) -> bool:
            return x.ndim > 0 and len(x) == batch.size

        def one(s: torch.Tensor, *own: torch.Tensor) -> torch.Tensor:
            mine = iter(own)
            inputs = mapped(batch.inputs, lambda x: next(mine)[None] if batched(x) else x)
            transpose = torch.func.vjp(lambda theta: network(theta, inputs)[0], network.theta)[1]
            return network.joined(self._each(lambda x: transpose(x)[0], s))

        own = [x for x in tensors(batch.inputs) if batched(x)]
        if self.samples_together:
            return torch.func.vmap(one)(root, *own)
        return torch.stack([one(*parts) for parts in zip(root, *own, strict=True)])

    def _each(self, function: Callable[[Any], Any], stack: Any) -> Any:
        """A function of every member of a stack, or of a tuple of stacks."""
        import torch

        if self.together:
            return torch.func.vmap(function)(stack)
        if isinstance(stack, tuple):
            found = [function(member) for member in zip(*stack, strict=True)]
        else:
            found = [function(member) for member in stack]
        if isinstance(found[0], tuple):
            return tuple(torch.stack(parts) for parts in zip(*found, strict=True))
        return torch.stack(found)


def _random(shape: tuple[int, ...], like: torch.Tensor, seed: int) -> torch.Tensor:
    """Normal numbers, the same at every call."""
    import torch

    generator = torch.Generator(like.device).manual_seed(streams.ADJOINT + seed)
    return torch.randn(shape, dtype=like.dtype, device=like.device, generator=generator)
