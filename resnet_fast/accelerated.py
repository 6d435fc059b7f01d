"""Classes whose forward runs a fused program: ``fused`` makes one of a class, ``accelerated_class`` derives one.

An accelerated module is the same object with the same children, parameters and buffers; only its class has changed,
to a subclass that carries the name of the original. Its program is derived from its structure, so it is in no
state_dict, is left out when the module is copied or pickled, and is made anew there.
"""

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from resnet_fast import network
from resnet_fast.graph.program import PROGRAM, Fused, stock_wanted
from resnet_fast.graph.programs import program_of, rebuild


def fused(cls: Any) -> Any:
    """Class decorator for an ``nn.Module`` subclass: its inherited forward stays, for where a program cannot run."""
    stock = cls.__mro__[1]

    @functools.wraps(stock.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if stock_wanted(args, kwargs):
            return stock.forward(self, *args, **kwargs)
        plan = network.plan_for(self, args, kwargs)
        if plan is not None:
            return plan.run(*args, *kwargs.values())
        program = program_of(self)
        if self.training and program is not None:
            program = program.in_training
        if program is not None and program.takes(args, kwargs) and not program.refusal(self):
            return program.function(self, *args, **kwargs)
        return stock.forward(self, *args, **kwargs)

    def getstate(self: nn.Module) -> Any:
        state = super(cls, self).__getstate__()
        return {k: v for k, v in state.items() if k != PROGRAM} if isinstance(state, dict) else state

    def setstate(self: nn.Module, state: Any) -> None:
        super(cls, self).__setstate__(state)
        rebuild(self)

    def prepare_scriptable(self: nn.Module) -> nn.Module:
        """What ``torch.jit.script`` compiles: the stock class, over the same parameters."""
        plain = stock.__new__(stock)
        plain.__dict__.update({k: v for k, v in self.__dict__.items() if k != PROGRAM})
        plain._modules = dict(self._modules)
        return plain

    cls.stock_class = stock
    cls.stock_forward = stock.forward
    cls.forward = forward
    cls.__getstate__ = getstate
    cls.__setstate__ = setstate
    cls.__prepare_scriptable__ = prepare_scriptable
    return cls


@functools.cache
def accelerated_class(stock: Any) -> Any:
    """The subclass of ``stock`` that an accelerated instance has. It is found again by ``stock`` when unpickled."""
    names = {"__module__": stock.__module__, "__qualname__": stock.__qualname__, "__doc__": stock.__doc__}
    cls: Any = fused(type(stock.__name__, (stock, Fused), names))

    def reduce_ex(self: nn.Module, protocol: Any) -> Any:
        # The derived class has no importable name: pickle the stock class and derive again.
        made, args, *rest = super(cls, self).__reduce_ex__(protocol)
        if args and args[0] is cls:
            made, args = _make, (stock, made, *args[1:])
        return (made, args, *rest)

    cls.__reduce_ex__ = reduce_ex
    return cls


def _make(stock: type, made: Callable, *args: Any) -> Any:
    return made(accelerated_class(stock), *args)
