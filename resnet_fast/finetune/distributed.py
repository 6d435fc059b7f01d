"""The processes that torchrun started, or this one alone."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Optional

import torch
import torch.distributed as dist
from torch import Tensor, nn

from resnet_fast.utils.devices import MissingDeviceError


@dataclass(frozen=True)
class Processes:
    """This process among ``world``, and its device."""

    device: torch.device
    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes files."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes; ``tensor`` takes its value."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def share_buffers(self, model: nn.Module) -> None:
        """Give ``model`` the first process's batch norm statistics, which are those that it saves."""
        if self.world > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)


@contextmanager
def processes(device: Optional[str] = None) -> Iterator[Processes]:
    """Join the processes of torchrun: NCCL on GPUs, one for each process, Gloo on CPUs.

    Args:
        device: as torch names them; by default cuda if there is one, else cpu.

    Raises:
        MissingDeviceError: there is no such device.
    """
    here = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if not dist.is_torchelastic_launched():
        try:
            torch.empty(0, device=here)
        except (AssertionError, NotImplementedError, RuntimeError) as error:
            raise MissingDeviceError(f"--device {here} is not on this machine: {error}") from error
        yield Processes(here)
        return
    if here.type == "cuda":
        here = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(here)
    dist.init_process_group("nccl" if here.type == "cuda" else "gloo")
    yield Processes(here, dist.get_rank(), dist.get_world_size())
    # Not after an error: the others may wait in a collective, and torchrun ends them.
    dist.destroy_process_group()
