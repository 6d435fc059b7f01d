"""From tensors to kernel launches.

A ``plan_*`` function decides everything about a launch and starts nothing: it brings the inputs into the layout that
the kernel reads, picks the tile, allocates the output and lists the arguments. ``Plan.run`` launches. The split lets
the tests compile exactly what would be launched, for a GPU that is not there.
"""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Optional

import torch

from resnet_fast.kernels import streams
from resnet_fast.kernels.contract import Pair, output_size
from resnet_fast.kernels.reference import inference as reference
from resnet_fast.kernels.triton import descriptor, pack, prepared, tiles
from resnet_fast.kernels.triton.classifier import head_kernel
from resnet_fast.kernels.triton.conv import conv_kernel
from resnet_fast.kernels.triton.cost_model import cost
from resnet_fast.kernels.triton.device import interpreted
from resnet_fast.kernels.triton.gemm import gemm_kernel
from resnet_fast.kernels.triton.pool import average_pool_kernel, max_pool_kernel
from resnet_fast.kernels.triton.problem import conv_problem
from resnet_fast.kernels.triton.split_k import add_parts_kernel
from resnet_fast.kernels.triton.tail import tail_kernel
from resnet_fast.kernels.triton.tuning import cudnn, planner

Affine = tuple[torch.Tensor, torch.Tensor]  # scale and shift

_INT32_ELEMENTS = 2**31  # from here on, offsets are computed in 64 bits

_HEAD_TILE = (64, 32, 256, 8)  # pixels, classes, channels, warps of head_kernel: a 7x7 image in one step, on any GPU
_HEAD_READ_AGAIN = 8 * 2**20  # bytes up to which the head is one launch: see classifier.py


class Plan(NamedTuple):
    """One launch, ``kernel[grid](*args, **constants)``, and ``then`` the one that takes its ``workspace``, if any.

    The last of them fills ``output``. ``image`` makes the first argument of x, in a plan that holds for other images of
    the same shapes as well: all other tensors in ``args`` but the residual, the workspace and the output are then made
    of the weights alone (see prepared.py).
    """

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constants: dict[str, Any]
    output: torch.Tensor
    workspace: Optional[torch.Tensor] = None
    image: Optional[Callable[[torch.Tensor], torch.Tensor]] = None
    then: Optional["Plan"] = None

    def run(self) -> torch.Tensor:
        self.start()
        return self.output

    def start(self) -> list[Any]:
        """Launch all; gives the compiled kernels, None for each in the interpreter."""
        # Triton launches on the current device, which need not be the tensors'.
        on_device = torch.cuda.device(self.output.device) if self.output.is_cuda else contextlib.nullcontext()
        with on_device:
            return [plan.kernel[plan.grid](*plan.args, **plan.constants) for plan in self.launches()]

    def launches(self) -> Iterator["Plan"]:
        """Each launch as a plan of its own, in their order."""
        plan: Optional[Plan] = self
        while plan is not None:
            yield plan._replace(then=None)
            plan = plan.then


def conv_bn_act(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    residual: Optional[torch.Tensor],
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    relu: bool,
) -> torch.Tensor:
    """See ``reference.conv_bn_act``."""
    if x.numel() == 0 or weight.numel() == 0:
        return reference.conv_bn_act(x, weight, scale, shift, residual, stride, padding, dilation, groups, relu)
    arguments = (x, weight, scale, shift, residual, stride, padding, dilation, groups, relu)
    if not x.is_cuda:  # the interpreter
        return carry_out(None, *arguments).y
    target = architecture(x.device)
    kernel = (weight.shape[2], weight.shape[3])
    problem = planner.Problem(
        target, x.dtype, precision_of(x.dtype, target), *x.shape, weight.shape[0], kernel, stride, padding, dilation,
        groups, residual is not None, relu,
    )  # fmt: skip
    outcome = carry_out(_choice(problem, x.device), *arguments)
    planner.note(weight, problem, outcome.choice)
    prepared.keep(outcome.call, *arguments)
    return outcome.y


