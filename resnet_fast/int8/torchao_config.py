"""A configuration of torchao's, so that ``torchao.quantization.quantize_`` does what ``resnet_fast.quantize`` does:

    from torchao.quantization import quantize_
    from resnet_fast.int8.torchao_config import Int8Config, whole_model

    quantize_(model, Int8Config(images), filter_fn=whole_model)

It needs torchao; nothing else here imports it. What differs from torchao's own configurations: it is for a whole model,
whose convolutions it quantises, so the usual ``filter_fn``, which takes linear layers one by one, is refused; ranges
are measured beforehand on images, not in every call; and parameters stay float32 ``nn.Parameter``s, so that a
state_dict is that of the float model.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Optional

from torch import nn
from torchao.core.config import AOBaseConfig
from torchao.quantization.transform_module import register_quantize_module_handler

from resnet_fast.int8.quantising import quantize


@dataclass
class Int8Config(AOBaseConfig):
    """What ``quantize`` is given: ``calibration``, ``ranges``, and ``options``, its other arguments by name."""

    calibration: Any = None
    ranges: Optional[Mapping[str, float]] = None
    options: dict[str, Any] = field(default_factory=dict)


def whole_model(module: nn.Module, name: str) -> bool:
    """The ``filter_fn`` that takes the model itself, and no layer by itself."""
    return name == ""


@register_quantize_module_handler(Int8Config)
def _quantise(module: nn.Module, config: Int8Config) -> nn.Module:
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        raise ValueError(
            f"filter_fn takes a {type(module).__name__} by itself, expected resnet_fast.int8.torchao_config.whole_model"
        )
    return quantize(module, config.calibration, ranges=config.ranges, inplace=True, **config.options)
