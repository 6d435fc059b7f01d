"""A state_dict for a model whose last layer may have other classes."""

from collections.abc import Mapping

from torch import Tensor, nn

from resnet_fast.models.checkpoint import last_layer, last_layer_outputs


def head_fits(model: nn.Module, state: Mapping[str, Tensor]) -> bool:
    """Return whether the last linear layer in ``state`` has as many outputs as that of ``model``, or none."""
    return last_layer_outputs(model, state) in (None, last_layer_outputs(model, model.state_dict()))


def with_own_head(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``state`` with the last linear layer that ``model`` has now."""
    head = f"{last_layer(model)}."
    kept = {name: tensor for name, tensor in state.items() if not name.startswith(head)}
    return {**kept, **{name: tensor for name, tensor in model.state_dict().items() if name.startswith(head)}}
