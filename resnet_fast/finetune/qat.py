"""Quantisation-aware training: a model that computes, and learns, with the rounding of its int8 export.

    prepare_qat(model)
    calibrate(model, batches)
    ...                               # train as ever, batch norms in eval mode
    observe(model, False)             # for the last epochs
    ...
    trained = ranges(model)           # beside the weights, for the export
    remove_qat(model)                 # the float model with the trained weights

What is rounded is what the export quantises, to the same numbers: the input of each convolution and linear layer,
``clamp(round(x / scale), -128, 127) * scale`` with ``scale = amax / 127``, one for each tensor; their weights likewise,
one scale for each output channel, from its own largest magnitude; and what a residual block's shortcut adds, which the
export's int8 addition reads. What goes into a batch norm, an addition or a ReLU behind a convolution is not:
there the export keeps its accumulators. Gradients pass straight through where nothing is clamped and are zero elsewhere
(Jacob et al. 2018, arXiv:1712.05877, section 3; the ops and their gradients are PyTorch's).

Batch norms are to normalise by their running statistics, as the export does, in training too (Krishnamoorthi 2018,
arXiv:1806.08342): then they multiply whole output channels, which changes a channel's scale and not its numbers, and a
weight is rounded to the same ones before and after folding. ``freezing.Frozen`` sees to it.

An activation's amax is first the mean of the calibration batches' largest magnitudes, then their moving average over
training, at last a constant (Jacob et al.). It is not learnt by gradients (LSQ, Esser et al. 2020, arXiv:1902.08153):
at 8 bits that gains next to nothing over well calibrated ranges (Wu et al. 2020, arXiv:2004.09602), and would add
parameters to the state_dict, which stays torchvision's.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, Union

import torch
from torch import Tensor, nn

from resnet_fast.graph.residual_blocks import residuals
from resnet_fast.kernels.reference.quantised import RANGE
from resnet_fast.utils.modules import check_module

M = TypeVar("M", bound=nn.Module)

_LOWEST, _HIGHEST = (int(bound) for bound in RANGE[torch.int8])
_SMALLEST_SCALE = 2.0**-126  # of which a float32 holds the reciprocal
_AVERAGING_CONSTANT = 0.01
"""The share of a new batch in the moving average: that of ``torch.ao.quantization.MovingAverageMinMaxObserver``."""

_INPUT, _RESIDUAL = "input_range", "residual_range"
_SUFFIX = "_range"


# --- what a prepared model is made of ---------------------------------------------------------------------------------


class FakeQuantise(nn.Module):
    """Rounds a tensor to the numbers that its int8 copy can hold, and keeps track of how large it gets.

    ``amax``, the largest magnitude that is held, is a float32 buffer of no dimensions. It is in no state_dict, but goes
    with the model to other devices and into copies, averages and DDP's broadcasts.
    """

    amax: Tensor

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.register_buffer("amax", torch.zeros((), device=device), persistent=False)
        self.known = False  # whether amax is
        self.calibrated = 0  # batches seen in the calibration that is going on
        self.calibrating = False
        self.observing = True  # in training mode

    def forward(self, x: Tensor) -> Tensor:
        if self.calibrating:
            self.calibrated += 1
            self._observe(x, 1 / self.calibrated)
            return x
        if not self.known:
            raise RuntimeError("a range is not known yet: call calibrate(model, batches) or set_ranges(model, ranges)")
        if self.training and self.observing:
            self._observe(x, _AVERAGING_CONSTANT)
        scale = _scale(self.amax)
        return torch.fake_quantize_per_tensor_affine(x, scale, _zeros(scale), _LOWEST, _HIGHEST)

    def weight(self, weight: Tensor) -> Tensor:
        """The weight of the layer that reads the tensor: a calibration is of the float model."""
        return weight if self.calibrating else fake_quantise_weight(weight)

    @torch.no_grad()
    def _observe(self, x: Tensor, share: float) -> None:
        lowest, highest = torch.aminmax(x.detach())
        amax = torch.maximum(-lowest, highest).to(self.amax.dtype)
        if not self.calibrating:  # fp16 overflows at times, and the gradient scaler leaves such a step out
            amax = torch.where(amax.isfinite(), amax, self.amax)
        self.amax.lerp_(amax, share)

    def extra_repr(self) -> str:
        return f"amax={self.amax.item():.6g}" if self.known else "not calibrated"


def fake_quantise_weight(weight: Tensor) -> Tensor:
    """``weight`` ``[K, ...]`` rounded to int8, of its dtype, with a scale for each of the K output channels."""
    scale = _scale(weight.detach().abs().flatten(1).amax(1))
    return torch.fake_quantize_per_channel_affine(weight, scale, _zeros(scale), 0, _LOWEST, _HIGHEST)


def _scale(amax: Tensor) -> Tensor:
    """``amax / 127``, and 1 where that is too small to divide by, as in ``resnet_fast.quantised``."""
    amax = amax.float()
    return torch.where(amax < _HIGHEST * _SMALLEST_SCALE, 1.0, amax / _HIGHEST)


def _zeros(scale: Tensor) -> Tensor:
    return torch.zeros_like(scale, dtype=torch.int32)


class FakeQuantisedConv2d(nn.Conv2d):
    """An ``nn.Conv2d`` whose input and weight are rounded to int8."""

    input_range: FakeQuantise
    input_is_rounded: bool  # before it gets here, since a shortcut adds the same tensor

    def forward(self, input: Tensor) -> Tensor:
        x = input if self.input_is_rounded else self.input_range(input)
        return self._conv_forward(x, self.input_range.weight(self.weight), self.bias)


class FakeQuantisedLinear(nn.Linear):
    """An ``nn.Linear`` whose input and weight are rounded to int8."""

    input_range: FakeQuantise

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(self.input_range(input), self.input_range.weight(self.weight), self.bias)


class _OnInput:
    """The forward pre-hook that rounds a module's first input. An object, so that copies of a model have their own."""

    def __init__(self, fake_quantise: FakeQuantise) -> None:
        self.fake_quantise = fake_quantise

    def __call__(self, module: nn.Module, args: tuple) -> tuple:
        return (self.fake_quantise(args[0]), *args[1:])


