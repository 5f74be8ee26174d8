"""Gaussian processes of real elevations: gh.GaussianProcess beside scikit-learn and gpytorch.

    python profiling/gaussian_process.py likelihood
    python profiling/gaussian_process.py fit --points 5000 50000
    python profiling/gaussian_process.py --json profiling/results/gaussian_process.json
    python profiling/gaussian_process.py picture --png profiling/results/gaussian_process.png

Elevations that matplotlib ships, 344 x 403 = 138,632 points (jacksboro_fault_dem.npz), in pixels,
of mean 0 and variance 1; points are drawn at random, Matern-3/2, float64. "likelihood": log p(y)
and its gradient at fixed hyper-parameters, of each package, and the value of a dense Cholesky
factor; gpytorch by Cholesky and with its default CG. "fit": hyper-parameters fitted, with
every likelihood on the way and the package's threads, one of BLAS each, then mean and standard
deviation at points that are left out, beside those of a nearest neighbour. "picture": the
elevations, their mean from the points and its standard deviation. CPU seconds of all threads. What
is run is written into the file beside what is there. Needs matplotlib and scikit-learn, and
gpytorch where it is to be compared.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from environment import environment
from scipy.linalg import cho_factor, cho_solve
from scipy.spatial import cKDTree
from threadpoolctl import threadpool_limits

import gpu_hodlr as gh
from gpu_hodlr.applications.gaussian_process import evidence
from gpu_hodlr.batched.threads import num_threads

KERNEL, VARIANCE, LENGTHSCALE, NOISE = "matern32", 0.66, 11.8, 1e-3
LEFT_OUT = 1000
STEP = 3  # pixels, of a picture
PEERS = "gpu_hodlr", "sklearn", "gpytorch", "gpytorch_cg"


def everywhere(step: int) -> tuple[np.ndarray, np.ndarray]:
    """Elevations in metres, and their points, of every so many pixels each way."""
    from matplotlib.cbook import get_sample_data

    height = get_sample_data("jacksboro_fault_dem.npz")["elevation"].astype(float)
    row, column = (index[::step, ::step].ravel() for index in np.indices(height.shape))
    return height[::step, ::step], np.stack([column, row], axis=1).astype(float)


def elevations(num: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Points and heights, and others that are left out."""
    height, points = everywhere(1)
    y = (height.ravel() - height.mean()) / height.std()
    order = np.random.default_rng(0).permutation(len(y))
    some, rest = order[:num], order[-LEFT_OUT:]
    return points[some], y[some], points[rest], y[rest]


