"""A whole accelerated module as one program of the native library: one call, whatever the number of layers.

``plan_for`` gives the plan for a call, if it can be planned: one float32 image batch on the CPU, nothing to
differentiate, trace or record, and layers that ``lowering`` knows. A plan holds for a shape of input and a number of
threads, while the modules and their tensors stay as they are: a ``Guard`` is asked at every call.
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
from resnet_fast.graph.state import state_of
from resnet_fast.kernels.native import abi, library, planner
from resnet_fast.kernels.native import inference as native
from resnet_fast.network import schedule
from resnet_fast.network.lowering import Lowering
from resnet_fast.network.memory import Need, give_back, take
from resnet_fast.network.schedule import Part, Places
from resnet_fast.network.steps import Image, NotPlanned, Storage, of_images

_PLANS_KEPT = 4  # per module: detectors see many shapes

# --- the plan ---


class Plan:
    """A program of native operations, and how to call it."""

    def __init__(self, module: nn.Module, program: Program, plans: "Plans", x: Tensor, threads: int) -> None:
        """Raises ``NotPlanned``."""
        if planner.layer_by_layer():
            raise NotPlanned("oneDNN is asked for")
        if max(x.shape) > native.LARGEST:
            raise NotPlanned(f"no images beyond {native.LARGEST}")
        self._nhwc = _channels_last(x)
        given = Image(tuple(x.shape), Storage(x.numel()), self._nhwc)
        lowering = Lowering(threads, plain=plans.plain)
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
        self.steps = schedule.needed(lowering.steps, storages)
        self.split = schedule.split(self.steps, given.shape[0], threads)
        for i, step in enumerate(self.steps):
            if step.weights is not None:
                lowering.prepare(step, self.split.images if i < self.split.steps else given.shape[0])
        places = schedule.Places(self.steps, self.split, given, storages)
        self.need = Need(places.arena_bytes)
        self.parts = schedule.order(self.steps, self.split, given.shape[0])
        self._ops = _operations(self.parts, places)
        self._pointers: Any = ctypes.c_void_p * (2 + len(outputs))

    def holds(self, module: nn.Module) -> bool:
        """Whether the forwards still decide as they did, in what a ``Guard`` does not see."""
        owners = ((child_at(module, path), reads) for path, reads in self._reads)
        return all(owner is not None and reads.others_hold(owner) for owner, reads in owners)

    def run(self, x: Tensor) -> Any:
        """``module(x)``, for an ``x`` of the shape and layout that the plan was made for. Results are new tensors."""
        if not self._nhwc:
            x = x.contiguous()
        outputs = [
            torch.empty(shape, dtype=torch.float32, device="cpu", memory_format=layout)
            for shape, layout in self._outputs
        ]
        memory = take(self.need)
        pointers = self._pointers(memory.address, x.data_ptr(), *[output.data_ptr() for output in outputs])
        library.run(self._ops, len(self._ops), pointers, self._threads)
        give_back(memory, self.need)
        if self._single:
            return outputs[0]
        return tree_unflatten([outputs[i] for i in self._leaves], self._structure)

    def __str__(self) -> str:
        shape, threads = list(self._shape), f"{self._threads} thread{'s' if self._threads > 1 else ''}"
        text = f"one native program of {len(self.steps)} operations for {shape} on {threads}"
        steps, images = self.split
        return f"{text}, the first {steps} on {images} image{'s' if images > 1 else ''} at a time" if steps else text

    @property
    def algorithms(self) -> dict[Path, str]:
        """By the path of the convolution."""
        return {step.path: step.algorithm for step in self.steps if step.path}


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

    def make(self, module: nn.Module, program: Program, x: Tensor, threads: int, key: tuple) -> Union[Plan, str]:
        for oldest in list(self._kept)[: len(self._kept) + 1 - _PLANS_KEPT]:
            self._kept.pop(oldest, None)
        if not _guardable(module):
            refusal = "its tensors are not ordinary ones on the CPU"
            self.last = refusal
            return refusal
        guard = Guard(module)
        self.last = None
        try:
            plan: Union[Plan, str] = self._refusal(module, program, guard) or Plan(module, program, self, x, threads)
        except (NotPlanned, RuntimeError, OverflowError) as reason:  # the layers say best what is wrong with them
            plan = str(reason)
        self._kept[key] = guard, plan
        self.last = plan
        return plan

    def _refusal(self, module: nn.Module, program: Program, guard: Guard) -> str:
        # Hooks on children that are not called would do no harm, but telling them apart at every call would take long.
        refusal = program.refusal(module) or ("a child has hooks" if guard.hooked() else "")
        return refusal or ("a class of PyTorch's has another forward, patched into it" if guard.patched() else "")


def _guardable(root: nn.Module) -> bool:
    """Whether the tensors of a module are ordinary ones: on the CPU, dense, with a version."""
    tensors = chain(root.parameters(), root.buffers())
    return all(
        type(t) in (Tensor, nn.Parameter)
        and t.device.type == "cpu"
        and t.layout is torch.strided
        and not t.is_inference()
        for t in tensors
    )


def plan_for(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Optional[Plan]:
    """The plan for a call of ``module``, or None where its layers are to be called one by one.

    The caller has asked ``conditions.stock_wanted``, and that it is not being compiled.
    """
    if len(args) + len(kwargs) != 1 or torch.is_grad_enabled() or module.training:
        return None
    x = args[0] if args else next(iter(kwargs.values()))
    if not _plain_image(x) or _watched() or os.environ.get("RESNET_FAST_IMPLEMENTATION", "") not in ("", "native"):
        return None
    if library.unavailable() is not None:
        return None
    threads = torch.get_num_threads()
    key = (x.shape, _channels_last(x), threads, planner.version)
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
        plan = plans.make(module, state.eval, x, threads, key)
    return plan if isinstance(plan, Plan) else None


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
        and x.device.type == "cpu"
        and x.layout is torch.strided
        and x.numel() > 0
        and not x.is_neg()
    )


def _watched() -> bool:
    """Whether somebody looks at, or changes, the operations that are called."""
    return (
        nn_module._has_any_global_hook()
        or torch.is_autocast_enabled("cpu")
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
    )
