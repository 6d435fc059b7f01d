"""From a module's own forward to a fused program.

``build`` traces ``module.forward`` with ``torch.fx``, its children as black boxes, and looks in the graph for what the
fused ops compute: ``conv -> batch norm [-> add] [-> ReLU]``, the stem with its max-pool, the global average pool. What
it finds is replaced, what it does not know stays as it was, and the graph is written out as a Python function. So a
block is recognised by what it does, whatever its class and its children are called.

A program is valid for the structure it was traced from, in eval mode. ``Program.refusal`` says, cheaply enough for
every call, whether that still holds: children of the exact expected types, no hooks, running statistics in use. If it
does not, the module's own forward runs.
"""

import inspect
import linecache
import operator
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.immutable_collections import immutable_dict
from torch.nn.modules import module as nn_module
from torch.utils._pytree import tree_map
from torchvision.ops import FrozenBatchNorm2d

from resnet_fast import functional

Path = tuple[str, ...]

_NORMS = (nn.BatchNorm2d, FrozenBatchNorm2d)
_RELU_FUNCTIONS = {F.relu, F.relu_, torch.relu, torch.relu_}
_ADDITIONS = {
    operator.add: operator.add,
    operator.iadd: operator.iadd,
    torch.add: operator.add,
    "add": operator.add,
    "add_": operator.iadd,
}
_BATCH_STATISTICS = "normalises by batch statistics (training mode)"
# What reads the strides of its input, or makes a view that keeps them: given a channels_last tensor, it (or a ``view``
# further on) would fail or see another layout.
_LAYOUT_FUNCTIONS = {
    *("view", "view_as", "as_strided", "stride", "is_contiguous", "data_ptr", "storage", "untyped_storage", "numpy"),
    *("getitem", "chunk", "split", "tensor_split", "narrow", "select", "unbind", "expand", "unfold", "diagonal"),
    *("permute", "transpose", "swapaxes", "movedim", "squeeze", "unsqueeze"),
}
_LAYOUT_SAFE_PACKAGES = {"resnet_fast", "torch", "torchvision", "timm", "_operator", "builtins", "math"}


# --- what may be fused, asked at every call ---------------------------------------------------------------------------


