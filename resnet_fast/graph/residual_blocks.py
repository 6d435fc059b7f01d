"""Where a network adds to a convolution's result, and what: the shortcuts of its residual blocks.

Which operand of an addition is the block's main path, and which its shortcut, is decided here for all: for fusion
(``patterns.py``), for quantisation in training (``finetune/qat.py``), and for 8 bits in an exported file
(``export/quantise/layers.py``).

``residuals`` finds the shortcuts of a model in the traced forwards of its modules, so that they are recognised by what
is computed, whatever classes and children are called.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Optional, TypeVar

from torch import fx, nn
from torchvision.ops import FrozenBatchNorm2d

from resnet_fast.graph.conditions import is_sequential
from resnet_fast.graph.tracing import Untraceable, called, is_addition, trace

N = TypeVar("N")


def convolutions_before(
    nodes: Iterable[N], inputs: Callable[[N], Iterable[N]], own: Callable[[N], int]
) -> dict[N, int]:
    """How many convolutions are on the longest way to each node, itself included.

    Args:
        nodes: of a graph, in order.
        inputs: the nodes that a node reads.
        own: how many convolutions a node is.
    """
    counts: dict[N, int] = {}
    for node in nodes:
        counts[node] = own(node) + max((counts.get(given, 0) for given in inputs(node)), default=0)
    return counts


def main_path(
    operands: Sequence[N], ends_in_convolution: Callable[[N], bool], depth: Callable[[N], int]
) -> Optional[tuple[N, N]]:
    """Of an addition's two operands, the end of a residual block's main path, and its shortcut; None: neither is one.

    The main path ends in a convolution's result that nothing else reads. With a convolution on the shortcut too, it is
    the one with more of them (``depth``). TensorRT computes the addition within that convolution, and so do we.
    """
    first, second = operands
    ends = [pair for pair in ((first, second), (second, first)) if ends_in_convolution(pair[0])]
    return max(ends, key=lambda pair: depth(pair[0])) if ends else None


def depths(module: nn.Module, graph: fx.Graph) -> dict[fx.Node, int]:
    """``convolutions_before`` every node of a module's graph."""

    def own(node: fx.Node) -> int:
        child = called(module, node)
        return 0 if child is None else sum(isinstance(part, nn.Conv2d) for part in child.modules())

    return convolutions_before(graph.nodes, lambda node: node.all_input_nodes, own)


_PASSED_IN_EVAL_MODE = ("DropPath", "DropBlock2d", "StochasticDepth")  # of timm and torchvision, by name


@dataclass(frozen=True)
class Residual:
    """An addition to a convolution's result, in eval mode, when batch norm is a part of the convolution.

    Attributes:
        conv: the convolution.
        owner: what is added to it is this module's input, the first one, or its output.
        is_input: which of both.
        readers: the convolutions that read the same tensor, which nothing else does.
    """

    conv: nn.Conv2d
    owner: nn.Module
    is_input: bool
    readers: tuple[nn.Conv2d, ...]


def residuals(model: nn.Module) -> list[Residual]:
    """All of ``model``. It is left as it was.

    Raises:
        ValueError: of a module that calls convolutions, the forward cannot be traced; or what it adds is no input or
            output of a module, or read by others than convolutions, so that no hook can change it for the addition
            alone.
    """
    finder = _Finder(model)
    return [residual for module in finder.paths for residual in finder.residuals_in(module)]


