"""What is checked and measured on a model: the same for the digits' network and for the photographs'."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Optional

import torch
from torch import Tensor, nn

from resnet_fast import accelerate, explain
from resnet_fast.bench import Measurement
from resnet_fast.cli.bench import as_dicts
from resnet_fast.cli.verify import as_json
from resnet_fast.export import ExportResult, export_onnx
from resnet_fast.export.runner import session
from resnet_fast.verify import Check, check_model, check_results

REQUIRED_ACCURACY = 0.95


@dataclass(frozen=True)
class Finding:
    """One check, in words."""

    name: str
    found: str
    expected: str
    passed: bool


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

    def as_dict(self) -> dict[str, Any]:
        return {
            "title": self.title,
            "images": self.images,
            "checks": [asdict(each) for each in self.checks],
            "blocks": [{**asdict(each), "passed": each.passed} for each in self.blocks],
            "explanation": self.explanation,
            "export": {**as_json(self.export), "path": self.export.path.name},
            "bench": {"batch": self.bench_batch, "size": self.images[-1], "providers": as_dicts(self.measurements)},
        }


def study(
    title: str,
    stock: nn.Module,
    images: Tensor,
    *,
    onnx: Path,
    measured: Callable[..., list[Measurement]],
    bench_batch: int,
    classes: Optional[Sequence[str]] = None,
    progress: Callable[[str], None] = lambda text: None,
) -> Study:
    """Accelerate a copy of ``stock`` and compare, export it and replay, and time both and their peers.

    Args:
        stock: in eval mode, float32, on the CPU. Not changed.
        images: ``[N, C, H, W]``: what predictions are compared on.
        onnx: the file to write.
        measured: ``bench.measure``, with all arguments but the model, the images and ``progress``.
        bench_batch: images in a timed call, the first of ``images``.
    """
    progress(f"{title}: stock, accelerated and float64")
    fast = accelerate(stock, inplace=False)
    with torch.inference_mode():
        reference = copy.deepcopy(stock).double()(images.double())
        plain, fused = stock(images), fast(images)

    progress(f"{title}: block by block")
    blocks = list(check_model(stock, fast, images[:4]))

    progress(f"{title}: ONNX")
    exported = export_onnx(fast, onnx, input_size=tuple(images.shape[1:]), classes=classes)
    replayed = torch.from_numpy(session(onnx).run(None, {"input": images.numpy()})[0])

    whole = check_results("model", "", title, reference, plain, fused)
    replay = check_results("model", "", title, reference, plain, replayed, winograd=False)
    passed = sum(block.passed for block in blocks)
    checks = [
        _same_state(stock.state_dict(), fast.state_dict()),
        _unchanged("accelerated", plain, fused),
        _exact("The accelerated model's", whole),
        Finding(
            "Every block by itself is as exact as the stock block",
            f"{passed} of {len(blocks)} comparisons",
            "each error at most twice the stock block's, plus 8 eps, or 5e-5 by Winograd's algorithm",
            passed == len(blocks),
        ),
        _unchanged("replayed from ONNX", plain, replayed),
        _exact("ONNX Runtime's", replay),
    ]
    measurements = measured(stock, images[:bench_batch], progress=lambda text: progress(f"{title}: timing, {text}"))
    checks += [_timed(each) for each in measurements if each.provider == "ours"]
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


def learnt(accuracy: float) -> Finding:
    """Whether a network has learnt enough to say anything about predictions."""
    return Finding(
        "The network has learnt its task",
        f"{accuracy:.1%} of the test digits are right",
        f"at least {REQUIRED_ACCURACY:.0%}",
        accuracy >= REQUIRED_ACCURACY,
    )


def _same_state(stock: dict[str, Tensor], fast: dict[str, Tensor]) -> Finding:
    same = list(stock) == list(fast) and all(torch.equal(tensor, fast[name]) for name, tensor in stock.items())
    return Finding(
        "accelerate() leaves names and values of all parameters and buffers alone",
        f"{len(stock)} entries of the state_dict, {'all' if same else 'not all'} equal",
        "all equal",
        same,
    )


def _unchanged(what: str, plain: Tensor, result: Tensor) -> Finding:
    same = int((plain.argmax(1) == result.argmax(1)).sum())
    return Finding(
        f"Predictions are unchanged when {what}",
        f"{same} of {len(plain)} the same",
        f"all {len(plain)}",
        same == len(plain),
    )


def _exact(whose: str, check: Check) -> Finding:
    return Finding(
        f"{whose} error against float64 is single precision's own",
        f"{check.error:.1e}",
        f"at most {check.limit:.1e} (stock float32: {check.stock_error:.1e})",
        check.passed,
    )


def _timed(ours: Measurement) -> Finding:
    return Finding(
        "The timed result is right",
        ours.reason or f"relative error {ours.error:.1e}",
        "at most 1e-4",
        ours.status == "ok",
    )
