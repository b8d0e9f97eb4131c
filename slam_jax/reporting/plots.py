"""Plots as SVG text that take their colours from the page around them.

Labels may hold text that users wrote: it is never read as mathtext, and long labels are shortened.
"""

import io
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from slam_jax.errors import shorten

# Placeholder colours: each is replaced by a CSS variable of the page.
_INK, _SOFT, _LINE = "#010203", "#010204", "#010205"
_SERIES = ("#020301", "#020302", "#020303", "#020304", "#020305", "#020306")
_VARIABLES = {_INK: "--ink", _SOFT: "--soft", _LINE: "--line"} | dict(
    zip(_SERIES, ("--accent", "--second", "--third", "--fourth", "--fifth", "--sixth"), strict=True)
)
_STYLE: Any = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "slam_jax",
    "text.parse_math": False,  # labels of users may hold dollar signs
    "font.size": 10,
    "text.color": _INK,
    "axes.labelcolor": _SOFT,
    "axes.edgecolor": _LINE,
    "xtick.color": _LINE,
    "ytick.color": _LINE,
    "xtick.labelcolor": _SOFT,
    "ytick.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": _LINE,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
}
_WIDTH = 5.2  # inches: on a phone the letters are then as large as the text of the page
_LONGEST_LABEL = 40


@matplotlib.rc_context(_STYLE)
def plot_intervals(rows: Sequence[tuple[str, str, float, float, float]]) -> str:
    """Shares with their intervals, one line for each (group, name, share, low, high)."""
    axes, names = _axes(0.6 + 0.27 * len(rows)), list(dict.fromkeys(row[1] for row in rows))
    points, labels = {}, []
    for y, (group, name, share, low, high) in enumerate(rows):
        color = _SERIES[names.index(name) % len(_SERIES)]
        axes.plot([100 * low, 100 * high], [y, y], color=color, linewidth=2, alpha=0.6)
        [points[name]] = axes.plot(100 * share, y, "o", color=color, markersize=5)
        labels.append("" if y and rows[y - 1][0] == group else _label(group))
    _label_rows(axes, labels)
    axes.set(xlim=(-2, 102), xlabel="% right")
    axes.grid(axis="x")
    _legend(axes, points)
    return _svg(axes.figure)


@matplotlib.rc_context(_STYLE)
def plot_differences(rows: Sequence[tuple[str, str, float, float, float]]) -> str:
    """Differences of shares with their intervals, one line for each (group, name, difference, low,
    high); intervals that do not contain 0 are coloured."""
    axes, labels = _axes(0.6 + 0.27 * len(rows)), []
    for y, (group, name, difference, low, high) in enumerate(rows):
        color = _SOFT if low <= 0 <= high else _SERIES[0 if difference > 0 else 1]
        axes.plot([100 * low, 100 * high], [y, y], color=color, linewidth=2, alpha=0.6)
        axes.plot(100 * difference, y, "o", color=color, markersize=5)
        labels.append(_label(f"{group}, {name}"))
    axes.axvline(0, color=_LINE, linewidth=1)
    _label_rows(axes, labels)
    axes.set(xlabel="B - A, percentage points", ylim=(len(rows) - 0.4, -0.6))
    axes.grid(axis="x")
    return _svg(axes.figure)


@matplotlib.rc_context(_STYLE)
def plot_calibration(
    confidence: Float[np.ndarray, "n"], accuracy: Float[np.ndarray, "n"], counts: Sequence[int]
) -> str:
    """Accuracy against mean confidence of each bin, with the number of answers in the bin."""
    axes = _axes(3.4)
    axes.plot([0, 100], [0, 100], color=_LINE, linewidth=1)
    axes.plot(100 * confidence, 100 * accuracy, "o-", color=_SERIES[0], markersize=5)
    below = dict(xytext=(0, -13), textcoords="offset points", ha="center")
    for x, y, count in zip(100 * confidence, 100 * accuracy, counts, strict=True):
        axes.annotate(f"{count:,}", (x, y), **below, fontsize=8, color=_SOFT)
    axes.set(xlim=(-3, 103), ylim=(-8, 103), xlabel="confidence, %", ylabel="right, %")
    axes.grid()
    return _svg(axes.figure)