def _choice(problem: planner.Problem, device: torch.device) -> Optional[planner.Candidate]:
    """What was measured to be the fastest, or None."""
    choice = planner.choose(problem, device.index)
    wanted = choice is None and os.environ.get("RESNET_FAST_AUTOTUNE") == "1"
    if wanted and not streams.capturing(device.index):
        from resnet_fast.kernels.triton.tuning import measuring  # which calls back to carry_out

        measuring.measure_and_keep(problem, device)
        choice = planner.choose(problem, device.index)
    return choice


class Outcome(NamedTuple):
    """A result; how to get it again for other images of the same shapes, if that is known; and what served."""

    y: Any
    call: Optional[prepared.Call]
    choice: Optional[planner.Candidate]  # None: our kernel with the table's tile


def carry_out(
    choice: Optional[planner.Candidate],
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    residual: Optional[torch.Tensor],
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    relu: bool,
) -> Outcome:
    """``reference.conv_bn_act`` by ``choice``; with None, or where it cannot hold the weight, by the table's tile."""
    geometry = (stride, padding, dilation, groups)
    if choice is not None and choice.tile is None:
        call = cudnn.prepare(choice.name, x.dtype, weight, scale, shift, geometry, relu, _pointwise)
        if call is not None:
            return Outcome(call(x, residual, scale, shift), call, choice)
        choice = None
    residual = None if residual is None else nhwc(residual)
    tile = None if choice is None else choice.tile
    plan = plan_conv(x, weight, scale, shift, residual, *geometry, relu, architecture(x.device), tile=tile)
    again = prepared.launches_of(list(plan.launches()), plan.start(), residual, scale, shift)
    return Outcome(plan.output, again, choice)


def _pointwise(relu: bool) -> cudnn.Call:
    """``relu(y * scale + shift + residual)`` in one pass, for convolutions of one shape that are not ours."""
    kept: Optional[prepared.Call] = None

    def call(
        y: torch.Tensor, residual: Optional[torch.Tensor], scale: torch.Tensor, shift: torch.Tensor
    ) -> torch.Tensor:
        nonlocal kept
        result = None if kept is None else kept(y, residual, scale, shift)
        if result is not None:
            return result
        residual = None if residual is None else nhwc(residual)
        plan = plan_tail(y, (scale, shift), residual, None, relu, architecture(y.device))
        kept = prepared.launches_of([plan._replace(image=nhwc)], plan.start(), residual, scale, shift)
        return plan.output

    return call


def stem(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """See ``reference.stem``.

    The convolution and the max-pool are two kernels. In one, every pooled pixel would recompute its window's
    convolutions, 2.25 times the products (tiles of pooled pixels share no accumulators in Triton); by the byte and
    instruction counts that costs about what writing and reading the convolution's output does, so the simpler way won.
    """
    if x.numel() == 0 or weight.numel() == 0:
        return reference.stem(x, weight, scale, shift)
    convolution = (x, weight, scale, shift, None, (2, 2), (3, 3), (1, 1), 1, True)
    y = prepared.run(*convolution) if x.is_cuda else None
    return plan_max_pool(conv_bn_act(*convolution) if y is None else y, architecture(x.device)).run()


def global_avg_pool(x: torch.Tensor) -> torch.Tensor:
    """See ``reference.global_avg_pool``."""
    if x.numel() == 0:
        return reference.global_avg_pool(x)
    return plan_average_pool(x, architecture(x.device)).run()


def head(x: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor]) -> torch.Tensor:
    """See ``reference.head``."""
    if x.numel() == 0 or weight.numel() == 0:
        return reference.head(x, weight, bias)
    y = plan_head(x, weight, bias, architecture(x.device)).run()
    return y.squeeze_(3).squeeze_(2)  # not a view, which autograd would not let the caller change in place


