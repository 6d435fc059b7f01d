"""Which parameters learn, and which batch norms keep their statistics."""

import difflib
from collections.abc import Sequence

from torch import nn

from resnet_fast.finetune.arguments import SettingError

BatchNorm = nn.modules.batchnorm._BatchNorm


class Frozen:
    """Modules of ``model`` that neither learn nor change.

    Args:
        names: of modules, with all that they contain, as ``["conv1", "layer1.0"]``.
        batch_norms: whether all batch norms are meant too.
        statistics: whether all batch norms keep their statistics at least, even if their scales and shifts learn.

    Raises:
        SettingError: there is no module of one of the names, or nothing is left that learns.
    """

    def __init__(
        self, model: nn.Module, names: Sequence[str] = (), batch_norms: bool = False, statistics: bool = False
    ) -> None:
        modules = dict(model.named_modules())
        for name in names:
            if name not in modules or not name:
                close = difflib.get_close_matches(name, modules, n=3)
                children = ", ".join(child for child, _ in model.named_children())
                hint = f"did you mean {' or '.join(close)}?" if close else f"there are {children}"
                raise SettingError("freeze", f"names {name!r}, which is not a module: {hint}")
        self._model = model
        self._modules = [modules[name] for name in names]
        norms = [module for module in modules.values() if isinstance(module, BatchNorm)]
        if batch_norms:
            self._modules += norms
        self._statistics = norms if statistics else []
        for module in self._modules:
            module.requires_grad_(False)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise SettingError("freeze", "leaves nothing that learns")

    def train(self) -> None:
        """``model.train()``, but what is frozen stays in eval mode: its batch norms apply their running statistics."""
        self._model.train()
        for module in (*self._modules, *self._statistics):
            module.eval()
