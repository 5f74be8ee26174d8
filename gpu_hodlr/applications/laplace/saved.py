"""What a file says of a posterior, beside its matrix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from gpu_hodlr.applications.laplace.likelihood import Likelihood
from gpu_hodlr.applications.laplace.prior import Prior
from gpu_hodlr.applications.linearized import Linearized
from gpu_hodlr.errors import ArgumentError

KINDS = ("classes", "binary", "values")


def about(linear: Linearized, likelihood: Likelihood, prior: Prior, seed: int) -> dict[str, Any]:
    """For JSON."""
    return {
        "names": list(prior.names),
        "precisions": prior.precisions.tolist(),
        "weights": None if prior.weights is None else prior.weights.tolist(),
        "log_likelihood": likelihood.value,
        "num_data": likelihood.num_data,
        "kind": likelihood.kind,
        "axis": likelihood.axis,
        "network": linear.fingerprint(),
        "seed": seed,
    }


def check_network(said: Mapping[str, Any], linear: Linearized) -> None:
    """Refuse another network than the posterior is of.

    Raises:
        ArgumentError: it is.
    """
    if linear.fingerprint() != said["network"]:
        raise ArgumentError(
            "model: its weights, layers, params= or output= are not those that the posterior was "
            "made of"
        )


def read_prior(said: Mapping[str, Any], linear: Linearized) -> Prior:
    """The prior.

    Raises:
        KeyError, ValueError, TypeError: the file says none.
    """
    precisions = said["precisions"]
    if said["weights"] is None:
        given = dict(zip(said["names"], precisions, strict=True)) if said["names"] else None
        return Prior.read(precisions[0] if given is None else given, linear.sizes)
    weights = Prior.read(np.array(said["weights"], np.float64), linear.sizes)
    return weights.at(Prior.read(precisions[0], linear.sizes).precisions)


def read_likelihood(said: Mapping[str, Any]) -> Likelihood:
    """The likelihood.

    Raises:
        KeyError, ValueError, TypeError: the file says none.
    """
    if said["kind"] not in KINDS:
        raise ValueError(f"unknown kind of likelihood {said['kind']!r}")
    return Likelihood(
        float(said["log_likelihood"]), int(said["num_data"]), said["kind"], int(said["axis"])
    )
