"""Bad arguments of a network's matrix: each is refused with what was got and what was wanted."""

from typing import Any

import numpy as np
import pytest
from test_bad_input import INF, NAN, refused

import gpu_hodlr as gh
from gpu_hodlr.errors import (
    ArgumentError,
    DtypeError,
    GpuHodlrError,
    ShapeError,
)

torch = pytest.importorskip("torch")
nn = torch.nn
import torch.nn.utils.prune  # noqa: E402
from network_cases import case, network  # noqa: E402
from test_bad_network import INPUTS, TARGETS, build  # noqa: E402


def class_targets(*changes: tuple[int, int]) -> Any:
    targets = torch.zeros(7, dtype=torch.int64)
    for place, value in changes:
        targets[place] = value
    return targets


def changed(x: Any, value: float) -> Any:
    x = x.clone()
    x[2, 1] = value
    return x


ARGUMENTS: dict[str, tuple[type[GpuHodlrError], dict[str, Any], tuple[str, ...]]] = {
    "loss": (ArgumentError, {"loss": "hinge"}, ("loss", "mse", "cross_entropy", "'hinge'")),
    "loss module": (ArgumentError, {"loss": nn.L1Loss()}, ("loss", "L1Loss")),
    "reduction": (ArgumentError, {"reduction": "max"}, ("reduction", "mean", "'max'")),
    "dtype": (DtypeError, {"dtype": torch.float16}, ("dtype", "float32", "float16")),
    "integer dtype": (DtypeError, {"dtype": int}, ("dtype", "float32", "int")),
    "device": (ArgumentError, {"device": "tpu"}, ("device", "'tpu'")),
    "inputs: width": (ShapeError, {"inputs": INPUTS[:, :5]}, ("layer 0", "(n, 6)", "(7, 5)")),
    "inputs: one sample": (ShapeError, {"inputs": INPUTS[0]}, ("inputs", "(n, ...)", "(6,)")),
    "inputs: none": (ShapeError, {"inputs": INPUTS[:0]}, ("inputs", "n >= 1", "(0, 6)")),
    "inputs: integer": (DtypeError, {"inputs": INPUTS.long()}, ("inputs", "floating", "int64")),
    "inputs: list": (DtypeError, {"inputs": [[1.0] * 6]}, ("inputs", "list")),
    "inputs: objects": (
        DtypeError,
        {"inputs": INPUTS.numpy().astype(object)},
        ("inputs", "numbers that torch has", "object"),
    ),
    "inputs: sparse": (
        DtypeError,
        {"inputs": INPUTS.to_sparse()},
        ("inputs must be a dense tensor", "sparse_coo", "to_dense()"),
    ),
    "targets: text": (
        DtypeError,
        {"targets": np.full((7, 3), "1")},
        ("targets", "numbers that torch has", "<U1"),
    ),
    "inputs: NaN": (ArgumentError, {"inputs": changed(INPUTS, NAN)}, ("inputs", "1 entries")),
    "inputs: infinity": (ArgumentError, {"inputs": changed(INPUTS, INF)}, ("inputs", "infinite")),
    "inputs: complex": (
        DtypeError,
        {"inputs": INPUTS.to(torch.complex128)},
        ("inputs", "complex128"),
    ),
    "targets: columns": (
        ShapeError,
        {"targets": TARGETS[:, :2]},
        ("targets", "(7, 3)", "(7, 2)"),
    ),
    "targets: samples": (ShapeError, {"targets": TARGETS[:5]}, ("targets", "(7, 3)", "(5, 3)")),
    "targets: NaN": (ArgumentError, {"targets": changed(TARGETS, NAN)}, ("targets", "NaN")),
    "targets: complex": (
        DtypeError,
        {"targets": TARGETS.to(torch.complex128)},
        ("targets", "complex128"),
    ),
    "targets: list": (DtypeError, {"targets": [[0.0] * 3] * 7}, ("targets", "list")),
    "classes: too large": (
        ArgumentError,
        {"loss": "cross_entropy", "targets": class_targets((4, 3))},
        ("targets", "0 .. 2", "3"),
    ),
    "classes: negative": (
        ArgumentError,
        {"loss": "cross_entropy", "targets": class_targets((4, -1))},
        ("targets", "0 .. 2", "-1"),
    ),
    "classes: samples": (
        ShapeError,
        {"loss": "cross_entropy", "targets": class_targets()[:6]},
        ("targets", "(7,)", "(6,)"),
    ),
    "classes: all ignored": (
        ArgumentError,
        {"loss": "cross_entropy", "targets": class_targets() - 100},
        ("targets", "ignored"),
    ),
    "probabilities: shape": (
        ShapeError,
        {"loss": "cross_entropy", "targets": TARGETS[:, :2].abs()},
        ("targets", "(7, 3)", "(7, 2)"),
    ),
    "probabilities: negative": (
        ArgumentError,
        {"loss": "cross_entropy", "targets": -TARGETS.abs()},
        ("targets", ">= 0"),
    ),
    "probabilities: NaN": (
        ArgumentError,
        {"loss": "cross_entropy", "targets": changed(TARGETS.abs(), NAN)},
        ("targets", "finite"),
    ),
}


@pytest.mark.parametrize(("kind", "changes", "words"), ARGUMENTS.values(), ids=ARGUMENTS)
def test_arguments(kind: type[GpuHodlrError], changes: dict[str, Any], words: tuple[str, ...]):
    model = network("two layers")
    refused(kind, lambda: build(model, **changes), *words)


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("part", ["0.weight", "2.bias"])
def test_weights_that_are_not_finite(part: str, value: float):
    model = network("two layers")
    with torch.no_grad():
        dict(model.named_parameters())[part].view(-1)[0] = value
    refused(ArgumentError, lambda: build(model), part, "1 entries", "NaN or infinite")


def test_outputs_that_overflow():
    """Finite weights and inputs whose outputs are not."""
    model = network("one layer")
    with torch.no_grad():
        model[0].weight.fill_(1e200)
    refused(
        ArgumentError,
        lambda: build(model, inputs=INPUTS.abs() * 1e200),
        "model(inputs)",
        "NaN or infinite",
    )


def test_one_parameter_is_too_small_a_matrix():
    model = nn.Sequential(nn.Linear(1, 1, bias=False)).double()
    one = torch.ones(7, 1, dtype=torch.float64)
    refused(ShapeError, lambda: gh.GGNOperator(model, "mse", one, one), "2 x 2", "1 x 1")


def test_right_hand_sides_of_a_network():
    model, inputs, targets = case("two layers", "mse")
    op = gh.GGNOperator(model, "mse", inputs, targets)
    n = op.shape[0]
    refused(ShapeError, lambda: op @ np.ones(n + 1), f"({n},) or ({n}, k)", f"({n + 1},)")
    refused(DtypeError, lambda: op @ torch.ones(n, dtype=torch.int32), "float32", "int32")
    refused(ArgumentError, lambda: op @ (np.ones(n) * NAN), f"{n} entries", "NaN")
    refused(ArgumentError, lambda: op.entries([n], [0]), "rows", f"0 .. {n - 1}")
