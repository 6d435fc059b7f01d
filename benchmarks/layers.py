"""Each convolution of a model: our kernel beside what the machine can do, and beside ONNX Runtime on the same layer.

``python -m benchmarks.layers --json RESULT.json --markdown RESULT.md --svg RESULT.svg``, with nothing else running;
README.md says what is measured and how.
"""

import argparse
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from torch import nn

from benchmarks.layer_report import COLUMN_NAMES, NOTES, NUMBERS, conditions, draw, markdown, problems, rows, title
from resnet_fast import accelerate
from resnet_fast.bench import Bench, Measurement, prepare
from resnet_fast.bench.machine import describe, load
from resnet_fast.bench.norms import randomise_batch_norm
from resnet_fast.bench.roofline_chart import save_figure
from resnet_fast.bench.worker import timed_round
from resnet_fast.bench.workload import ONNX
from resnet_fast.cli.console import console, table, write_json
from resnet_fast.kernels.native import abi, library
from resnet_fast.kernels.native import inference as native
from resnet_fast.models.named import UnknownNameError, build
from resnet_fast.network.plan import Plan, last_plan
from resnet_fast.utils.cpuinfo import available_cores
from resnet_fast.utils.files import replacing

OURS, PEER = "plan", "onnxruntime"

BANDWIDTH_BYTES = 2**28
BANDWIDTH_METHOD = "torch.sum over 256 MiB of float32: reading alone, best of 5"
_OPSET, _IR = 18, 9


# --- a layer ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """A shape of convolution in a model."""

    shape: abi.Shape
    algorithm: str
    count: int  # in one call of the model
    seconds: float  # of one of them, in the model


def flops(shape: abi.Shape) -> int:
    """Operations of a direct convolution, a multiply-add counted as two."""
    s = shape
    return 2 * s.n * s.p * s.q * s.k * s.r * s.s * s.c // s.groups


def moved_bytes(shape: abi.Shape) -> int:
    """The least that has to be read and written, float32. A 1x1 window of stride 2 does not need every pixel."""
    s = shape
    rows = _needed(s.h, s.p, s.stride_h, s.r, s.dilation_h, s.pad_h)
    columns = _needed(s.w, s.q, s.stride_w, s.s, s.dilation_w, s.pad_w)
    p, q = native.output_size(s)
    return 4 * (s.n * rows * columns * s.c + s.k * s.r * s.s * s.c // s.groups + s.n * p * q * s.k)


def _needed(size: int, outputs: int, stride: int, window: int, dilation: int, padding: int) -> int:
    places = {out * stride + tap * dilation - padding for out in range(outputs) for tap in range(window)}
    return len(places & set(range(size)))


def kind(shape: abi.Shape) -> str:
    """One of ``layer_report.KINDS``."""
    s = shape
    window, stride = (s.r, s.s), (s.stride_h, s.stride_w)
    if s.groups > 1:
        return "grouped"
    if window == (1, 1):
        return "fc" if (s.h, s.w) == (1, 1) else "1x1"
    if s.c <= 4:
        return "stem"
    if window == (3, 3) and stride in ((1, 1), (2, 2)):
        return "3x3" if stride == (1, 1) else "3x3/2"
    return "other"


def module(shape: abi.Shape, seed: int) -> nn.Sequential:
    """The layer with random weights, as a block that ``accelerate`` fuses; its batch norm does no more than a bias."""
    s = shape
    torch.manual_seed(seed)
    geometry: Any = ((s.r, s.s), (s.stride_h, s.stride_w), (s.pad_h, s.pad_w), (s.dilation_h, s.dilation_w), s.groups)
    norm = nn.BatchNorm2d(s.k, eps=0.0)
    nn.init.normal_(norm.bias)
    layers: list[nn.Module] = [nn.Conv2d(s.c, s.k, *geometry, bias=False), norm]
    if s.relu:
        layers.append(nn.ReLU())
    if s.pool:
        layers.append(nn.MaxPool2d(3, 2, 1))
    return nn.Sequential(*layers).eval()


def onnx_model(shape: abi.Shape, layer: nn.Sequential) -> onnx.ModelProto:
    """``layer`` as an exporter writes it, its batch norm folded; a fully connected layer is a ``Gemm``."""
    s = shape
    weight: Any = layer[0].weight
    bias: Any = layer[1].bias
    if kind(s) == "fc":
        weight = weight.flatten(1)
        nodes = [
            helper.make_node("Flatten", ["input"], ["row"]),
            helper.make_node("Gemm", ["row", "weight", "bias"], ["conv"], transB=1),
        ]
    else:
        geometry = {
            "kernel_shape": [s.r, s.s],
            "strides": [s.stride_h, s.stride_w],
            "pads": [s.pad_h, s.pad_w, s.pad_h, s.pad_w],
            "dilations": [s.dilation_h, s.dilation_w],
            "group": s.groups,
        }
        nodes = [helper.make_node("Conv", ["input", "weight", "bias"], ["conv"], **geometry)]
    last = "conv"
    if s.relu:
        nodes.append(helper.make_node("Relu", [last], ["relu"]))
        last = "relu"
    if s.pool:
        window: dict[str, Any] = {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}
        nodes.append(helper.make_node("MaxPool", [last], ["pool"], **window))
        last = "pool"
    tensors = [("weight", weight), ("bias", bias)]
    initializers = [numpy_helper.from_array(tensor.detach().numpy(), name) for name, tensor in tensors]
    if kind(s) == "fc":
        initializers.append(numpy_helper.from_array(np.array([s.n, s.k, 1, 1]), "image"))
        nodes.append(helper.make_node("Reshape", [last, "image"], ["output"]))
    else:
        nodes[-1].output[0] = "output"
    p, q = native.output_size(s)
    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info("input", onnx.TensorProto.FLOAT, [s.n, s.c, s.h, s.w])],
        [helper.make_tensor_value_info("output", onnx.TensorProto.FLOAT, [s.n, s.k, p, q])],
        initializers,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR)


