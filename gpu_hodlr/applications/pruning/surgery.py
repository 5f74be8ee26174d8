"""Optimal brain surgeon: weights are pruned where that costs least, and the others make it good."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gpu_hodlr.applications.linearized import Linearized
from gpu_hodlr.applications.pruning.choice import Choice, SingleWeights, WholeUnits
from gpu_hodlr.applications.pruning.quadratic import Quadratic
from gpu_hodlr.applications.pruning.units import units_of
from gpu_hodlr.applications.pruning.weights import Weights, network_at
from gpu_hodlr.checks import check_count, check_number
from gpu_hodlr.devices import HostArray, device_kind
from gpu_hodlr.distributed import communicator
from gpu_hodlr.errors import ArgumentError, DtypeError
from gpu_hodlr.networks import GGNOperator
from gpu_hodlr.networks.curvature import Reading
from gpu_hodlr.networks.data import Tree, inputs_and_targets

if TYPE_CHECKING:
    import torch

    from gpu_hodlr.devices import AnyDevice, AnyDtype
    from gpu_hodlr.networks.model import Model, Output, Params

_STEPS = 5  # a round's weights go in so many parts: each tells anew what the others cost
_SHARES = 1.0, 0.5, 0.25, 0.125  # of the update, that are tried


@dataclass(frozen=True, eq=False)
class Pruning:
    """What `prune` did to a model.

    Attributes:
        masks: by the names of the parameters that have pruned entries, True where they are kept;
            `torch.nn.utils.prune.custom_from_mask` takes them.
        fraction: of the weights, or units, that is pruned.
        count: of weights, or units, there were in all.
        predicted_increase: of the loss, to second order: delta^T G delta / 2, over all rounds. It
            is that of a network that is linear in its weights: where most of them go at once, far
            less than `increase`.
        increase: of the loss, measured on the data.
        what: "weights" or "units".

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(4, 1, bias=False).double()
        >>> _ = model.weight.data.copy_(torch.tensor([[1.0, 0.1, 2.0, 0.2]]))
        >>> x = torch.eye(4, dtype=torch.float64)
        >>> with torch.no_grad():
        ...     y = model(x)
        >>> found = gh.prune(model, "mse", (x, y), 0.5)
        >>> found.masks["weight"]
        tensor([[ True, False,  True, False]])
        >>> found  # 0.1^2 / 4 + 0.2^2 / 4
        Pruning(50.0 % of 4 weights, loss predicted +0.0125, measured +0.0125)
    """

    masks: dict[str, torch.Tensor]
    fraction: float
    count: int
    predicted_increase: float
    increase: float
    what: str = "weights"

    def __repr__(self) -> str:
        return (
            f"Pruning({self.fraction:.1%} of {self.count:,} {self.what}, loss predicted "
            f"{self.predicted_increase:+.4g}, measured {self.increase:+.4g})"
        ).replace("%", " %")


def prune(
    model: Model,
    loss: object,
    data: Tree,
    fraction: float,
    *,
    update: bool = True,
    rounds: int = 1,
    structured: bool = False,
    biases: bool = False,
    damping: float | None = None,
    params: Params = None,
    output: Output = None,
    reduction: str | None = None,
    dtype: AnyDtype | None = None,
    device: AnyDevice | None = None,
    entries: str = "auto",
    scheme: str = "lowrank",
    seed: int = 0,
    comm: Any = None,
    **options: Any,
) -> Pruning:
    """Prune a trained network in place by the optimal brain surgeon: which weights, and the rest.

    To second order the loss grows by delta^T H delta / 2, H = G + damping I, G the Gauss-Newton
    matrix of the loss on the data. Without weight i, and with the others at their best then, that
    is theta_i^2 / (2 (H^-1)_ii): the weights where it is least go (Hassibi and Stork, NeurIPS
    1992). Those that are kept, K, make good what all pruned ones P did:
    delta_K = H_KK^-1 H_KP theta_P, the same as -H^-1 E (E^T H^-1 E)^-1 E^T theta with the columns E
    of the identity of P. A round's weights go in five parts, with H^-1 of those that are left.

    G is compressed for the costs; the update is by conjugate gradients on the exact G, with the
    factor for a preconditioner: its accuracy is not that of the compression. Where the whole step
    does not lessen the loss on the data, a half, a quarter or an eighth of it is taken, or none.

    The model is changed as `torch.nn.utils.prune` does: a parameter becomes `weight_orig`, with a
    buffer `weight_mask`; `torch.nn.utils.prune.remove` makes it permanent. Give a
    `copy.deepcopy(model)` to keep the model. It is as it was where an error is raised.

    Collective: all ranks call, with the same model and data; each prunes its own.

    Args:
        model: see `GGNOperator`, a torch.nn.Module; trained, with dropout and batch normalization
            in evaluation mode.
        loss: see `GGNOperator`.
        data: (inputs, targets), or an iterable of such pairs, such as a DataLoader.
        fraction: of the weights, or units, that is to be zero, above 0 and below 1; those that
            masks of torch's prune already count.
        update: whether the weights that are kept change.
        rounds: how often G is made anew, of what the last round left; what is kept falls
            geometrically. More of them prune better, for as many times the time.
        structured: whether whole units go: a row of a Linear layer's weight, or a convolution's
            output channel, with its bias; and with it what reads nothing else, where a unit of
            zeros reads as zero (not through batch normalization or a sigmoid). The cost is
            theta_S^T ((H^-1)_SS)^-1 theta_S / 2 of a unit's weights S. Layers whose
            units are outputs stay; others keep half of the share that all keep, and one at least.
        biases: whether vectors, biases and scales of normalizations, are weights too; else they
            are never pruned, but change with the rest.
        damping: > 0; by default 3 % of the mean of G's diagonal.
        params: which may change, and be pruned; by default those that require grad. Others are
            constants. What is tied is pruned everywhere.
        output: see `GGNOperator`, as the next three.
        reduction: "mean", "sum" or "none"; the loss's by default.
        dtype: float32 or float64.
        entries: which way to G.
        device: where G is, the model's by default.
        scheme: of `compress`; with "lowrank" and `tail="diagonal"`, which is taken then, H is
            positive definite at any damping.
        seed: of every random choice.
        comm: an mpi4py communicator.
        **options: of `compress`: rtol (2e-2 by default), max_rank (512), ...

    Returns:
        The masks, and what the loss does.

    Raises:
        ArgumentError, DtypeError: fraction is not between 0 and 1, less than is pruned already, or
            leaves a layer without units; another option cannot be used, or differs between ranks;
            no weight can be pruned, or the loss would not be finite. See also `GGNOperator` and
            `compress`.
        ShapeError, DeviceError, UnsupportedLayerError, MemoryEstimateError: see there.

    Warns:
        RankCapWarning, AccuracyWarning: see `compress`; the update has not converged.

    Example:
        >>> import torch
        >>> x = torch.randn(50, 3, dtype=torch.float64, generator=torch.manual_seed(0))
        >>> x[:, 1] = x[:, 0]  # two inputs alike: one of their weights can do for both
        >>> model = torch.nn.Linear(3, 1, bias=False).double()
        >>> _ = model.weight.data.copy_(torch.tensor([[1.0, 1.5, 3.0]]))
        >>> with torch.no_grad():
        ...     y = model(x)
        >>> found = gh.prune(model, "mse", (x, y), 1 / 3, damping=1e-6)
        >>> model.weight.detach().round(decimals=3)
        tensor([[0.0000, 2.5000, 3.0000]], dtype=torch.float64)
    """
    flags = {"update": update, "structured": structured, "biases": biases}
    said: dict[str, Any] = {"params": params, "output": output, "reduction": reduction,
                            "dtype": dtype, "entries": entries, "seed": seed}  # fmt: skip
    ranks = communicator(comm, "cpu" if device is None else device_kind(device))
    with ranks.agreed():
        ranks.same(fraction=fraction, rounds=rounds, damping=damping, seed=seed, **flags)
        _check(fraction, rounds, damping)
        for name, flag in flags.items():
            if not isinstance(flag, bool | np.bool_):
                raise DtypeError(f"{name} must be True or False, got {flag!r}")
        weights = Weights(model, params, biases)
        inputs, targets = inputs_and_targets(data)
        reading = Reading(model, loss, inputs, targets, num_data=None, **said)
        linear = Linearized(reading.network, reading.seed)
        ranks.same(network=linear.fingerprint())

        def loss_at(theta: HostArray) -> float:
            with ranks.agreed():
                network = network_at(reading.network, weights, theta)
                return float(ranks.bcast(_loss(reading, Linearized(network, reading.seed))))

        before = loss_at(weights.theta)
        choice: Choice = SingleWeights(weights.prunable)
        if structured:
            choice = WholeUnits(
                units_of(weights, reading.network, next(iter(reading.data))), fraction
            )
        left = _schedule(choice, weights.kept, fraction, rounds)
    options = {"scheme": scheme, "seed": seed, "device": device, **options}
    run = _Run(choice, weights, update, damping, loss_at)
    with weights.restored():
        for most in left:
            with ranks.agreed():
                weights.write(run.theta)
                op = GGNOperator(model, loss, inputs, targets, **said)
            run.round(Quadratic(op, options, run.damping, ranks, comm), most)
    with ranks.agreed():
        there = choice.there(run.kept)
        increase = loss_at(weights.rounded(run.theta)) - before
        if not np.isfinite(increase):
            raise ArgumentError(
                f"the loss of the pruned network would be {increase + before:.3g}: where all of a "
                "norm's weights go (weight normalization), leave them out by params="
            )
        weights.write(run.theta)
        weights.apply(run.kept)
    return Pruning(
        weights.masks(run.kept), 1.0 - float(there.mean()), choice.count, run.predicted,
        increase, choice.what,
    )  # fmt: skip


class _Run:
    """The weights while they are pruned.

    Args:
        choice: of what.
        weights: as they were.
        update: whether those that are kept change.
        damping: None for that of the first round.
        loss: of (N,) weights, on the data.

    Attributes:
        theta: (N,) now.
        kept: (N,) bool.
        damping: as above.
        predicted: increase of the loss so far.
    """

    def __init__(
        self, choice: Choice, weights: Weights, update: bool, damping: float | None,
        loss: Callable[[HostArray], float],
    ) -> None:  # fmt: skip
        self._choice, self._update, self._loss = choice, update, loss
        self.theta, self.kept = weights.theta, weights.kept
        self.damping, self.predicted = damping, 0.0

    def round(self, quadratic: Quadratic, left: list[int]) -> None:
        """Prune until so many items are left, one number after the other, with one matrix."""
        self.damping = quadratic.damping
        start, idle = self.theta, np.zeros(len(self.theta), bool)
        removed = idle.copy()
        for number in left:
            items = self._choice.cheapest(quadratic, self.theta, self.kept, number)
            cut = self._choice.cut(items)
            removed |= cut.removed & self.kept
            idle |= cut.idle & self.kept
            self.kept = self.kept & ~(removed | idle)
            self.theta = np.where(self.kept, start, 0.0)
            if self._update:
                slope = -quadratic.product(np.where(removed, start, 0.0))
                self.theta = self._mended(self.theta, quadratic.update(slope, self.kept))
        delta = np.where(idle, 0.0, self.theta - start)
        self.predicted += 0.5 * float(delta @ quadratic.product(delta))

    def _mended(self, theta: HostArray, step: HostArray) -> HostArray:
        """With the step, or the largest of its halves and quarters that lessens the loss, or none.

        Where much is pruned at once the network is far from linear, and the step may go too far.
        """
        without = self._loss(theta)
        for share in _SHARES:
            if self._loss(theta + share * step) < without:
                return theta + share * step
        return theta


def _check(fraction: object, rounds: object, damping: object) -> None:
    """Refuse what cannot be used.

    Raises:
        ArgumentError, DtypeError: says which argument.
    """
    if check_number(fraction, "fraction", positive=True) >= 1:
        raise ArgumentError(f"fraction must be above 0 and below 1, got {fraction}")
    check_count(rounds, "rounds")
    if damping is not None:
        check_number(damping, "damping", positive=True)


def _schedule(choice: Choice, kept: HostArray, fraction: float, rounds: int) -> list[list[int]]:
    """How many items are left after every part of every round: a geometric sequence.

    Raises:
        ArgumentError: they are fewer than are left already, or than have to be.
    """
    now = int(choice.there(kept).sum())
    final = choice.count - round(fraction * choice.count)
    gone = choice.count - now
    if final > now:
        raise ArgumentError(
            f"fraction must be at least {gone / choice.count:.4g}, which is pruned already, got "
            f"{fraction}"
        )
    if final < choice.least:
        raise ArgumentError(
            f"fraction must leave one of the {choice.count} {choice.what} in every layer, got "
            f"{fraction}"
        )
    parts = rounds * _STEPS
    shares = (final / now) ** (np.arange(1, parts + 1) / parts) if now else np.ones(parts)
    return np.rint(now * shares).astype(int).reshape(rounds, _STEPS).tolist()


def _loss(reading: Reading, linear: Linearized) -> float:
    """On the data, with its reduction."""
    value = total = 0.0
    with linear.network.plain():
        for batch in reading.data:
            for piece, outputs in linear.outputs(batch):
                value += float(reading.loss.value(outputs.double(), piece.targets))
                total += reading.loss.total(outputs, piece.targets)
    return value / reading.loss.divisor(total)
