"""Calls of convolutions on a GPU, prepared once and then repeated.

Deciding a launch (layout, pack, tile, what was measured) and Triton's own way from arguments to a binary are Python,
which may take longer than the kernel. All that they decide follows from shapes, dtypes and flags, and from the weights.
So the first call keeps what it found, and later calls allocate the output and start the binary.

A prepared call holds packed weights, and is found only while these are up to date: by the memory of the weight, as long
as its version is the same and ``packing.clearings`` has not risen. What that cannot see is what
``kernels/packing.py`` cannot see on a GPU. Scale and shift are read anew in every call, since autograd and
``torch.compile`` fold a batch norm into new ones each time; unless the call has them in its weight, for which they must
be the very same, too. Importing this module does not import Triton.

What it holds was made on the stream of the first call, and is ordered before calls on others as a pack is: streams.py.
"""

import os
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Optional

import torch
from torch import nn

from resnet_fast.kernels import contents, packing, streams
from resnet_fast.kernels.triton.tuning import planner
from resnet_fast.utils import compat

Call = Callable[[torch.Tensor, Optional[torch.Tensor], torch.Tensor, torch.Tensor], Optional[torch.Tensor]]
"""Takes x, the residual, scale and shift, gives the result, or None where the call has to be decided anew.

Its attributes: ``owners`` holds the tensors made of the weights that it reads, in tuples or lists, among other things;
``bound`` says whether scale and shift are in these, so that it ignores those that it is given.
"""

_CALLS_KEPT = 64  # per weight: detectors see many sizes
_SCALE, _SHIFT = 3, 4  # where a call's addresses have them
_ALIGNMENT = 15  # Triton compiles for pointers that are multiples of 16; these bits of an address must be 0

# os.environ.get takes 1 to 3 microseconds for a name that is not there, a third of all that a call may take.
_environment: Any = getattr(os.environ, "_data", os.environ)
_IMPLEMENTATION: Any = os.environ.encodekey("RESNET_FAST_IMPLEMENTATION") if _environment is not os.environ else (
    "RESNET_FAST_IMPLEMENTATION"
)  # fmt: skip


class _Kept:
    """A call, with the scale and shift that it was last given. They are not kept alive: autograd's graph hangs on them.

    kinds: their shapes, dtypes and devices. state: their versions and addresses; None where they have no versions, as
    those made under ``torch.inference_mode``.
    """

    __slots__ = ("call", "kinds", "made", "scale", "shift", "state")

    def __init__(self, call: Call, made: streams.Made, scale: torch.Tensor, shift: torch.Tensor) -> None:
        self.call, self.made, self.kinds = call, made, _kinds(scale, shift)
        self._meet(scale, shift)

    def _meet(self, scale: torch.Tensor, shift: torch.Tensor) -> None:
        self.scale, self.shift = _identity(scale), _identity(shift)
        versions = not (scale.is_inference() or shift.is_inference())
        self.state = (scale._version, scale.data_ptr(), shift._version, shift.data_ptr()) if versions else None

    def takes(self, scale: torch.Tensor, shift: torch.Tensor) -> bool:
        """Whether the call is right for these. Others than the last ones have not been checked by the op."""
        if (
            self.scale() is scale
            and self.shift() is shift
            and self.state is not None
            and self.state == (scale._version, scale.data_ptr(), shift._version, shift.data_ptr())
        ):
            return True
        if self.call.bound or self.kinds != _kinds(scale, shift):  # type: ignore[attr-defined]
            return False
        if not (scale.is_contiguous() and shift.is_contiguous()):
            return False
        self._meet(scale, shift)
        return True


def _identity(vector: torch.Tensor) -> Callable[[], Optional[torch.Tensor]]:
    """What gives ``vector`` while it lives; for a parameter, nothing: those with weak references cannot be swapped."""
    return (lambda: None) if isinstance(vector, nn.Parameter) else weakref.ref(vector)


def _kinds(scale: torch.Tensor, shift: torch.Tensor) -> tuple:
    return scale.shape, scale.dtype, scale.device, shift.shape, shift.dtype, shift.device


