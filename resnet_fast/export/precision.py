"""The precisions of a file, and a PyTorch model in one of them: traced, batch norm folded in float64, rounded once."""

import contextlib
import copy
import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, fx, nn

from resnet_fast.export.constants import fold_affine, fold_constants
from resnet_fast.export.folding import fold_batch_norm
from resnet_fast.utils import compat
from resnet_fast.utils.errors import first_line

INT8 = "int8"
"""Around its convolutions such a file computes in float32."""

_aten = torch.ops.aten
_WITH_NUMBERS = {
    overload
    for packet in (_aten.add, _aten.sub, _aten.rsub, _aten.mul, _aten.div, _aten.pow, _aten.clamp, _aten.clamp_min)
    for name in packet.overloads()
    if (overload := getattr(packet, name))
}
"""Operators that take numbers beside a tensor, which ONNX has as tensors of the same type."""


@dataclass(frozen=True)
class Precision:
    """A number format in which a file keeps its weights and computes.

    ``lowest_opset``: 18 is what torch.onnx writes whenever less is asked for, with no more than a line in the log; 22
    is the first in which convolution and pooling admit bfloat16.
    """

    name: str
    dtype: torch.dtype
    onnx: ir.DataType
    lowest_opset: int

    @property
    def eps(self) -> float:
        """The distance from 1 to the next number; for int8, of a tensor's largest number to the next."""
        return 2.0**-7 if self.name == INT8 else torch.finfo(self.dtype).eps


PRECISIONS = {
    precision.name: precision
    for precision in (
        Precision("fp32", torch.float32, ir.DataType.FLOAT, 18),
        Precision("fp16", torch.float16, ir.DataType.FLOAT16, 18),
        Precision("bf16", torch.bfloat16, ir.DataType.BFLOAT16, 22),
        Precision(INT8, torch.float32, ir.DataType.FLOAT, 18),
    )
}

IO = ("fp32", "fp16")
"""What a file may take and give: no server has bfloat16 for its inputs."""


def precision_of(name: str) -> Precision:
    """The precision called ``name``; ValueError if there is none."""
    if name not in PRECISIONS:
        raise ValueError(f"precision is {name!r}, expected one of {', '.join(PRECISIONS)}")
    return PRECISIONS[name]


def folded(stock: nn.Module, input_size: Sequence[int], dynamic_batch: bool) -> fx.GraphModule:
    """The network of ``stock`` (float32, CPU, eval mode, not changed) in float64, with its batch norms folded.

    The batch size is open if ``dynamic_batch``, else 1.

    Raises:
        RuntimeError: PyTorch could not trace the model.
    """
    example = example_input(input_size, dynamic_batch)
    with quiet(), explained(stock):
        # What is traced shares its parameters with what was given.
        program = torch.export.export(copy.deepcopy(stock), (example,), dynamic_shapes=batch_shapes(dynamic_batch))
        traced = compat.unguarded(program)
    fold_constants(traced)
    fold_batch_norm(traced, torch.float64)
    fold_affine(traced)
    for module in traced.modules():
        module.training = False  # a traced module has no eval()
    return traced.double()


def rounded(network: fx.GraphModule, precision: Precision) -> fx.GraphModule:
    """A copy of ``network`` (float64) in ``precision``, which it then takes, computes in and gives.

    Raises:
        ValueError: a weight is beyond the largest number of ``precision``.
    """
    network = copy.deepcopy(network)
    largest = torch.finfo(precision.dtype).max
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        if not tensor.is_floating_point():
            continue
        result = nearest(tensor.detach(), precision.dtype)
        beyond = result.isinf() & tensor.isfinite()
        if beyond.any():
            raise ValueError(
                f"precision is {precision.name!r}, whose largest number is {largest:.6g}, but {name} reaches "
                f"{tensor.detach()[beyond].abs().max().item():.6g} with its batch norm folded; expected a precision "
                "with a wider range"
            )
        tensor.data = result
    for node in network.graph.nodes:
        if node.target in _WITH_NUMBERS:  # of the type of the tensor beside them in the file
            node.args = tuple(_rounded_number(one, precision.dtype) for one in node.args)
            node.kwargs = {name: _rounded_number(one, precision.dtype) for name, one in node.kwargs.items()}
    network.recompile()
    return network


def _rounded_number(value: Any, dtype: torch.dtype) -> Any:
    if not isinstance(value, float):
        return value
    result = nearest(torch.tensor(value, dtype=torch.float64), dtype).item()
    return result if math.isfinite(result) else value


def example_input(input_size: Sequence[int], dynamic_batch: bool) -> Tensor:
    """Zeros. torch.export takes a dimension of size 1 for a constant, whatever dynamic_shapes says."""
    return torch.zeros(2 if dynamic_batch else 1, *input_size)


def batch_shapes(dynamic_batch: bool) -> tuple | None:
    """``dynamic_shapes`` for torch.export and torch.onnx."""
    return ({0: torch.export.Dim("batch")},) if dynamic_batch else None


def nearest(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor`` rounded once to ``dtype``. PyTorch's own conversion of float64 goes by float32, and so rounds twice.

    The float32 between is rounded to odd: the neighbour whose last bit is 1 unless it is exact, after which rounding
    again gives what rounding once would have (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums:
    proved algorithms using rounding to odd", 2008).
    """
    if tensor.dtype != torch.float64 or dtype.itemsize > 2:
        return tensor.to(dtype)
    near = tensor.float()
    up = near.double().abs() > tensor.abs()
    truncated = torch.where(up, near.nextafter(torch.zeros_like(near)), near)
    odd = truncated.view(torch.int32) | (truncated.double() != tensor).int()
    return torch.where(near.isfinite(), odd.view(torch.float32), near).to(dtype)


@contextlib.contextmanager
def explained(stock: nn.Module) -> Iterator[None]:
    """Turn what PyTorch raises while it exports ``stock`` into a RuntimeError of one line."""
    try:
        yield
    except Exception as error:
        raise RuntimeError(f"PyTorch could not export {type(stock).__name__} to ONNX: {first_line(error)}") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the exporter silent: a failure is an exception, and what it converted to is checked afterwards."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
