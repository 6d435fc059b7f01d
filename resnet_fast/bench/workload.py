"""What every provider is given: model, images, labels for training, and the right result, as files in one folder."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Optional, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from resnet_fast.bench.training_step import Step

MODEL, IMAGES, REFERENCE = "model.pt", "images.npy", "reference.npy"
ONNX, INT8_ONNX = "model.onnx", "model_int8.onnx"
LABELS, TRAINING_REFERENCE = "labels.npy", "reference.npz"

_SETTING = "setting.json"
_REFERENCE_IMAGES = 16  # the results of the first ones are compared; float64 takes its time


class Setting(NamedTuple):
    """The device and the precision that a workload runs in. The files hold float32 all the same."""

    device: str = "cpu"
    dtype: str = "float32"  # of weights and images
    autocast: Optional[str] = None  # in training: the dtype of mixed precision


DEFAULT = Setting()


def prepare(
    folder: Path,
    model: nn.Module,
    images: Tensor,
    *,
    onnx: bool = True,
    int8: bool = False,
    setting: Setting = DEFAULT,
) -> None:
    """Write ``model``, ``images`` and the float64 result of the first of them to ``folder``.

    Args:
        model: a stock classifier in eval mode, float32, on the CPU; it is pickled, for the workers alone.
        images: ``[N, C, H, W]``, float32.
        onnx: whether the model is exported too.
        int8: whether it is exported in 8 bits, for a CPU, calibrated with the images.
    """
    from resnet_fast.export import export_onnx

    _write(folder, model, images, setting)
    with torch.inference_mode():
        some = images[:_REFERENCE_IMAGES].double()
        np.save(folder / REFERENCE, _exactly(setting, lambda there: _precise(folder).to(there)(some.to(there)).cpu()))
    # Each provider's result is compared with the reference, so the export need not be.
    given: Any = {"input_size": tuple(images.shape[1:]), "verify": False}
    if onnx:
        export_onnx(model, folder / ONNX, **given)
    if int8:
        export_onnx(model, folder / INT8_ONNX, precision="int8", calibration=images, target="cpu", **given)


def prepare_training(
    folder: Path, model: nn.Module, images: Tensor, labels: Tensor, setting: Setting = DEFAULT
) -> None:
    """Write ``model``, ``images``, ``labels`` and the results of a step in float64 to ``folder``.

    Args:
        model: a stock classifier in training mode, float32, on the CPU; it is pickled, for the workers alone.
        images: ``[N, C, H, W]``, float32.
        labels: ``[N]``, int64.
    """
    _write(folder, model, images, setting)
    np.save(folder / LABELS, labels.numpy())

    def first(there: str) -> dict[str, np.ndarray]:
        return Step(_precise(folder).to(there), images.to(there, torch.double), labels.to(there)).first()

    np.savez(folder / TRAINING_REFERENCE, **_exactly(setting, first))  # type: ignore[arg-type]


_Result = TypeVar("_Result")


def _exactly(setting: Setting, compute: Callable[[str], _Result]) -> _Result:
    """``compute`` in float64 on the workload's device, on which it takes no minutes, or where it fits."""
    try:
        return compute(setting.device)
    except torch.OutOfMemoryError:
        return compute("cpu")
    finally:
        if setting.device == "cuda":
            torch.cuda.empty_cache()  # others are to run there


def _write(folder: Path, model: nn.Module, images: Tensor, setting: Setting) -> None:
    torch.save(model, folder / MODEL)
    np.save(folder / IMAGES, images.numpy())
    (folder / _SETTING).write_text(json.dumps(setting._asdict()))


def _stored_model(folder: Path) -> nn.Module:
    # Not weights_only: the file holds the module itself, and was written by this very run.
    return torch.load(folder / MODEL, weights_only=False)


def _precise(folder: Path) -> nn.Module:
    """A copy through the file: deepcopy would do as well, but this is the model that the workers get."""
    return _stored_model(folder).double()


def load_setting(folder: Path) -> Setting:
    return Setting(**json.loads((folder / _SETTING).read_text()))


def load_model(folder: Path) -> nn.Module:
    """Load the model of the workload in ``folder``, in the mode that it was saved in, where and as the setting says.

    On a GPU, cuDNN measures its algorithms, for everybody: what a user has who cares for speed.
    """
    device, dtype, _ = load_setting(folder)
    torch.backends.cudnn.benchmark = device == "cuda"
    return _stored_model(folder).to(device, getattr(torch, dtype))


def load_images(folder: Path) -> Tensor:
    """Load the images of the workload in ``folder``, ``[N, C, H, W]``, likewise."""
    device, dtype, _ = load_setting(folder)
    return torch.from_numpy(np.load(folder / IMAGES)).to(device, getattr(torch, dtype))


def load_labels(folder: Path) -> Tensor:
    """Load the labels of a training workload, ``[N]``, int64."""
    return torch.from_numpy(np.load(folder / LABELS)).to(load_setting(folder).device)


def autocast(folder: Path) -> "contextlib.AbstractContextManager[None]":
    """Mixed precision, if the workload in ``folder`` is to be trained in it."""
    device, _, dtype = load_setting(folder)
    return contextlib.nullcontext() if dtype is None else torch.autocast(device, getattr(torch, dtype))


def load_channels_last(folder: Path, threads: int) -> tuple[nn.Module, Tensor]:
    """Load model and images of the workload in ``folder``, both in channels_last, to run on ``threads``."""
    torch.set_num_threads(threads)
    layout: Any = {"memory_format": torch.channels_last}
    return load_model(folder).to(**layout), load_images(folder).to(**layout)


def load_step(folder: Path, threads: int, change: Callable[[nn.Module], Any] = lambda model: None) -> Step:
    """Load the step of the workload in ``folder``, all in channels_last, after ``change`` to its model."""
    model, images = load_channels_last(folder, threads)
    change(model)
    return Step(model, images, load_labels(folder), autocast(folder))


def to_numpy(result: Tensor) -> np.ndarray:
    """A result for comparison. From a GPU it is waited for; numpy has no bfloat16."""
    return result.float().cpu().numpy()


def eager(model: nn.Module, images: Tensor) -> Callable[[], np.ndarray]:
    """A call runs ``model`` on ``images`` once, without autograd."""

    def run() -> np.ndarray:
        with torch.inference_mode():
            return to_numpy(model(images))

    return run
