"""``torchrun --nproc-per-node N -m resnet_fast.finetune DATA ...``: the command ``resnet-fast finetune``."""

import sys

from resnet_fast.cli import main

sys.exit(main(["finetune", *sys.argv[1:]]))
