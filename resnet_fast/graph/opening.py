"""Small children that a trace follows into, as if their parent did itself what they do.

timm's ``BatchNormAct2d`` is a batch norm and an activation, detectron2's ``Conv2d`` a convolution and its norm, a
``ConvModule`` all three. Such a child is *opened*: its forward becomes part of the graph of the module that calls it.
What it computes decides, whatever its class: it must be a row of layers, the same in both modes.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Optional

from torch import fx, nn
from torch.nn.modules import module as nn_module
from torch.utils._python_dispatch import _disable_current_modes

from resnet_fast.graph.aliasing import written
from resnet_fast.graph.conditions import NORMS, SYNCHRONISED, Path, child_at, customised, is_sequential
from resnet_fast.graph.cores import BATCH_NORMS, CORE, AffineCore, affine_core, agree, core_of, normalisation, owner_of
from resnet_fast.graph.purity import Observer
from resnet_fast.graph.reads import stock_type
from resnet_fast.graph.tracing import Tracer, path_of


def _may_open(child: nn.Module) -> bool:
    """Whether a child is small, and has what could be a core: a convolution, or tensors of its own."""
    stock = stock_type(child)
    if stock.__module__.startswith(("torch.nn.", "torch.jit.")) or stock in NORMS or is_sequential(child):
        return False
    if nn_module._has_any_global_hook():
        return False
    convolutions = sum(isinstance(part, nn.Conv2d) for part in child.modules())
    tensors = any(t is not None for t in (*child._parameters.values(), *child._buffers.values()))
    return not customised(child) and (convolutions == 1 or (convolutions == 0 and tensors))


class Opener(Tracer):
    """Opens the children that it can."""

    def __init__(self, module: nn.Module, observer: Observer) -> None:
        super().__init__(module, observer)
        self.opened: dict[Path, type] = {}
        self.shut: dict[str, str] = {}  # why others were not opened
        self._looking = False  # at tensors, not recording
        self._open: list[str] = []  # children that are being followed into
        self._answers: list[list[bool]] = []  # to the question that each of them may still ask

    def trace(self, root: Any, concrete_args: Optional[dict[str, Any]] = None) -> fx.Graph:
        with self._stock_forwards():
            graph = super().trace(root, concrete_args)
        self._raise_cores(list(graph.nodes))
        return graph

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """No proxy is kept, for its node may be erased."""
        return attr_val if self._looking else super().getattr(attr, attr_val, {})

    def call_module(self, m: nn.Module, forward: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        if _may_open(m) and len(args) == 1 and isinstance(args[0], fx.Proxy) and not kwargs:
            name, opened, inlined = self.path_of_module(m), dict(self.opened), list(self.inlined)
            result = self._row(m, name, forward, args[0])
            if result is not None:
                self.opened[tuple(name.split("."))] = stock_type(m)
                return result
            self.shut.setdefault(name, f"is a {type(m).__name__}, which does more than a row of layers")
            self.opened, self.inlined = opened, inlined
        return super().call_module(m, forward, args, kwargs)

    def tells(self) -> bool:
        """In a child, for its assertions; anything else that it made of a text would differ from mode to mode."""
        return bool(self._open)

    def to_bool(self, obj: fx.Proxy) -> bool:
        return self._answers[-1].pop() if self._answers and self._answers[-1] else super().to_bool(obj)

    # --- rows of layers ---

    def _row(self, child: nn.Module, name: str, forward: Callable, x: fx.Proxy) -> Optional[fx.Proxy]:
        """What a child makes of ``x``, if it is a row of layers, the same in both modes. Else it leaves no node."""
        other = self._followed(child, name, forward, x, flipped=True)
        described = [_described(node) for node in other]
        self._erase(other)
        row = self._followed(child, name, forward, x, flipped=False) if other else []
        if row and len(row) == len(other) and all(map(self._agree, row, described, map(_described, row))):
            return self.proxy(row[-1])
        self._erase(row)
        return None

    def _followed(self, child: nn.Module, name: str, forward: Callable, x: fx.Proxy, flipped: bool) -> list[fx.Node]:
        """The nodes of a row of layers, or none.

        flipped: in the other mode, and with the other answer, True, to the one question that it may ask about ``x``: so
            that its answer is known not to matter.
        """
        before = self._last()
        flags = [(part, part.training) for part in child.modules()]
        self._open.append(name)
        self.observer.both_modes += 1
        self._answers.append([flipped])
        try:
            for part, training in flags:
                part.__dict__["training"] = training is not flipped
            result = forward(x)
            self._raise_cores(self._since(before))
            core = self._raise_affine(self._since(before), child, name)
        except Exception as error:  # whatever its forward does not like about symbols
            self.observer.look_on()
            result, core = None, None
            self.shut[name] = f"cannot be followed: {(str(error) or repr(error)).splitlines()[0]}"
        finally:
            self._open.pop()
            self.observer.both_modes -= 1
            self._answers.pop()
            for part, training in flags:
                part.__dict__["training"] = training
        row = self._since(before) if isinstance(result, fx.Proxy) else []
        end = None if not row else result.node if result.node in row else core  # which took its place
        for node in reversed(row):
            if node is not end and not node.users and _pure(node):
                self.graph.erase_node(node)
        row = self._since(before)
        followed = [x.node, *row]
        layers = any(CORE in node.meta or isinstance(self._called(node), (nn.Conv2d, *NORMS)) for node in row)
        if layers and row[-1] is end and all(node.all_input_nodes == [at] for at, node in zip(followed, row)):
            return row
        self._erase(row)
        return []

    def _agree(self, node: fx.Node, one: tuple, other: tuple) -> bool:
        """Whether a node and another one like it, described so, compute the same."""
        layer = self._called(node)
        if isinstance(one[1], AffineCore) and isinstance(other[1], AffineCore) and layer is not None:
            with _disable_current_modes():
                return one[0] == other[0] and agree(one[1], other[1], layer)
        return one == other

    def _last(self) -> fx.Node:
        return self.graph._root.prev

    def _since(self, before: fx.Node) -> list[fx.Node]:
        nodes, node = [], self._last()
        while node is not before:
            nodes.append(node)
            node = node.prev
        return nodes[::-1]

    def _erase(self, nodes: list[fx.Node]) -> None:
        for node in reversed(nodes):
            self.graph.erase_node(node)

    def _called(self, node: fx.Node) -> Optional[nn.Module]:
        return child_at(self.root, path_of(node)) if node.op == "call_module" else None

    # --- cores ---

    def _raisable(self, layer: Optional[nn.Module], name: str) -> bool:
        """Whether a layer is known in both modes: as one of PyTorch's, or because it is being followed into."""
        return layer is not None and (name in self._open or type(layer) in (nn.Conv2d, *NORMS))

    def _core(self, name: str, x: fx.Node, core: Callable) -> fx.Node:
        node = self.create_node("call_module", name, (x,), {})
        node.meta[CORE] = core
        self.opened.setdefault(path_of(node), stock_type(self.root.get_submodule(name)))
        return node

    def _raise_cores(self, nodes: list[fx.Node]) -> None:
        for node in nodes:
            name = owner_of(node)
            layer = child_at(self.root, tuple(name.split("."))) if name else None
            found = core_of(node, layer, name) if layer and self._raisable(layer, name) else None
            if found is not None:
                core, others = found
                self._erase(others)
                self._replace(node, name, node.args[0], core)

    def _raise_affine(self, nodes: list[fx.Node], child: nn.Module, name: str) -> Optional[fx.Node]:
        if any(CORE in node.meta for node in nodes):
            return None
        self._looking = True
        try:
            with _disable_current_modes():
                found = affine_core(nodes, child, name)
        finally:
            self._looking = False
        return None if found is None else self._replace(found[0], name, *found[1:])

    def _replace(self, node: fx.Node, name: str, x: Any, core: Callable) -> fx.Node:
        with self.graph.inserting_before(node):
            raised = self._core(name, x, core)
        node.replace_all_uses_with(raised)
        self.graph.erase_node(node)
        return raised

    @contextmanager
    def _stock_forwards(self) -> Iterator[None]:
        """A batch norm's own forward, called by a subclass or past the norm's ``__call__``, is its core."""
        classes: tuple[Any, ...] = (nn.modules.batchnorm._BatchNorm, *SYNCHRONISED)
        stock = [(cls, cls.forward) for cls in classes]

        def replaced(own: Callable) -> Callable:
            def forward(norm: Any, x: Any) -> Any:
                if isinstance(x, fx.Proxy) and x.tracer is self and isinstance(norm, BATCH_NORMS):
                    name = (self.submodule_paths or {}).get(norm, "")
                    if self._raisable(norm, name):
                        return self.proxy(self._core(name, x.node, normalisation))
                return own(norm, x)

            return forward

        try:
            for cls, own in stock:
                cls.forward = replaced(own)
            yield
        finally:
            for cls, own in stock:
                cls.forward = own


def _described(node: fx.Node) -> tuple:
    return (node.op, node.target, node.args[1:], node.kwargs), node.meta.get(CORE)


def _pure(node: fx.Node) -> bool:
    return node.op == "get_attr" or (node.op in ("call_function", "call_method") and not _acts(node))


def _acts(node: fx.Node) -> bool:
    return bool(written(node, None)) or (node.op == "call_function" and node.is_impure())