def timed(run: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """What it gives, and seconds."""
    cpu, wall = time.process_time(), time.perf_counter()
    found = run()
    return found, {
        "cpu_s": time.process_time() - cpu,
        "wall_s": time.perf_counter() - wall,
    }


# --- the likelihood ----------------------------------------------------------------------------


def dense(x: np.ndarray, y: np.ndarray) -> float:
    """The value by LAPACK."""
    A = gh.KernelOperator(x, KERNEL, LENGTHSCALE, NOISE, variance=VARIANCE).to_dense()
    factor = cho_factor(A, lower=True, overwrite_a=True)
    fit = y @ cho_solve(factor, y)
    logdet = 2 * np.log(np.diag(factor[0])).sum()
    return float(-0.5 * (fit + logdet + len(y) * np.log(2 * np.pi)))


def of_gpu_hodlr(x: np.ndarray, y: np.ndarray) -> tuple[float, list[float]]:
    op = gh.KernelOperator(x, KERNEL, LENGTHSCALE, variance=VARIANCE)
    found = gh.log_marginal_likelihood(op, y, NOISE, num_probes=16)
    return found.value, [float(found.gradient[k]) for k in ("variance", "lengthscale", "noise")]


def of_sklearn(x: np.ndarray, y: np.ndarray) -> tuple[float, list[float]]:
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

    kernel = ConstantKernel(VARIANCE) * Matern(LENGTHSCALE, nu=1.5) + WhiteKernel(NOISE)
    process = GaussianProcessRegressor(kernel, alpha=0.0, optimizer=None)
    process.X_train_, process.y_train_, process.kernel_ = x, y, kernel
    value, gradient = process.log_marginal_likelihood(kernel.theta, eval_gradient=True)
    return float(value), gradient.tolist()


def of_gpytorch(x: np.ndarray, y: np.ndarray, *, cg: bool = False) -> tuple[float, list[float]]:
    import gpytorch
    import torch

    class Model(gpytorch.models.ExactGP):
        def __init__(self, x: Any, y: Any, likelihood: Any) -> None:
            super().__init__(x, y, likelihood)
            self.mean_module = gpytorch.means.ZeroMean()
            matern = gpytorch.kernels.MaternKernel(nu=1.5)
            self.covar_module = gpytorch.kernels.ScaleKernel(matern)

        def forward(self, x: Any) -> Any:
            return gpytorch.distributions.MultivariateNormal(
                self.mean_module(x), self.covar_module(x)
            )

    torch.manual_seed(0)
    x, y = torch.from_numpy(x), torch.from_numpy(y)
    likelihood = gpytorch.likelihoods.GaussianLikelihood().double()
    model = Model(x, y, likelihood).double()
    likelihood.noise = NOISE
    model.covar_module.outputscale = VARIANCE
    model.covar_module.base_kernel.lengthscale = LENGTHSCALE
    model.train()
    exactly = gpytorch.settings.fast_computations(*[cg] * 3)
    with exactly, gpytorch.settings.max_cholesky_size(0 if cg else 1 << 30):
        loss = gpytorch.mlls.ExactMarginalLogLikelihood(likelihood, model)(model(x), y) * len(y)
        loss.backward()
    raw = (
        (model.covar_module, "raw_outputscale"),
        (model.covar_module.base_kernel, "raw_lengthscale"),
        (likelihood.noise_covar, "raw_noise"),
    )
    slopes = []
    for module, name in raw:  # d / d log p = d / d raw / (dp / d raw) p
        parameter = getattr(module, name)
        constraint = getattr(module, f"{name}_constraint")
        at = parameter.detach().clone().requires_grad_()
        p = constraint.transform(at)
        (change,) = torch.autograd.grad(p.sum(), at)
        slopes.append(float((parameter.grad / change * p.detach()).sum()))
    return float(loss.detach()), slopes


RUN: dict[str, Callable[[np.ndarray, np.ndarray], tuple[float, list[float]]]] = {
    "gpu_hodlr": of_gpu_hodlr,
    "sklearn": of_sklearn,
    "gpytorch": of_gpytorch,
    "gpytorch_cg": lambda x, y: of_gpytorch(x, y, cg=True),
}


def likelihoods(num: int, peers: Sequence[str]) -> dict[str, Any]:
    """Of all packages, and the exact value."""
    x, y, _, _ = elevations(num)
    exact, seconds = timed(lambda: dense(x, y))
    found: dict[str, Any] = {"dense": {"value": exact, **seconds}}
    print(f"{num} points, dense: {exact:.4f}, {seconds['cpu_s']:.2f} CPU s")
    for name in peers:
        try:
            (value, gradient), seconds = timed(lambda name=name: RUN[name](x, y))
        except ImportError as error:
            print(f"{name}: left out, {error}")
            continue
        found[name] = {"value": value, "off": value - exact, "gradient": gradient, **seconds}
        said = ", ".join(f"{g:.2f}" for g in gradient)
        print(f"{name:12} {value:.4f}  gradient {said}  {seconds['cpu_s']:.2f} CPU s", flush=True)
    return found


# --- a fit -------------------------------------------------------------------------------------


@contextmanager
def watched() -> Iterator[list[dict[str, Any]]]:
    """Every likelihood that is computed meanwhile, and its seconds."""
    made: list[dict[str, Any]] = []
    original = evidence.log_marginal_likelihood

    def likelihood(op: Any, y: Any, damping: float, **options: Any) -> gh.LogMarginalLikelihood:
        found, seconds = timed(lambda: original(op, y, damping, **options))
        at = {"variance": op.variance, "lengthscale": op.lengthscale, "noise": damping}
        rtol = found.report.rtol
        made.append({"points": len(y), "value": found.value, **at, "rtol": rtol, **seconds})
        print(json.dumps(made[-1]), flush=True)
        return found

    evidence.log_marginal_likelihood = likelihood
    try:
        yield made
    finally:
        evidence.log_marginal_likelihood = original


def fitted(num: int) -> dict[str, Any]:
    """Hyper-parameters, seconds, and how good predictions are."""
    x, y, new, truth = elevations(num)
    process = gh.GaussianProcess(KERNEL)
    with watched() as likelihoods:
        _, fit = timed(lambda: process.fit(x, y))
    (mean, std), predict = timed(lambda: process.predict(new, return_std=True))
    off = truth - mean
    nearest = y[cKDTree(x).query(new)[1]]
    found = {
        "theta": process.theta_.tolist(),
        "variance": process.variance_,
        "lengthscale": process.lengthscale_,
        "noise": process.noise_,
        "value": process.log_marginal_likelihood_value_,
        "iterations": process.n_iter_,
        "threads": num_threads(),
        "fit": fit,
        f"predict_{len(new)}": predict,
        "rmse": float(np.sqrt(np.mean(off**2))),
        "rmse_of_the_nearest": float(np.sqrt(np.mean((truth - nearest) ** 2))),
        "spread_of_scaled_errors": float(np.std(off / np.sqrt(std**2 + process.noise_))),
        "ranks": [max(level) for level in process.matrix_.ranks],
        "stored_percent": 100 * process.matrix_.storage_fraction,
        "spectral_error": process.matrix_.report.spectral_error,
    }
    print(f"{num} points:", json.dumps(found, indent=1), flush=True)
    return {**found, "likelihoods": likelihoods}


def picture(num: int, path: Path) -> None:
    """Truth, mean and standard deviation beside each other, in metres."""
    from matplotlib.figure import Figure

    x, y, _, _ = elevations(num)
    height, new = everywhere(STEP)
    whole, _ = everywhere(1)
    process = gh.GaussianProcess(
        KERNEL, lengthscale=LENGTHSCALE, variance=VARIANCE, noise=NOISE, optimizer=None
    ).fit(x, y)
    mean, std = (v.reshape(height.shape) * whole.std() for v in process.predict(new, True))
    figure = Figure(figsize=(9, 2.9), dpi=80, layout="constrained")
    low, high = height.min(), height.max()
    panels = (
        ("elevation, m", height, {"cmap": "terrain", "vmin": low, "vmax": high}),
        (f"mean of {num:,} points", mean + whole.mean(),
         {"cmap": "terrain", "vmin": low, "vmax": high}),
        ("standard deviation, m", std, {"cmap": "viridis", "vmin": 0}),
    )  # fmt: skip
    for axes, (title, shown, style) in zip(figure.subplots(1, 3), panels, strict=True):
        figure.colorbar(axes.imshow(shown, **style), ax=axes, shrink=0.8)
        axes.set_title(title, fontsize=10)
        axes.set_axis_off()
    figure.savefig(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("parts", nargs="*", help="likelihood, fit, picture")
    parser.add_argument("--points", nargs="*", type=int, default=[5000])
    parser.add_argument("--peers", nargs="*", default=PEERS, choices=PEERS)
    parser.add_argument("--png", type=Path, default=Path("gaussian_process.png"))
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    parts = options.parts or ["likelihood", "fit"]
    if set(parts) - {"likelihood", "fit", "picture"}:
        parser.error(f"no part {', '.join(parts)}; there are likelihood, fit, picture")
    old = options.json is not None and options.json.exists()
    results = json.loads(options.json.read_text(encoding="utf-8"))["results"] if old else {}
    for num in options.points:
        for part in parts:
            if part == "picture":
                picture(num, options.png)
                continue
            made = likelihoods(num, options.peers) if part == "likelihood" else fitted(num)
            results.setdefault(part, {}).setdefault(str(num), {}).update(made)
            if options.json is not None:
                content = {"environment": environment(), "results": results}
                options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    with threadpool_limits(1, "blas"):
        sys.exit(main())
