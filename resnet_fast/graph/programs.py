"""Where a module keeps its program: in its ``__dict__``, out of state_dicts and pickles."""

from typing import Optional

import torch
from torch import nn

from resnet_fast.graph import bottleneck_pairs
from resnet_fast.graph.program import PROGRAM, Program, build


def rebuild(module: nn.Module) -> Program:
    """Trace the module's forward again and keep the program. The blocks that it calls have theirs already."""
    program = build(module)
    bottleneck_pairs.join(module, program)
    program.in_training = build(module, training=True)
    module.__dict__[PROGRAM] = program
    return program


def program_of(module: nn.Module) -> Optional[Program]:
    """The module's program, traced again if its structure has changed; None where that cannot be done (compiling)."""
    program = module.__dict__.get(PROGRAM)
    if program is None or program.stale(module):
        return None if torch.compiler.is_compiling() else rebuild(module)
    return program


def drop_program(module: nn.Module) -> None:
    module.__dict__.pop(PROGRAM, None)
