"""What is changed in the graph that ``torch.onnx`` gives: it reads as the network is usually drawn, and its ends are
what the caller asked for, whatever it computes in."""

from typing import Optional

import onnx_ir as ir
from onnx_ir.passes import common
from onnx_ir.tape import Tape


def copied(model: ir.Model) -> ir.Model:
    """Return a copy, whose constants may be shared. The oldest onnx-ir makes none, so a file in memory has to."""
    return model.clone() if hasattr(model, "clone") else ir.from_proto(ir.to_proto(model))


def tidy(model: ir.Model) -> None:
    """Name the global pool as such; remove what is unused, and every trace of the source code that made the graph."""
    for node in list(model.graph):
        if node.op_type == "ReduceMean":
            _name_global_pool(node)
    for node in list(model.graph):
        if node.op_type == "Reshape":
            _name_flatten(node)
    common.RemoveUnusedNodesPass()(model)
    common.RemoveUnusedFunctionsPass()(model)
    common.RemoveUnusedOpsetsPass()(model)
    # It holds absolute paths and lines of source code, and takes 37 KB on a small network.
    common.ClearMetadataAndDocStringPass()(model)
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.metadata_props.clear()


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


def _name_global_pool(mean: ir.Node) -> None:
    """``ReduceMean`` over height and width -> ``GlobalAveragePool``, which every runtime has a kernel for."""
    images = mean.inputs[0]
    axes = _constant(mean.inputs[1]) if len(mean.inputs) > 1 else None
    if images is None or images.shape is None or axes is None:
        return
    if len(images.shape) != 4 or sorted(axis % 4 for axis in axes) != [2, 3]:
        return
    pool = ir.node("GlobalAveragePool", [images], name=f"{mean.name}_pool")
    nodes = [pool]
    if not mean.attributes.get_int("keepdims", 1):
        nodes.append(ir.node("Flatten", pool.outputs, attributes={"axis": 1}, name=f"{mean.name}_flatten"))
    else:
        pool.outputs[0].shape = mean.outputs[0].shape
    _replace(mean, nodes)


def _name_flatten(reshape: ir.Node) -> None:
    """``Reshape`` of ``[N, C, 1, 1]`` to ``[N, C]`` -> ``Flatten``, which needs no shape, so none can be baked in."""
    pooled, result = reshape.inputs[0], reshape.outputs[0]
    if pooled is None or result.shape is None or len(result.shape) != 2:
        return
    producer = pooled.producer()
    if producer is not None and producer.op_type == "GlobalAveragePool":
        _replace(reshape, [ir.node("Flatten", [pooled], attributes={"axis": 1}, name=f"{reshape.name}_flatten")])


def _replace(old: ir.Node, new: list[ir.Node]) -> None:
    assert old.graph is not None
    result = new[-1].outputs[0]
    result.shape, result.type = old.outputs[0].shape, old.outputs[0].type
    if len(new) > 1:
        new[0].outputs[0].type = result.type
    ir.convenience.replace_nodes_and_values(old.graph, old, [old], new, old.outputs, [result])


def _constant(value: ir.Value | None) -> list[int] | None:
    if value is None:
        return None
    tensor = ir.convenience.get_const_tensor(value)
    return None if tensor is None else [int(item) for item in tensor.numpy().ravel()]