def customised(module: nn.Module) -> str:
    """How this instance differs from its class, or ''."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return "has hooks"
    return "has a forward of its own set on the instance" if "forward" in module.__dict__ else ""


def conv_refusal(conv: nn.Module) -> str:
    if type(conv) is not nn.Conv2d:
        return f"is a {type(conv).__name__}, not nn.Conv2d"
    if conv.padding_mode != "zeros":
        return f"pads with {conv.padding_mode!r}, not zeros"
    return f"has padding={conv.padding!r}, not numbers" if isinstance(conv.padding, str) else customised(conv)


def _stem_conv_refusal(conv: nn.Module) -> str:
    return conv_refusal(conv) or ("" if _is_stem_conv(conv) else "is no longer 7x7, stride 2, padding 3")


def _norm_refusal(bn: nn.Module) -> str:
    if type(bn) is nn.BatchNorm2d:
        if bn.training:
            return _BATCH_STATISTICS
        if bn.running_mean is None or bn.running_var is None:
            return "normalises by batch statistics (it tracks no running ones)"
    elif type(bn) is not FrozenBatchNorm2d:
        return f"is a {type(bn).__name__}, not BatchNorm2d or FrozenBatchNorm2d"
    return customised(bn)


def _exact(*types: type) -> Callable[[nn.Module], str]:
    def refusal(module: nn.Module) -> str:
        return customised(module) if type(module) in types else f"is a {type(module).__name__}, not {types[0].__name__}"

    return refusal


def _stem_pool_refusal(pool: nn.Module) -> str:
    return _exact(nn.MaxPool2d)(pool) or ("" if _is_stem_pool(pool) else "is no longer 3x3, stride 2, padding 1")


def _global_pool_refusal(pool: nn.Module) -> str:
    return _exact(nn.AdaptiveAvgPool2d)(pool) or ("" if pool.output_size in (1, (1, 1)) else "is no longer global")


def _sequential_refusal(module: nn.Module) -> str:
    return customised(module) if _is_sequential(module) else f"is a {type(module).__name__}, not a Sequential"


_REFUSALS: dict[str, Callable[[nn.Module], str]] = {
    "conv": conv_refusal,
    "stem conv": _stem_conv_refusal,
    "norm": _norm_refusal,
    "relu": _exact(nn.ReLU),
    "identity": _exact(nn.Identity),
    "stem pool": _stem_pool_refusal,
    "global pool": _global_pool_refusal,
    "sequential": _sequential_refusal,
}


def _pair(value: Any) -> tuple[Any, Any]:
    return value if isinstance(value, tuple) else (value, value)


def _is_stem_conv(conv: Any) -> bool:
    geometry = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups)
    return geometry == ((7, 7), (2, 2), (3, 3), (1, 1), 1)


def _is_stem_pool(pool: Any) -> bool:
    geometry = (_pair(pool.kernel_size), _pair(pool.stride), _pair(pool.padding), _pair(pool.dilation))
    plain = not pool.ceil_mode and not pool.return_indices
    return plain and geometry == ((3, 3), (2, 2), (1, 1), (1, 1))


def _is_sequential(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def child_at(module: nn.Module, path: Path) -> Optional[nn.Module]:
    for name in path:
        module = module._modules.get(name)  # type: ignore[assignment]
        if module is None:
            return None
    return module


_PLAIN = (bool, int, float, str, type(None), tuple)
_MODULE_ATTRIBUTES = frozenset(nn.Module().__dict__)


def _settings(module: nn.Module) -> dict[str, Any]:
    """The plain attributes a forward may branch on."""
    return {k: v for k, v in module.__dict__.items() if k != "training" and isinstance(v, _PLAIN)}


def hidden_state(module: nn.Module) -> str:
    """An attribute that a forward may depend on, and whose changes ``Program.stale`` does not see, or ''."""
    return next(
        (k for k, v in module.__dict__.items() if k not in _MODULE_ATTRIBUTES and not isinstance(v, _PLAIN)), ""
    )


def _child_names(module: nn.Module) -> tuple[str, ...]:
    return tuple(name for name, child in module._modules.items() if child is not None)


class Fused:
    """Mark of the classes whose forward runs a program; see ``fused.py``."""

    stock_class: type  # the class that the forward was derived from
    stock_forward: Callable  # and that class's own forward


# --- the program ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One fused op of a program, for people: ``conv1+bn1+relu``."""

    op: str
    parts: tuple[str, ...]
    conv: Optional[Path] = None

    def __str__(self) -> str:
        return "+".join(self.parts)


@dataclass(eq=False)
class Program:
    """A module's forward with its fused ops, or the reason why there is none."""

    function: Any = None  # called with the module and its inputs
    inputs: tuple[str, ...] = ()  # the parameters it takes: the forward's required ones
    source: str = ""
    steps: list[Step] = field(default_factory=list)
    rest: list[str] = field(default_factory=list)  # children that run their own forward
    reason: str = ""  # why nothing was fused
    parts: dict[Path, str] = field(default_factory=dict)  # child -> what it must still be (a key of _REFUSALS)
    children: dict[Path, tuple[str, ...]] = field(default_factory=dict)  # of the module and its inlined Sequentials
    settings: dict[str, Any] = field(default_factory=dict)
    graph: Optional[fx.Graph] = None  # what ``function`` computes; without one, what the module's own forward does
    plans: Any = None  # what ``network`` made of it

    def takes(self, args: tuple, kwargs: dict[str, Any]) -> bool:
        """Whether a call gives the inputs and nothing else; optional arguments are left to the module's own forward."""
        return len(args) + len(kwargs) == len(self.inputs) and all(name in self.inputs for name in kwargs)

    def inlined(self, module: nn.Module) -> list[nn.Module]:
        """The Sequentials of ``module`` whose children this program calls itself."""
        paths = [path for path, kind in self.parts.items() if kind == "sequential"]
        return [child for path in paths if (child := child_at(module, path)) is not None]

    def stale(self, module: nn.Module) -> bool:
        """Whether the module's structure or settings have changed, so that its forward must be traced again."""
        for path, names in self.children.items():
            owner = child_at(module, path)
            if owner is None or _child_names(owner) != names:
                return True
        return not torch.compiler.is_compiling() and _settings(module) != self.settings

    def refusal(self, module: nn.Module, ignore_training: bool = False) -> str:
        """Why the program cannot stand in for the module's own forward right now, or ''.

        ``ignore_training`` asks the same for the module after ``eval()``.
        """
        if self.function is None:
            return self.reason
        if module.training and not ignore_training:
            return "training mode"
        return self.parts_refusal(module, ignore_training) or (
            "global module hooks are registered" if nn_module._has_any_global_hook() else ""
        )

    def parts_refusal(self, module: nn.Module, ignore_training: bool = False) -> str:
        """The same for the children that the program calls itself."""
        for path, kind in self.parts.items():
            child = child_at(module, path)
            reason = "is gone" if child is None else _REFUSALS[kind](child)
            if reason and not (ignore_training and module.training and reason == _BATCH_STATISTICS):
                return f"{'.'.join(path)} {reason}"
        return ""


