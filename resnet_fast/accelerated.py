"""``accelerate(model)``: the one line. ``restore`` undoes it.

An accelerated module is the same object with the same children, parameters and buffers; only its class has changed, to
a subclass that carries the name of the original and runs a fused program: ``accelerated`` makes one of a class,
``accelerated_class`` derives one. The program follows from the module's structure, so it is in no state_dict, is left
out when the module is copied or pickled, and is made anew there.
"""

import copy
import functools
from abc import ABCMeta
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import fx, nn

from resnet_fast import network
from resnet_fast.graph.conditions import Accelerated, stock_wanted
from resnet_fast.graph.program import STATE, Traced, inlined, trace_forward
from resnet_fast.graph.ranges import forget, is_quantised
from resnet_fast.graph.state import drop_state, rebuild, state_of
from resnet_fast.kernels import packing
from resnet_fast.utils.modules import check_module

M = TypeVar("M", bound=nn.Module)


def accelerate(model: M, inplace: bool = True) -> M:
    """Make the residual blocks, stem, pooling and classifier of ``model`` run fused, in eval and in training mode.

    Works on torchvision's and timm's models and on your own: a module qualifies if its forward, traced, applies
    convolution, batch norm, and possibly an addition and a ReLU, in this order. Everything else runs as before, as do
    hooked modules and tracing; ``explain(model)`` says which and why. Parameters, buffers, state_dict
    and results (up to rounding) stay the same. Calling it again brings the model up to date after you changed its code.

    Args:
        model: any module, in either mode.
        inplace: False to leave ``model`` alone and return an accelerated copy.

    Returns:
        The accelerated module: ``model`` itself if ``inplace``.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.
    """
    check_module(model)
    if not inplace:
        model = copy.deepcopy(model)
    packing.clear_all()
    traced: dict[nn.Module, Traced] = {}
    called: set[nn.Module] = set()  # Sequentials whose children another's program calls itself
    for module in _containers(model):
        if module not in called or isinstance(module, Accelerated):
            traced[module] = trace_forward(module)
            called.update(inlined(module, traced[module].program.parts))
    for module, forward in traced.items():
        if not forward.program.reason and module not in called and not isinstance(module, Accelerated):
            stock: Any = type(module)
            module.__class__ = accelerated_class(stock)
    # Programs are written when all children are what they will be, for unknown code is treated with more care; children
    # first, whose programs may become part of their parents'.
    for module, forward in reversed(traced.items()):
        if isinstance(module, Accelerated):
            rebuild(module, forward)
    return model


def restore(model: M, inplace: bool = True) -> M:
    """Undo ``accelerate``, and ``quantize``: every module gets its stock class back. Parameters and buffers are not
    touched.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.
    """
    check_module(model)
    if not inplace:
        model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, Accelerated):
            drop_state(module)
            module.__class__ = type(module).stock_class
    forget(model)
    return model


def _containers(model: nn.Module) -> Iterator[nn.Module]:
    """Modules with convolutions below them and a Python forward of their own class, parents before children."""
    for module in model.modules():
        scripted = type(module).__module__.startswith("torch.jit")
        convolutions = (part for part in module.modules() if part is not module and isinstance(part, nn.Conv2d))
        if any(True for _ in convolutions) and not scripted and "forward" not in module.__dict__:
            yield module


# --- the classes ------------------------------------------------------------------------------------------------------


