"""The ends of the graph: what it takes and gives, whatever it computes in."""

from typing import Optional

import onnx_ir as ir
from onnx_ir.tape import Tape


def attach_input(model: ir.Model, dtype: ir.DataType) -> None:
    """Have the input of ``model`` be of ``dtype``, with a Cast behind it if the network reads another type."""
    graph = model.graph
    network = graph.inputs[0]
    if network.dtype == dtype:
        return
    assert network.dtype is not None
    given = ir.val("input", dtype, network.shape)
    tape = Tape()
    cast = tape.op("Cast", [given], {"to": network.dtype}, name="input_cast", output=ir.Value(name="input_cast"))
    cast.shape, cast.type = network.shape, network.type
    ir.convenience.replace_all_uses_with(network, cast)
    graph.inputs[0] = given
    graph.insert_before(graph[0], tape.nodes)


def attach_outputs(model: ir.Model, dtype: ir.DataType, softmax: bool, top_k: Optional[int]) -> None:
    """Give ``logits``, or ``probabilities`` if ``softmax``, in ``dtype``; then ``scores`` and ``classes`` if ``top_k``.

    ``scores`` ``[batch, top_k]`` are the largest values of the first output, in falling order, and ``classes`` (int64)
    their places. Softmax is computed in float32, of what the network gives in its own type.
    """
    graph = model.graph
    value = graph.outputs[0]
    assert value.shape is not None
    assert value.dtype is not None
    shape, inner = value.shape, value.dtype
    value.name = "network"
    tape = Tape()

    def named(name: str, operator: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
        result = ir.Value(name=name, shape=shape, type=ir.TensorType(inner))
        return tape.op(operator, inputs, attributes, name=f"{name}_{operator}", output=result)

    def cast(to: ir.DataType, name: str) -> None:
        nonlocal value, inner
        if inner != to:
            inner = to
            value = named(name, "Cast", value, to=to)

    if softmax:
        cast(ir.DataType.FLOAT, "logits_float")
        value = named("softmax", "Softmax", value, axis=1)
    cast(dtype, "output")
    value.name = "probabilities" if softmax else "logits"
    value.shape, value.type = shape, ir.TensorType(dtype)
    outputs = [value]
    if top_k is not None:
        count = tape.initializer(ir.tensor([top_k], ir.DataType.INT64, name="top_k"), "top_k")
        best = [
            ir.Value(name=name, shape=ir.Shape([shape[0], top_k]), type=ir.TensorType(kind))
            for name, kind in (("scores", dtype), ("classes", ir.DataType.INT64))
        ]
        tape.op_multi_out("TopK", [value, count], {"axis": 1}, name="top_k", outputs=best)
        graph.register_initializer(count)
        outputs += best
    graph.extend(tape.nodes)
    graph.outputs[:] = outputs