def stock_wanted(args: tuple, kwargs: dict) -> str:
    """Why the caller needs the stock forward, whatever the program could do, or ''.

    Symbolic tracing and ``torch.jit.trace`` must see the stock children; ``torch.onnx`` plain ops; ``torch.func`` and
    forward-mode differentiation know no rule for a custom op, and jvp would silently be zero.
    """
    images = [value for value in (*args, *kwargs.values()) if isinstance(value, (Tensor, fx.Proxy))]
    if not images or isinstance(images[0], fx.Proxy):
        return "symbolic tracing"
    if torch.compiler.is_compiling():
        return "torch.onnx export" if torch.onnx.is_in_onnx_export() else ""
    if torch.jit.is_tracing():
        return "torch.jit tracing"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "torch.func transform"
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode differentiation"
    return ""


# --- layout: channels_last inside, results as the input came ----------------------------------------------------------


def channels_last(x: Any) -> Any:
    """A 4-dimensional tensor in channels_last, anything else as it is."""
    return x.contiguous(memory_format=torch.channels_last) if isinstance(x, Tensor) and x.dim() == 4 else x


def laid_out_like(value: Any, given: Any) -> Any:
    """``value`` (a tensor or a structure of them) in the layout that ``given``, the program's input, came in."""
    if not isinstance(given, Tensor) or given.dim() != 4:
        return value
    if given.is_contiguous(memory_format=torch.channels_last) and not given.is_contiguous():
        return value

    def restored(leaf: Any) -> Any:
        moved = isinstance(leaf, Tensor) and leaf.dim() == 4 and leaf.is_contiguous(memory_format=torch.channels_last)
        return leaf.contiguous() if moved else leaf

    return tree_map(restored, value)


# --- tracing ----------------------------------------------------------------------------------------------------------


class _Proxy(fx.Proxy):
    """Keeps ``a += b`` apart from ``a = a + b``, which plain proxies do not: the first writes to ``a``."""


def _in_place(operation: Callable) -> Callable:
    def method(self: fx.Proxy, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operation, (self, other), {})

    return method


_IN_PLACE = (operator.iadd, operator.isub, operator.imul, operator.itruediv)
for _operation in _IN_PLACE:
    setattr(_Proxy, f"__{_operation.__name__}__", _in_place(_operation))


