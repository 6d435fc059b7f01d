"""Lightning, with its own way to thaw a backbone: early layers are frozen in the first epoch and learn from then on.

Lightning's freeze leaves frozen batch norms in training mode, normalising by the batch, and stops their running
statistics (``track_running_stats=False``). Accelerated blocks do the same.
"""

import warnings

import pytorch_lightning as lightning
import torch
import torch.nn.functional as F
from pytorch_lightning.callbacks import BaseFinetuning
from torchvision.models import resnet18

import resnet_fast
from common import batches, steps_wanted, watch


class Digits(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = resnet18(num_classes=10)
        resnet_fast.accelerate(self.model)  # the one line
        self.losses: list[float] = []

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        images, labels = batch
        loss = F.cross_entropy(self.model(images), labels)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=1e-3)


class Thaw(BaseFinetuning):
    def freeze_before_training(self, module: Digits) -> None:
        self.freeze([module.model.conv1, module.model.bn1, module.model.layer1])

    def finetune_function(self, module: Digits, epoch: int, optimiser: torch.optim.Optimizer) -> None:
        if epoch == 1:
            early = [module.model.conv1, module.model.bn1, module.model.layer1]
            self.unfreeze_and_add_param_group(early, optimiser)


def main(steps: int) -> None:
    torch.manual_seed(0)
    warnings.filterwarnings("ignore", module="pytorch_lightning")  # advice on loaders and loggers
    module = Digits()
    trainer = lightning.Trainer(
        accelerator="cpu",
        precision="bf16-mixed",
        max_epochs=2,
        callbacks=[Thaw()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with watch() as losses:
        trainer.fit(module, batches(steps // 2))
        losses += module.losses


if __name__ == "__main__":
    main(steps_wanted(default=20))
