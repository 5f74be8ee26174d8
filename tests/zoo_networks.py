"""Small modules of the zoo of networks."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


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


def lenet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 2, 3),
        nn.BatchNorm2d(2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(2, 3, 2, stride=2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(12, 3),
    )


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
        h = F.relu(self.bn1(self.conv1(x)))
        h = F.silu(self.bn2(self.conv2(h)) + x)
        h = F.relu(self.bn3(self.conv3(h)) + self.skip(h))
        return self.head(h.mean((2, 3)))


def group_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.GroupNorm(2, 6), nn.Mish(), nn.Linear(6, 3))


class Classifier(nn.Module):
    """A transformer's encoder layer with a token of the class."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 4)
        self.layer = nn.TransformerEncoderLayer(4, 2, 5, dropout=0.1, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Any) -> Any:
        return self.head(self.layer(self.embed(x)).mean(1))


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
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h + self.out(a.transpose(1, 2).flatten(2))
        h = h + self.mlp(self.norm2(h))
        return self.head(self.norm3(h))


class LSTM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(2, 3, batch_first=True)
        self.head = nn.Linear(3, 2)

    def forward(self, x: Any) -> Any:
        return self.head(self.lstm(x)[0][:, -1])


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
