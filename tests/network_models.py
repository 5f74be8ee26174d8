"""Small networks of every kind, and data of any size and type for some of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from seeds import seeded
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


class Gated(nn.Module):
    """A forward of one's own: a layer used twice, a product, a parameter of no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 5)
        self.twice = nn.Linear(5, 5)
        self.last = nn.Linear(5, 3, bias=False)
        self.scale = nn.Parameter(torch.zeros(5))

    def forward(self, x: Any) -> Any:
        h = torch.tanh(self.first(x))
        return self.last(self.twice(h) * torch.sigmoid(self.twice(h * self.scale)))


class Residual(nn.Module):
    """Two blocks with skips, the second by a convolution of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(2, 2, 3, padding=1, bias=False), nn.BatchNorm2d(2)
        self.conv2, self.bn2 = nn.Conv2d(2, 2, 3, padding=1, bias=False), nn.BatchNorm2d(2)
        self.conv3, self.bn3 = nn.Conv2d(2, 3, 3, stride=2, groups=1), nn.BatchNorm2d(3)
        self.skip = nn.Conv2d(2, 3, 3, stride=2, bias=False)
        self.head = nn.Linear(3, 3)

    def forward(self, x: Any) -> Any:
        h = functional.relu(self.bn1(self.conv1(x)))
        h = functional.silu(self.bn2(self.conv2(h)) + x)
        h = functional.relu(self.bn3(self.conv3(h)) + self.skip(h))
        return self.head(h.mean((2, 3)))


def group_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.GroupNorm(2, 6), nn.Mish(), nn.Linear(6, 3))


class Attention(nn.Module):
    """`nn.MultiheadAttention` with its weights asked for, and a padding mask."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Any, mask: Any = None) -> dict[str, Any]:
        h, weights = self.attention(x, x, x, key_padding_mask=mask)
        return {"logits": self.head(h[:, 0]), "weights": weights}


class GPT(nn.Module):
    """One block, pre-normalized, causal; the head is the embedding."""

    def __init__(self, vocabulary: int = 5, width: int = 4, length: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.places = nn.Parameter(torch.zeros(length, width))
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 6), nn.GELU(), nn.Linear(6, width))
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Any) -> Any:
        h = self.embed(tokens) + self.places[: tokens.shape[1]]
        q, k, v = (
            part.unflatten(-1, (2, -1)).transpose(1, 2)
            for part in self.qkv(self.norm1(h)).chunk(3, -1)
        )
        a = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h + self.out(a.transpose(1, 2).flatten(2))
        h = h + self.mlp(self.norm2(h))
        return self.head(self.norm3(h))


class Scattered(nn.Module):
    """Parameters of no layer, one of them unused, and a way that depends on the sample."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.ParameterDict({"a": torch.zeros(4, 3), "b": torch.zeros(())})
        self.listed = nn.ParameterList([torch.zeros(3), torch.zeros(2)])

    def forward(self, x: Any) -> Any:
        h = (x @ self.own["a"] + self.listed[0]) * self.own["b"].exp()
        positive = [float(row.sum()) > 0 for row in x]
        return torch.stack(
            [row.sin() if way else row for row, way in zip(h, positive, strict=True)]
        )


class LoRA(nn.Module):
    """A frozen layer with an adapter of rank 2."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.lora_a = nn.Parameter(torch.zeros(2, base.in_features))
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, 2))

    def forward(self, x: Any) -> Any:
        return self.base(x) + 2.0 * (x @ self.lora_a.T @ self.lora_b.T)


class TwoHeads(nn.Module):
    """Returns a pair, of which one is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 3)

    def forward(self, x: Any, shift: Any) -> tuple[Any, Any]:
        h = torch.tanh(self.body(x) + shift)
        return self.a(h), self.b(h)


class Holder(nn.Module):
    """Only passes on."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Any) -> Any:
        return self.net(x)


def convolutions() -> nn.Module:
    """Images to images."""
    return nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1),
        nn.Softplus(),
        nn.Upsample(scale_factor=2),
        nn.ConvTranspose2d(2, 1, 2),
    )


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


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


def adapted() -> nn.Module:
    return nn.Sequential(LoRA(nn.Linear(4, 5)), nn.Tanh(), LoRA(nn.Linear(5, 3)))


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
    "resnet": Case(Residual, normal(2, 5, 5), normal(3), "mse"),
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
    "adapter": Case(
        adapted, normal(4), classes(3), options={"params": ["0.lora_a", "0.lora_b", "2.lora_a"]}
    ),
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
    with seeded(seed), torch.no_grad():
        model = case.make().to(dtype).eval()
        for part in model.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.running_mean.normal_(std=0.3)
                part.running_var.uniform_(0.5, 2.0)
            if isinstance(part, LoRA):
                part.lora_a.normal_()
                part.lora_b.normal_()
    generator = torch.Generator().manual_seed(seed + 1)
    inputs = case.inputs(generator, n, dtype)
    return model, case.loss, inputs, case.targets(generator, n, dtype), dict(case.options)


def parts(x: Any, samples: slice) -> Any:
    """Some samples of inputs or targets."""
    if isinstance(x, dict):
        return {key: value[samples] for key, value in x.items()}
    if isinstance(x, tuple):
        return tuple(value[samples] for value in x)
    return x[samples]
