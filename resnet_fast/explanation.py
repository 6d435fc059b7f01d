"""``explain(model)``: what runs fused, block by block, on what, and why the rest does not."""

import html
import re
import textwrap
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import groupby
from typing import Optional

from torch import nn
from torch.nn.modules.conv import _ConvNd

from resnet_fast import network, ops
from resnet_fast.graph.bottleneck_pairs import Bottlenecks, bottlenecks_of
from resnet_fast.graph.conditions import DROPS_OUT, Accelerated, Path, child_at, head_refusals
from resnet_fast.graph.functional import geometry_of
from resnet_fast.graph.obstacles import told
from resnet_fast.graph.patterns import FusedOp
from resnet_fast.graph.program import Program, State, inlined, opened, trace_forward
from resnet_fast.graph.ranges import is_quantised
from resnet_fast.graph.state import state_of
from resnet_fast.kernels.contract import Case
from resnet_fast.kernels.triton.tuning import planner
from resnet_fast.layer_precisions import LayerPrecision, layer_precisions
from resnet_fast.utils.modules import check_module

WIDTH = 80
"""Columns of an explanation as text."""

Cells = tuple[str, str, str]


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
    """What ``explain`` found, one row for each module that is fused or has convolutions of its own.

    As text it fits 80 columns, with equal neighbours in one line; ``as_dict`` has everything.
    """

    rows: list[Row]
    network: str = ""  # whether the last call ran as one program, and if not, why
    layers: dict[str, int] = field(default_factory=dict)  # how many the model has of each class with parameters
    convolutions: int = 0  # all nn.Conv2d
    fused: int = 0  # those of them that run fused in eval mode
    obstacles: dict[str, str] = field(default_factory=dict)  # by name: why a convolution of any kind does not
    in_training: bool = False  # whether the text tells about training mode too
    precisions: list[LayerPrecision] = field(default_factory=list)  # of a quantised model's layers

    @property
    def summary(self) -> str:
        """One sentence: how many convolutions run fused, and whether the network runs as one program."""
        if not self.fused and not (self.convolutions and any("BatchNorm" in name for name in self.layers)):
            most = sorted(self.layers.items(), key=lambda item: -item[1])[:6]
            found = ", ".join(f"{count} {name}" for name, count in most) or "no layers with parameters"
            return f"Nothing is fused, for the model has no Conv2d followed by BatchNorm2d. It has {found}."
        text = f"{self.fused} of {self.convolutions} convolutions fused"
        if self.network.startswith("one "):
            return f"{text}; the whole network runs as {self.network}."
        return f"{text}; whole network: {self.network}." if self.network else f"{text}."

    def as_dict(self) -> dict:
        return {
            "summary": self.summary,
            "convolutions": self.convolutions,
            "fused": self.fused,
            "layers": self.layers,
            "obstacles": self.obstacles,
            "network": self.network,
            "rows": [asdict(row) for row in self.rows],
            "precisions": [asdict(layer) for layer in self.precisions],
        }

    def __str__(self) -> str:
        lines = textwrap.wrap(self.summary, WIDTH, break_on_hyphens=False)
        for title, cells in self._tables():
            lines += ["", *([title] if self.in_training or self.precisions else []), *_aligned(cells)]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """For notebooks."""
        parts = [f"<p>{html.escape(self.summary)}</p>"]
        for title, cells in self._tables():
            rows = ("".join(f"<td style='text-align: left'>{html.escape(cell)}</td>" for cell in row) for row in cells)
            parts.append(f"<table><caption>{title}</caption>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>")
        return "".join(parts)

    def _tables(self) -> list[tuple[str, list[Cells]]]:
        fused = [row for row in self.rows if row.status != "stock"]
        rest = sorted((row for row in self.rows if row.status == "stock"), key=_in_eval)
        tables = [("In eval mode:", _grouped(fused, _in_eval, True) + _grouped(rest, _in_eval, False))]
        if self.in_training:
            trained = [row for row in self.rows if row.training]
            tables.append(("In training mode:", _grouped(trained, _in_training, True)))
        tables.append(("In int8:", [(layer.path, layer.precision, str(layer)) for layer in self.precisions]))
        return [(title, cells) for title, cells in tables if cells]


# --- as text ----------------------------------------------------------------------------------------------------------


def _in_eval(row: Row) -> tuple[str, str]:
    """The class, and the steps by what runs them, each by its first layer: ``conv1, conv3: gemm; conv2: winograd4``."""
    if row.status == "stock":
        return row.kind, f"not fused: {row.reason.partition('. ')[0]}"
    by_server: dict[str, list[str]] = {}
    for step in row.steps:
        layers, _, server = step.partition(": ")
        by_server.setdefault(server.removeprefix("native ") or server, []).append(layers.partition("+")[0])
    said = [f"{', '.join(layers)}: {server}" for server, layers in by_server.items()]
    return row.kind, "; ".join([*said, *filter(None, [row.reason])])


