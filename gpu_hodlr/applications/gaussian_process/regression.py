"""Gaussian process regression."""

from __future__ import annotations

import copy
import warnings
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from gpu_hodlr.applications.gaussian_process.conventions import Regressor
from gpu_hodlr.applications.gaussian_process.evidence import Evidence
from gpu_hodlr.applications.gaussian_process.hyperparameters import Hyperparameters
from gpu_hodlr.applications.gaussian_process.posterior import Posterior, draws
from gpu_hodlr.applications.gaussian_process.samples import (
    as_numbers,
    as_table,
    as_targets,
    feature_names,
    like,
    on_device,
)
from gpu_hodlr.checks import check_count, check_number
from gpu_hodlr.compression.tolerance import SHARE
from gpu_hodlr.devices import (
    Array,
    HostArray,
    check_memory,
    device_kind,
    device_of,
    is_array,
    is_torch,
    namespace,
    to_host,
)
from gpu_hodlr.distributed import Communicator, communicator
from gpu_hodlr.errors import AccuracyWarning, ArgumentError, DtypeError, ShapeError

if TYPE_CHECKING:
    from gpu_hodlr.devices import AnyDevice

OPTIMIZERS = ("newton", None)
_MEASURED = 1.5  # a sampled spectral error is within so much, mostly
_OF_KERNEL = "alpha", "period"
_OF_COMPRESS = (
    "max_rank", "leaf_size", "ordering", "sampler", "storage_dtype", "atol", "tail", "progress",
)  # fmt: skip