class _Weights:
    """The calls of one weight, as it was."""

    __slots__ = ("calls", "state", "storage")

    def __init__(self, weight: torch.Tensor, forget: Callable[[weakref.ref], None]) -> None:
        self.storage, self.state = weakref.ref(weight.untyped_storage(), forget), _state(weight)
        self.calls: dict[Hashable, _Kept] = {}


_kept: dict[int, _Weights] = {}  # by the address of the weight, whose memory removes its entry when it goes


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

    What a prepared call is found by has passed all checks of the op when it was kept.
    """
    weights = _kept.get(weight.data_ptr())
    if weights is None or weights.state != _state(weight):
        return None
    kept = weights.calls.get(_key(x, residual, stride, padding, dilation, groups, relu))
    if kept is None or not kept.takes(scale, shift):
        return None
    kept.made.order()
    if packing.holders is not None:
        packing.holders += (kept.call, scale, shift)
    return kept.call(x, residual, scale, shift)


def bound(x: torch.Tensor, weight: torch.Tensor, residual: Optional[torch.Tensor], *rest: Any) -> bool:
    """Whether what is kept for these arguments is a call that is bound to a scale and a shift."""
    weights = _kept.get(weight.data_ptr())
    if weights is None or weights.state != _state(weight):
        return False
    kept = weights.calls.get(_key(x, residual, *rest))
    return kept is not None and kept.call.bound  # type: ignore[attr-defined]


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

    Nor is anything for a weight made under ``torch.inference_mode``, which carries no version, nor what a stream makes
    while it is captured; nor anything at all where the contents of weights are to be compared.
    """
    if call is None or weight.is_inference() or contents.on_gpu():
        return
    index = x.device.index
    if streams.capturing(index):
        return
    address = weight.data_ptr()
    weights = _kept.get(address)
    if weights is None or weights.state != _state(weight) or len(weights.calls) >= _CALLS_KEPT:
        weights = _kept[address] = _Weights(weight, _forgetting(address))
    made = streams.Made(index, call.owners)  # type: ignore[attr-defined]
    weights.calls[_key(x, residual, stride, padding, dilation, groups, relu)] = _Kept(call, made, scale, shift)


def _forgetting(address: int) -> Callable[[weakref.ref], None]:
    def forget(storage: weakref.ref) -> None:
        weights = _kept.get(address)
        if weights is not None and weights.storage is storage:
            _kept.pop(address, None)

    return forget


def _state(weight: torch.Tensor) -> Hashable:
    """What changes when a pack made of it is stale. A storage keeps its id while its memory lives."""
    memory = id(weight.untyped_storage()), weight.data_ptr(), weight.shape, weight.stride(), weight.dtype
    return None if weight.is_inference() else weight._version, memory, packing.clearings


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
        compat.convolutions_in_tf32() if dtype is torch.float32 else None,
    )


