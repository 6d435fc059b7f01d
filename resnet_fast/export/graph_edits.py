"""What is changed in the graph that ``torch.onnx`` gives, so that it reads as the network is usually drawn."""

import onnx_ir as ir
from onnx_ir.passes import common


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
