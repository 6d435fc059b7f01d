"""The report: one HTML file, chart and pictures inside."""

import base64
import io
import os
from importlib import resources
from pathlib import Path
from typing import Any, Optional

from markupsafe import Markup  # jinja2 brings it
from PIL import Image
from torch import Tensor

import resnet_fast
from resnet_fast.cli.console import write_json
from resnet_fast.cli.demo.digits import LearntDigits
from resnet_fast.cli.demo.photographs import Photographs
from resnet_fast.cli.demo.study import Study
from resnet_fast.utils.files import replacing

_COLOURS = {"ink": "#1f2933", "ours": "#0b7285", "peer": "#adb5bd", "line": "#e4e7eb", "limit": "#e8590c"}
"""Of the chart. The page puts its own of the same names in their place, so that it follows dark mode."""
_STOCK = ("eager", "channels_last")
_MORE_PEERS = ("openvino", "ncnn", "MNN")  # what `make demo PEERS=1` installs


def write_report(
    folder: Path,
    content: dict[str, Any],
    digits: LearntDigits,
    photographs: Photographs,
    on_digits: Study,
    on_photographs: Study,
) -> dict[str, Any]:
    """Write ``report.html`` and ``report.json`` to ``folder``.

    Args:
        content: ``seed``, ``threads``, ``seconds``, ``load_before`` and ``machine`` of the run.
        digits, photographs: what is shown beside the studies of them.

    Returns:
        What ``report.json`` holds: ``content``, the training, the studies and the verdict.
    """
    import jinja2

    studies = [study.as_dict() for study in (on_digits, on_photographs)]
    checks = [check["passed"] for study in studies for check in study["checks"]]
    verdict = {"passed": all(checks), "checks": len(checks), "checks_passed": sum(checks)}
    report = {**verdict, **content, "training": digits.training, "studies": studies}

    template = resources.files("resnet_fast.cli.demo").joinpath("report.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters.update(number=_number, sentence=_sentence, timed=_timed, untimed=_untimed)
    page = environment.from_string(template).render(
        **report,
        stock=_fastest(studies[1]["bench"], _STOCK),
        error_charts=[Markup(_errors(study["blocks"])) for study in studies],
        digits=_guesses(digits, on_digits.predictions),
        photographs=list(zip(photographs.names, map(_png, photographs.pictures), strict=True)),
        checkout=_checkout(folder),
        folder=folder,
    )
    with replacing(folder / "report.html") as temporary:
        temporary.write_text(page, encoding="utf-8")
    write_json(report, str(folder / "report.json"))
    return report


def _checkout(folder: Path) -> Optional[str]:
    """The way from ``folder`` to the documents; None where it is not in a checkout."""
    root = Path(resnet_fast.__file__).parents[1]
    inside = (root / "docs").is_dir() and folder.resolve().is_relative_to(root)
    return os.path.relpath(root, folder.resolve()) if inside else None


def _number(value: Optional[float], digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


# --- times ------------------------------------------------------------------------------------------------------------


def _timed(bench: dict[str, Any]) -> list[dict[str, Any]]:
    """Those that were timed, fastest first."""
    return sorted((entry for entry in bench["providers"] if entry["median_ms"]), key=lambda entry: entry["median_ms"])


def _untimed(bench: dict[str, Any]) -> str:
    """Who was not timed and why, in a line."""
    rest = [entry for entry in bench["providers"] if not entry["median_ms"]]
    absent = [entry["title"] for entry in rest if entry["status"] == "missing" and entry["provider"] in _MORE_PEERS]
    parts = [f"{', '.join(absent)} (make demo PEERS=1 installs what is missing)"] if absent else []
    parts += [f"{entry['title']} ({entry['reason']})" for entry in rest if entry["title"] not in absent]
    return f"Not timed: {'; '.join(parts)}." if parts else ""


def _fastest(bench: dict[str, Any], names: tuple[str, ...]) -> Optional[dict[str, Any]]:
    """The fastest of ``names`` that can be compared with ours."""
    return next((entry for entry in _timed(bench) if entry["provider"] in names and entry["ratio"]), None)


def _sentence(bench: dict[str, Any]) -> str:
    """The comparison in words, whichever way it went."""
    peer = _fastest(bench, tuple(entry["provider"] for entry in bench["providers"] if entry["provider"] != "ours"))
    if peer is None:
        return ""
    parts = [f"The fastest peer here was {peer['title']}: {_compared(peer)}."]
    stock = _fastest(bench, _STOCK)
    if stock and stock is not peer:
        parts.append(f"The fastest stock model was {stock['title']}: {_compared(stock)}.")
    return " ".join(parts)


def _compared(peer: dict[str, Any]) -> str:
    ratio = peer["ratio"]
    if 0.97 < ratio < 1.03:
        return "resnet_fast took about the same time"
    if ratio > 1:
        return f"resnet_fast was {ratio:.2f} times as fast"
    return f"resnet_fast was slower, at {ratio:.2f} times its speed"


# --- charts and pictures ----------------------------------------------------------------------------------------------


def _errors(blocks: list[dict[str, Any]]) -> str:
    from matplotlib.figure import Figure

    ink, peer = _COLOURS["ink"], _COLOURS["peer"]
    figure = Figure(figsize=(7.4, 2.6), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(peer)
    axes.tick_params(colors=ink, which="both", length=0, labelsize=9)
    axes.grid(axis="y", color=_COLOURS["line"])
    names = [block["path"] or "model" for block in blocks]
    for key, label, colour, style in (
        ("limit", "allowed", "limit", "-"),
        ("stock_error", "stock float32", "peer", "o"),
        ("error", "accelerated", "ours", "o"),
    ):
        values = [block[key] / (block["scale"] or 1) for block in blocks]
        axes.plot(values, style, color=_COLOURS[colour], label=label)
    axes.set_yscale("log")
    axes.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=8)
    axes.set_ylabel("relative error", color=ink, fontsize=9)
    above: Any = {"loc": "upper center", "bbox_to_anchor": (0.5, 1.2), "ncols": 3}
    axes.legend(frameon=False, fontsize=9, labelcolor=ink, **above)
    return _svg(figure)


def _svg(figure: Any) -> str:
    import matplotlib

    buffer = io.StringIO()
    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": "resnet_fast", "font.family": "sans-serif"}
    with matplotlib.rc_context(settings):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    for name, colour in _COLOURS.items():
        text = text.replace(colour, f"var(--{name})")
    return text[text.index("<svg") :]


def _guesses(digits: LearntDigits, predictions: list[int], shown: int = 24) -> list[dict[str, Any]]:
    """Some digits with what was read and what is right: the wrong ones first, for they are the interesting ones."""
    labels = digits.labels.tolist()
    order = sorted(range(len(labels)), key=lambda index: predictions[index] == labels[index])[:shown]
    return [
        {"picture": _png(255 - digits.pictures[index]), "guess": predictions[index], "truth": labels[index]}
        for index in order
    ]


def _png(picture: Tensor) -> str:
    """``[3, H, W]``, uint8, as the address of an image."""
    buffer = io.BytesIO()
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(buffer, "png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