class GaussianProcess(Regressor):
    """Gaussian process regression with a compressed kernel matrix; an estimator of scikit-learn's.

    y_i = f(x_i) + noise, f of mean 0 and covariance variance k(|(x - x') / lengthscale|). The
    hyper-parameters are those of the largest log marginal likelihood, `gh.log_marginal_likelihood`,
    found by Newton steps in their logarithms, with its gradient and the average information, of
    many points first on some of them (`subset`). Predictions are of f, without the noise. Rasmussen
    and Williams, Gaussian Processes for Machine Learning (2006), chapters 2 and 5.

    K is compressed so that its error E in the spectral norm is at most a tenth of the noise's
    variance, see `gh.log_marginal_likelihood`. That suffices: the mean of f(x) is w^T y, and its
    variance, the mean square error of that, is at least noise |w|^2, so that it changes by
    |w^T E w|, at most by a tenth of itself to first order: it does not become negative. Where that
    was not reached, or a variance is negative by rounding, an `AccuracyWarning` says so.

    X is an array (n, d), or a list, a data frame, CuPy's array or torch's tensor; all is computed
    in float64. Collective: all ranks make the same calls with the same data.

    Args:
        kernel: see `KernelOperator`.
        kernel_options: alpha or period of kernels that have one, a dict; they are not fitted.
        lengthscale: where the optimization starts: a number, or (d,), one of every coordinate;
            "auto" is half of the spread of the points, "each" that of every coordinate.
        variance: of f, at the start; None: the mean square of y.
        noise: variance of the noise, > 0, at the start; None: a tenth of the mean square of y. Or
            (n,) known ones of every sample, of which a common factor is fitted.
        lengthscale_bounds: a pair; None: 1e4 times more and less than the start; "fixed": not
            fitted.
        variance_bounds: likewise.
        noise_bounds: likewise; of (n,) of the common factor, which starts at 1.
        optimizer: "newton", or None: nothing is fitted.
        n_restarts_optimizer: further starts, drawn within the bounds.
        normalize_y: whether y is brought to mean 0 and variance 1 before; variance and noise are
            then those of that.
        subset: points, drawn at random, that the optimization begins with where there are half as
            many more; from where it ends there all points go on. None: all from the start.
        tol: an optimization ends where no step is predicted to gain more in log likelihood.
        max_iter: steps of one.
        num_probes: for the length scales' gradient, see `gh.log_marginal_likelihood`; None: n up to
            1,000 samples, with which it is exact, and 16 of more.
        scheme: of `compress`.
        rtol: of `compress`; the noise may ask for less.
        compress_options: others of `compress`: max_rank, leaf_size, ...
        random_state: seed of every random choice: an integer, NumPy's Generator or RandomState, or
            None for another one at every fit.
        device: "cpu" or "cuda", where all is computed, and data are copied to; None: where X is.
        comm: an mpi4py communicator.

    Attributes:
        lengthscale_, variance_, noise_: that were found; noise_ is an array where one was given.
        theta_: (p,) logarithms of what is fitted: variance, length scales, noise, in this order.
        log_marginal_likelihood_value_: at `theta_`.
        kernel_: the `KernelOperator` of the samples.
        matrix_: it compressed.
        factor_: of matrix_ plus noise.
        weights_: (n,) (K + noise)^-1 y: the mean is `kernel_.cross(X) @ weights_`.
        X_train_, y_train_: the samples, y as it was fitted.
        n_iter_: steps of the optimization.
        n_features_in_: d.
        feature_names_in_: of a data frame.

    Example:
        >>> X = np.linspace(0, 1, 200)[:, None]
        >>> y = np.sin(6 * X[:, 0]) + 0.1 * np.random.default_rng(0).standard_normal(200)
        >>> process = gh.GaussianProcess("matern52", noise=0.1).fit(X, y)
        >>> bool(0.07 < process.noise_ ** 0.5 < 0.14)
        True
        >>> mean, std = process.predict(np.array([[0.25]]), return_std=True)
        >>> bool(abs(mean[0] - np.sin(1.5)) < 3 * std[0] < 0.2)
        True
    """

    def __init__(
        self,
        kernel: Any = "matern52",
        *,
        kernel_options: dict[str, Any] | None = None,
        lengthscale: Any = "auto",
        variance: float | None = None,
        noise: Any = None,
        lengthscale_bounds: Any = None,
        variance_bounds: Any = None,
        noise_bounds: Any = None,
        optimizer: str | None = "newton",
        n_restarts_optimizer: int = 0,
        normalize_y: bool = False,
        subset: int | None = 4000,
        tol: float = 0.05,
        max_iter: int = 50,
        num_probes: int | None = None,
        scheme: str = "hss",
        rtol: float = 1e-6,
        compress_options: dict[str, Any] | None = None,
        random_state: Any = 0,
        device: AnyDevice | None = None,
        comm: Any = None,
    ) -> None:
        self.kernel, self.kernel_options = kernel, kernel_options
        self.lengthscale, self.lengthscale_bounds = lengthscale, lengthscale_bounds
        self.variance, self.variance_bounds = variance, variance_bounds
        self.noise, self.noise_bounds = noise, noise_bounds
        self.optimizer, self.n_restarts_optimizer = optimizer, n_restarts_optimizer
        self.normalize_y, self.subset = normalize_y, subset
        self.tol, self.max_iter, self.num_probes = tol, max_iter, num_probes
        self.scheme, self.rtol, self.compress_options = scheme, rtol, compress_options
        self.random_state, self.device, self.comm = random_state, device, comm

    def fit(self, X: Any, y: Any) -> Self:
        """Find the hyper-parameters and factorize.

        Collective: all ranks call.

        Args:
            X: (n, d) samples.
            y: (n,) targets.

        Raises:
            ShapeError, DtypeError, DeviceError, ArgumentError: of the samples, or of an argument
                of the constructor.
            NotPositiveDefiniteError: K plus noise is not, where the optimization starts.
            MemoryEstimateError: see `compress`.

        Warns:
            AccuracyWarning: the compression is not as close as the noise needs.

        Example:
            >>> X = np.random.default_rng(0).random((100, 2))
            >>> y = np.sin(9 * X[:, 0])
            >>> gh.GaussianProcess(lengthscale="each", noise=1e-3).fit(X, y).lengthscale_.shape
            (2,)
        """
        ranks, device = self._ranks(X)
        with ranks.agreed():
            points = self._placed(as_table(X, "X"), "X", device)
            if len(points) < 2:
                raise ShapeError(f"X must have two samples at least, got {len(points)} sample")
            targets = self._placed(as_targets(y, len(points)), "y", device)
            evidence = self._evidence(ranks, self.random_state)
            self._check()
            mean, scale = 0.0, 1.0
            if self.normalize_y:
                mean, scale = float(targets.mean()), float(namespace(points).std(targets)) or 1.0
                targets = (targets - mean) / scale
            start = Hyperparameters.read(vars(self), points, to_host(targets))
            ranks.same(X=points, y=targets, theta=start.theta, seed=evidence.seed)
        if self.optimizer is None:
            start = start.fixed()
        found = evidence.maximum(
            points, targets, start, restarts=self.n_restarts_optimizer, subset=self.subset,
            tol=self.tol, max_iter=self.max_iter,
        )  # fmt: skip
        at = start.at(found.theta)
        self.theta_, self.n_iter_ = found.theta, found.iterations
        self.variance_, self.lengthscale_, self.noise_ = at.variance, at.lengthscale, at.damping
        self.log_marginal_likelihood_value_ = found.likelihood.value
        self.kernel_ = evidence.operator(points, at)
        kept = found.likelihood.kept
        self.matrix_, self.factor_, self.weights_ = kept.matrix, kept.factor, kept.weights
        # Copies: what the user does with X and y afterwards is not of this process.
        self.X_train_, self.y_train_ = self.kernel_.points, targets.copy()
        self._evidence_, self._at, self._mean, self._scale = evidence, at, mean, scale
        self.n_features_in_, names = points.shape[1], feature_names(X)
        if names is not None:
            self.feature_names_in_ = names
        elif hasattr(self, "feature_names_in_"):
            del self.feature_names_in_
        self._warn(ranks)
        return self

    def predict(self, X: Any, return_std: bool = False, return_cov: bool = False) -> Any:
        """The mean of f, and how sure it is; before a fit of the prior.

        Collective: all ranks call.

        Args:
            X: (m, d).
            return_std: whether the standard deviation is wanted too, m solves, some at a time; add
                the noise's variance to its square for that of a new y.
            return_cov: whether the covariance is, (m, m).

        Returns:
            (m,) the mean; or a pair of it and (m,) or (m, m), of the library of X.

        Raises:
            ShapeError, DtypeError, DeviceError, ArgumentError: of X; both are asked for.
            MemoryEstimateError: the covariance does not fit.

        Warns:
            AccuracyWarning: a variance is negative; 0 is given for it.

        Example:
            >>> X = np.linspace(0, 1, 50)[:, None]
            >>> process = gh.GaussianProcess(noise=1e-3).fit(X, X[:, 0])
            >>> mean, covariance = process.predict(X[:3], return_cov=True)
            >>> mean.shape, covariance.shape
            ((3,), (3, 3))
        """
        ranks, _ = self._ranks(X)
        with ranks.agreed():
            new = self._new(X)
            if return_std and return_cov:
                raise ArgumentError("At most one of return_std or return_cov can be requested.")
            ranks.same(X=new, return_std=bool(return_std), return_cov=bool(return_cov))
            evidence, at, posterior = self._process(ranks, new)
            m = len(new)
            if return_cov:
                check_memory(4 * 8 * m * m, f"a {m} x {m} covariance", "the points", device_of(new))
        mean = namespace(new).zeros(m) if posterior is None else posterior.mean(new)
        mean = like(mean * self._y_scale + self._y_mean, X)
        if not (return_std or return_cov):
            return mean
        if return_cov:
            prior = _dense(evidence.operator(_two(new), at), m)
            rest = prior if posterior is None else posterior.covariance(new, prior)
            return mean, like(rest * self._y_scale**2, X)
        if posterior is None:
            rest = evidence.operator(_two(new), at).diagonal()[:m]
        else:
            rest = posterior.variance(new)
        return mean, like(namespace(rest).sqrt(rest) * self._y_scale, X)

    def sample_y(self, X: Any, n_samples: int = 1, random_state: Any = 0) -> Any:
        """Functions f drawn from the posterior, or before a fit from the prior, at new points.

        All samples at all points together are made with one factor, of the prior at the old and
        the new points, with a jitter of 1 % of the noise: their variance is too small by a few
        per cent. No (m, m) matrix is formed.

        Collective: all ranks call.

        Args:
            X: (m, d).
            n_samples: how many.
            random_state: see the class.

        Returns:
            (m, n_samples), of the library of X.

        Raises:
            ShapeError, DtypeError, DeviceError, ArgumentError: of the arguments.
            NotPositiveDefiniteError: the compression is not close enough for so small a noise.

        Example:
            >>> X = np.linspace(0, 1, 50)[:, None]
            >>> gh.GaussianProcess(lengthscale=0.1).sample_y(X, 3).shape
            (50, 3)
        """
        ranks, _ = self._ranks(X)
        with ranks.agreed():
            new = self._new(X)
            check_count(n_samples, "n_samples")
            seed = _seed(random_state, ranks)
            ranks.same(X=new, n_samples=n_samples, random_state=seed)
            evidence, at, posterior = self._process(ranks, new)
        y = None if posterior is None else self.y_train_
        found = draws(evidence, at, posterior, y, new, n_samples, seed)
        return like(found * self._y_scale + self._y_mean, X)

    def log_marginal_likelihood(self, theta: Any = None, eval_gradient: bool = False) -> Any:
        """Log p(y) of the samples that were fitted.

        Collective: all ranks call.

        Args:
            theta: (p,) logarithms of variance, length scales and noise, of those that are fitted;
                None: `theta_`.
            eval_gradient: whether the derivatives in theta are wanted.

        Returns:
            The value; with `eval_gradient` a pair of it and (p,).

        Raises:
            ArgumentError, ShapeError, DtypeError: nothing was fitted; not such a theta.
            NotPositiveDefiniteError: K plus noise is not, as compressed.

        Example:
            >>> X = np.linspace(0, 1, 50)[:, None]
            >>> process = gh.GaussianProcess().fit(X, np.sin(6 * X[:, 0]))
            >>> value, gradient = process.log_marginal_likelihood(process.theta_, True)
            >>> bool(np.isclose(value, process.log_marginal_likelihood_value_)), gradient.shape
            (True, (3,))
        """
        if not self.__sklearn_is_fitted__():
            raise ArgumentError("this GaussianProcess has no samples: call fit before")
        if theta is None and not eval_gradient:
            return self.log_marginal_likelihood_value_
        at = self._at
        with self.factor_.owners.comm.agreed():
            if theta is not None:
                given = to_host(as_numbers(theta, "theta"))
                if given.shape != self.theta_.shape or not np.isfinite(given).all():
                    raise ShapeError(
                        f"theta must be finite and have shape {self.theta_.shape}: logarithms of "
                        f"{', '.join(at.free) or 'nothing'}, got {given}"
                    )
                at = at.at(given)
            self.factor_.owners.comm.same(theta=at.theta, eval_gradient=bool(eval_gradient))
        found = self._evidence_.of(self.X_train_, self.y_train_, at, gradient=bool(eval_gradient))
        return (found.value, at.gradient(found)) if eval_gradient else found.value

    # --- what the methods share ----------------------------------------------------------------

    @property
    def _y_mean(self) -> float:
        return getattr(self, "_mean", 0.0)

    @property
    def _y_scale(self) -> float:
        return getattr(self, "_scale", 1.0)

    def _ranks(self, X: Any) -> tuple[Communicator, str]:
        """The ranks, and the device."""
        if self.__sklearn_is_fitted__():
            return self.factor_.owners.comm, self.kernel_.device
        if self.device is not None:
            device = device_kind(self.device)
        else:
            device = device_of(X) if is_array(X) or is_torch(X) else "cpu"
        return communicator(self.comm, device), device

    def _placed(self, x: Array, name: str, device: str) -> Array:
        return on_device(x, name, device, moves=self.device is not None)

    def _check(self) -> None:
        """Refuse arguments of the constructor that cannot be, but the hyper-parameters.

        Raises:
            ArgumentError, DtypeError: names it.
        """
        if self.optimizer not in OPTIMIZERS:
            raise ArgumentError(f"optimizer must be one of {OPTIMIZERS}, got {self.optimizer!r}")
        check_count(self.n_restarts_optimizer, "n_restarts_optimizer", least=0)
        check_count(self.max_iter, "max_iter")
        check_number(self.tol, "tol")
        if self.subset is not None:
            check_count(self.subset, "subset", least=2)

    def _evidence(self, ranks: Communicator, random_state: Any) -> Evidence:
        """The likelihood as a function of the hyper-parameters.

        Raises:
            ArgumentError, DtypeError: of options.
        """
        more = _options(self.compress_options, "compress_options", _OF_COMPRESS)
        # A copy: the user may change it after a fit.
        of_kernel = copy.deepcopy(_options(self.kernel_options, "kernel_options", _OF_KERNEL))
        if self.num_probes is not None:
            check_count(self.num_probes, "num_probes", least=2)
        options = {"scheme": self.scheme, "rtol": self.rtol, **more, "comm": ranks}
        seed = _seed(random_state, ranks)
        return Evidence(self.kernel, of_kernel, self.num_probes, seed, options)

    def _new(self, X: Any) -> Array:
        """New points, where the process is.

        Raises:
            ShapeError, DtypeError, DeviceError, ArgumentError: they are none.
        """
        device = self._ranks(X)[1]
        new = self._placed(as_table(X, "X"), "X", device)
        wanted = getattr(self, "n_features_in_", new.shape[1])
        if new.shape[1] != wanted:
            raise ShapeError(
                f"X has {new.shape[1]} features, but {type(self).__name__} is expecting {wanted} "
                "features as input"
            )
        names, known = feature_names(X), getattr(self, "feature_names_in_", None)
        if names is not None and known is not None and list(names) != list(known):
            raise ArgumentError(f"X has the columns {list(names)}, at fit they were {list(known)}")
        return new

    def _process(
        self, ranks: Communicator, new: Array
    ) -> tuple[Evidence, Hyperparameters, Posterior | None]:
        """What was fitted; before that the prior."""
        if not self.__sklearn_is_fitted__():
            at = Hyperparameters.read(vars(self), new, None)
            return self._evidence(ranks, self.random_state), at, None
        posterior = Posterior(self.kernel_, self.weights_, self.factor_, ranks)
        return self._evidence_, self._at, posterior

    def _warn(self, ranks: Communicator) -> None:
        """Say where the compression is not as close as the noise needs.

        Warns:
            AccuracyWarning: see there.
        """
        error, noise = self.matrix_.report.spectral_error, self._at.least_noise
        if error is None or error <= _MEASURED * SHARE * noise or ranks.rank:
            return
        warnings.warn(
            f"the kernel matrix is compressed with an error of {error:.3g} in the spectral norm, "
            f"more than a tenth of the noise, {noise:.3g}: likelihood and variances may be off; "
            "raise max_rank in compress_options, or bound the noise from below",
            AccuracyWarning,
            stacklevel=3,
        )


