"""From the bytes of a picture to what the network reads: as a description, as PyTorch, and as nodes of an ONNX graph.

Resizing is written as two products with matrices, one for the rows and one for the columns, whose entries the graph
computes from the picture's size. ONNX's own Resize with antialias=1 gives the same, but TensorRT's parser refuses it
("Antialiasing is not supported currently"), and without antialiasing a reduced photograph is another picture than
the network was trained on. The rows and columns that the crop leaves out are never computed.
"""

import functools
from dataclasses import dataclass
from typing import Literal, Optional, Union, get_args

import numpy as np
import onnx_ir as ir
import torch
import torch.nn.functional as F
from onnx_ir.tape import Tape
from torch import Tensor

Interpolation = Literal["bilinear", "bicubic"]


@dataclass(frozen=True)
class Preprocess:
    """uint8 pictures ``[N, height, width, channels]`` -> ``[N, channels, *crop]``, as torchvision's presets do it.

    The shorter side is resized to ``resize``, with antialiasing, the centre cropped, and what is there divided by 255,
    less ``mean``, divided by ``std`` (both per channel). With ``resize`` None, pictures come in the size ``crop``.

    Unlike torchvision on a picture of bytes, it does not round to bytes after resizing.
    """

    crop: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: Optional[int] = None
    interpolation: Interpolation = "bilinear"

    def __post_init__(self) -> None:
        if self.interpolation not in get_args(Interpolation):
            raise ValueError(f"interpolation is {self.interpolation!r}, expected one of bilinear, bicubic")
        if self.resize is not None and self.resize < max(self.crop):
            raise ValueError(
                f"resize is {self.resize}, expected at least {max(self.crop)}, so that the crop {self.crop} fits in"
            )
        if len(self.mean) != len(self.std) or min(self.std) <= 0:
            raise ValueError(f"std is {self.std}, expected {len(self.mean)} positive numbers, as many as mean has")

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Height and width before the crop; the longer side is rounded down, as torchvision does."""
        if self.resize is None:
            return height, width
        shorter = min(height, width)
        return self.resize * height // shorter, self.resize * width // shorter

    def __call__(self, images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """``images`` uint8 ``[N, height, width, channels]`` -> ``dtype`` ``[N, channels, *crop]``."""
        pixels = images.permute(0, 3, 1, 2).to(dtype)
        if self.resize is not None:
            size = self.resized(*pixels.shape[2:])
            pixels = F.interpolate(pixels, size=size, mode=self.interpolation, align_corners=False, antialias=True)
            # Python rounds halves to even, torchvision with it, and ONNX's Round as well.
            top, left = (round((extent - crop) / 2) for extent, crop in zip(size, self.crop, strict=True))
            pixels = pixels[:, :, top : top + self.crop[0], left : left + self.crop[1]].clamp(0, 255)
        mean, std = (torch.tensor(values, dtype=dtype).view(1, -1, 1, 1) for values in (self.mean, self.std))
        return (pixels / 255 - mean) / std


def attach_preprocessing(model: ir.Model, preprocess: Preprocess) -> None:
    """Have ``model`` read uint8 pictures: an input ``image`` ``[batch, height, width, channels]`` in place of its own.

    Its own must be float32. All is computed in float32, whose error is below 0.01 of the 255 levels.
    """
    graph = model.graph
    network = graph.inputs[0]
    assert network.shape is not None
    batch, channels, height, width = network.shape
    if preprocess.resize is not None:
        height, width = ir.SymbolicDim("height"), ir.SymbolicDim("width")
    image = ir.val("image", ir.DataType.UINT8, ir.Shape([batch, height, width, channels]))
    nodes = _Nodes()
    pixels = nodes("Cast", image, to=ir.DataType.FLOAT)
    if preprocess.resize is not None:
        pixels = _resize(nodes, image, pixels, preprocess)
    else:
        pixels = nodes("Transpose", pixels, perm=[0, 3, 1, 2])
    # Integers less a constant, then one product: nothing large cancels.
    mean, std = (np.array(values, np.float64).reshape(1, -1, 1, 1) for values in (preprocess.mean, preprocess.std))
    centred = nodes("Sub", pixels, nodes.constant("mean", (255 * mean).astype(np.float32)))
    result = nodes("Mul", centred, nodes.constant("scale", (1 / (255 * std)).astype(np.float32)))
    result.shape, result.type = network.shape, network.type
    ir.convenience.replace_all_uses_with(network, result)
    graph.inputs[0] = image
    nodes.put_first(graph)


class _Nodes:
    """Nodes that are not yet in a graph, all named for the preprocessing."""

    def __init__(self) -> None:
        self._tape = Tape()
        self._constants: dict[str, ir.Value] = {}

    def __call__(self, operator: str, *inputs: ir.Value, **attributes: Union[int, float, str, list[int]]) -> ir.Value:
        name = f"preprocess_{operator}_{len(self._tape.nodes)}"
        return self._tape.op(operator, inputs, attributes, name=name, output=ir.Value(name=name))

    def constant(self, name: str, array: np.ndarray) -> ir.Value:
        """The constant called ``name``, made at the first call."""
        if name not in self._constants:
            tensor = ir.tensor(array, name=f"preprocess.{name}")
            self._constants[name] = self._tape.initializer(tensor, f"preprocess.{name}")
        return self._constants[name]

    def integers(self, *values: int) -> ir.Value:
        return self.constant("_".join(map(str, ("int", *values))), np.array(values, np.int64))

    def number(self, value: float) -> ir.Value:
        return self.constant(f"float_{value}", np.array([value], np.float32))

    def put_first(self, graph: ir.Graph) -> None:
        for value in self._tape.initializers:
            graph.register_initializer(value)
        graph.insert_before(graph[0], self._tape.nodes)


def _resize(nodes: _Nodes, image: ir.Value, pixels: ir.Value, preprocess: Preprocess) -> ir.Value:
    """``pixels [N, height, width, C]``, the floats of ``image`` -> ``[N, C, *crop]``."""
    height, width = (nodes("Shape", image, start=axis, end=axis + 1) for axis in (1, 2))
    shorter = nodes("Min", height, width)
    down, across = (
        _matrix(nodes, extent, shorter, crop, preprocess)
        for extent, crop in zip((height, width), preprocess.crop, strict=True)
    )
    # The rows first, where a row of pixels with their channels is one long vector, so that only what is left of the
    # picture has to be turned to NCHW.
    rows = nodes("MatMul", down, nodes("Reshape", pixels, nodes.integers(0, 0, -1)))
    channels = len(preprocess.mean)
    turned = nodes(
        "Transpose",
        nodes("Reshape", rows, nodes.integers(0, preprocess.crop[0], -1, channels)),
        perm=[0, 3, 1, 2],
    )
    result = nodes("MatMul", turned, nodes("Transpose", across, perm=[1, 0]))
    if preprocess.interpolation == "bicubic":  # whose weights can be negative
        result = nodes("Clip", result, *(nodes.constant(f"clip_{x}", np.array(x, np.float32)) for x in (0, 255)))
    return result


def _matrix(nodes: _Nodes, extent: ir.Value, shorter: ir.Value, crop: int, preprocess: Preprocess) -> ir.Value:
    """``[crop, extent]``: the weight of each pixel along an axis of ``extent`` pixels in each that the crop keeps.

    Output pixel i is centred at ``(i + 1/2) * ratio`` with ``ratio = extent / resized``, and weighs the pixel j by its
    distance ``|j + 1/2 - centre| / max(ratio, 1)``: the triangle or cubic filter, widened where the picture shrinks, as
    in Pillow and in PyTorch's ``antialias=True``. The weights of a row add up to one.
    """
    assert preprocess.resize is not None
    half, one = nodes.number(0.5), nodes.number(1.0)
    resized = nodes("Div", nodes("Mul", extent, nodes.integers(preprocess.resize)), shorter)
    spare = nodes("Cast", nodes("Sub", resized, nodes.integers(crop)), to=ir.DataType.FLOAT)
    first = nodes("Round", nodes("Mul", spare, half))
    ratio = nodes("Div", *(nodes("Cast", pixels, to=ir.DataType.FLOAT) for pixels in (extent, resized)))
    places = nodes.constant(f"rows_{crop}", np.arange(crop, dtype=np.float32).reshape(-1, 1) + np.float32(0.5))
    centres = nodes("Mul", nodes("Add", places, first), ratio)
    zero, step = (nodes.constant(f"scalar_{number}", np.array(number, np.int64)) for number in (0, 1))
    indices = nodes("Cast", nodes("Range", zero, nodes("Squeeze", extent), step), to=ir.DataType.FLOAT)
    distances = nodes("Abs", nodes("Sub", nodes("Add", indices, half), centres))
    weights = _FILTERS[preprocess.interpolation](nodes, nodes("Div", distances, nodes("Max", ratio, one)))
    return nodes("Div", weights, nodes("ReduceSum", weights, nodes.integers(1), keepdims=1))


def _triangle(nodes: _Nodes, distance: ir.Value) -> ir.Value:
    """``max(1 - d, 0)``."""
    return nodes("Relu", nodes("Sub", nodes.number(1.0), distance))


def _cubic(nodes: _Nodes, distance: ir.Value) -> ir.Value:
    """Keys' cubic with a = -1/2: ``(1.5 d - 2.5) d^2 + 1`` below 1, ``((2.5 - 0.5 d) d - 4) d + 2`` up to 2, then 0.

    Source: R. Keys, "Cubic convolution interpolation for digital image processing", 1981.
    """

    def product(*factors: ir.Value) -> ir.Value:
        return functools.reduce(lambda one, other: nodes("Mul", one, other), factors)

    def plus(value: ir.Value, number: float) -> ir.Value:
        return nodes("Add", value, nodes.number(number))

    d = nodes("Min", distance, nodes.number(2.0))
    near = plus(product(plus(product(d, nodes.number(1.5)), -2.5), d, d), 1.0)
    far = plus(product(plus(product(plus(product(d, nodes.number(-0.5)), 2.5), d), -4.0), d), 2.0)
    return nodes("Where", nodes("Less", d, nodes.number(1.0)), near, far)


_FILTERS = {"bilinear": _triangle, "bicubic": _cubic}
