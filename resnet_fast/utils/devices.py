"""Whether there is a GPU, and what is said where one is needed."""

from typing import Optional

import torch


class MissingDeviceError(RuntimeError):
    """A GPU is needed and there is none."""


def gpu_missing() -> Optional[str]:
    """Why there is no GPU for PyTorch, or None."""
    if torch.cuda.is_available():
        return None
    built = torch.version.cuda or torch.version.hip
    return "PyTorch sees no GPU" if built else "this PyTorch is built without CUDA and ROCm"


def require_gpu(purpose: str) -> None:
    """Raise MissingDeviceError, saying what for, unless there is a GPU."""
    reason = gpu_missing()
    if reason is not None:
        raise MissingDeviceError(f"{purpose} needs a GPU: {reason}")
