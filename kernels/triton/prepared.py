"""Calls of convolutions on a GPU, prepared once and then repeated.

Deciding a launch (layout, pack, tile, what was measured) and Triton's own way from arguments to a binary are Python,
which may take longer than the kernel. All that they decide follows from shapes, dtypes and flags, and from the weights.
So the first call keeps what it found, and later calls allocate the output and start the binary.

A prepared call holds packed weights, and is found only while these are up to date: by the very weight, scale and shift,
as long as their versions and addresses are the same and ``packing.clearings`` has not risen. What that cannot see is
what ``kernels/packing.py`` cannot see on a GPU. Importing this module does not import Triton.

What it holds was made on the stream of the first call, and is ordered before calls on others as a pack is: streams.py.
"""

import os
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Optional

import torch

from resnet_fast.kernels import packing, streams
from resnet_fast.kernels.triton import planner

Call = Callable[[torch.Tensor, Optional[torch.Tensor]], Optional[torch.Tensor]]
"""Takes x and the residual, gives the result, or None where the call has to be decided anew. Its attribute ``owners``
holds the tensors of the weights that it reads, in tuples or lists, among other things."""

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
        self.calls: dict[Hashable, tuple[Call, streams.Made]] = {}


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
    found = weights.calls.get(_key(x, residual, stride, padding, dilation, groups, relu))
    if found is None or weights.state != _state(weight, scale, shift):
        return None
    call, made = found
    made.order()
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
    """Have ``run`` use ``call``, which was just carried out, for these arguments from now on; None is not kept.

    Nor is anything for tensors made under ``torch.inference_mode``, which carry no version, nor what a stream makes
    while it is captured.
    """
    if call is None or weight.is_inference() or scale.is_inference() or shift.is_inference():
        return
    index = x.device.index
    if streams.capturing(index):
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
    made = streams.Made(index, call.owners)  # type: ignore[attr-defined]
    weights.calls[_key(x, residual, stride, padding, dilation, groups, relu)] = call, made


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


def launches_of(plans: Sequence[Any], compiled: Sequence[Any], residual: Optional[torch.Tensor]) -> Optional[Call]:
    """``plans``, of the kind ``launch.Plan``, prepared for other images of the same shapes.

    They were launched in this order as the binaries ``compiled``, and the last one's output is the result. A workspace
    is allocated in every call, as the output is.

    None where that is not known to be enough: in the interpreter, with tensor descriptors, which hold addresses, and
    for plans that do not say how their image is made (``Plan.image``).
    """
    import triton

    image_of, y = plans[0].image, plans[-1].output
    if image_of is None or not all(isinstance(one, triton.compiler.CompiledKernel) for one in compiled):
        return None
    workspaces = [plan.workspace for plan in plans if plan.workspace is not None]
    images = [plans[0].args[0], y, residual, *workspaces]
    if images[0].dtype != y.dtype:
        return None
    starts, owners, seen = [], [], set()
    for plan, binary in zip(plans, compiled):
        names = plan.kernel.arg_names
        given = dict(zip(names, plan.args)) | plan.constants
        kinds = binary.src.signature.values()
        simple = all(isinstance(kind, str) and not kind.startswith("tensordesc") for kind in kinds)
        if not simple or plan.kernel.launch_metadata is not None or not all(name in given for name in names):
            return None
        fixed, slots = [], []
        for i, name in enumerate(names):
            value = given[name]
            if isinstance(value, torch.Tensor):
                # A block's residual is often the very image, which the first kernel has in the first place.
                known = images if i == 0 and plan is plans[0] else [None, *images[1:]]
                at = next((j for j, image in enumerate(known) if image is value), None)
                if at is None:
                    owners.append(value)
                else:
                    slots.append((i, at))
                value = value.data_ptr()
                if value & _ALIGNMENT:
                    return None
            fixed.append(value)
        seen |= {at for _, at in slots}
        grid = (*plan.grid, 1, 1)[:3]
        starts.append((binary.run, grid, binary.function, binary.packed_metadata, plan.kernel, fixed, tuple(slots)))
    if seen != {j for j, image in enumerate(images) if image is not None}:
        return None
    device = y.device.index if y.is_cuda else triton.runtime.driver.active.get_current_device()
    shapes = [(tuple(one.shape), one.dtype) for one in workspaces]
    call = _launches(image_of, tuple(y.shape), y.stride(), shapes, starts, device, triton)
    call.owners = owners, compiled  # type: ignore[attr-defined]  # of the addresses, and of the functions
    return call


def _launches(
    image_of: Callable[[torch.Tensor], torch.Tensor],
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    workspaces: list[tuple[tuple[int, ...], torch.dtype]],
    starts: list[tuple],
    device: int,
    triton: Any,
) -> Call:
    """What ``JITFunction.run`` comes to. Where that would do more than start the binary (a hook is set, as profilers
    do; an image is not aligned as the kernel was compiled for), a call gives None.
    """
    runtime, drivers, nhwc = triton.knobs.runtime, triton.runtime.driver, torch.channels_last

    def call(x: torch.Tensor, residual: Optional[torch.Tensor]) -> Optional[torch.Tensor]:
        image = image_of(x)
        y = x.new_empty_strided(shape, strides)
        addresses = [image.data_ptr(), y.data_ptr(), 0]
        if residual is not None:
            residual = residual.contiguous(memory_format=nhwc)
            addresses[2] = residual.data_ptr()
        alive = [x.new_empty(size, dtype=dtype) for size, dtype in workspaces] if workspaces else ()
        for one in alive:
            addresses.append(one.data_ptr())
        enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
        if (
            (addresses[0] | addresses[1] | addresses[2]) & _ALIGNMENT
            or (enter is not None and getattr(enter, "calls", True))
            or (leave is not None and getattr(leave, "calls", True))
        ):
            return None
        driver = drivers.active
        if driver.get_current_device() != device:
            # Triton launches on the current device, which need not be the tensors'.
            with torch.cuda.device(device):
                return call(x, residual)
        stream = driver.get_current_stream(device)
        for start, grid, function, metadata, kernel, fixed, slots in starts:
            if kernel.pre_run_hooks:
                return None
            values = fixed.copy()
            for i, at in slots:
                values[i] = addresses[at]
            start(*grid, stream, function, metadata, None, None, None, *values)
        return y

    return call
