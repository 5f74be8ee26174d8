"""Inputs and targets of a network: all in memory, or read batch by batch at every pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from gpu_hodlr.arrays import as_array, check_finite, plain
from gpu_hodlr.devices import is_array, is_torch
from gpu_hodlr.distributed import shares
from gpu_hodlr.errors import ArgumentError, DeviceError, DtypeError, ShapeError

if TYPE_CHECKING:
    import torch

    from gpu_hodlr.networks.losses import Targets

# What a model is called with: a tensor, a tuple of arguments, or a dict of them by name.
Inputs: TypeAlias = "torch.Tensor | tuple[Inputs, ...] | dict[str, Inputs]"
Tree: TypeAlias = Any  # of tensors, as a user gives it

_GOLDEN = 0.6180339887498949
_SAME = 1e-9  # relative difference of the checksums of two passes, which sum in another order


def inputs_and_targets(data: Tree) -> tuple[Tree, Tree]:
    """Inputs and targets, given as a tuple of two; or what gives pairs of them, and None."""
    if isinstance(data, tuple) and len(data) == 2:
        return data
    return data, None


@dataclass(frozen=True)
class Batch:
    """Samples that are computed together.

    Attributes:
        inputs: tensors whose first axis has the samples; others are the same for all samples.
        targets: tensors likewise.
        size: samples.
        index: which batch of the data it is of.
        gradients: (num, size, ...) drawn of the loss in the outputs, where a matrix is made of
            them.
    """

    inputs: Inputs
    targets: Targets
    size: int
    index: int = 0
    gradients: torch.Tensor | None = None

    def of(self, samples: slice) -> Batch:
        """The same of some samples."""
        first, last, _ = samples.indices(self.size)
        if (first, last) == (0, self.size):
            return self

        def cut(x: torch.Tensor) -> torch.Tensor:
            return x[samples] if x.ndim and len(x) == self.size else x

        drawn = self.gradients
        return replace(
            self,
            inputs=mapped(self.inputs, cut),
            targets=mapped(self.targets, cut),
            size=max(last - first, 0),
            gradients=None if drawn is None else drawn[:, samples],
        )

    def pieces(self, most: int) -> Iterator[Batch]:
        """Cut into pieces of so many samples."""
        for start in range(0, self.size, most):
            yield self.of(slice(start, start + most))


def mapped(tree: Tree, change: Callable[[torch.Tensor], torch.Tensor]) -> Tree:
    """The same tree of changed tensors; what is no tensor stays."""
    if is_torch(tree):
        return change(tree)
    if isinstance(tree, Mapping):
        return {key: mapped(value, change) for key, value in tree.items()}
    if isinstance(tree, (tuple, list)):
        return tuple(mapped(value, change) for value in tree)
    return tree


def tensors(tree: Tree) -> Iterator[torch.Tensor]:
    """The tensors of a tree, in order."""
    found: list[torch.Tensor] = []
    mapped(tree, lambda x: found.append(x) or x)  # type: ignore[func-returns-value]
    return iter(found)


class Data:
    """Batches of inputs and targets, the same at every pass.

    Args:
        inputs: a tensor or array, a tuple or dict of them; or an iterable of (inputs, targets).
        targets: a tensor or array, or a tuple of them; None for an iterable.
        kind: floating dtype of what is computed.
        place: where.
        copied: whether tensors are copied and checked; else they are used where they lie, before
            they change.

    Attributes:
        streamed: whether it is an iterable, which is read again at every pass.
        ordered: whether every pass is known to have the same batches in the same order.

    Raises:
        ArgumentError, ShapeError, DtypeError, DeviceError: not data, or what can be read once only.
    """

    def __init__(
        self,
        inputs: Tree,
        targets: Tree,
        kind: torch.dtype,
        place: torch.device,
        *,
        copied: bool = True,
    ) -> None:
        self.kind, self.place = kind, place
        self.streamed = targets is None
        self._share = (0, 1)
        self._checksum: _Checksum | None = None
        if self.streamed:
            self._source = _iterable(inputs)
            self.ordered = _keeps_order(inputs)
        else:
            given = _as_tensors(inputs, "inputs", place), _as_tensors(targets, "targets", place)
            self._whole = self._batch(*given, 0, copied=copied)
            for x in tensors(self._whole.inputs):
                if copied and x.is_floating_point():
                    check_finite(as_array(x, "inputs"), "inputs")
            self.ordered = True

    def share(self, index: int, count: int) -> Data:
        """Of every batch the share of one of `count` ranks."""
        part = object.__new__(type(self))
        part.__dict__.update(self.__dict__, _share=(index, count))
        return part

    def on(self, place: torch.device) -> Data:
        """The same, computed elsewhere."""
        moved = object.__new__(type(self))
        moved.__dict__.update(self.__dict__, place=place)
        if not self.streamed:
            whole = self._whole
            moved._whole = replace(
                whole,
                inputs=mapped(whole.inputs, lambda x: x.to(place)),
                targets=mapped(whole.targets, lambda x: x.to(place)),
            )
        return moved

    def share_of(self, batch: Batch) -> Batch:
        """This rank's samples of a batch."""
        index, count = self._share
        return batch.of(shares(batch.size, count)[index])

    def __iter__(self) -> Iterator[Batch]:
        """The batches, whole.

        Raises:
            ArgumentError: a pass gives other data than the first one.
            ShapeError, DtypeError: a batch is not (inputs, targets).
        """
        if not self.streamed:
            yield self._whole
            return
        found = _Checksum()
        for index, item in enumerate(self._source):
            name = f"data[{index}]"
            if not isinstance(item, (tuple, list)) or len(item) != 2:
                raise ShapeError(
                    f"{name} must be a pair (inputs, targets), got {type(item).__name__}"
                    + (f" of {len(item)}" if isinstance(item, (tuple, list)) else "")
                )
            inputs = _as_tensors(item[0], f"{name} inputs", None)
            targets = _as_tensors(item[1], f"{name} targets", None)
            batch = self._batch(inputs, targets, index, copied=False)
            found.add(batch)
            yield batch
        if found.batches == 0:
            raise ArgumentError("data gave no batch" + (" any more" if self._checksum else ""))
        if self._checksum is None:
            self._checksum = found
        else:
            self._checksum.compare(found)

    def _batch(self, inputs: Tree, targets: Tree, index: int, *, copied: bool) -> Batch:
        """A batch where and as it is computed.

        Raises:
            DtypeError, ShapeError: no tensors, or of different numbers of samples.
        """
        import torch

        where = f"data[{index}] " if self.streamed else ""

        def placed(x: torch.Tensor) -> torch.Tensor:
            kind = self.kind if x.is_floating_point() else x.dtype
            copy = copied or x.is_inference()  # which no gradient can be taken through
            return x.detach().to(self.place, kind, copy=copy)

        first = next(tensors(inputs), None)
        if first is None:
            raise DtypeError(f"{where}inputs must have a tensor, got {type(inputs).__name__}")
        if first.ndim == 0 or len(first) == 0:
            raise ShapeError(
                f"{where}inputs must have shape (n, ...), n >= 1, got {tuple(first.shape)}"
            )
        with torch.inference_mode(False):
            return Batch(mapped(inputs, placed), mapped(targets, placed), len(first), index)


