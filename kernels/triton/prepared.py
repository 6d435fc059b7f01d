"""Calls of convolutions on a GPU, prepared once and then repeated.

Deciding a launch (layout, pack, tile, what was measured) and Triton's own way from arguments to a binary are Python,
which may take longer than the kernel. All that they decide follows from shapes, dtypes and flags, and from the weights.
So the first call keeps what it found, and later calls allocate the output and start the binary.

A prepared call holds packed weights, and is found only while these are up to date: by the very weight, scale and shift,
as long as their versions and addresses are the same and ``packing.clearings`` has not risen. What that cannot see is
what ``kernels/packing.py`` cannot see on a GPU. Importing this module does not import Triton.
"""

import os
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Optional

import torch

from resnet_fast.kernels import packing
from resnet_fast.kernels.triton import planner

Call = Callable[[torch.Tensor, Optional[torch.Tensor]], Optional[torch.Tensor]]
"""Takes x and the residual, gives the result, or None where the call has to be decided anew."""

_CALLS_KEPT = 64  # per weight: detectors see many sizes
_ALIGNMENT = 15  # Triton compiles for pointers that are multiples of 16; these bits of an address must be 0

# os.environ.get takes 1 to 3 microseconds for a name that is not there, a third of all that a call may take.
_environment: Any = getattr(os.environ, "_data", os.environ)
_IMPLEMENTATION: Any = os.environ.encodekey("RESNET_FAST_IMPLEMENTATION") if _environment is not os.environ else (
    "RESNET_FAST_IMPLEMENTATION"
)  # fmt: skip


class _Weights:
    """The calls of one weight, with one scale and shift, all as they were."""

    __slots__ = ("calls", "reference", "scale", "shift", "state")

    def __init__(
        self, weight: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, forget: Callable[[weakref.ref], None]
    ) -> None:
        self.reference = weakref.ref(weight, forget)
        self.scale, self.shift, self.state = scale, shift, _state(weight, scale, shift)
        self.calls: dict[Hashable, Call] = {}


_kept: dict[int, _Weights] = {}  # by the id of the weight, which removes its entry when it dies


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
    weights = _kept.get(id(weight))
    if weights is None or weights.scale is not scale or weights.shift is not shift:
        return None
    call = weights.calls.get(_key(x, residual, stride, padding, dilation, groups, relu))
    if call is None or weights.state != _state(weight, scale, shift):
        return None
    if packing.holders is not None:
        packing.holders.append(call)
    return call(x, residual)


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
    """Have ``run`` use ``call`` for these arguments from now on; None is not kept.

    Nor is anything for tensors made under ``torch.inference_mode``, which carry no version.
    """
    if call is None or weight.is_inference() or scale.is_inference() or shift.is_inference():
        return
    weights = _kept.get(id(weight))
    if (
        weights is None
        or weights.scale is not scale
        or weights.shift is not shift
        or weights.state != _state(weight, scale, shift)
        or len(weights.calls) >= _CALLS_KEPT
    ):
        weights = _kept[id(weight)] = _Weights(weight, scale, shift, _forgetting(id(weight)))
    weights.calls[_key(x, residual, stride, padding, dilation, groups, relu)] = call


def _forgetting(identity: int) -> Callable[[weakref.ref], None]:
    def forget(reference: weakref.ref) -> None:
        weights = _kept.get(identity)
        if weights is not None and weights.reference is reference:
            _kept.pop(identity, None)

    return forget


def _state(weight: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> tuple[int, ...]:
    """What changes when a pack made of these tensors is stale."""
    return (
        weight._version,
        weight.data_ptr(),
        scale._version,
        scale.data_ptr(),
        shift._version,
        shift.data_ptr(),
        packing.clearings,
    )


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
        _environment.get(_IMPLEMENTATION),
        torch.backends.cudnn.conv.fp32_precision if dtype is torch.float32 else None,
    )


def launch_of(plan: Any, compiled: Any, residual: Optional[torch.Tensor]) -> Optional[Call]:
    """``plan``, a ``launch.Plan`` that was launched as the binary ``compiled``, prepared for other images like its own.

    None where that is not known to be enough: in the interpreter, with tensor descriptors, which hold addresses, or a
    workspace, and for plans that do not say how their image is made (``Plan.image``).
    """
    import triton

    if plan.image is None or plan.workspace is not None or not isinstance(compiled, triton.compiler.CompiledKernel):
        return None
    kernel, names = plan.kernel, plan.kernel.arg_names
    given = dict(zip(names, plan.args)) | plan.constants
    simple = all(
        isinstance(kind, str) and not kind.startswith("tensordesc") for kind in compiled.src.signature.values()
    )
    if not simple or kernel.launch_metadata is not None or not all(name in given for name in names):
        return None
    arguments = [given[name] for name in names]
    # From 1 on: a block's residual is often the very image.
    residual_at = next((i for i, one in enumerate(arguments) if i and one is residual), None)
    if arguments[0].dtype != plan.output.dtype or (residual is not None and residual_at is None):
        return None
    if any(one.data_ptr() & _ALIGNMENT for one in arguments if isinstance(one, torch.Tensor)):
        return None
    return _launch(plan, compiled, arguments, residual_at)


def _launch(plan: Any, compiled: Any, arguments: list[Any], residual_at: Optional[int]) -> Call:
    """What ``JITFunction.run`` comes to. Where that would do more than start the binary (a hook is set, as profilers
    do; an image is not aligned as the kernel was compiled for), a call gives None.
    """
    import triton

    y_at = [i for i, one in enumerate(arguments) if one is plan.output]
    moving = {0, residual_at, *y_at}
    owners = [one for i, one in enumerate(arguments) if isinstance(one, torch.Tensor) and i not in moving]
    fixed = [one.data_ptr() if isinstance(one, torch.Tensor) else one for one in arguments]
    image_of, kernel, grid = plan.image, plan.kernel, (*plan.grid, 1, 1)[:3]
    shape, strides = tuple(plan.output.shape), plan.output.stride()
    start, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
    runtime, drivers = triton.knobs.runtime, triton.runtime.driver
    device = drivers.active.get_current_device() if not plan.output.is_cuda else plan.output.device.index
    at: Any = residual_at
    nhwc = torch.channels_last

    def call(x: torch.Tensor, residual: Optional[torch.Tensor]) -> Optional[torch.Tensor]:
        image = image_of(x)
        y = x.new_empty_strided(shape, strides)
        values = fixed.copy()
        values[0] = addresses = image.data_ptr()
        address = y.data_ptr()
        addresses |= address
        for i in y_at:
            values[i] = address
        if residual is not None:
            residual = residual.contiguous(memory_format=nhwc)
            values[at] = address = residual.data_ptr()
            addresses |= address
        enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
        if (
            addresses & _ALIGNMENT
            or (enter is not None and getattr(enter, "calls", True))
            or (leave is not None and getattr(leave, "calls", True))
            or kernel.pre_run_hooks
        ):
            return None
        driver = drivers.active
        if driver.get_current_device() == device:
            start(*grid, driver.get_current_stream(device), function, metadata, None, None, None, *values)
        else:  # Triton launches on the current device, which need not be the tensors'
            with torch.cuda.device(device):
                start(*grid, driver.get_current_stream(device), function, metadata, None, None, None, *values)
        return y

    call.owners = owners, compiled  # type: ignore[attr-defined]  # of the addresses, and of the function
    return call
