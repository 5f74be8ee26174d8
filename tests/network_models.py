"""Small networks of every kind, their data, and dense curvature by reverse mode twice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional

torch.set_num_threads(1)


class OwnForward(nn.Module):
    """Linear layers and functions between, written out."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x: Any) -> Any:
        return self.last(torch.tanh(self.first(x.flatten(1))))


class Block(nn.Module):
    """A residual block."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.one = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.two = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Any) -> Any:
        return functional.relu(x + self.two(functional.relu(self.norm(self.one(x)))))


class Classifier(nn.Module):
    """A transformer encoder, the mean over its positions, and a layer."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 6, batch_first=True, dropout=0.1, **options)
        self.embed = nn.Linear(3, 8)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Any) -> Any:
        return self.head(self.encoder(self.embed(x)).mean(1))


class Returned:
    """What a model of a library returns."""

    def __init__(self, logits: Any) -> None:
        self.loss, self.logits = None, logits


class Language(nn.Module):
    """A language model whose head is its embedding; called by keywords."""

    def __init__(self, *, wrapped: bool = True) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(7, 6), nn.Embedding(5, 6)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.tokens.weight
        self.wrapped = wrapped

    def forward(self, input_ids: Any, attention_mask: Any = None) -> Any:
        steps = input_ids.shape[1]
        x = self.tokens(input_ids) + self.places.weight[:steps]
        later = torch.ones(steps, steps, dtype=torch.bool, device=x.device).triu(1)
        hidden = None if attention_mask is None else attention_mask == 0
        y = self.attention(x, x, x, attn_mask=later, key_padding_mask=hidden, need_weights=False)
        logits = self.head(self.norm(x + y[0]))
        return Returned(logits) if self.wrapped else logits


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x: Any) -> Any:
        states, last = self.lstm(x)
        return self.head(states[:, -1]), last


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 4), nn.Linear(2, 4)
        self.out = nn.Bilinear(4, 4, 2)

    def forward(self, x: Any, y: Any, *, scale: float = 1.0) -> Any:
        return self.out(torch.tanh(self.left(x)), torch.sigmoid(self.right(y))) * scale


class Adapted(nn.Module):
    """A layer with an adapter of low rank."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(5, 4)
        self.lora_A, self.lora_B = nn.Parameter(torch.randn(2, 5)), nn.Parameter(torch.randn(4, 2))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Any) -> Any:
        return self.head(torch.tanh(self.base(x) + x @ self.lora_A.T @ self.lora_B.T))


def lenet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 2, 3),
        nn.BatchNorm2d(2),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(18, 5),
        nn.Tanh(),
        nn.Linear(5, 3),
    )


def resnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 2, 3), Block(2), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(8, 3)
    )


@dataclass
class Case:
    """A network and the arguments of its matrices.

    Attributes:
        make: the model.
        inputs: (generator, n, dtype) -> inputs.
        targets: (generator, n, dtype) -> targets.
        loss: by name.
        options: of the operators.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[Any, int, Any], Any]
    targets: Callable[[Any, int, Any], Any]
    loss: str = "cross_entropy"
    options: dict[str, Any] = field(default_factory=dict)


def normal(*shape: int) -> Callable[[Any, int, Any], Any]:
    return lambda generator, n, dtype: torch.randn(n, *shape, generator=generator, dtype=dtype)


def classes(count: int, *shape: int) -> Callable[[Any, int, Any], Any]:
    return lambda generator, n, dtype: torch.randint(count, (n, *shape), generator=generator)


def tokens(generator: Any, n: int, dtype: Any) -> Any:
    mask = torch.ones(n, 4, dtype=torch.int64)
    mask[::2, 3] = 0
    return {"input_ids": torch.randint(7, (n, 4), generator=generator), "attention_mask": mask}


def pair(generator: Any, n: int, dtype: Any) -> Any:
    return normal(3)(generator, n, dtype), normal(2)(generator, n, dtype)


def classes_second(returned: Any) -> Any:
    return returned.logits.transpose(1, 2)


def without_first(name: str) -> bool:
    return not name.startswith("0.")


CASES: dict[str, Case] = {
    "own forward": Case(OwnForward, normal(5, 1), classes(3)),
    "lenet": Case(lenet, normal(1, 8, 8), classes(3)),
    "resnet": Case(resnet, normal(1, 6, 6), normal(3), "mse"),
    "transformer": Case(Classifier, normal(4, 3), classes(3)),
    "transformer, norm first": Case(
        lambda: Classifier(norm_first=True, activation="gelu"), normal(4, 3), classes(3)
    ),
    "language model": Case(Language, tokens, classes(7, 4)),
    "language model, attributes": Case(
        Language, tokens, classes(7, 4), options={"output": "logits"}
    ),
    "language model, classes second": Case(
        Language, tokens, classes(7, 4), options={"output": classes_second}
    ),
    "lstm": Case(Recurrent, normal(3, 3), normal(2), "mse", {"output": 0}),
    "two inputs": Case(TwoInputs, pair, normal(2), "mse"),
    "adapter": Case(Adapted, normal(5), classes(3), options={"params": ["lora_A", "lora_B"]}),
    "frozen first layer": Case(
        lenet, normal(1, 8, 8), classes(3), options={"params": without_first}
    ),
    "layer and group norm": Case(
        lambda: nn.Sequential(
            nn.Conv1d(2, 4, 2),
            nn.GroupNorm(2, 4),
            nn.GELU(),
            nn.Flatten(),
            nn.LayerNorm(12),
            nn.Linear(12, 2),
        ),
        normal(2, 4), normal(2), "mse",
    ),
    "embedding": Case(
        lambda: nn.Sequential(nn.Embedding(6, 3), nn.Flatten(), nn.PReLU(), nn.Linear(9, 2)),
        classes(6, 3), normal(2), "mse",
    ),
    "weight norm": Case(
        lambda: nn.Sequential(
            nn.utils.parametrizations.weight_norm(nn.Linear(5, 4)), nn.Softplus(), nn.Linear(4, 2)
        ),
        normal(5), normal(2), "mse",
    ),
}  # fmt: skip


