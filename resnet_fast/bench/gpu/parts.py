"""The parts of the suite that run in processes: ``python -m resnet_fast.bench.gpu.parts PART DEVICE QUICK I N``.

That is the I-th of N processes that share the numerics; every other part has one.

A part prints a line of JSON for every result as soon as it has it. So an error that ruins the process, as a bad address
does every later call on a GPU, or a time limit, costs only what was still to come. A part may begin with a line
``{"planned": names}``, of the ``layer`` of each of its results, so that what is missing in the end can be named.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor

from resnet_fast.bench.gpu.cases import DTYPES, Case, cases
from resnet_fast.utils import compat

Results = Iterator[dict[str, Any]]

TIMES_PYTORCHS, ROUNDINGS = 2, 4
"""An error may be twice PyTorch's own in the same precision, or four roundings of the largest result."""
WINOGRAD = 5e-5
"""Of the largest result: what our CPU kernels may have in float32 (docs of ``resnet-fast verify``)."""
STEP_ROUNDINGS = 64
"""A training step's results go through up to ten roundings of whole images in half precision and sums over them."""
REPEATS = 20
EIGHT_BITS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
SHORT_SUMS = 2.0**-12
"""Of the largest result: sm_90's tensor cores keep about 14 bits of a sum of fp8 products (DeepSeek-V3, 2024, section
3.3.2), of which ours take one step of the inner dimension at a time."""

_EPS = {"float32": 2.0**-23, "tf32": 2.0**-10, "float16": 2.0**-10, "bfloat16": 2.0**-7}


def numerics(device: str, quick: bool, share: tuple[int, int] = (0, 1)) -> Results:
    """Every case in every dtype against float64, beside PyTorch's own error. share: the first check, and the step."""
    first, step = share
    checks = chain(
        (partial(_guarded, _compared, case, name, device) for case in cases(quick) for name in _dtypes(device)),
        (partial(_eight_bits, *named, residual, device) for named in EIGHT_BITS.items() for residual in (False, True)),
    )
    for check in islice(checks, first, None, step):
        yield check()


def repeats(device: str, quick: bool) -> Results:
    """Every case again and again beside other work on the GPU: a race would show as another last bit."""
    for case in cases(quick):
        for name in ("float16",) if device == "cuda" else ("float32",):
            yield _guarded(_repeated, case, name, device)


def layers(device: str, quick: bool) -> Results:
    """Every convolution of a model, with each of the planner's candidates; what is fastest is kept for later calls."""
    from resnet_fast import accelerate
    from resnet_fast.bench.norms import randomise_batch_norm
    from resnet_fast.models.named import build
    from resnet_fast.tuning import tuned

    layout: Any = {"memory_format": torch.channels_last}
    half = ("float16", "bfloat16") if device == "cuda" else ("float32",)
    batches = (1,) if quick else (32, 1, 128)
    size = 64 if quick else 224
    for model_name in ("resnet18",) if quick else ("resnet50", "resnet18"):
        for batch in batches:
            for dtype in half:
                stock = build(model_name)
                randomise_batch_norm(stock, 0)
                model = accelerate(stock.eval()).to(device, getattr(torch, dtype), **layout)
                images = torch.randn(batch, 3, size, size, device=device, dtype=getattr(torch, dtype))
                for choice in tuned(model, images.contiguous(**layout)):
                    yield {"model": model_name, "batch": batch, "dtype": dtype, **choice.__dict__}


def peers(device: str, quick: bool) -> Results:
    """Every distinct convolution of ResNet-50 beside eager PyTorch, cuDNN and torch.compile: see peers.py."""
    from resnet_fast.bench.gpu.peers import compare
    from resnet_fast.bench.norms import randomise_batch_norm
    from resnet_fast.models.named import build

    model = build("resnet18" if quick else "resnet50")
    randomise_batch_norm(model, 0)
    dtype = torch.float16 if device == "cuda" else torch.float32
    return compare(model, 64, (1,), dtype, device, most=2) if quick else compare(model, 224, (32, 1), dtype, device)


PARTS: dict[str, Callable[[str, bool], Results]] = {part.__name__: part for part in (numerics, repeats, layers, peers)}


def _dtypes(device: str) -> tuple[str, ...]:
    return DTYPES if device == "cuda" else ("float32", "bfloat16")


def _guarded(check: Callable[[Case, str, str], dict[str, Any]], case: Case, dtype: str, device: str) -> dict[str, Any]:
    """A case that raises has failed; the others go on."""
    try:
        return {"case": case.name, "dtype": dtype, **check(case, dtype, device)}
    except Exception as error:
        return {"case": case.name, "dtype": dtype, "passed": False, "reason": f"{type(error).__name__}: {error}"}