class _Checksum:
    """Sums that tell whether two passes gave the same samples, in whatever order.

    Entries are weighted by their place in the sample, so that a flipped or shifted image is another
    one.
    """

    def __init__(self) -> None:
        self.batches = self.samples = 0
        self._sums = np.zeros(2)  # of inputs and targets
        self._sizes = np.zeros(2)

    def add(self, batch: Batch) -> None:
        self.batches += 1
        self.samples += batch.size
        for i, tree in enumerate((batch.inputs, batch.targets)):
            for x in tensors(tree):
                if x.ndim and len(x) == batch.size:
                    sums = _weighted(x)
                    if not bool(sums.isfinite().all()):
                        check_finite(as_array(x, "inputs"), f"data[{batch.index}] inputs")
                    self._sums[i] += float(sums.sum())
                    self._sizes[i] += float(sums.abs().sum())

    def compare(self, other: _Checksum) -> None:
        """Refuse another pass that differs.

        Raises:
            ArgumentError: says in what.
        """
        if other.samples != self.samples:
            raise ArgumentError(
                f"data gave {other.samples} samples in this pass and {self.samples} in the first: "
                "the matrix is of the same samples at every product (drop_last=False?)"
            )
        for name, mine, theirs, size in zip(
            ("inputs", "targets"), self._sums, other._sums, self._sizes, strict=True
        ):
            if not abs(mine - theirs) <= _SAME * size:
                raise ArgumentError(
                    f"data gave other {name} in this pass than in the first (checksums "
                    f"{theirs:.9g} and {mine:.9g}): the matrix is of the same samples at every "
                    "product; leave out random augmentation, and with padding that depends on the "
                    "batch also shuffle=True"
                )


