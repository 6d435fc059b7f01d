"""``resnet-fast verify FILE.onnx``: does an exported file still hold what was asked of it?"""

from dataclasses import asdict
from pathlib import Path
from typing import Any, Optional

from rich.markup import escape

from resnet_fast.cli.console import console, write_json
from resnet_fast.cli.models import build
from resnet_fast.export import ExportResult, verify_onnx


def verify_file(
    path: str,
    *,
    model: Optional[str],
    weights: Optional[str],
    num_classes: Optional[int],
    images: Optional[Path],
    tensorrt: Optional[bool],
    json: Optional[str],
) -> None:
    """Verify the file and say what was found; ``model`` is the name of what it was made from."""
    stock = None if model is None else build(model, weights=weights, num_classes=num_classes)
    out = console()
    with out.status(f"verifying {path}"):
        result = verify_onnx(path, stock, images=images, tensorrt=tensorrt)
    for line in described(result):
        out.print(line)
    write_json(as_json(result), json)


def described(result: ExportResult) -> list[str]:
    """Lines for people, in rich's markup."""
    counts = ", ".join(f"{count} {name}" for name, count in result.op_counts.items())
    size = f"{result.size / 1e6:.1f} MB"
    lines = [f"[bold]{escape(str(result.path))}[/]: {result.precision}, {size}, opset {result.opset}, {counts}"]
    if result.method is None:
        lines.append("[yellow]not verified[/]")
    elif result.tolerance is None:
        lines.append(
            f"{result.method}: finite; an image alone and in a batch differ by {result.batch_error:.2g}. "
            "[yellow]Not compared with a model[/]: --model NAME --weights FILE"
        )
    else:
        errors = ", ".join(f"{error:.2g} at batch {batch}" for batch, error in result.max_errors.items())
        lines.append(
            f"{result.method}, against float64 PyTorch: {errors}; allowed {result.tolerance:.2g} "
            f"({'fp32' if result.precision == 'int8' else result.precision} PyTorch itself: {result.torch_error:.2g})"
        )
    if result.images:
        lines.append(
            f"{result.images} pictures: {result.image_error:.2g} from float64 PyTorch, the same best class in "
            f"{result.top1_agreement:.2%}"
        )
    if result.engine is not None:
        engine = result.engine
        lines.append(
            f"TensorRT-RTX {engine.version}: parsed, and an engine of {engine.size / 1e6:.1f} MB built; it has "
            f"{engine.kernels} kernels, {engine.fused} of {engine.convolutions} convolutions with their ReLU inside"
            + (f", {engine.int8_convolutions} in int8" if engine.int8_convolutions else "")
        )
    return lines


def as_json(result: ExportResult) -> dict[str, Any]:
    """Without the engine's list of layers, but with what was counted of them."""
    data = {**asdict(result), "path": str(result.path)}
    if (engine := result.engine) is not None:
        del data["engine"]["layers"]
        data["engine"] |= {
            name: getattr(engine, name)
            for name in ("kernels", "convolutions", "int8_convolutions", "fused", "fused_add")
        }
    return data
