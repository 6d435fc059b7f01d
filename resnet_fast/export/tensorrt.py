"""Does TensorRT take an ONNX file, and what does it make of it? Asked of TensorRT-RTX, which builds without a GPU.

TensorRT-RTX shares TensorRT's parser and its strong typing: precision comes from the file alone. Its engines are for
RTX GPUs, and nothing here runs one. Both packages are proprietary software of NVIDIA, so an extra brings them.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Optional, Union

import onnx

from resnet_fast.utils.optional import require

_PACKAGES = ("tensorrt_rtx_libs", "tensorrt_rtx_bindings")


class EngineError(RuntimeError):
    """TensorRT refuses the file; the message holds its own words, and the node's name where it gives one."""


@dataclass(frozen=True)
class EngineLayer:
    """One kernel, copy or synchronisation of an engine, as TensorRT lists it.

    Attributes:
        name: TensorRT's name for it.
        kind: TensorRT's word for it: "correlation" is a convolution, "kgen" a generated pointwise or reducing kernel,
            "gemm" and "runtime_fusion" products of matrices, which some convolutions become too.
        inputs, constants, outputs: data types by tensor, in TensorRT's words ("Float", "Half", "BFloat16", "Int8" ...).
        operators: ONNX operators that it computes, of those nodes of the file that it names.
    """

    name: str
    kind: str
    inputs: dict[str, str]
    constants: dict[str, str]
    outputs: dict[str, str]
    operators: tuple[str, ...]

    @property
    def is_convolution(self) -> bool:
        return self.kind == "correlation" or (self.kind in ("gemm", "runtime_fusion") and "Conv" in self.operators)

    @property
    def is_int8(self) -> bool:
        """Whether the layer multiplies int8 by int8: what it reads first, and its weights."""
        return [*self.inputs.values()][:1] == ["Int8"] == [*self.constants.values()][:1]


@dataclass(frozen=True)
class EngineReport:
    """What TensorRT-RTX built.

    A convolution is *fused* if its kernel applies the ReLU as well. TensorRT-RTX 1.7 does so in float32, float16 and
    bfloat16. With int8 weights that have a scale per channel it does not: the convolution writes float32, and one
    generated kernel after it scales, adds the residual, applies the ReLU and rounds to int8 again; that is a *tail*.
    What TensorRT itself fuses is decided on the GPU that it builds on, and was never seen here.

    Attributes:
        version: of TensorRT-RTX.
        size: of the engine, in bytes.
        seconds: that the build took.
        layers: of the engine.
    """

    version: str
    size: int
    seconds: float
    layers: tuple[EngineLayer, ...]

    @property
    def kernels(self) -> int:
        """Layers that read or write a tensor: all but synchronisation."""
        return sum(bool(layer.outputs) for layer in self.layers)

    @property
    def convolutions(self) -> int:
        return len(self._convolutions())

    @property
    def int8_convolutions(self) -> int:
        """Convolutions that multiply int8 by int8."""
        return sum(layer.is_int8 for layer in self._convolutions())

    @property
    def fused(self) -> int:
        """Convolutions with a ReLU inside, and with the residual Add where there is one."""
        return len(self._convolutions("Relu"))

    @property
    def fused_add(self) -> int:
        """Those of ``fused`` with an Add inside."""
        return len(self._convolutions("Relu", "Add"))

    @property
    def fused_int8_add(self) -> int:
        """Those of ``fused_add`` that multiply int8 by int8."""
        return sum(layer.is_int8 for layer in self._convolutions("Relu", "Add"))

    @property
    def int8_tails(self) -> int:
        """int8 convolutions without a ReLU inside whose result goes to a single kernel, which applies it."""
        count = 0
        for layer in self._convolutions():
            readers = [other for other in self.layers if layer.outputs.keys() & other.inputs.keys()]
            one = len(readers) == 1 and readers[0].kind == "kgen" and "Relu" in readers[0].operators
            count += layer.is_int8 and "Relu" not in layer.operators and one
        return count

    def _convolutions(self, *operators: str) -> list[EngineLayer]:
        return [layer for layer in self.layers if layer.is_convolution and {*operators} <= {*layer.operators}]


def available() -> bool:
    """Return whether ``build`` can run: both packages of the extra ``tensorrt`` are installed."""
    return all(find_spec(package) is not None for package in _PACKAGES)


