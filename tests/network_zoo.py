"""A zoo of small networks with data, and their dense matrices by reverse over reverse.

The matrices know nothing of the package: losses are torch's own sums, divisors are counted by hand.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from network_models import (
    CASES,
    GPT,
    Attention,
    Gated,
    Holder,
    Scattered,
    TwoHeads,
    adapted,
    convolutions,
    group_norm,
    lenet,
    made,
    mlp,
)
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.attention import SDPBackend, sdpa_kernel

torch.set_num_threads(1)

Sum = Callable[[Any, Any], Any]


@dataclass(frozen=True)
class Net:
    """A network, its data and loss as a user gives them, and how to compute them plainly.

    Attributes:
        model: a module.
        loss: as the package takes it.
        data: batches of (inputs, targets).
        sum: the loss of (outputs, targets), summed over the samples.
        divisor: of that sum, over all batches; 1 for reduction="sum".
        options: of the operators.
        pick: the predictions in what the model returns.
        trained: names of the parameters; by default those that require grad.
        convex: whether it has a Gauss-Newton matrix.
    """

    model: Any
    loss: Any
    data: list[tuple[Any, Any]]
    sum: Sum
    divisor: float
    options: dict[str, Any] = field(default_factory=dict)
    pick: Callable[[Any], Any] = lambda outputs: outputs
    trained: tuple[str, ...] | None = None

    @property
    def given(self) -> tuple[Any, ...]:
        """Model, loss and data, one batch as inputs and targets."""
        if len(self.data) == 1:
            return self.model, self.loss, *self.data[0]
        return self.model, self.loss, self.data


def randn(*shape: int, seed: int = 1) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def randint(most: int, *shape: int, seed: int = 2) -> Any:
    return torch.randint(most, shape, generator=torch.Generator().manual_seed(seed))


def seeded(model: nn.Module) -> Any:
    """In float64 and evaluation mode, weights and running statistics drawn."""
    generator = torch.Generator().manual_seed(0)
    model = model.double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.5)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.copy_(torch.randn(module.num_features, generator=generator))
                module.running_var.uniform_(0.5, 2.0, generator=generator)
    return model


# The zoo

ZOO: dict[str, Callable[[], Net]] = {}


def net(make: Callable[[], Net]) -> Callable[[], Net]:
    ZOO[make.__name__.replace("_", " ")] = make
    return make


CE = partial(F.cross_entropy, reduction="sum")
MSE = partial(F.mse_loss, reduction="sum")


@net
def an_mlp() -> Net:
    return Net(seeded(mlp()), "cross_entropy", [(randn(6, 4), randint(3, 6))], CE, 6)


@net
def a_held_mlp() -> Net:
    return Net(seeded(Holder(mlp())), nn.MSELoss(), [(randn(6, 4), randn(6, 3))], MSE, 18)


@net
def gated() -> Net:
    return Net(seeded(Gated()), "mse", [(randn(5, 4), randn(5, 3))], MSE, 15)


@net
def groups_normalized() -> Net:
    return Net(seeded(group_norm()), "cross_entropy", [(randn(5, 4), randint(3, 5))], CE, 5)


@net
def attention_of_dicts() -> Net:
    mask = torch.zeros(4, 3, dtype=torch.bool)
    mask[1, 2] = mask[3, 1:] = True
    inputs = {"x": randn(4, 3, 4), "mask": mask}
    return Net(
        seeded(Attention()),
        "cross_entropy",
        [(inputs, randint(2, 4))],
        CE,
        4,
        {"output": "logits"},
        lambda made: made["logits"],
    )


def _tokens() -> tuple[Any, Any]:
    targets = randint(5, 3, 4, seed=4)
    targets[0, 2:] = targets[2, 0] = -100
    return randint(5, 3, 4), targets


def _token_sum(outputs: Any, targets: Any) -> Any:
    return CE(outputs.flatten(0, 1), targets.flatten())


@net
def gpt_with_classes_last() -> Net:
    return Net(seeded(GPT()), "cross_entropy", [_tokens()], _token_sum, 9)


@net
def gpt_transposed() -> Net:
    w = torch.tensor([1.0, 0.5, 2.0, 0.0, 1.0], dtype=torch.float64)
    inputs, targets = _tokens()
    kept = targets[targets >= 0]
    return Net(
        seeded(GPT()),
        nn.CrossEntropyLoss(weight=w, label_smoothing=0.1),
        [(inputs, targets)],
        partial(CE, weight=w, label_smoothing=0.1),
        float(sum(w[t] for t in kept)),
        {"output": lambda made: made.movedim(-1, 1)},
        lambda made: made.movedim(-1, 1),
    )


@net
def scattered() -> Net:
    return Net(seeded(Scattered()), "mse", [(randn(5, 4), randn(5, 3))], MSE, 15)


@net
def a_layer_in_two_places() -> Net:
    layer, tanh = nn.Linear(4, 4), nn.Tanh()
    model = nn.Sequential(layer, tanh, layer, tanh, nn.Linear(4, 3))
    return Net(seeded(model), "cross_entropy", [(randn(5, 4), randint(3, 5))], CE, 5)


@net
def lora_by_names() -> Net:
    names = tuple(f"{i}.lora_{c}" for i in (0, 2) for c in "ab")
    return Net(
        seeded(adapted()),
        "cross_entropy",
        [(randn(5, 4), randint(3, 5))],
        CE,
        5,
        {"params": list(names)},
        trained=names,
    )


@net
def lora_frozen() -> Net:
    model = seeded(adapted())
    for layer in (model[0], model[2]):
        layer.base.requires_grad_(False)
    return Net(model, "cross_entropy", [(randn(5, 4), randint(3, 5))], CE, 5)


@net
def frozen_trunk() -> Net:
    model = seeded(lenet())
    for layer in model[:5]:
        layer.requires_grad_(False)
    return Net(model, "cross_entropy", [(randn(4, 1, 8, 8), randint(3, 4))], CE, 4)


@net
def a_bias_and_a_predicate() -> Net:
    return Net(
        seeded(Gated()),
        "mse",
        [(randn(5, 4), randn(5, 3))],
        MSE,
        15,
        {"params": lambda name: name.endswith(("bias", "scale"))},
        trained=("scale", "first.bias", "twice.bias"),
    )


W = torch.tensor([1.0, 4.0, 0.25], dtype=torch.float64)


@net
def weights_ignored_and_smoothing() -> Net:
    targets = torch.tensor([0, 1, 2, 1, 0, 2])
    options: dict[str, Any] = {"weight": W, "ignore_index": 2, "label_smoothing": 0.2}
    return Net(
        seeded(Gated()),
        nn.CrossEntropyLoss(**options),
        [(randn(6, 4), targets)],
        partial(CE, **options),
        1 + 4 + 4 + 1,
    )


@net
def probabilities() -> Net:
    data = [(randn(6, 4), randn(6, 3).softmax(1))]
    loss = nn.CrossEntropyLoss(label_smoothing=0.1)
    return Net(seeded(Gated()), loss, data, partial(CE, label_smoothing=0.1), 6)


@net
def uneven_batches() -> Net:
    """The mean is over all data, by the weights of their classes."""
    x, y = randn(7, 4), torch.tensor([0, 1, 2, 1, 0, 2, 2])
    return Net(
        seeded(Gated()),
        nn.CrossEntropyLoss(weight=W),
        [(x[:5], y[:5]), (x[5:], y[5:])],
        partial(CE, weight=W),
        2 * 1 + 2 * 4 + 3 * 0.25,
    )


@net
def uneven_batches_of_dicts() -> Net:
    inputs = {"x": randn(5, 3, 4)}
    targets = randint(2, 5)
    return Net(
        seeded(Attention()),
        "cross_entropy",
        [
            ({"x": inputs["x"][:3]}, targets[:3]),
            ({"x": inputs["x"][3:]}, targets[3:]),
        ],
        CE,
        20,
        {"output": "logits", "num_data": 20},
        lambda made: made["logits"],
    )


@net
def one_of_two_heads() -> Net:
    return Net(
        seeded(TwoHeads()),
        "cross_entropy",
        [((randn(5, 4), randn(5, 1, seed=3)), randint(3, 5))],
        CE,
        5,
        {"output": 1, "params": lambda name: not name.startswith("a.")},
        lambda made: made[1],
        ("body.weight", "body.bias", "b.weight", "b.bias"),
    )


@net
def many_labels() -> Net:
    loss = nn.BCEWithLogitsLoss(pos_weight=W)
    total = partial(F.binary_cross_entropy_with_logits, pos_weight=W, reduction="sum")
    return Net(seeded(Gated()), loss, [(randn(5, 4), randint(2, 5, 3).double())], total, 15)


@net
def nll_after_log_softmax() -> Net:
    """As the cross entropy of the logits before; the plain sum is that, to have its Hessian."""
    model = nn.Sequential(mlp(), nn.LogSoftmax(1))
    return Net(seeded(model), nn.NLLLoss(), [(randn(5, 4), randint(3, 5))], CE, 5)


@net
def counts() -> Net:
    total = partial(F.poisson_nll_loss, reduction="sum")
    data = [(randn(5, 4), randint(5, 5, 3).double())]
    return Net(seeded(Gated()), F.poisson_nll_loss, data, total, 15)


@net
def variances() -> Net:
    targets = (randn(5, 3), randn(5, 3, seed=5).exp())

    def total(outputs: Any, targets: Any) -> Any:
        return F.gaussian_nll_loss(outputs, *targets, reduction="sum")

    return Net(seeded(Gated()), nn.GaussianNLLLoss(), [(randn(5, 4), targets)], total, 15)


@net
def huber() -> Net:
    total = partial(F.huber_loss, delta=0.7, reduction="sum")
    data = [(randn(5, 4), randn(5, 3))]
    return Net(seeded(Gated()), nn.HuberLoss(delta=0.7), data, total, 15)


@net
def images_to_images() -> Net:
    data = [(randn(2, 1, 3, 3), randn(2, 1, 7, 7))]
    return Net(seeded(convolutions()), "mse", data, MSE, 98)


class LogCosh:
    """A loss of one's own."""

    def value(self, outputs: Any, targets: Any) -> Any:
        return (outputs - targets).cosh().log().sum()

    def hessian_root(self, outputs: Any, targets: Any) -> Any:
        return torch.diag_embed(1 / (outputs - targets).cosh())


