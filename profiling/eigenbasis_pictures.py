"""Pictures of the documents: a matrix in both bases, what is stored, error against storage.

    python profiling/eigenbasis_pictures.py matrix    results/eigenbasis_matrix.png
    python profiling/eigenbasis_pictures.py blocks    results/eigenbasis_blocks.png
    python profiling/eigenbasis_pictures.py forms     results/eigenbasis_forms.png

The first two compute (a network 49-8-49 on digits pooled 4 x 4, N = 841; mnist and enco); the last
draws what was measured: results/auto_choice.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from auto_choice import CHOICE

import gpu_hodlr as gh
from gpu_hodlr.cli import Progress
from gpu_hodlr.cli.digits import load_digits
from gpu_hodlr.cli.measure import Preset, Settings, measure_product
from gpu_hodlr.cli.plot import COLOURS, FONT, MARKERS, PANEL, draw, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RESULTS = Path(__file__).with_name("results")
LEAST = 1e-8  # end of the colour scale
PIXELS = 500  # of a matrix, a side
FORMS = {"kfe": "KFE", "lowrank": "low rank", "hss": "HSS", "hodlr": "HODLR"}


def matrices() -> tuple[Any, Any]:
    """The magnitudes of a matrix in the parameters' order, and in the eigenbasis by energy."""
    import torch
    from torch import nn

    images, _ = load_digits()
    x = torch.from_numpy(images.reshape(-1, 7, 4, 7, 4).mean(axis=(2, 4)).reshape(-1, 49))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = nn.Sequential(nn.Linear(49, 8), nn.ReLU(), nn.Linear(8, 49)).double()
        optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
        for _ in range(20):
            for batch in torch.randperm(len(x)).split(100):
                optimizer.zero_grad()
                nn.functional.mse_loss(model(x[batch]), x[batch]).backward()
                optimizer.step()
    op = gh.GGNOperator(model, "mse", x[:1000], x[:1000], dtype="float64")
    natural = op.to_dense()
    basis = gh.compress(op, "kfe", rtol=1e-1).structure.basis
    rotated = basis.rotate(np.ascontiguousarray(basis.rotate(natural).T))
    energy = np.argsort(-np.diagonal(rotated), kind="stable")
    return abs(natural), abs(rotated[np.ix_(energy, energy)])


def draw_matrices(path: Path) -> None:
    """Magnitudes of one matrix in both bases, with one colour scale."""
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    both = matrices()
    top = max(a.max() for a in both)
    figure = Figure(figsize=(2 * PANEL + 1, PANEL + 0.3), layout="constrained")
    axes = figure.subplots(1, 2)
    names = "in the order of the parameters", "in the eigenbasis, largest energy first"
    for ax, a, name in zip(axes, both, names, strict=True):
        share = (
            100
            * np.count_nonzero(a > _threshold(a, 1e-2 * float(np.linalg.norm(both[0]))))
            / both[0].size
        )
        image = ax.imshow(
            np.maximum(_shown(a) / top, LEAST), norm=LogNorm(LEAST, 1), cmap="magma",
            interpolation="nearest", extent=(0, len(a), len(a), 0),
        )  # fmt: skip
        ax.set_title(f"{name}\n{share:.2g} % of N² for an error of 1e-2", fontsize=FONT)
        rest = len(both[0]) - len(a)
        alone = f" ({rest} more are coupled to nothing)" if rest else ""
        ax.set_xlabel("column" + alone, fontsize=FONT)
        ax.tick_params(labelsize=FONT)
    axes[0].set_ylabel("row", fontsize=FONT)
    bar = figure.colorbar(image, ax=axes, shrink=0.85, pad=0.02, extend="min")
    bar.set_label("magnitude, relative to the largest", fontsize=FONT)
    bar.ax.tick_params(labelsize=FONT)
    save(figure, path)


