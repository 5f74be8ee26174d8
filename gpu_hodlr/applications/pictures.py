"""How pictures look and are written; densities of spectra."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gpu_hodlr.devices import HostArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FONT = 9
# Okabe, Ito: also for those who do not tell red from green
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#7f7f7f", "#000000")
_WIDTH, _HEIGHT = 6.3, 3.4  # inches
_LEAST = 0.05  # of what a single eigenvalue reaches: where the axis begins
_MOST_TICKS = 9


@dataclass(frozen=True)
class Curve:
    """A density on an axis.

    Attributes:
        label: for the legend; empty for none.
        places: (t,) on the axis.
        value: (t,) eigenvalues for each unit of the axis.
        error: (t,) of it.
        marks: (k,) places of single eigenvalues.
    """

    label: str
    places: HostArray
    value: HostArray
    error: HostArray
    marks: HostArray


def save(figure: Figure, path: Path) -> None:
    """Write a figure, in a PDF with fonts that publishers take."""
    import matplotlib

    with matplotlib.rc_context({"pdf.fonttype": 42}):
        figure.savefig(path, dpi=200, bbox_inches="tight", pad_inches=0.1)


def draw_densities(path: Path, curves: Sequence[Curve], threshold: float, width: float) -> None:
    """Densities over sign(x) log10(1 + |x| / threshold), with bands of two errors.

    Args:
        path: .png, .pdf or .svg.
        curves: the densities, on this axis.
        threshold: where the axis turns from linear to logarithmic.
        width: of the Gaussian of a single eigenvalue.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, _HEIGHT), layout="constrained")
    ax = figure.add_subplot()
    floor = _LEAST / (np.sqrt(2 * np.pi) * width)
    for i, curve in enumerate(curves):
        colour = COLOURS[i % len(COLOURS)]
        band = np.maximum([curve.value - 2 * curve.error, curve.value + 2 * curve.error], floor)
        ax.fill_between(curve.places, *band, color=colour, alpha=0.25, linewidth=0)
        shown = np.maximum(curve.value, floor)
        ax.plot(curve.places, shown, color=colour, linewidth=1.2, label=curve.label or None)
        heights = np.full(curve.marks.shape, 0.015 + 0.03 * i)
        ax.plot(
            curve.marks, heights, "|", color=colour, markersize=5,
            transform=ax.get_xaxis_transform(),
        )  # fmt: skip
    ax.set_yscale("log")
    highest = max(float((curve.value + 2 * curve.error).max()) for curve in curves)
    ax.set_ylim(floor, max(2 * highest, 10 * floor))
    ax.set_xlim(curves[0].places[0], curves[0].places[-1])
    _label_axis(ax, threshold)
    ax.set_xlabel("eigenvalue", fontsize=FONT)
    ax.set_ylabel("eigenvalues per decade", fontsize=FONT)
    ax.tick_params(labelsize=FONT)
    ax.spines[["top", "right"]].set_visible(False)
    if any(curve.label for curve in curves):
        ax.legend(fontsize=FONT - 1, frameon=False)
    save(figure, path)


def _label_axis(ax: Axes, threshold: float) -> None:
    """Ticks at zero and at powers of ten of both signs, few enough to be read."""
    begin, end = ax.get_xlim()
    most = max(abs(begin), abs(end))
    powers = np.ceil(np.log10(threshold)) + np.arange(np.ceil(most) + 1)
    places = np.log10(1 + 10.0**powers / threshold)
    apart = (end - begin) / _MOST_TICKS
    step = max(1, int(np.ceil(apart)))
    ticks = [(0.0, "0")]
    for power, place in zip(powers.tolist(), places.tolist(), strict=True):
        if place >= apart and int(power) % step == 0:
            text = f"10^{{{int(power)}}}$"
            ticks += [(-place, f"$-{text}"), (place, f"${text}")]
    kept = [(place, text) for place, text in ticks if begin <= place <= end]
    ax.set_xticks([place for place, _ in kept], [text for _, text in kept])
