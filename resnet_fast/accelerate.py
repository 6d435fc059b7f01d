"""``accelerate(model)``: the one line. ``restore`` undoes it, ``explain`` says what it did, block by block."""

import copy
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Optional, TypeVar

from torch import nn

from resnet_fast import network
from resnet_fast.accelerated import accelerated_class
from resnet_fast.graph.bottleneck_pairs import Row as BlockRow
from resnet_fast.graph.conditions import DROPS_OUT, Path, child_at, head_refusals
from resnet_fast.graph.patterns import Step
from resnet_fast.graph.program import Fused, Program, build
from resnet_fast.graph.programs import drop_program, program_of, rebuild
from resnet_fast.kernels import packing
from resnet_fast.kernels.contract import Case
from resnet_fast.kernels.triton.tuning import planner
from resnet_fast.ops import inference as ops

M = TypeVar("M", bound=nn.Module)


def accelerate(model: M, inplace: bool = True) -> M:
    """Make the residual blocks, stem, pooling and classifier of ``model`` run fused, in eval and in training mode.

    Works on torchvision's and timm's models and on your own: a module qualifies if its forward, traced, applies
    convolution, batch norm, and possibly an addition and a ReLU, in this order. Everything else runs as before, as do
    hooked modules and tracing; ``explain(model)`` says which and why. Parameters, buffers, state_dict
    and results (up to rounding) stay the same. Calling it again brings the model up to date after you changed its code.

    Args:
        model: any module, in either mode.
        inplace: False to leave ``model`` alone and return an accelerated copy.

    Returns:
        The accelerated module: ``model`` itself if ``inplace``.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.
    """
    check_module(model)
    if not inplace:
        model = copy.deepcopy(model)
    packing.clear_all()
    containers = list(_containers(model))
    programs = {module: build(module) for module in containers}
    inlined = {child for module, program in programs.items() for child in program.inlined(module)}
    for module in containers:
        if programs[module].function is not None and module not in inlined and not isinstance(module, Fused):
            stock: Any = type(module)
            module.__class__ = accelerated_class(stock)
    # Once more, now that every program can tell its accelerated children from unknown code; children first, whose
    # programs may become part of their parents'.
    for module in reversed(containers):
        if isinstance(module, Fused):
            rebuild(module)
    return model


def restore(model: M, inplace: bool = True) -> M:
    """Undo ``accelerate``: every module gets its stock class back. Parameters and buffers are not touched.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.
    """
    check_module(model)
    if not inplace:
        model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, Fused):
            drop_program(module)
            module.__class__ = type(module).stock_class
    return model


