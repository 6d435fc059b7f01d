"""BasicBlock and Bottleneck: torchvision's children and names, with a fused forward in eval mode."""

from collections.abc import Callable
from typing import Optional

from torch import nn
from torchvision.models import resnet

from resnet_fast.accelerated import accelerated, rebuild
from resnet_fast.graph.conditions import Accelerated


@accelerated
class BasicBlock(resnet.BasicBlock, Accelerated):
    """``relu(bn2(conv2(relu(bn1(conv1(x))))) + downsample(x))``, two 3x3 convolutions (He et al. 2015, figure 5 left).

    Args:
        in_channels: of the input ``[N, in_channels, H, W]``.
        out_channels: of the result ``[N, out_channels, H / stride, W / stride]``.
        stride: of the first convolution.
        downsample: applied to the input before the addition; needed where the shapes differ.
        groups, base_width, dilation, norm_layer: as in torchvision, which allows only 1, 64 and 1.

    Raises:
        ValueError: ``groups`` is not 1 or ``base_width`` is not 64.
        NotImplementedError: ``dilation`` is greater than 1.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        downsample: Optional[nn.Module] = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Optional[Callable[..., nn.Module]] = None,
    ) -> None:
        super().__init__(in_channels, out_channels, stride, downsample, groups, base_width, dilation, norm_layer)
        rebuild(self)


@accelerated
class Bottleneck(resnet.Bottleneck, Accelerated):
    """``relu(bn3(conv3(relu(bn2(conv2(relu(bn1(conv1(x)))))))) + downsample(x))``: 1x1 reduce, 3x3, 1x1 expand.

    He et al. 2015, figure 5 right, with the stride on the 3x3 convolution, as in torchvision.

    Args:
        in_channels: of the input ``[N, in_channels, H, W]``.
        out_channels: a quarter of the result's, ``[N, 4 * out_channels, H / stride, W / stride]``.
        stride: of the 3x3 convolution.
        downsample: applied to the input before the addition; needed where the shapes differ.
        groups, base_width: the 3x3 convolution has ``out_channels * base_width // 64 * groups`` channels.
        dilation: of the 3x3 convolution.
        norm_layer: makes a norm from a number of channels; ``nn.BatchNorm2d`` if None.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        downsample: Optional[nn.Module] = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Optional[Callable[..., nn.Module]] = None,
    ) -> None:
        super().__init__(in_channels, out_channels, stride, downsample, groups, base_width, dilation, norm_layer)
        rebuild(self)
