"""The roofline drawn: layers under the roof, and the pipelines' times. Needs matplotlib."""

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from resnet_fast.bench.roofline import NOTE, PIPELINES, Roofline

_INK, _GRID, _ROOF = "#1f2933", "#e9ecef", "#495057"
_COLOURS = {"eager": "#adb5bd", "compile": "#e8890c", "ours": "#0b7285", "back_to_back": "#5f3dc4"}
_MARKERS = {"eager": "s", "compile": "^", "ours": "o", "back_to_back": "D"}
_SIZES = {"eager": 14, "compile": 16, "ours": 18, "back_to_back": 40}


def save(result: Roofline, title: str, chart: Path) -> None:
    """Draw the chart into a file.

    Args:
        title: what was predicted: model, GPU, mode, batch.
        chart: a path that ends in ``.svg`` or ``.png``.
    """
    save_figure(_draw(result, title), chart, dpi=150)


def save_figure(figure: Figure, chart: Path, dpi: float = 100) -> None:
    """Write ``figure`` to an SVG or PNG file, whose content depends on nothing but what it shows."""
    with matplotlib.rc_context({"svg.hashsalt": "resnet_fast"}):
        figure.savefig(chart, dpi=dpi, metadata={"Date": None} if chart.suffix == ".svg" else {})


def _draw(result: Roofline, title: str) -> Figure:
    figure = Figure(figsize=(12.5, 5.4), layout="constrained")
    figure.suptitle(f"{title}\n{NOTE}", fontsize=11, color=_INK)
    left, right = figure.subplots(1, 2, width_ratios=(1.5, 1))
    _roof(left, result)
    _times(right, result)
    for axes in (left, right):
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=_INK, labelsize=8)
    return figure


def _roof(axes: Any, result: Roofline) -> None:
    """Every layer once for each pipeline: what it computes a second, by its operations a byte there."""
    intensities: list[float] = []
    rates: list[float] = []
    for name in result.totals:
        layers = [(layer.limit.flops, layer.costs[name]) for layer in result.layers]
        points = [(flops / cost.bytes, flops / cost.us / 1e6) for flops, cost in layers if flops and cost.bytes]
        x, y = zip(*points)
        filling = "none" if name == "back_to_back" else _COLOURS[name]
        axes.scatter(
            x, y, s=_SIZES[name], marker=_MARKERS[name], facecolors=filling, edgecolors=_COLOURS[name], linewidths=0.9,
            label=_label(name),
        )  # fmt: skip
        intensities += x
        rates += y
    low, high = min(intensities) / 1.5, max(*intensities, 2 * result.ridge) * 1.5
    peak = result.peak / 1e12
    axes.plot([low, result.ridge, high], [low / result.ridge * peak, peak, peak], color=_ROOF, linewidth=1.6)
    reached = result.assumptions.compute_efficiency * peak
    sloped = result.assumptions.memory_efficiency * result.bandwidth / 1e12
    axes.plot(
        [low, reached / sloped, high], [low * sloped, reached, reached], color=_ROOF, linewidth=1, linestyle="--",
        label="assumed efficiency",
    )  # fmt: skip
    axes.annotate(
        f"{peak:.0f} TFLOP/s", (high, peak), xytext=(-4, 4), textcoords="offset points", ha="right", fontsize=8,
        color=_ROOF,
    )  # fmt: skip
    axes.axvline(result.ridge, color=_GRID, linewidth=1)
    axes.annotate(
        f"{result.bandwidth / 1e12:.2f} TB/s up to {result.ridge:.0f} operations a byte", (result.ridge, min(rates)),
        xytext=(-4, 0), textcoords="offset points", ha="right", va="bottom", rotation=90, fontsize=8, color=_ROOF,
    )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(min(rates) / 1.5, peak * 1.6))
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_major_formatter(plain)
    axes.yaxis.set_major_formatter(plain)
    axes.set_xlabel("operations a byte, by layer", fontsize=9, color=_INK)
    axes.set_ylabel("TFLOP/s, predicted", fontsize=9, color=_INK)
    axes.grid(color=_GRID, which="major")
    axes.legend(loc="lower right", fontsize=8, frameon=True, edgecolor="none")


def _times(axes: Any, result: Roofline) -> None:
    """The whole network's time, by pipeline and at the limit."""
    bars = [(_label(name), total.cost.us / 1e3, _COLOURS[name]) for name, total in result.totals.items()]
    bars.append(("limit, layer by layer", result.limit.us / 1e3, _ROOF))
    labels, times, colours = zip(*bars)
    places = range(len(bars))[::-1]
    axes.barh(places, times, color=colours, height=0.6)
    for place, time in zip(places, times):
        axes.annotate(
            f"{time:.2f}", (time, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=9, color=_INK
        )
    axes.set_yticks(list(places), labels)
    axes.set_xlabel("milliseconds, predicted", fontsize=9, color=_INK)
    axes.margins(x=0.15)
    axes.grid(axis="x", color=_GRID)


def _label(name: str) -> str:
    return PIPELINES[name].partition(",")[0] if name != "back_to_back" else "ours, back to back"
