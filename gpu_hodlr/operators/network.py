"""What the Gauss-Newton matrix needs of a torch network: weights, inputs, derivatives.

The network is evaluated once; afterwards torch is not needed and everything is arrays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gpu_hodlr.arrays import as_array, check_finite
from gpu_hodlr.devices import AnyArray, Array, is_torch, move, namespace
from gpu_hodlr.errors import (
    ArgumentError,
    DeviceError,
    DtypeError,
    ShapeError,
    UnsupportedLayerError,
)

if TYPE_CHECKING:
    import torch


ELEMENTWISE = (
    "CELU",
    "ELU",
    "GELU",
    "Hardshrink",
    "Hardsigmoid",
    "Hardswish",
    "Hardtanh",
    "Identity",
    "LeakyReLU",
    "LogSigmoid",
    "Mish",
    "ReLU",
    "ReLU6",
    "SELU",
    "SiLU",
    "Sigmoid",
    "Softplus",
    "Softshrink",
    "Softsign",
    "Tanh",
    "Tanhshrink",
    "Threshold",
)
LOSSES = ("mse", "cross_entropy")
REDUCTIONS = ("mean", "sum", "none")


@dataclass(frozen=True)
class Layer:
    """A Linear layer at the given samples.

    Attributes:
        weight: (d_out, d_in).
        features: (d_in, n), or (d_in + 1, n) with a last row of ones for the bias.
        derivative: (d_out, n) of the activation that follows, None on the last layer.
    """

    weight: Array
    features: Array
    derivative: Array | None

    def on(self, device: str) -> Layer:
        """The same layer with its arrays on a device."""
        slope = self.derivative
        return Layer(
            move(self.weight, device),
            move(self.features, device),
            None if slope is None else move(slope, device),
        )

    def of(self, samples: slice) -> Layer:
        """The same layer at some of the samples."""
        slope = self.derivative
        return Layer(
            self.weight, self.features[:, samples], None if slope is None else slope[:, samples]
        )

    @property
    def bias(self) -> bool:
        """Whether the layer has a bias."""
        return bool(self.features.shape[0] > self.weight.shape[1])


@dataclass(frozen=True)
class OutputHessian:
    """The loss's Hessian in the last pre-activations, E = C (I - r r^T) C, C = diag(c), a sample.

    MSE: c = sqrt(2 s) phi', r = 0. Cross entropy: c = sqrt(s p) phi', r = sqrt(p), with softmax
    probabilities p, phi' the derivative of an activation after the last layer, and s the
    weight of the sample in the loss (1/n, 1/(n d), 1). As r^T r = 1, (I - r r^T) C is a root.

    Attributes:
        c: (d, n).
        r: (d, n) or None for r = 0.
    """

    c: Array
    r: Array | None

    def on(self, device: str) -> OutputHessian:
        """The same Hessian with its arrays on a device."""
        return OutputHessian(move(self.c, device), None if self.r is None else move(self.r, device))

    def of(self, samples: slice) -> OutputHessian:
        """The same Hessian at some of the samples."""
        return OutputHessian(self.c[:, samples], None if self.r is None else self.r[:, samples])

    def project(self, z: Array) -> Array:
        """(I - r r^T) z for z (..., d, n)."""
        if self.r is None:
            return z
        return z - self.r * (self.r * z).sum(axis=-2, keepdims=True)

    def apply(self, z: Array) -> Array:
        """E z for z (..., d, n), in place."""
        if self.r is None:
            z *= self.c * self.c
            return z
        z *= self.c
        z -= self.r * (self.r * z).sum(axis=-2, keepdims=True)
        z *= self.c
        return z


def flatten_modules(model: object) -> list[tuple[str, Any]]:
    """The (name, module) pairs of a nest of Sequential, in order.

    Raises:
        UnsupportedLayerError: a layer that is neither Linear, elementwise, Flatten nor Dropout in
            evaluation mode; a parameter used twice; a Flatten after the first Linear layer.
    """
    import torch

    if not isinstance(model, torch.nn.Module):
        raise DtypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")

    def walk(module: torch.nn.Module, name: str) -> list[tuple[str, Any]]:
        if module._forward_hooks or module._forward_pre_hooks:
            raise UnsupportedLayerError(
                f"layer {name or 'model'} ({type(module).__name__}) has forward hooks (pruning, "
                "weight or spectral norm): GGNOperator does not see what they do"
            )
        if type(module).forward is torch.nn.Sequential.forward:
            prefix = name + "." if name else ""
            # _modules, as named_children leaves out a module's second appearance
            return [pair for key, child in module._modules.items()
                    for pair in walk(child, prefix + key)]  # fmt: skip
        return [(name or "model", module)]

    layers = walk(model, "")
    linear = [m for _, m in layers if type(m) is torch.nn.Linear]
    for name, module in layers:
        kind = type(module).__name__
        if isinstance(module, torch.nn.Flatten):
            if (module.start_dim, module.end_dim) != (1, -1) or (
                linear and layers.index((name, module)) > [m for _, m in layers].index(linear[0])
            ):
                raise UnsupportedLayerError(f"layer {name} (Flatten) must come before any Linear")
        elif isinstance(module, torch.nn.Dropout):
            if module.training and module.p > 0:
                raise UnsupportedLayerError(
                    f"layer {name} (Dropout) is in training mode: call model.eval() first"
                )
        elif type(module) is not torch.nn.Linear and not (
            kind in ELEMENTWISE and type(module).__module__.startswith("torch.nn")
        ):
            raise UnsupportedLayerError(
                f"layer {name} is a {kind}; GGNOperator knows Linear, Flatten, Dropout and "
                f"{', '.join(ELEMENTWISE)}"
            )
    if not linear:
        raise UnsupportedLayerError("model must have at least one Linear layer")
    counted = sum(p.numel() for m in linear for p in m.parameters())
    if len({id(m) for m in linear}) < len(linear) or counted != sum(
        p.numel() for p in model.parameters()
    ):
        raise UnsupportedLayerError("model shares parameters between layers (tied weights)")
    return layers


def loss_options(loss: str | torch.nn.Module, reduction: str | None) -> tuple[str, str, int]:
    """Name, reduction and ignored class index of a loss given by name or as a torch module."""
    ignore_index = -100
    if not isinstance(loss, str):
        module, loss = (
            loss,
            {"MSELoss": "mse", "CrossEntropyLoss": "cross_entropy"}.get(
                type(loss).__name__, type(loss).__name__
            ),
        )
        reduction = getattr(module, "reduction", None) if reduction is None else reduction
        ignore_index = getattr(module, "ignore_index", ignore_index)
        if getattr(module, "weight", None) is not None:
            raise ArgumentError("loss: CrossEntropyLoss with class weights is not supported")
    reduction = "mean" if reduction is None else reduction
    if loss not in LOSSES:
        raise ArgumentError(f"loss must be one of {', '.join(LOSSES)}, got {loss!r}")
    if reduction not in REDUCTIONS:
        raise ArgumentError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    return loss, reduction, int(ignore_index)


def _tensor(x: object, name: str, place: torch.device) -> torch.Tensor:
    """A detached tensor on the model's device; NumPy arrays are copied there."""
    import torch

    if is_torch(x):
        if x.device != place:
            raise DeviceError(f"{name} must be on the model's device {place}, got {x.device}")
        return x.detach()
    if isinstance(x, np.ndarray):
        return torch.from_numpy(x).to(place)
    raise DtypeError(f"{name} must be a torch tensor or NumPy array, got {type(x).__name__}")