def accelerated(cls: Any) -> Any:
    """Class decorator for an ``nn.Module`` subclass: its inherited forward stays, for where a program cannot run."""
    stock = next(base for base in cls.__mro__[1:] if base is not Accelerated)

    @functools.wraps(stock.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if stock_wanted(args, kwargs):
            return stock.forward(self, *args, **kwargs)
        if torch.compiler.is_compiling():
            if is_quantised(self) and not torch.compiler.is_exporting():
                return _outside_the_graph(self, args, kwargs)
        elif (plan := network.plan_for(self, args, kwargs)) is not None:
            return plan.run(*args, *kwargs.values())
        state = state_of(self)
        if state is not None:
            program = state.training if self.training else state.eval
            if program.takes(args, kwargs) and not program.refusal(self):
                return program.function(self, *args, **kwargs)
        return stock.forward(self, *args, **kwargs)

    def getstate(self: nn.Module) -> Any:
        state = super(cls, self).__getstate__()
        return {k: v for k, v in state.items() if k != STATE} if isinstance(state, dict) else state

    def setstate(self: nn.Module, state: Any) -> None:
        super(cls, self).__setstate__(state)
        rebuild(self)

    def prepare_scriptable(self: nn.Module) -> nn.Module:
        """What ``torch.jit.script`` compiles: the stock class, over the same parameters."""
        plain = _without_state(self, stock)
        plain._modules = dict(self._modules)
        return plain

    cls.stock_class = stock
    cls.forward = forward
    cls.__getstate__ = getstate
    cls.__setstate__ = setstate
    cls.__prepare_scriptable__ = prepare_scriptable
    return cls


@torch.compiler.disable(reason="no graph holds the program of a quantised model: leave out fullgraph=True")
def _outside_the_graph(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
    return module(*args, **kwargs)


def _without_state(module: nn.Module, cls: type) -> Any:
    """A module of class ``cls`` with the very attributes of ``module``."""
    twin: Any = object.__new__(cls)
    twin.__dict__.update({k: v for k, v in module.__dict__.items() if k != STATE})
    return twin


@functools.cache
def accelerated_class(stock: Any) -> Any:
    """The subclass of ``stock`` that an accelerated instance has. It is found again by ``stock`` when unpickled.

    Nobody sees it who does not ask for the ``type``: ``self.__class__`` is ``stock``, and neither a metaclass nor
    ``__init_subclass__`` is told of it.
    """
    names = {"__module__": stock.__module__, "__qualname__": stock.__qualname__, "__doc__": stock.__doc__}
    names["__class__"] = property(lambda self: stock, object.__dict__["__class__"].__set__)
    make = ABCMeta.__new__ if isinstance(stock, ABCMeta) else type.__new__
    cls: Any = accelerated(make(type(stock), stock.__name__, (Accelerated, stock), names))

    def reduce_ex(self: nn.Module, protocol: Any) -> Any:
        made, args, *rest = super(cls, self).__reduce_ex__(protocol)
        if args and args[0] is cls:
            # The derived class has no importable name. What ``torch.save`` writes is for everybody, and so is the stock
            # module; other pickles, those of copies and of processes among them, derive the class again.
            stocked = protocol == torch.serialization.DEFAULT_PROTOCOL
            made, args = (made, (stock, *args[1:])) if stocked else (_make, (stock, made, *args[1:]))
        return (made, args, *rest)

    cls.__reduce_ex__ = reduce_ex
    if issubclass(stock, fx.GraphModule):
        _keep_whole(cls, stock)
    return cls


def _make(stock: type, made: Callable, *args: Any) -> Any:
    return made(accelerated_class(stock), *args)


def _keep_whole(cls: Any, stock: Any) -> None:
    """Have a graph module write its code into, and be copied and pickled by, the class that it was made with."""

    def recompile(self: Any) -> Any:
        drop_state(self)
        self.__class__ = stock
        try:
            return self.recompile()
        finally:
            self.__class__ = cls

    def deepcopy(self: nn.Module, memo: dict) -> Any:
        memo[id(self)] = twin = copy.deepcopy(_without_state(self, stock), memo)
        made: Any = type(twin)
        twin.__class__ = accelerated_class(made)
        return twin

    cls.recompile = recompile
    cls.__deepcopy__ = deepcopy
    cls.__reduce_ex__ = lambda self, protocol: _without_state(self, stock).__reduce_ex__(protocol)
