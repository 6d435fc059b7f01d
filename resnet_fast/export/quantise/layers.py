"""The layers of an exported network that can compute in 8 bits, and the residual adds that they end in."""

from dataclasses import dataclass
from typing import Optional

import onnx_ir as ir


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
    """By the name of a convolution: the name of the Add that it ends in, and of that Add's other operand.

    Where both operands are convolutions, one is the block's last and one its shortcut. TensorRT computes the Add within
    the former, which is the one with more convolutions before it.
    """
    depths: dict[Optional[ir.Value], int] = {}
    found = {}
    for node in graph:
        depth = max((depths.get(value, 0) for value in node.inputs), default=0)
        for value in node.outputs:
            depths[value] = depth + (node.op_type == "Conv")
        if node.op_type != "Add" or len(node.inputs) != 2 or any(_is_constant(value) for value in node.inputs):
            continue
        first, second = node.inputs
        ends = [pair for pair in ((first, second), (second, first)) if _ends_in_add(pair[0])]
        if ends:
            last, identity = max(ends, key=lambda pair: depths.get(pair[0], 0))
            producer = last.producer() if last is not None else None
            assert producer is not None
            assert identity is not None
            found[str(producer.name)] = (str(node.name), str(identity.name))
    return found


def _is_constant(value: Optional[ir.Value]) -> bool:
    return value is None or value.is_initializer() or ir.convenience.get_const_tensor(value) is not None


def _ends_in_add(value: Optional[ir.Value]) -> bool:
    """Whether ``value`` is the result of a convolution that nothing else reads."""
    producer = None if value is None else value.producer()
    if value is None or producer is None or producer.op_type != "Conv":
        return False
    return len(value.uses()) == 1 and not value.is_graph_output()