def evaluate(
    model: torch.nn.Module,
    loss: str | torch.nn.Module,
    reduction: str | None,
    inputs: AnyArray,
    targets: AnyArray,
    dtype: np.dtype[Any],
) -> tuple[list[Layer], OutputHessian]:
    """Run the network once and keep what the Gauss-Newton matrix is made of.

    Raises:
        UnsupportedLayerError: see `flatten_modules`.
        ArgumentError: an unknown loss or reduction, NaN or infinity, a target out of range.
        ShapeError: inputs or targets do not fit the network.
        DeviceError: they are not where the model is.
    """
    import torch

    modules = flatten_modules(model)
    loss, reduction, ignore_index = loss_options(loss, reduction)
    kind = torch.float64 if dtype == np.float64 else torch.float32
    place = next(model.parameters()).device
    h, wanted = _tensor(inputs, "inputs", place), _tensor(targets, "targets", place)
    if not h.is_floating_point():
        raise DtypeError(f"inputs must be floating, got {h.dtype}")
    if h.ndim < 2 or h.shape[0] == 0:
        raise ShapeError(f"inputs must have shape (n, ...), n >= 1, got {tuple(h.shape)}")
    if wanted.is_complex():
        raise DtypeError(f"targets must be real, got {wanted.dtype}")
    h = h.to(kind)
    check_finite(as_array(h, "inputs"), "inputs")
    weights: list[Array] = []
    features: list[Array] = []
    derivatives: list[Any] = []
    for name, module in modules:
        if type(module) is torch.nn.Linear:
            if h.ndim != 2 or h.shape[1] != module.in_features:
                raise ShapeError(
                    f"layer {name} wants inputs (n, {module.in_features}), got {tuple(h.shape)}"
                )
            weight = module.weight.detach().to(kind)
            bias = None if module.bias is None else module.bias.detach().to(kind)
            for part, value in (("weight", weight), ("bias", bias)):
                if value is not None:
                    check_finite(as_array(value, part), f"{name}.{part}")
            augmented = h if bias is None else torch.cat([h, torch.ones_like(h[:, :1])], dim=1)
            weights.append(as_array(weight, name).copy())
            features.append(_contiguous(as_array(augmented.T, name)))
            derivatives.append(None)
            h = torch.nn.functional.linear(h, weight, bias)
        elif isinstance(module, torch.nn.Flatten):
            h = h.flatten(1)
        elif not isinstance(module, torch.nn.Dropout):
            h, slope = _with_derivative(module, h)
            if derivatives:  # an activation before any Linear only changes the inputs
                derivatives[-1] = slope if derivatives[-1] is None else derivatives[-1] * slope
    slopes = [None if d is None else _contiguous(as_array(d.T, "slope")) for d in derivatives]
    hessian = _output_hessian(h, wanted, loss, reduction, ignore_index, slopes.pop())
    layers = [
        Layer(w, x, namespace(w).ones((w.shape[0], x.shape[1]), w.dtype) if s is None else s)
        for w, x, s in zip(weights[:-1], features[:-1], slopes, strict=True)
    ]
    if place.type == "cuda":  # torch's pool and CuPy's are apart: leave CuPy the memory
        torch.cuda.empty_cache()
    return [*layers, Layer(weights[-1], features[-1], None)], hessian


