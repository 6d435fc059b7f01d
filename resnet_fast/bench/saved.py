"""What a forward pass keeps for the backward pass, in bytes."""

import torch
from torch import Tensor, nn


def saved_bytes(model: nn.Module, images: Tensor) -> int:
    """Bytes that autograd holds between ``model(images)`` and its backward pass.

    Storages are counted once, however many tensors share them, and whole. The model's parameters and buffers are left
    out: they are there anyway. The images are not: a caller could let go of them, were it not for the backward pass.

    Args:
        model: in the mode that it is to be measured in; its running statistics move as in any call.
        images: ``[N, C, H, W]``.
    """
    own = {_storage(tensor) for tensor in (*model.parameters(), *model.buffers())}
    sizes: dict[int, int] = {}
    held: list[Tensor] = []  # so that no storage's address is used again while they are counted

    def pack(tensor: Tensor) -> Tensor:
        held.append(tensor.detach())
        sizes[_storage(tensor)] = tensor.untyped_storage().nbytes()
        return held[-1]  # not a result itself, whose graph would hold it: neither would ever be freed

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = nn.functional.cross_entropy(
            model(images), torch.zeros(len(images), dtype=torch.int64, device=images.device)
        )
        del loss
    return sum(size for storage, size in sizes.items() if storage not in own)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