def _shown(a: Any) -> Any:
    """A pixel for each entry, or for the largest of a few where there are too many to be seen."""
    step = -(-len(a) // PIXELS)
    padded = np.zeros((step * -(-len(a) // step),) * 2)
    padded[: len(a), : len(a)] = a
    return padded.reshape(len(padded) // step, step, -1, step).max(axis=(1, 3))


def _threshold(a: Any, tolerance: float) -> float:
    """The largest whose smaller entries have a Frobenius norm of the tolerance."""
    values = np.sort(a.ravel())
    squares = np.cumsum(values**2)
    return float(values[np.searchsorted(squares, tolerance**2)])


def draw_blocks(path: Path) -> None:
    """What is stored of the founding tables' networks at 1e-2, by HSS and in the eigenbasis."""
    import network_data

    results = []
    with Progress(2 * 3) as progress:
        for name, scheme in (("mnist", "hss"), ("mnist", "kfe"), ("enco", "kfe")):
            op = network_data.operator(network_data.load(name))
            preset = Preset(rtol=1e-2, max_rank=512, leaf_size=128)
            settings = Settings(name, "1e-2", preset, seed=0, maxiter=0, scheme=scheme)
            results.append(measure_product(op, settings, progress)[1])
    draw(path, results, {})


def draw_forms(path: Path) -> None:
    """Error against storage, a panel a network, a line a form."""
    from matplotlib.figure import Figure

    rows = json.loads((RESULTS / "auto_choice.json").read_text(encoding="utf-8"))["results"]
    rows = dict(sorted(rows.items(), key=lambda item: -float(item[0].split()[1])))
    names = sorted({key.split()[0] for key in rows}, key=CHOICE.index)
    across = min(3, len(names))
    down = -(-len(names) // across)
    size = (0.8 * PANEL * across + 0.5, 0.75 * PANEL * down + 0.5)
    figure = Figure(figsize=size, layout="constrained")
    axes = np.ravel(figure.subplots(down, across, squeeze=False, sharex=True, sharey=True))
    for ax, name in zip(axes, names, strict=False):
        _forms(ax, name, [row for key, row in rows.items() if key.split()[0] == name])
    for ax in axes[len(names) :]:
        ax.set_axis_off()
    for ax in axes[::across]:
        ax.set_ylabel("relative error", fontsize=FONT)
    for ax in axes[max(0, len(names) - across) : len(names)]:
        ax.set_xlabel("stored, % of N²", fontsize=FONT)
    handles: dict[str, Any] = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=5, fontsize=FONT)
    save(figure, path)


def _forms(ax: Axes, name: str, rows: list[dict[str, Any]]) -> None:
    """The lines of one network; hollow where a form has missed its tolerance."""
    from matplotlib.ticker import NullFormatter

    for i, (form, label) in enumerate(FORMS.items()):
        built = [row["built"][form] for row in rows if "error" in row["built"].get(form, {})]
        at = [(b["stored_percent"], b["error"]) for b in built]
        if not at:
            continue
        ax.plot(*zip(*at, strict=True), "-", color=COLOURS[i], lw=1.2)
        for reached in (True, False):
            some = [p for p, b in zip(at, built, strict=True) if b["reached"] == reached]
            if some:
                ax.plot(
                    *zip(*some, strict=True), MARKERS[i], color=COLOURS[i], ms=6,
                    mfc=COLOURS[i] if reached else "white",
                    label=label if reached else None,
                )  # fmt: skip
    taken = [row["auto"] for row in rows if "error" in row["auto"]]
    ax.plot(
        [a["stored_percent"] for a in taken], [a["error"] for a in taken], "o", ms=12,
        mfc="none", mec="0.35", label="taken by auto",
    )  # fmt: skip
    ax.set(xscale="log", yscale="log")
    ax.xaxis.set_minor_formatter(NullFormatter())  # which overlap
    ax.margins(0.12)
    ax.set_title(f"{name.replace('_', ' ')}, N = {rows[0]['N']:,}", fontsize=FONT)
    ax.tick_params(labelsize=FONT)
    ax.grid(alpha=0.3, linewidth=0.5)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    pictures = {"matrix": draw_matrices, "blocks": draw_blocks, "forms": draw_forms}
    parser.add_argument("picture", choices=pictures)
    parser.add_argument("path", type=Path, nargs="?", help="default: in results/")
    options = parser.parse_args()
    path = options.path or RESULTS / f"eigenbasis_{options.picture}.png"
    pictures[options.picture](path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
