"""What every provider is given: model, images, labels for training, and the right result, as files in one folder."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

MODEL, ONNX, IMAGES, REFERENCE = "model.pt", "model.onnx", "images.npy", "reference.npy"
LABELS, TRAINING_REFERENCE = "labels.npy", "reference.npz"


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


def prepare_training(folder: Path, model: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Write ``model``, ``images``, ``labels`` and the results of a step in float64 to ``folder``.

    Args:
        model: a stock classifier in training mode, float32, on the CPU; it is pickled, for the workers alone.
        images: ``[N, C, H, W]``, float32.
        labels: ``[N]``, int64.
    """
    from resnet_fast.bench.step import Step

    torch.save(model, folder / MODEL)
    np.save(folder / IMAGES, images.numpy())
    np.save(folder / LABELS, labels.numpy())
    precise = Step(load_model(folder).double(), images.double(), labels)
    np.savez(folder / TRAINING_REFERENCE, **precise.first())  # type: ignore[arg-type]


def load_model(folder: Path) -> nn.Module:
    """The model of the workload in ``folder``, in the mode that it was saved in."""
    # Not weights_only: the file holds the module itself, and was written by this very run.
    return torch.load(folder / MODEL, weights_only=False)


def load_images(folder: Path) -> Tensor:
    """The images of the workload in ``folder``, ``[N, C, H, W]``, float32."""
    return torch.from_numpy(np.load(folder / IMAGES))


def load_labels(folder: Path) -> Tensor:
    """Of the images of a training workload, ``[N]``, int64."""
    return torch.from_numpy(np.load(folder / LABELS))


def eager(model: nn.Module, images: Tensor) -> Callable[[], np.ndarray]:
    """A call runs ``model`` on ``images`` once, without autograd."""

    def run() -> np.ndarray:
        with torch.inference_mode():
            return model(images).numpy()

    return run
