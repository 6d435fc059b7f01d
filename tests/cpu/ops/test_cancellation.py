"""A training step's host waits for no GPU. There is none: fake tensors are on it, which nobody can read."""

import gc
from typing import ClassVar
from weakref import WeakKeyDictionary

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from resnet_fast.kernels import streams
from resnet_fast.kernels.contract import Geometry
from resnet_fast.kernels.reference import training as reference
from resnet_fast.ops import block_backward, block_forward, cancellation
from resnet_fast.ops.block import Block, Layer
from resnet_fast.ops.block_backward import Wanted
from tests.fake_gpu import on_gpu


class Reading:
    """Of ``cancellation._Reading``: what arrives, in turn."""

    arriving: ClassVar[list[bool]] = []

    def start(self, flag):
        pass

    def value(self):
        return self.arriving.pop(0) if self.arriving else False


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(cancellation, "_Reading", Reading)
    monkeypatch.setattr(cancellation, "_weights", WeakKeyDictionary())
    monkeypatch.setattr(streams, "capturing", lambda index: False)
    Reading.arriving = []


def _bottleneck() -> Block:
    def layer(k: int, c: int, r: int) -> Layer:
        vector = torch.ones(k, device="cuda")
        weight = torch.ones(k, c, r, r, device="cuda")
        return Layer(weight, vector, vector, 1e-5, Geometry((1, 1), (r // 2, r // 2)), True)

    layers = (layer(8, 16, 1), layer(8, 8, 3), layer(32, 8, 1), layer(32, 16, 1))
    return Block(layers, identity=False, projection=True, relu=True, pool=False, process_group="")


def _step(block: Block) -> None:
    x = torch.ones(4, 16, 9, 9, device="cuda").contiguous(memory_format=torch.channels_last)
    result = block_forward.forward(block, x, None, lambda case: reference)
    wanted = Wanted(True, False, (True,) * 4, (True,) * 4)
    block_backward.backward(block, result.out, x, None, result.out, result.saved, wanted, lambda case: reference)


@pytest.mark.skipif(
    torch.__version__ < "2.9" and not torch.cuda.is_available(),
    reason="PyTorch 2.8 asks CUDA's driver for the memory of a fake tensor",
)
@pytest.mark.parametrize("cancels", [False, True])
def test_only_the_first_step_reads_from_the_gpu(cancels, gpu, monkeypatch):
    with FakeTensorMode():
        block = _bottleneck()
        with pytest.raises(DataDependentOutputException, match="_local_scalar_dense"):
            _step(block)
        truth = torch.Tensor.__bool__
        with monkeypatch.context() as first:
            first.setattr(torch.Tensor, "__bool__", lambda flag: not flag.is_cuda and truth(flag))
            _step(block)
        Reading.arriving = [cancels] * 2
        _step(block)
        assert not Reading.arriving, "both expand layers asked"


def _calls(weight: torch.Tensor, *flags: bool) -> list[bool]:
    """The decisions of calls that find these."""
    found = []
    for flag in flags:
        found.append(cancellation.cancelled(on_gpu(torch.tensor(flag)), weight))
        Reading.arriving = [flag]
    return found


def test_the_call_before_decides_and_the_first_for_itself(gpu, monkeypatch):
    monkeypatch.setattr(cancellation, "CALLS", 3)
    assert _calls(torch.ones(4), False, False, True, False, False, False, False) == [False] * 3 + [True] * 3 + [False]
    assert _calls(torch.ones(4), True, False, False, False, False) == [True] * 4 + [False]
    assert _calls(torch.ones(4), True, False, True, False, False, False, False) == [True] * 6 + [False]


def test_each_weight_has_its_own_while_its_memory_lives(gpu):
    both = torch.ones(2, 4)
    assert _calls(both[0], True) == [True]
    Reading.arriving = []
    assert _calls(both[1], False) == [False]
    assert _calls(both[0], False) == [True]
    del both
    gc.collect()
    assert not cancellation._weights


def test_a_capture_waits_for_nobody(gpu, monkeypatch):
    weight = torch.ones(4)
    monkeypatch.setattr(streams, "capturing", lambda index: True)
    assert _calls(weight, False) == [True], "what is always right, as long as nothing is known"
    monkeypatch.setattr(streams, "capturing", lambda index: False)
    assert _calls(weight, False) == [False]
    monkeypatch.setattr(streams, "capturing", lambda index: True)
    assert _calls(weight, True) == [False]


def test_on_a_cpu_each_call_decides_for_itself():
    weight = torch.ones(4)
    assert [cancellation.cancelled(torch.tensor(flag), weight) for flag in (True, False, True)] == [True, False, True]
    assert weight.untyped_storage() not in cancellation._weights


def test_a_flag_is_copied_behind_its_kernels_and_only_the_copy_is_waited_for(monkeypatch):
    log = []

    class Event:
        def record(self, stream):
            log.append(f"recorded on {stream}")

        def synchronize(self):
            log.append("waited for")

    class Host:
        def copy_(self, flag, non_blocking):
            log.append(f"copied, {non_blocking=}")
            self.flag = flag

        def __bool__(self):
            return bool(self.flag)

    monkeypatch.setattr(torch, "empty", lambda shape, dtype, pin_memory: Host() if pin_memory else None)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"a stream of {device}")
    reading = cancellation._Reading()
    reading.start(on_gpu(torch.tensor(True)))
    assert reading.value() is True
    assert log == ["copied, non_blocking=True", "recorded on a stream of cuda:0", "waited for"]
