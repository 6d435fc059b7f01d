"""The classifiers of ResNet-18 and ResNet-50, for ImageNet and for few classes, planned on the meta device.

As in layers.py. Small batches take one launch and large ones two (classifier.py).
"""

from collections.abc import Iterator

import torch

from resnet_fast.kernels.triton.classifier import plan_head
from resnet_fast.kernels.triton.plan import Plan
from resnet_fast.utils import compat
from tests.aot.layers import BATCHES, DTYPES, Item, image, items

CHANNELS = (512, 2048)
CLASSES = (1000, 10)
IMAGES = (*BATCHES, 1024)  # of so many, even few channels and classes take two launches


def head_launches(architecture: str, precision: str) -> Iterator[Item]:
    for channels in CHANNELS:
        for classes in CLASSES:
            for batch in IMAGES:
                name = f"head {channels}->{classes} batch {batch}"
                planned = plan(architecture, precision, batch, channels, classes)
                yield from items(name, architecture, precision, planned)


def plan(architecture: str, precision: str, batch: int, channels: int, classes: int) -> Plan:
    dtype = DTYPES[precision]
    weight, bias = (torch.empty(*shape, dtype=dtype, device="meta") for shape in ((classes, channels), (classes,)))
    with compat.float32_in_tf32(precision == "tf32"):
        return plan_head(image(batch, channels, 7, 7, dtype), weight, bias, architecture)
