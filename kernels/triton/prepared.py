"""Calls of convolutions on a GPU, prepared once and then repeated.

Deciding a launch (layout, pack, tile, what was measured) and Triton's own way from arguments to a binary are Python, and
take longer than a small convolution. All that they decide follows from shapes, dtypes and flags, and from the weights.
So the first call keeps what it found, and later calls allocate the output and start the binary.

A prepared call holds packed weights. It is kept as they are (``kernels/packing.py``): it goes when the weight, scale or
shift changes or dies, when an optimiser steps, and with ``packing.clear_all``. Importing this module does not import
Triton.
"""

import os
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any, Optional

import torch

from resnet_fast.kernels.packing import PackCache
from resnet_fast.kernels.triton import planner

if TYPE_CHECKING:
    from resnet_fast.kernels.triton.launch import Plan

Call = Callable[[torch.Tensor, Optional[torch.Tensor]], Optional[torch.Tensor]]
"""Takes x and the residual, gives the result, or None where the call has to be decided anew."""

_CALLS_KEPT = 64  # per weight: detectors see many sizes
_ALIGNMENT = 15  # Triton compiles for pointers that are multiples of 16; these bits of an address must be 0

_kept = PackCache()


def run(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    residual: Optional[torch.Tensor],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    relu: bool,
) -> Optional[torch.Tensor]:
    """``reference.conv_bn_act`` by a call that was prepared, or None: there is none, or it does not fit these tensors.

    What a prepared call is found by has passed all checks of ``ops.py`` when it was kept.
    """
    calls = _kept.get((weight, scale, shift), None, dict)
    if not calls:
        return None
    call = calls.get(_key(x, residual, stride, padding, dilation, groups, relu))
    return None if call is None else call(x, residual)


def keep(
    call: Optional[Call],
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    residual: Optional[torch.Tensor],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    relu: bool,
) -> None:
    """Have ``run`` use ``call`` for these arguments from now on; None is not kept."""
    if call is None:
        return
    calls = _kept.get((weight, scale, shift), None, dict)
    if len(calls) >= _CALLS_KEPT:
        calls.clear()
    calls[_key(x, residual, stride, padding, dilation, groups, relu)] = call


def _key(
    x: torch.Tensor,
    residual: Optional[torch.Tensor],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    relu: bool,
) -> Hashable:
    """All that a call depends on beside the weights; layout and alignment of the images are looked at in the call."""
    dtype = x.dtype
    return (
        x.shape,
        dtype,
        x.device,
        None if residual is None else (residual.shape, residual.dtype, residual.device),
        *stride,
        *padding,
        *dilation,
        groups,
        relu,
        planner.version,
        os.environ.get("RESNET_FAST_IMPLEMENTATION"),
        torch.backends.cudnn.conv.fp32_precision if dtype is torch.float32 else None,
    )


class Launch:
    """A compiled kernel with all its arguments but the images': what ``JITFunction.run`` comes to.

    Where that would do more than start the binary (a hook is set, as profilers do; an image is not aligned as the
    kernel was compiled for), a call gives None.
    """

    __slots__ = (
        "_arguments", "_compiled", "_device", "_driver", "_function", "_grid", "_image", "_kernel",
        "_metadata", "_owners", "_residual_at", "_run", "_runtime", "_shape", "_strides", "_y_at",
    )  # fmt: skip

    def __init__(
        self, plan: "Plan", compiled: Any, arguments: list[Any], residual: Optional[torch.Tensor], triton: Any
    ) -> None:
        self._image = plan.image
        # From 1 on: the residual of a block is often the very image.
        self._residual_at = next((i for i, one in enumerate(arguments) if i and one is residual), 0)
        self._y_at = [i for i, one in enumerate(arguments) if one is plan.output]
        fixed = [one for one in arguments[1:] if isinstance(one, torch.Tensor)]
        self._owners = [one for one in fixed if one is not residual and one is not plan.output]  # of these addresses
        self._arguments = [one.data_ptr() if isinstance(one, torch.Tensor) else one for one in arguments]
        self._shape, self._strides = plan.output.shape, plan.output.stride()
        self._grid = (*plan.grid, 1, 1)[:3]
        self._kernel, self._compiled = plan.kernel, compiled
        self._run, self._function, self._metadata = compiled.run, compiled.function, compiled.packed_metadata
        self._runtime, self._driver = triton.knobs.runtime, triton.runtime.driver
        self._device = self._driver.active.get_current_device()

    def __call__(self, x: torch.Tensor, residual: Optional[torch.Tensor]) -> Optional[torch.Tensor]:
        image = self._image(x)
        y = x.new_empty_strided(self._shape, self._strides)
        arguments = self._arguments.copy()
        arguments[0] = addresses = image.data_ptr()
        address = y.data_ptr()
        addresses |= address
        for i in self._y_at:
            arguments[i] = address
        if residual is not None:
            residual = residual.contiguous(memory_format=torch.channels_last)
            arguments[self._residual_at] = address = residual.data_ptr()
            addresses |= address
        runtime = self._runtime
        if (
            addresses & _ALIGNMENT
            or _set(runtime.launch_enter_hook)
            or _set(runtime.launch_exit_hook)
            or self._kernel.pre_run_hooks
        ):
            return None
        driver, device = self._driver.active, self._device
        if driver.get_current_device() == device:
            self._start(driver.get_current_stream(device), arguments)
        else:  # Triton launches on the current device, which need not be the tensors'
            with torch.cuda.device(device):
                self._start(driver.get_current_stream(device), arguments)
        return y

    def _start(self, stream: int, arguments: list[Any]) -> None:
        self._run(*self._grid, stream, self._function, self._metadata, None, None, None, *arguments)


def _set(hook: Any) -> bool:
    """Whether calling a launch hook, by default an empty chain, does anything."""
    return hook is not None and bool(getattr(hook, "calls", True))


def launch_of(plan: "Plan", compiled: Any, residual: Optional[torch.Tensor]) -> Optional[Launch]:
    """``plan``, which was launched and came to the binary ``compiled``, prepared for other images of the same shapes.

    None where that is not known to be enough: in the interpreter, with tensor descriptors, which hold addresses, or a
    workspace, and for plans that do not say how their image is made (``Plan.image``).
    """
    import triton

    if plan.image is None or plan.workspace is not None or not isinstance(compiled, triton.compiler.CompiledKernel):
        return None
    kernel = plan.kernel
    given = dict(zip(kernel.arg_names, plan.args)) | plan.constants
    simple = all(isinstance(kind, str) and not kind.startswith("tensordesc") for kind in compiled.src.signature.values())
    if not simple or kernel.launch_metadata is not None or not all(name in given for name in kernel.arg_names):
        return None
    arguments = [given[name] for name in kernel.arg_names]
    if arguments[0].dtype != plan.output.dtype or (residual is not None and all(one is not residual for one in arguments[1:])):
        return None
    tensors = [one.data_ptr() for one in arguments if isinstance(one, torch.Tensor)]
    if any(address & _ALIGNMENT for address in tensors):
        return None
    return Launch(plan, compiled, arguments, residual, triton)
