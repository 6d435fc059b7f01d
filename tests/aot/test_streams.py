"""What one stream made and another uses, on a GPU that is not there (``tests/fake_gpu.py``)."""

import pytest
import torch

from resnet_fast import ops
from resnet_fast.kernels import packing, streams
from resnet_fast.kernels.packing import PackCache
from resnet_fast.kernels.triton import prepared
from resnet_fast.kernels.triton.tuning import cudnn, planner
from tests import fake_gpu
from tests.fake_gpu import on_gpu

A, B, C = 11, 12, 13  # streams


@pytest.fixture(autouse=True)
def gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(planner, "machine", lambda index: "a fake GPU")
    monkeypatch.setenv("RESNET_FAST_CACHE", str(tmp_path))
    planner.choices.forget()
    with fake_gpu.installed() as driver, torch.no_grad():
        driver.stream = A
        yield driver
    prepared._kept.clear()
    planner.choices.forget()


class Packs:
    """A cache with one weight, of which a pack is made."""

    def __init__(self) -> None:
        self.cache, self.made = PackCache(), 0
        self.weight = on_gpu(torch.randn(8, 8))

    def get(self):
        def make():
            self.made += 1
            return self.weight.detach() * 2, (self.weight.detach() + 1, None)

        return self.cache.get((self.weight,), "key", make)


class Conv:
    """3x3, 64 -> 64 channels at 8x8 in float16 on the fake GPU."""

    def __init__(self) -> None:
        self.weight = on_gpu(torch.randn(64, 64, 3, 3).half())
        self.scale, self.shift = on_gpu(torch.rand(64) + 0.5), on_gpu(torch.randn(64))

    def call(self) -> None:
        x = on_gpu(torch.randn(1, 64, 8, 8).half().contiguous(memory_format=torch.channels_last))
        ops.inference._conv_bn_act(x, self.weight, self.scale, self.shift, None, (1, 1), (1, 1), (1, 1), 1, True)

    def prepared(self) -> dict:
        found = prepared._kept.get(self.weight.data_ptr())
        return {} if found is None else found.calls


def test_the_stream_that_made_a_pack_never_waits(gpu):
    packs = Packs()
    for _ in range(3):
        packs.get()
    assert (packs.made, gpu.waits, gpu.in_use) == (1, [], [])


def test_every_other_stream_waits_once_and_tells_the_allocator(gpu):
    packs = Packs()
    first, (second, _) = packs.get()
    for gpu.stream in (B, B, A, C, B, C):
        assert packs.get()[0] is first
    assert packs.made == 1
    assert gpu.waits == [(B, A), (C, A)]
    assert gpu.in_use == [(t.data_ptr(), stream) for stream in (B, C) for t in (first, second)]


def test_a_pack_that_is_made_again_is_waited_for_again(gpu):
    packs = Packs()
    packs.get()
    gpu.stream = B
    packs.get()
    packs.weight.add_(1)
    packs.get()
    gpu.stream = A
    packs.get()
    assert gpu.waits == [(B, A), (A, B)]


def test_a_capture_waits_for_nothing(gpu):
    """And leaves the stream as unordered as it was."""
    packs = Packs()
    packs.get()
    gpu.stream, gpu.capturing = B, True
    packs.get()
    assert (packs.made, gpu.waits, gpu.in_use) == (1, [], [])
    gpu.capturing = False
    packs.get()
    assert gpu.waits == [(B, A)]


def test_what_a_capture_makes_is_not_kept(gpu):
    """It is there when the graph has run, not before; whoever captures may hold it."""
    packs = Packs()
    gpu.capturing = True
    with packing.held() as held:
        pack = packs.get()
    assert held == [pack]
    gpu.capturing = False
    assert packs.get() is not pack
    assert packs.made == 2
    gpu.stream = B
    packs.get()
    assert gpu.waits == [(B, A)]


def test_tensors_of_the_cpu_have_no_streams(gpu):
    packs = Packs()
    packs.weight = torch.randn(8, 8)
    for gpu.stream in (A, B):
        packs.get()
    assert (packs.made, gpu.waits, gpu.in_use) == (1, [], [])


@pytest.mark.parametrize("name", ["triton", cudnn.POINTWISE, cudnn.FUSED])
def test_prepared_calls(name, gpu, monkeypatch):
    """Which find no pack by themselves, and hold some that no cache knows: cuDNN's."""
    monkeypatch.setattr(torch, "cudnn_convolution_relu", lambda x, weight, *_: torch.zeros(1, 64, 8, 8, dtype=x.dtype))
    if name != "triton":
        problem = planner.Problem(
            "sm_90", torch.float16, "half", 1, 64, 8, 8, 64, (3, 3), (1, 1), (1, 1), (1, 1), 1, False, relu=True
        )
        planner.keep(0, {problem.key(): name})
    conv = Conv()
    conv.call()
    conv.call()
    assert len(conv.prepared()) == 1
    assert not gpu.waits
    gpu.stream, gpu.capturing = B, True
    conv.call()
    assert not gpu.waits
    gpu.capturing = False
    for gpu.stream in (B, B, A, C, B):
        conv.call()
    assert gpu.waits == [(B, A), (C, A)]
    (kept,) = conv.prepared().values()
    held = {t.data_ptr() for t in streams._tensors(kept.call.owners)}
    assert held
    assert {address for address, stream in gpu.in_use if stream == B} == held


def test_no_call_is_prepared_in_a_capture(gpu):
    conv = Conv()
    gpu.capturing = True
    conv.call()
    assert not conv.prepared()
    gpu.capturing = False
    conv.call()
    assert conv.prepared()


def test_a_capture_folds_no_weight_for_cudnn(gpu, monkeypatch):
    """Whether float16 holds it is a question to the GPU, and an answer that a capture cannot wait for."""
    problem = planner.Problem(
        "sm_90", torch.float16, "half", 1, 64, 8, 8, 64, (3, 3), (1, 1), (1, 1), (1, 1), 1, False, relu=True
    )
    planner.keep(0, {problem.key(): cudnn.FUSED})
    monkeypatch.setattr(cudnn, "fold", lambda *_: pytest.fail("asks the GPU"))
    conv = Conv()
    gpu.capturing, gpu.started = True, []
    conv.call()
    assert [one.function for one in gpu.started] == ["conv_kernel on 0"]
    assert planner.served(conv.weight).endswith("(table)")
