"""Losses of outputs and targets that do not fit: each refused with what was got."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
from test_bad_input import refused

from gpu_hodlr.errors import ArgumentError, DtypeError, ShapeError

torch = pytest.importorskip("torch")
from test_output_losses import (  # noqa: E402
    BCE,
    CE,
    GAUSS,
    LOG_P,
    POISSON,
    C,
    N,
    T,
    W,
    classes,
    drawn,
    shares,
)

from gpu_hodlr.networks.losses import read_loss  # noqa: E402

NAN = drawn(N, C) * float("nan")
BAD: dict[str, tuple[Any, Any, Any, Any, tuple[str, ...]]] = {
    "mse, shape": (ShapeError, "mse", drawn(N, C), drawn(N), ("targets", "(4, 3)", "(4,)")),
    "mse, broadcast": (ShapeError, "mse", drawn(N, 1), drawn(N), ("targets", "(4, 1)")),
    "NaN targets": (ArgumentError, "mse", drawn(N, C), NAN, ("targets", "NaN")),
    "NaN outputs": (ArgumentError, "mse", NAN, drawn(N, C), ("model(inputs)", "NaN")),
    "complex": (DtypeError, "huber", drawn(N, C), NAN.cfloat(), ("targets", "complex")),
    "whole outputs": (DtypeError, "mse", classes(N, C), drawn(N, C), ("model(inputs)", "int64")),
    "no outputs": (ShapeError, "mse", drawn(0, C), drawn(0, C), ("model(inputs)", "(0, 3)")),
    "a scalar": (ShapeError, "mse", drawn(), drawn(), ("model(inputs)", "()")),
    "a pair": (DtypeError, "mse", drawn(N), (drawn(N), drawn(N)), ("targets", "tuple")),
    "a pair of classes": (DtypeError, "nll", LOG_P, (classes(N),), ("targets", "tuple")),
    "no classes": (ShapeError, "cross_entropy", drawn(N), classes(N), ("model(inputs)", "(4,)")),
    "class too large": (ArgumentError, "nll", LOG_P, classes(N) + 1, ("targets", "0 .. 2", "3")),
    "negative class": (ArgumentError, "nll", LOG_P, classes(N) - 1, ("targets", "0 .. 2", "-1")),
    "class shape": (
        ShapeError,
        "cross_entropy",
        drawn(N, T, C),
        classes(N, 2),
        ("(4, 3) class indices", "(4, 5) with classes last", "(4, 2)"),
    ),
    "probabilities, classes last": (
        ShapeError,
        "cross_entropy",
        drawn(N, T, C),
        shares(N, C, T),
        ("targets", "(4, 5, 3) probabilities"),
    ),
    "flags": (DtypeError, "cross_entropy", drawn(N, C), classes(N) > 0, ("targets", "bool")),
    "negative probability": (
        ArgumentError,
        "cross_entropy",
        drawn(N, C),
        -shares(N, C),
        ("targets", ">= 0"),
    ),
    "class weights": (
        ShapeError,
        CE(weight=W[:2]),
        drawn(N, C),
        classes(N),
        ("loss.weight", "(3,)", "(2,)"),
    ),
    "nll of logits": (
        ArgumentError,
        "nll",
        drawn(N, C),
        classes(N),
        ("log-probabilities", "cross_entropy"),
    ),
    "nll of probabilities": (DtypeError, "nll", LOG_P, shares(N, C), ("class indices", "nll")),
    "not between 0 and 1": (ArgumentError, BCE(), drawn(N, C), 2 * W.expand(N, C), ("0 .. 1",)),
    "weights of samples": (
        ArgumentError,
        BCE(weight=shares(N, C)),
        drawn(N, C),
        shares(N, C),
        ("loss.weight", "same for every sample", "(4, 3)"),
    ),
    "weights of others": (
        ShapeError,
        BCE(pos_weight=W[:2]),
        drawn(N, C),
        shares(N, C),
        ("loss.pos_weight", "broadcast", "(2,)"),
    ),
    "negative weights": (
        ArgumentError,
        BCE(pos_weight=-W),
        drawn(N, C),
        shares(N, C),
        ("loss.pos_weight", ">= 0"),
    ),
    "negative counts": (ArgumentError, "poisson_nll", drawn(N, C), -shares(N, C), (">= 0",)),
    "negative rates": (
        ArgumentError,
        POISSON(log_input=False),
        drawn(N, C),
        shares(N, C),
        ("model(inputs)", "rates", "log_input=False"),
    ),
    "a predicted variance": (
        ArgumentError,
        GAUSS(),
        drawn(N, C),
        drawn(N, C),
        ("gaussian_nll", "(target, variance)", "not convex"),
    ),
    "negative variances": (
        ArgumentError,
        GAUSS(),
        drawn(N, C),
        (drawn(N, C), -shares(N, C)),
        ("variances", ">= 0"),
    ),
    "variances of others": (
        ShapeError,
        GAUSS(),
        drawn(N, C),
        (drawn(N, C), shares(C)),
        ("variances", "(4, 1)", "(3,)"),
    ),
}


@pytest.mark.parametrize(("kind", "loss", "outputs", "targets", "words"), BAD.values(), ids=BAD)
def test_what_does_not_fit(kind: Any, loss: Any, outputs: Any, targets: Any, words: Any):
    refused(kind, lambda: read_loss(loss).check(outputs, targets), *words)


def test_a_mean_over_nothing():
    ignored = torch.full((N,), -100)
    for loss, targets in ((CE(), ignored), (CE(weight=0 * W), classes(N))):
        read = read_loss(loss)
        read.check(drawn(N, C), targets)
        total = read.total(drawn(N, C), targets)
        refused(ArgumentError, partial(read.factor, total), "targets", "loss.weight is 0")
        assert read_loss(loss, "sum").factor(total) == 1
