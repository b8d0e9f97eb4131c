"""Plots as SVG that takes its colours from the page it stands in."""

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

# Colours that nobody would choose, each replaced by a variable of the page's style.
_INK, _SOFT, _LINE = "#010203", "#010204", "#010205"
_SERIES = ("#020301", "#020302", "#020303", "#020304", "#020305", "#020306")
_VARIABLES = {
    _INK: "--ink",
    _SOFT: "--soft",
    _LINE: "--line",
    **dict(
        zip(
            _SERIES,
            ["--accent", "--second", "--third", "--fourth", "--fifth", "--sixth"],
            strict=True,
        )
    ),
}
_STYLE: Any = {
    "svg.fonttype": "none",  # letters stay letters
    "svg.hashsalt": "slam_jax",
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
    "legend.frameon": False,
}
_WIDTH = 5.2  # inches: on a telephone's page, letters are then as large as the text around them


def plot_intervals(rows: Sequence[tuple[str, str, float, float, float]]) -> str:
    """Shares with their intervals, a line for each (group, name, share, low, high)."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(0.6 + 0.27 * len(rows))
        names = list(dict.fromkeys(name for _, name, *_ in rows))
        for y, (_, name, share, low, high) in enumerate(rows):
            colour = _SERIES[names.index(name) % len(_SERIES)]
            axes.plot([100 * low, 100 * high], [y, y], color=colour, linewidth=2, alpha=0.6)
            label = name if name not in axes.get_legend_handles_labels()[1] else None
            axes.plot(100 * share, y, "o", color=colour, markersize=5, label=label)
        groups = [group for group, *_ in rows]
        axes.set_yticks(range(len(rows)))
        first = [i == 0 or groups[i - 1] != group for i, group in enumerate(groups)]
        axes.set_yticklabels([g if f else "" for g, f in zip(groups, first, strict=True)])
        axes.tick_params(axis="y", length=0)
        axes.invert_yaxis()
        axes.set_xlim(0, 102)
        axes.set_xlabel("% right")
        axes.grid(axis="x", linewidth=0.6)
        if len(names) > 1:
            axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, fontsize=9)
        return _svg(figure)


def plot_calibration(
    confidence: Float[np.ndarray, "n"], accuracy: Float[np.ndarray, "n"], counts: Sequence[int]
) -> str:
    """Accuracy against mean confidence of each bin, with its number of answers."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(3.4)
        axes.plot([0, 100], [0, 100], color=_LINE, linewidth=1)
        axes.plot(100 * confidence, 100 * accuracy, "o-", color=_SERIES[0], markersize=5)
        for x, y, count in zip(100 * confidence, 100 * accuracy, counts, strict=True):
            axes.annotate(f"{count:,}", (x, y), (0, -13), textcoords="offset points", fontsize=8,
                          color=_SOFT, ha="center")  # fmt: skip
        axes.set_xlim(-3, 103)
        axes.set_ylim(-8, 103)
        axes.set_xlabel("confidence, %")
        axes.set_ylabel("right, %")
        axes.grid(linewidth=0.6)
        return _svg(figure)


def plot_curves(
    curves: Mapping[str, tuple[Any, Any]], ylabel: str, *, xlabel: str = "step", log: bool = False
) -> str:
    """Values against steps, a curve a name."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(3.0)
        for i, (name, (steps, values)) in enumerate(curves.items()):
            style = ("-", "--", ":")[i // len(_SERIES) % 3]
            marker = "o" if len(steps) < 12 else None
            axes.plot(steps, values, style, color=_SERIES[i % len(_SERIES)], linewidth=1.5,
                      marker=marker, markersize=4, label=name)  # fmt: skip
        if log:
            axes.set_yscale("log")
        else:  # percentages
            low, high = axes.get_ylim()
            axes.set_ylim(max(low, -3), min(high, 103))
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        axes.grid(linewidth=0.6)
        if len(curves) > 1:
            axes.legend(fontsize=8, ncols=2, loc="lower left", bbox_to_anchor=(0, 1))
        return _svg(figure)


def plot_points(points: Mapping[str, tuple[float, float]], xlabel: str, ylabel: str) -> str:
    """A named point for each (x, y)."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(3.4)
        for i, (name, (x, y)) in enumerate(points.items()):
            colour = _SERIES[i % len(_SERIES)]
            marker = "os^D"[i // len(_SERIES) % 4]
            axes.plot(x, y, marker, color=colour, markersize=6, label=name)
        axes.margins(0.1)
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        axes.grid(linewidth=0.6)
        axes.legend(fontsize=8, ncols=2, loc="lower left", bbox_to_anchor=(0, 1))
        return _svg(figure)


def plot_bars(values: Mapping[str, float], *, lowest: bool = False) -> str:
    """A bar a name, the best one (the highest, or the lowest) first and in a colour of its own."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(0.5 + 0.26 * len(values))
        ordered = sorted(values.items(), key=lambda item: item[1], reverse=not lowest)
        for y, (_, value) in enumerate(ordered):
            best = value == ordered[0][1]
            axes.barh(y, value, color=_SERIES[0] if best else _LINE, height=0.7)
            axes.annotate(f" {value:,.4g}", (value, y), va="center", fontsize=8, color=_INK)
        axes.set_yticks(range(len(ordered)), [name for name, _ in ordered])
        axes.tick_params(axis="y", length=0)
        axes.invert_yaxis()
        axes.set_xlim(min(0.0, *values.values()), 1.15 * max(values.values()) or 1.0)
        return _svg(figure)


def _figure(height: float) -> tuple[Any, Any]:
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    return figure, figure.add_subplot()


def _svg(figure: Any) -> str:
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    # Without a size of its own it takes that of the page.
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return svg
