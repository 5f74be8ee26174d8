"""Pictures: blocks coloured by rank, entries in an eigenbasis, error against storage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gpu_hodlr.applications.pictures import COLOURS, FONT, save
from gpu_hodlr.cli.measure import Result
from gpu_hodlr.cli.summary import scientific
from gpu_hodlr.devices import HostArray, HostIndex

if TYPE_CHECKING:
    from matplotlib.axes import Axes


PANEL = 4.2  # inches
LEAF_COLOUR = "#c44e52"
RANK_COLOURS = "viridis_r"
MARKERS = "osD^vP*X"
LEAST_SHARE = 1e-6  # end of the colour scale of entries
MANY_TICKS = 300.0  # end over begin of a log axis: beyond it labels of twos and fives overlap
SMALLEST_ERROR = 1e-16  # where an exact matrix is drawn: 0 has no place on a log axis


def draw(
    path: Path, results: Sequence[Result], founding: Mapping[int, tuple[float, float]]
) -> None:
    """Write a picture: a panel of blocks or entries a matrix, and one of error against storage.

    All panels of blocks have one colour scale, and all of entries. Of a single matrix the other
    panel shows its ranks by level, if it has several.

    Args:
        path: .png, .pdf or .svg.
        results: the matrices.
        founding: storage in per cent and error of the founding point beside a result, by index.
    """
    from matplotlib.figure import Figure

    alone = len(results) == 1
    panels = len(results) + (not alone or len(results[0].block_ranks) > 1)
    down = 1 if panels <= 3 else 2
    across = -(-panels // down)
    figure = Figure(figsize=(PANEL * across + 1.0, (PANEL + 0.3) * down), layout="constrained")
    axes = [figure.add_subplot(down, across, i + 1) for i in range(panels)]
    largest = max(max(map(max, r.block_ranks), default=0) for r in results)
    scales: dict[str, Any] = {}
    for ax, result in zip(axes, results, strict=False):
        if result.density is None:
            scales["rank of block"] = draw_blocks(ax, result, max(1, largest))
        else:
            scales["share of the entries that is stored"] = draw_entries(ax, result)
    for label, scale in scales.items():
        bar = figure.colorbar(scale, ax=axes[: len(results)], shrink=0.8, pad=0.02)
        bar.set_label(label, fontsize=FONT)
        bar.ax.tick_params(labelsize=FONT)
    if not alone:
        draw_errors(axes[-1], results, founding)
    elif panels > 1:
        draw_ranks(axes[-1], results[0])
    save(figure, path)


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


def draw_blocks(ax: Axes, result: Result, largest: int) -> Any:
    """Low-rank blocks coloured by rank, dense blocks of leaves red.

    Args:
        ax: where.
        result: the matrix.
        largest: rank, the end of the colour scale.

    Returns:
        The low-rank blocks, for a colour bar.
    """
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    boxes, ranks = blocks(result.leaf_sizes, result.block_ranks, result.far_pairs)
    n = sum(result.leaf_sizes)
    line = 0.4 if len(result.leaf_sizes) <= 64 else 0.0
    collection = PatchCollection(
        [Rectangle((x, y), width, height) for x, y, width, height in boxes.tolist()],
        cmap=RANK_COLOURS,
        edgecolor="white",
        linewidth=line,
    )
    collection.set_array(ranks)
    collection.set_clim(0, largest)
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
    ends = [0, n]
    ax.set(xlim=(0, n), ylim=(n, 0), aspect="equal", xticks=ends, yticks=ends)
    ax.set_xticklabels([f"{end:,}" for end in ends], fontsize=FONT)
    first, last = ax.set_yticklabels([f"{end:,}" for end in ends], fontsize=FONT, rotation=90)
    first.set_verticalalignment("top")  # beside the axis, not beyond its ends
    last.set_verticalalignment("bottom")
    ax.set_xlabel("column, in the order of the tree (red: dense)", fontsize=FONT)
    ax.set_ylabel("row", fontsize=FONT, labelpad=-4)
    _say(ax, result)
    return collection


def _say(ax: Axes, result: Result) -> None:
    """Above a map: what it is of, and what was reached."""
    stored = f"{100 * result.storage_fraction:.3g} % of N² stored"
    cap = ", max_rank hit" if result.rank_cap_hit else ""
    ax.set_title(f"{title(result)}\n{stored}, error {scientific(result.error)}{cap}", fontsize=FONT)


def draw_entries(ax: Axes, result: Result) -> Any:
    """Which share of the entries is stored of a form that is sparse in an eigenbasis.

    Both axes are logarithmic: most entries are among the few coordinates of largest energy.

    Args:
        ax: where.
        result: the matrix.

    Returns:
        The cells, for a colour bar.
    """
    from matplotlib.colors import LogNorm

    assert result.density is not None
    edges, share = result.density
    places = np.maximum(edges, 0.5)  # 0 has no place on a log axis
    shown = np.ma.masked_equal(share, 0.0)
    cells = ax.pcolormesh(places, places, shown, cmap=RANK_COLOURS, norm=LogNorm(LEAST_SHARE, 1))
    ends = (places[0], places[-1])
    ax.set(xscale="log", yscale="log", xlim=ends, ylim=ends[::-1], aspect="equal")
    ax.tick_params(labelsize=FONT)
    ax.set_xlabel("column in the eigenbasis, largest energy first", fontsize=FONT)
    ax.set_ylabel("row", fontsize=FONT)
    _say(ax, result)
    return cells


def draw_ranks(ax: Axes, result: Result) -> None:
    """The rank of every node by level, and the largest of each level."""
    levels = [np.asarray(level) for level in result.block_ranks[::-1]]  # the uppermost first
    numbers = [int(np.log2(len(level))) for level in levels]
    for number, level in zip(numbers, levels, strict=True):
        ax.plot(
            number + np.linspace(-0.25, 0.25, len(level) + 2)[1:-1], level, "o", ms=3, alpha=0.5,
            color=COLOURS[0], mec="none", label="a node" if number == numbers[0] else None,
        )  # fmt: skip
    ax.plot(numbers, [level.max() for level in levels], "_-", color=COLOURS[1], label="largest")
    ax.axhline(result.max_rank, color="0.4", linestyle="--", linewidth=1, label="max_rank")
    ax.set_yscale("symlog", linthresh=1)
    ax.set_xlabel("level of the tree (0: the root)", fontsize=FONT)
    ax.set_ylabel("rank", fontsize=FONT)
    ax.set_xticks(numbers)
    ax.set_ylim(-0.2, 2 * result.max_rank)
    ax.yaxis.set_major_formatter("{x:g}")
    ax.tick_params(labelsize=FONT)
    ax.set_title(f"ranks; leaves of {result.leaf_size} rows at most", fontsize=FONT)
    ax.grid(axis="y", alpha=0.3, linewidth=0.5)
    ax.legend(fontsize=FONT - 1)
    ax.set_box_aspect(1)


def draw_lines(path: Path, lines: Mapping[str, Sequence[Result]], heading: str) -> None:
    """Write a picture of error against storage, a marked line a name.

    Args:
        path: .png, .pdf or .svg.
        lines: the results of each, in order.
        heading: above the picture.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.5 * PANEL, PANEL), layout="constrained")
    ax = figure.add_subplot()
    for i, (name, results) in enumerate(lines.items()):
        points = [(100 * r.storage_fraction, drawn_error(r.error)) for r in results]
        ax.plot(*zip(*points, strict=True), "-", color=COLOURS[i % len(COLOURS)], linewidth=1.2)
        for result in results:
            _point(ax, result, i, name)
    _error_axes(ax, [r for results in lines.values() for r in results], heading)
    save(figure, path)


