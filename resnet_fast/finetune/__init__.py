"""Fine-tuning and training from scratch: the loop behind ``resnet-fast finetune``.

arguments.py       what a run is asked for; each field is an option of the command
data.py            folders of images, CIFAR and the digits, as images and labels
folders.py         the layouts of image folders, and what is said of others
cifar.py           the published python format of CIFAR-10 and CIFAR-100
digits.py          scikit-learn's handwritten digits
transforms.py      augmentation and normalisation, mixup and cutmix
loading.py         batches in an order that depends on seed and epoch alone
weights.py         a checkpoint into a model, whose last layer may be another
freezing.py        which parameters learn, and which batch norms keep their statistics
qat.py             quantisation-aware training: a model that computes with the rounding of its int8 export
recipe.py          optimizer, schedule, average of the weights
distributed.py     the processes that torchrun started
sync_batch_norm.py statistics over all processes, on a CPU too
loop.py            the training loop
progress.py        what a run says while it goes on
checkpoint.py      files that appear whole or not at all, and say why if not
output_folder.py   the folder of a run, which no other gets meanwhile
report.py          metrics as CSV and JSON, curves and confusion matrix as pictures
fonts.py           what the names of classes are written with
"""

import importlib
from typing import TYPE_CHECKING, Any

from resnet_fast.finetune.arguments import Settings

if TYPE_CHECKING:
    from resnet_fast.finetune.data import Data, open_data
    from resnet_fast.finetune.loop import train

__all__ = ["Data", "Settings", "open_data", "train"]


def __getattr__(name: str) -> Any:
    places = {"Data": "data", "open_data": "data", "train": "loop"}
    if name in places:  # imported when asked for: the command line wants to know the settings only
        return getattr(importlib.import_module(f"resnet_fast.finetune.{places[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