def _in_training(row: Row) -> tuple[str, str]:
    """The same, each step by its first and last layer: ``conv1…relu: native``."""
    return row.kind, re.sub(r"\+\S*\+", "…", row.training)


def _grouped(rows: list[Row], said: Callable[[Row], tuple[str, str]], neighbours: bool) -> list[Cells]:
    """Module, class and what is said of it, once for all after each other that it is said of.

    With ``neighbours`` their paths differ in the last part only, as in ``layer1.0–2``.
    """
    cells = []
    for (_, kind, text), group in groupby(rows, lambda row: (neighbours and row.path.rpartition(".")[0], *said(row))):
        paths = [row.path or "(model)" for row in group]
        others = f"–{paths[-1].rpartition('.')[2]}" if neighbours else f" and {len(paths) - 1} more"
        cells.append((paths[0] + others if len(paths) > 1 else paths[0], kind, text))
    return cells


def _aligned(cells: list[Cells]) -> list[str]:
    """Lines of three columns, of which the last is wrapped; below the others where these take most of the line."""
    widths = [max(len(cell[i]) for cell in cells) for i in range(2)]
    lines = []
    for name, kind, text in cells:
        start = f"{name:{widths[0]}}  {kind:{widths[1]}}  "
        if len(start) > WIDTH * 5 // 8:
            lines.append(f"{name}  {kind}")
            start = "    "
        below = " " * len(start)
        wrapped = textwrap.wrap(text, WIDTH, initial_indent=start, subsequent_indent=below, break_on_hyphens=False)
        lines += wrapped or [start.rstrip()]
    return lines


# --- what is explained ------------------------------------------------------------------------------------------------


def explain(model: nn.Module, training: bool = False) -> Explanation:
    """Say for every block of ``model`` whether it runs fused, what serves each step, and if not, why.

    The answer is about the model as it is now: hooks, types of children, and training flags other than those that
    ``model.eval()`` would clear count. The algorithms of the native kernels, and the choices on a GPU, measured or from
    the table of tiles, depend on the size of the images: they are those of the last call.

    Args:
        model: accelerated or not.
        training: print what happens in training mode too.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.
    """
    check_module(model)
    states = {module: state_of(module) for module in model.modules() if isinstance(module, Accelerated)}
    kept = [(module, state.eval) for module, state in states.items() if state]
    called = {child for module, program in kept for child in inlined(module, program.parts)}
    followed = {child for module, program in kept for child in opened(module, program)}
    algorithms = _algorithms(model)
    rows, fused = [], set()
    obstacles: dict[Optional[nn.Module], str] = {}
    for path, module in model.named_modules():
        if module in followed:
            continue
        if state := states.get(module):
            program = state.eval
            row = _explain_fused(path, module, state, algorithms)
            if row.steps:
                fused |= {child_at(module, op.conv) for op in program.ops if op.conv}
        elif module not in called and any(isinstance(child, _ConvNd) for child in module.children()):
            program = trace_forward(module).program
            reason = "has a forward of its own set on the instance" if "forward" in module.__dict__ else ""
            reason = reason or program.reason or "accelerate() has not been called on it"
            row = Row(path, type(module).__name__, "stock", reason=reason)
        else:
            continue
        rows.append(row)
        if not row.steps:
            missed = [child_at(module, op.conv) for op in program.ops if op.conv]
            obstacles |= dict.fromkeys([*module.children(), *missed], row.reason)
        obstacles |= {module.get_submodule(name): said for name, said in program.obstacles.items()}
    convolutions = [(path, module) for path, module in model.named_modules() if isinstance(module, _ConvNd)]
    unknown = "is called by no forward that could be traced"
    return Explanation(
        rows,
        _explain_network(model),
        dict(_layers(model)),
        sum(isinstance(conv, nn.Conv2d) for _, conv in convolutions),
        len(fused),
        {path: obstacles.get(conv, unknown) for path, conv in convolutions if conv not in fused},
        training,
        layer_precisions(model),
    )


def _layers(module: nn.Module) -> Counter[str]:
    """How many layers with parameters there are of each class: PyTorch's own, and others without children."""
    own = bool(module._parameters) and type(module).__module__.startswith("torch.nn.modules")
    if own or not module._modules:
        return Counter([type(module).__name__] if module._parameters else [])
    return sum(map(_layers, module.children()), Counter[str]())


def _explain_network(model: nn.Module) -> str:
    last = network.last_plan(model)
    if last is None:
        unplanned = "not planned yet (the first call in eval mode without gradients plans it)"
        return unplanned if isinstance(model, Accelerated) else ""
    if isinstance(last, network.Plan):
        return str(last)
    return f"in float32: {last}" if is_quantised(model) else f"no single program: {last}"


