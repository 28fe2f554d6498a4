"""The picture of accuracy against what it costs."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from .downsampling import DOWNSAMPLING, POOLED
from .pareto import Point, frontier


def draw_pareto(points: Sequence[Point], time_label: str, highlight: Collection[str] = ("grip",)) -> Any:
    """Accuracy against visual tokens and against time, one line per method, the frontier marked.

    Args:
        points: Methods at their budgets and the unpruned model, as `pareto.join` gives them.
        time_label: What the time axis shows.
        highlight: Methods drawn thick and red.

    Returns:
        A matplotlib figure, to be saved by `savefig`.

    Raises:
        ImportError: matplotlib is not installed.
    """
    whole = points[0]
    curves: dict[str, list[Point]] = {}
    for point in points[1:]:
        curves.setdefault(point.selector, []).append(point)
    ranked = sorted(curves, key=lambda name: -sum(one.accuracy for one in curves[name]) / len(curves[name]))
    peers = [name for name in ranked if name not in highlight and curves[name][0].ms is not None]
    ours = [name for name in ranked if name in highlight]
    figure, (left, right) = two_panels(11, 4.6)
    for axes, axis in ((left, "tokens"), (right, "ms")):
        best = frontier(points, axis)
        band = {"color": "#ffd54f", "linewidth": 9, "alpha": 0.55, "solid_capstyle": "round", "label": "frontier"}
        axes.plot([getattr(one, axis) for one in best], [100 * one.accuracy for one in best], **band)
        axes.axhline(100 * whole.accuracy, color="black", linewidth=1, linestyle=(0, (4, 3)), label="all tokens")
        for name in ranked:
            line = sorted((one for one in curves[name] if getattr(one, axis) is not None), key=lambda one: one.tokens)
            style = _style(name, ours, peers)
            axes.plot([getattr(one, axis) for one in line], [100 * one.accuracy for one in line], label=name, **style)
        axes.plot(getattr(whole, axis), 100 * whole.accuracy, marker="*", markersize=12, color="black")
        axes.grid(color="#e6e6e6", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    ticks = sorted({one.tokens for one in points if one.selector not in (DOWNSAMPLING, POOLED)})
    left.set_xscale("log")
    left.set_xticks(ticks, [str(tick) for tick in ticks])
    left.minorticks_off()
    left.set_xlabel("visual tokens")
    left.set_ylabel("right answers, %, mean over tasks")
    right.set_xlabel(time_label)
    figure.legend(*left.get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=9)
    return figure


def _style(name: str, ours: Sequence[str], peers: Sequence[str]) -> dict[str, Any]:
    """How a method's line looks: ours red, peers in muted colours, bounds that are no method grey and dashed."""
    if name in ours:
        shade = ("#c1121f", "#f28482", "#f7b2ad", "#fbd9d7")[min(ours.index(name), 3)]
        return {"color": shade, "linewidth": 2.4, "marker": "o", "markersize": 6, "zorder": 5}
    if name not in peers:
        return {"color": "#9e9e9e", "linewidth": 1.4, "linestyle": ":", "zorder": 2}
    colours = ("#4477aa", "#228833", "#aa3377", "#66ccee", "#bbaa22", "#332288", "#009988", "#997700", "#88419d")
    turn = peers.index(name)
    marks = {"marker": "sD^vPX<>hp"[turn % 10], "markersize": 4.5, "linewidth": 1.2, "zorder": 3}
    return {"color": (*colours, "#777777", "#bbbbbb")[turn % 11], **marks}


def two_panels(width: float, height: float) -> tuple[Any, tuple[Any, Any]]:
    """A matplotlib figure of so many inches, and its two axes, which share what is upright.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("drawing needs matplotlib: pip install 'grip-hf[eval]'") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    return figure, (left, right)
