"""A small network that has learnt something, so that it can be seen what rounding loses."""

import onnx_ir as ir
import torch
from torch import nn
from torchvision.models import resnet

from resnet_fast.cli.demo.photographs import photographs
from resnet_fast.export import export_onnx
from resnet_fast.export.metadata import Metadata
from resnet_fast.finetune.digits import digits

SIZE = 32


def exported(model, path, size=SIZE):
    """The graph that becomes int8."""
    export_onnx(model.eval(), path, input_size=(3, size, size), verify=False)
    return ir.load(path)


class Trained:
    """A ResNet that tells ten digits and eight photographs (crops of 32 x 32) apart, and what it was not trained on."""

    def __init__(self, folder):
        data, pictures = digits(0), photographs(2 * SIZE).images
        crops, names = self._crops(pictures, 256, 0)
        images = torch.cat([data.train_images, crops])
        labels = torch.cat([data.train_labels, names])
        self.digits, self.labels = data.test_images, data.test_labels
        self.photographs = self._crops(pictures, 64, 1)[0]
        torch.manual_seed(0)
        self.model = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=18)
        self._train(images, labels)
        self.model.eval()
        self.calibration = images[torch.randperm(len(images))[:256]]
        self.path = folder / "float.onnx"
        self.program = exported(self.model, self.path)
        self.metadata = Metadata("ResNet", (3, SIZE, SIZE))
        with torch.inference_mode():
            precise = self.model.double()
            self.digit_logits = precise(self.digits.double()).numpy()
            self.photograph_logits = precise(self.photographs.double()).numpy()
        self.model.float()

    @staticmethod
    def _crops(pictures, count, seed):
        generator = torch.Generator().manual_seed(seed)
        corners = torch.randint(0, SIZE + 1, (count, 2), generator=generator).tolist()
        labels = torch.arange(count) % len(pictures)
        crops = [
            pictures[label, :, top : top + SIZE, left : left + SIZE]
            for label, (top, left) in zip(labels.tolist(), corners, strict=True)
        ]
        return torch.stack(crops), labels + 10

    def _train(self, images, labels, batch=32):
        steps = len(images) // batch
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=steps)
        for chosen in torch.randperm(len(images))[: steps * batch].view(steps, batch):
            loss = nn.functional.cross_entropy(self.model(images[chosen]), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()

    def accuracy(self, logits):
        return 100 * float((logits.argmax(1) == self.labels.numpy()).mean())
