"""Convolutions of inference: on a GPU, what was measured there decides (tuning/), PyTorch's own included."""

from typing import Optional

from torch import Tensor

from resnet_fast.kernels.contract import Pair
from resnet_fast.kernels.triton import device, prepared
from resnet_fast.kernels.triton.forward import carry_out
from resnet_fast.kernels.triton.pool import plan_tail_pool
from resnet_fast.kernels.triton.tuning import cudnn, first_call, planner


def conv_bn_act(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Optional[Tensor],
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    relu: bool,
    target: str,
) -> Tensor:
    """See ``reference.conv_bn_act``; by what was measured to be the fastest, and prepared for the next call."""
    arguments = (x, weight, scale, shift, residual, stride, padding, dilation, groups, relu)
    if not x.is_cuda:  # the interpreter
        return carry_out(None, *arguments).y
    kernel = (weight.shape[2], weight.shape[3])
    problem = planner.Problem(
        target, x.dtype, device.precision_of(x.dtype, target), *x.shape, weight.shape[0], kernel, stride, padding,
        dilation, groups, residual is not None, relu,
    )  # fmt: skip
    choice = first_call.choose(problem, x.device)
    if choice is not None and choice.name == cudnn.FUSED and prepared.bound(x, weight, residual, *arguments[5:]):
        # Scale and shift are others than in the call before, as in compiled models, where they are new in every call:
        # folding them into the weight each time takes longer than a pass after it, and in float16 waits for the GPU.
        choice = planner.Candidate(cudnn.POINTWISE, None)
    outcome = carry_out(choice, *arguments)
    planner.note(weight, problem, outcome.choice)
    prepared.keep(outcome.call, *arguments)
    return outcome.y


def stem(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, target: str) -> Tensor:
    """See ``reference.stem``.

    The convolution and the max-pool are two kernels. In one, every pooled pixel would recompute its window's
    convolutions, 2.25 times the products (tiles of pooled pixels share no accumulators in Triton); by the byte and
    instruction counts that costs about what writing and reading the convolution's output does, so the simpler way won.
    """
    convolution = (x, weight, scale, shift, None, (2, 2), (3, 3), (1, 1), 1, True)
    y = prepared.run(*convolution) if x.is_cuda else None
    return plan_tail_pool(conv_bn_act(*convolution, target) if y is None else y, None, target).run()
