"""Pictures: the blocks of a compressed matrix coloured by rank, and error against storage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gpu_hodlr.cli.measure import Result
from gpu_hodlr.devices import HostArray, HostIndex

if TYPE_CHECKING:
    from matplotlib.axes import Axes


PANEL = 4.4  # inches
LEAF_COLOUR = "tab:red"
COLOURS = "viridis_r"
MARKERS = "osD^vP*X"
SMALLEST_ERROR = 1e-17  # an exact matrix has no place on a log axis


def draw(
    path: Path, results: Sequence[Result], founding: Mapping[int, tuple[float, float]]
) -> None:
    """Write a picture: a panel of blocks a matrix, and one of error against storage.

    Args:
        path: .png, .pdf or .svg.
        results: the matrices.
        founding: storage in per cent and error of the founding point beside a result, by index.
    """
    from matplotlib.figure import Figure

    panels = len(results) + 1
    down = 1 if panels <= 3 else 2
    across = -(-panels // down)
    figure = Figure(figsize=(PANEL * across + 0.6, PANEL * down), layout="constrained")
    axes = [figure.add_subplot(down, across, i + 1) for i in range(panels)]
    for ax, result in zip(axes, results, strict=False):
        draw_blocks(ax, result)
    draw_errors(axes[-1], results, founding)
    figure.savefig(path, dpi=150)


def blocks(
    leaf_sizes: Sequence[int], block_ranks: Sequence[Sequence[int]], far_pairs: Sequence[Any]
) -> tuple[HostArray, HostArray]:
    """The low-rank blocks of every level.

    Args:
        leaf_sizes: rows of every leaf, in tree order.
        block_ranks: the rank of every node, one tuple a level, leaves first.
        far_pairs: (p, 2) nodes of the blocks of each level, one of (a, b) and (b, a).

    Returns:
        boxes: (blocks, 4) first column, first row, columns, rows.
        ranks: (blocks,) the larger rank of the two nodes.
    """
    edges = np.concatenate([[0], np.cumsum(leaf_sizes)])
    boxes, ranks = [np.zeros((0, 4), int)], [np.zeros(0, int)]
    for level, pairs in zip(block_ranks, far_pairs, strict=True):
        boxes.append(_boxes(edges, pairs))
        ranks.append(np.tile(np.asarray(level)[pairs].max(axis=1), 2))
        edges = edges[::2]
    return np.concatenate(boxes), np.concatenate(ranks)


def _boxes(edges: HostIndex, pairs: HostIndex) -> HostIndex:
    """(2 p, 4) first column, first row, columns, rows of the blocks (a, b) and (b, a)."""
    row, column = np.concatenate([pairs, pairs[:, ::-1]]).T
    starts, sizes = edges[:-1], np.diff(edges)
    return np.stack([starts[column], starts[row], sizes[column], sizes[row]], axis=1)


def title(result: Result) -> str:
    """What a result is called in a picture."""
    return f"{result.name} {result.scheme} {result.accuracy}"


def draw_blocks(ax: Axes, result: Result) -> None:
    """Low-rank blocks coloured by rank, dense blocks of leaves red."""
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Patch, Rectangle

    boxes, ranks = blocks(result.leaf_sizes, result.block_ranks, result.far_pairs)
    n = sum(result.leaf_sizes)
    line = 0.4 if len(result.leaf_sizes) <= 64 else 0.0
    collection = PatchCollection(
        [Rectangle((x, y), width, height) for x, y, width, height in boxes.tolist()],
        cmap=COLOURS,
        edgecolor="white",
        linewidth=line,
    )
    collection.set_array(ranks)
    collection.set_clim(0, max(1, int(ranks.max(initial=0))))
    ax.add_collection(collection)
    assert result.near_pairs is not None
    dense = _boxes(np.concatenate([[0], np.cumsum(result.leaf_sizes)]), result.near_pairs)
    ax.add_collection(
        PatchCollection(
            [Rectangle((x, y), width, height) for x, y, width, height in dense.tolist()],
            facecolor=LEAF_COLOUR,
            edgecolor="white",
            linewidth=line,
        )
    )
    ax.set(xlim=(0, n), ylim=(n, 0), aspect="equal", xticks=[0, n], yticks=[])
    ax.set_xticklabels(["0", f"{n:,}"])
    ax.set_title(
        f"{title(result)}: {100 * result.storage_fraction:.3g} % stored, error {result.error:.1e}",
        fontsize=10,
    )
    handle = Patch(color=LEAF_COLOUR, label="dense")  # below: dense blocks may lie anywhere
    ax.legend(handles=[handle], loc="upper center", bbox_to_anchor=(0.5, 0.0), fontsize=8)
    ax.figure.colorbar(collection, ax=ax, label="rank of block", shrink=0.8)


def draw_lines(path: Path, lines: Mapping[str, Sequence[Result]], heading: str) -> None:
    """Write a picture of error against storage, a marked line a name.

    Args:
        path: .png, .pdf or .svg.
        lines: the results of each, in order.
        heading: above the picture.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.4 * PANEL, PANEL), layout="constrained")
    ax = figure.add_subplot()
    for i, (name, results) in enumerate(lines.items()):
        points = [(100 * r.storage_fraction, max(r.error, SMALLEST_ERROR)) for r in results]
        style = MARKERS[i % len(MARKERS)] + "-"
        ax.plot(*zip(*points, strict=True), style, color=f"C{i}", label=name)
    _error_axes(ax, heading)
    figure.savefig(path, dpi=150)


