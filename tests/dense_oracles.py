"""Dense float64 matrices, built another way than the package builds them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.special
from scipy.spatial.distance import cdist

from gpu_hodlr.devices import to_host

Matrix = np.ndarray[Any, Any]

MATERN_ORDER = {"laplace": 0.5, "matern32": 1.5, "matern52": 2.5}


def kernel_matrix(
    points: Matrix,
    kernel: str,
    lengthscale: float = 1.0,
    nugget: float = 0.0,
    others: Matrix | None = None,
    alpha: float = 2.0,
) -> Matrix:
    """A kernel matrix from `cdist` and the general Matern formula with the Bessel function K_nu.

    Laplace is Matern 1/2: exp(-r).
    """
    x = np.asarray(points, np.float64).reshape(len(points), -1)
    y = x if others is None else np.asarray(others, np.float64).reshape(len(others), -1)
    r = cdist(x, y) / lengthscale
    if kernel == "gaussian":
        k = np.exp(-0.5 * r**2)
    elif kernel == "rational_quadratic":
        k = 1 / (1 + r**2 / (2 * alpha)) ** alpha
    elif kernel == "inverse_multiquadric":
        k = 1 / np.sqrt(1 + r**2)
    elif kernel == "spherical":
        k = np.where(r < 1, 1 - 1.5 * r + 0.5 * r**3, 0.0)
    elif kernel == "squared_distance":
        k = r**2
    else:
        nu = MATERN_ORDER[kernel]
        t = np.sqrt(2 * nu) * np.where(r > 0, r, 1)
        k = 2 ** (1 - nu) / scipy.special.gamma(nu) * t**nu * scipy.special.kv(nu, t)
        k = np.where(r > 0, k, 1.0)
    return k + nugget * np.eye(len(x)) if others is None else k


def distance_matrix(n: int, profile: Callable[[Matrix], Matrix]) -> Matrix:
    """profile(|i - j|) for i, j = 0 .. n - 1: a symmetric Toeplitz matrix."""
    i = np.arange(float(n))
    return profile(np.abs(i[:, None] - i))


def frobenius_error(approximate: Any, exact: Matrix) -> float:
    """norm(A - K)_F / norm(K)_F in float64 (norm(A)_F for K = 0)."""
    difference = np.linalg.norm(np.asarray(approximate, np.float64) - exact)
    norm = np.linalg.norm(exact)
    return float(difference / norm) if norm else float(difference)


def backward_error(A: Matrix, x: Matrix, b: Matrix) -> float:
    """norm(A x - b) / (norm(A) norm(x) + norm(b)), Frobenius norms, float64."""
    A, x, b = (np.asarray(part, np.float64) for part in (A, x, b))
    residual = np.linalg.norm(A @ x - b)
    scale = np.linalg.norm(A) * np.linalg.norm(x) + np.linalg.norm(b)
    return float(residual / scale)


def check_products(K: Any, xp: Any, rounding: float) -> None:
    """Products, diagonal, trace and symmetry of a compressed matrix are those of its dense one.

    To `rounding` times its largest entry; products to ten times that.
    """
    dense = to_host(K.to_dense()).astype(np.float64)
    atol = rounding * abs(dense).max()
    np.testing.assert_allclose(dense, dense.T, rtol=0, atol=atol)
    v = np.random.default_rng(1).standard_normal((len(dense), 3)).astype(K.dtype)
    product = K @ xp.asarray(v)
    assert isinstance(product, xp.ndarray)
    np.testing.assert_allclose(to_host(product), dense @ v, rtol=0, atol=10 * atol)
    np.testing.assert_allclose(to_host(K.diagonal()), np.diagonal(dense), rtol=0, atol=atol)
    assert abs(K.trace() - np.trace(dense)) <= 1e-5 * abs(np.trace(dense))


def random_spd(n: int, seed: int = 0, smallest: float = 0.1) -> Matrix:
    """A dense symmetric matrix with eigenvalues between `smallest` and 1, random vectors."""
    rng = np.random.default_rng(seed)
    q = np.linalg.qr(rng.standard_normal((n, n)))[0]
    a = (q * np.linspace(smallest, 1.0, n)) @ q.T
    return (a + a.T) / 2


def loss_function(name: str, reduction: str, **options: Any) -> Callable[[Any, Any], Any]:
    """A torch loss of (outputs, targets); "none" is summed, as the GGN counts it."""
    from torch.nn import functional

    function = {"mse": functional.mse_loss, "cross_entropy": functional.cross_entropy}[name]
    if reduction == "none":
        return lambda z, t: function(z, t, reduction="none", **options).sum()
    return lambda z, t: function(z, t, reduction=reduction, **options)


def ggn(model: Any, loss: Callable[[Any, Any], Any], inputs: Any, targets: Any) -> Matrix:
    """J^T H J, J by `torch.func.jacrev` of the whole network, H by `torch.func.hessian`.

    Of the parameters that require grad.

    Args:
        model: any module; it is used in float64.
        loss: (outputs, targets) -> scalar.
        inputs: of the model.
        targets: of the loss.
    """
    import torch
    from torch.func import functional_call, hessian, jacrev

    model = copy.deepcopy(model).double()
    x = inputs.detach().double()
    if targets.is_floating_point():
        targets = targets.double()
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    outputs = functional_call(model, parameters, (x,))
    blocks = jacrev(lambda p: functional_call(model, p, (x,)))(parameters)
    size = outputs.numel()
    J = torch.cat([blocks[name].reshape(size, -1) for name in parameters], dim=1)
    with warnings.catch_warnings():  # torch's own use of torch.jit, at the first forward mode
        warnings.simplefilter("ignore", DeprecationWarning)
        H = hessian(lambda z: loss(z, targets))(outputs).reshape(size, size)
    return (J.T @ H @ J).numpy()


def ggn_product(model: Any, loss: Callable[[Any, Any], Any], inputs: Any, targets: Any, v: Any):
    """J^T H J v with the parameters named and laid out by torch's own functions.

    `vector_to_parameters` spreads v, `parameters_to_vector` collects the result: forward mode, a
    Hessian, reverse mode.
    """
    import torch
    from torch.func import functional_call, hessian, jvp, vjp

    direction = copy.deepcopy(model).double()
    torch.nn.utils.vector_to_parameters(v, direction.parameters())
    model = copy.deepcopy(model).double()
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    tangents = {name: p.detach() for name, p in direction.named_parameters()}

    def outputs_of(p: Any) -> Any:
        return functional_call(model, p, (inputs,))

    with warnings.catch_warnings():  # see ggn
        warnings.simplefilter("ignore", DeprecationWarning)
        outputs, tangent = jvp(outputs_of, (parameters,), (tangents,))
        H = hessian(lambda z: loss(z, targets))(outputs).reshape(outputs.numel(), -1)
    pulled = vjp(outputs_of, parameters)[1]((H @ tangent.reshape(-1)).reshape(outputs.shape))[0]
    return torch.nn.utils.parameters_to_vector([pulled[name] for name in parameters])