class _Finder:
    def __init__(self, model: nn.Module) -> None:
        every = list(model.named_modules(remove_duplicate=False))
        self.paths = {module: path for path, module in reversed(every)}
        self.occurrences = Counter(module for _, module in every)
        self._graphs: dict[nn.Module, Optional[fx.Graph]] = {}

    def residuals_in(self, module: nn.Module) -> list[Residual]:
        """Those that the module's own forward adds."""
        graph = None if is_sequential(module) else self.graph(module)
        additions = [] if graph is None else [node for node in graph.nodes if is_addition(node)]
        found = (self._residual(module, node) for node in additions)
        return [residual for residual in found if residual is not None]

    def graph(self, module: nn.Module) -> Optional[fx.Graph]:
        """Of a module with children and a forward; None of others, and of one without convolutions of its own that
        cannot be traced."""
        if module not in self._graphs:
            calls = any(True for _ in module.children()) and not isinstance(module, (nn.ModuleList, nn.ModuleDict))
            self._graphs[module] = self._traced(module) if calls else None
        return self._graphs[module]

    def _traced(self, module: nn.Module) -> Optional[fx.Graph]:
        try:
            return trace(module, False)[1]
        except Untraceable as error:
            if not _owns_convolutions(module):
                return None
            raise ValueError(
                f"{self.name(module)} has convolutions, and what it adds to them is not known: {error}"
            ) from error

    def name(self, module: nn.Module) -> str:
        return f"{self.paths[module] or 'model'} ({type(module).__name__})"

    def _residual(self, module: nn.Module, addition: fx.Node) -> Optional[Residual]:
        operands = [node for node in addition.args if isinstance(node, fx.Node)]
        if len(operands) != 2 or operands[0] is operands[1]:
            return None
        convs = {node: self._conv_behind(module, node) for node in operands}
        ends = main_path(operands, lambda node: convs[node] is not None, depths(module, addition.graph).__getitem__)
        if ends is None:
            return None
        main, added = ends
        conv = convs[main]
        assert conv is not None
        is_input = added.op == "placeholder"
        owner = module if is_input else called(module, added)
        where = f"{self.name(module)} adds {added.name!r} to {self.paths[conv]}"
        if owner is None or (is_input and added.prev.op != "root"):
            raise ValueError(f"{where}, expected the module's first input or what a child of it gives")
        if not is_input and not self._called_once(owner, added):
            raise ValueError(f"{where}, expected a child that is called once only")
        readers = self._readers(module, added, addition, where)
        return Residual(conv, owner, is_input, tuple(readers))

    def _conv_behind(self, module: nn.Module, node: fx.Node) -> Optional[nn.Conv2d]:
        """The convolution that ``node`` is the result of, normalised or not, and that nothing else reads."""
        while node.op == "call_module" and len(node.users) == 1:
            child = called(module, node)
            assert child is not None
            if isinstance(child, nn.Conv2d):
                return child
            if _is_identity(child) or _is_norm(child):
                given: Any = node.args[0]
            else:
                graph = self.graph(child)
                if graph is None:
                    return None
                module, given = child, graph.output_node().args[0]
            if not isinstance(given, fx.Node):
                return None
            node = given
        return None

    def _called_once(self, child: nn.Module, node: fx.Node) -> bool:
        """As far as can be told: by one name, and by one node of the graph."""
        calls = [one for one in node.graph.nodes if one.op == "call_module" and one.target == node.target]
        return self.occurrences[child] == 1 and calls == [node]

    def _readers(self, module: nn.Module, node: fx.Node, addition: Optional[fx.Node], where: str) -> list[nn.Conv2d]:
        """The convolutions that read ``node`` beside ``addition``."""
        found: list[nn.Conv2d] = []
        for user in node.users:
            if user is addition:
                continue
            child = called(module, user) if user.args == (node,) and not user.kwargs else None
            if isinstance(child, nn.Conv2d) and self._called_once(child, user):
                found.append(child)
            elif child is not None and _is_identity(child):
                found += self._readers(module, user, None, where)
            elif child is not None and (graph := self.graph(child)) is not None:
                found += self._readers(child, next(iter(graph.nodes)), None, where)
            else:
                raise ValueError(f"{where}, and {user.name!r} reads it too, expected none but convolutions")
        return found


def _is_identity(child: nn.Module) -> bool:
    dropout = isinstance(child, nn.modules.dropout._DropoutNd) or type(child).__name__ in _PASSED_IN_EVAL_MODE
    return dropout or isinstance(child, nn.Identity)


def _is_norm(child: nn.Module) -> bool:
    """Whether it is a batch norm by running statistics and no more; timm's may have an activation in them."""
    plain = all(_is_identity(getattr(child, name, nn.Identity())) for name in ("act", "drop"))
    norm = isinstance(child, (nn.modules.batchnorm._BatchNorm, FrozenBatchNorm2d))
    return norm and plain and child.running_mean is not None


def _owns_convolutions(module: nn.Module) -> bool:
    lists = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    return any(
        isinstance(child, nn.Conv2d) or (isinstance(child, lists) and _owns_convolutions(child))
        for child in module.children()
    )
