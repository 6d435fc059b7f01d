"""What the first call of a shape measures, where nobody has tuned it: a few candidates, as cudnn.benchmark does.

The table of tiles comes from a model of cost that no GPU has confirmed. So without a measured choice, the table's tile
and the next best are measured against PyTorch's own convolutions, and what is fastest is kept as ``tune`` keeps it. It
takes the time of compiling two kernels. ``RESNET_FAST_MEASURE=0`` goes by the table instead; so do calls within a
capture, which may not wait for the GPU, and calls under ``torch.use_deterministic_algorithms``, since candidates differ
in their last bits.
"""

import contextlib
import os
import threading
from typing import Optional

import torch

from resnet_fast.kernels import streams
from resnet_fast.kernels.triton.tuning import planner

RUNS = 8  # timed ones of each candidate
_TILES = 2  # of our own

_one_at_a_time = threading.Lock()


def choose(problem: planner.Problem, device: torch.device) -> Optional[planner.Candidate]:
    """What was measured for ``problem``, now if it was not before; None where nothing may be measured now."""
    choice = planner.choose(problem, device.index)
    if choice is not None or not _allowed(device):
        return choice
    from resnet_fast.kernels.triton.tuning import measuring  # imports Triton, which nothing has before

    with _one_at_a_time:
        choice = planner.choose(problem, device.index)  # another thread may have been first
        if choice is None:
            try:
                timer = measuring.Events(device)
                found = measuring.measure(problem, device, timer, RUNS, candidates=_few(problem))
            except torch.OutOfMemoryError:  # images of its own do not fit beside the user's
                return None
            with contextlib.suppress(OSError):  # it holds for this process all the same
                planner.choices.add(planner.machine(device.index), {problem.key(): found.chosen})
            choice = planner.candidates(problem)[found.chosen]
    return choice


def _allowed(device: torch.device) -> bool:
    return not (
        os.environ.get("RESNET_FAST_MEASURE") == "0"
        or planner.recording()
        or torch.are_deterministic_algorithms_enabled()
        or streams.capturing(device.index)
    )


def _few(problem: planner.Problem) -> dict[str, planner.Candidate]:
    found = planner.candidates(problem)
    ours = [name for name, one in found.items() if one.tile is not None]
    return {name: one for name, one in found.items() if one.tile is None or name in ours[:_TILES]}
