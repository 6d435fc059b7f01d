"""config.pbtxt: what the server must know of a model beside its file."""

import os
from dataclasses import dataclass
from importlib.resources import files
from string import Template
from typing import Union

import onnx

import resnet_fast

MARK = "# Written by resnet-fast"
"""How config.pbtxt begins: a model folder without it is not ours to replace."""

LABELS = "labels.txt"

_TYPES: dict[int, str] = {
    onnx.TensorProto.FLOAT: "TYPE_FP32",
    onnx.TensorProto.FLOAT16: "TYPE_FP16",
    onnx.TensorProto.UINT8: "TYPE_UINT8",
    onnx.TensorProto.INT64: "TYPE_INT64",
    onnx.TensorProto.INT32: "TYPE_INT32",
}
_ANY_SIDE = 256  # height and width of the warm-up's images where the model takes any


@dataclass(frozen=True)
class Port:
    """An input or output; ``dims`` without the batch, -1 where any extent will do."""

    name: str
    dtype: str
    dims: tuple[int, ...]

    @property
    def example(self) -> tuple[int, ...]:
        """``dims`` with a number for what is open."""
        return tuple(_ANY_SIDE if extent == -1 else extent for extent in self.dims)


@dataclass(frozen=True)
class Signature:
    """The input and the outputs of an ONNX file."""

    input: Port
    outputs: tuple[Port, ...]

    @classmethod
    def of(cls, path: Union[str, os.PathLike]) -> "Signature":
        """Read the ONNX file at ``path``.

        Raises:
            ValueError: it has several inputs, a fixed batch, or a dtype that the server has no name for.
        """
        graph = onnx.load(path).graph
        if len(graph.input) != 1:
            raise ValueError(f"path is {str(path)!r} with {len(graph.input)} inputs, expected one")
        return cls(_port(graph.input[0]), tuple(map(_port, graph.output)))

    @property
    def plain(self) -> bool:
        """Whether the signature is that of the PyTorch model: from images in floating point to logits."""
        return (
            len(self.input.dims) == 3
            and self.input.dtype in ("TYPE_FP32", "TYPE_FP16")
            and [output.name for output in self.outputs] == ["logits"]
        )


def _port(value: onnx.ValueInfoProto) -> Port:
    kind = value.type.tensor_type
    batch, *dims = kind.shape.dim
    if batch.HasField("dim_value"):
        raise ValueError(f"{value.name} has a batch of {batch.dim_value}, expected any (dynamic_batch=True)")
    if kind.elem_type not in _TYPES:
        found = onnx.TensorProto.DataType.Name(kind.elem_type)
        raise ValueError(f"{value.name} has dtype {found}, expected one of {', '.join(_TYPES.values())}")
    return Port(
        value.name,
        _TYPES[kind.elem_type],
        tuple(dim.dim_value if dim.HasField("dim_value") else -1 for dim in dims),
    )


@dataclass(frozen=True)
class Batching:
    """How requests become batches.

    Attributes:
        max_batch: most images in a request, and in a batch of several.
        queue_delay: microseconds that a request may wait for others.
        instances: copies of the model, on each GPU or on the CPU.
    """

    max_batch: int
    queue_delay: int
    instances: int

    @property
    def preferred(self) -> list[int]:
        """Powers of two from 4, and ``max_batch``: each is warmed up, and few of them are enough."""
        powers = [1 << bits for bits in range(2, self.max_batch.bit_length())]
        return sorted({*powers, self.max_batch})

    @property
    def usual(self) -> int:
        """The batch that TensorRT optimises for, within all that are allowed."""
        return self.preferred[len(self.preferred) // 2]


def python_config(name: str, title: str, signature: Signature, batching: Batching, labels: bool, **known: str) -> str:
    """config.pbtxt for the Python backend; ``known`` are the parameters of files/model.py."""
    rows = [f"  {{ key: {_quoted(key)} value {{ string_value: {_quoted(value)} }} }}" for key, value in known.items()]
    return _filled(
        "python.pbtxt", name, title, signature, batching, labels, parameters=f"parameters [\n{_joined(rows)}\n]"
    )


def onnxruntime_config(name: str, title: str, signature: Signature, batching: Batching, labels: bool) -> str:
    """config.pbtxt for the ONNX Runtime backend, with TensorRT on a GPU.

    The engine's profile goes from one image to ``max_batch``, so that no batch size builds another engine; where the
    images may have any size it is left to ONNX Runtime, which builds for the sizes that it sees.
    """
    profile = ""
    if -1 not in signature.input.dims:
        bounds = {"min": 1, "opt": batching.usual, "max": batching.max_batch}
        profile = "".join(
            f'\n        parameters {{ key: "trt_profile_{bound}_shapes" value: {_quoted(shape(signature, images))} }}'
            for bound, images in bounds.items()
        )
    return _filled("onnxruntime.pbtxt", name, title, signature, batching, labels, profile=profile)


def shape(signature: Signature, images: int) -> str:
    """The input's shape as TensorRT's tools want it: ``input:8x3x224x224``."""
    return f"{signature.input.name}:{'x'.join(map(str, (images, *signature.input.example)))}"


def _filled(
    template: str, name: str, title: str, signature: Signature, batching: Batching, labels: bool, **more: str
) -> str:
    return template_of(template).substitute(
        mark=MARK,
        version=resnet_fast.__version__,
        name=name,
        title=title,
        max_batch=batching.max_batch,
        preferred=", ".join(map(str, batching.preferred)),
        queue_delay=batching.queue_delay,
        instances=batching.instances,
        tensors=_tensors(signature, labels),
        warm_up=_warm_up(signature.input, sorted({1, *batching.preferred})),
        **more,
    )


def template_of(file: str) -> Template:
    """A file of the folder files/ with ``$names`` to fill in."""
    return Template(files("resnet_fast.serving").joinpath("files", file).read_text(encoding="utf-8"))


def _tensors(signature: Signature, labels: bool) -> str:
    """Inputs and outputs. The labels belong to an output with a number for each class."""
    named = ("logits", "probabilities")
    outputs = [
        f"  {_described(output)[:-2]} label_filename: {_quoted(LABELS)} }}"
        if labels and output.name in named
        else f"  {_described(output)}"
        for output in signature.outputs
    ]
    return f"input [\n  {_described(signature.input)}\n]\noutput [\n{_joined(outputs)}\n]"


def _described(port: Port) -> str:
    return f"{{ name: {_quoted(port.name)} data_type: {port.dtype} dims: [ {', '.join(map(str, port.dims))} ] }}"


def _warm_up(port: Port, batches: list[int]) -> str:
    dims = ", ".join(map(str, port.example))
    value = f"value {{ data_type: {port.dtype} dims: [ {dims} ] random_data: true }}"
    rows = [
        f'  {{ name: "batch {images}" batch_size: {images} inputs {{ key: {_quoted(port.name)} {value} }} }}'
        for images in batches
    ]
    return f"model_warmup [\n{_joined(rows)}\n]"


def _joined(rows: list[str]) -> str:
    return ",\n".join(rows)


def _quoted(text: str) -> str:
    """A string of the text format of protocol buffers."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
