"""Derivatives of a network's predictions in its parameters, many columns at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any

from gpu_hodlr import streams
from gpu_hodlr.errors import UnsupportedLayerError
from gpu_hodlr.networks.data import Batch, mapped, tensors
from gpu_hodlr.networks.model import Network, Theta

if TYPE_CHECKING:
    import torch

FAILURES = (RuntimeError, NotImplementedError, ValueError)  # of torch where it has no rule


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

        A rule may be there and wrong: nested forward modes of LayerNorm are, in torch 2.13 on the
        CPU. Within `Network.plain`.

        Raises:
            UnsupportedLayerError: nothing is; says what torch says.
        """
        found = _first_right(
            lambda trial: trial._adjoint(network, batch, seed),
            True,
            "J and its transpose disagree",
        )
        return found._with_samples(network, batch, seed)

    @classmethod
    def of_hessian(
        cls, network: Network, value: Callable[[Theta], torch.Tensor], seed: int
    ) -> Derivatives:
        """What works and is symmetric: <u, H t> = <H u, t> for random u, t.

        The second derivatives of torch's weight normalization are not, in torch 2.13 on the CPU.
        Within `Network.plain`.

        Raises:
            UnsupportedLayerError: nothing is; says what torch says.
        """

        def symmetric(trial: Derivatives) -> bool:
            vectors = random((2, network.n), network.theta[0], seed)
            products = trial.hessian(network, value)(vectors)
            gram = vectors @ products.T
            size = vectors.norm(dim=1).max() * products.norm(dim=1).max()
            return bool((gram[0, 1] - gram[1, 0]).abs() <= allowed(gram) * size)

        return _first_right(
            symmetric,
            False,
            "the second derivatives that torch computes are not symmetric, so that a layer's are "
            "wrong (weight normalization's in torch 2.13)",
        )

    def _adjoint(self, network: Network, batch: Batch, seed: int) -> bool:
        """Whether J and J^T are of one matrix."""
        outputs, push, pull = self.linearized(network, batch)
        u = random((2, *outputs.shape), outputs, seed)
        t = random((2, network.n), outputs, seed + 1)
        pushed, pulled = push(t), pull(u)
        left, right = (u * pushed).flatten(1).sum(1), (pulled * t).sum(1)
        sizes = (u.flatten(1).norm(dim=1) * pushed.flatten(1).norm(dim=1)).clamp_min(
            pulled.norm(dim=1) * t.norm(dim=1)
        )
        return bool(((left - right).abs() <= allowed(outputs) * sizes).all())

    def _with_samples(self, network: Network, batch: Batch, seed: int) -> Derivatives:
        """Whether rows of samples are right that go through together."""
        import torch

        with torch.no_grad():
            outputs = network(network.theta, batch.inputs)
        root = random((batch.size, 1, *outputs.shape[1:]), outputs, seed)
        apart = Derivatives(self.forward, self.together, samples_together=False)
        want = apart.rows(network, batch, root)
        try:
            got = Derivatives(self.forward, self.together).rows(network, batch, root)
        except FAILURES:
            return apart
        right = bool((got - want).norm() <= allowed(outputs) * want.norm())
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
            return network.joined(self._columns(lambda x: transpose(x)[0], e))

        def push(vt: torch.Tensor) -> torch.Tensor:
            tangents = network.split(vt)
            if self.forward:
                pushed = self._columns(lambda t: torch.func.jvp(f, (theta,), (t,))[1], tangents)
            else:
                # J^T is linear in e, and the transpose of that map is J.
                again = torch.func.vjp(
                    lambda e: torch.func.vjp(f, theta)[1](e)[0], torch.zeros_like(outputs)
                )[1]
                pushed = self._columns(lambda t: again(t)[0], tangents)
            return pushed

        return outputs, push, pull

    def hessian(
        self, network: Network, value: Callable[[Theta], torch.Tensor]
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """H: (k, N) -> (k, N) of a scalar function of the parameters.

        By reverse mode twice, or forward over reverse. The first is tried first: of many columns
        what is linear in them alone goes through again, and rules of reverse mode are seldom wrong.
        """
        import torch

        theta, slope = network.theta, torch.func.grad(value)
        if self.forward:
            multiply = lambda t: torch.func.jvp(slope, (theta,), (t,))[1]  # noqa: E731
        else:
            again = torch.func.vjp(slope, theta)[1]
            multiply = lambda t: again(t)[0]  # noqa: E731
        return lambda vt: network.joined(self._columns(multiply, network.split(vt)))

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

    def _columns(self, function: Callable[[Any], Any], stack: Any) -> Any:
        """The same, a single one as it is: operations under `vmap` are other, slower ones."""
        single = len(stack[0] if isinstance(stack, tuple) else stack) == 1
        return (replace(self, together=False) if single else self)._each(function, stack)

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


def _first_right(right: Callable[[Derivatives], bool], forward: bool, wrong: str) -> Derivatives:
    """The first way that works.

    Raises:
        UnsupportedLayerError: none does; says what torch says, or what is wrong.
    """
    first: Exception | None = None
    said = ""
    for mode, together in product((forward, not forward), (True, False)):
        trial = Derivatives(mode, together)
        try:
            if right(trial):
                return trial
            said = wrong
        except FAILURES as e:
            first = first or e
            said = said or str(e).partition("\n")[0]
    raise UnsupportedLayerError(
        f"the model cannot be differentiated by torch.func, in whichever mode: {said}"
    ) from first


def allowed(like: torch.Tensor) -> float:
    """Relative difference that rounding may make."""
    return 1e-9 if like.dtype.itemsize == 8 else 1e-3


def random(shape: tuple[int, ...], like: torch.Tensor, seed: int) -> torch.Tensor:
    """Normal numbers, the same at every call."""
    import torch

    generator = torch.Generator(like.device).manual_seed(streams.ADJOINT + seed)
    return torch.randn(shape, dtype=like.dtype, device=like.device, generator=generator)