def draw_matrices(path: Path, groups: Mapping[str, Sequence[Result]], heading: str) -> None:
    """Write a picture of storage and error by matrix, a marker a name of `groups`."""
    from matplotlib.figure import Figure

    every = [r for results in groups.values() for r in results]
    names = list(dict.fromkeys(r.name for r in every))
    size = (max(1.2 * PANEL, 2.2 + 0.36 * len(names)), 1.4 * PANEL)
    figure = Figure(figsize=size, layout="constrained")
    stored, error = figure.subplots(2, sharex=True)
    for i, (label, results) in enumerate(groups.items()):
        for r in results:
            across = names.index(r.name) + 0.2 * (i - (len(groups) - 1) / 2)
            _point(stored, r, i, label, (across, 100 * r.storage_fraction))
            _point(error, r, i, label, (across, drawn_error(r.error)))
    stored.set(yscale="log")
    stored.set_ylabel("stored, % of N²", fontsize=FONT)
    stored.set_title(heading, fontsize=FONT)
    _plain_numbers(stored.yaxis)
    error.set(yscale="log", xticks=range(len(names)))
    error.set_ylabel(_error_label(every), fontsize=FONT)
    error.set_xlim(-0.6, len(names) - 0.4)
    error.set_xticklabels(names, rotation=90 if len(names) > 8 else 0)
    error.set_xlabel("matrix", fontsize=FONT)
    _wanted(error, every)
    for ax in (stored, error):
        ax.grid(axis="y", alpha=0.3, linewidth=0.5)
        ax.tick_params(labelsize=FONT)
    figure.legend(*_legend(error), loc="outside right upper", fontsize=FONT - 1)
    save(figure, path)