@net
def own_loss() -> Net:
    own = LogCosh()
    return Net(seeded(Gated()), own, [(randn(5, 4), randn(5, 3))], own.value, 5)


# Those whose data are of any size and type


def value(loss: str, outputs: Any, targets: Any) -> Any:
    """Torch's own sum, of tokens too."""
    if loss == "mse":
        return MSE(outputs, targets)
    tokens = outputs.ndim == 3 and outputs.shape[:2] == targets.shape
    return CE(outputs.transpose(1, 2) if tokens else outputs, targets)


def picked(returned: Any, output: Any) -> Any:
    """The predictions."""
    if callable(output):
        return output(returned)
    return returned[output] if isinstance(output, int) else getattr(returned, "logits", returned)


def net_of(
    model: Any, loss: str, inputs: Any, targets: Any, options: Any, reduction: str = "mean"
) -> Net:
    """Of one batch; the loss is that of "mse" or "cross_entropy" by name."""
    params, output = options.get("params"), options.get("output")
    names = [name for name, _ in model.named_parameters()]
    trained = None
    if params is not None:
        wanted = params if callable(params) else params.__contains__
        trained = tuple(name for name in names if wanted(name))
    divisor = targets.numel() if reduction == "mean" else 1
    return Net(
        model, loss, [(inputs, targets)], partial(value, loss), divisor, options,
        partial(picked, output=output), trained,
    )  # fmt: skip