def _compared(case: Case, name: str, device: str) -> dict[str, Any]:
    with compat.float32_in_tf32(name == "tf32"):
        inputs = case.cast(_torch_dtype(name), device)
        ours, stock = case.ours(*inputs), case.definition(*inputs)
    # The definition of the very numbers that were given, which may have been rounded.
    exact = case.definition(*(t.double() if isinstance(t, Tensor) else t for t in inputs))
    # A step's sums over images cancel to much less than their terms, which are of the order of its largest results.
    scale = max(float(right.abs().max()) for right in exact) if case.training else 0.0
    error, pytorchs = (
        max(_error(result, right, scale) for result, right in zip(results, exact, strict=True))
        for results in (ours, stock)
    )
    roundings = STEP_ROUNDINGS if case.training else ROUNDINGS
    allowed = max(TIMES_PYTORCHS * pytorchs, roundings * _EPS[name], WINOGRAD if device == "cpu" else 0.0)
    return {"error": error, "pytorchs": pytorchs, "allowed": allowed, "passed": error <= allowed}  # NaN does not pass


def _eight_bits(name: str, dtype: torch.dtype, residual: bool, device: str) -> dict[str, Any]:
    """A 3x3 convolution of 8-bit numbers, with a result in float32: sums are exact of int8 products, nearly of fp8."""
    from resnet_fast import quantised
    from resnet_fast.kernels.reference import quantised as reference_quantised

    generator = torch.Generator().manual_seed(0)
    x = quantised.quantise(torch.randn(2, 64, 14, 14, generator=generator), 0.02, dtype)
    weight, scales = quantised.quantise_weight(torch.randn(128, 64, 3, 3, generator=generator) / 24, dtype)
    added = torch.randn(2, 128, 14, 14, generator=generator) if residual else None
    shift = torch.randn(128, generator=generator)
    rest = (1.0, 1.0, (1, 1), (1, 1), (1, 1), 1, True, torch.float32)
    label = {"case": f"conv_quantised{': residual' if residual else ''}", "dtype": name}
    try:
        there = [None if t is None else t.to(device) for t in (x, weight, scales * 0.02, shift, added)]
        result = torch.ops.resnet_fast.conv_quantised(*there, *rest).cpu()
    except Exception as error:
        return {**label, "passed": False, "reason": f"{type(error).__name__}: {error}"}
    wide: list[Any] = [None if t is None else t.double() for t in (scales * 0.02, shift, added)]
    settings: list[Any] = [*rest[:-1], torch.float64]
    distance = _error(result, reference_quantised.conv_quantised(x, weight, *wide, *settings))
    allowed = ROUNDINGS * _EPS["float32"] if dtype == torch.int8 else SHORT_SUMS
    return {**label, "error": distance, "allowed": allowed, "passed": distance <= allowed}


def _error(result: Tensor, exact: Tensor, scale: float = 0.0) -> float:
    """The largest, relative to the largest result, or to ``scale`` where that is larger."""
    if result.shape != exact.shape:
        raise ValueError(f"result has shape {list(result.shape)}, expected {list(exact.shape)}")
    return float((result.double() - exact).abs().max() / exact.abs().max().clamp(min=scale))


def _repeated(case: Case, name: str, device: str) -> dict[str, Any]:
    with compat.float32_in_tf32(name == "tf32"):
        inputs = case.cast(_torch_dtype(name), device)
        first = case.ours(*inputs)
        different = 0
        for _ in range(REPEATS):
            with _other_work(device):
                again = case.ours(*inputs)
            different += not all(map(torch.equal, first, again))
    return {"repeats": REPEATS, "different": different, "passed": different == 0}


@contextmanager
def _other_work(device: str) -> Iterator[None]:
    """Meanwhile another stream of the GPU writes memory, so that programs meet in another order each time."""
    if device != "cuda":
        yield
        return
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        noise = torch.empty(32 << 20, dtype=torch.int8, device=device)
        for _ in range(4):
            noise.random_()
    yield
    side.synchronize()


def _torch_dtype(name: str) -> torch.dtype:
    return torch.float32 if name == "tf32" else getattr(torch, name)


def main(part: str, device: str, quick: str, i: str = "0", n: str = "1") -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints goes to stderr
    torch.backends.cudnn.benchmark = device == "cuda"  # or eager PyTorch would be slower than it can be
    make = partial(numerics, share=(int(i), int(n))) if part == "numerics" else PARTS[part]
    for result in make(device, quick == "quick"):
        answers.write(json.dumps(result) + "\n")
        answers.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
