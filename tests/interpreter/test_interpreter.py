"""What the other tests stand on: bfloat16.py and eight_bits.py against PyTorch's casts and products, and that guard.py
sees an access."""

import pytest
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from resnet_fast.utils import compat


@triton.jit
def _cast_kernel(x_ptr, y_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(y_ptr + at, tl.load(x_ptr + at).to(y_ptr.dtype.element_ty))


@triton.jit
def _dot_kernel(a_ptr, b_ptr, y_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(y_ptr + at, tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at)))


@triton.jit
def _double_kernel(x_ptr, y_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    x = tl.load(x_ptr + at)
    tl.store(y_ptr + at, x + x)


def test_widening_is_exact_for_every_bfloat16():
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)
    y = torch.empty(x.shape)
    _cast_kernel[(1,)](x, y, x.numel())
    assert torch.equal(y.view(torch.int32), x.float().view(torch.int32))


def test_narrowing_rounds_as_pytorch_does():
    bits = torch.randint(-(2**31), 2**31, (2**16,), dtype=torch.int64).to(torch.int32)
    bits[:6] = torch.tensor([0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x00008000, 0x7F800000, 0x7FC00000])  # ties, limits
    x = bits.view(torch.float32)
    y = torch.empty(x.shape, dtype=torch.bfloat16)
    _cast_kernel[(1,)](x, y, x.numel())
    expected = x.bfloat16()
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y[~y.isnan()].view(torch.int16), expected[~expected.isnan()].view(torch.int16))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dot_multiplies_values_not_bits(dtype):
    a, b = torch.randn(2, 64, 64).to(dtype)
    y = torch.empty(64, 64)
    _dot_kernel[(1,)](a, b, y, 64)
    torch.testing.assert_close(y, a.float() @ b.float())


def test_arithmetic_in_bfloat16_is_refused():
    x = torch.ones(16, dtype=torch.bfloat16)
    with pytest.raises(triton.runtime.errors.InterpreterError, match="widen to float32"):
        _double_kernel[(1,)](x, torch.empty_like(x), 16)


def test_casts_of_fp8_are_those_of_pytorch():
    """Every number of it to float32; to it numbers of all magnitudes, ties, and NaN."""
    x = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    y = torch.empty(x.shape)
    _cast_kernel[(1,)](x, y, x.numel())
    torch.testing.assert_close(y, x.float(), rtol=0, atol=0, equal_nan=True)

    wide = torch.cat(
        [torch.randn(1020) * 2.0 ** torch.randint(-12, 7, (1020,)), torch.tensor([17.0, 19, 2**-10, torch.nan])]
    )
    narrow = torch.empty(wide.shape, dtype=torch.float8_e4m3fn)
    _cast_kernel[(1,)](wide, narrow, wide.numel())
    assert narrow[-4:-1].tolist() == [16.0, 20.0, 0.0]  # halfway: to the even one
    torch.testing.assert_close(narrow.float(), wide.to(torch.float8_e4m3fn).float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_dot_of_8_bits(dtype):
    a, b = torch.randint(-128, 128, (2, 64, 64)).to(dtype)
    y = torch.empty(64, 64, dtype=torch.int32 if dtype == torch.int8 else torch.float32)
    _dot_kernel[(1,)](a, b, y, 64)
    assert torch.equal(y.double(), a.double() @ b.double())  # few bits each: exact in float32 as well


@triton.jit
def _shift_kernel(x_ptr, y_ptr, READ, WRITE, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    x = tl.load(x_ptr + at + READ, mask=at < SIZE - 1, other=0.0)
    tl.store(y_ptr + at + WRITE, x, mask=at < SIZE - 1)


def test_an_access_outside_an_operand_is_an_error(guarded):
    """By one element at either end, though the memory there is another operand's."""
    x, y = guarded.operand(torch.ones(64)), guarded.operand(torch.zeros(64))
    _shift_kernel[(1,)](x, y, 1, 0, 64)
    assert y.sum() == 63
    for read, write in [(2, 0), (-1, 0), (0, 2), (0, -1)]:
        with pytest.raises(triton.runtime.errors.InterpreterError, match="outside its operand"):
            _shift_kernel[(1,)](x, y, read, write, 64)


@triton.jit
def _box_kernel(x, y_ptr, TOP, LEFT, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(y_ptr + at, x.load([TOP, LEFT]))


@pytest.mark.skipif(not compat.has_descriptors(), reason="this Triton has no tensor descriptors that serve")
def test_a_descriptor_reads_zeros_around_its_tensor(guarded):
    """Not what lies there, NaN here. One that is larger than its memory is found."""
    image = torch.arange(1.0, 17).view(4, 4)
    memory = torch.nn.functional.pad(image, (4, 4), value=torch.nan)
    x, y = guarded.operand(memory).flatten()[4:], guarded.operand(torch.empty(8, 8))
    around = torch.nn.functional.pad(image, (16, 16, 16, 16))
    for top, left in [(0, 0), (-1, -4), (2, 0), (-9, 0), (0, 4), (-5, 8)]:
        _box_kernel[(1,)](TensorDescriptor(x, [4, 4], [12, 1], [8, 8]), y, top, left, 8)
        assert torch.equal(y, around[16 + top : 24 + top, 16 + left : 24 + left])
    with pytest.raises(triton.runtime.errors.InterpreterError, match="outside its operand"):
        _box_kernel[(1,)](TensorDescriptor(x, [5, 4], [12, 1], [8, 8]), y, 0, 0, 8)
