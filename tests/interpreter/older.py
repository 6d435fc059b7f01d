"""What Triton's interpreter did before 3.7 otherwise than its compiler does, mended. For tests only."""

from typing import Any

import numpy as np
from triton.runtime import interpreter


def install() -> None:
    _index_with_one_element()
    # Of a number and a NaN, the number.
    interpreter.InterpreterBuilder.create_minnumf = lambda self, a, b: self.binary_op(a, b, np.fmin)
    interpreter.InterpreterBuilder.create_maxnumf = lambda self, a, b: self.binary_op(a, b, np.fmax)


def _index_with_one_element() -> None:
    """A number that a kernel loaded bounds its loops: an array of one element, which ``int`` of NumPy 2.5 refuses."""
    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, *scope: Any) -> None:
        patch(tensor, *scope)
        if scope:  # from 3.5 on, where patches are undone
            scope[0].set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patched
