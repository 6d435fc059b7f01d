"""A whole accelerated module as one program of the native library: one call, whatever the number of layers.

``plan_for`` gives the plan for a call, if it can be planned: one float32 image batch on the CPU, nothing to
differentiate, trace or record, and layers that ``lowering`` knows. A plan holds for a shape of input and a number of
threads, while the modules and their tensors stay as they are: a ``Guard`` is asked at every call.

A quantised module is planned with some steps in int8 (``precision``), under autograd too as long as there is nothing to
differentiate, and on a GPU as well, where its steps are calls of ops (``torch_program``).
"""

import ctypes
import os
import weakref
from itertools import chain
from typing import Any, Optional, Union

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from torch.utils._pytree import tree_flatten, tree_unflatten

from resnet_fast.graph.conditions import Path, child_at
from resnet_fast.graph.guard import Guard
from resnet_fast.graph.program import STATE, Program, State
from resnet_fast.graph.ranges import is_quantised
from resnet_fast.graph.state import state_of
from resnet_fast.kernels.native import abi, library, planner
from resnet_fast.kernels.native.inference import LARGEST
from resnet_fast.network import precision, schedule, torch_program
from resnet_fast.network.lowering import Lowering
from resnet_fast.network.memory import Need, give_back, take
from resnet_fast.network.schedule import Part, Places
from resnet_fast.network.steps import Image, NotPlanned, Storage, of_images

_PLANS_KEPT = 4  # per module: detectors see many shapes

# --- the plan ---


class Plan:
    """A program of native operations, and how to call it."""

    def __init__(
        self, module: nn.Module, program: Program, plans: "Plans", x: Tensor, threads: int, native: bool
    ) -> None:
        """Raises ``NotPlanned``."""
        if native and planner.layer_by_layer():
            raise NotPlanned("oneDNN is asked for")
        if max(x.shape) > LARGEST:
            raise NotPlanned(f"no images beyond {LARGEST}")
        self._nhwc = _channels_last(x)
        self._given = given = Image(tuple(x.shape), Storage(x.numel()), self._nhwc)
        lowering = Lowering(threads, x.device, native, plain=plans.plain)
        result = lowering.graph(module, program, (given,))
        leaves, self._structure = tree_flatten(result)
        if not leaves or not all(isinstance(leaf, Image) for leaf in leaves):
            raise NotPlanned("it returns more than tensors")
        outputs = list(dict.fromkeys(map(lowering.read, leaves)))
        if lowering.overwrites(given):
            raise NotPlanned("it writes to its input")
        self._reads = lowering.reads
        storages = [image.storage for image in outputs]
        if len(set(storages)) != len(storages) or given.storage in storages:
            raise NotPlanned("it returns views, or its input")
        self._leaves = [outputs.index(leaf) for leaf in leaves]
        self._outputs = [
            (image.shape, torch.channels_last if image.nhwc and len(image.shape) == 4 else torch.contiguous_format)
            for image in outputs
        ]
        self._single = isinstance(result, Image)
        self._threads, self._shape = threads, given.shape
        steps = schedule.needed(lowering.steps, storages)
        self.refusals: dict[Path, str] = {}  # why layers with ranges are not in int8
        if any(step.ranges for step in steps):
            steps, self.refusals = precision.mixed(steps, storages, _covers(x.device, native))
        self.steps = steps
        self._program = None if native else torch_program.TorchProgram(steps, storages, x.device)
        if native:
            self._compile(lowering, storages)

    def _compile(self, lowering: Lowering, results: list[Storage]) -> None:
        images = self._shape[0]
        self.split = schedule.split(self.steps, images, self._threads)
        for i, step in enumerate(self.steps):
            if step.weights is not None:
                lowering.prepare(step, self.split.images if i < self.split.steps else images)
        places = schedule.Places(self.steps, self.split, self._given, results)
        self.need = Need(places.arena_bytes)
        self.parts = schedule.order(self.steps, self.split, images)
        self._ops = _operations(self.parts, places)
        self._pointers: Any = ctypes.c_void_p * (2 + len(results))

    def holds(self, module: nn.Module) -> bool:
        """Whether the forwards still decide as they did, in what a ``Guard`` does not see."""
        owners = ((child_at(module, path), reads) for path, reads in self._reads)
        return all(owner is not None and reads.others_hold(owner) for owner, reads in owners)

    def run(self, x: Tensor) -> Any:
        """``module(x)``, for an ``x`` of the shape and layout that the plan was made for. Results are new tensors."""
        if not self._nhwc:
            x = x.contiguous()
        outputs = self._run_natively(x) if self._program is None else self._run_ops(self._program, x)
        if self._single:
            return outputs[0]
        return tree_unflatten([outputs[i] for i in self._leaves], self._structure)

    def _run_natively(self, x: Tensor) -> list[Tensor]:
        outputs = [
            torch.empty(shape, dtype=torch.float32, device="cpu", memory_format=layout)
            for shape, layout in self._outputs
        ]
        memory = take(self.need)
        pointers = self._pointers(memory.address, x.data_ptr(), *[output.data_ptr() for output in outputs])
        library.run(self._ops, len(self._ops), pointers, self._threads)
        give_back(memory, self.need)
        return outputs

    def _run_ops(self, program: torch_program.TorchProgram, x: Tensor) -> list[Tensor]:
        results = program.run(self._given.storage, (x.permute(0, 2, 3, 1) if self._nhwc else x).reshape(-1))
        return [_shaped(result, *shape_and_layout) for result, shape_and_layout in zip(results, self._outputs)]

    def __str__(self) -> str:
        shape, threads = list(self._shape), f"{self._threads} thread{'s' if self._threads > 1 else ''}"
        if self._program is not None:
            return f"one program of {len(self.steps)} calls of ops for {shape}{self._said_of_int8()}"
        text = f"one native program of {len(self.steps)} operations for {shape} on {threads}{self._said_of_int8()}"
        steps, images = self.split
        return f"{text}, the first {steps} on {images} image{'s' if images > 1 else ''} at a time" if steps else text

    def _said_of_int8(self) -> str:
        layers = [step for step in self.steps if step.path]
        count = sum(step.in_int8 for step in layers)
        return f", {count} of {len(layers)} layers in int8" if count or self.refusals else ""

    @property
    def algorithms(self) -> dict[Path, str]:
        """By the path of the convolution."""
        return {step.path: step.algorithm for step in self.steps if step.path}

    @property
    def native(self) -> bool:
        """Whether the native library runs it, rather than ops."""
        return self._program is None

    @property
    def in_int8(self) -> set[Path]:
        """The layers that run in int8."""
        return {step.path for step in self.steps if step.path and step.in_int8}


