"""No kernel touches memory outside its operands.

The interpreter follows any address. A read outside a tensor is silent and finds whatever lies there, usually harmless
numbers, often in a column that is never stored; on a GPU it may be a fault. So every operand is registered, and every
load and store is checked: the addresses that its mask lets through must all lie in one operand. The load of a tensor
descriptor is such a load as well, with a mask of what lies inside the descriptor's shape.

Outputs start as NaN (int8: as 85), so that an element never written shows.
"""

import numpy as np
import torch
from triton.runtime.interpreter import InterpreterBuilder, _get_np_dtype

from resnet_fast.kernels.triton import operands, pack


class Guards:
    """The operands of a test, by address."""

    def __init__(self) -> None:
        self._operands: list[torch.Tensor] = []  # kept alive: another tensor must not get the same addresses

    def operand(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of ``tensor``, which is dense, that kernels may touch; itself if it is one, as what a launch before
        leaves."""
        if any(tensor is one for one in self._operands):
            return tensor
        self._operands.append(tensor.clone(memory_format=torch.preserve_format))
        return self._operands[-1]

    def install(self, monkeypatch) -> None:
        """Register all that plans hand to a kernel, and check what kernels do."""

        def register(module, names, fill=lambda made: made):
            for name in names:
                function = getattr(module, name)

                def registered(*args, function=function, **options):
                    made = function(*args, **options)
                    return None if made is None else self.operand(fill(made))

                monkeypatch.setattr(module, name, registered)

        register(operands, ("nhwc", "vector"))
        register(pack, ("weight", "row_weight", "pixels", "matrix", "vector"))
        register(operands, ("allocate", "allocate_floats"), _poison)
        register(operands, ("allocate_bytes",), lambda made: made.fill_(255))

        for name in ("create_masked_load", "create_masked_store"):
            monkeypatch.setattr(InterpreterBuilder, name, self._checked(getattr(InterpreterBuilder, name), name))

    def _checked(self, access, name: str):
        mask_at = 0 if name == "create_masked_load" else 1  # after the pointers, and the value of a store

        def checked(builder, pointers, *args, **options):
            touched = pointers.data[np.broadcast_to(args[mask_at].data, pointers.data.shape)]
            if touched.size:
                item = _get_np_dtype(pointers.get_element_ty()).itemsize
                self._check(int(touched.min()), int(touched.max()) + item, name)
            return access(builder, pointers, *args, **options)

        return checked

    def _check(self, first: int, end: int, name: str) -> None:
        if not any(t.data_ptr() <= first and end <= t.data_ptr() + t.nbytes for t in self._operands):
            raise AssertionError(f"{name} outside its operand")


def _poison(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.fill_(torch.nan if tensor.is_floating_point() else 85)
