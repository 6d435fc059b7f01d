"""Makes bfloat16 right in Triton's interpreter. For tests only.

The interpreter keeps bfloat16 as raw ``uint16``, which numpy takes for integers. Triton 3.8 then multiplies those
integers in ``tl.dot``, computes with them in arithmetic, and truncates in casts from float32 where hardware rounds to
nearest even. Nothing warns; results are off by ten orders of magnitude.

``install`` replaces three methods:

* casts between float32 and bfloat16 become bit-exact;
* ``tl.dot`` widens its operands to float32 first, as tensor cores do (float16 too, which numpy multiplies slowly);
* arithmetic on bfloat16 becomes an error: our kernels widen before they compute, and must keep doing so.

``test_interpreter.py`` checks all three.
"""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_convert_float = interpreter._convert_float
_binary_op = InterpreterBuilder.binary_op
_unary_op = InterpreterBuilder.unary_op


def widen(bits: np.ndarray) -> np.ndarray:
    """bfloat16, as uint16, to float32: the upper half of the same bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """float32 to bfloat16, as uint16, to the nearest, ties to even. Every NaN becomes the quiet one, as in PyTorch."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    odd = (bits >> 16) & 1
    rounded = ((bits + 0x7FFF + odd) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded).astype(np.uint16).reshape(np.shape(values))


def _convert(values, source, target, rounding):
    if source == tl.bfloat16 and target == tl.float32:
        return widen(values)
    if source == tl.float32 and target == tl.bfloat16:
        return narrow(values)
    return _convert_float(values, source, target, rounding)


def _dot(self, a, b, accumulator, precision, max_imprecise):
    product = _operand(a) @ _operand(b)
    return TensorHandle(product.astype(accumulator.data.dtype) + accumulator.data, accumulator.dtype.scalar)


def _operand(handle: TensorHandle) -> np.ndarray:
    if handle.dtype.scalar == tl.bfloat16:
        return widen(handle.data)
    return handle.data.astype(np.float32) if handle.data.dtype == np.float16 else handle.data


def _refuse(*handles: TensorHandle) -> None:
    if any(handle.dtype.scalar == tl.bfloat16 for handle in handles):
        raise TypeError("arithmetic on bfloat16; widen to float32 first")


def _checked_binary_op(self, left, right, op):
    _refuse(left, right)
    return _binary_op(self, left, right, op)


def _checked_unary_op(self, arg, op):
    _refuse(arg)
    return _unary_op(self, arg, op)


def install() -> None:
    interpreter._convert_float = _convert
    InterpreterBuilder.create_dot = _dot
    InterpreterBuilder.binary_op = _checked_binary_op
    InterpreterBuilder.unary_op = _checked_unary_op
