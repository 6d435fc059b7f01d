"""What a served model must know beside its weights: classes, input size, normalisation, who made it."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Optional, get_args

import onnx_ir as ir
import torch
from torch import nn

import resnet_fast
from resnet_fast.export.folding import stock_copy, unwrapped
from resnet_fast.export.preprocessing import Interpolation, Preprocess
from resnet_fast.models.checkpoint import finetuned

Size = tuple[int, int, int]


@dataclass(frozen=True)
class Metadata:
    """The model's input as ``[channels, height, width]``, and what is known of its classes and normalisation.

    ``mean`` and ``std`` are per channel, for images scaled to [0, 1]; None where nobody said. ``resize`` is what the
    shorter side has before the crop to ``input_size``. ``preprocess`` is what the graph itself does of all that, and
    ``io_dtype`` what it takes and gives, unless it takes pictures. ``target`` is what an int8 file is made for.
    """

    model: str
    input_size: Size
    classes: Optional[tuple[str, ...]] = None
    mean: Optional[tuple[float, ...]] = None
    std: Optional[tuple[float, ...]] = None
    resize: Optional[int] = None
    interpolation: str = "bilinear"
    precision: str = "fp32"
    io_dtype: str = "fp32"
    preprocess: Optional[Preprocess] = None
    target: Optional[str] = None

    def preprocessing(self, resize: bool = True) -> Preprocess:
        """Return what makes the network's input of a picture of bytes, of any size or, without ``resize``, of its own.

        Raises:
            ValueError: nobody said how to normalise.
        """
        for name in ("mean", "std"):
            if getattr(self, name) is None:
                raise ValueError(f"{name} is None, expected a number per channel to normalise pictures with")
        assert self.mean is not None
        assert self.std is not None
        crop = self.input_size[1:]
        # 256 for 224, which is what most networks are trained with.
        extent = (self.resize or round(max(crop) * 8 / 7)) if resize else None
        return Preprocess(crop, self.mean, self.std, extent, self.interpolation)  # type: ignore[arg-type]

    def write(self, model: ir.Model) -> None:
        """Set producer and ``metadata_props`` of ``model``: every value a string, JSON where it is not plain text."""
        model.producer_name = "resnet_fast"
        model.producer_version = resnet_fast.__version__
        properties = {
            "producer": "resnet_fast",
            "resnet_fast_version": resnet_fast.__version__,
            "torch_version": torch.__version__,
            "task": "image-classification",
            "model": self.model,
            "input_layout": "NHWC" if self.preprocess else "NCHW",
            "input_size": json.dumps(self.input_size),
            "interpolation": self.interpolation,
            "precision": self.precision,
            "io_dtype": self.io_dtype,
        }
        if self.target is not None:
            properties["target"] = self.target
        for name in ("classes", "mean", "std", "resize"):
            if getattr(self, name) is not None:
                properties[name] = json.dumps(getattr(self, name), ensure_ascii=False)
        if self.preprocess is not None:
            properties["preprocess"] = json.dumps(asdict(self.preprocess))
        model.metadata_props.update(properties)

    @classmethod
    def read(cls, properties: Mapping[str, str]) -> "Metadata":
        """Read what ``write`` wrote into ``properties``.

        Raises:
            ValueError: something in it is missing or is not what ``write`` writes; files of others have nothing of it.
        """
        if properties.get("producer") != "resnet_fast":
            raise ValueError("the file's metadata has no producer 'resnet_fast', expected a file of export_onnx")
        try:
            known: dict[str, Any] = {
                name: properties[name] for name in ("model", "interpolation", "precision", "io_dtype")
            }
            known["input_size"] = tuple(json.loads(properties["input_size"]))
            for name in ("classes", "mean", "std"):
                known[name] = tuple(json.loads(properties[name])) if name in properties else None
            known["target"] = properties.get("target")
            known["resize"] = json.loads(properties.get("resize", "null"))
            if "preprocess" in properties:
                said = json.loads(properties["preprocess"])
                said |= {name: tuple(said[name]) for name in ("crop", "mean", "std")}
                known["preprocess"] = Preprocess(**said)
            return cls(**known)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"the file's metadata is damaged: {type(error).__name__}: {error}") from error


def gather(
    model: nn.Module,
    input_size: Optional[Sequence[int]],
    classes: Optional[Sequence[str]],
    mean: Optional[Sequence[float]],
    std: Optional[Sequence[float]],
    weights: Any,
) -> Metadata:
    """Gather what the caller says, else ``weights`` (a torchvision enum member, or a checkpoint), else a timm model."""
    model = unwrapped(model)
    known = {**_from_timm(model), **_from_weights(weights)}
    given = {"input_size": input_size, "classes": classes, "mean": mean, "std": std}
    known.update({name: value for name, value in given.items() if value is not None})
    channels = channels_of(model)
    if "input_size" not in known:
        if channels is None:
            raise ValueError(
                "input_size is None and the model has no Conv2d to read it from; expected (channels, height, width)"
            )
        known["input_size"] = (channels, 224, 224)
    size = tuple(known["input_size"])
    if len(size) == 2 and input_size is None and channels is not None:
        size = (channels, *size)
    if len(size) != 3 or any(not isinstance(extent, int) or extent < 1 for extent in size):
        raise ValueError(f"input_size is {size}, expected three positive integers: (channels, height, width)")
    if channels is not None and size[0] != channels and not takes(model, size):
        raise ValueError(f"input_size is {size}, expected {channels} channels, as the model's first convolution has")
    texts = known.get("classes")
    for text in texts or ():
        if str(text).encode("utf-8", "ignore").decode() != str(text):
            raise ValueError(f"classes has {text!r}, expected text that UTF-8 can hold")
    return Metadata(
        type(model).__name__,
        size,
        None if texts is None else tuple(str(text) for text in texts),
        _per_channel("mean", known.get("mean"), size[0]),
        _per_channel("std", known.get("std"), size[0]),
        _scaled(known.get("resize"), size),
        known.get("interpolation", "bilinear"),
    )


def _scaled(resize: Optional[tuple[int, int]], size: Size) -> Optional[int]:
    """``resize``, a shorter side and the crop that it is known for, for the crop to ``size``."""
    return None if resize is None else max(round(resize[0] * max(size[1:]) / resize[1]), max(size[1:]))


def _per_channel(name: str, values: Optional[Sequence[float]], channels: int) -> Optional[tuple[float, ...]]:
    if values is None:
        return None
    numbers = tuple(float(value) for value in values)
    if len(numbers) != channels:
        raise ValueError(f"{name} is {numbers}, expected {channels} numbers, one per channel")
    if name == "std" and min(numbers) <= 0:
        raise ValueError(f"std is {numbers}, expected positive numbers")
    return numbers


def channels_of(model: nn.Module) -> Optional[int]:
    """Channels that the model's first convolution reads; None if it has no convolution."""
    return next((module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d)), None)