def _contiguous(x: Array) -> Array:
    return namespace(x).ascontiguousarray(x)


def _with_derivative(module: torch.nn.Module, z: torch.Tensor) -> tuple[Any, Any]:
    import torch

    with torch.inference_mode(False), torch.enable_grad():
        z = z.detach().clone().requires_grad_()  # a clone: z may be an inference tensor
        h = module(z.clone())  # the clone: an inplace activation may not touch a leaf
        (slope,) = torch.autograd.grad(h.sum(), z)
    return h.detach(), slope


def _output_hessian(
    outputs: torch.Tensor,
    targets: torch.Tensor,
    loss: str,
    reduction: str,
    ignore_index: int,
    slope: Array | None,
) -> OutputHessian:
    import torch

    n, d = outputs.shape
    check_finite(as_array(outputs, "model(inputs)"), "model(inputs)")
    if loss == "mse":
        if tuple(targets.shape) != (n, d):
            raise ShapeError(f"targets must have shape ({n}, {d}), got {tuple(targets.shape)}")
        if not bool(torch.isfinite(targets).all()):
            raise ArgumentError("targets have NaN or infinite entries")
        scale = 1.0 / (n * d) if reduction == "mean" else 1.0
        c = torch.full_like(outputs.T, (2 * scale) ** 0.5)
        r = None
    else:
        weight = _class_weights(targets, n, d, reduction, ignore_index).to(outputs)
        root = torch.exp(0.5 * torch.log_softmax(outputs, dim=1)).T
        c = root * weight.sqrt()
        r = _contiguous(as_array(root, "r"))
    c_array = _contiguous(as_array(c, "c"))
    return OutputHessian(c_array if slope is None else c_array * slope, r)


def _class_weights(
    targets: torch.Tensor, n: int, d: int, reduction: str, ignore_index: int
) -> torch.Tensor:
    """The weight of each sample in a cross entropy, (n,): its Hessian's factor."""
    import torch

    if targets.is_floating_point():
        if tuple(targets.shape) != (n, d):
            raise ShapeError(
                f"targets must be ({n},) class indices or ({n}, {d}) probabilities, "
                f"got {tuple(targets.shape)}"
            )
        if not bool((torch.isfinite(targets) & (targets >= 0)).all()):
            raise ArgumentError("targets: probabilities must be finite and >= 0")
        weight = targets.to(torch.float64).sum(dim=1)
        return weight / n if reduction == "mean" else weight
    if tuple(targets.shape) != (n,):
        raise ShapeError(f"targets must have shape ({n},), got {tuple(targets.shape)}")
    kept = targets != ignore_index
    wrong = kept & ((targets < 0) | (targets >= d))
    if bool(wrong.any()):
        first = int(targets[wrong][0])
        raise ArgumentError(f"targets must lie in 0 .. {d - 1}, got {first}")
    weight = kept.to(torch.float64)
    if reduction == "mean":
        if not bool(kept.any()):
            raise ArgumentError("targets: every sample has the ignored index")
        weight = weight / weight.sum()
    return weight
