"""What training's kernels do to a tile of a raw convolution result as they load it: batch norm and ReLU.

In training a convolution writes its result before batch norm, whose statistics are not known until all of it is there.
Whoever reads it next computes ``relu(x * scale + shift)`` in registers, so that no kernel does that alone.

Padding is zero *after* the ReLU, and ``relu(0 * scale + shift)`` is not. So what was not loaded is made zero again, by
a minimum: with 0 there, and elsewhere with NaN, which this kind of minimum takes for "no number", returning the other
one. That costs one instruction, two numbers at a time in float16, where a select costs several.

The first operand of a product that was changed in registers stays there. sm_90's product (wgmma) reads registers while
the program goes on, and assemblers write to them too early (triton issue 9433): where that may be, the product is
flipped, so that x is the second operand, which always comes from shared memory.
"""

import triton
import triton.language as tl


@triton.jit
def load_affine(scale_ptr, shift_ptr, channels, C: tl.constexpr, MASK: tl.constexpr):
    """scale, shift float32, of the block ``channels``. With MASK both are 0 from C on, so that ``activate`` gives 0."""
    if MASK:
        mask = channels < C
        return tl.load(scale_ptr + channels, mask=mask, other=0.0), tl.load(shift_ptr + channels, mask=mask, other=0.0)
    else:
        return tl.load(scale_ptr + channels), tl.load(shift_ptr + channels)


@triton.jit
def activate(x, scale, shift, inside, CHECK: tl.constexpr):
    """``relu(x * scale + shift)`` in the dtype of x, rounded once; NaN stays NaN.

    x [BM, BK]; scale, shift [BK] float32. With CHECK, rows that are not ``inside`` [BM] become zero (they must have
    been loaded as zero).
    """
    z = x.to(tl.float32) * scale[None, :] + shift[None, :]
    if x.dtype == tl.float16:
        z = z.to(tl.float16)
    z = tl.maximum(z, tl.zeros((1, 1), z.dtype), propagate_nan=tl.PropagateNan.ALL)
    if CHECK:
        limit = tl.where(inside, float("nan"), 0.0).to(z.dtype)
        z = tl.minimum(z, limit[:, None], propagate_nan=tl.PropagateNan.NONE)
    return z.to(x.dtype)


@triton.jit
def add_product(acc, x, w, FLIP: tl.constexpr, PRECISION: tl.constexpr):
    """``acc + x @ w``; with FLIP, acc and the result lie the other way round."""
    if FLIP:
        return tl.dot(tl.trans(w), tl.trans(x), acc, input_precision=PRECISION)
    else:
        return tl.dot(x, w, acc, input_precision=PRECISION)
