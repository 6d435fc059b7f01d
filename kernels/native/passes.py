"""The passes of training over whole images that are no convolutions, for float32 on the CPU.

``reference_training`` defines each of them. ``activate``, ``statistics`` and ``gate`` are there for the convolutions.
Images are read in ``torch.channels_last`` (others are copied), and a fixed order of summation makes results the same
bits at every call and for every number of threads.
"""

from collections.abc import Mapping, Sequence
from ctypes import c_void_p
from typing import Optional

import torch
from torch import Tensor

from resnet_fast.kernels.contract import Affine, Case, Gate, Gradient, nhwc
from resnet_fast.kernels.native import abi, library
from resnet_fast.kernels.native.abi import Pass

LARGEST = 2**28
"""Sides and channels beyond it are refused: they go to the kernels as 32-bit numbers."""


def refusal(case: Case) -> Optional[str]:
    """None if the passes cover the case, else the reason why not."""
    if case.device != "cpu":
        return f"runs on cpu, not on {case.device}"
    if case.dtype != torch.float32:
        return f"no {case.dtype}"
    if case.in_channels > LARGEST:
        return f"no channels beyond {LARGEST}"
    return library.unavailable()


# --- forward ----------------------------------------------------------------------------------------------------------


def activate(x: Tensor, affine: Optional[Affine]) -> Tensor:
    """See ``reference_training.activate``."""
    return x if affine is None else tail(x, affine, None, None, True)


def statistics(y: Tensor) -> tuple[Tensor, Tensor]:
    """``mean [C]`` and ``variance [C]`` (biased) of the channels of ``y [N, C, H, W]``."""
    y = nhwc(y)
    mean, variance = _sums(y, 2)
    _run(abi.STATISTICS, y, {"x": y}, [mean, variance])
    return mean, variance


def tail(
    y: Tensor, affine: Affine, residual: Optional[Tensor], residual_affine: Optional[Affine], relu: bool
) -> Tensor:
    """See ``reference_training.tail``."""
    y, residual = nhwc(y), nhwc(residual)
    result = _image(*y.shape)
    scale, shift = affine
    own_scale, own_shift = residual_affine or (None, None)
    vectors = {"scale": scale, "shift": shift, "residual_scale": own_scale, "residual_shift": own_shift}
    _run(abi.TAIL, y, {"x": y, "residual": residual, "result": result, **vectors}, relu=relu)
    return result


def tail_pool(y: Tensor, affine: Affine) -> Tensor:
    """See ``reference_training.tail_pool``."""
    y = nhwc(y)
    n, c, h, w = y.shape
    result = _image(n, c, (h - 1) // 2 + 1, (w - 1) // 2 + 1)
    _run(abi.TAIL_POOL, y, {"x": y, "result": result, "scale": affine.scale, "shift": affine.shift})
    return result


# --- backward ---------------------------------------------------------------------------------------------------------


def gate(dx: Tensor, x: Tensor, gate: Optional[Gate], residual: Optional[Tensor]) -> Gradient:
    """``dx + residual`` through ``gate``, whose input is ``x``; in place over ``dx``.

    What the definition does behind a convolution's gradient ``dx``. Without a gate neither ``total`` nor ``product`` is
    computed; with one whose mean is None, only ``total``.
    """
    dx, x, residual = nhwc(dx), nhwc(x), nhwc(residual)
    operands = {"x": dx, "residual": residual, "result": dx}
    if gate is None:
        if residual is not None:
            _run(abi.GATE, dx, operands)
        return Gradient(dx)
    scale, shift = gate.affine or (None, None)
    sums = _sums(dx, 1 if gate.mean is None else 2)
    operands |= {"gate": x, "scale": scale, "shift": shift, "y": x, "mean": gate.mean}
    _run(abi.GATE, dx, operands, sums)
    return Gradient(dx, *sums)


def tail_backward(
    grad: Tensor,
    out: Optional[Tensor],
    y: Optional[Tensor],
    mean: Optional[Tensor],
    residual: Optional[Tensor],
    residual_mean: Optional[Tensor],
) -> tuple[Gradient, Optional[Tensor]]:
    """See ``reference_training.tail_backward``. Without ``out``, ``g`` is ``grad`` itself."""
    grad = nhwc(grad)
    result = grad if out is None else _image(*grad.shape)
    # Products are with y and then the residual; where only the residual has one, it takes the first place.
    factors = [(nhwc(raw), of) for raw, of in ((y, mean), (residual, residual_mean)) if raw is not None]
    (first, first_mean), (second, second_mean) = (*factors, (None, None), (None, None))[:2]
    total, *products = sums = _sums(grad, 1 + len(factors))
    operands = {"x": grad, "y": first, "mean": first_mean, "residual_y": second, "residual_mean": second_mean}
    if out is not None:
        operands |= {"gate": nhwc(out), "result": result}
    _run(abi.GATE, grad, operands, sums)
    product = None if y is None else products.pop(0)
    return Gradient(result, total, product), None if residual is None else products.pop(0)


def tail_pool_backward(grad: Tensor, y: Tensor, affine: Affine, mean: Optional[Tensor]) -> Gradient:
    """See ``reference_training.tail_pool_backward``. Where the maximum is is found again, not stored."""
    grad, y = nhwc(grad), nhwc(y)
    g = _image(*y.shape)
    sums = _sums(y, 1 if mean is None else 2)
    operands = {"x": grad, "y": y, "result": g, "scale": affine.scale, "shift": affine.shift, "mean": mean}
    _run(abi.TAIL_POOL_BACKWARD, y, operands, sums)
    return Gradient(g, *sums)


def bn_gradient(g: Tensor, y: Tensor, mean: Tensor, a: Tensor, b: Tensor, c: Tensor, overwrite: bool) -> Tensor:
    """See ``reference_training.bn_gradient``; with ``overwrite``, it is written over ``g``."""
    g, y = nhwc(g), nhwc(y)
    result = g if overwrite else _image(*g.shape)
    _run(abi.BN_BACKWARD, g, {"x": g, "y": y, "result": result, "mean": mean, "scale": a, "slope": b, "shift": c})
    return result


# --- shared -----------------------------------------------------------------------------------------------------------


def _image(*size: int) -> Tensor:
    return torch.empty(size, dtype=torch.float32, device="cpu", memory_format=torch.channels_last)


def _sums(image: Tensor, count: int) -> list[Tensor]:
    return [torch.empty(image.shape[1], dtype=torch.float32, device="cpu") for _ in range(count)]


def _run(
    kind: int, image: Tensor, operands: Mapping[str, Optional[Tensor]], sums: Sequence[Tensor] = (), relu: bool = False
) -> None:
    """``image`` gives the sizes; operands by their names in ``rf_pass``. Vectors must be float32 and contiguous."""
    n, c, h, w = image.shape
    abi.check_sizes(n, c, h, w)
    pointers = {name: operand.data_ptr() for name, operand in operands.items() if operand is not None}
    where = (c_void_p * abi.MOST_SUMS)(*(tensor.data_ptr() for tensor in sums))
    library.run_pass(Pass(kind, n, h, w, c, relu, sums=where, **pointers), torch.get_num_threads())