class _Tracer(fx.Tracer):
    """Children are leaves, but a Sequential is only a way to write its children in a row."""

    def __init__(self, traced_func_name: str) -> None:
        super().__init__()
        self.traced_func_name = traced_func_name
        self.inlined: list[Path] = []
        self.inputs: tuple[str, ...] = ()

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_args_for_root(
        self, root_fn: Callable, is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable, list[Any]]:
        """Only the required parameters are symbolic: code that asks whether an optional one is None must get a true
        answer, so the graph holds for calls that leave the optional ones out."""
        parameters = list(inspect.signature(root_fn).parameters.values())[1:]
        required = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        if not required:
            raise TypeError("it has no required parameter")
        if any(p.kind is p.KEYWORD_ONLY for p in required):
            raise TypeError("it has a required keyword-only parameter")
        self.inputs = tuple(p.name for p in required)
        return root_fn, [self.root, *(self.create_proxy("placeholder", name, (), {}) for name in self.inputs)]

    def create_arg(self, a: Any) -> Any:
        """Plain fx would turn every kind of dictionary into a dict."""
        if isinstance(a, OrderedDict) and type(a) is OrderedDict:
            return self.create_node("call_function", OrderedDict, ([self.create_arg(item) for item in a.items()],), {})
        if isinstance(a, dict) and type(a) not in (dict, immutable_dict):
            raise TypeError(f"it makes a {type(a).__name__}")
        return super().create_arg(a)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if not _is_sequential(m):
            return True
        self.inlined.append(tuple(module_qualified_name.split(".")))
        return False


class _Untraceable(Exception):
    pass


def _trace(module: nn.Module) -> tuple[_Tracer, fx.Graph]:
    """The graph of ``module.forward`` in eval mode. The module is left as it was, flags and attributes included."""
    flags = [(m, m.training) for m in module.modules()]
    attributes = {k: (v, _shallow(v)) for k, v in module.__dict__.items()}
    for m, _ in flags:
        m.__dict__["training"] = False
    tracer = _Tracer("stock_forward" if isinstance(module, Fused) else "forward")
    try:
        graph = tracer.trace(module)
    except Exception as error:
        first_line = (str(error) or repr(error)).splitlines()[0]
        raise _Untraceable(f"its forward could not be traced: {first_line}") from error
    finally:
        for m, training in flags:
            m.__dict__["training"] = training
        changed = [k for k, v in module.__dict__.items() if k not in attributes or v is not attributes[k][0]]
        changed += [k for k, (v, was) in attributes.items() if _shallow(v) != was]
        for k in list(module.__dict__):
            if k not in attributes:
                del module.__dict__[k]
        for k, (v, was) in attributes.items():
            module.__dict__[k] = v
            if isinstance(v, list) and was is not None:
                v[:] = was
    if changed:
        raise _Untraceable(f"its forward writes to the attribute {changed[0]!r}")
    for node in graph.nodes:
        first = node.args[0] if node.args else None
        if isinstance(first, fx.Node) and first.op == "placeholder" and _writes(node, _called(module, node)):
            raise _Untraceable("its forward writes to its input")
    return tracer, graph


def _shallow(value: Any) -> Optional[list]:
    return list(value) if isinstance(value, list) else None


# --- matching ---------------------------------------------------------------------------------------------------------


@dataclass
class _Match:
    step: Step
    nodes: list[fx.Node]  # in order; the last one is replaced
    parts: dict[Path, str]
    target: Callable
    args: tuple  # graph nodes, and names of children
    kwargs: dict[str, Any]


