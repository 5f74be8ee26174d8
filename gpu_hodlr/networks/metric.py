"""M in K = J^T M J: what a sample's outputs weigh, a matrix of the loss in the outputs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from gpu_hodlr import streams
from gpu_hodlr.networks.data import Batch
from gpu_hodlr.networks.losses import Loss

if TYPE_CHECKING:
    import torch


class Metric(ABC):
    """M of a batch, block diagonal over its samples, positive semi-definite, without the mean.

    Args:
        loss: of which it is made.
    """

    def __init__(self, loss: Loss) -> None:
        self.loss = loss

    def drawn(self, outputs: torch.Tensor, batch: Batch) -> Batch:
        """A whole batch with what is drawn for it; itself where nothing is."""
        return batch

    draws: bool = False  # whether `drawn` does anything

    @abstractmethod
    def size(self, outputs: torch.Tensor, batch: Batch) -> int:
        """Rows r of a sample's root."""

    @abstractmethod
    def matmat(self, outputs: torch.Tensor, batch: Batch, z: torch.Tensor) -> torch.Tensor:
        """M z, (k, *outputs.shape), for z alike."""

    @abstractmethod
    def root(self, outputs: torch.Tensor, batch: Batch) -> torch.Tensor:
        """S (n, r, *outputs.shape[1:]) with S^T S = M of every sample."""

    @abstractmethod
    def root_transpose_matmat(
        self, outputs: torch.Tensor, batch: Batch, w: torch.Tensor
    ) -> torch.Tensor:
        """S^T w, (k, *outputs.shape), for w (k, n, r)."""


class LossHessian(Metric):
    """The Hessian of the loss in the outputs: of the Gauss-Newton matrix."""

    def size(self, outputs: torch.Tensor, batch: Batch) -> int:
        """As the loss has it."""
        return self.loss.root_size(outputs, batch.targets)

    def matmat(self, outputs: torch.Tensor, batch: Batch, z: torch.Tensor) -> torch.Tensor:
        """H z."""
        return self.loss.hessian_matmat(outputs, batch.targets, z)

    def root(self, outputs: torch.Tensor, batch: Batch) -> torch.Tensor:
        """S with S^T S = H."""
        return self.loss.hessian_root(outputs, batch.targets)

    def root_transpose_matmat(
        self, outputs: torch.Tensor, batch: Batch, w: torch.Tensor
    ) -> torch.Tensor:
        """S^T w."""
        return self.loss.root_transpose_matmat(outputs, batch.targets, w)


class Gradients(Metric):
    """The mean over j of g_j g_j^T, with the loss's gradients g_j in the outputs: of Fisher's.

    Args:
        loss: of which the gradients are.
        samples: how many gradients a sample has; None for the one at its own target, else at
            targets drawn from the likelihood.
        seed: of these.
    """

    def __init__(self, loss: Loss, samples: int | None, seed: int) -> None:
        super().__init__(loss)
        self.samples, self._seed = samples, seed
        self.draws = samples is not None

    def drawn(self, outputs: torch.Tensor, batch: Batch) -> Batch:
        """With its gradients, the same at every pass: seeded by the place of the batch."""
        import torch

        if self.samples is None:
            return batch
        generator = torch.Generator(outputs.device)
        # As SeedSequence would: neighbouring seeds and batches have nothing in common.
        mixed = np.random.SeedSequence((self._seed, streams.TARGETS, batch.index))
        generator.manual_seed(int(mixed.generate_state(1, np.uint64)[0] >> np.uint64(1)))
        drawn = self.loss.sampled_gradients(outputs, batch.targets, generator, self.samples)
        return replace(batch, gradients=drawn.detach())

    def size(self, outputs: torch.Tensor, batch: Batch) -> int:
        """One a gradient."""
        return self.samples or 1

    def root(self, outputs: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The gradients, (n, samples, ...)."""
        import torch

        if self.samples is not None:
            assert batch.gradients is not None
            return batch.gradients.transpose(0, 1) / self.samples**0.5
        value = lambda z: self.loss.value(z, batch.targets)  # noqa: E731
        return torch.func.grad(value)(outputs)[:, None]

    def matmat(self, outputs: torch.Tensor, batch: Batch, z: torch.Tensor) -> torch.Tensor:
        """S^T S z."""
        import torch

        root = self.root(outputs, batch)
        flat, zs = root.flatten(2), z.reshape(len(z), len(root), -1)
        along = torch.einsum("nrd,knd->knr", flat, zs)
        return torch.einsum("nrd,knr->knd", flat, along).reshape(z.shape)

    def root_transpose_matmat(
        self, outputs: torch.Tensor, batch: Batch, w: torch.Tensor
    ) -> torch.Tensor:
        """S^T w."""
        import torch

        root = self.root(outputs, batch)
        found = torch.einsum("nrd,knr->knd", root.flatten(2), w)
        return found.reshape(len(w), *outputs.shape)
