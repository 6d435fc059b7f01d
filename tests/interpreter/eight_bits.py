"""Makes 8-bit numbers right, and quick, in Triton's interpreter. For tests only.

The interpreter (Triton 3.8) keeps float8_e4m3fn as raw ``uint8``. Its casts truncate where hardware rounds to nearest
even, and take NaN for 480. Its ``tl.dot`` of int8 is exact, but numpy multiplies integers slowly.

``install``, after that of ``bfloat16``, replaces both: casts of float8_e4m3fn are PyTorch's, and ``tl.dot`` multiplies
int8 in float64, which is exact as well, and fp8 in float32. ``test_interpreter.py`` checks them.
"""

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_FLOATS = {tl.float32: torch.float32, tl.float16: torch.float16}


def widen(values: np.ndarray, dtype: torch.dtype = torch.float32) -> np.ndarray:
    """float8_e4m3fn, as uint8, to a wider dtype."""
    return torch.from_numpy(np.ascontiguousarray(values)).view(torch.float8_e4m3fn).to(dtype).numpy()


def narrow(values: np.ndarray) -> np.ndarray:
    """To float8_e4m3fn, as uint8."""
    return torch.from_numpy(np.ascontiguousarray(values)).to(torch.float8_e4m3fn).view(torch.uint8).numpy()


def install() -> None:
    convert, dot = interpreter._convert_float, InterpreterBuilder.create_dot

    def _convert(values, source, target, rounding):
        if source == tl.float8e4nv:
            return widen(values, _FLOATS[target])
        if target == tl.float8e4nv:
            assert source in _FLOATS, f"a cast from {source} to {target}; widen to float32 first"
            return narrow(values)
        return convert(values, source, target, rounding)

    def _dot(self, a, b, accumulator, *options):
        if a.dtype.scalar == tl.int8:
            product = a.data.astype(np.float64) @ b.data.astype(np.float64)
        elif a.dtype.scalar == tl.float8e4nv:
            product = widen(a.data) @ widen(b.data)
        else:
            return dot(self, a, b, accumulator, *options)
        return TensorHandle(product.astype(accumulator.data.dtype) + accumulator.data, accumulator.dtype.scalar)

    interpreter._convert_float = _convert
    InterpreterBuilder.create_dot = _dot
