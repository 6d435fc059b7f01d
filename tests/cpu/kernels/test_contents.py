"""Everyday writes that PyTorch does not count are seen by what the tensors hold."""

import pytest
import torch
from torch import nn

from resnet_fast.kernels import contents
from resnet_fast.kernels.contents import Contents
from resnet_fast.kernels.native import library
from resnet_fast.kernels.packing import PackCache

SHAPES = {
    "3x3": (64, 64, 3, 3),
    "1x1": (256, 64, 1, 1),
    "narrowing 1x1": (128, 512, 1, 1),
    "depthwise": (1024, 1, 3, 3),
    "stem": (64, 3, 7, 7),
    "fully connected": (100, 512),
    "norm": (2048,),
    "one element": (),
    "three elements": (3,),
}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@pytest.fixture(params=["native", "torch"])
def reader(request, monkeypatch):
    """Both ways to read."""
    if request.param == "torch":
        monkeypatch.setattr(library, "unavailable", lambda: "for a test")
    elif library.unavailable():
        pytest.skip(library.unavailable())


def _tensor(shape: tuple[int, ...], layout: str = "contiguous", dtype: torch.dtype = torch.float32) -> torch.Tensor:
    tensor = torch.randn(shape).to(dtype)
    return tensor.to(memory_format=LAYOUTS[layout]) if tensor.dim() == 4 else tensor


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.usefixtures("reader")
def test_any_channel_of_any_tensor(shape, layout):
    """One output channel, one input channel of all, one bit of each; among other tensors that stay as they are."""
    tensor, others = _tensor(shape, layout), [torch.randn(5), torch.randn(40, 40)]
    everything = [others[0], tensor, others[1]]
    held = Contents(everything)
    assert held.unchanged(everything)
    writes = [(slice(None),), *((k,) for k in range(0, shape[0], 7))] if shape else [()]
    writes += [(slice(None), c) for c in range(0, shape[1], 5)] if len(shape) > 1 else []
    for where in writes:
        bits = tensor.view(torch.int32)
        bits[where] ^= 1
        assert not held.unchanged(everything), where
        bits[where] ^= 1
        assert held.unchanged(everything)


@pytest.mark.usefixtures("reader")
def test_order_counts():
    """Channels, tensors and bytes that change places; weights of two values, as binary networks have them, too."""
    weight = torch.randint(2, (128, 64, 3, 3)).float() - 0.5
    for a, b in ((0, 1), (0, 64), (3, 127)):
        swapped = weight.clone()
        swapped[[a, b]] = weight[[b, a]]
        held = Contents([weight])
        weight.data.copy_(swapped)
        assert not held.unchanged([weight])
    a, b = torch.randn(64), torch.randn(64)
    held = Contents([a, b])
    a.data, b.data = b.clone(), a.clone()
    after = Contents([a, b])
    assert (after._digest, after._others) != (held._digest, held._others)


@pytest.mark.usefixtures("reader")
def test_tensors_of_any_kind_between_poison():
    """Only bytes of the tensors count, whatever their strides."""
    memory = torch.randn(100_000)
    views = [memory[1000:80_000], memory[1000:80_000].view(79, 1000)[:, :990], memory[1000:1001].expand(9)]
    views += [memory[2000:2064].view(8, 8).t(), memory[1000:1000], memory[1000:80_000].bfloat16()]
    for view in views:
        held = Contents([view])
        memory[:1000] += 1
        memory[80_000:] += 1
        assert held.unchanged([view])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.int8, torch.bool])
@pytest.mark.usefixtures("reader")
def test_any_dtype(dtype):
    tensor = torch.ones(100, 300).to(dtype)
    held = Contents([tensor])
    tensor.data[5] = 0
    assert not held.unchanged([tensor])


def test_threads_read_the_same():
    tensors = [torch.randn(shape) for shape in SHAPES.values()] * 5
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        held = Contents(tensors)
        torch.set_num_threads(2)
        assert held.unchanged(tensors)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("wanted", ["", "1"])
def test_on_a_gpu_only_on_request(wanted, monkeypatch):
    """There is none here: which tensors would be read."""
    monkeypatch.setenv("RESNET_FAST_COMPARE_GPU", wanted)
    monkeypatch.setattr(contents.streams, "capturing", lambda index: index == 1)

    class OnGpu:
        is_cuda = True

        def __init__(self, index: int) -> None:
            self.device = torch.device("cuda", index)

    assert contents._compared(OnGpu(0), native=True) == (wanted == "1")
    assert not contents._compared(OnGpu(1), native=True), "a captured stream was waited for"


SWAPS = {
    "swap_tensors": lambda layer: torch.utils.swap_tensors(layer.weight, nn.Parameter(torch.randn(4, 3, 3, 3))),
    "double": lambda layer: layer.double(),
}


@pytest.mark.parametrize("swap", SWAPS.values(), ids=SWAPS)
def test_parameters_can_be_swapped(swap):
    """``torch.utils.swap_tensors`` takes no tensor that somebody has weak references to."""
    layer, cache = nn.Conv2d(3, 4, 3), PackCache()

    def total() -> torch.Tensor:
        return cache.get((layer.weight, layer.bias), "key", lambda: layer.weight.detach().sum())

    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        before = total()
        swap(layer)
        after = total()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert after.dtype == layer.weight.dtype and torch.equal(after, layer.weight.sum())
    assert after is not before
