"""Measures the planner's candidates for a problem on this GPU.

Every candidate runs on images and weights of its own problem, random ones: times do not depend on values. Before it may
win, its results are compared with the definition in float64, and NaN must stay NaN.
"""

import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Optional, Protocol

import torch

from resnet_fast.kernels.reference import inference as reference
from resnet_fast.kernels.triton import forward
from resnet_fast.kernels.triton.tuning import planner
from resnet_fast.kernels.triton.tuning.planner import Candidate, Problem

RUNS = 20  # timed ones of each candidate

_WARM_UP_RUNS = 3
_ROUNDS = 4  # in which all candidates take turns: what drifts meanwhile, clocks above all, is the same for all
_AWAKE = 0.1  # seconds of work after which a GPU that idled, as while candidates are compiled, runs at its usual clocks
_IDLE = 0.01  # seconds without work from which on it may have slowed down
_FLUSHED = (512 if torch.version.hip else 64) << 20  # bytes written between runs, at least: MI300 caches 256 MiB
_ROUNDINGS = 4  # of the largest result, that are allowed in any case


class Timer(Protocol):
    """Times work on a GPU."""

    def milliseconds(self, work: Callable[[], Any], runs: int) -> list[float]:
        """How long each of ``runs`` calls of ``work`` takes on the GPU, with cold caches, after some to warm up."""


class Events:
    """Times work by events on the current stream, which is the only thing that it waits for.

    Between runs, more is written than the L2 cache holds. That also gives the host time to get ahead: the work is
    waiting in the queue before the GPU comes to it, so that no Python is timed. Work that takes the host longer than a
    prepared call does needs more ``flushed``: bytes, at least.
    """

    def __init__(self, device: torch.device, flushed: int = _FLUSHED) -> None:
        size = max(flushed, 2 * torch.cuda.get_device_properties(device).L2_cache_size)
        self._device, self._flush = device, torch.empty(size, dtype=torch.int8, device=device)
        self._ended = -_IDLE  # when it last had work

    def milliseconds(self, work: Callable[[], Any], runs: int) -> list[float]:
        with torch.cuda.device(self._device):
            if time.perf_counter() - self._ended >= _IDLE:
                self._wake()
            for _ in range(_WARM_UP_RUNS):
                work()
            events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(runs)]
            for start, end in events:
                self._flush.zero_()
                start.record()
                work()
                end.record()
            events[-1][1].synchronize()
            self._ended = time.perf_counter()
        return [start.elapsed_time(end) for start, end in events]

    def _wake(self) -> None:
        began = time.perf_counter()
        while time.perf_counter() - began < _AWAKE:
            self._flush.zero_()
            done = torch.cuda.Event()
            done.record()
            done.synchronize()


@dataclass(frozen=True)
class Measurement:
    """What was found for one problem."""

    problem: Problem
    chosen: str  # the fastest; the table's if every candidate was rejected
    milliseconds: dict[str, float]  # median, by the candidate's name
    rejected: dict[str, str] = field(default_factory=dict)  # the reasons, by name


@dataclass(frozen=True)
class Operands:
    """The tensors of a problem, in NHWC."""

    x: torch.Tensor
    weight: torch.Tensor
    scale: torch.Tensor
    shift: torch.Tensor
    residual: Optional[torch.Tensor]


Runner = Callable[[Candidate, Problem, Operands], Callable[[Operands], torch.Tensor]]
"""Makes a function that computes the problem by the candidate, for operands of its shapes and these very weights."""


def runner(candidate: Candidate, problem: Problem, operands: Operands) -> Callable[[Operands], torch.Tensor]:
    """The candidate as the ops call it: prepared, where it can be."""
    o, p = operands, problem
    flags = (p.stride, p.padding, p.dilation, p.groups, p.relu)
    first = forward.carry_out(candidate, o.x, o.weight, o.scale, o.shift, o.residual, *flags)
    if first.choice is not candidate:
        raise ValueError(f"{p.dtype} does not hold the scaled weight")

    def run(o: Operands) -> torch.Tensor:
        y = None if first.call is None else first.call(o.x, o.residual, o.scale, o.shift)
        return forward.carry_out(candidate, o.x, o.weight, o.scale, o.shift, o.residual, *flags).y if y is None else y

    return run