def takes(model: nn.Module, input_size: Size) -> bool:
    """Whether the model computes something of an image of that size: its forward may change the channels first."""
    try:
        with torch.inference_mode():
            stock_copy(model)(torch.zeros(1, *input_size))
    except Exception:  # whatever a forward raises
        return False
    return True


def _from_weights(weights: Any) -> dict[str, Any]:
    if weights is None:
        return {}
    if isinstance(weights, (str, os.PathLike)) and Path(weights).is_file():
        return _from_checkpoint(Path(weights))
    if not hasattr(weights, "meta") or not hasattr(weights, "transforms"):
        raise TypeError(f"weights is {weights!r}, expected a torchvision weights enum member, a file or None")
    preset = weights.transforms()
    known = {"classes": weights.meta.get("categories"), "mean": preset.mean, "std": preset.std}
    crop = preset.crop_size[0]
    known |= {"resize": (preset.resize_size[0], crop), "interpolation": preset.interpolation.value}
    return {"input_size": (crop, crop), **known}


def _from_checkpoint(file: Path) -> dict[str, Any]:
    written = finetuned(file)
    if written is None:
        return {}
    known: dict[str, Any] = {name: getattr(written, name) for name in ("classes", "mean", "std")}
    if written.size is not None:
        known["input_size"] = (written.size, written.size)
        if written.resize is not None:
            known["resize"] = (written.resize, written.size)
    return {name: value for name, value in known.items() if value is not None}


def _from_timm(model: nn.Module) -> dict[str, Any]:
    config = getattr(model, "pretrained_cfg", None)
    if not isinstance(config, dict):
        return {}
    channels = channels_of(model)  # in_chans may differ from the configuration's
    known = {name: config[name] for name in ("mean", "std") if len(config.get(name) or ()) == channels}
    if config.get("input_size"):
        known["input_size"] = tuple(config["input_size"][1:])
        crop = max(known["input_size"])
        known["resize"] = (math.floor(crop / config.get("crop_pct", 1.0)), crop)  # as timm rounds
    if config.get("interpolation") in get_args(Interpolation):
        known["interpolation"] = config["interpolation"]
    return known