class _Matcher:
    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.taken: set[fx.Node] = set()  # nodes of matches found so far

    def child(self, node: fx.Node) -> Optional[nn.Module]:
        return _called(self.module, node)

    def next(self, node: fx.Node, parts: dict[Path, str], passed: list[fx.Node]) -> Optional[fx.Node]:
        """The only user of a node, identities skipped (and noted); None if there are several."""
        while True:
            if len(node.users) != 1:
                return None
            user = next(iter(node.users))
            if user.op == "output" or user in self.taken:
                return None
            child = self.child(user)
            if child is None or _exact(nn.Identity)(child):
                return user
            parts[_path(user)] = "identity"
            passed.append(user)
            node = user

    def is_relu(self, node: Optional[fx.Node]) -> bool:
        if node is None:
            return False
        child = self.child(node)
        if child is not None:
            return not _exact(nn.ReLU)(child)
        return node.target in _RELU_FUNCTIONS or (node.op == "call_method" and node.target in ("relu", "relu_"))

    def global_pool(self, node: fx.Node) -> Optional[_Match]:
        pool = self.child(node)
        if pool is None or _global_pool_refusal(pool):
            return None
        step = Step("global_avg_pool", (str(node.target),))
        return _Match(step, [node], {_path(node): "global pool"}, functional.global_avg_pool, node.args, {})

    def conv(self, conv_node: fx.Node) -> Optional[_Match]:
        conv = self.child(conv_node)
        if conv is None or conv_refusal(conv) or len(conv_node.args) != 1 or conv_node.kwargs:
            return None
        parts: dict[Path, str] = {_path(conv_node): "conv"}
        nodes = [conv_node]
        bn_node = self.next(conv_node, parts, nodes)
        bn = self.child(bn_node) if bn_node is not None else None
        if bn_node is None or type(bn) not in _NORMS:
            return None
        parts[_path(bn_node)] = "norm"
        nodes.append(bn_node)
        names = [str(conv_node.target), str(bn_node.target)]
        inputs = (conv_node.args[0], conv_node.target, bn_node.target)
        residual, add = None, None

        passed: list[fx.Node] = []
        tail_parts: dict[Path, str] = {}
        follower = self.next(bn_node, tail_parts, passed)
        if follower is not None and _is_addition(follower):
            chain = passed[-1] if passed else bn_node
            first, second = follower.args
            add = _ADDITIONS[follower.target]
            residual = second if first is chain else first
            # x += conv(...) writes to x, which others may see: only the convolution's own result may be overwritten.
            own = first is chain or add is operator.add
            if own and isinstance(residual, fx.Node) and residual is not chain:
                nodes += [*passed, follower]
                parts |= tail_parts
                names.append("add")
                passed, tail_parts = [], {}
                follower = self.next(follower, tail_parts, passed)
            else:
                residual, follower = None, None
        relu = self.is_relu(follower)
        if relu:
            assert follower is not None
            nodes += [*passed, follower]
            parts |= tail_parts
            if follower.op == "call_module":
                parts[_path(follower)] = "relu"
            names.append("relu")
            if residual is None and _is_stem_conv(conv):
                pool_node = self.next(follower, {}, [])
                pool = self.child(pool_node) if pool_node is not None else None
                if pool_node is not None and pool is not None and not _stem_pool_refusal(pool):
                    nodes.append(pool_node)
                    parts[_path(conv_node)] = "stem conv"
                    parts[_path(pool_node)] = "stem pool"
                    step = Step("stem", (*names, str(pool_node.target)), _path(conv_node))
                    return _Match(step, nodes, parts, functional.stem, inputs, {})
        step = Step("conv_bn_act", tuple(names), _path(conv_node))
        kwargs: dict[str, Any] = {"relu": relu}
        if residual is not None:
            kwargs |= {"residual": residual, "inplace_add": add is operator.iadd}
        return _Match(step, nodes, parts, functional.conv_bn_act, inputs, kwargs)


def _called(module: nn.Module, node: fx.Node) -> Optional[nn.Module]:
    return module.get_submodule(str(node.target)) if node.op == "call_module" else None


def _is_addition(node: fx.Node) -> bool:
    plain = len(node.args) == 2 and not node.kwargs
    return plain and node.op in ("call_function", "call_method") and node.target in _ADDITIONS


def _path(node: fx.Node) -> Path:
    return tuple(str(node.target).split("."))


def _writes(node: fx.Node, child: Optional[nn.Module]) -> bool:
    """Whether a node is known to write to its first input."""
    if child is not None:
        return bool(getattr(child, "inplace", False))
    if node.op == "call_method":
        return str(node.target).endswith("_")
    name = getattr(node.target, "__name__", "")
    in_place = node.kwargs.get("inplace", False) or name.endswith("_") or node.target in (*_IN_PLACE, operator.setitem)
    return node.op == "call_function" and bool(in_place)


def _harmless(node: fx.Node, child: Optional[nn.Module]) -> bool:
    """Whether a node surely writes to none of its inputs, so that a convolution may move past it."""
    known = child is None or type(child).__module__.startswith("torch.nn.") or isinstance(child, FrozenBatchNorm2d)
    return known and not _writes(node, child)


# --- rewriting --------------------------------------------------------------------------------------------------------