def build(
    path: Union[str, os.PathLike],
    *,
    min_batch: int = 1,
    opt_batch: int = 8,
    max_batch: int = 32,
    image_size: Optional[Sequence[int]] = None,
    timeout: float = 600,
) -> EngineReport:
    """Parse ``path`` and build an engine from it, in another process, which a crash inside TensorRT cannot leave.

    Args:
        path: an ONNX file.
        min_batch, opt_batch, max_batch: smallest batch, the one to optimise for, and the largest. Only where the file
            leaves its first dimension open.
        image_size: ``(height, width)`` where the file leaves them open, as one with preprocessing inside does.
        timeout: seconds after which the build is given up.

    Raises:
        FileNotFoundError: there is no file ``path``.
        ValueError: ``path`` is not an ONNX file, or an argument does not fit its inputs; the message names it.
        MissingPackageError: the extra ``tensorrt`` is not installed.
        EngineError: TensorRT refuses the file, crashes on it, or takes too long.
    """
    for package in _PACKAGES:
        if find_spec(package) is None:
            require(package, "building a TensorRT-RTX engine")
    batches = (min_batch, opt_batch, max_batch)
    if not all(isinstance(batch, int) for batch in batches) or not 1 <= min_batch <= opt_batch <= max_batch:
        raise ValueError(f"min_batch, opt_batch, max_batch are {batches}, expected integers 1 <= min <= opt <= max")
    model = _load(path)
    request = {"path": os.path.abspath(path), "shapes": _shapes(model, batches, image_size)}
    answer = _ask(request, path, timeout)
    title = f"TensorRT-RTX {answer['version']}"
    if "error" in answer:
        raise EngineError(f"{title} cannot {answer['step']} {str(path)!r}: {answer['error']}")
    operators = {node.name: node.op_type for node in model.graph.node}
    layers = tuple(_layer(line, operators) for line in answer["layers"].splitlines() if line.startswith("Name: "))
    if not layers:
        raise EngineError(f"{title} built {str(path)!r}, but did not list the engine's layers")
    return EngineReport(answer["version"], answer["size"], answer["seconds"], layers)


def _load(path: Union[str, os.PathLike]) -> onnx.ModelProto:
    if not os.path.isfile(path):
        raise FileNotFoundError(f"path is {str(path)!r}, expected an ONNX file")
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:
        raise ValueError(f"path is {str(path)!r}, which is not an ONNX file: {error}") from error
    if not model.graph.node:
        raise ValueError(f"path is {str(path)!r}, which is not an ONNX file: it has no graph")
    return model


def _shapes(
    model: onnx.ModelProto, batches: tuple[int, int, int], image_size: Optional[Sequence[int]]
) -> dict[str, list[list[int]]]:
    """Shapes for an optimisation profile, by input: those with open dimensions."""
    if image_size is not None:
        image_size = tuple(image_size)
        if len(image_size) != 2 or any(not isinstance(extent, int) or extent < 1 for extent in image_size):
            raise ValueError(f"image_size is {image_size}, expected two positive integers: (height, width)")
    weights = {tensor.name for tensor in model.graph.initializer}
    shapes = {}
    for value in model.graph.input:
        if value.name in weights:
            continue
        dims = [dim.dim_value for dim in value.type.tensor_type.shape.dim]  # 0 where it is open
        places = [place for place, dim in enumerate(dims) if dim == 0 and place > 0]
        if places and (image_size is None or len(places) != 2):
            raise ValueError(
                f"image_size is {image_size}, but input {value.name!r} leaves {len(places)} dimensions open beside "
                "the batch, expected (height, width) for those two"
            )
        for place, extent in zip(places, image_size or (), strict=bool(places)):
            dims[place] = extent
        if 0 in dims or places:
            shapes[value.name] = [[batch, *dims[1:]] if dims[0] == 0 else dims for batch in batches]
    return shapes


def _ask(request: dict, path: Union[str, os.PathLike], timeout: float) -> dict:
    script = Path(__file__).with_name("tensorrt_build.py")
    try:
        done = subprocess.run(
            [sys.executable, script], input=json.dumps(request), capture_output=True, text=True, timeout=timeout
        )
    except subprocess.TimeoutExpired as error:
        raise EngineError(f"timeout is {timeout} s, and TensorRT-RTX had not built {str(path)!r} by then") from error
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise EngineError(f"TensorRT-RTX ended with status {done.returncode} on {str(path)!r}: {reason}")
    return json.loads(done.stdout)


_LAYER = re.compile(
    r"Name: (?P<name>.*?), LayerType: (?P<kind>\w+), Inputs: \[(?P<inputs>.*?)\], Constants: \[(?P<constants>.*?)\], "
    r"Outputs: \[(?P<outputs>.*?)\], TacticName: .*?Metadata: ?(?P<nodes>.*)"
)
_TENSOR = re.compile(r"Name: (.*?), Dimensions: .*?Datatype: (\w+)")


def _layer(line: str, operators: dict[str, str]) -> EngineLayer:
    found = _LAYER.match(line)
    if found is None:
        raise EngineError(f"this TensorRT-RTX describes its layers in a form that is not known here: {line}")
    inputs, constants, outputs = (dict(_TENSOR.findall(found[part])) for part in ("inputs", "constants", "outputs"))
    nodes = re.findall(r"\[ONNX Layer: (.*?)\]", found["nodes"])
    computes = tuple(operators[name] for name in nodes if name in operators)
    return EngineLayer(found["name"], found["kind"], inputs, constants, outputs, computes)
