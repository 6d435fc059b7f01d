"""The layers of an exported network that can compute in 8 bits, and the residual adds that they end in."""

from dataclasses import dataclass
from typing import Any, Optional

import onnx_ir as ir

from resnet_fast.graph.residual_blocks import convolutions_before, main_path


@dataclass(frozen=True)
class Layer:
    """A convolution, or a fully connected layer, of the graph; nodes and values by name, so that a copy has it too.

    Attributes:
        path: of the module in the PyTorch model, read from the weight's name: ``layer1.0.conv2``.
        node: that computes it.
        input, weight, output: the values that it reads and writes.
        add: the residual Add that ``output`` goes into, and nowhere else; None if there is none.
        identity: the other operand of ``add``.
    """

    path: str
    node: str
    input: str
    weight: str
    output: str
    add: Optional[str] = None
    identity: Optional[str] = None

    @property
    def range_names(self) -> dict[str, str]:
        """The names of its ranges, each with the value that the range is of."""
        names = {f"{self.path}.input": self.input}
        if self.identity is not None:
            names[f"{self.path}.residual"] = self.identity
        return names


def find_layers(graph: ir.Graph) -> list[Layer]:
    """All convolutions and fully connected layers whose weight is a float32 constant, in the order of the graph."""
    residuals = _residuals(graph)
    layers: dict[str, Layer] = {}
    for node in graph:
        if not _is_layer(node):
            continue
        images, weight = node.inputs[:2]
        assert images is not None
        assert weight is not None
        path = str(weight.name).removesuffix(".weight")
        if path in layers:  # a weight that two nodes share
            path = f"{path}.{node.name}"
        add, identity = residuals.get(str(node.name), (None, None))
        layers[path] = Layer(
            path, str(node.name), str(images.name), str(weight.name), str(node.outputs[0].name), add, identity
        )
    return list(layers.values())


def _is_layer(node: ir.Node) -> bool:
    if node.op_type == "Gemm":
        plain = all(node.attributes.get_float(name, 1.0) == 1.0 for name in ("alpha", "beta"))
        known = plain and node.attributes.get_int("transB", 0) == 1 and node.attributes.get_int("transA", 0) == 0
    else:
        known = node.op_type == "Conv"
    if not known or len(node.inputs) < 2:
        return False
    weight = node.inputs[1]
    return weight is not None and weight.is_initializer() and weight.dtype == ir.DataType.FLOAT


def _residuals(graph: ir.Graph) -> dict[str, tuple[str, str]]:
    """By the name of a convolution: the name of the Add that it ends in, and of that Add's other operand."""
    counts = convolutions_before(graph, _producers, lambda node: node.op_type == "Conv")
    found = {}
    for node in graph:
        if node.op_type != "Add" or len(node.inputs) != 2 or any(_is_constant(value) for value in node.inputs):
            continue
        ends = main_path(node.inputs, _ends_in_convolution, lambda value: counts.get(_producer(value), 0))
        if ends is not None:
            last, identity = ends
            assert identity is not None
            found[str(_producer(last).name)] = (str(node.name), str(identity.name))
    return found


def _producers(node: ir.Node) -> list[ir.Node]:
    return [producer for value in node.inputs if (producer := _producer(value)) is not None]


def _producer(value: Any) -> Any:
    return None if value is None else value.producer()


def _is_constant(value: Optional[ir.Value]) -> bool:
    return value is None or value.is_initializer() or ir.convenience.get_const_tensor(value) is not None


def _ends_in_convolution(value: Any) -> bool:
    """Whether ``value`` is the result of a convolution that nothing else reads."""
    producer = _producer(value)
    if producer is None or producer.op_type != "Conv":
        return False
    return len(value.uses()) == 1 and not value.is_graph_output()
