"""``torch.compile(model, backend="resnet_fast")``: dynamo's graph with our ops in it.

What matches in the graph is replaced as in any forward.

- In inference on a CPU, a graph that the native library knows from end to end is one native program.
- Any other graph goes to Inductor, which sees our ops as kernels of somebody else's, and compiles the rest; or with
  ``options={"rest": "eager"}`` it is run as it is.
"""

import logging
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Optional

import torch
from torch import Tensor, fx, nn

from resnet_fast import network
from resnet_fast.accelerated import accelerate
from resnet_fast.graph.aliasing import hidden_write
from resnet_fast.graph.conditions import transform
from resnet_fast.graph.patterns import Match, matches
from resnet_fast.graph.raising import Bound, Layer, known_tensor, known_value, lower_layers, raise_layers
from resnet_fast.graph.rewriting import rewrite
from resnet_fast.graph.training_blocks import blocks

logger = logging.getLogger(__name__)


def backend(
    module: fx.GraphModule,
    inputs: Sequence[Any],
    *,
    mode: Optional[str] = None,
    options: Optional[dict[str, Any]] = None,
) -> Callable[..., Any]:
    """What ``torch.compile`` calls with a graph, the mode and the options; those that are not ours are Inductor's.

    Raises:
        ValueError: ``options["rest"]`` is neither "inductor" nor "eager".
    """
    patches = dict(options or {})
    rest = patches.pop("rest", "inductor")
    if rest not in ("inductor", "eager"):
        raise ValueError(f'options["rest"] is {rest!r}, expected "inductor" or "eager"')
    planned = _fuse(module, inputs)
    if planned is not None:
        return planned.run
    if rest == "eager":
        return module.forward
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    patches = {**(list_mode_options(mode) if mode else {}), **patches}
    compiled: Any = compile_fx(module, list(inputs), config_patches=patches)
    return compiled


def _fuse(module: fx.GraphModule, inputs: Sequence[Any]) -> Optional["_Planned"]:
    """Put our ops into ``module``. Gives the whole as one native program, if it is one for these inputs."""
    graph = module.graph
    convolutions = sum(node.target is torch.conv2d for node in graph.nodes)
    layers = {} if transform() else raise_layers(module)
    norms = [one for one in layers.values() if isinstance(one.layer, nn.BatchNorm2d)]
    training = any(one.layer.training or "running_mean" not in one.tensors for one in norms)
    image = _image(graph, layers)
    found: list[Match] = []
    if image is not None and not hidden_write(module, graph, image) and not _share_statistics(norms):
        found = matches(module, graph, training)
    fused = sum(
        isinstance(layers[name].layer, nn.Conv2d) for match in found for name in match.op.parts if name in layers
    )
    planned = _plan(module, layers, inputs) if fused and not training else None
    if fused:
        rewrite(module, graph, blocks(module, graph, found) if training else found, training, image)
    lower_layers(module, layers)
    whole = ", and the whole graph is one native program" if planned is not None else ""
    logger.info("%d of %d convolutions fused%s", fused, convolutions, whole)
    logger.debug("what runs now:\n%s", graph)
    return planned


def _image(graph: fx.Graph, layers: dict[str, Layer]) -> Optional[fx.Node]:
    """The first input that is an image."""
    weights = {node for one in layers.values() for node in one.tensors.values()}
    inputs = [node for node in graph.nodes if node.op == "placeholder" and node not in weights]
    return next((node for node in inputs if (value := known_tensor(node)) is not None and value.dim() == 4), None)


def _share_statistics(norms: list[Layer]) -> bool:
    """Whether one norm is called with several settings: they come in order, of which the matcher does not know."""
    moved = [one.tensors["running_mean"] for one in norms if "running_mean" in one.tensors]
    return len(set(moved)) < len(moved)


# --- whole graphs -----------------------------------------------------------------------------------------------------


class _Planned:
    """A graph as one native program, while it is called with the parameters that it was made for; else op by op.

    Dynamo keeps a graph when the model has gone, and no graph may keep a model's parameters. So the program has aliases
    of them, with the same memory and version, and goes with the first one.
    """

    def __init__(self, module: fx.GraphModule, model: nn.Module, image: int, parameters: dict[int, Tensor]) -> None:
        self.module, self.image = module, image
        self.model: Optional[nn.Module] = model
        self.parameters = [(i, weakref.ref(one, self._forget), one.data_ptr()) for i, one in parameters.items()]

    def _forget(self, reference: weakref.ref) -> None:
        self.model = None

    def run(self, *inputs: Any) -> Any:
        model = self.model
        if model is None or not all(
            inputs[i] is reference() and inputs[i].data_ptr() == address for i, reference, address in self.parameters
        ):
            return self.module(*inputs)
        return model(inputs[self.image])


def _plan(module: fx.GraphModule, layers: dict[str, Layer], inputs: Sequence[Any]) -> Optional[_Planned]:
    """The graph, whose layers have been raised and not yet replaced, if it is one native program."""
    given = dict(zip(module.graph.find_nodes(op="placeholder"), inputs))
    images = [node for node, value in given.items() if node.users and isinstance(value, Tensor)]
    if len(images) != 1:
        return None
    children = {
        name: Bound(one)(*(given[node].detach() for node in one.tensors.values())) for name, one in layers.items()
    }
    graph = fx.Graph()
    known = {images[0]: graph.placeholder("image")}
    for node in module.graph.nodes:
        if node.op != "placeholder":
            known[node] = graph.node_copy(node, known.__getitem__)
        elif node.users and node not in known:
            dimension = _dimension(images[0], node)
            if dimension is None:
                return None
            known[node] = graph.call_method("size", (known[images[0]], dimension))
    model = accelerate(fx.GraphModule(children, graph).eval())
    if network.plan_for(model, (given[images[0]],), {}) is None:
        return None
    places = {node: i for i, node in enumerate(given)}
    parameters = {places[node]: given[node] for one in layers.values() for node in one.tensors.values()}
    return _Planned(module, model, places[images[0]], parameters)


def _dimension(image: fx.Node, number: fx.Node) -> Optional[int]:
    """Which of an image's sizes a number is that dynamo gives beside it."""
    sizes = [getattr(size, "node", None) for size in known_value(image).shape]
    symbol = getattr(known_value(number), "node", None)
    return next((i for i, size in enumerate(sizes) if size and symbol and size.expr == symbol.expr), None)
