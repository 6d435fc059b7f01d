"""Batch norm statistics over all processes, on a GPU and on a CPU."""

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from resnet_fast.finetune.arguments import SettingError
from resnet_fast.graph.sync_batch_norm import CpuSyncBatchNorm


def synchronise(model: nn.Module, device: torch.device) -> nn.Module:
    """``model`` with statistics over all processes in its batch norms.

    Raises:
        SettingError: a batch norm does more than normalise, and would lose it.
    """
    norms = {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    for name, norm in norms.items():
        if type(norm) not in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
            raise SettingError("sync_bn", f"found a {type(norm).__name__} at {name}, expected a plain BatchNorm2d")
    if device.type != "cpu":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for norm in norms.values():
        norm.__class__ = CpuSyncBatchNorm
    return model
