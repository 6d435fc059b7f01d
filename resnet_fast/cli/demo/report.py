"""The report: one HTML file, charts and pictures inside."""

import base64
import io
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup  # jinja2 brings it

from resnet_fast.cli.console import write_json
from resnet_fast.cli.demo.data import Digits, Photographs
from resnet_fast.cli.demo.study import Study
from resnet_fast.utils.files import replacing

_INK, _OURS, _PEER, _GRID = "#1f2933", "#0b7285", "#adb5bd", "#e9ecef"


def write_report(
    folder: Path,
    content: dict[str, Any],
    digits: Digits,
    photographs: Photographs,
    on_digits: Study,
    on_photographs: Study,
) -> dict[str, Any]:
    """Write ``report.html`` and ``report.json`` to ``folder``.

    Args:
        content: ``seed``, ``threads``, ``seconds``, ``load_before``, ``machine`` and ``training`` of the run.
        digits, photographs: what is shown beside the studies of them.

    Returns:
        What ``report.json`` holds: ``content``, the studies and the verdict.
    """
    import jinja2

    studies = [on_digits, on_photographs]
    checks = [check for study in studies for check in study.checks]
    passed = sum(check.passed for check in checks)
    verdict = {"passed": passed == len(checks), "checks": len(checks), "checks_passed": passed}
    report = {**verdict, **content, "studies": [study.as_dict() for study in studies]}

    template = resources.files("resnet_fast.cli.demo").joinpath("report.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters.update(times=_times, sentence=_sentence)
    page = environment.from_string(template).render(
        **report,
        training_chart=Markup(_training(report["training"])),
        time_charts=[Markup(_times_chart(study["bench"])) for study in report["studies"]],
        error_charts=[Markup(_errors(study["blocks"])) for study in report["studies"]],
        digits=_digit_pictures(digits, on_digits.predictions),
        photographs=[
            (name, _png(picture)) for name, picture in zip(photographs.names, photographs.pictures, strict=True)
        ],
    )
    with replacing(folder / "report.html") as temporary:
        temporary.write_text(page, encoding="utf-8")
    write_json(report, str(folder / "report.json"))
    return report


def _times(value: Any, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _sentence(bench: dict[str, Any]) -> str:
    """The comparison in words, whichever way it went."""
    timed = [entry for entry in bench["providers"] if entry["median_ms"]]
    ours = next((entry for entry in timed if entry["provider"] == "ours"), None)
    peers = sorted((entry for entry in timed if entry["provider"] != "ours"), key=lambda entry: entry["median_ms"])
    if ours is None or not peers:
        return ""
    parts = [f"The fastest peer here was {peers[0]['title']}: {_compared(peers[0])}."]
    stock = [entry for entry in peers if entry["provider"] in ("eager", "channels_last")]
    if stock and stock[0] is not peers[0]:
        parts.append(f"The faster of the two stock models was {stock[0]['title']}: {_compared(stock[0])}.")
    return " ".join(parts)


def _compared(peer: dict[str, Any]) -> str:
    ratio = peer["ratio"]
    if 0.97 < ratio < 1.03:
        return "resnet_fast took about the same time"
    if ratio > 1:
        return f"resnet_fast was {ratio:.2f} times as fast"
    return f"resnet_fast was slower, at {ratio:.2f} times its speed"


# --- charts -----------------------------------------------------------------------------------------------------------


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_PEER)
    axes.tick_params(colors=_INK, length=0, labelsize=9)
    axes.set_axisbelow(True)
    return figure, axes


def _svg(figure: Any) -> str:
    import matplotlib

    buffer = io.StringIO()
    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": "resnet_fast", "font.family": "sans-serif"}
    with matplotlib.rc_context(settings):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _training(history: dict[str, Any]) -> str:
    figure, axes = _figure(4.6, 2.2)
    epochs = np.arange(1, len(history["accuracy"]) + 1)
    axes.plot(epochs, [100 * value for value in history["accuracy"]], color=_OURS, marker="o", linewidth=2)
    axes.set_xticks(epochs)
    axes.set_xlabel("epoch", color=_INK, fontsize=9)
    axes.set_ylabel("test accuracy, %", color=_INK, fontsize=9)
    axes.grid(axis="y", color=_GRID)
    return _svg(figure)


def _times_chart(bench: dict[str, Any]) -> str:
    timed: Any = sorted((e for e in bench["providers"] if e["median_ms"]), key=lambda e: e["median_ms"], reverse=True)
    figure, axes = _figure(7.4, 0.42 * len(timed) + 0.7)
    colours = [_OURS if entry["provider"] == "ours" else _PEER for entry in timed]
    medians = [entry["median_ms"] for entry in timed]
    low = [entry["median_ms"] - min(entry["rounds_ms"]) for entry in timed]
    high = [max(entry["rounds_ms"]) - entry["median_ms"] for entry in timed]
    axes.barh([entry["title"] for entry in timed], medians, color=colours, height=0.62)
    axes.errorbar(medians, range(len(timed)), xerr=[low, high], fmt="none", ecolor=_INK, elinewidth=1, capsize=3)
    for position, entry in enumerate(timed):
        place = {"xy": (max(entry["rounds_ms"]), position), "xytext": (6, 0), "textcoords": "offset points"}
        axes.annotate(f"{entry['median_ms']:.1f}", **place, va="center", color=_INK, fontsize=9)
    axes.margins(x=0.1)
    axes.set_xlabel("milliseconds a call, median of the rounds; the line spans all rounds", color=_INK, fontsize=9)
    axes.grid(axis="x", color=_GRID)
    return _svg(figure)


def _errors(blocks: list[dict[str, Any]]) -> str:
    figure, axes = _figure(7.4, 2.6)
    names = [block["path"] or "model" for block in blocks]
    positions = np.arange(len(names))
    for key, label, colour, marker in (
        ("stock_error", "stock float32", _PEER, "o"),
        ("error", "accelerated", _OURS, "o"),
        ("limit", "allowed", "#e8590c", "_"),
    ):
        values = [block[key] / (block["scale"] or 1) for block in blocks]
        axes.plot(positions, values, marker, color=colour, label=label, markersize=7)
    axes.set_yscale("log")
    axes.set_xticks(positions, names, rotation=60, ha="right", fontsize=8)
    axes.set_ylabel("relative error", color=_INK, fontsize=9)
    axes.grid(axis="y", color=_GRID)
    axes.legend(frameon=False, fontsize=9, ncols=3, loc="upper center", bbox_to_anchor=(0.5, 1.2))
    return _svg(figure)


# --- pictures ---------------------------------------------------------------------------------------------------------


def _digit_pictures(digits: Digits, predictions: list[int], shown: int = 24) -> list[tuple[str, int, bool]]:
    """Picture, prediction and whether it is right: the wrong ones first, for they are the interesting ones."""
    right = [guess == label for guess, label in zip(predictions, digits.test_labels.tolist(), strict=True)]
    order = sorted(range(len(right)), key=lambda index: right[index])[:shown]
    pictures = ((digits.test_images + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    return [(_png(255 - pictures[index]), predictions[index], right[index]) for index in order]


def _png(picture: np.ndarray) -> str:
    from matplotlib.image import imsave

    buffer = io.BytesIO()
    imsave(buffer, np.ascontiguousarray(picture), format="png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
