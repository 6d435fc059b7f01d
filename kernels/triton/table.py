"""Every op that has Triton kernels, one row each: the module itself is the implementation that ``ops`` calls.

An op's function, as ``table.gram``, takes the arguments of its definition. It imports the row's file and runs the plan
``plan_gram(*arguments, target=architecture)``. An op that is more than a plan has a function of its own name there,
which is given the same. Calls with an empty tensor go to the definition.

Importing this module imports neither Triton nor a kernel.
"""

import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple, Optional

import torch

from resnet_fast.kernels.contract import Case
from resnet_fast.kernels.reference import inference, quantised, training
from resnet_fast.kernels.triton import device, pack, tiles

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

EIGHT_BIT_CHANNELS = 16
"""Bytes of the widest load, so 8-bit channels: of what every pixel must have a multiple."""


def chain_pays(case: Case, rows: int) -> bool:
    """Whether a ``conv_chain`` of so many pixels, which is covered, should run as one kernel rather than as two.

    A rule, not a measurement: there must be a program for every multiprocessor. Two kernels cut their columns too.
    """
    tile = _chain_tile(case)
    return tile is not None and -(-rows // tile.rows) >= tiles.load(_target(case))["multiprocessors"]


def _chain(case: Case) -> Optional[str]:
    if _chain_tile(case) is not None:
        return None
    return f"a chain from {case.in_channels} to {case.out_channels} channels in {case.dtype} does not fit a program"


def _chain_tile(case: Case) -> Optional[tiles.ChainTile]:
    target = _target(case)
    return tiles.pick_chain(target, device.precision_of(case.dtype, target), case.in_channels, case.out_channels)


def _target(case: Case) -> str:
    index = () if case.gpu is None else (case.gpu,)
    return device.architecture(torch.device(case.device, *index))


def _stem(case: Case) -> Optional[str]:
    if case.in_channels <= pack.STEM_CHANNELS:
        return None
    return f"a stem of {case.in_channels} input channels; up to {pack.STEM_CHANNELS} are covered"


def _eight_bits(case: Case) -> Optional[str]:
    return device.no_fp8(_target(case)) if case.dtype == torch.float8_e4m3fn else None


def _conv_quantised(case: Case) -> Optional[str]:
    channels = case.in_channels // case.groups
    if channels * pack.merged(case.groups, channels) % EIGHT_BIT_CHANNELS == 0:
        return _eight_bits(case)
    groups = f" in {case.groups} groups" if case.groups > 1 else ""
    return f"{case.in_channels} input channels{groups}; multiples of {EIGHT_BIT_CHANNELS} are covered"


class Row(NamedTuple):
    """An op: the module of its definition, and that of its kernel, in this folder where it begins with a dot.

    dtypes: of ``Case.dtype``, those that are covered. refusal: None if the kernel covers a case of one of them, else
    the reason why not.
    """

    definition: ModuleType
    file: str
    dtypes: tuple[torch.dtype, ...] = DTYPES
    refusal: Callable[[Case], Optional[str]] = lambda case: None


OPS = {
    "conv_bn_act": Row(inference, ".measured"),
    "conv_chain": Row(inference, ".chain", refusal=_chain),
    "stem": Row(inference, ".measured", refusal=_stem),
    "global_avg_pool": Row(inference, ".pool"),
    "head": Row(inference, ".classifier"),
    "conv_statistics": Row(training, ".forward"),
    "gram": Row(training, ".gram"),
    "conv_affine": Row(training, ".forward"),
    "expand_statistics": Row(training, ".expand"),
    "expand_backward": Row(training, ".expand"),
    "tail": Row(training, ".tail"),
    "tail_pool": Row(training, ".pool"),
    "tail_backward": Row(training, ".tail_backward"),
    "tail_pool_backward": Row(training, ".tail_backward"),
    "bn_backward": Row(training, ".tail_backward"),
    "dgrad": Row(training, ".dgrad"),
    "dgrad_expand": Row(training, ".dgrad"),
    "wgrad": Row(training, ".wgrad"),
    "conv_quantised": Row(quantised, ".conv_quantised", tuple(quantised.RANGE), _conv_quantised),
    "quantise": Row(quantised, ".quantise", tuple(quantised.RANGE), _eight_bits),
    "dequantise": Row(quantised, ".quantise", tuple(quantised.RANGE), _eight_bits),
}


def supports(case: Case) -> Optional[str]:
    """None if the kernels cover the case, else the reason why not. Asks a driver only about a case on a GPU."""
    row = OPS.get(case.op)
    if row is None:
        return f"no kernel for {case.op}"
    if reason := device.refusal(case.device, case.gpu):
        return reason
    return row.refusal(case) if case.dtype in row.dtypes else f"no {case.dtype}"


def __getattr__(op: str) -> Any:
    if op not in OPS:
        raise AttributeError(f"module {__name__!r} has no attribute {op!r}")
    return functools.partial(_run, op)


def _run(op: str, *arguments: Any, **options: Any) -> Any:
    row = OPS[op]
    if any(isinstance(one, torch.Tensor) and one.numel() == 0 for one in arguments):
        return getattr(row.definition, op)(*arguments, **options)
    file = _file(row.file)
    options["target"] = device.architecture(arguments[0].device)
    own = getattr(file, op, None)
    return getattr(file, f"plan_{op}")(*arguments, **options).run() if own is None else own(*arguments, **options)


@functools.cache
def _file(name: str) -> ModuleType:
    return importlib.import_module(name, __package__)