ZOO |= {name: partial(lambda name: net_of(*made(name)), name) for name in CASES}


def dense_ggn(*given: Any) -> Any:
    """Of `net_of`, NumPy float64."""
    with sdpa_kernel(SDPBackend.MATH):
        return ggn(net_of(*given)).detach().numpy()


def dense_hessian(*given: Any) -> Any:
    """Of `net_of`, NumPy float64."""
    with sdpa_kernel(SDPBackend.MATH):
        return hessian(net_of(*given)).detach().numpy()


# Dense matrices


class Rows(NamedTuple):
    """Of a batch: outputs, and their rows of the Jacobian."""

    outputs: Any
    J: Any
    targets: Any


def called(model: Any, inputs: Any) -> Any:
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def parameters(case: Net) -> list[Any]:
    named = dict(case.model.named_parameters())
    if case.trained is not None:
        return [p for name, p in named.items() if name in case.trained]
    return [p for p in named.values() if p.requires_grad]


def flat_rows(scalars: Any, inputs: list[Any]) -> Any:
    """Gradients of each of many scalars, (len, total size of inputs)."""
    if not scalars.requires_grad:
        return torch.zeros(scalars.numel(), sum(x.numel() for x in inputs)).double()
    rows = []
    for scalar in scalars.reshape(-1):
        parts = torch.autograd.grad(scalar, inputs, retain_graph=True, materialize_grads=True)
        rows.append(torch.cat([part.reshape(-1) for part in parts]))
    return torch.stack(rows)


def jacobians(case: Net) -> Iterator[Rows]:
    theta = parameters(case)
    for inputs, targets in case.data:
        outputs = case.pick(called(case.model, inputs))
        yield Rows(outputs.detach(), flat_rows(outputs, theta), targets)


def ggn(case: Net) -> Any:
    total: Any = 0
    for outputs, J, targets in jacobians(case):
        z = outputs.clone().requires_grad_()
        (g,) = torch.autograd.grad(case.sum(z, targets), z, create_graph=True)
        total = total + J.T @ flat_rows(g, [z]) @ J
    return total / case.divisor


def hessian(case: Net) -> Any:
    theta = parameters(case)
    value: Any = 0
    for inputs, targets in case.data:
        value = value + case.sum(case.pick(called(case.model, inputs)), targets)
    parts = torch.autograd.grad(
        value / case.divisor, theta, create_graph=True, materialize_grads=True
    )
    return flat_rows(torch.cat([part.reshape(-1) for part in parts]), theta)


def empirical(case: Net) -> Any:
    """sum over samples of g g^T / divisor, g the gradient of the sample's part of the sum."""
    total: Any = 0
    for outputs, J, targets in jacobians(case):
        z = outputs.clone().requires_grad_()
        (g,) = torch.autograd.grad(case.sum(z, targets), z)
        of_sample = (g.reshape(-1, 1) * J).reshape(len(g), -1, J.shape[1]).sum(1)
        total = total + of_sample.T @ of_sample
    return total / case.divisor


MATRICES = {"ggn": ggn, "hessian": hessian, "empirical": empirical}


@functools.cache
def dense(name: str, kind: str) -> Any:
    """The matrix of one of the zoo, NumPy float64."""
    case = ZOO[name]()
    case = Net(**{**vars(case), "model": copy.deepcopy(case.model)})
    with sdpa_kernel(SDPBackend.MATH):
        found: np.ndarray[Any, Any] = MATRICES[kind](case).detach().numpy()
    return found
