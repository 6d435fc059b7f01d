"""Where releases of PyTorch (from 2.8 on) and of Triton (from 3.4 on) differ.

Everything here asks whether a feature is there, never for the number of a release. Importing it does not import Triton.
"""

import contextlib
import ctypes
import functools
import inspect
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

# --- PyTorch ----------------------------------------------------------------------------------------------------------

_backends: Any = torch.backends
# What float32 goes through on a GPU: from 2.9 on a setting for each kind of operation, before that a switch.
if hasattr(torch._C, "_get_fp32_precision_getter"):
    _CONVOLUTIONS = (_backends.cudnn.conv, "fp32_precision")
    _PRODUCTS = (_backends.cuda.matmul, "fp32_precision")
    _TF32, _IEEE = "tf32", "ieee"
else:
    _CONVOLUTIONS = (_backends.cudnn, "allow_tf32")
    _PRODUCTS = (_backends.cuda.matmul, "allow_tf32")
    _TF32, _IEEE = True, False  # type: ignore[assignment]


def convolutions_in_tf32() -> bool:
    """Whether PyTorch's float32 convolutions go through TF32 on NVIDIA GPUs."""
    return getattr(*_CONVOLUTIONS) == _TF32


def products_in_tf32() -> bool:
    """Whether PyTorch's float32 matrix products go through TF32 on NVIDIA GPUs."""
    return getattr(*_PRODUCTS) == _TF32


@contextlib.contextmanager
def float32_in_tf32(wanted: bool) -> Iterator[None]:
    """Have float32 convolutions and matrix products go through TF32 on NVIDIA GPUs, or not."""
    before = [getattr(*place) for place in (_CONVOLUTIONS, _PRODUCTS)]
    for place in (_CONVOLUTIONS, _PRODUCTS):
        setattr(*place, _TF32 if wanted else _IEEE)
    try:
        yield
    finally:
        for place, value in zip((_CONVOLUTIONS, _PRODUCTS), before):
            setattr(*place, value)


AUTOCAST_DEVICES = frozenset(filter(torch.amp.is_autocast_available, ("cpu", "cuda", "mps", "xpu", "hpu", "mtia")))
"""Types of devices that have autocast: asked here, for ``torch.compile`` of 2.8 cannot follow the question."""


def unguarded(program: torch.export.ExportedProgram) -> fx.GraphModule:
    """The module of an exported program, which from 2.9 on would otherwise check in every call what was traced."""
    options = {"check_guards": False} if "check_guards" in inspect.signature(program.module).parameters else {}
    return program.module(**options)


@functools.cache
def cuda_driver() -> int:
    """The version of CUDA that the driver has, 13000 for 13.0; PyTorch does not tell."""
    version = ctypes.c_int()
    driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    driver.cuDriverGetVersion(ctypes.byref(version))
    return version.value


@functools.cache
def has_fused_onednn() -> bool:
    """Whether this PyTorch has the operators that Inductor calls oneDNN through, which nobody promises to keep."""
    try:
        _onednn_sum(1, 8, 2, 2)
    except (AttributeError, RuntimeError, TypeError):  # not there, not built in, or with other arguments
        return False
    return True


@functools.cache
def onednn_adds_flat() -> bool:
    """Whether that operator adds a residual of one channel or one pixel: not up to 2.11."""
    try:
        _onednn_sum(1, 1, 1, 2)
    except RuntimeError:
        return False
    return True


def _onednn_sum(n: int, k: int, h: int, w: int) -> None:
    """Call the operator for a convolution of one channel that gives ``[n, k, h, w]``, with a residual.

    In float32 on the CPU, whatever the process makes new tensors of when it first asks.
    """
    zeros = functools.partial(torch.zeros, dtype=torch.float32, device="cpu")
    x, weight, ones = zeros(n, 1, h, w), zeros(k, 1, 1, 1), (1, 1)
    residual = zeros(n, k, h, w).contiguous(memory_format=torch.channels_last)
    reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight
    pack = reorder(weight.to_mkldnn(), (0, 0), ones, ones, 1, x.shape)
    convolution = torch.ops.mkldnn._convolution_pointwise.binary
    convolution(x, residual, pack, None, (0, 0), ones, ones, 1, "add", None, None, [], None)


# --- Triton -----------------------------------------------------------------------------------------------------------


@functools.cache
def has_descriptors() -> bool:
    """Whether kernels may read through tensor descriptors.

    Up to 3.5 a launcher knows one by its class, not by the kernel's signature, and pipelines through descriptors take
    more shared memory than a multiprocessor has.
    """
    from triton.backends.nvidia import driver

    return "signature" in inspect.signature(driver.wrap_handle_tensordesc).parameters


@functools.cache
def descriptors_round() -> bool:
    """Whether copies through tensor descriptors round float32 to TF32.

    A Triton that has no word for it, up to 3.6, also fails to compile our programs with specialised warps.
    """
    from triton.tools.tensor_descriptor import TensorDescriptor

    return "round_f32_to_tf32" in TensorDescriptor.__dataclass_fields__