def _options(given: Any, name: str, known: tuple[str, ...]) -> dict[str, Any]:
    """Of a function that is called here.

    Raises:
        DtypeError, ArgumentError: it is no dict, or has others than are known.
    """
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise DtypeError(f"{name} must be a dict, got {type(given).__name__}")
    for key in given:
        if key not in known:
            raise ArgumentError(f"{name} may have {', '.join(known)}, got {key!r}")
    return given


def _two(new: Array) -> Array:
    """Of one point two, of which a kernel matrix can be."""
    return namespace(new).concatenate([new, new]) if len(new) == 1 else new


def _dense(op: Any, m: int) -> HostArray:
    """(m, m) of it."""
    return op.to_dense()[:m, :m]


def _seed(random_state: Any, ranks: Communicator) -> int:
    """An integer, the same on all ranks.

    Raises:
        DtypeError, ArgumentError: random_state is nothing that has one.
    """
    if random_state is None:
        random_state = np.random.default_rng()
    if isinstance(random_state, np.random.Generator):
        return int(ranks.bcast(int(random_state.integers(1 << 31))))
    if isinstance(random_state, np.random.RandomState):
        return int(ranks.bcast(int(random_state.randint((1 << 31) - 1))))
    return check_count(random_state, "random_state", least=0)
