"""What ``benchmarks/layers.py`` measured, as a table in Markdown and as a roofline."""

import math
from typing import Any

from matplotlib.figure import Figure

from benchmarks.plot import COLUMNS, GRID, INK

KINDS = {
    "1x1": ("#0b7285", "o"),
    "3x3": ("#e8590c", "s"),
    "3x3/2": ("#c2255c", "D"),
    "stem": ("#5f3dc4", "^"),
    "grouped": ("#2b8a3e", "v"),
    "fc": ("#868e96", "P"),
    "other": ("#343a40", "X"),
}
"""What a layer is called in the chart, with its colour and marker. A fully connected layer is a 1x1 of one pixel."""

NOTES = (
    "GFLOP/s count the operations of a direct convolution. Winograd needs fewer, so it may exceed the peak.",
    "ms in net: median over the calls of the whole model, with the caches as the layers before leave them.",
    "ms alone, ORT alone: the same layer again and again, without a residual, each in a process of its own. ONNX "
    "Runtime's has its image converted to the layout that it computes in and back wherever it wants another than NCHW.",
    "FLOP/byte: the pixels that are needed, the weights and the result move once, without a residual.",
)

NUMBERS = {
    "times": ("count", "d"),
    "share": ("share", ".0%"),
    "FLOP/byte": ("intensity", ".1f"),
    "ms in net": ("network_ms", ".3f"),
    "GFLOP/s": ("gflops", ".1f"),
    "of peak": ("of_peak", ".0%"),
    "ms alone": ("alone_ms", ".3f"),
    "ORT alone": ("onnxruntime_ms", ".3f"),
    "ORT/ours": ("ratio", ".2f"),
}
COLUMN_NAMES = ("layer", "algorithm", *NUMBERS)


def rows(workload: dict[str, Any]) -> list[tuple[str, ...]]:
    """The cells of the table of a workload, under ``COLUMN_NAMES``."""
    return [
        (
            label(entry),
            entry["algorithm"],
            *("" if entry[key] is None else format(entry[key], form) for key, form in NUMBERS.values()),
        )
        for entry in workload["layers"]
    ]


def label(entry: dict[str, Any]) -> str:
    """A layer in words: ``56x56x64 → 128, 3x3/2, ReLU``, with the number of images in front if there are more."""
    image = "x".join(map(str, entry["input"] if entry["input"][0] > 1 else entry["input"][1:]))
    window = "x".join(map(str, entry["window"])) + ("" if entry["stride"] == [1, 1] else f"/{entry['stride'][0]}")
    groups = f", {entry['groups']} groups" if entry["groups"] > 1 else ""
    rest = (", ReLU" if entry["relu"] else "") + (", max-pool" if entry["pool"] else "")
    return f"{image} → {entry['output'][3]}, {window}{groups}{rest}"


def title(workload: dict[str, Any]) -> str:
    size = workload["size"]
    return f"{workload['model']}, batch {workload['batch']}, {size}x{size}, float32, {workload['threads']} threads"


def conditions(result: dict[str, Any]) -> list[str]:
    """Tell what the numbers were taken on."""
    machine = result["machine"]
    return [
        f"{machine['cpu']}, {machine['cores']} cores, kernels for {result['isa']}, {result['threads']} threads; "
        f"load {result['load_before']} before, {result['load_after']} after",
        f"peak of multiply-adds {result['peak_gflops']:.1f} GFLOP/s; memory {result['bandwidth_gb_s']:.1f} GB/s "
        f"({result['bandwidth_method']})",
    ]


def problems(result: dict[str, Any]) -> list[str]:
    """Tell why times are not there, each reason once."""
    found = {
        f"{entry['title']}: {entry['status']}: {entry['reason']}": None
        for workload in result["workloads"]
        for layer in workload["layers"]
        for entry in layer["providers"]
        if entry["status"] != "ok"
    }
    return list(found)


def markdown(result: dict[str, Any]) -> str:
    lines = ["# Layers", "", *(f"- {line}" for line in (*conditions(result), *NOTES, *problems(result)))]
    for workload in result["workloads"]:
        rules = ["---" if name not in NUMBERS else "---:" for name in COLUMN_NAMES]
        lines += ["", f"## {title(workload)}", ""]
        lines += [f"| {' | '.join(cells)} |" for cells in (COLUMN_NAMES, rules, *rows(workload))]
    return "\n".join(lines) + "\n"


def draw(result: dict[str, Any]) -> Figure:
    """A roofline per workload: what peak and memory allow, and what each layer reaches in the network."""
    workloads = result["workloads"]
    count, columns = len(workloads), min(COLUMNS, len(workloads))
    figure = Figure(figsize=(5.6 * columns, 4.2 * math.ceil(count / columns) + 0.8), layout="constrained")
    panels = figure.subplots(math.ceil(count / columns), columns, squeeze=False).ravel()
    for axes, workload in zip(panels, workloads, strict=False):
        _panel(axes, workload, result["peak_gflops"], result["bandwidth_gb_s"])
    for axes in panels[count:]:
        axes.set_visible(False)
    heading = f"{result['machine']['cpu']}, {result['threads']} threads, load {result['load_before']}"
    figure.suptitle(heading, fontsize=10, color=INK)
    figure.supxlabel(NOTES[0], fontsize=7, color=INK)
    return figure


def _panel(axes: Any, workload: dict[str, Any], peak_gflops: float, bandwidth_gb_s: float) -> None:
    intensities = [entry["intensity"] for entry in workload["layers"]]
    low, high = min(intensities) / 2, max(*intensities, peak_gflops / bandwidth_gb_s) * 2
    axes.plot([low, high], [peak_gflops] * 2, color=INK, linewidth=1, label=f"peak {peak_gflops:.0f} GFLOP/s")
    edge = peak_gflops / bandwidth_gb_s
    line, name = [low * bandwidth_gb_s, peak_gflops], f"memory {bandwidth_gb_s:.0f} GB/s"
    axes.plot([low, edge], line, color=INK, linewidth=1, linestyle="--", label=name)
    for name, (color, marker) in KINDS.items():
        entries = [entry for entry in workload["layers"] if entry["kind"] == name]
        if entries:
            points = [entry["intensity"] for entry in entries], [entry["gflops"] for entry in entries]
            axes.scatter(*points, color=color, marker=marker, s=28, alpha=0.85, linewidths=0, label=name, zorder=3)
    axes.set(xscale="log", yscale="log", xlim=(low, high))
    axes.set_title(f"{workload['model']}, batch {workload['batch']}, {workload['dtype']}", fontsize=10, color=INK)
    axes.set_xlabel("FLOP/byte", fontsize=8, color=INK)
    axes.set_ylabel("GFLOP/s in the network", fontsize=8, color=INK)
    axes.grid(color=GRID)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK, length=0, labelsize=8)
    axes.legend(fontsize=7, frameon=False, labelcolor=INK, loc="lower right")
