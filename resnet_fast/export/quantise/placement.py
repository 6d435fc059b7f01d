"""Pairs of QuantizeLinear and DequantizeLinear where TensorRT wants them, and layers in half precision.

TensorRT computes a convolution in 8 bits where its input and its weight come out of a DequantizeLinear, and takes bias,
residual Add and ReLU into the same kernel if nothing stands between them and the Add's other operand is dequantised as
well. So these, and nothing else, are quantised:

    x -> Q -> DQ -> Conv -> Add -> Relu -> Q -> DQ -> next Conv
    int8 weight -> DQ -^     ^- DQ <- Q <- identity

All scales are symmetric, a weight's per output channel; biases stay in float32.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Optional

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes import common

from resnet_fast.export.quantise.layers import Layer
from resnet_fast.kernels.symmetric import quantised_weight, scale_of

_POOLS = ("MaxPool", "AveragePool")


def place(model: ir.Model, layers: Sequence[Layer], ranges: Mapping[str, float], in_half: Collection[str] = ()) -> None:
    """Quantise ``layers`` of ``model``, in place.

    Args:
        model: as exported in float32.
        layers: of the model's graph; those that are not named here stay as they are.
        ranges: the largest absolute value for each of the layers' ``range_names``.
        in_half: paths of those of ``layers`` that compute in float16 instead.
    """
    graph = model.graph
    nodes = {str(node.name): node for node in graph}
    for layer in layers:
        if layer.path in in_half:
            _halve(graph, nodes[layer.node])
    values = {str(value.name): value for value in _values(graph)}  # only now: a cast takes over its value's name
    pairs = _Pairs(graph)
    for layer in layers:
        if layer.path in in_half:
            continue
        node = nodes[layer.node]
        node.replace_input_with(0, pairs.dequantised(values[layer.input], ranges[f"{layer.path}.input"]))
        node.replace_input_with(1, _dequantised_weight(graph, node))
        if layer.identity is not None and layer.add is not None:
            add, identity = nodes[layer.add], values[layer.identity]
            dequantised = pairs.dequantised(identity, ranges[f"{layer.path}.residual"])
            add.replace_input_with(list(add.inputs).index(identity), dequantised)
    pairs.lend_to_pools()
    graph.sort()
    common.RemoveUnusedNodesPass()(model)


def _values(graph: ir.Graph) -> list[ir.Value]:
    return [*graph.inputs, *(value for node in graph for value in node.outputs)]


class _Pairs:
    """One Q and one DQ for each value and scale, however many read it."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._made: dict[tuple[ir.Value, float], ir.Value] = {}
        self._zero: Optional[ir.Value] = None

    def dequantised(self, value: ir.Value, amax: float) -> ir.Value:
        key = (value, amax)
        if key not in self._made:
            self._made[key] = self._pair(value, amax)
        return self._made[key]

    def _pair(self, value: ir.Value, amax: float) -> ir.Value:
        if self._zero is None:
            self._zero = _constant(self._graph, "zero_point", np.int8(0))
        # The second scale of a value gets another name.
        number = sum(value is other for other, _ in self._made)
        name = f"{value.name}_{number}" if number else str(value.name)
        scale = _constant(self._graph, f"{name}_scale", np.float32(scale_of(amax)))
        quantise = ir.node("QuantizeLinear", [value, scale, self._zero], name=f"{name}_quantise")
        _describe(quantise.outputs[0], f"{name}_int8", value.shape, ir.DataType.INT8)
        dequantise = ir.node("DequantizeLinear", [quantise.outputs[0], scale, self._zero], name=f"{name}_dequantise")
        self._graph.extend([quantise, dequantise])  # sorted at the end
        return _describe(dequantise.outputs[0], f"{name}_dequantised", value.shape, ir.DataType.FLOAT)

    def lend_to_pools(self) -> None:
        """A pool beside a convolution reads what the convolution reads, so that nobody needs the float32 tensor."""
        for (value, _), dequantised in self._made.items():
            for node, index in value.uses():
                if node.op_type in _POOLS:
                    node.replace_input_with(index, dequantised)


