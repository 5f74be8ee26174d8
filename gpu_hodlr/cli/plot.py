"""Pictures: the blocks of a compressed matrix coloured by rank, and error against storage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gpu_hodlr.cli.measure import Result

PANEL = 4.4  # inches
LEAF_COLOUR = "tab:red"
COLOURS = "viridis_r"
MARKERS = "osD^vP*X"
SMALLEST_ERROR = 1e-17  # an exact matrix has no place on a log axis


def draw(
    path: Path, results: Sequence[Result], founding: Sequence[tuple[str, float, float]]
) -> None:
    """Write a picture: a panel of blocks a matrix, and one of error against storage.

    Args:
        path: .png, .pdf or .svg.
        results: the matrices.
        founding: (label, storage in per cent, error) of other points to show.
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
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
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


def _boxes(edges: Any, pairs: Any) -> Any:
    """(2 p, 4) first column, first row, columns, rows of the blocks (a, b) and (b, a)."""
    row, column = np.concatenate([pairs, pairs[:, ::-1]]).T
    starts, sizes = edges[:-1], np.diff(edges)
    return np.stack([starts[column], starts[row], sizes[column], sizes[row]], axis=1)


def title(result: Result) -> str:
    """What a result is called in a picture."""
    return f"{result.name} {result.scheme} {result.accuracy}"


def draw_blocks(ax: Any, result: Result) -> None:
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
    ax.legend(handles=[Patch(color=LEAF_COLOUR, label="dense")], loc="lower left", fontsize=8)
    ax.figure.colorbar(collection, ax=ax, label="rank of block", shrink=0.8)


def draw_lines(
    path: Path, results: Sequence[Result], heading: str, group: Callable[[Result], str]
) -> None:
    """Write a picture of error against storage, a marked line a group of results.

    Args:
        path: .png, .pdf or .svg.
        results: in the order of the lines' points.
        heading: above the picture.
        group: the name of the line a result is on.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.4 * PANEL, PANEL), layout="constrained")
    ax = figure.add_subplot()
    for i, name in enumerate(dict.fromkeys(map(group, results))):
        line = [r for r in results if group(r) == name]
        ax.plot(
            [100 * r.storage_fraction for r in line],
            [max(r.error, SMALLEST_ERROR) for r in line],
            MARKERS[i % len(MARKERS)] + "-",
            color=f"C{i}",
            label=name,
        )
    _error_axes(ax, heading)
    figure.savefig(path, dpi=150)


def _error_axes(ax: Any, heading: str) -> None:
    ax.set(xscale="log", yscale="log", xlabel="stored, % of N²", ylabel="relative error")
    ax.set_title(heading, fontsize=10)
    ax.grid(which="both", alpha=0.3, linewidth=0.5)
    ax.legend(fontsize=8)


def draw_errors(
    ax: Any, results: Sequence[Result], founding: Sequence[tuple[str, float, float]]
) -> None:
    """Relative error against storage, a point a matrix; the founding points are hollow."""
    for i, result in enumerate(results):
        ax.plot(
            100 * result.storage_fraction,
            max(result.error, SMALLEST_ERROR),
            MARKERS[i % len(MARKERS)],
            color=f"C{i}",
            label=title(result),
        )
    for i, (label, percent, error) in enumerate(founding):
        ax.plot(
            percent,
            error,
            MARKERS[i % len(MARKERS)],
            color=f"C{i}",
            markerfacecolor="none",
            label=label,
        )
    _error_axes(ax, "error against storage")
    ax.set_box_aspect(1)
    ax.margins(0.2)
