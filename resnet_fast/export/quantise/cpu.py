"""8 bits for ONNX Runtime's CPU kernels: onnxruntime.quantization's static quantiser, with our ranges.

It places its pairs where its own optimiser looks for them: around every operator that has an integer kernel, so that
whole blocks fuse to QLinearConv and QLinearAdd. What is chosen here, and differs from its defaults:

- unsigned activations. With a zero point of 0 after a ReLU they have twice the resolution of signed ones, and the
  optimiser fuses every layer; of its default, signed ones, it leaves each Conv before an Add, and the Add, in float32.
- the ranges, which are clipped where ``calibration_method`` says, not at the largest value that was ever seen.
- the logits are not rounded to 8 bits.
"""

import contextlib
import logging
import platform
import tempfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Optional

import numpy as np
import onnx
import onnx_ir as ir

from resnet_fast.utils.cpuinfo import first_processor
from resnet_fast.utils.optional import require

Range = tuple[float, float]

_X86 = ("x86_64", "amd64")


def needs_reduced_range() -> bool:
    """Return whether this machine's processor adds two products of 8 bits in 16, which overflow with weights beyond 7.

    x86 processors without VNNI do (their only instruction is VPMADDUBSW); what is not known to have it counts as
    without.
    """
    if platform.machine().lower() not in _X86:
        return False
    return not {"avx512_vnni", "avx_vnni", "amx_int8"} & set(first_processor().get("flags", "").split())


def quantise_for_cpu(
    model: ir.Model,
    ranges: Mapping[str, Range],
    reduce_range: bool,
    *,
    only: Optional[Collection[str]] = None,
    without: Collection[str] = (),
) -> ir.Model:
    """A copy of ``model`` in 8 bits.

    Args:
        model: as exported in float32.
        ranges: lowest and highest number that each value of the graph stands for in 8 bits, zero included.
        reduce_range: weights of 7 bits.
        only: names of nodes to quantise; None for all.
        without: names of nodes that stay in float32.

    Raises:
        MissingPackageError: ONNX Runtime is not installed.
    """
    quantization = require("onnxruntime.quantization", "int8")
    calibrate = require("onnxruntime.quantization.calibrate", "int8")
    method = quantization.CalibrationMethod.MinMax
    limits = {
        name: calibrate.TensorData(lowest=np.float32(low), highest=np.float32(high))
        for name, (low, high) in ranges.items()
    }
    with tempfile.TemporaryDirectory(prefix="resnet_fast-") as folder, _quiet():
        cache, result = Path(folder) / "ranges.json", Path(folder) / "model.onnx"
        calibrate.save_tensors_data(calibrate.TensorsData(method, limits), cache)
        quantization.quantize_static(
            ir.to_proto(model),
            result,
            calibration_cache_path=cache,
            calibrate_method=method,
            quant_format=quantization.QuantFormat.QDQ,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            per_channel=True,
            reduce_range=reduce_range,
            nodes_to_quantize=None if only is None else list(only),
            nodes_to_exclude=list(without),
            extra_options={"OpTypesToExcludeOutputQuantization": ["Gemm"]},
        )
        quantised = ir.from_proto(onnx.load(result))
    quantised.metadata_props.clear()
    quantised.metadata_props.update(model.metadata_props)
    quantised.producer_name, quantised.producer_version = model.producer_name, model.producer_version
    return quantised


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep back the quantiser's advice, on the root logger, to prepare a graph that is prepared already."""
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
