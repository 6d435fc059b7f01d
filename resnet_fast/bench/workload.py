"""What every provider is given: model, images and the right result, as files in one folder."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

MODEL, ONNX, IMAGES, REFERENCE = "model.pt", "model.onnx", "images.npy", "reference.npy"


def prepare(folder: Path, model: nn.Module, images: Tensor, *, onnx: bool = True) -> None:
    """Write ``model``, ``images`` and the float64 result to ``folder``.

    Args:
        model: a stock classifier in eval mode, float32, on the CPU; it is pickled, for the workers alone.
        images: ``[N, C, H, W]``, float32.
        onnx: whether the model is exported too.
    """
    from resnet_fast.export import export_onnx

    torch.save(model, folder / MODEL)
    np.save(folder / IMAGES, images.numpy())
    # A copy through the file: deepcopy would do as well, but this is the model that the workers get.
    precise = load_model(folder).double()
    with torch.inference_mode():
        np.save(folder / REFERENCE, precise(images.double()).numpy())
    if onnx:
        # Each provider's result is compared with the reference, so the export need not be.
        export_onnx(model, folder / ONNX, input_size=tuple(images.shape[1:]), verify=False)


def load_model(folder: Path) -> nn.Module:
    """The model of the workload in ``folder``, in eval mode."""
    # Not weights_only: the file holds the module itself, and was written by this very run.
    return torch.load(folder / MODEL, weights_only=False).eval()


def load_images(folder: Path) -> Tensor:
    """The images of the workload in ``folder``, ``[N, C, H, W]``, float32."""
    return torch.from_numpy(np.load(folder / IMAGES))


def eager(model: nn.Module, images: Tensor) -> Callable[[], np.ndarray]:
    """A call runs ``model`` on ``images`` once, without autograd."""

    def run() -> np.ndarray:
        with torch.inference_mode():
            return model(images).numpy()

    return run