@matplotlib.rc_context(_STYLE)
def plot_curves(
    curves: Mapping[str, tuple[Any, Any]], ylabel: str, *, xlabel: str = "step", log: bool = False
) -> str:
    """Values against steps, one curve for each name. Without `log` the values are percentages."""
    axes = _axes(3.0)
    _draw_each(axes, curves, ("-", "--", ":"), "o", linewidth=1.5, markersize=4)
    axes.set(xlabel=xlabel, ylabel=ylabel, yscale="log" if log else "linear")
    low, high = axes.get_ylim()
    if log:
        # The default formatter of a logarithmic axis writes mathtext.
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}" if high < 10 * low else NullFormatter())
    else:
        axes.set_ylim(max(low, -3), min(high, 103))
    return _svg(axes.figure)


@matplotlib.rc_context(_STYLE)
def plot_points(points: Mapping[str, tuple[float, float]], xlabel: str, ylabel: str) -> str:
    """A named point for each (x, y)."""
    axes = _axes(3.4)
    curves = {name: ([x], [y]) for name, (x, y) in points.items()}
    _draw_each(axes, curves, "os^D", "", linestyle="", markersize=6)
    axes.margins(0.1)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    return _svg(axes.figure)


@matplotlib.rc_context(_STYLE)
def plot_bars(values: Mapping[str, float], *, lowest: bool = False) -> str:
    """One bar for each name, sorted; the best (the highest, or the `lowest`) is first and
    highlighted."""
    axes = _axes(0.5 + 0.26 * len(values))
    ordered = sorted(values.items(), key=lambda item: item[1], reverse=not lowest)
    for y, (_, value) in enumerate(ordered):
        best = value == ordered[0][1]
        axes.barh(y, value, color=_SERIES[0] if best else _LINE, height=0.7)
        axes.annotate(f" {value:,.4g}", (value, y), va="center", fontsize=8, color=_INK)
    _label_rows(axes, [_label(name) for name, _ in ordered])
    axes.set_xlim(min(0.0, *values.values()), 1.15 * max(values.values()) or 1.0)
    return _svg(axes.figure)


def _axes(height: float) -> Any:
    return Figure((_WIDTH, height), layout="constrained").add_subplot()


def _draw_each(
    axes: Any,
    curves: Mapping[str, tuple[Any, Any]],
    styles: Sequence[str],
    marker: str,
    **settings: Any,
) -> None:
    """Draws curves of different colours, then of different styles, and their legend.

    marker: of the points of short curves.
    """
    lines = {}
    for i, (name, (x, y)) in enumerate(curves.items()):
        style = styles[i // len(_SERIES) % len(styles)] + marker * (len(x) < 12)
        color = _SERIES[i % len(_SERIES)]
        [lines[name]] = axes.plot(x, y, style, color=color, **settings)
    axes.grid()
    _legend(axes, lines)


def _label_rows(axes: Any, labels: Sequence[str]) -> None:
    """Rows 0, 1, .. from the top, with a label each."""
    axes.set_yticks(range(len(labels)), labels)
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()


def _legend(axes: Any, artists: Mapping[str, Any]) -> None:
    """A legend above the plot; the figure grows by its height.

    Labels are passed on their own: as labels of their artists, those that begin with an underscore
    would be left out.
    """
    if len(artists) > 1:
        labels = [_label(name) for name in artists]
        columns = 2 if max(map(len, labels)) <= 32 else 1
        axes.legend(list(artists.values()), labels, ncols=columns, loc="lower left",
                    bbox_to_anchor=(0, 1))  # fmt: skip
        axes.figure.set_figheight(axes.figure.get_figheight() + 0.18 * (len(labels) // columns))


def _label(text: str) -> str:
    return shorten(" ".join(text.split()), _LONGEST_LABEL)


def _svg(figure: Any) -> str:
    file = io.StringIO()
    with warnings.catch_warnings():
        # The reader's browser draws the letters, with fonts that have them. Without room for the
        # axes beside very wide labels the plot is drawn without layout.
        warnings.filterwarnings(
            "ignore", "Glyph .* missing from font|constrained_layout not applied"
        )
        figure.savefig(
            file, format="svg", transparent=True, metadata={"Date": None, "Creator": None}
        )
    svg = re.sub(r"<metadata>.*?</metadata>", "", file.getvalue(), flags=re.S)
    # Without width and height the picture fills the column of the page.
    svg = re.sub(r' (width|height)="[^"]*"', "", svg[svg.index("<svg") :], count=2)
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, f"var({variable})")
    return svg
