"""The suite's findings as JSON, and as one HTML page."""

import math
from importlib import resources
from pathlib import Path
from typing import Any

from resnet_fast.bench.gpu.suite import Suite
from resnet_fast.bench.machine import describe
from resnet_fast.utils.files import json_text, replacing
from resnet_fast.utils.optional import require


def write_report(suite: Suite, folder: Path) -> dict[str, Any]:
    """Write ``gpu.json`` and ``gpu.html`` to ``folder``, each whole or not at all, and return what the first holds."""
    jinja2 = require("jinja2", "the GPU report")
    content = {
        "passed": suite.passed,
        "device": suite.device,
        "gpu": gpu(suite.device),
        "quick": suite.quick,
        "minutes": suite.minutes,
        "seconds": suite.seconds,
        "machine": describe(),
        "parts": [part.__dict__ for part in suite.parts],
    }
    template = resources.files("resnet_fast.bench.gpu").joinpath("report.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters.update(number=_number, small=_small, ratio=_ratio)
    page = environment.from_string(template).render(
        **content,
        checks=suite.checks,
        by_name={part.name: part for part in suite.parts},
        choices=_choices(suite),
        competitors=_competitors(suite),
    )
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (("gpu.json", json_text(content)), ("gpu.html", page)):
        with replacing(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return content


def gpu(device: str) -> dict[str, Any]:
    """Return what PyTorch says of the GPU, or nothing on a CPU."""
    import torch

    if device != "cuda":
        return {}
    found = torch.cuda.get_device_properties(0)
    return {
        "name": found.name,
        "capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "memory_gib": round(found.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
    }


def _choices(suite: Suite) -> list[dict[str, Any]]:
    """Return our fastest and PyTorch's fastest candidate for every measured layer, and the ratio of their times."""
    rows = []
    for layer in (result for part in suite.parts if part.name == "layers" for result in part.results):
        times = layer["milliseconds"]
        ours, theirs = (
            min((ms for name, ms in times.items() if ("triton" in name) is mine), default=math.nan)
            for mine in (True, False)
        )
        rows.append({**layer, "ours": ours, "pytorchs": theirs, "ratio": theirs / ours})
    return rows


def _competitors(suite: Suite) -> list[str]:
    """Who computed any of the single layers, in their order."""
    results = [result for part in suite.parts if part.name == "peers" for result in part.results]
    return list(dict.fromkeys(name for result in results for name in (*result["milliseconds"], *result["rejected"])))


def _ratio(layer: dict[str, Any]) -> float:
    """The fastest peer's time over ours; NaN where one is missing."""
    times = layer["milliseconds"]
    return min((ms for name, ms in times.items() if name != "ours"), default=math.nan) / times.get("ours", math.nan)


def _number(value: Any, digits: int = 2) -> str:
    return "" if value is None or value != value else f"{value:.{digits}f}"


def _small(value: Any) -> str:
    return "" if value is None else f"{value:.1e}"
