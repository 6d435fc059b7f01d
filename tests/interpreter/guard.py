"""Poisoned borders around what a kernel reads and writes.

The interpreter follows any address. A read outside a tensor is silent and finds whatever lies there, usually harmless
numbers; a write destroys it. So every tensor is placed between two borders of NaN. A read from a border makes the
result NaN, and a write to one is found afterwards. Outputs start as NaN too, so that an element never written shows.
"""

import torch

from resnet_fast.kernels.triton import launch, pack

_BORDER = 1 << 14  # elements on each side at least: more than any tile of the small tests reaches out


class Guards:
    def __init__(self) -> None:
        self._borders: list[torch.Tensor] = []

    def empty_like(self, tensor: torch.Tensor) -> torch.Tensor:
        """NaN of the shape and the strides of ``tensor``, which is dense, between borders of NaN."""
        size = tensor.numel()
        border = max(_BORDER, size)
        buffer = torch.full((border + size + border,), torch.nan, dtype=tensor.dtype)
        self._borders += [buffer[:border], buffer[border + size :]]
        return buffer.as_strided(tensor.shape, tensor.stride(), border)

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """``tensor`` between borders."""
        return self.empty_like(tensor).copy_(tensor)

    def install(self, monkeypatch) -> None:
        """Guard all that ``launch`` hands to a kernel: images, weights, scale and shift, residuals, outputs."""

        def around(function):
            return lambda *args: self.copy(function(*args))

        allocate = launch.allocate
        monkeypatch.setattr(launch, "allocate", lambda *args: self.empty_like(allocate(*args)))
        monkeypatch.setattr(launch, "_nhwc", around(launch._nhwc))
        monkeypatch.setattr(launch, "_vector", around(launch._vector))
        for name in ("weight", "row_weight", "pixels"):
            monkeypatch.setattr(pack, name, around(getattr(pack, name)))

    def check(self) -> None:
        for border in self._borders:
            assert border.isnan().all(), "a kernel wrote outside its output"
