"""A state_dict into a model, whose last layer may have other classes."""

from collections.abc import Mapping

from torch import Tensor, nn


def head_fits(model: nn.Module, state: Mapping[str, Tensor]) -> bool:
    """Return whether the last linear layer in ``state`` has as many outputs as that of ``model``."""
    name = f"{_head(model)}.weight"
    own = model.state_dict()
    return name not in own or name not in state or own[name].shape == state[name].shape


def load_weights(model: nn.Module, state: Mapping[str, Tensor], *, new_head: bool) -> None:
    """Load ``state``, all of it or, with ``new_head``, all but the last linear layer.

    Raises:
        RuntimeError: it does not fit.
    """
    if new_head:
        head = f"{_head(model)}."
        kept = {name: tensor for name, tensor in state.items() if not name.startswith(head)}
        state = {**kept, **{name: tensor for name, tensor in model.state_dict().items() if name.startswith(head)}}
    model.load_state_dict(state)


def _head(model: nn.Module) -> str:
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return names[-1] if names else ""
