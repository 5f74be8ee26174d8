"""What curvature matrices need of a torch network: weights, inputs, derivatives.

The network is evaluated once; afterwards torch is not needed and everything is arrays.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from gpu_hodlr.arrays import as_array, check_finite
from gpu_hodlr.devices import Array, move, namespace
from gpu_hodlr.errors import DeviceError, DtypeError, ShapeError
from gpu_hodlr.networks.modules import Step
from gpu_hodlr.networks.output_hessian import OutputHessian, contiguous, output_hessian
from gpu_hodlr.torch_memory import is_shared

if TYPE_CHECKING:
    import torch

    from gpu_hodlr.networks.losses import CrossEntropy, Elementwise, Targets


@dataclass(frozen=True)
class Layer:
    """A Linear layer at the given samples.

    Attributes:
        weight: (d_out, d_in).
        features: (f, n): what each trained parameter of a unit is multiplied by. The d_in inputs
            where the weight is trained, and a last row of ones where the bias is.
        derivative: (d_out, n) of the activation that follows, None on the last layer.
        bias: whether the bias is trained.
    """

    weight: Array
    features: Array
    derivative: Array | None
    bias: bool

    def on(self, device: str) -> Layer:
        """The same layer with its arrays on a device."""
        slope = self.derivative
        return replace(
            self,
            weight=move(self.weight, device),
            features=move(self.features, device),
            derivative=None if slope is None else move(slope, device),
        )

    def of(self, samples: slice) -> Layer:
        """The same layer at some of the samples."""
        slope = self.derivative
        return replace(
            self,
            features=self.features[:, samples],
            derivative=None if slope is None else slope[:, samples],
        )

    @property
    def width(self) -> int:
        """Units: d_out."""
        return len(self.weight)

    @property
    def trained(self) -> bool:
        """Whether the matrix has rows for it."""
        return len(self.features) > 0

    @property
    def inputs(self) -> int:
        """Trained columns of the weight: d_in or 0."""
        return len(self.features) - self.bias


@dataclass(frozen=True)
class Evaluated:
    """A network at all samples.

    Attributes:
        layers: from the first that is trained.
        hessian: of the loss in the last pre-activations.
        gradient: (d, n) of the loss in the outputs.
        slope: (d, n) derivative of an activation after the last layer, or None.
        bends: (d_out, n) second derivative of the activation after each layer; None where it is 0,
            or was not asked for.
    """

    layers: list[Layer]
    hessian: OutputHessian
    gradient: Array
    slope: Array | None
    bends: list[Array | None]


def evaluate(
    steps: list[Step],
    trained: frozenset[int],
    loss: CrossEntropy | Elementwise,
    inputs: torch.Tensor,
    targets: Targets,
    num_data: int | None,
    *,
    second: bool = False,
) -> Evaluated:
    """Run the network once and keep what the curvature matrices are made of.

    Layers before the first that is trained are part of its inputs.

    Args:
        steps: see `flatten_modules`.
        trained: ids of the parameters that the matrix is of.
        loss: of the outputs.
        inputs: (n, ...) in the type that everything is computed in.
        targets: of the loss.
        num_data: samples that a mean is over; n by default.
        second: whether the activations' second derivatives are wanted.

    Raises:
        ArgumentError: NaN or infinity, a target out of range.
        ShapeError, DtypeError: inputs or targets do not fit the network.
        DeviceError: weights are not where the inputs are.
    """
    import torch

    place = inputs.device
    if not inputs.is_floating_point():
        raise DtypeError(f"inputs must be floating, got {inputs.dtype}")
    if inputs.ndim < 2:
        raise ShapeError(f"inputs must have shape (n, ...), n >= 1, got {tuple(inputs.shape)}")
    check_finite(as_array(inputs, "inputs"), "inputs")
    with torch.autocast(place.type, enabled=False):  # it would round what is computed here
        layers, outputs, slopes = _forward(steps, inputs, place, trained, second)
        loss.check(outputs, targets)
        divisor = loss.divisor(loss.total(outputs, targets))
        if num_data is not None and loss.reduction == "mean":
            divisor *= num_data / len(inputs)
        slope = _of_units(slopes[-1].slope)
        hessian = output_hessian(outputs, targets, loss, slope, divisor)
        with torch.inference_mode(False), torch.enable_grad():
            z = outputs.detach().clone()
            gradient = torch.func.grad(lambda z: loss.value(z, targets))(z) / divisor
    if place.type == "cuda" and not is_shared():  # a pool each: leave CuPy the memory
        torch.cuda.empty_cache()
    first = next(i for i, layer in enumerate(layers) if layer.trained)
    bends = [_of_units(x.bend) for x in slopes[first:]]
    made = _of_units(gradient)
    assert made is not None
    return Evaluated(layers[first:], hessian, made, slope, bends)


class _Slopes(NamedTuple):
    """Derivatives of what follows a layer, (n, d_out): the first two; None for 1 and for 0."""

    slope: torch.Tensor | None = None
    bend: torch.Tensor | None = None

    def then(self, slope: torch.Tensor, bend: torch.Tensor | None) -> _Slopes:
        """Followed by another function with these: (f o g)'' = f'' g'^2 + f' g''."""
        if self.slope is None:
            return _Slopes(slope, bend)
        parts = [] if bend is None else [bend * self.slope**2]
        parts += [] if self.bend is None else [slope * self.bend]
        return _Slopes(slope * self.slope, sum(parts[1:], parts[0]) if parts else None)


def _of_units(x: torch.Tensor | None) -> Array | None:
    """(d, n) of (n, d)."""
    return None if x is None else contiguous(as_array(x.detach().T, "derivatives"))


def _forward(
    steps: list[Step], h: torch.Tensor, place: torch.device, ids: frozenset[int], second: bool
) -> tuple[list[Layer], torch.Tensor, list[_Slopes]]:
    """The layers, the outputs (n, d), and the derivatives of what follows every layer."""
    import torch

    weights: list[Array] = []
    features: list[Array] = []
    biases: list[bool] = []
    slopes: list[_Slopes] = []
    for name, module, kind in steps:
        if kind is torch.nn.Linear:
            weight, bias = _parameters(name, module, h.dtype, place)
            if h.ndim != 2 or h.shape[1] != weight.shape[1]:
                raise ShapeError(
                    f"layer {name} wants inputs (n, {weight.shape[1]}), got {tuple(h.shape)}"
                )
            biases.append(bias is not None and id(module.bias) in ids)
            trained = h if id(module.weight) in ids else h[:, :0]
            if biases[-1]:
                trained = torch.cat([trained, torch.ones_like(h[:, :1])], dim=1)
            weights.append(as_array(weight, name).copy())
            features.append(contiguous(as_array(trained.T, name)))
            slopes.append(_Slopes())
            h = torch.nn.functional.linear(h, weight, bias)
        elif kind is torch.nn.Flatten:
            h = h.flatten(1)
        elif kind is not torch.nn.Dropout:
            h, *derivatives = _with_derivatives(module, h, second)
            if slopes:  # an activation before any Linear only changes the inputs
                slopes[-1] = slopes[-1].then(*derivatives)
    hidden = [
        namespace(w).ones((w.shape[0], x.shape[1]), w.dtype) if s is None else s
        for w, x, s in zip(
            weights[:-1], features[:-1], (_of_units(x.slope) for x in slopes[:-1]), strict=True
        )
    ]
    layers = [Layer(*parts) for parts in zip(weights, features, [*hidden, None], biases,
                                             strict=True)]  # fmt: skip
    return layers, h, slopes


def _parameters(
    name: str, module: Any, kind: torch.dtype, place: torch.device
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias of a Linear layer.

    Raises:
        DeviceError: they are not where the model is.
        ArgumentError: NaN or infinity.
    """
    found = []
    for part, value in (("weight", module.weight), ("bias", module.bias)):
        if value is not None and value.device != place:
            raise DeviceError(f"{name}.{part} must be on {place} as the rest, got {value.device}")
        found.append(None if value is None else value.detach().to(kind))
        if value is not None:
            check_finite(as_array(found[-1], part), f"{name}.{part}")
    return found[0], found[1]


def _with_derivatives(
    module: torch.nn.Module, z: torch.Tensor, second: bool
) -> tuple[Any, Any, Any]:
    """What an elementwise function makes of z, its derivative, and its second one, None for 0."""
    import torch

    with torch.inference_mode(False), torch.enable_grad():
        z = z.detach().clone().requires_grad_()  # a clone: z may be an inference tensor
        h = module(z.clone())  # the clone: an inplace activation may not touch a leaf
        (slope,) = torch.autograd.grad(h.sum(), z, create_graph=second)
        bend = None
        if slope.requires_grad:
            (bend,) = torch.autograd.grad(slope.sum(), z, materialize_grads=True)
    if bend is not None and not bool(bend.any()):
        bend = None  # piecewise linear
    return h.detach(), slope.detach(), bend