def draw_matrices(path: Path, groups: Mapping[str, Sequence[Result]], heading: str) -> None:
    """Write a picture of storage and error by matrix, a marker a name of `groups`."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(r.name for results in groups.values() for r in results))
    figure = Figure(figsize=(PANEL + 0.3 * len(names), 1.4 * PANEL), layout="constrained")
    stored, error = figure.subplots(2, sharex=True)
    for i, (label, results) in enumerate(groups.items()):
        across = [names.index(r.name) + 0.15 * (i - (len(groups) - 1) / 2) for r in results]
        for ax, heights in (
            (stored, [100 * r.storage_fraction for r in results]),
            (error, [max(r.error, SMALLEST_ERROR) for r in results]),
        ):
            ax.plot(across, heights, MARKERS[i % len(MARKERS)], color=f"C{i}", label=label, ms=5)
    stored.set(yscale="log", ylabel="stored, % of N²")
    stored.set_title(heading, fontsize=10)
    stored.yaxis.set_major_formatter("{x:g}")
    error.set(yscale="log", ylabel="relative error", xticks=range(len(names)))
    error.set_xticklabels(names)
    for ax in (stored, error):
        ax.grid(axis="y", alpha=0.3, linewidth=0.5)
    figure.legend(*stored.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=150)


def _error_axes(ax: Axes, heading: str) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    ax.set(xscale="log", yscale="log", xlabel="stored, % of N²", ylabel="relative error")
    ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))  # one decade has labels too
    ax.xaxis.set_major_formatter("{x:g}")
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_title(heading, fontsize=10)
    ax.grid(which="both", alpha=0.3, linewidth=0.5)
    ax.legend(fontsize=8)


def draw_errors(
    ax: Axes, results: Sequence[Result], founding: Mapping[int, tuple[float, float]]
) -> None:
    """Relative error against storage, a point a matrix; its founding point is hollow."""
    for i, result in enumerate(results):
        marker, colour = MARKERS[i % len(MARKERS)], f"C{i}"
        error = max(result.error, SMALLEST_ERROR)
        ax.plot(100 * result.storage_fraction, error, marker, color=colour, label=title(result))
        if i in founding:
            ax.plot(*founding[i], marker, color=colour, mfc="none", label="  founding")
    _error_axes(ax, "error against storage")
    ax.set_box_aspect(1)
    ax.margins(0.2)
