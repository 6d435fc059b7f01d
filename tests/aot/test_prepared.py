"""Prepared calls, on a GPU that is not there (``tests/fake_gpu.py``): what would be started, and when it is not."""

import gc
import sys
import weakref

import pytest
import torch

from resnet_fast import ops
from resnet_fast.kernels import packing
from resnet_fast.kernels.contract import Affine
from resnet_fast.kernels.reference import inference as reference
from resnet_fast.kernels.triton import descriptor, forward, prepared, tiles
from resnet_fast.kernels.triton.plan import Plan
from resnet_fast.kernels.triton.problem import conv_problem
from resnet_fast.kernels.triton.tail import plan_tail
from resnet_fast.kernels.triton.tiles import Tile
from resnet_fast.kernels.triton.tuning import cudnn, planner
from resnet_fast.utils import compat
from tests import fake_gpu
from tests.fake_gpu import on_gpu

_FLAGS = ((1, 1), (1, 1), 1, True)


class Conv:
    """Tensors of a convolution on the fake GPU: 64 -> 64 channels at 8x8 in float16, unless told otherwise."""

    def __init__(self, kernel: int = 3, k: int = 64, c: int = 64, residual: bool = False) -> None:
        self.padding = (kernel // 2, kernel // 2)
        self.x = image(c)
        self.weight = on_gpu(torch.randn(k, c, kernel, kernel).half())
        self.scale, self.shift = on_gpu(torch.rand(k) + 0.5), on_gpu(torch.randn(k))
        self.residual = image(k) if residual else None

    def arguments(self) -> tuple:
        tensors = (self.x, self.weight, self.scale, self.shift, self.residual)
        return (*tensors, (1, 1), self.padding, *_FLAGS[1:])

    def call(self) -> torch.Tensor:
        return ops.inference._conv_bn_act(*self.arguments())

    def started(self, gpu: fake_gpu.Driver) -> fake_gpu.Started:
        """Of one call, which gives a result of the right shape and layout."""
        gpu.started = []
        y = self.call()
        assert y.shape == (self.x.shape[0], self.weight.shape[0], *self.x.shape[2:])
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert len(gpu.started) == 1
        return gpu.started[0]


def image(c: int, h: int = 8) -> torch.Tensor:
    return on_gpu(torch.randn(1, c, h, h).half().contiguous(memory_format=torch.channels_last))


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    monkeypatch.setattr(planner, "machine", lambda index: "a fake GPU")
    monkeypatch.setattr(descriptor, "_multiprocessors", lambda device: 132)
    with fake_gpu.installed() as driver, torch.no_grad():
        yield driver
    prepared._kept.clear()


def was_prepared(started: fake_gpu.Started) -> bool:
    """Triton's own path passes tensors, and its empty chains of hooks."""
    return started.hooks == (None, None) and not any(isinstance(one, torch.Tensor) for one in started.arguments)


def calls(conv: Conv) -> list:
    return [kept.call for kept in prepared._kept[conv.weight.data_ptr()].calls.values()]


def addresses(started: fake_gpu.Started) -> list:
    return [one.data_ptr() if isinstance(one, torch.Tensor) else one for one in started.arguments]


@pytest.mark.parametrize("conv", [{"kernel": 1, "k": 256, "residual": True}, {}, {"c": 3}], ids=str)
def test_the_second_call_starts_what_the_first_did(conv, gpu):
    conv = Conv(**conv)
    first, second = conv.started(gpu), conv.started(gpu)
    assert not was_prepared(first)
    assert was_prepared(second)
    assert (second.grid, second.stream, second.function) == (first.grid, first.stream, first.function)
    differ = [i for i, (one, other) in enumerate(zip(addresses(first), addresses(second), strict=True)) if one != other]
    # Only what is allocated in the call: the output, and the padded image where there are few channels.
    output = {4, 5} if conv.residual is None else {5}
    assert set(differ) <= (output | {0} if conv.x.shape[1] == 3 else output)
    if conv.x.shape[1] == 64:
        assert second.arguments[0] == conv.x.data_ptr()
    if conv.residual is not None:
        assert second.arguments[4] == conv.residual.data_ptr()


def test_other_images_of_the_same_shape(gpu):
    conv = Conv(1, 256, residual=True)
    conv.call()
    conv.x, conv.residual = image(64), image(256)
    started = conv.started(gpu)
    assert was_prepared(started)
    assert (started.arguments[0], started.arguments[4]) == (conv.x.data_ptr(), conv.residual.data_ptr())
    conv.x = on_gpu(conv.x.contiguous())  # NCHW: converted first
    assert was_prepared(started := conv.started(gpu))
    assert started.arguments[0] != conv.x.data_ptr()


@pytest.mark.skipif(not compat.has_descriptors(), reason="this Triton has no tensor descriptors that serve")
@pytest.mark.parametrize("kernel", [1, 3])
def test_descriptors_of_other_images(kernel, gpu):
    """What Triton encodes again in every call: the image's address is the new one's, all else stays."""
    conv = Conv(kernel, residual=True)
    x, weight = conv.x, conv.weight
    problem = conv_problem(x.shape, weight.shape, (1, 1), conv.padding, (1, 1), 1, "half")
    tiles.override("sm_90", {problem: Tile(64, 64, 64, 4, 4, False, "descriptors")})
    try:
        first = conv.started(gpu)
        conv.x = image(64)
        second = conv.started(gpu)
        conv.x = on_gpu(torch.randn(1, 64 * 64 + 1).half()[0, 1:].view(1, 8, 8, 64).permute(0, 3, 1, 2))
        odd_address = conv.started(gpu)
    finally:
        tiles.override("sm_90", {})
    assert "descriptor_kernel" in first.function
    assert was_prepared(second)
    assert not was_prepared(odd_address)
    (image_before, *before), (image_now, *now) = (descriptors(one) for one in (first, second))
    assert image_before[1] == x.data_ptr()
    assert image_now[1] not in (image_before[1], conv.x.data_ptr())
    assert (image_before[0], *image_before[2:]) == (image_now[0], *image_now[2:])
    assert before == now and len(now) == 1
    assert conv.residual.data_ptr() in second.arguments


def descriptors(started: fake_gpu.Started) -> list[tuple]:
    return [one for one in started.arguments if isinstance(one, tuple) and one[0] == "descriptor"]


def test_the_residual_may_be_the_image(gpu):
    conv = Conv()
    conv.residual = conv.x
    conv.call()
    conv.residual = conv.x = image(64)
    started = conv.started(gpu)
    assert was_prepared(started)
    assert started.arguments[0] == started.arguments[4] == conv.x.data_ptr()
    conv.residual = image(64)
    started = conv.started(gpu)
    assert (started.arguments[0], started.arguments[4]) == (conv.x.data_ptr(), conv.residual.data_ptr())


def test_several_launches_with_a_workspace(gpu):
    """Of which the second takes what the first leaves in a workspace, and the residual."""
    conv = Conv(residual=True)
    x, weight, scale, shift, residual, *flags = conv.arguments()
    first = forward.plan_conv_bn_act(x, weight, scale, shift, None, *flags, "sm_90")
    last = plan_tail(first.result, Affine(scale, shift), residual, None, True, "sm_90")
    both = Plan((*first.launches, *last.launches), last.result, (first.result,), first.image)
    gpu.started = []
    call = prepared.launches_of(both, both.start(), residual, scale, shift)
    ordinary = [addresses(one) for one in gpu.started]
    gpu.started = []
    conv.residual = image(64)
    y = call(conv.x, conv.residual, scale, shift)
    again = [one.arguments for one in gpu.started]
    assert y.shape == last.result.shape and y.stride() == last.result.stride()
    assert all(was_prepared(one) for one in gpu.started)
    assert again[0][0] == conv.x.data_ptr()
    workspace = again[0][5]
    assert workspace == again[0][4] == again[1][0] != first.result.data_ptr()
    assert (again[1][3], again[1][6]) == (conv.residual.data_ptr(), y.data_ptr())
    for before, after, moved in zip(ordinary, again, ({0, 4, 5}, {0, 3, 6}), strict=True):
        assert [i for i in range(len(before)) if before[i] != after[i] and i not in moved] == []
    # What the plans do not account for is not prepared: here the residual.
    assert prepared.launches_of(first, first.start(), residual, scale, shift) is None
    assert prepared.launches_of(first._replace(image=None), first.start(), None, scale, shift) is None


def _fused_step(conv: Conv) -> None:
    parameter = torch.nn.Parameter(torch.ones(1))
    parameter.grad = torch.ones(1)
    torch.optim.SGD([parameter], 0.1).step()  # of anything: fused ones leave no trace in a version


CHANGES = {
    "weight in place": lambda conv: conv.weight.mul_(2),
    "another weight": lambda conv: setattr(conv, "weight", on_gpu(conv.weight.clone())),
    "scale of another dtype": lambda conv: setattr(conv, "scale", on_gpu(conv.scale.double())),
    "shift with gaps": lambda conv: setattr(conv, "shift", on_gpu(conv.shift.repeat(2)[::2])),
    "memory of the weight": lambda conv: conv.weight.set_(conv.weight.clone()),
    "an optimiser's step": _fused_step,
    "packing.clear_all": lambda conv: packing.clear_all(),
    "the planner": lambda conv: planner.changed(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_nothing_stale_is_used(change, gpu):
    conv = Conv()
    conv.call()
    before = conv.started(gpu)
    assert was_prepared(before)
    alive = calls(conv), conv.shift  # so that no address is taken again
    CHANGES[change](conv)
    assert not was_prepared(conv.started(gpu)), "decided anew"
    after = conv.started(gpu)
    # What has to be copied in every call is not prepared.
    assert was_prepared(after) == (change != "shift with gaps")
    if change in ("weight in place", "another weight"):
        assert after.arguments[1] != before.arguments[1], "packed again"
    assert alive


VECTORS = {
    "in place": lambda conv: (conv.scale.mul_(2), conv.shift.mul_(2)),
    "memory": lambda conv: (conv.scale.set_(conv.scale.clone()), conv.shift.set_(conv.shift.clone())),
    "others": lambda conv: vars(conv).update(scale=on_gpu(conv.scale.clone()), shift=on_gpu(conv.shift.clone())),
}


@pytest.mark.parametrize("change", VECTORS)
@pytest.mark.parametrize("parts", [1, 3])
def test_scale_and_shift_are_those_of_the_call(parts, change, gpu, monkeypatch):
    """Where gradients are enabled, or in a compiled model, a batch norm is folded into new ones in every call."""
    if parts > 1:
        tile = tiles.pick("sm_90", "half", 64, 64, 64, 1, "rxs", 9)
        monkeypatch.setattr(tiles, "pick", lambda *problem: tile._replace(parts=parts))
    conv = Conv()
    conv.call()
    alive = conv.scale, conv.shift
    for _ in range(3):
        VECTORS[change](conv)
        gpu.started = []
        conv.call()
        assert all(was_prepared(one) for one in gpu.started)
        assert len(gpu.started) == (1 if parts == 1 else 2)
        place = {1: 2, 3: 1}[parts]
        assert gpu.started[-1].arguments[place : place + 2] == (conv.scale.data_ptr(), conv.shift.data_ptr())
    assert alive


def test_scale_and_shift_without_a_version(gpu):
    """As a model makes them that is compiled under ``torch.inference_mode``."""
    conv = Conv()
    for prepared_by_now in (False, True, True):
        with torch.inference_mode():
            conv.scale, conv.shift = on_gpu(torch.rand(64)), on_gpu(torch.rand(64))
        started = conv.started(gpu)
        assert was_prepared(started) == prepared_by_now
        assert addresses(started)[2:4] == [conv.scale.data_ptr(), conv.shift.data_ptr()]


def test_scale_and_shift_of_the_wrong_shape_are_refused(gpu):
    conv = Conv()
    conv.call()
    conv.scale = on_gpu(torch.ones(65))
    with pytest.raises(RuntimeError, match="scale has shape"):
        conv.call()
    conv.scale = torch.ones(64)
    with pytest.raises(RuntimeError, match="scale is on cpu"):
        conv.call()


def test_scale_and_shift_are_not_kept_alive():
    conv = Conv()
    conv.call()
    scale = weakref.ref(conv.scale)
    conv.scale = on_gpu(torch.rand(64))
    gc.collect()
    assert scale() is None


def test_cudnns_fused_op_is_bound_to_scale_and_shift(gpu, monkeypatch, tmp_path):
    """Which are in the weight that it holds."""
    monkeypatch.setenv("RESNET_FAST_CACHE", str(tmp_path))
    planner.choices.forget()
    p = planner.Problem(
        "sm_90", torch.float16, "half", 1, 64, 8, 8, 64, (3, 3), (1, 1), (1, 1), (1, 1), 1, False, relu=True
    )
    planner.keep(0, {p.key(): cudnn.FUSED})
    weights = []

    def fused(x, weight, bias, *rest):
        weights.append((weight, bias))
        return torch.zeros(1, 64, 8, 8, dtype=x.dtype)

    monkeypatch.setattr(torch, "cudnn_convolution_relu", fused)
    conv = Conv()
    conv.call()
    conv.call()
    assert weights[1][0] is weights[0][0]
    torch.testing.assert_close(weights[-1][1], conv.shift.half(), check_device=False)
    expected = (conv.weight.as_subclass(torch.Tensor).float() * conv.scale.view(-1, 1, 1, 1)).half()
    torch.testing.assert_close(weights[-1][0], expected)

    # With others, the weight is not folded again: a pass after cuDNN's convolution reads those of the call.
    monkeypatch.setattr(cudnn, "fold", None)
    for number, change in enumerate(VECTORS.values()):
        change(conv)
        started = conv.started(gpu)
        assert started.function == "tail_kernel on 0"
        assert {conv.scale.data_ptr(), conv.shift.data_ptr()} <= set(addresses(started))
        assert was_prepared(started) == (number > 0)
    assert len(weights) == 2
    planner.choices.forget()


def test_a_weight_that_dies_takes_its_calls_along():
    conv = Conv()
    conv.call()
    packed = weakref.ref(calls(conv)[0])
    del conv
    gc.collect()
    assert not prepared._kept
    assert packed() is None


def test_calls_are_found_by_all_that_decides_a_launch(gpu):
    conv = Conv()
    conv.weight = on_gpu(conv.weight.float())  # which serves images of every precision
    conv.call()
    conv.x = image(64, 10)
    assert not was_prepared(conv.started(gpu))
    conv.residual = image(64, 10)
    assert not was_prepared(conv.started(gpu))
    gpu.started = []
    ops.inference._conv_bn_act(*conv.arguments()[:-1], False)
    assert not was_prepared(gpu.started[0])
    conv.x, conv.residual = on_gpu(conv.x.bfloat16()), None
    assert not was_prepared(conv.started(gpu))
    assert len(prepared._kept[conv.weight.data_ptr()].calls) == 5


def test_many_sizes_are_not_kept_for_ever(monkeypatch):
    monkeypatch.setattr(prepared, "_CALLS_KEPT", 2)
    conv = Conv()
    for size in (8, 9, 10, 11):
        conv.x = image(64, size)
        conv.call()
        assert len(prepared._kept[conv.weight.data_ptr()].calls) <= 2


def test_arguments_are_checked_as_ever(gpu):
    conv = Conv(residual=True)
    conv.call()
    conv.residual = image(64, 9)
    with pytest.raises(RuntimeError, match="residual has shape"):
        conv.call()
    conv.residual = torch.zeros(1, 64, 8, 8).half()
    with pytest.raises(RuntimeError, match="residual is on cpu"):
        conv.call()
    conv.residual, conv.x = None, image(32)
    with pytest.raises(RuntimeError, match="32 channels"):
        conv.call()


def test_the_implementation_that_is_asked_for(monkeypatch, gpu):
    conv = Conv()
    conv.call()
    monkeypatch.setenv("RESNET_FAST_IMPLEMENTATION", "reference")
    gpu.started = []
    y = conv.call()
    assert not gpu.started
    plain = [None if t is None else t.as_subclass(torch.Tensor) for t in conv.arguments()[:5]]
    torch.testing.assert_close(y, reference.conv_bn_act(*plain, *conv.arguments()[5:]), check_device=False)
    monkeypatch.delenv("RESNET_FAST_IMPLEMENTATION")
    assert was_prepared(conv.started(gpu))


def test_an_unaligned_image_takes_the_kernel_for_unaligned_ones(gpu):
    conv = Conv()
    conv.call()
    memory = torch.zeros(64 * 64 + 4, dtype=torch.float16)
    view = memory[4:].view(1, 8, 8, 64).permute(0, 3, 1, 2)
    assert view.data_ptr() % 16 == 8
    conv.x = on_gpu(view)
    started = conv.started(gpu)
    assert not was_prepared(started)
    assert started.arguments[0].data_ptr() == conv.x.data_ptr()
    # What was compiled for it is not kept for aligned ones either.
    conv.x = image(64)
    assert was_prepared(conv.started(gpu))


def test_launch_hooks_are_called(gpu, monkeypatch):
    from triton import knobs

    conv = Conv()
    conv.call()
    seen = []
    enter, leave = lambda metadata: seen.append(metadata.get()["name"]), lambda metadata: seen.append("over")
    with monkeypatch.context() as hooks:
        hooks.setattr(knobs.runtime, "launch_enter_hook", enter)
        hooks.setattr(knobs.runtime, "launch_exit_hook", leave)
        conv.call()
    assert seen == ["conv_kernel", "over"]
    assert was_prepared(conv.started(gpu))


def test_the_current_stream_of_the_tensors_device(gpu, monkeypatch):
    conv = Conv()
    conv.call()
    gpu.stream = 77
    assert conv.started(gpu).stream == 77
    entered = []

    class Guard:
        def __init__(self, index: int) -> None:
            self.index = index

        def __enter__(self) -> None:
            entered.append(self.index)
            gpu.device = self.index

        def __exit__(self, *exception: object) -> None:
            gpu.device = 1

    monkeypatch.setattr(torch.cuda, "device", Guard)
    gpu.device = 1  # current, while the tensors are on GPU 0
    assert was_prepared(conv.started(gpu))
    assert entered == [0]
    assert gpu.device == 1


def test_tensors_without_a_version_are_decided_anew_every_time(gpu):
    with torch.inference_mode():
        conv = Conv()
        conv.call()
        assert not was_prepared(conv.started(gpu))
    assert not prepared._kept


@pytest.mark.parametrize("residual", [False, True])
def test_a_measured_choice_serves_at_once_and_is_prepared(residual, gpu, monkeypatch, tmp_path):
    monkeypatch.setenv("RESNET_FAST_CACHE", str(tmp_path))
    planner.choices.forget()
    conv = Conv(residual=residual)
    conv.call()
    p = planner.Problem(
        "sm_90", torch.float16, "half", 1, 64, 8, 8, 64, (3, 3), (1, 1), (1, 1), (1, 1), 1, residual, relu=True
    )
    (table, first), *others = planner.candidates(p).items()
    assert planner.served(conv.weight) == f"{table} (table)"
    tile = next(name for name, other in others if other.tile[:3] != first.tile[:3])
    before = conv.started(gpu)
    planner.keep(0, {p.key(): tile})
    other = conv.started(gpu)
    assert not was_prepared(other)
    assert other.arguments[-4:-1] != before.arguments[-4:-1], "another tile"
    assert was_prepared(conv.started(gpu))
    assert planner.served(conv.weight) == f"{tile} (measured)"

    # PyTorch's convolution, on the CPU here, and our pass after it.
    planner.keep(0, {p.key(): cudnn.POINTWISE})
    started = conv.started(gpu)
    assert started.function == "tail_kernel on 0"
    assert not was_prepared(started)
    started = conv.started(gpu)
    assert was_prepared(started)
    if residual:
        assert started.arguments[3] == conv.residual.data_ptr()

    calls = []

    def fused(x, weight, *rest):
        calls.append(x)
        return torch.zeros(1, 64, 8, 8, dtype=x.dtype)

    monkeypatch.setattr(torch, f"cudnn_convolution{'_add' if residual else ''}_relu", fused)
    planner.keep(0, {p.key(): cudnn.FUSED})
    for _ in range(2):
        gpu.started = []
        conv.call()
        assert not gpu.started
    assert len(calls) == 2
    packing.clear_all()
    conv.scale.mul_(1e-9)  # too small for float16: our kernel serves
    assert not was_prepared(conv.started(gpu))
    assert planner.served(conv.weight).endswith("(table)")
    planner.choices.forget()


def test_tune_sees_what_is_prepared_too(gpu):
    conv = Conv()
    conv.call()
    with planner.recorded() as problems:
        conv.call()
    assert [(one.k, one.h, one.relu, one.architecture) for one in problems] == [(64, 8, True, "sm_90")]


def test_packs_of_prepared_calls_are_held_for_a_graph():
    conv = Conv()
    conv.call()
    with packing.held() as packs:
        conv.call()
    (call,) = calls(conv)
    assert packs == [call, conv.scale, conv.shift]


def test_a_prepared_call_is_little_python(gpu):
    """Counted, not timed: Python functions that are entered. ``benchmarks/launch_overhead.py`` has the microseconds."""
    conv, count = Conv(), 0
    gpu.started = None

    def note(frame, event, argument):
        nonlocal count
        count += event == "call"

    def entered() -> int:
        nonlocal count
        count = 0
        sys.setprofile(note)
        try:
            conv.call()
        finally:
            sys.setprofile(None)
        return count

    first, second = entered(), entered()
    # The test's two; the op, run, _key, _state, takes, order, the call and its layout; Triton's launcher and all that
    # it asks; the fake driver's own four.
    assert second <= 21
    assert first > 10 * second
