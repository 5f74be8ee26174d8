"""What scikit-learn asks of an estimator, without importing it."""

from __future__ import annotations

from inspect import signature
from typing import Any, Self

import numpy as np

from gpu_hodlr.applications.gaussian_process.samples import as_numbers, as_targets
from gpu_hodlr.arrays import check_finite
from gpu_hodlr.devices import HostArray, to_host
from gpu_hodlr.errors import ArgumentError, ShapeError


class Regressor:
    """Parameters by name, a score, and scikit-learn's tags; its `clone` and pipelines take it."""

    @classmethod
    def _names(cls) -> list[str]:
        return [name for name in signature(cls.__init__).parameters if name != "self"]

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The arguments of the constructor.

        Args:
            deep: without effect: none of them is an estimator.

        Example:
            >>> gh.GaussianProcess(noise=0.1).get_params()["noise"]
            0.1
        """
        return {name: getattr(self, name) for name in sorted(self._names())}

    def set_params(self, **params: Any) -> Self:
        """Set arguments of the constructor; they count from the next fit on.

        Raises:
            ArgumentError: there is no such argument.

        Example:
            >>> gh.GaussianProcess().set_params(noise=0.1).noise
            0.1
        """
        names = self._names()
        for name in params:
            if name not in names:
                raise ArgumentError(
                    f"Invalid parameter {name!r} for estimator {self}. Valid parameters are: "
                    f"{sorted(names)}"
                )
        for name, value in params.items():
            setattr(self, name, value)
        return self

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """The coefficient of determination R^2 = 1 - sum w (y - mean)^2 / sum w (y - average)^2.

        Args:
            X: (n, d) samples.
            y: (n,) what is true of them.
            sample_weight: (n,) w, >= 0 and not all 0; None for ones.

        Raises:
            ShapeError, DtypeError, ArgumentError: not such numbers.

        Example:
            >>> X = np.linspace(0, 1, 50)[:, None]
            >>> y = np.sin(6 * X[:, 0])
            >>> gh.GaussianProcess(noise=1e-3).fit(X, y).score(X, y) > 0.99
            True
        """
        found = to_host(as_numbers(self.predict(X), "X"))
        truth = to_host(as_numbers(y, "y"))
        truth = truth[:, 0] if truth.shape == (len(found), 1) else truth
        truth = to_host(as_targets(truth, len(found)))
        weights = _weights(sample_weight, len(found))
        rest = float(weights @ (truth - found) ** 2)
        spread = float(weights @ (truth - np.average(truth, weights=weights)) ** 2)
        return 1.0 - rest / spread if spread else float(rest == 0)

    def predict(self, X: Any) -> Any:
        """See the subclass."""
        raise NotImplementedError

    def __repr__(self) -> str:
        usual = signature(type(self).__init__).parameters
        said = [
            f"{name}={value!r}"
            for name in self._names()
            if not _same(value := getattr(self, name), usual[name].default)
        ]
        return f"{type(self).__name__}({', '.join(said)})"

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "n_features_in_")

    def __sklearn_tags__(self) -> Any:
        """Of a regressor; scikit-learn asks, and so it is there to be imported."""
        from sklearn.utils import InputTags, RegressorTags, Tags, TargetTags

        return Tags(
            estimator_type="regressor",
            target_tags=TargetTags(required=True),
            regressor_tags=RegressorTags(),
            input_tags=InputTags(),
            requires_fit=False,
        )


def _weights(given: Any, n: int) -> HostArray:
    """(n,) of the samples.

    Raises:
        ShapeError, DtypeError, ArgumentError: see `Regressor.score`.
    """
    if given is None:
        return np.ones(n)
    found = to_host(as_numbers(given, "sample_weight"))
    if found.shape != (n,):
        raise ShapeError(f"sample_weight must have shape ({n},), got {found.shape}")
    check_finite(found, "sample_weight")
    if found.min() < 0 or not found.any():
        raise ArgumentError("sample_weight must be >= 0, and not 0 everywhere")
    return found


def _same(value: Any, usual: Any) -> bool:
    return value is usual or (type(value) is type(usual) and bool(np.all(value == usual)))