# --- measuring --------------------------------------------------------------------------------------------------------


def in_network(name: str, images: torch.Tensor, seed: int, seconds: float) -> list[Layer]:
    """The convolutions of the model ``name`` by shape, in the order of the network, timed in it for ``seconds``.

    Raises:
        ValueError: it does not run as one native program.
    """
    stock = build(name, seed=seed)
    randomise_batch_norm(stock, seed)
    model = accelerate(stock)
    images = images.contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        model(images)
        plan = last_plan(model)
        if not isinstance(plan, Plan):
            raise ValueError(f"--model {name}: it does not run as one native program: {plan or 'nothing is fused'}")
        with library.recorded() as once:
            model(images)
        with library.recorded() as timings:
            timed_round(lambda: model(images), seconds)
    counts, calls = _by_layer(once), _by_layer(timings)
    return [
        Layer(same[0].shape, same[0].algorithm, len(counts[key]), statistics.median(call.seconds for call in same))
        for key, same in calls.items()
    ]


def _by_layer(timings: Iterable[library.Timing]) -> dict[tuple[bytes, str], list[library.Timing]]:
    result: dict[tuple[bytes, str], list[library.Timing]] = {}
    for timing in timings:
        if timing.kind == abi.CONV:
            result.setdefault((bytes(timing.shape), timing.algorithm), []).append(timing)
    return result


def alone(
    bench: Bench, shape: abi.Shape, *, rounds: int, seconds: float, seed: int, progress: Callable[[str], None]
) -> list[Measurement]:
    """The layer under each provider of ``bench``."""
    with tempfile.TemporaryDirectory(prefix="resnet-fast-layers-") as name:
        folder, layer = Path(name), module(shape, seed)
        prepare(folder, layer, torch.randn(shape.n, shape.c, shape.h, shape.w), onnx=False)
        onnx.save(onnx_model(shape, layer), folder / ONNX)
        return bench.measure(folder, rounds=rounds, seconds=seconds, progress=progress)


def peak(threads: int) -> float:
    """Floating-point operations per second: the best of 5, for anything else that runs only lowers it."""
    return max(library.peak(threads) for _ in range(5))