def launches_of(
    plan: Any,
    compiled: Sequence[Any],
    residual: Optional[torch.Tensor],
    scale: torch.Tensor,
    shift: torch.Tensor,
) -> Optional[Call]:
    """``plan``, of the kind ``plan.Plan``, prepared for other images, scales and shifts of the same shapes.

    Its launches were the binaries ``compiled``, and its result is one tensor. A workspace is allocated in every call,
    as the result is.

    A tensor descriptor of the image, which holds its address, is made anew in every call; Triton encodes it.

    None where that is not known to be enough: in the interpreter, for plans that do not say how their image is made
    (``Plan.image``), and where scale or shift had to be copied.
    """
    import triton

    image_of, y, workspaces = plan.image, plan.result, plan.workspaces
    if image_of is None or not all(isinstance(one, triton.compiler.CompiledKernel) for one in compiled):
        return None
    first = plan.launches[0].args[0]
    described = first if hasattr(first, "block_shape") else None
    images = [first if described is None else described.base, y, residual, None, None, *workspaces]
    vectors = {"scale_ptr": (_SCALE, scale.data_ptr()), "shift_ptr": (_SHIFT, shift.data_ptr())}
    if images[0].dtype != y.dtype:
        return None
    starts, owners, seen = [], [], set()
    for number, (launch, binary) in enumerate(zip(plan.launches, compiled)):
        kernel, names = launch.kernel, launch.kernel.arg_names
        given = dict(zip(names, launch.args)) | launch.constants
        simple = all(isinstance(kind, str) for kind in binary.src.signature.values())
        if not simple or kernel.launch_metadata is not None or not all(name in given for name in names):
            return None
        fixed, slots = [], []
        for i, name in enumerate(names):
            value = given[name]
            if hasattr(value, "block_shape"):
                if value is described:
                    slots.append((i, 0))
                else:
                    owners.append(value.base)
            elif isinstance(value, torch.Tensor):
                # A block's residual is often the very image, which the first kernel has in the first place.
                known = images if i == 0 and number == 0 else [None, *images[1:]]
                at = next((j for j, image in enumerate(known) if image is value), None)
                if name in vectors and vectors[name][1] == value.data_ptr():
                    at = vectors[name][0]
                if at is None:
                    owners.append(value)
                else:
                    slots.append((i, at))
                value = value.data_ptr()
                if value & _ALIGNMENT:
                    return None
            fixed.append(value)
        seen |= {at for _, at in slots}
        grid = (*launch.grid, 1, 1)[:3]
        starts.append((binary.run, grid, binary.function, binary.packed_metadata, kernel, fixed, tuple(slots)))
    if seen != {_SCALE, _SHIFT, *(j for j, image in enumerate(images) if image is not None)}:
        return None
    device = y.device.index if y.is_cuda else triton.runtime.driver.active.get_current_device()
    shapes = [(tuple(one.shape), one.dtype) for one in workspaces]
    call = _launches(image_of, described, tuple(y.shape), y.stride(), shapes, starts, device, triton)
    call.owners = owners, compiled  # type: ignore[attr-defined]  # of the addresses, and of the functions
    call.bound = False  # type: ignore[attr-defined]
    return call


class _Described:
    """A tensor descriptor of another image of the same shape, as far as encoding one asks. Making Triton's own would
    check again what was checked.
    """

    __slots__ = ("base", "padding", "round_f32_to_tf32", "shape", "strides")

    def __init__(self, image: torch.Tensor, like: Any) -> None:
        self.base, self.shape, self.strides = image, like.shape, like.strides
        self.padding = like.padding
        self.round_f32_to_tf32 = getattr(like, "round_f32_to_tf32", False)


def _launches(
    image_of: Callable[[torch.Tensor], torch.Tensor],
    described: Optional[Any],
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

    def call(
        x: torch.Tensor, residual: Optional[torch.Tensor], scale: torch.Tensor, shift: torch.Tensor
    ) -> Optional[torch.Tensor]:
        driver = drivers.active
        if driver.get_current_device() != device:
            # Triton launches on the current device, which need not be the tensors'.
            with torch.cuda.device(device):
                return call(x, residual, scale, shift)
        image = image_of(x)
        y = x.new_empty_strided(shape, strides)
        addresses: list[Any] = [image.data_ptr(), y.data_ptr(), 0, scale.data_ptr(), shift.data_ptr()]
        if residual is not None:
            residual = residual.contiguous(memory_format=nhwc)
            addresses[2] = residual.data_ptr()
        alive = [x.new_empty(size, dtype=dtype) for size, dtype in workspaces] if workspaces else ()
        for one in alive:
            addresses.append(one.data_ptr())
        enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
        if (
            (addresses[0] | addresses[1] | addresses[2] | addresses[3] | addresses[4]) & _ALIGNMENT
            or (enter is not None and getattr(enter, "calls", True))
            or (leave is not None and getattr(leave, "calls", True))
        ):
            return None
        stream = driver.get_current_stream(device)
        if described is not None:
            addresses[0] = _Described(image, described)
        for start, grid, function, metadata, kernel, fixed, slots in starts:
            if kernel.pre_run_hooks:
                return None
            values = fixed.copy()
            for i, at in slots:
                values[i] = addresses[at]
            start(*grid, stream, function, metadata, None, None, None, *values)
        return y

    return call
