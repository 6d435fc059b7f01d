"""Draw a result of ``resnet-fast bench``: ``python benchmarks/plot.py RESULT.json CHART.svg``."""

import argparse
import json
import math
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from resnet_fast.bench.roofline_chart import save_figure

INK, OURS, PEER, GRID = "#1f2933", "#0b7285", "#adb5bd", "#e9ecef"
COLUMNS = 2


def draw(result: dict[str, Any]) -> Figure:
    """One panel per workload, one bar per provider that was timed."""
    workloads = result["workloads"]
    rows = math.ceil(len(workloads) / COLUMNS)
    figure = Figure(figsize=(5.6 * min(COLUMNS, len(workloads)), 2.9 * rows + 0.5), layout="constrained")
    panels = figure.subplots(rows, min(COLUMNS, len(workloads)), squeeze=False).ravel()
    for axes, workload in zip(panels, workloads, strict=False):
        _panel(axes, workload)
    for axes in panels[len(workloads) :]:
        axes.set_visible(False)
    machine = result["machine"]
    figure.suptitle(f"{machine['cpu']}, {workloads[0]['threads']} threads", fontsize=10, color=INK)
    return figure


def _panel(axes: Any, workload: dict[str, Any]) -> None:
    timed = sorted((entry for entry in workload["providers"] if entry["median_ms"]), key=lambda e: -e["median_ms"])
    axes.barh(
        [entry["title"] for entry in timed],
        [entry["median_ms"] for entry in timed],
        color=[OURS if entry["provider"] == "ours" else PEER for entry in timed],
        height=0.62,
    )
    for position, entry in enumerate(timed):
        ratio = "" if entry["ratio"] is None or entry["provider"] == "ours" else f"  ({entry['ratio']:.2f}x)"
        place: dict[str, Any] = {"xy": (entry["median_ms"], position), "xytext": (5, 0), "textcoords": "offset points"}
        kept = f"\n{entry['saved_bytes'] / 2**20:.0f} MiB kept for backward" if entry.get("saved_bytes") else ""
        axes.annotate(f"{entry['median_ms']:.1f}{ratio}{kept}", **place, va="center", fontsize=8, color=INK)
    training = ", training" if workload.get("training") else ""
    frozen = ", frozen batch norm" if workload.get("frozen_bn") else ""
    title = f"{workload['model']}{training}{frozen}, batch {workload['batch']}, {workload['dtype']}"
    axes.set_title(title, fontsize=10, color=INK)
    call = "step" if training else "call"
    axes.set_xlabel(f"milliseconds a {call} (times ours)", fontsize=8, color=INK)
    axes.margins(x=0.25)
    axes.grid(axis="x", color=GRID)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK, length=0, labelsize=8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("result", type=Path, help="what bench --json wrote")
    parser.add_argument("chart", type=Path, help="the SVG or PNG file to write")
    arguments = parser.parse_args()
    save_figure(draw(json.loads(arguments.result.read_text())), arguments.chart)


if __name__ == "__main__":
    main()
