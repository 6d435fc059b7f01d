"""What every function that takes a model checks first."""

from torch import nn


def check_module(model: nn.Module) -> None:
    """Raise a TypeError unless ``model`` is an ``nn.Module``."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, expected a torch.nn.Module")