def made(name: str, n: int = 5, dtype: Any = torch.float64, seed: int = 0) -> tuple[Any, ...]:
    """Model in evaluation mode, loss, inputs, targets and options of a case."""
    case = CASES[name]
    torch.manual_seed(seed)
    model = case.make().to(dtype).eval()
    with torch.no_grad():
        for part in model.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.running_mean.normal_(std=0.3)
                part.running_var.uniform_(0.5, 2.0)
    generator = torch.Generator().manual_seed(seed + 1)
    inputs = case.inputs(generator, n, dtype)
    return model, case.loss, inputs, case.targets(generator, n, dtype), dict(case.options)


def chosen(model: nn.Module, params: Any) -> list[Any]:
    """The parameters that a matrix is of."""
    named = dict(model.named_parameters())
    if params is None:
        return [p for p in named.values() if p.requires_grad]
    if callable(params):
        return [p for name, p in named.items() if params(name)]
    return [p for name, p in named.items() if name in params]


def outputs_of(model: nn.Module, inputs: Any, output: Any = None) -> Any:
    """The predictions, classes last."""
    args, named = (inputs if isinstance(inputs, tuple) else (inputs,)), {}
    if isinstance(inputs, dict):
        args, named = (), inputs
    found = model(*args, **named)
    if callable(output):
        return output(found)
    if isinstance(output, int):
        return found[output]
    return getattr(found, "logits", found)


def value(loss: str, outputs: Any, targets: Any, reduction: str = "mean") -> Any:
    """Torch's own loss, of tokens too."""
    if loss == "mse":
        return functional.mse_loss(outputs, targets, reduction=reduction)
    if outputs.ndim == 3 and outputs.shape[:2] == targets.shape:
        outputs = outputs.transpose(1, 2)
    return functional.cross_entropy(outputs, targets, reduction=reduction)


def columns(function: Callable[[Any], Any], n: int) -> Any:
    """A linear map as a matrix."""
    return torch.stack([function(row) for row in torch.eye(n, dtype=torch.float64)], dim=1)


def flat_gradient(y: Any, parameters: list[Any], **options: Any) -> Any:
    """Of a scalar, zeros where it does not depend."""
    found = torch.autograd.grad(y, parameters, allow_unused=True, **options)
    return torch.cat([
        torch.zeros(p.numel(), dtype=p.dtype) if g is None else g.reshape(-1)
        for g, p in zip(found, parameters, strict=True)
    ])  # fmt: skip


def dense_ggn(
    model: nn.Module, loss: str, inputs: Any, targets: Any, options: Any, reduction: str = "mean"
) -> Any:
    """J^T H J by reverse mode alone, a row of J and of H at a time; float64."""
    parameters = chosen(model, options.get("params"))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        f = outputs_of(model, inputs, options.get("output"))
        jacobian = torch.stack([
            flat_gradient(y, parameters, retain_graph=True) for y in f.reshape(-1)
        ])  # fmt: skip
        z = f.detach().requires_grad_()
        slope = torch.autograd.grad(value(loss, z, targets, reduction), z, create_graph=True)[0]
        hessian = torch.stack([
            torch.autograd.grad(g, z, retain_graph=True)[0].reshape(-1) for g in slope.reshape(-1)
        ])  # fmt: skip
    return (jacobian.T @ hessian @ jacobian).detach().numpy()


def dense_hessian(model: nn.Module, loss: str, inputs: Any, targets: Any, options: Any) -> Any:
    """By reverse mode twice, a row at a time; float64."""
    parameters = chosen(model, options.get("params"))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        y = value(loss, outputs_of(model, inputs, options.get("output")), targets)
        slope = flat_gradient(y, parameters, create_graph=True)
        rows = [flat_gradient(g, parameters, retain_graph=True) for g in slope]
    return torch.stack(rows).detach().numpy()


def parts(x: Any, samples: slice) -> Any:
    """Some samples of inputs or targets."""
    if isinstance(x, dict):
        return {key: value[samples] for key, value in x.items()}
    if isinstance(x, tuple):
        return tuple(value[samples] for value in x)
    return x[samples]
