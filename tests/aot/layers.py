"""Every launch that ResNet-18, ResNet-50 and ResNeXt-50 make at 224x224, planned on the meta device.

Many layers share a binary: shapes that are runtime arguments do not matter, and a tile that is chosen for one batch
size may be chosen for others. ``distinct`` keeps one launch per binary. ``representative`` keeps one per *kind* of
binary: layers that differ only in how many channels they loop over, or write, compile to the same instructions with
other constants, except where the compiler unrolls a short loop.
"""

import contextlib
from collections.abc import Hashable, Iterable, Iterator
from typing import NamedTuple, Optional

import torch
import torchvision

from resnet_fast.kernels.triton import launch
from resnet_fast.kernels.triton.launch import Plan

MODELS = ("resnet18", "resnet50", "resnext50_32x4d")
BATCHES = (1, 8, 128)
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942", "gfx950")
PRECISIONS = ("fp16", "bf16", "tf32", "ieee")

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float32, "ieee": torch.float32}
_UNROLLED = 18  # steps up to which LLVM was seen to unroll a loop with a constant count


class Layer(NamedTuple):
    """A convolution as the models call it. ``[c, h, w] -> [k, ...]``"""

    c: int
    h: int
    w: int
    k: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    groups: int
    residual: bool
    relu: bool

    def name(self) -> str:
        kernel = f"{self.kernel[0]}x{self.kernel[1]}/{self.stride[0]}"
        groups = f" in {self.groups} groups" if self.groups > 1 else ""
        tail = ("+residual" if self.residual else "") + ("+relu" if self.relu else "")
        return f"{kernel} {self.c}->{self.k} {self.h}x{self.w}{groups} {tail}"


class Launch(NamedTuple):
    """A plan and what it is for."""

    name: str
    architecture: str
    precision: str
    plan: Plan

    def binary(self) -> Hashable:
        """What makes another binary."""
        constants = tuple(sorted(self.plan.constants.items()))
        return self.architecture, self.precision, self.plan.kernel.__name__, constants

    def kind(self) -> Hashable:
        """What makes other instructions, as far as one knows beforehand."""
        constants = dict(self.plan.constants)
        block, tap_channels, columns = constants.get("BK", 1), constants.pop("C", 0), constants.pop("K", 0)
        steps = constants.get("R", 1) * constants.get("S", 1) * -(-tap_channels // block)
        for name in ("PIXEL", "ROW_UNIT", "GROUPS"):
            constants.pop(name, None)
        return (
            self.architecture,
            self.precision,
            self.plan.kernel.__name__,
            min(steps, _UNROLLED + 1),
            tap_channels % block != 0,
            columns % constants["BN"] != 0,
            tuple(sorted(constants.items())),
        )


def model_layers() -> list[Layer]:
    """The distinct convolutions of the models, with the residual and the ReLU that the block gives them."""
    found: dict[Layer, None] = {}
    for name in MODELS:
        with torch.device("meta"):
            model = getattr(torchvision.models, name)().eval()
            names = {module: path for path, module in model.named_modules()}
            last = "conv2" if name == "resnet18" else "conv3"

            def note(module, args, output, names=names, last=last):
                leaf = names[module].rpartition(".")[2]
                layer = Layer(
                    *args[0].shape[1:],
                    module.out_channels,
                    module.kernel_size,
                    module.stride,
                    module.padding,
                    module.groups,
                    residual=leaf == last,
                    relu=leaf.startswith("conv"),
                )
                found[layer] = None

            for module in model.modules():
                if isinstance(module, torch.nn.Conv2d):
                    module.register_forward_hook(note)
            model(torch.empty(1, 3, 224, 224))
    return list(found)


@contextlib.contextmanager
def float32_precision(precision: str) -> Iterator[None]:
    """PyTorch's setting for float32 convolutions, which decides whether ours go through TF32."""
    setting = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "tf32" if precision == "tf32" else "ieee"
    try:
        yield
    finally:
        torch.backends.cudnn.conv.fp32_precision = setting


def plan_layer(layer: Layer, batch: int, precision: str, architecture: str) -> Launch:
    """``layer`` on the meta device."""
    dtype = DTYPES[precision]
    with float32_precision(precision):
        x = image(batch, layer.c, layer.h, layer.w, dtype)
        weight = torch.empty(layer.k, layer.c // layer.groups, *layer.kernel, dtype=dtype, device="meta")
        vector = torch.empty(layer.k, device="meta")
        residual: Optional[torch.Tensor] = None
        if layer.residual:
            residual = image(batch, layer.k, layer.h // layer.stride[0], layer.w // layer.stride[1], dtype)
        plan = launch.plan_conv(
            x, weight, vector, vector, residual, layer.stride, layer.padding, (1, 1), layer.groups, layer.relu,
            architecture,
        )  # fmt: skip
    return Launch(f"{layer.name()} batch {batch}", architecture, precision, plan)


def launches(architecture: str, precision: str) -> Iterator[Launch]:
    """All layers, all batches, and the poolings."""
    if precision == "tf32" and architecture.startswith("gfx"):
        return  # there PyTorch's own convolutions compute float32 in float32
    for layer in model_layers():
        for batch in BATCHES:
            yield plan_layer(layer, batch, precision, architecture)
    dtype = DTYPES[precision]
    max_pool = launch.plan_max_pool(image(128, 64, 112, 112, dtype), architecture)
    yield Launch("max-pool 64 112x112 batch 128", architecture, precision, max_pool)
    for channels in (512, 2048):
        plan = launch.plan_average_pool(image(128, channels, 7, 7, dtype), architecture)
        yield Launch(f"average-pool {channels} 7x7 batch 128", architecture, precision, plan)


def distinct(all_launches: Iterable[Launch]) -> list[Launch]:
    """One launch per binary."""
    return list({one.binary(): one for one in all_launches}.values())


def representative(all_launches: Iterable[Launch]) -> list[Launch]:
    """One launch per kind of binary."""
    return list({one.kind(): one for one in all_launches}.values())


def one_per_tile(all_launches: Iterable[Launch]) -> list[Launch]:
    """One launch per kernel, tile, kernel height, and set of flags: the last, so one with a long loop."""
    tile = ("BM", "BN", "BK", "num_warps", "num_stages", "SPLIT")
    flags = ("HAS_RESIDUAL", "RESIDUAL_AFFINE", "PROLOGUE", "STATISTICS")
    names = (*tile, *flags, "R")
    chosen = {}
    for one in all_launches:
        key = (one.plan.kernel.__name__, tuple(one.plan.constants.get(name) for name in names))
        chosen[key] = one
    return list(chosen.values())


def image(n: int, c: int, h: int, w: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(n, c, h, w, dtype=dtype, device="meta", memory_format=torch.channels_last)