def _algorithms(model: nn.Module) -> dict[str, str]:
    """Of the convolutions that ran in native programs when they were called last, by name."""
    found: dict[str, str] = {}
    for path, module in model.named_modules():
        plan = network.last_plan(module)
        if isinstance(plan, network.Plan):
            for conv, algorithm in plan.algorithms.items():
                served = f"{'int8 ' if conv in plan.in_int8 else ''}{algorithm}"
                found.setdefault(_joined(path, conv), f"native {served}" if plan.native else served)  # the outermost
    return found


def _joined(path: str, child: Path) -> str:
    return ".".join([*([path] if path else []), *child])


def _explain_fused(path: str, module: nn.Module, state: State, algorithms: dict[str, str]) -> Row:
    kind = type(module).__name__
    if "forward" in module.__dict__:
        return Row(path, kind, "stock", reason="has a forward of its own set on the instance")
    program, training = state.eval, _explain_training(module, state.training)
    refusal = program.refusal(module, ignore_training=True)
    if refusal:
        return Row(path, kind, "stock", [], refusal, training)
    planned = [op.conv and algorithms.get(_joined(path, op.conv)) for op in program.ops]
    steps = [f"{op}: {algorithm or _served_by(module, op)}" for op, algorithm in zip(program.ops, planned)]
    for bottlenecks in bottlenecks_of(program):
        steps += [] if bottlenecks.refusal(module, ignore_training=True) else _explain_pairs(module, bottlenecks)
    own = [
        f"{name} ({type(child).__name__})"
        for name in program.rest
        if name not in program.obstacles and _unusual(child := module.get_submodule(name))
    ]
    reasons = [told(program.obstacles), f"own forward: {', '.join(own)}" if own else ""]
    reason = "; ".join(filter(None, reasons))
    return Row(path, kind, "partly fused" if reason else "fused", steps, reason, training)


def _explain_pairs(module: nn.Module, bottlenecks: Bottlenecks) -> list[str]:
    """The pairs of convolutions, of neighbouring blocks, for which there is one kernel."""
    weight = next(module.parameters())
    index = weight.device.index
    cases = [Case("conv_chain", weight.device.type, weight.dtype, *widths, gpu=index) for widths in bottlenecks.widths]
    return [
        f"{'.'.join(last)} and {'.'.join(first)} in one kernel, for images that fill the device: triton"
        for (last, first), case in zip(bottlenecks.pairs, cases)
        if ops.chained(case)
    ]


def _explain_training(module: nn.Module, program: Program) -> str:
    refusal = program.refusal(module, ignore_training=True)
    if refusal:
        return f"own forward: {refusal}"
    return "; ".join(f"{op}: {_served_by(module, op)}" for op in program.ops)


def _head_refusal(module: nn.Module, names: tuple[str, ...]) -> str:
    """Why the layers after the pool run one by one in eval mode, or ''."""
    reasons = head_refusals([module.get_submodule(name) for name in names])
    found = (f"{name} {reason}" for name, reason in zip(names, reasons) if reason)
    return next((one for one in found if not (module.training and one.endswith(DROPS_OUT))), "")


def _unusual(child: nn.Module) -> bool:
    """Whether a child left as it is deserves a word: not an accelerated block, nor a layer that no op could replace."""
    if isinstance(child, Accelerated):
        return False
    fusable = (nn.Conv2d, nn.modules.batchnorm._BatchNorm, nn.ReLU)
    return isinstance(child, fusable) or not type(child).__module__.startswith("torch.nn.modules")


def _served_by(module: nn.Module, op: FusedOp) -> str:
    if op.op == "head" and (reason := _head_refusal(module, op.parts[2:])):
        return f"one by one, for {reason}"
    if op.conv is None:
        weight = next(module.parameters())
        return ops.implementation_for(Case(op.op, weight.device.type, weight.dtype, 1, 1, gpu=weight.device.index))
    conv = child_at(module, op.conv)
    assert isinstance(conv, nn.Conv2d)
    # A block is named by what its first convolution gets: in training mode the widths differ, the coverage does not.
    block = op.op == "residual_block"
    sizes = (conv.in_channels, conv.out_channels, conv.kernel_size, *geometry_of(conv))
    name = "conv_statistics" if block else op.op
    case = Case(name, conv.weight.device.type, conv.weight.dtype, *sizes, conv.weight.device.index)  # type: ignore[arg-type]
    implementation = ops.implementation_for(case, ops.TRAINING if block else ops.IMPLEMENTATIONS)
    planned = planner.served(conv.weight) if implementation == "triton" and not block else None
    return planned or implementation