def _weighted(x: torch.Tensor) -> torch.Tensor:
    """(n,) weighted sums of the samples, float64."""
    import torch

    flat = x.detach().reshape(len(x), -1).to(torch.float64)
    places = torch.arange(flat.shape[1], dtype=torch.float64, device=x.device)
    return flat @ (1 + (places * _GOLDEN) % 1)


def _as_tensors(tree: Tree, name: str, place: torch.device | None) -> Tree:
    """Tensors of a tree of tensors and NumPy arrays, which are copied to `place`.

    Raises:
        DtypeError: other arrays, numbers that torch does not have, sparse tensors.
        DeviceError: a tensor is elsewhere than at `place`.
        ArgumentError: a masked array that hides entries.
    """
    if isinstance(tree, Mapping):
        return {key: _as_tensors(x, f"{name}[{key!r}]", place) for key, x in tree.items()}
    if isinstance(tree, (tuple, list)) and any(_holds(x) for x in tree):
        return tuple(_as_tensors(x, f"{name}[{i}]", place) for i, x in enumerate(tree))
    if is_array(tree):
        return as_tensor(tree, name, place)
    if isinstance(tree, (bool, int, float, str)) or tree is None:
        return tree  # an option of the model's forward
    raise DtypeError(f"{name} must be a torch tensor or NumPy array, got {type(tree).__name__}")


def _holds(x: object) -> bool:
    return is_array(x) or isinstance(x, (tuple, list, Mapping))


def as_tensor(x: object, name: str, place: torch.device | None) -> torch.Tensor:
    """A detached dense tensor; NumPy arrays are copied to `place`.

    Raises:
        DtypeError: neither tensor nor array, or of numbers that torch does not have.
        DeviceError: it is elsewhere than at `place`, if that is said.
        ArgumentError: a masked array that hides entries.
    """
    import torch

    if isinstance(x, np.ndarray):
        host = plain(x, name)
        try:
            return torch.from_numpy(np.array(host, host.dtype.newbyteorder("="))).to(place)
        except TypeError:
            raise DtypeError(f"{name} must be numbers that torch has, got {host.dtype}") from None
    if not is_torch(x):
        raise DtypeError(f"{name} must be a torch tensor or NumPy array, got {type(x).__name__}")
    if place is not None and x.device != place:
        raise DeviceError(f"{name} must be on the model's device {place}, got {x.device}")
    if x.layout is not torch.strided:
        raise DtypeError(
            f"{name} must be a dense tensor, got one of layout {x.layout}; pass {name}.to_dense()"
        )
    return x.detach()


def _iterable(data: object) -> Iterable[Any]:
    """What can be read again and again.

    Raises:
        ArgumentError: targets are missing, it can be read once only, or gives samples.
        DtypeError: it is not iterable.
    """
    import torch

    if is_array(data) or isinstance(data, Mapping):
        raise ArgumentError(
            "targets are missing: give inputs and targets, or an iterable of (inputs, targets)"
        )
    if isinstance(data, torch.utils.data.Dataset) and not isinstance(
        data, torch.utils.data.IterableDataset
    ):
        raise ArgumentError(
            "data is a Dataset, which gives single samples: give a DataLoader of it"
        )
    if not isinstance(data, Iterable):
        raise DtypeError(
            f"data must be an iterable of (inputs, targets), got {type(data).__name__}"
        )
    if isinstance(data, Iterator):
        raise ArgumentError(
            f"data is a {type(data).__name__}, which can be read once only, and every product "
            "reads all data: give a list or a DataLoader"
        )
    return data


def _keeps_order(data: object) -> bool:
    """Whether all passes are known to have the same batches."""
    import torch

    if isinstance(data, torch.utils.data.DataLoader):
        return type(data.sampler) is torch.utils.data.SequentialSampler
    return isinstance(data, Sequence)