class _OnOutput:
    """The forward hook that rounds what a module gives."""

    def __init__(self, fake_quantise: FakeQuantise) -> None:
        self.fake_quantise = fake_quantise

    def __call__(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return self.fake_quantise(output)


_PREPARED: dict[type[nn.Module], type[nn.Module]] = {nn.Conv2d: FakeQuantisedConv2d, nn.Linear: FakeQuantisedLinear}
_STOCK = {prepared: stock for stock, prepared in _PREPARED.items()}


# --- preparing, and undoing it ----------------------------------------------------------------------------------------


def prepare_qat(model: M, *, linear: bool = True) -> M:
    """Have ``model`` compute as its int8 export will, in eval and in training mode. ``calibrate`` it next.

    In place. Parameters, buffers and state_dict stay as they are, names included; an accelerated model stays one, but
    its blocks run their own forwards until ``remove_qat``, for no fused op rounds.

    Args:
        model: from torchvision, timm or this package, or your own; accelerated or not, in either mode.
        linear: whether linear layers are quantised too.

    Returns:
        ``model``.

    Raises:
        TypeError: it is not an ``nn.Module``.
        ValueError: it is prepared already, has no convolutions, or some that compute something else; or the shortcut of
            a block is not found, or cannot be quantised. It is unchanged.
    """
    check_module(model)
    if any(True for _ in _fake_quantisers(model)):
        raise ValueError("model is prepared for quantisation-aware training already, expected a float model")
    layers = {path: module for path, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    if not layers:
        raise ValueError(f"model is a {type(model).__name__} without convolutions, expected some nn.Conv2d")
    if linear:
        layers |= {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    for path, layer in layers.items():
        if type(layer) not in _PREPARED or "forward" in layer.__dict__:
            kind = f"{type(layer).__module__}.{type(layer).__qualname__}"
            own = ", with a forward set on the instance" if "forward" in layer.__dict__ else ""
            raise ValueError(f"model has a {kind} at {path}{own}, expected a plain nn.Conv2d or nn.Linear")
    found = residuals(model)

    for layer in layers.values():
        layer.__class__ = _PREPARED[type(layer)]  # type: ignore[assignment]
        layer.add_module(_INPUT, _fake_quantise_for(layer))
        if isinstance(layer, FakeQuantisedConv2d):
            layer.input_is_rounded = False
    for residual in found:
        fake_quantise = _fake_quantise_for(residual.conv)
        residual.conv.add_module(_RESIDUAL, fake_quantise)
        for reader in residual.readers:
            reader.input_range, reader.input_is_rounded = fake_quantise, True  # type: ignore[assignment]
        if residual.is_input:
            residual.owner.register_forward_pre_hook(_OnInput(fake_quantise))
        else:
            residual.owner.register_forward_hook(_OnOutput(fake_quantise))
    return model


def _fake_quantise_for(layer: Any) -> FakeQuantise:
    return FakeQuantise(layer.weight.device).train(layer.training)


def remove_qat(model: M) -> M:
    """Undo ``prepare_qat`` in place: ``model`` computes in float, with the weights that it has now, to the bit.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.
    """
    check_module(model)
    for module in list(model.modules()):
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(hook, (_OnInput, _OnOutput))]:
                del hooks[key]
        if type(module) in _STOCK:
            for name in (_INPUT, _RESIDUAL):
                module._modules.pop(name, None)
            module.__dict__.pop("input_is_rounded", None)
            module.__class__ = _STOCK[type(module)]
    return model


# --- ranges -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def calibrate(model: nn.Module, batches: Iterable[Tensor]) -> int:
    """Set the ranges of a prepared model, whatever they were: the means of the batches' largest magnitudes.

    Args:
        batches: images ``[N, C, H, W]``, as the model is trained on. It runs on them in eval mode and in float.

    Returns:
        The number of batches.

    Raises:
        ValueError: the model is not prepared, there are no batches, or a tensor has a magnitude that is not finite.
            The ranges are unchanged.
    """
    quantisers = _named_fake_quantisers(model)
    modes = [(module, module.training) for module in model.modules()]
    before = [(one, one.amax.clone()) for one in set(quantisers.values())]
    model.eval()
    for one, _ in before:
        one.calibrating, one.calibrated = True, 0
    count = 0
    try:
        for batch in batches:
            model(batch)
            count += 1
        _check_calibration(count, quantisers)
    except BaseException:
        for one, amax in before:
            one.amax.copy_(amax)
        raise
    finally:
        for module, training in modes:
            module.training = training
        for one, _ in before:
            one.calibrating = False
    for one, _ in before:
        one.known = True
    return count


def _check_calibration(count: int, quantisers: Mapping[str, FakeQuantise]) -> None:
    if not count:
        raise ValueError("batches is empty, expected some images to calibrate with")
    for key, one in quantisers.items():
        if not one.calibrated:
            raise ValueError(f"{key} has no range: in eval mode the model does not call that layer")
        if not one.amax.isfinite():
            raise ValueError(f"{key} is not finite on some image, expected numbers")


def observe(model: nn.Module, on: bool) -> None:
    """Choose whether in training mode the ranges of a prepared model follow its activations; at first they do.

    Not in the last epochs, so that the weights settle for the numbers that they will be rounded to.

    Raises:
        ValueError: the model is not prepared.
    """
    for one in _named_fake_quantisers(model).values():
        one.observing = on


def ranges(model: nn.Module) -> dict[str, float]:
    """The ranges of a prepared model: the largest magnitude (amax) that each of its int8 tensors stands for.

    By name: ``layer1.0.conv1.input`` is what that convolution or linear layer reads; ``layer1.0.conv2.residual`` is
    what the shortcut adds to that convolution's result. A tensor that a shortcut adds and a convolution reads has both.

    Raises:
        ValueError: the model is not prepared, or not calibrated.
    """
    quantisers = _named_fake_quantisers(model)
    unknown = [key for key, one in quantisers.items() if not one.known]
    if unknown:
        raise ValueError(f"the range of {unknown[0]} is not known yet: call calibrate(model, batches) first")
    return {key: one.amax.item() for key, one in quantisers.items()}


def set_ranges(model: nn.Module, ranges: Mapping[str, float]) -> None:
    """Give a prepared model these ranges, as those that ``ranges`` took from another, or a calibration found.

    Raises:
        ValueError: the model is not prepared; a range is missing, of something else, negative or not finite; or a
            tensor that has two names has two ranges. The model's are unchanged.
    """
    quantisers = _named_fake_quantisers(model)
    check_ranges(ranges)
    if ranges.keys() != quantisers.keys():
        missing, other = sorted(quantisers.keys() - ranges.keys()), sorted(ranges.keys() - quantisers.keys())
        what = f"lack {', '.join(missing[:3])}" if missing else f"have {', '.join(other[:3])}, which the model has not"
        raise ValueError(f"ranges {what}; expected one for each of the model's {len(quantisers)} int8 tensors")
    names: dict[FakeQuantise, str] = {}
    for key, one in quantisers.items():
        first = names.setdefault(one, key)
        if ranges[key] != ranges[first]:
            raise ValueError(
                f"ranges has {ranges[first]} for {first} and {ranges[key]} for {key}, expected the same, for one tensor"
            )
    for key, one in quantisers.items():
        one.amax.fill_(ranges[key])
        one.known = True


def check_ranges(ranges: Mapping[str, float]) -> None:
    """Raises ValueError unless all are finite and not negative."""
    for key, amax in ranges.items():
        if not (isinstance(amax, (int, float)) and math.isfinite(amax) and amax >= 0):
            raise ValueError(f"ranges has {amax!r} for {key}, expected a finite number, 0 or more")


def load_ranges(path: Union[str, Path]) -> dict[str, float]:
    """The ranges in a ``last.pt`` or ``best.pt``; none for a checkpoint without, and for one of others.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: what it has are no ranges.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except OSError:
        raise
    except Exception:  # whether it can be loaded at all is the business of the one who loads its weights
        return {}
    found = content.get("ranges") if isinstance(content, dict) else None
    if not found:
        return {}
    if not isinstance(found, dict):
        raise ValueError(f"{str(path)!r} has a {type(found).__name__} as ranges, expected names and numbers")
    check_ranges(found)
    return found


def _fake_quantisers(model: nn.Module) -> Iterator[FakeQuantise]:
    return (module for module in model.modules() if isinstance(module, FakeQuantise))


def _named_fake_quantisers(model: nn.Module) -> dict[str, FakeQuantise]:
    """Return them by all their names."""
    check_module(model)
    modules = model.named_modules(remove_duplicate=False)
    found = {path.removesuffix(_SUFFIX): module for path, module in modules if isinstance(module, FakeQuantise)}
    if not found:
        raise ValueError(f"model is a {type(model).__name__} that is not prepared: call prepare_qat(model) first")
    return found
