"""float32 through TF32, executed.

Tensor cores do not look at the lower 13 bits of a float32. Where a kernel multiplies what it was given, the tests give
numbers without such bits, and nothing is lost. Where it multiplies what a prologue made, each factor may lose 2^-10 of
itself.
"""

import pytest
import torch

from resnet_fast.kernels.triton import table as kernels
from resnet_fast.utils import compat
from tests.interpreter import checking
from tests.interpreter import test_triton_chain as chain
from tests.interpreter import test_triton_training_backward as backward
from tests.interpreter import test_triton_training_forward as forward
from tests.interpreter.cases import CONVS


@pytest.fixture(autouse=True)
def _in_tf32(_executed):
    with compat.float32_in_tf32(True):
        yield


@pytest.fixture
def rounded_factors(monkeypatch):
    """Both factors of each product may have lost 2^-10 of themselves."""
    exactly = checking.sum_tolerance

    def tolerance(exact, dtype, terms, magnitude):
        return exactly(exact, dtype, terms, magnitude) + 2 * 2**-10 * magnitude

    for module in (checking, backward):
        monkeypatch.setattr(module, "sum_tolerance", tolerance)


def tf32(x: torch.Tensor) -> torch.Tensor:
    """Without the bits that TF32 has not; of -x, 2 x and 0 alike."""
    return (x.view(torch.int32) & ~0x1FFF).view(torch.float32)


class Conv(backward.Conv):
    def x(self, dtype: torch.dtype) -> torch.Tensor:
        return tf32(super().x(dtype))

    def weight(self, dtype: torch.dtype) -> torch.Tensor:
        return tf32(super().weight(dtype))

    def dy(self, dtype: torch.dtype) -> torch.Tensor:
        return tf32(super().dy(dtype))


@pytest.mark.parametrize("name", CONVS)
def test_conv(name):
    conv = CONVS[name]
    x, weight, *rest = conv.inputs(torch.float32)
    inputs = (tf32(x), tf32(weight), *rest)
    exact = checking.conv_exact(*inputs, *conv.geometry())
    actual = kernels.conv_bn_act(*inputs, *conv.geometry())
    checking.assert_within(actual, exact, checking.conv_tolerance(exact, *inputs, *conv.geometry()))


@pytest.mark.parametrize("name", backward.CONVS)
def test_dgrad(name):
    at = list(backward.CONVS).index(name)
    backward.check_dgrad(Conv(*backward.CONVS[name]), torch.float32, backward.GATES[-1 - at % 4], residual=at % 2 == 0)


@pytest.mark.parametrize("name", backward.CONVS)
def test_wgrad(name):
    backward.check_wgrad(Conv(*backward.CONVS[name]), torch.float32, prologue=False)


@pytest.mark.usefixtures("rounded_factors")
@pytest.mark.parametrize("name", backward.CONVS)
def test_wgrad_with_prologue(name):
    backward.check_wgrad(Conv(*backward.CONVS[name]), torch.float32, prologue=True)


@pytest.mark.usefixtures("rounded_factors")
@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (2, 3)])
def test_dgrad_expand(stride):
    backward.check_dgrad_expand(2, 20, 7, 9, 33, stride, torch.float32, "of a raw one", 1.0)


@pytest.mark.usefixtures("rounded_factors")
@pytest.mark.parametrize("with_prologue", [False, True], ids=["raw", "prologue"])
@pytest.mark.parametrize("name", forward.CONV_NAMES)
def test_conv_statistics(name, with_prologue):
    conv = CONVS[name]
    x, weight, *_ = conv.inputs(torch.float32)
    forward.check_conv_statistics(x, forward.affine(conv.c) if with_prologue else None, weight, conv)


@pytest.mark.usefixtures("rounded_factors")
@pytest.mark.parametrize("name", ["17 channels", "1x1", "1x1/2", "2 groups"])
def test_conv_affine(name):
    forward.test_conv_affine(name, torch.float32, None)


@pytest.mark.usefixtures("rounded_factors")
@pytest.mark.parametrize("name", chain.CHAINS)
def test_chain(name):
    chain.check([tf32(one) if one.dim() > 1 else one for one in chain.CHAINS[name].inputs(torch.float32)])
