"""Faster R-CNN on two photographs, set up as torchvision fine-tunes it: frozen batch norm, three trainable stages."""

import torch
from sklearn.datasets import load_sample_images
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.transforms.functional import to_tensor

import resnet_fast
from common import steps_wanted, watch

TARGETS = [  # of china.jpg and flower.jpg, both 427 high and 640 wide: x1, y1, x2, y2
    {"boxes": torch.tensor([[40.0, 105, 600, 320]]), "labels": torch.tensor([1])},  # a temple
    {"boxes": torch.tensor([[190.0, 50, 470, 335]]), "labels": torch.tensor([2])},  # a dahlia
]


def main(steps: int) -> None:
    photographs = [to_tensor(image) for image in load_sample_images().images]
    torch.manual_seed(0)
    # weights="DEFAULT" where there is a network to fetch them from. FrozenBatchNorm2d is what it uses by itself.
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None, trainable_layers=3)
    model = FasterRCNN(backbone, num_classes=3, min_size=160, max_size=240)
    resnet_fast.accelerate(model)  # the one line

    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.SGD(trainable, lr=0.01, momentum=0.9)
    model.train()
    with watch() as losses:
        for _ in range(steps):
            parts = model(photographs, TARGETS)
            optimiser.zero_grad()
            loss = sum(parts.values())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trainable, 5.0)
            optimiser.step()
            losses.append(loss.item())


if __name__ == "__main__":
    main(steps_wanted(default=20))
