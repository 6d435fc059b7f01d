"""Where an accelerated module keeps its programs: in its ``__dict__``, out of state_dicts and pickles."""

from typing import Any, Optional

import torch
from torch import nn

from resnet_fast.graph import bottleneck_pairs
from resnet_fast.graph.program import STATE, State, Traced, build, trace_forward, write_program


def rebuild(module: nn.Module, traced: Optional[Traced] = None) -> State[Any]:
    """Trace the module's forward again and keep the programs. The blocks that it calls have theirs already.

    Args:
        traced: the forward in eval mode, where that is known.
    """
    program = write_program(module, traced or trace_forward(module))
    bottleneck_pairs.join(module, program)
    state: State[Any] = State(program, build(module, training=True))
    module.__dict__[STATE] = state
    return state


def state_of(module: nn.Module) -> Optional[State[Any]]:
    """The module's state, made again if its structure has changed; None where that cannot be done (compiling)."""
    state = module.__dict__.get(STATE)
    if state is None or (state.training if module.training else state.eval).stale(module):
        return None if torch.compiler.is_compiling() else rebuild(module)
    return state


def drop_state(module: nn.Module) -> None:
    module.__dict__.pop(STATE, None)