def _matches(module: nn.Module, graph: fx.Graph) -> list[_Match]:
    matcher = _Matcher(module)
    order = {node: i for i, node in enumerate(graph.nodes)}
    nodes = list(graph.nodes)
    found: list[_Match] = []
    for node in nodes:
        match = matcher.conv(node) or matcher.global_pool(node)
        if match is None:
            continue
        between = nodes[order[match.nodes[0]] : order[match.nodes[-1]]]
        if all(n in match.nodes or _harmless(n, matcher.child(n)) for n in between):
            found.append(match)
            matcher.taken.update(match.nodes)
    return found


def _rewrite(module: nn.Module, graph: fx.Graph, matches: list[_Match]) -> None:
    replaced: dict[fx.Node, fx.Node] = {}  # the inputs of a match may have been replaced since it was found
    for match in matches:
        last = match.nodes[-1]
        with graph.inserting_before(last):
            args = tuple(graph.get_attr(arg) if isinstance(arg, str) else arg for arg in match.args)
            args, kwargs = fx.map_arg((args, match.kwargs), lambda node: replaced.get(node, node))
            fused = graph.call_function(match.target, args, kwargs)
        last.replace_all_uses_with(fused)
        replaced[last] = fused
        for node in reversed(match.nodes):
            graph.erase_node(node)

    given = next(node for node in graph.nodes if node.op == "placeholder")
    with graph.inserting_before(next(node for node in graph.nodes if node.op != "placeholder")):
        entry = graph.call_function(channels_last, (given,))
    given.replace_all_uses_with(entry, delete_user_cb=lambda user: user is not entry)

    def restored(value: fx.Node) -> fx.Node:
        return graph.call_function(laid_out_like, (value, given))

    for node in list(graph.nodes):
        if node.op == "output" or _reads_layout(module, node):
            with graph.inserting_before(node):
                node.args = fx.map_arg(node.args, restored)
                node.kwargs = fx.map_arg(node.kwargs, restored)


def _reads_layout(module: nn.Module, node: fx.Node) -> bool:
    """Whether a node may depend on how its input lies in memory. Code that is not known is taken to."""
    if node.op == "call_method":
        return node.target in _LAYOUT_FUNCTIONS
    if node.op == "call_function":
        package = (getattr(node.target, "__module__", None) or type(node.target).__module__).split(".")[0]
        return package not in _LAYOUT_SAFE_PACKAGES or getattr(node.target, "__name__", "") in _LAYOUT_FUNCTIONS
    if node.op == "call_module":
        child = module.get_submodule(str(node.target))
        return not isinstance(child, Fused) and type(child).__module__.split(".")[0] not in _LAYOUT_SAFE_PACKAGES
    return False


_serial = count()


def _compile(graph: fx.Graph, name: str) -> tuple[Callable, str]:
    code = graph.python_code("self")
    filename = f"<resnet_fast {name} {next(_serial)}>"
    namespace = dict(code.globals)
    exec(compile(code.src, filename, "exec"), namespace)
    # Tracebacks and debuggers show the lines, as they do for torch.fx.
    linecache.cache[filename] = (len(code.src), None, code.src.splitlines(keepends=True), filename)
    return namespace["forward"], code.src


def build(module: nn.Module) -> Program:
    """The fused program of ``module``, or one without a function that says why nothing could be fused."""
    children: dict[Path, tuple[str, ...]] = {(): _child_names(module)}
    settings = _settings(module)
    try:
        tracer, graph = _trace(module)
    except _Untraceable as error:
        return Program(reason=str(error), children=children, settings=settings)
    parts: dict[Path, str] = {}
    for path in tracer.inlined:
        owner = child_at(module, path)
        assert owner is not None
        parts[path] = "sequential"
        children[path] = _child_names(owner)
    matches = _matches(module, graph)
    if not any(match.step.conv for match in matches):
        reason = "no convolution followed by batch norm in its own forward"
        return Program(
            inputs=tracer.inputs, reason=reason, parts=parts, children=children, settings=settings, graph=graph
        )
    for match in matches:
        parts |= match.parts
    _rewrite(module, graph, matches)
    rest = [str(node.target) for node in graph.nodes if node.op == "call_module"]
    function, source = _compile(graph, type(module).__name__)
    return Program(
        function, tracer.inputs, source, [match.step for match in matches], rest, "", parts, children, settings, graph
    )