def drawn_error(error: float) -> float:
    """Where an error stands on a log axis."""
    return max(error, SMALLEST_ERROR)


def _error_label(results: Sequence[Result]) -> str:
    exact = any(r.error < SMALLEST_ERROR for r in results)
    return "relative error" + (f" (0 at {scientific(SMALLEST_ERROR)})" if exact else "")


def _point(
    ax: Axes, result: Result, i: int, label: str, place: tuple[float, float] | None = None
) -> None:
    """A result as a marker; hollow where max_rank stopped it: that is no success."""
    at = place or (100 * result.storage_fraction, drawn_error(result.error))
    colour = COLOURS[i % len(COLOURS)]
    ax.plot(
        *at, MARKERS[i % len(MARKERS)], color=colour, ms=6, label=label,
        mfc="white" if result.rank_cap_hit else colour,
    )  # fmt: skip


def _wanted(ax: Axes, results: Sequence[Result]) -> None:
    """A line at every error that was asked for."""
    for rtol in sorted({r.rtol for r in results}):
        ax.axhline(
            rtol, color="0.35", linestyle=(0, (4, 3)), linewidth=0.9, zorder=0, label="rtol wanted"
        )


def _legend(ax: Axes) -> tuple[list[Any], list[str]]:
    """Every label once, with a filled marker, and what a hollow one means if there is one."""
    from matplotlib.lines import Line2D

    handles: dict[str, Any] = {}
    hollow = False
    for line in ax.get_lines():
        label = str(line.get_label())
        if label.startswith("_"):
            continue
        capped = line.get_markerfacecolor() == "white"
        hollow |= capped
        if label not in handles or not capped:
            handles[label] = line
    for label, line in handles.items():
        if line.get_markerfacecolor() == "white":  # all of its points are
            handles[label] = Line2D(
                [], [], linestyle="", marker=line.get_marker(), color=line.get_color()
            )
    if "rtol wanted" in handles:  # behind the names
        handles["rtol wanted"] = handles.pop("rtol wanted")
    if hollow:
        handles["hollow: max_rank hit"] = Line2D(
            [], [], linestyle="", marker="o", color="0.35", mfc="white"
        )
    return list(handles.values()), list(handles)


def _plain_numbers(axis: Any) -> None:
    """Labels of a log axis, also where it has one decade."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.axes.autoscale_view()
    low, high = axis.get_view_interval()
    few = high < MANY_TICKS * low
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if few else (1.0,)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def _error_axes(ax: Axes, results: Sequence[Result], heading: str) -> None:
    ax.set(xscale="log", yscale="log")
    ax.set_xlabel("stored, % of N²", fontsize=FONT)
    ax.set_ylabel(_error_label(results), fontsize=FONT)
    _wanted(ax, results)
    ax.margins(0.12)
    for limits, change, span in (
        (ax.get_xlim(), ax.set_xlim, 4.0),
        (ax.get_ylim(), ax.set_ylim, 200.0),
    ):  # few points have axes with some labels as well
        stretch = max(1.0, span * limits[0] / limits[1]) ** 0.5
        change(limits[0] / stretch, limits[1] * stretch)
    _plain_numbers(ax.xaxis)
    ax.set_title(heading, fontsize=FONT)
    ax.tick_params(labelsize=FONT)
    ax.grid(alpha=0.3, linewidth=0.5)
    ax.legend(*_legend(ax), fontsize=FONT - 1)


def draw_errors(
    ax: Axes, results: Sequence[Result], founding: Mapping[int, tuple[float, float]]
) -> None:
    """Relative error against storage, a point a matrix; a cross is its founding point."""
    for i, result in enumerate(results):
        _point(ax, result, i, title(result))
        if i in founding:
            colour = COLOURS[i % len(COLOURS)]
            ax.plot(
                *founding[i], "x", color=colour, ms=7, mew=1.6, label=f"founding {title(result)}"
            )
    _error_axes(ax, results, "error against storage")
    ax.set_box_aspect(1)
