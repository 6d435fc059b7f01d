"""Every launch that ResNet-18, ResNet-50 and ResNeXt-50 make at 224x224, planned on the meta device.

Many layers share a binary: shapes that are runtime arguments do not matter, and a tile that is chosen for one batch
size may be chosen for others. ``distinct`` keeps one launch per binary.
"""

import functools
from collections.abc import Hashable, Iterable, Iterator
from typing import Any, NamedTuple, Optional

import torch
import torchvision

from resnet_fast.kernels.triton import forward, pool, tiles
from resnet_fast.kernels.triton.plan import Launch, Plan
from resnet_fast.utils import compat

MODELS = ("resnet18", "resnet50", "resnext50_32x4d")
BATCHES = (1, 8, 128)
# Those with tiles of their own.
ARCHITECTURES = tuple(
    name
    for name in ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950")
    if tiles.nearest(name) == name
)
REAL = ("fp16", "bf16", "tf32", "ieee")
EIGHT_BITS = ("int8", "fp8")
PRECISIONS = (*REAL, *EIGHT_BITS)

DTYPES = {
    "fp16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float32, "ieee": torch.float32,
    "int8": torch.int8, "fp8": torch.float8_e4m3fn,
}  # fmt: skip
_LETTERS = {
    torch.float16: "h", torch.bfloat16: "b", torch.float32: "f", torch.float64: "d", torch.int8: "c", torch.uint8: "u",
    torch.int32: "i", torch.int64: "l", torch.float8_e4m3fn: "e", torch.float8_e5m2: "g",
    torch.float8_e4m3fnuz: "z",
}  # fmt: skip
# Constants that an entry's name leaves out.
_USUAL = {"GROUPS": 1, "STRIDE": 1, "PAD": 0, "DILATION": 1, "STEP": 1, "UNROLL": 1, "PRECISION": "ieee"}


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


class Item(NamedTuple):
    """A launch and what it is for."""

    name: str
    architecture: str
    precision: str
    launch: Launch

    def binary(self) -> Hashable:
        """What makes another binary."""
        return self.architecture, self.entry()

    def entry(self) -> str:
        """All that the compiler is told but for the architecture, to be read: kernel, arguments, tile, constants.

        One letter for each argument. A tensor's dtype: h, b, f, d (float16, bfloat16, float32, float64), c, u, i, l
        (integers of 8, 8, 32 and 64 bits, u without a sign), e, g, z (8-bit floats e4m3, e5m2, AMD's e4m3); a capital
        if it is a tensor descriptor. A number: n, or N of 64 bits; a if the compiler is told that it is a multiple of
        16, 1 if it is told that it is 1. "-" is None.
        """
        kernel, constants = self.launch.kernel, dict(self.launch.constants)
        arguments = "".join(_letter(value, kernel.params[i]) for i, value in enumerate(self.launch.args))
        tile = "x".join(str(constants.pop(name)) for name in ("BM", "BN", "BK", "BP") if name in constants)
        warps, stages = (constants.pop(name, None) for name in ("num_warps", "num_stages"))
        words = [kernel.__name__, arguments, *([tile] if tile else []), f"w{warps}"]
        words += [] if stages is None else [f"s{stages}"]
        for name, value in constants.items():
            axis = name[-2:] if name[-2:] in ("_H", "_W") else ""
            if axis and constants.get(name[:-2] + "_H") == constants.get(name[:-2] + "_W"):
                if axis == "_W":
                    continue
                name = name[:-2]
            if value is True:
                words.append(name)
            elif value is not False and value is not None and value != _USUAL.get(name):
                words.append(f"{name}={value}")
        return " ".join(words)


def _letter(value: Any, parameter: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, torch.Tensor):
        return _LETTERS[value.dtype]
    if hasattr(value, "block_shape"):
        return _LETTERS[value.base.dtype].upper()
    if isinstance(value, int) and not parameter.do_not_specialize:
        if value == 1:
            return "1"
        if value % 16 == 0 and not parameter.do_not_specialize_on_alignment:
            return "a"
    return "N" if isinstance(value, int) and not -(2**31) <= value < 2**31 else "n"


@functools.cache
def model_layers(models: tuple[str, ...] = MODELS) -> list[Layer]:
    """The distinct convolutions of the models, with the residual and the ReLU that the block gives them."""
    found: dict[Layer, None] = {}
    for name in models:
        with torch.device("meta"):
            model = getattr(torchvision.models, name)().eval()
            names = {module: path for path, module in model.named_modules()}
            last = "conv2" if name in ("resnet18", "resnet34") else "conv3"

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


def plan_layer(layer: Layer, batch: int, precision: str, architecture: str) -> list[Item]:
    """The launches of ``layer``, on the meta device."""
    dtype = DTYPES[precision]
    with compat.float32_in_tf32(precision == "tf32"):
        x = image(batch, layer.c, layer.h, layer.w, dtype)
        weight = torch.empty(layer.k, layer.c // layer.groups, *layer.kernel, dtype=dtype, device="meta")
        vector = torch.empty(layer.k, device="meta")
        residual: Optional[torch.Tensor] = None
        if layer.residual:
            residual = image(batch, layer.k, layer.h // layer.stride[0], layer.w // layer.stride[1], dtype)
        plan = forward.plan_conv_bn_act(
            x, weight, vector, vector, residual, layer.stride, layer.padding, (1, 1), layer.groups, layer.relu,
            architecture,
        )  # fmt: skip
    return items(f"{layer.name()} batch {batch}", architecture, precision, plan)


def launches(architecture: str, precision: str, batches: tuple[int, ...] = BATCHES) -> Iterator[Item]:
    """All layers, all batches, and the poolings."""
    if precision == "tf32" and architecture.startswith("gfx"):
        return  # there PyTorch's own convolutions compute float32 in float32
    for layer in model_layers():
        for batch in batches:
            yield from plan_layer(layer, batch, precision, architecture)
    dtype = DTYPES[precision]
    max_pool = pool.plan_tail_pool(image(128, 64, 112, 112, dtype), None, architecture)
    yield from items("max-pool 64 112x112 batch 128", architecture, precision, max_pool)
    for channels in (512, 2048):
        plan = pool.plan_global_avg_pool(image(128, channels, 7, 7, dtype), architecture)
        yield from items(f"average-pool {channels} 7x7 batch 128", architecture, precision, plan)


def items(name: str, architecture: str, precision: str, plan: Plan) -> list[Item]:
    """The launches of a plan."""
    return [Item(name, architecture, precision, launch) for launch in plan.launches]


def distinct(all_launches: Iterable[Item]) -> list[Item]:
    """One launch per binary."""
    return list({one.binary(): one for one in all_launches}.values())


def image(n: int, c: int, h: int, w: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(n, c, h, w, dtype=dtype, device="meta", memory_format=torch.channels_last)
