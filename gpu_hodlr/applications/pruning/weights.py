"""The parameters of a model as one vector: which can be pruned, how they are written and masked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from gpu_hodlr.devices import HostArray, HostIndex
from gpu_hodlr.errors import ArgumentError, DtypeError
from gpu_hodlr.networks.model import Model, Network, Params, choose

if TYPE_CHECKING:
    import torch

_MASKED = "_orig"  # what torch.nn.utils.prune calls a parameter that has a mask


class Weights:
    """The parameters chosen of a model, in the order of its curvature matrix.

    Args:
        model: see `prune`, as the next two.
        params: which may change.
        biases: whether vectors can be pruned too.

    Attributes:
        tensors: the model's own, by name.
        theta: (N,) float64; 0 where they are pruned already.
        prunable: (N,) bool.
        kept: (N,) bool; not those that a mask of torch's prunes already.

    Raises:
        DtypeError, ArgumentError: no module; nothing that can be pruned.
    """

    def __init__(self, model: Model, params: Params, biases: bool) -> None:
        chosen = choose(model, params)
        if not chosen.module:
            raise DtypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        self._model: torch.nn.Module = chosen.model
        self.tensors = chosen.named
        self.sizes = {name: p.numel() for name, p in self.tensors.items()}
        self._plain_names = {name: self._plain_name(name) for name in self.tensors}
        which = {name: biases or p.ndim > 1 for name, p in self.tensors.items()}
        self.prunable = self._by_tensor(np.array(list(which.values())))
        if not self.prunable.any():
            raise ArgumentError(
                f"params: nothing can be pruned of {', '.join(self.tensors)}: vectors are with "
                "biases=True alone"
            )
        self.kept = np.concatenate([self._mask_of(name) for name in self.tensors])
        flat = [p.detach().reshape(-1).double().cpu().numpy() for p in self.tensors.values()]
        self.theta: HostArray = np.concatenate(flat) * self.kept

    @property
    def starts(self) -> dict[str, int]:
        """Where each parameter begins in the vector."""
        ends = np.cumsum(list(self.sizes.values()))
        return {x: int(end) - n for (x, n), end in zip(self.sizes.items(), ends, strict=True)}

    def places(self, name: str) -> list[tuple[torch.nn.Module, str]]:
        """The modules that hold a parameter, more than one where it is tied, and its name there."""
        tensor = self.tensors[name]
        return [
            (module, key)
            for module in self._model.modules()
            for key, p in module._parameters.items()
            if p is tensor
        ]

    def _plain_name(self, name: str) -> str:
        path, dot, key = name.rpartition(".")
        return f"{path}{dot}{_plain(self._model.get_submodule(path), key)}"

    def index_of(self, tensor: Any) -> HostIndex | None:
        """The entries of one of the parameters, in its shape; None of any other tensor."""
        for name, p in self.tensors.items():
            if p is tensor:
                start = self.starts[name]
                return np.arange(start, start + self.sizes[name]).reshape(p.shape)
        return None

    def split(self, values: HostArray) -> dict[str, HostArray]:
        """Of (N,) values those of every parameter, in its shape."""
        return {
            name: values[start : start + self.sizes[name]].reshape(self.tensors[name].shape)
            for name, start in self.starts.items()
        }

    def write(self, theta: HostArray) -> None:
        """Put (N,) values into the model."""
        import torch

        with torch.inference_mode(False), torch.no_grad():
            for name, values in self.split(theta).items():
                self.tensors[name].copy_(_tensor(values, self.tensors[name]))

    def rounded(self, theta: HostArray) -> HostArray:
        """(N,) values as the model will have them, some of less precision than others."""
        parts = [
            _tensor(values, self.tensors[name]).reshape(-1).double().cpu().numpy()
            for name, values in self.split(theta).items()
        ]
        return np.concatenate(parts)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """What the model holds is as before afterwards, to the bit."""
        import torch

        before = {name: p.detach().clone() for name, p in self.tensors.items()}
        try:
            yield
        finally:
            with torch.inference_mode(False), torch.no_grad():
                for name, p in self.tensors.items():
                    p.copy_(before[name])

    def masks(self, kept: HostArray) -> dict[str, torch.Tensor]:
        """Of the parameters that have a weight pruned, by their plain names; True is kept."""
        return {
            self._plain_names[name]: _tensor(mask, self.tensors[name])
            for name, mask in self.split(kept).items()
            if not mask.all()
        }

    def apply(self, kept: HostArray) -> None:
        """Put the masks into the model, as torch.nn.utils.prune has them.

        Raises:
            RuntimeError: torch's.
        """
        import torch
        from torch.nn.utils.prune import custom_from_mask

        with torch.inference_mode(False):
            for name, mask in self.split(kept).items():
                if not mask.all():
                    given = _tensor(mask, self.tensors[name])
                    for module, key in self.places(name):
                        custom_from_mask(module, _plain(module, key), given)

    def _by_tensor(self, values: HostArray) -> HostArray:
        return np.repeat(values, list(self.sizes.values()))

    def _mask_of(self, name: str) -> HostArray:
        """Of one parameter, from where torch put it: what any of its places takes is kept."""
        kept = np.zeros(self.sizes[name], bool)
        for module, key in self.places(name):
            mask = module._buffers.get(f"{_plain(module, key)}_mask")
            kept |= True if mask is None else mask.detach().reshape(-1).cpu().numpy() != 0
        return kept


def network_at(network: Network, weights: Weights, theta: HostArray) -> Network:
    """The function of a model, at other parameters (N,)."""
    parts = weights.split(theta)
    like = zip(network.names, network.theta, strict=True)
    return replace(network, theta=tuple(_tensor(parts[x], p) for x, p in like))


def _tensor(values: HostArray, like: torch.Tensor) -> torch.Tensor:
    """Values in the shape of a tensor, where it is, and of its type; a mask is one of bool."""
    import torch

    with torch.inference_mode(False):  # whose tensors no gradient can be taken of
        made = torch.from_numpy(values.copy())
        return made.to(like.device, made.dtype if made.dtype is torch.bool else like.dtype)


def _plain(module: torch.nn.Module, key: str) -> str:
    """A parameter's name without what torch appends where it has a mask."""
    plain = key.removesuffix(_MASKED)
    return plain if f"{plain}_mask" in module._buffers else key