def _covers(device: torch.device, native: bool) -> precision.Covers:
    if not native:
        return lambda shape: torch_program.refusal(shape, device)
    refused = "the native kernels do not cover it in int8"
    return lambda shape: "" if any(library.supports(shape, name) for name in abi.ALGORITHMS) else refused


def _shaped(result: Tensor, shape: tuple[int, ...], layout: torch.memory_format) -> Tensor:
    if layout is torch.contiguous_format:
        return result.view(shape)
    n, c, h, w = shape
    return result.view(n, h, w, c).permute(0, 3, 1, 2)


def _channels_last(x: Tensor) -> bool:
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def _operations(parts: list[Part], places: Places) -> "ctypes.Array[abi.Op]":
    ops = (abi.Op * len(parts))()
    for op, (step, first, images) in zip(ops, parts):
        op.kind, op.shape = step.kind, of_images(step.shape, images)
        op.x, op.y = places.at(step.x, first), places.at(step.y, first)
        op.residual = abi.NOWHERE if step.residual is None else places.at(step.residual, first)
        if step.pack is not None:
            op.algorithm = abi.ALGORITHMS.index(step.algorithm)
            op.packed = step.pack.weight.data_ptr()
            op.shift = step.pack.shift.data_ptr()
            op.scale = None if step.pack.scale is None else step.pack.scale.data_ptr()
            op.y_dtype = abi.FLOAT32 if step.y.scale is None else abi.INT8
        op.factor = step.factor
    return ops


# --- plans by shape ---


class Plans:
    """A program's plans, and the reasons why there is none, by shape, layout, threads and version of the planner."""

    def __init__(self, module: nn.Module) -> None:
        self.of = weakref.ref(module)
        self.plain: dict[Path, tuple[type, Program]] = {}
        self.last: Union[Plan, str, None] = None  # what the last call got
        self._kept: dict[tuple, tuple[Guard, Union[Plan, str]]] = {}

    def find(self, module: nn.Module, key: tuple) -> Union[Plan, str, None]:
        """What was made before, if it still holds. Then the program is not stale either."""
        kept = self._kept.get(key)
        if kept is None:
            return None
        guard, plan = kept
        if not guard.holds(module) or (isinstance(plan, Plan) and not plan.holds(module)):
            del kept, plan  # with its packed weights, before there are new ones
            self._kept.pop(key, None)
            return None
        self.last = plan
        return plan

    def make(
        self, module: nn.Module, program: Program, x: Tensor, threads: int, native: bool, key: tuple
    ) -> Union[Plan, str]:
        for oldest in list(self._kept)[: len(self._kept) + 1 - _PLANS_KEPT]:
            self._kept.pop(oldest, None)
        if not _guardable(module, x.device):
            refusal = f"its tensors are not ordinary ones on {x.device}".replace("cpu", "the CPU")
            self.last = refusal
            return refusal
        guard = Guard(module)
        self.last = None
        try:
            plan: Union[Plan, str] = self._refusal(module, program, guard) or Plan(
                module, program, self, x, threads, native
            )
        except (NotPlanned, RuntimeError, OverflowError) as reason:  # the layers say best what is wrong with them
            plan = str(reason)
        self._kept[key] = guard, plan
        self.last = plan
        return plan

    def trains(self, key: tuple) -> bool:
        """Whether a parameter of what was kept requires gradients."""
        return any(tensor.requires_grad for tensor in self._kept[key][0].tensors)

    def _refusal(self, module: nn.Module, program: Program, guard: Guard) -> str:
        # Hooks on children that are not called would do no harm, but telling them apart at every call would take long.
        refusal = program.refusal(module) or ("a child has hooks" if guard.hooked() else "")
        return refusal or ("a class of PyTorch's has another forward, patched into it" if guard.patched() else "")