def _constant(graph: ir.Graph, name: str, array: np.ndarray | np.generic) -> ir.Value:
    array = np.asarray(array)
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def _dequantised_weight(graph: ir.Graph, node: ir.Node) -> ir.Value:
    """The weight as int8 with a scale for each output channel, and dequantised; the float32 one if it is that already.

    Two nodes that share a weight share this one.
    """
    weight = node.inputs[1]
    assert weight is not None
    name = f"{weight.name}_dequantised"
    made = next((value for value in _values(graph) if value.name == name), None)
    if made is not None:
        return made
    rounded, scales = (one.numpy() for one in quantised_weight(torch.tensor(_array(weight))))
    inputs = [_constant(graph, f"{weight.name}_int8", rounded), _constant(graph, f"{weight.name}_scale", scales)]
    dequantise = ir.node("DequantizeLinear", inputs, attributes={"axis": 0}, name=f"{weight.name}_dequantise")
    graph.append(dequantise)
    return _describe(dequantise.outputs[0], name, weight.shape, ir.DataType.FLOAT)


def _array(value: ir.Value) -> np.ndarray:
    assert value.const_value is not None
    return value.const_value.numpy()


def _halve(graph: ir.Graph, node: ir.Node) -> None:
    """Let ``node`` compute in float16, and the ReLU after it, if nothing else reads its result."""
    images, *constants = node.inputs
    assert images is not None
    producer = images.producer()
    before = None if producer is None or producer.op_type != "Cast" else producer.inputs[0]
    if before is not None and before.dtype == ir.DataType.FLOAT16:
        node.replace_input_with(0, before)  # the layer before is in half precision too
    else:
        node.replace_input_with(0, _cast(graph, images, ir.DataType.FLOAT16, f"{node.name}_half_input"))
    for index, constant in enumerate(constants, 1):
        assert constant is not None
        name = f"{constant.name}_half"
        known = graph.initializers.get(name)
        with np.errstate(over="ignore"):  # what a weight of infinity does will be seen in the results
            half = _constant(graph, name, _array(constant).astype(np.float16)) if known is None else known
        node.replace_input_with(index, half)
    last = node
    node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT16)
    uses = list(node.outputs[0].uses())
    if len(uses) == 1 and uses[0].node.op_type == "Relu" and not node.outputs[0].is_graph_output():
        last = uses[0].node
        last.outputs[0].type = ir.TensorType(ir.DataType.FLOAT16)
    _return_to_single(graph, last.outputs[0], f"{node.name}_single_output")


def _return_to_single(graph: ir.Graph, value: ir.Value, name: str) -> None:
    """Cast ``value`` to float32 for all who read it; the result takes its name, which may be that of an output."""
    uses = list(value.uses())
    outputs = [index for index, output in enumerate(graph.outputs) if output is value]
    original, value.name = value.name, f"{value.name}_half"
    single = _cast(graph, value, ir.DataType.FLOAT, name)
    single.name = original
    for reader, index in uses:
        reader.replace_input_with(index, single)
    for index in outputs:
        graph.outputs[index] = single


def _cast(graph: ir.Graph, value: ir.Value, dtype: ir.DataType, name: str) -> ir.Value:
    cast = ir.node("Cast", [value], attributes={"to": dtype}, name=name)
    graph.append(cast)
    return _describe(cast.outputs[0], f"{name}_value", value.shape, dtype)


def _describe(value: ir.Value, name: str, shape: Optional[ir.Shape], dtype: ir.DataType) -> ir.Value:
    # A new type each time: a copy of a graph shares the types of its values with the original.
    value.name, value.shape, value.type = name, shape, ir.TensorType(dtype)
    return value
