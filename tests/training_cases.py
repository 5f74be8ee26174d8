"""A small classifier, and its data, for tests of GaussNewton."""

import numpy as np
import torch
from seeds import seeded
from torch import nn
from torch.nn.utils import parameters_to_vector


def network(dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Sequential:
    with seeded(seed):
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    return model.to(dtype)


def digits(dtype: torch.dtype = torch.float64, n: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    with seeded(1):
        x = torch.randn(n, 4, dtype=dtype)
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long()


def vector(model: nn.Module) -> np.ndarray:
    return parameters_to_vector(model.parameters()).detach().double().numpy().copy()
