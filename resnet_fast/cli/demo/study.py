"""What is checked and measured on a model: the same for the digits' network and for the photographs'."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from torch import Tensor, nn

from resnet_fast import accelerate, explain
from resnet_fast.bench import Measurement, measure
from resnet_fast.cli.verify_file import as_json
from resnet_fast.export import ExportResult, export_onnx
from resnet_fast.export.runner import session
from resnet_fast.utils.tolerance import error_limit
from resnet_fast.verify import Check, check_model, fused_limit


@dataclass(frozen=True)
class Finding:
    """One check, in words."""

    name: str
    found: str
    expected: str
    passed: bool


@dataclass(frozen=True)
class BenchSettings:
    """What ``bench.measure`` is asked."""

    providers: Sequence[str]
    threads: int
    rounds: int
    seconds: float


@dataclass
class Study:
    """All that was found out about one model."""

    title: str
    images: list[int]
    checks: list[Finding]
    blocks: list[Check]
    explanation: dict[str, Any]
    export: ExportResult
    predictions: list[int]
    bench_batch: int
    measurements: list[Measurement] = field(default_factory=list)

    def summary(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Columns and rows of a table of the checks."""
        rows: list[tuple[str, ...]] = [
            (each.name, each.found, each.expected, "ok" if each.passed else "FAILED") for each in self.checks
        ]
        return ("check", "found", "expected", ""), rows

    def as_dict(self) -> dict[str, Any]:
        ours = next((each for each in self.measurements if each.provider == "ours"), None)
        return {
            "title": self.title,
            "images": self.images,
            "checks": [asdict(each) for each in self.checks],
            "blocks": [{**asdict(each), "passed": each.passed} for each in self.blocks],
            "explanation": self.explanation,
            "export": {**as_json(self.export), "path": self.export.path.name},
            "bench": {
                "batch": self.bench_batch,
                "size": self.images[-1],
                "providers": [each.as_dict(ours) for each in self.measurements],
            },
        }


def study(
    title: str,
    stock: nn.Module,
    images: Tensor,
    *,
    onnx: Path,
    bench: BenchSettings,
    bench_batch: int,
    classes: Optional[Sequence[str]] = None,
    progress: Callable[[str], None] = lambda text: None,
) -> Study:
    """Accelerate a copy of ``stock`` and compare, export ``stock`` and replay, and time both and their peers.

    Args:
        stock: in eval mode, float32, on the CPU. Not changed.
        images: ``[N, C, H, W]``: what predictions are compared on.
        onnx: the file to write.
        bench_batch: images in a timed call, the first of ``images``.
    """
    progress(f"{title}: stock, accelerated and float64")
    before = {name: tensor.clone() for name, tensor in stock.state_dict().items()}
    fast = accelerate(copy.deepcopy(stock))
    precise = copy.deepcopy(stock).double()
    with torch.inference_mode():
        reference = precise(images.double())
        plain, fused = stock(images), fast(images)
    limit = error_limit(_distance(plain, reference), reference)
    winograd = fused_limit(_distance(plain, reference), reference)
    allowed = f"at most {limit:.1e} (stock float32: {_distance(plain, reference):.1e})"

    progress(f"{title}: block by block")
    blocks = list(check_model(stock, fast, images[:4]))

    progress(f"{title}: ONNX")
    exported = export_onnx(fast, onnx, input_size=tuple(images.shape[1:]), classes=classes)
    replayed = _replay(onnx, images)

    same_state = list(before) == list(fast.state_dict()) and all(
        torch.equal(tensor, before[name]) for name, tensor in fast.state_dict().items()
    )
    passed = sum(check.passed for check in blocks)
    checks = [
        Finding(
            "accelerate() leaves names and values of all parameters and buffers alone",
            f"{len(before)} entries of the state_dict, {'all' if same_state else 'not all'} equal",
            "all equal",
            same_state,
        ),
        _unchanged("accelerated", plain, fused),
        _error(
            "The accelerated model's",
            fused,
            reference,
            winograd,
            f"{allowed}, or {winograd:.1e} by Winograd's algorithm",
        ),
        Finding(
            "Every block by itself is as exact as the stock block",
            f"{passed} of {len(blocks)} comparisons",
            "each error at most twice the stock block's, plus 8 eps, or 5e-5 by Winograd's algorithm",
            passed == len(blocks),
        ),
        _unchanged("replayed from ONNX", plain, replayed),
        _error("ONNX Runtime's", replayed, reference, limit, allowed),
    ]
    measurements = measure(
        stock,
        images[:bench_batch],
        providers=bench.providers,
        threads=bench.threads,
        rounds=bench.rounds,
        seconds=bench.seconds,
        progress=lambda text: progress(f"{title}: timing, {text}"),
    )
    for each in measurements:
        if each.provider == "ours":
            checks.append(
                Finding(
                    "The timed result is right",
                    each.reason or f"relative error {each.error:.1e}",
                    "at most 1e-4",
                    each.status == "ok",
                )
            )
    return Study(
        title,
        list(images.shape),
        checks,
        blocks,
        explain(fast).as_dict(),
        exported,
        fused.argmax(1).tolist(),
        min(bench_batch, len(images)),
        measurements,
    )


def _unchanged(what: str, plain: Tensor, result: Tensor) -> Finding:
    same = int((plain.argmax(1) == result.argmax(1)).sum())
    return Finding(
        f"Predictions are unchanged when {what}",
        f"{same} of {len(plain)} the same",
        f"{len(plain)}",
        same == len(plain),
    )


def _error(whose: str, result: Tensor, reference: Tensor, limit: float, allowed: str) -> Finding:
    error = _distance(result, reference)
    return Finding(f"{whose} error against float64 is single precision's own", f"{error:.1e}", allowed, error <= limit)


def _distance(result: Tensor, reference: Tensor) -> float:
    return (result.double() - reference).abs().max().item()


def _replay(path: Path, images: Tensor) -> Tensor:
    """The logits that ONNX Runtime computes, 32 images a call."""
    runtime = session(path)
    parts = [runtime.run(None, {"input": part.numpy()})[0] for part in images.split(32)]
    return torch.from_numpy(np.concatenate(parts))
