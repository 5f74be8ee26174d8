"""A network's outputs and their Jacobian in the parameters, sample by sample."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from gpu_hodlr.arrays import as_array
from gpu_hodlr.devices import HostArray, to_host, working_bytes
from gpu_hodlr.networks.data import Batch, Data, Tree
from gpu_hodlr.networks.derivatives import Derivatives
from gpu_hodlr.networks.model import Network
from gpu_hodlr.networks.problem import at_first_sample, sample_cost

if TYPE_CHECKING:
    import torch

_TRIED = 3  # samples that derivatives are tried with
_BYTES = 1 << 28  # on the CPU, of what is computed together
_COPIES = 4  # of rows of the Jacobian, with what is solved for them


class Linearized:
    """f(theta) and its rows J at the parameters that a network has.

    Args:
        network: the function.
        seed: of the vectors that derivatives are tried with.
    """

    def __init__(self, network: Network, seed: int) -> None:
        self.network = network
        self._seed = seed
        self._derivatives: Derivatives | None = None

    @property
    def theta(self) -> HostArray:
        """The parameters, (N,) float64."""
        joined = self.network.joined(tuple(p[None] for p in self.network.theta))[0]
        return to_host(as_array(joined.detach(), "theta")).astype(np.float64)

    @property
    def sizes(self) -> dict[str, int]:
        """Entries of the parameters by name."""
        network = self.network
        return {x: p.numel() for x, p in zip(network.names, network.theta, strict=True)}

    def fingerprint(self) -> str:
        """Of parameters, buffers, layers and `output`: a saved posterior belongs to one network."""
        found = hashlib.sha256()
        found.update("\n".join(self._layers()).encode())
        chosen = dict(zip(self.network.names, self.network.theta, strict=True))
        for kind, named in (("of", chosen), ("at", self.network.fixed)):
            for name, x in sorted(named.items()):
                host = x.detach().cpu().contiguous()
                found.update(f"{kind} {name} {tuple(x.shape)} {x.dtype}".encode())
                found.update(host.numpy().tobytes())
        return found.hexdigest()

    def _layers(self) -> Iterator[str]:
        """What is known of the function but its numbers; of callables nothing is."""
        network = self.network
        if not callable(network.output):
            yield f"output {network.output!r}"
        if network.modes is not None:
            for name, module in network.model.named_modules():  # type: ignore[union-attr]
                yield f"{name} {type(module).__name__}({module.extra_repr()})"

    def batch(self, inputs: Tree) -> Batch:
        """Inputs without targets, where the network is.

        Raises:
            DtypeError, ShapeError, DeviceError, ArgumentError: no inputs.
        """
        kind = self.network.theta[0].dtype
        return next(iter(Data(inputs, 0, kind, self.network.place)))  # 0: a target is not asked for

    def outputs(self, batch: Batch) -> Iterator[tuple[Batch, torch.Tensor]]:
        """Pieces of a batch and their predictions, without derivatives; within `plain`."""
        import torch

        with torch.no_grad():
            for piece in batch.pieces(self._together(batch, 0)):
                yield piece, self.network(self.network.theta, piece.inputs)

    def jacobians(self, batch: Batch) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Outputs (n, ...) and J (n, outputs, N) of some samples at a time.

        Not within `plain`, in which threads are alone: what is done with J may be with other ranks.

        Raises:
            ArgumentError: the model does not take such inputs.
        """
        import torch

        network = self.network
        with network.plain():
            first = self._first(batch)
            if self._derivatives is None:
                few = batch.of(slice(0, _TRIED))
                self._derivatives = Derivatives.of(network, few, self._seed)
            d = first[0].numel()
            together = self._together(batch, d)
        identity = torch.eye(d, dtype=first.dtype, device=first.device)
        identity = identity.reshape(1, d, *first.shape[1:])
        for piece in batch.pieces(together):
            with network.plain(), torch.no_grad():
                outputs = network(network.theta, piece.inputs)
                root = identity.expand(piece.size, *identity.shape[1:])
                J = self._derivatives.rows(network, piece, root).detach()
            yield outputs, J

    def _first(self, batch: Batch) -> torch.Tensor:
        """The outputs of the first sample, (1, ...); within `plain`.

        Raises:
            ArgumentError: the model does not take such inputs.
        """
        with at_first_sample():
            return next(self.outputs(batch.of(slice(0, 1))))[1]

    def _together(self, batch: Batch, rows: int) -> int:
        """Samples that fit together, with so many rows of the Jacobian each."""
        place, itemsize = self.network.place.type, self.network.theta[0].dtype.itemsize
        room = _BYTES if place == "cpu" else working_bytes("cuda")
        kept = sample_cost(self.network, batch.of(slice(0, 1)))[0]
        return max(1, room // (kept * max(rows, 1) + _COPIES * rows * self.network.n * itemsize))
