"""``tune(model, example_input)``: measure which algorithm is fastest for each convolution of a model, on CPU or GPU."""

import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from resnet_fast.graph.conditions import Accelerated
from resnet_fast.kernels.native import abi, library, planner
from resnet_fast.kernels.triton.tuning import planner as gpu_planner
from resnet_fast.utils.modules import check_module

_WARM_UP_CALLS = 2


@dataclass(frozen=True)
class Choice:
    """What was measured for one shape."""

    shape: str
    algorithm: str  # the fastest
    milliseconds: dict[str, float]  # median, by algorithm
    rejected: dict[str, str] = field(default_factory=dict)  # why an algorithm cannot serve, on a GPU


@dataclass(frozen=True)
class Tuning:
    """``tune``'s answer, one choice for each shape of convolution, in the order of the model."""

    choices: list[Choice]

    def __str__(self) -> str:
        lines = []
        for choice in self.choices:
            times = ", ".join(f"{name} {ms:.3f}" for name, ms in choice.milliseconds.items())
            lines.append(f"{choice.shape}: {choice.algorithm} (ms: {times})")
            lines += [f"    rejected: {name}: {reason}" for name, reason in choice.rejected.items()]
        return "\n".join(lines)


def tune(model: nn.Module, example_input: Tensor, calls: int = 7) -> Tuning:
    """Choose the fastest algorithm for each convolution of ``model``, by measurement, for now and later.

    The model runs on ``example_input`` as a whole, with each algorithm in turn wherever it can serve, so every layer
    is timed with the caches as the layers before it leave them; so does PyTorch's own, oneDNN, one layer after the
    other. Where that is fastest it serves layers that are called one by one, and the fastest of ours a planned network.
    The choices hold for images of this size and batch and for ``torch.get_num_threads()`` threads, in every model with
    such a layer, and are kept in a file of this user for this CPU and these versions. Nothing else should run
    meanwhile. A few seconds for a ResNet.

    On a GPU every convolution that the model runs is measured by itself, on random images and weights and with cold
    caches: our kernel with several tiles against cuDNN's (MIOpen's) convolutions, with their fused epilogue and with a
    pass after them. A candidate whose result is not as right as PyTorch's is rejected. The choices hold for images of
    this size, for batches up to the same power of two, and for this GPU and these versions. Most of the time goes into
    compiling, the first time.

    Args:
        model: accelerated, in eval mode; float32 on the CPU; float32, float16 or bfloat16 on a GPU.
        example_input: ``[N, C, H, W]``, as in the calls to come, on the model's device.
        calls: timed ones with each algorithm.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.
        ValueError: ``model`` is not accelerated, or in training mode; ``calls`` is below 1; or no convolution of it ran
            in our kernels.
        RuntimeError: on the CPU, the native kernels are not there.
        OSError: the file cannot be written.
    """
    return Tuning(list(tuned(model, example_input, calls)))


def tuned(model: nn.Module, example_input: Tensor, calls: int = 7) -> Iterator[Choice]:
    """The choices of ``tune``, on a GPU each as soon as it is measured and kept: what ends it costs only the rest."""
    _check(model, calls)
    tune_here = _tune_gpu if example_input.is_cuda else _tune_cpu
    return tune_here(model, example_input, calls)


def _tune_gpu(model: nn.Module, example_input: Tensor, calls: int) -> Iterator[Choice]:
    with torch.inference_mode(), gpu_planner.recorded() as problems:
        model(example_input)
    if not problems:
        raise ValueError("model ran no convolution in the Triton kernels: see explain(model)")
    from resnet_fast.kernels.triton.tuning import measuring  # imports Triton, which is there: it has run

    device = example_input.device
    timer = measuring.Events(device)
    for key, problem in {problem.key(): problem for problem in problems}.items():
        found = measuring.measure(problem, device, timer, calls)
        gpu_planner.keep(device.index, {key: found.chosen})
        yield Choice(key, found.chosen, found.milliseconds, found.rejected)


def _tune_cpu(model: nn.Module, example_input: Tensor, calls: int) -> Iterator[Choice]:
    reason = library.unavailable()
    if reason is not None:
        raise RuntimeError(reason)
    shapes: dict[str, dict[str, list[float]]] = {}
    with torch.inference_mode():
        for algorithm in planner.CANDIDATES:
            with planner.forced(algorithm):
                for _ in range(_WARM_UP_CALLS):
                    model(example_input)
                with library.recorded() as operations:
                    for _ in range(calls):
                        model(example_input)
            for timing in operations:
                key = planner.describe(timing.shape, torch.get_num_threads())
                if algorithm == planner.ONEDNN:  # the last; ours would be timed outside their plan here
                    wanted = timing.algorithm == planner.ONEDNN and key in shapes
                else:
                    wanted = timing.kind == abi.CONV
                if wanted:
                    shapes.setdefault(key, {}).setdefault(timing.algorithm, []).append(timing.seconds)
    if not shapes:
        raise ValueError("model ran no convolution in the native kernels: see explain(model)")
    found = [_choice(shape, times) for shape, times in shapes.items()]
    planner.changed()
    planner.choices.add(planner.machine(), {key: name for choice in found for key, name in _kept(choice).items()})
    yield from found


def _check(model: nn.Module, calls: int) -> None:
    check_module(model)
    if not any(isinstance(module, Accelerated) for module in model.modules()):
        raise ValueError("model is not accelerated: call accelerate(model) first")
    if model.training:
        raise ValueError("model is in training mode, expected eval mode")
    if calls < 1:
        raise ValueError(f"calls is {calls}, expected at least 1")


def _choice(shape: str, times: dict[str, list[float]]) -> Choice:
    medians = {name: statistics.median(seconds) * 1e3 for name, seconds in times.items()}
    return Choice(shape, _fastest(medians), medians)


def _fastest(milliseconds: dict[str, float]) -> str:
    return min(milliseconds, key=lambda name: milliseconds[name])


def _kept(choice: Choice) -> dict[str, str]:
    kept = {choice.shape: choice.algorithm}
    if choice.algorithm == planner.ONEDNN:
        ours = {name: ms for name, ms in choice.milliseconds.items() if name != planner.ONEDNN}
        kept[planner.planned(choice.shape)] = _fastest(ours)
    return kept