def _guardable(root: nn.Module, device: torch.device) -> bool:
    """Whether the tensors of a module are ordinary ones: on the device, dense, with a version."""
    tensors = chain(root.parameters(), root.buffers())
    return all(
        type(t) in (Tensor, nn.Parameter) and t.device == device and t.layout is torch.strided and not t.is_inference()
        for t in tensors
    )


def plan_for(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Optional[Plan]:
    """The plan for a call of ``module``, or None where its layers are to be called one by one.

    The caller has asked ``conditions.stock_wanted``, and that it is not being compiled.
    """
    if len(args) + len(kwargs) != 1:
        return None
    quantised = is_quantised(module)
    if not quantised and (torch.is_grad_enabled() or module.training):
        return None
    x = args[0] if args else next(iter(kwargs.values()))
    native = _natively(x)
    if quantised:
        refusal = _float_wanted(module, x)
        if refusal:
            _note(module, refusal)
            return None
    elif not (native and _plain_image(x)) or _watched("cpu"):
        return None
    threads = torch.get_num_threads()
    served = () if native else (x.device, _wanted_implementation())
    key = (x.shape, _channels_last(x), threads, planner.version, *served)
    state = module.__dict__.get(STATE)
    plans = _plans(state, module)
    plan = None if plans is None else plans.find(module, key)
    if plan is None:
        state = state_of(module)
    if state is None or not state.eval.takes(args, kwargs):
        return None
    if plan is None:
        plans = _plans(state, module)
        if plans is None:
            plans = state.plans = Plans(module)
        plan = plans.make(module, state.eval, x, threads, native, key)
    if not isinstance(plan, Plan):
        return None
    if quantised and torch.is_grad_enabled() and plans.trains(key):  # type: ignore[union-attr]
        _note(module, "its parameters require gradients")
        return None
    return plan


def _wanted_implementation() -> str:
    return os.environ.get("RESNET_FAST_IMPLEMENTATION", "")


def _natively(x: Any) -> bool:
    """Whether the native library is to run a plan, rather than ops."""
    on_cpu = isinstance(x, Tensor) and x.device.type == "cpu"
    return on_cpu and _wanted_implementation() in ("", "native") and library.unavailable() is None


def _float_wanted(module: nn.Module, x: Any) -> str:
    """Why a call of a quantised module cannot run in int8, whatever its layers are, or ''."""
    if module.training:
        return "training mode"
    if not _plain_image(x):
        kind = f"a {x.dtype} of {x.dim()} dimensions" if isinstance(x, Tensor) else f"a {type(x).__name__}"
        return f"its input is {kind}, expected a plain torch.float32 of 4"
    if torch.is_grad_enabled() and x.requires_grad:
        return "its input requires a gradient"
    return "autocast, a hook on all modules or a tensor mode is active" if _watched(x.device.type) else ""


def _note(module: nn.Module, reason: str) -> None:
    """Keep why a call of a quantised module ran in float."""
    state = state_of(module)
    if state is not None:
        plans = _plans(state, module)
        if plans is None:
            plans = state.plans = Plans(module)
        plans.last = reason


def _plans(state: Optional[State[Plans]], module: nn.Module) -> Optional[Plans]:
    """The plans of this very module: a shallow copy has the same state, and other children."""
    plans = None if state is None else state.plans
    return plans if plans is not None and plans.of() is module else None


def last_plan(module: nn.Module) -> Union[Plan, str, None]:
    """What ``module``'s last call that could be planned ran as; a reason if it was not; None if there was none."""
    plans = _plans(module.__dict__.get(STATE), module)
    return None if plans is None else plans.last


def _plain_image(x: Any) -> bool:
    return (
        type(x) in (Tensor, nn.Parameter)
        and x.dtype is torch.float32
        and x.dim() == 4
        and x.layout is torch.strided
        and x.numel() > 0
        and not x.is_neg()
    )


def _watched(device: str) -> bool:
    """Whether somebody looks at, or changes, the operations that are called."""
    return (
        nn_module._has_any_global_hook()
        or torch.is_autocast_enabled(device)
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
    )