def measure(
    problem: Problem,
    device: torch.device,
    timer: Timer,
    runs: int = RUNS,
    make: Runner = runner,
    candidates: Optional[dict[str, Candidate]] = None,
) -> Measurement:
    """Time all ``candidates`` for ``problem`` on ``device`` that give the right result; by default the planner's.

    Runs on the current stream. A candidate that fails, for whatever reason, is rejected. All are compiled and checked
    before the first is timed.
    """
    works: dict[str, Callable[[], torch.Tensor]] = {}
    times: dict[str, list[float]] = {}
    rejected: dict[str, str] = {}
    candidates = planner.candidates(problem) if candidates is None else candidates
    with torch.inference_mode(False), torch.no_grad():
        operands = _operands(problem, device)
        check = _Check(problem, operands)
        for name, candidate in candidates.items():
            try:
                run = make(candidate, problem, operands)
                reason = check.refusal(run)
                if reason:
                    rejected[name] = reason
                else:
                    works[name] = functools.partial(run, operands)
            except Exception as error:  # a compiler's, a library's, out of memory: it cannot serve here
                rejected[name] = _said(error)
        for i in range(_ROUNDS):
            for name, work in list(works.items()):
                share = runs // _ROUNDS + (i < runs % _ROUNDS)
                try:
                    times.setdefault(name, []).extend(timer.milliseconds(work, share) if share else [])
                except Exception as error:
                    rejected[name] = _said(error)
                    del works[name]
    milliseconds = {name: statistics.median(times[name]) for name in works}
    chosen = min(milliseconds, key=lambda name: milliseconds[name], default=next(iter(candidates)))
    return Measurement(problem, chosen, milliseconds, rejected)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _operands(problem: Problem, device: torch.device) -> Operands:
    p = problem
    generator = torch.Generator(device).manual_seed(0)  # the user's random numbers stay as they are

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device)

    def image(c: int, h: int, w: int) -> torch.Tensor:
        return normal(p.n, h, w, c).to(p.dtype).permute(0, 3, 1, 2)

    channels = p.c // p.groups
    weight = normal(p.k, channels, *p.kernel) / (channels * p.kernel[0] * p.kernel[1]) ** 0.5
    scale = torch.rand(p.k, generator=generator, device=device) + 0.5
    residual = image(p.k, *p.output()) if p.residual else None
    return Operands(image(p.c, p.h, p.w), weight.to(p.dtype), scale, normal(p.k), residual)


class _Check:
    """Compares a candidate's results with the definition, for the first and the last image."""

    def __init__(self, problem: Problem, operands: Operands) -> None:
        self._problem, self._operands = problem, operands
        self._images = [0] if problem.n == 1 else [0, -1]
        broken = operands.x.clone()
        broken[0, 0, 0, 0] = torch.nan
        self._broken = Operands(broken, operands.weight, operands.scale, operands.shift, operands.residual)
        self._exact = self._definition(operands, torch.float64)
        self._scale = float(self._exact.abs().max()) or 1.0
        error = self._distance(self._definition(operands, problem.dtype))
        self._allowed = max(2 * error, _ROUNDINGS * torch.finfo(problem.dtype).eps)
        self._nan = self._definition(self._broken, torch.float64).isnan()

    def refusal(self, run: Callable[[Operands], torch.Tensor]) -> str:
        """Why the results are not right, or ""."""
        y, p = run(self._operands), self._problem
        if y.shape != (p.n, p.k, *p.output()) or y.dtype != p.dtype:
            return f"gives {y.dtype} of {list(y.shape)}"
        error = self._distance(y[self._images])
        if not error <= self._allowed:  # NaN is not either
            return f"relative error {error:.1e}, allowed {self._allowed:.1e}"
        return "loses a NaN" if (self._nan & ~run(self._broken)[self._images].isnan()).any() else ""

    def _definition(self, operands: Operands, dtype: torch.dtype) -> torch.Tensor:
        p, o, vectors = self._problem, operands, torch.promote_types(dtype, torch.float32)
        x, residual = (None if t is None else t[self._images].to(dtype) for t in (o.x, o.residual))
        weights = (o.weight.to(dtype), o.scale.to(vectors), o.shift.to(vectors))
        return reference.conv_bn_act(x, *weights, residual, p.stride, p.padding, p.dilation, p.groups, p.relu)

    def _distance(self, y: torch.Tensor) -> float:
        """The largest error, relative to the largest result."""
        return float((y.double() - self._exact).abs().max()) / self._scale