def plan_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: Optional[torch.Tensor],
    shift: Optional[torch.Tensor],
    residual: Optional[torch.Tensor],
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    relu: bool,
    target: str,
    prologue: Optional[tuple[torch.Tensor, torch.Tensor]] = None,
    tile: Optional[tiles.Tile] = None,
) -> Plan:
    """A convolution, as a plain matrix product where it is one. ``target`` is the architecture to choose the tile for,
    unless one is given.

    ``prologue``: scale and shift of a batch norm and ReLU that x still has to go through. Without scale and shift of
    its own, the result is stored as it is, and ``workspace [row tiles, 2, K]`` takes its statistics (statistics.py).
    """
    n, c, h, w = x.shape
    k, _, r, s = weight.shape
    p, q = output_size((h, w), (r, s), stride, padding, dilation)
    y = allocate(x, (n, k, p, q))
    if residual is not None:
        residual = nhwc(residual)
    scale, shift, *prologue = (None if v is None else vector(v) for v in (scale, shift, *(prologue or (None, None))))
    precision = precision_of(x.dtype, target)
    statistics = scale is None
    training = statistics or prologue[0] is not None
    problem = conv_problem(
        (n, c, h, w), (k, c, r, s), stride, padding, dilation, groups, precision,
        residual is not None, prologue[0] is not None, statistics,
    )  # fmt: skip
    tile = tile or tiles.pick(target, *problem[:7])
    dot = {"PRECISION": "tf32" if precision == "tf32" else "ieee"}
    inference = {"HAS_RESIDUAL": residual is not None, "RELU": relu, **dot}

    if problem.kind == "1x1":
        x = nhwc(x)
        rows = n * h * w
        packed = pack.weight(weight, x.dtype, 1, 1, tile.reduction)
        if descriptor.refusal(tile, target, precision, x, packed, stride, groups, training) is None:
            operands = (scale, shift, y if residual is None else residual, y)
            constants = {**inference, "INDEX64": index64(x, y)}
            return Plan(*descriptor.gemm(tile, target, x, packed, operands, constants), y, image=nhwc)
        end = _end(tile, ceil_div(c, tile.reduction), y, scale, shift, residual, prologue, relu, target)
        return Plan(
            gemm_kernel,
            (ceil_div(rows, tile.rows) * ceil_div(k, tile.columns), end.parts),
            (x, packed, *end.operands, rows),
            {"C": c, "K": k, **end.constants, **dot, "INDEX64": index64(x, y), **tile.constants()},
            y,
            end.workspace,
            None if training else nhwc,
            end.then,
        )

    if problem.kind == "stem":
        # Few channels: all taps of one kernel row side by side.
        pixel = pack.pixel_width(c)
        packed = pack.row_weight(weight, x.dtype, pixel, tile.reduction)
        image = _padded(padding)
        x = image(x)
        h = x.shape[1]
        row, row_unit = x.shape[2] * pixel, pack.ROW_UNIT
        c, s, padding = s * pixel, 1, (0, 0)
    else:
        x, image = nhwc(x), nhwc
        pixel, row, row_unit = c, w * c, c
        merge = pack.merged(groups, c // groups)
        groups_before, groups = groups, groups // merge
        c, k = c // groups, k // groups
        packed = pack.weight(weight, x.dtype, groups_before, merge, tile.reduction)
        if descriptor.refusal(tile, target, precision, x, packed, stride, groups, training) is None:
            operands = (scale, shift, y if residual is None else residual, y)
            constants = {**inference, "INDEX64": index64(x, y)}
            return Plan(
                *descriptor.conv(tile, target, x, packed, operands, padding, dilation, constants), y, image=nhwc
            )
    end = _end(tile, r * s * ceil_div(c, tile.reduction), y, scale, shift, residual, prologue, relu, target)
    return Plan(
        conv_kernel,
        (ceil_div(n * p * q, tile.rows) * ceil_div(k, tile.columns), groups, end.parts),
        (x, packed, *end.operands, n, h, w, row // row_unit, p, q),
        {
            "C": c,
            "K": k,
            "GROUPS": groups,
            "R": r,
            "S": s,
            "STRIDE_H": stride[0],
            "STRIDE_W": stride[1],
            "PAD_H": padding[0],
            "PAD_W": padding[1],
            "DILATION_H": dilation[0],
            "DILATION_W": dilation[1],
            "PIXEL": pixel,
            "ROW_UNIT": row_unit,
            **end.constants,
            **dot,
            "INDEX64": index64(x, y),
            **tile.constants(),
        },
        y,
        end.workspace,
        None if training else image,
        end.then,
    )


def _padded(padding: Pair) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: pack.pixels(x, padding)


class _End(NamedTuple):
    """What a convolution's launch does with its tiles: its operands from ``scale`` to ``partials``, and their flags."""

    operands: tuple[Optional[torch.Tensor], ...]
    constants: dict[str, Any]
    parts: int
    workspace: Optional[torch.Tensor] = None
    then: Optional[Plan] = None


def _end(
    tile: tiles.Tile,
    steps: int,
    y: torch.Tensor,
    scale: Optional[torch.Tensor],
    shift: Optional[torch.Tensor],
    residual: Optional[torch.Tensor],
    prologue: Sequence[Optional[torch.Tensor]],
    relu: bool,
    target: str,
) -> _End:
    """``steps``: of the loop over taps and channels, which ``tile.parts`` is to cut.

    Not into more parts than steps; and none is left empty, so that ten steps make five parts of two, not six. Training
    keeps it whole: statistics are of finished tiles, and its batches fill the GPU.
    """
    k = y.shape[1]
    rows = y.numel() // k
    statistics = scale is None
    constants = {
        "PROLOGUE": prologue[0] is not None,
        "STATISTICS": statistics,
        "HAS_RESIDUAL": residual is not None,
        "RELU": relu,
        "PARTS": 1,
    }
    parts = 1 if statistics or prologue[0] is not None else cost.parts_of(steps, tile.parts)
    if parts > 1:
        sums = allocate_floats(y, (parts, rows, k))
        constants |= {"HAS_RESIDUAL": False, "RELU": False, "PARTS": parts}
        then = _plan_add_parts(sums, scale, shift, residual, y, relu, target)
        return _End((None, None, None, sums, None, None, None), constants, parts, sums, then)
    partials = allocate_floats(y, (ceil_div(rows, tile.rows), 2, k)) if statistics else None
    return _End(
        (scale, shift, y if residual is None else residual, y, *prologue, partials), constants, parts, partials
    )  # fmt: skip


def _plan_add_parts(
    parts: torch.Tensor,
    scale: Optional[torch.Tensor],
    shift: Optional[torch.Tensor],
    residual: Optional[torch.Tensor],
    y: torch.Tensor,
    relu: bool,
    target: str,
) -> Plan:
    """``y = relu(sum(parts) * scale + shift + residual)``, parts ``[n, N * P * Q, K]``."""
    count, rows, k = parts.shape
    data = tiles.load(target)
    bm, bn, warps = data["pointwise"]
    # There is little to do: rather small programs than idle multiprocessors, down to 16 bytes a thread.
    threads = warps * (64 if target.startswith("gfx") else 32)
    while bm * bn > 4 * threads and ceil_div(rows, bm) * ceil_div(k, bn) < data["multiprocessors"]:
        bm //= 2
    return Plan(
        add_parts_kernel,
        (ceil_div(rows, bm), ceil_div(k, bn)),
        (parts, scale, shift, residual, y, count, rows),
        {
            "K": k,
            "HAS_RESIDUAL": residual is not None,
            "RELU": relu,
            "INDEX64": index64(y, y),
            "BM": bm,
            "BN": bn,
            "num_warps": warps,
        },
        y,
    )


def plan_tail(
    y: torch.Tensor,
    affine: Affine,
    residual: Optional[torch.Tensor],
    residual_affine: Optional[Affine],
    relu: bool,
    target: str,
) -> Plan:
    """``relu(y * scale + shift + residual)``, the residual through an affine map of its own if there is one."""
    y = nhwc(y)
    out = allocate(y, tuple(y.shape))
    rows, c = y.numel() // y.shape[1], y.shape[1]
    bm, bn, warps = tiles.load(target)["tail"]
    return Plan(
        tail_kernel,
        (ceil_div(rows, bm), ceil_div(c, bn)),
        (
            y,
            *map(vector, affine),
            None if residual is None else nhwc(residual),
            *((None, None) if residual_affine is None else map(vector, residual_affine)),
            out,
            rows,
        ),
        {
            "C": c,
            "HAS_RESIDUAL": residual is not None,
            "RESIDUAL_AFFINE": residual_affine is not None,
            "RELU": relu,
            "INDEX64": index64(y, y),
            "BM": bm,
            "BN": bn,
            "num_warps": warps,
        },
        out,
    )


def plan_max_pool(x: torch.Tensor, target: str, prologue: Optional[tuple[torch.Tensor, torch.Tensor]] = None) -> Plan:
    """3x3, stride 2, padding 1, of x or of ``relu(x * scale + shift)``."""
    x = nhwc(x)
    scale, shift = (None, None) if prologue is None else map(vector, prologue)
    n, c, h, w = x.shape
    p, q = (h - 1) // 2 + 1, (w - 1) // 2 + 1
    y = allocate(x, (n, c, p, q))
    bm, bn, warps = tiles.load(target)["max_pool"]
    return Plan(
        max_pool_kernel,
        (ceil_div(n * p * q, bm), ceil_div(c, bn)),
        (x, scale, shift, y, n, h, w, p, q),
        {
            "C": c,
            "PROLOGUE": prologue is not None,
            "INDEX64": index64(x, y),
            "BM": bm,
            "BN": bn,
            "num_warps": warps,
        },
        y,
    )


def plan_average_pool(x: torch.Tensor, target: str) -> Plan:
    x = nhwc(x)
    n, c, h, w = x.shape
    y = allocate(x, (n, c, 1, 1))
    bm, bn, warps = tiles.load(target)["average_pool"]
    return Plan(
        average_pool_kernel,
        (n, ceil_div(c, bn)),
        (x, y, h * w),
        {"C": c, "INDEX64": index64(x, y), "BM": bm, "BN": bn, "num_warps": warps},
        y,
    )


def plan_head(x: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor], target: str) -> Plan:
    """Global average pool and fully connected layer: ``output [N, K, 1, 1]``. In one launch or two: classifier.py."""
    x = nhwc(x)
    n, c, h, w = x.shape
    k = weight.shape[0]
    bm, bn, bc, warps = _HEAD_TILE
    read_again = (ceil_div(k, bn) - 1) * x.nbytes + (n - 1) * k * c * x.element_size()
    if read_again > _HEAD_READ_AGAIN:
        pool = plan_average_pool(x, target)
        ones, zeros = pack.constants(weight)
        conv = plan_conv(
            pool.output, pack.as_conv(weight), ones, zeros if bias is None else pack.vector(bias), None,
            (1, 1), (0, 0), (1, 1), 1, False, target,
        )  # fmt: skip
        return pool._replace(output=conv.output, workspace=pool.output, then=conv)
    y = allocate(x, (n, k, 1, 1))
    bn = min(bn, max(16, tiles.power_of_two(k)))
    bc = min(bc, max(16, tiles.power_of_two(c)))
    return Plan(
        head_kernel,
        (ceil_div(k, bn), n),
        (x, pack.matrix(weight, x.dtype), None if bias is None else pack.vector(bias), y, h * w),
        {
            "C": c,
            "K": k,
            "HAS_BIAS": bias is not None,
            "INDEX64": index64(x, y),
            "BM": bm,
            "BN": bn,
            "BC": bc,
            "num_warps": warps,
        },
        y,
    )


def allocate(x: torch.Tensor, shape: tuple[int, ...], dtype: Optional[torch.dtype] = None) -> torch.Tensor:
    """An output in NHWC, like ``x`` or of another dtype."""
    return torch.empty(shape, dtype=dtype or x.dtype, device=x.device, memory_format=torch.channels_last)


def allocate_floats(x: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Statistics or a workspace of a launch over ``x``, float32."""
    return torch.empty(shape, dtype=torch.float32, device=x.device)


def architecture(device: torch.device) -> str:
    """``"sm_90"``, ``"gfx942"``, or ``"interpreter"``."""
    if interpreted():
        return "interpreter"
    return _architecture(device.index if device.index is not None else torch.cuda.current_device())


@functools.cache
def _architecture(index: int) -> str:
    if torch.version.hip:
        return torch.cuda.get_device_properties(index).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


def precision_of(dtype: torch.dtype, target: str) -> str:
    """Which list of tiles: float32 goes through TF32 where PyTorch's own convolutions would."""
    if dtype != torch.float32:
        return "half"
    return "tf32" if target.startswith("sm_") and torch.backends.cudnn.conv.fp32_precision == "tf32" else "ieee"


def nhwc(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def vector(v: torch.Tensor) -> torch.Tensor:
    return v.detach().contiguous()


def index64(x: torch.Tensor, y: torch.Tensor) -> bool:
    return max(x.numel(), y.numel()) >= _INT32_ELEMENTS


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)