def check_module(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, expected a torch.nn.Module")


def _containers(model: nn.Module) -> Iterator[nn.Module]:
    """Modules with children and a Python forward of their own class, parents before children."""
    for module in model.modules():
        scripted = type(module).__module__.startswith("torch.jit")
        if any(True for _ in module.children()) and not scripted and "forward" not in module.__dict__:
            yield module


# --- explain ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """What happens in one module's own forward, first of all in eval mode."""

    path: str  # "" for the model itself
    kind: str  # class name
    status: str  # "fused", "partly fused" or "stock"
    steps: list[str] = field(default_factory=list)  # "conv1+bn1+relu: onednn", "conv2+bn2: native winograd4"
    reason: str = ""  # why it, or the rest of it, runs its own forward
    training: str = ""  # in training mode: "conv1+bn1+relu+conv2+bn2+add+relu: native", or why it runs its own forward


@dataclass(frozen=True)
class Explanation:
    """``explain``'s answer, one row for each module that is fused or has convolutions of its own."""

    rows: list[Row]
    network: str = ""  # whether the last call ran as one program, and if not, why

    def as_dict(self) -> dict:
        return {"rows": [asdict(row) for row in self.rows], "network": self.network}

    def __str__(self) -> str:
        cells = [("module", "class", "status", "fused steps, and what runs them; why the rest is not fused")]
        for row in self.rows:
            training = f"training: {row.training}" if row.training else ""
            text = "; ".join([*row.steps, *filter(None, [row.reason, training])])
            cells.append((row.path or "(model)", row.kind, row.status, text))
        widths = [max(len(line[i]) for line in cells) for i in range(3)]
        lines = ["  ".join([*(c.ljust(w) for c, w in zip(line, widths)), line[3]]) for line in cells]
        return "\n".join([*lines, *([f"whole network: {self.network}"] if self.network else [])])


def explain(model: nn.Module) -> Explanation:
    """Say for every block of ``model`` whether it runs fused, what serves each step, and if not, why.

    The answer is about the model as it is now: hooks, types of children, and training flags other than those that
    ``model.eval()`` would clear count. Each row tells about eval mode first, then about training mode. The
    algorithms of the native kernels, and the choices on a GPU, measured or from the table of tiles, depend on the size
    of the images: they are those of the last call.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.
    """
    check_module(model)
    programs = {module: program_of(module) or build(module) for module in model.modules() if isinstance(module, Fused)}
    inlined = {child for module, program in programs.items() for child in program.inlined(module)}
    algorithms = _algorithms(model)
    rows = []
    for path, module in model.named_modules():
        if module in programs:
            rows.append(_explain_fused(path, module, programs[module], algorithms))
        elif module not in inlined and any(isinstance(child, nn.Conv2d) for child in module.children()):
            reason = "has a forward of its own set on the instance" if "forward" in module.__dict__ else ""
            reason = reason or build(module).reason or "accelerate() has not been called on it"
            rows.append(Row(path, type(module).__name__, "stock", reason=reason))
    return Explanation(rows, _explain_network(model))


def _explain_network(model: nn.Module) -> str:
    last = network.last_plan(model)
    if last is None:
        return "not planned yet; a call in eval mode without gradients does" if isinstance(model, Fused) else ""
    return str(last) if isinstance(last, network.Plan) else f"no single program: {last}"


def _algorithms(model: nn.Module) -> dict[str, str]:
    """Of the convolutions that ran in native programs when they were called last, by name."""
    found: dict[str, str] = {}
    for path, module in model.named_modules():
        plan = network.last_plan(module)
        if isinstance(plan, network.Plan):
            for conv, algorithm in plan.algorithms.items():
                found.setdefault(_joined(path, conv), algorithm)  # the outermost runs
    return found


def _joined(path: str, child: Path) -> str:
    return ".".join([*([path] if path else []), *child])


def _explain_fused(path: str, module: nn.Module, program: Program, algorithms: dict[str, str]) -> Row:
    kind = type(module).__name__
    if "forward" in module.__dict__:
        return Row(path, kind, "stock", reason="has a forward of its own set on the instance")
    training = _explain_training(module, program.in_training)
    refusal = program.refusal(module, ignore_training=True)
    if refusal:
        return Row(path, kind, "stock", [], refusal, training)
    planned = [step.conv and algorithms.get(_joined(path, step.conv)) for step in program.steps]
    steps = [
        f"{step}: {f'native {algorithm}' if algorithm else _served_by(module, step)}"
        for step, algorithm in zip(program.steps, planned)
    ]
    for row in program.rows:
        steps += [] if row.refusal(module, ignore_training=True) else _explain_row(module, row)
    own = [f"{name} ({type(child).__name__})" for name in program.rest if _unusual(child := module.get_submodule(name))]
    reason = f"own forward: {', '.join(own)}" if own else ""
    return Row(path, kind, "partly fused" if own else "fused", steps, reason, training)


def _explain_row(module: nn.Module, row: BlockRow) -> list[str]:
    """The pairs of convolutions, of neighbouring blocks, for which there is one kernel."""
    weight = next(module.parameters())
    cases = [Case("conv_chain", weight.device.type, weight.dtype, *widths) for widths in row.widths]
    return [
        f"{'.'.join(last)} and {'.'.join(first)} in one kernel, for images that fill the device: triton"
        for (last, first), case in zip(row.pairs, cases)
        if ops.chained(case)
    ]


def _explain_training(module: nn.Module, program: Optional[Program]) -> str:
    if program is None:
        return ""
    refusal = program.refusal(module, ignore_training=True)
    if refusal:
        return f"own forward: {refusal}"
    return "; ".join(f"{step}: {_served_by(module, step)}" for step in program.steps)


def _head_refusal(module: nn.Module, names: tuple[str, ...]) -> str:
    """Why the layers after the pool run one by one in eval mode, or ''."""
    reasons = head_refusals([module.get_submodule(name) for name in names])
    found = (f"{name} {reason}" for name, reason in zip(names, reasons) if reason)
    return next((one for one in found if not (module.training and one.endswith(DROPS_OUT))), "")


def _unusual(child: nn.Module) -> bool:
    """Whether a child left as it is deserves a word: not an accelerated block, nor a layer that no op could replace."""
    if isinstance(child, Fused):
        return False
    fusable = (nn.Conv2d, nn.modules.batchnorm._BatchNorm, nn.ReLU)
    return isinstance(child, fusable) or not type(child).__module__.startswith("torch.nn.modules")


def _served_by(module: nn.Module, step: Step) -> str:
    if step.op == "head" and (reason := _head_refusal(module, step.parts[2:])):
        return f"one by one, for {reason}"
    if step.conv is None:
        weight = next(module.parameters())
        return ops.implementation_for(Case(step.op, weight.device.type, weight.dtype, 1, 1))
    conv = child_at(module, step.conv)
    assert isinstance(conv, nn.Conv2d)
    # A chain is named by what its first convolution gets: in training mode the widths differ, the coverage does not.
    chain = step.op == "residual_block"
    sizes = (conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation)
    name = "conv_statistics" if chain else step.op
    case = Case(name, conv.weight.device.type, conv.weight.dtype, *sizes, conv.groups)  # type: ignore[arg-type]
    implementation = ops.implementation_for(case, ops.TRAINING if chain else ops.IMPLEMENTATIONS)
    planned = planner.served(conv.weight) if implementation == "triton" and not chain else None
    return planned or implementation