def bandwidth() -> float:
    """Bytes per second from memory on torch's threads: ``BANDWIDTH_METHOD``."""
    data = torch.ones(BANDWIDTH_BYTES // 4)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        data.sum()
        seconds.append(time.perf_counter() - start)
    return BANDWIDTH_BYTES / min(seconds)


def measure(arguments: argparse.Namespace, progress: Callable[[str], None]) -> dict[str, Any]:
    """Measure all layers; return what the JSON holds.

    Raises:
        ValueError: a model cannot be measured; the message names the argument.
    """
    turns = {"rounds": arguments.rounds, "seconds": arguments.seconds, "seed": arguments.seed}
    before = load()
    torch.set_num_threads(arguments.threads)
    machine = {
        "machine": describe(),
        "isa": library.variant(),
        "threads": arguments.threads,
        "peak_gflops": peak(arguments.threads) / 1e9,
        "bandwidth_gb_s": bandwidth() / 1e9,
        "bandwidth_method": BANDWIDTH_METHOD,
    }
    workloads = []
    with Bench((OURS, PEER), arguments.threads) as bench:
        for name in arguments.model or ["resnet18", "resnet50"]:
            for batch in arguments.batch or [1]:
                title = f"{name}, batch {batch}"
                progress(title)
                images = torch.randn(batch, 3, arguments.size, arguments.size)
                layers = in_network(name, images, arguments.seed, arguments.rounds * arguments.seconds)
                entries = []
                for number, layer in enumerate(layers, 1):
                    at = f"{title}, layer {number} of {len(layers)}"
                    results = alone(bench, layer.shape, **turns, progress=lambda text, at=at: progress(f"{at}: {text}"))
                    entries.append(as_dict(layer, results, machine["peak_gflops"]))
                setting = {"model": name, "batch": batch, "size": arguments.size, "dtype": "float32"}
                workloads.append({**setting, "threads": arguments.threads, "layers": _with_shares(entries)})
    return {**machine, **turns, "load_before": before, "load_after": load(), "notes": NOTES, "workloads": workloads}


def as_dict(layer: Layer, results: Sequence[Measurement], peak_gflops: float) -> dict[str, Any]:
    """A layer for JSON; ``ratio`` is how many times ours ONNX Runtime's time is, both alone."""
    s, ours = layer.shape, results[0]
    peer = results[1].as_dict(ours)
    gflops = flops(s) / layer.seconds / 1e9
    return {
        "kind": kind(s),
        "input": [s.n, s.h, s.w, s.c],
        "output": [s.n, *native.output_size(s), s.k],
        "window": [s.r, s.s],
        "stride": [s.stride_h, s.stride_w],
        "padding": [s.pad_h, s.pad_w],
        "dilation": [s.dilation_h, s.dilation_w],
        "groups": s.groups,
        "relu": bool(s.relu),
        "pool": bool(s.pool),
        "algorithm": layer.algorithm,
        "count": layer.count,
        "flops": flops(s),
        "bytes": moved_bytes(s),
        "intensity": flops(s) / moved_bytes(s),
        "network_ms": layer.seconds * 1e3,
        "gflops": gflops,
        "of_peak": gflops / peak_gflops,
        "alone_ms": ours.median_ms,
        "onnxruntime_ms": peer["median_ms"],
        "ratio": peer["ratio"],
        "providers": [ours.as_dict(ours), peer],
    }


def _with_shares(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The layers with their part of the time of all convolutions."""
    total = sum(entry["count"] * entry["network_ms"] for entry in entries)
    return [{**entry, "share": entry["count"] * entry["network_ms"] / total} for entry in entries]


# --- the command ------------------------------------------------------------------------------------------------------


def main(arguments: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", action="append", help="a torchvision model; repeatable; resnet18 and resnet50")
    parser.add_argument("--batch", action="append", type=_positive, help="images a call; repeatable; 1")
    parser.add_argument("--size", type=_positive, default=224, help="height and width of the images; 224")
    parser.add_argument("--threads", type=_positive, default=available_cores(), help="one per available core")
    parser.add_argument("--rounds", type=_positive, default=5, help="turns of each provider on each layer; 5")
    parser.add_argument("--seconds", type=_seconds, default=0.15, help="length of a turn; 0.15")
    parser.add_argument("--seed", type=int, default=0, help="of weights and images; 0")
    for name in ("json", "markdown", "svg"):
        parser.add_argument(f"--{name}", type=_file, metavar="FILE", help="to write")
    given = parser.parse_args(arguments)
    reason = library.unavailable()
    if reason is not None:
        parser.exit(1, f"{reason}\n")
    out = console()
    try:
        with out.status("peak") as status:
            result = measure(given, status.update)
    except UnknownNameError as error:
        parser.error(f"--model: {error}")
    except ValueError as error:
        parser.error(str(error))
    write_json(result, given.json)
    if given.markdown:
        with replacing(given.markdown) as temporary:
            temporary.write_text(markdown(result), encoding="utf-8")
    if given.svg:
        save_figure(draw(result), Path(given.svg))
    for workload in result["workloads"]:
        out.print(table(title(workload), COLUMN_NAMES, rows(workload), list(NUMBERS)))
    for line in (*conditions(result), *NOTES):
        out.print(line, markup=False)
    for line in problems(result):
        out.print(line, markup=False, style="yellow")
    statuses = [e["status"] for w in result["workloads"] for layer in w["layers"] for e in layer["providers"]]
    return 1 if {"failed", "inaccurate"} & set(statuses) else 0


def _positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a whole number of at least 1")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a number of at least 0")
    return value


def _file(text: str) -> str:
    if not Path(text).parent.is_dir():  # rather now than after minutes of measuring
        raise argparse.ArgumentTypeError(f"{text!r}, whose folder does not exist")
    return text


if __name__ == "__main__":
    sys.exit(main())
