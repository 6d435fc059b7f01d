"""Every provider in a process of its own, timed in alternating rounds."""

import concurrent.futures
import contextlib
import importlib.util
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Optional

import numpy as np
from torch import Tensor, nn

from resnet_fast.bench import peer_environment
from resnet_fast.bench.providers import FLOAT32_ERROR, provider
from resnet_fast.bench.workload import (
    DEFAULT,
    REFERENCE,
    TRAINING_REFERENCE,
    Setting,
    load_setting,
    prepare,
    prepare_training,
)
from resnet_fast.utils.optional import EXTRAS

OURS = "ours"
ACCURATE = FLOAT32_ERROR
"""Largest error, relative to the largest result, that counts as float32."""
ACCURATE_STEP = 2e-2
"""The same for the gradients of any module in a training step, by their norm. Behind 50 layers float32 has 1e-4 by
direct convolutions and at most 1e-2 by Winograd's, TF32 arithmetic 4e-2 and bfloat16 2e-1. Measured where rounding
flips no ReLU (``settle_relus``): a flip is no error, and changes a gradient by as much as 1e-2."""

_STOCK = ("channels_last", "eager")
_STOCK_ERROR = 2
"""In half precision, and TF32, a provider may be this many times as far from float64 as stock PyTorch is there, if that
was measured, or else off by ``_ROUNDINGS``: fifty layers' roundings of mixed sign add up to seven, and twice that."""
_ROUNDINGS = 16
_EPS = {"float32": 2.0**-10, "float16": 2.0**-10, "bfloat16": 2.0**-7}  # float32 on a GPU: TF32's

_WORKER = Path(__file__).with_name("worker.py")
_LOADING_SECONDS, _ROUND_SECONDS = 900, 300  # after which a worker is given up


@dataclass(frozen=True)
class Measurement:
    """One provider's numbers.

    Attributes:
        status: "ok", "missing" (with its reason), "failed" (with its reason) or "inaccurate" (not timed).
        error: largest difference from float64 PyTorch, relative to the largest result; of a training step, of the
            gradients and running statistics of a module, in the 2-norm.
        load_s: seconds until the first result, compilation included, and the import of libraries at the first workload.
        rounds_ms: median milliseconds of a call, per round.
        peak_mib: the most memory its process held, in MiB.
        saved_bytes: what a training step's forward pass keeps for its backward pass (``training_step.saved_bytes``).
    """

    provider: str
    title: str
    status: str
    reason: str = ""
    error: Optional[float] = None
    load_s: Optional[float] = None
    rounds_ms: list[float] = field(default_factory=list)
    peak_mib: Optional[float] = None
    saved_bytes: Optional[int] = None

    @property
    def median_ms(self) -> Optional[float]:
        return statistics.median(self.rounds_ms) if self.rounds_ms else None

    @property
    def min_ms(self) -> Optional[float]:
        return min(self.rounds_ms, default=None)

    def as_dict(self, ours: Optional["Measurement"] = None) -> dict[str, Any]:
        """Return all of it, with the times' median and minimum; ``ratio`` is how many times ``ours`` the median is."""
        ratio = None
        if ours is not None and ours.median_ms and self.median_ms:
            ratio = self.median_ms / ours.median_ms
        return {**self.__dict__, "median_ms": self.median_ms, "min_ms": self.min_ms, "ratio": ratio}


def unavailable(name: str, device: str = "cpu") -> Optional[str]:
    """Return why the provider ``name`` cannot run here, on ``device``, or None."""
    asked = provider(name)
    needs = asked.needs
    if device not in asked.devices:
        return f"runs on {' and '.join(asked.devices)}, not on {device}"
    if needs is not None and asked.apart:
        return peer_environment.missing(needs) or asked.unavailable()
    if needs is not None and importlib.util.find_spec(needs) is None:
        extra = EXTRAS.get(needs)
        return f"{needs} is not installed" + (f": pip install 'resnet-fast[{extra}]'" if extra else "")
    return asked.unavailable()


def measure(
    model: nn.Module,
    images: Tensor,
    labels: Optional[Tensor] = None,
    *,
    providers: Sequence[str],
    threads: int,
    rounds: int = 5,
    seconds: float = 1.0,
    progress: Callable[[str], None] = lambda text: None,
    setting: Setting = DEFAULT,
) -> list[Measurement]:
    """Time ``model`` on ``images`` under each of ``providers``; one that cannot run does not stop the others.

    Args:
        model: a stock classifier in eval mode, or with ``labels`` in training mode, float32, on the CPU.
        images: ``[N, C, H, W]``, float32.
        labels: ``[N]``, int64: a call is a training step on them, and ``providers`` are some of ``TRAINING``.
        threads: for each provider.
        rounds: of ``seconds`` each per provider, in turn, every other one in reverse order.
        progress: told what is going on.
        setting: the device and the precision; on the CPU in float32, if nothing else is said.
    """
    with contextlib.ExitStack() as stack:
        bench = stack.enter_context(Bench(providers, threads, setting.device))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="resnet-fast-bench-")))
        if bench.present:
            progress("preparing")
            if labels is None:
                files = {provider(name).onnx for name in bench.present}
                prepare(folder, model, images, onnx=True in files, int8="int8" in files, setting=setting)
            else:
                prepare_training(folder, model, images, labels, setting)
        order = "load" if labels is None else "train"
        return bench.measure(folder, order=order, rounds=rounds, seconds=seconds, progress=progress)


class Bench:
    """Providers side by side on one workload after the other; as a context manager it ends their processes.

    A process serves all workloads, so that many small ones do not each cost an import of PyTorch.
    """

    def __init__(self, providers: Sequence[str], threads: int, device: str = "cpu") -> None:
        self._threads = threads
        self._missing = {name: unavailable(name, device) for name in providers}
        self._workers: dict[str, Worker] = {}
        self._stack = contextlib.ExitStack()

    @property
    def present(self) -> list[str]:
        """The providers that can run here."""
        return [name for name, reason in self._missing.items() if reason is None]

    def __enter__(self) -> "Bench":
        self._logs = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="resnet-fast-bench-")))
        return self

    def __exit__(self, *raised: object) -> None:
        for name in list(self._workers):
            self._end(name)
        self._stack.close()

    def measure(
        self,
        folder: Path,
        *,
        order: str = "load",
        rounds: int = 5,
        seconds: float = 1.0,
        progress: Callable[[str], None] = lambda text: None,
        patience: float = _LOADING_SECONDS,
    ) -> list[Measurement]:
        """Time the workload in ``folder`` as ``measure`` does; ``workload.py`` says what lies there.

        ``order`` is what the workers are told to do with it, "load" or "train"; ``patience`` is how many seconds that
        may take.
        """
        results = {
            name: Measurement(name, provider(name).title, "missing", reason or "")
            for name, reason in self._missing.items()
        }
        for name in sorted(self.present, key=lambda name: name not in _STOCK):  # the others are compared with stock's
            progress(f"loading {provider(name).title}")
            try:
                answer = self._worker(name).ask(f"{order} {folder}", patience)
            except WorkerError as error:
                results[name] = replace(results[name], status="failed", reason=str(error))
                self._end(name)
                continue
            load_s, saved = round(answer["seconds"], 2), answer.get("saved_bytes")
            result = replace(results[name], load_s=load_s, saved_bytes=saved)
            results[name] = (_checked if order == "load" else _checked_step)(
                result, folder, _loosest(load_setting(folder), results)
            )
        timed = [name for name, result in results.items() if result.status == "ok"]
        for index in range(rounds):
            for name in list(timed) if index % 2 == 0 else list(reversed(timed)):
                progress(f"round {index + 1} of {rounds}: {provider(name).title}")
                try:
                    answer = self._workers[name].ask(f"time {seconds}", _ROUND_SECONDS)
                except WorkerError as error:
                    results[name] = replace(results[name], status="failed", reason=str(error), rounds_ms=[])
                    self._end(name)
                    timed.remove(name)
                    continue
                results[name] = replace(
                    results[name],
                    rounds_ms=[*results[name].rounds_ms, statistics.median(answer["times"]) * 1e3],
                    peak_mib=None if answer["peak_bytes"] is None else round(answer["peak_bytes"] / 2**20, 1),
                )
        return list(results.values())

    def _worker(self, name: str) -> "Worker":
        """The provider's process, started if it is not running."""
        if name not in self._workers:
            self._workers[name] = Worker(name, self._logs, self._threads)
        return self._workers[name]

    def _end(self, name: str) -> None:
        self._workers.pop(name).kill()


def _loosest(setting: Setting, results: dict[str, Measurement]) -> float:
    """The error that counts as ``setting``'s precision, beyond what counts as float32; 0 where it is float32."""
    device, dtype, autocast = setting
    if device == "cpu" and (autocast or dtype) == "float32":
        return 0.0
    errors = [error for name in _STOCK if name in results and (error := results[name].error) is not None]
    return _STOCK_ERROR * errors[0] if errors else _ROUNDINGS * _EPS[autocast or dtype]


def _checked(result: Measurement, folder: Path, loosest: float = 0.0) -> Measurement:
    """Check the result after loading: a wrong answer is not worth timing."""
    given, reference = np.load(folder / f"{result.provider}.npy"), np.load(folder / REFERENCE)
    given = given[: len(reference)]
    if given.shape != reference.shape:
        return replace(result, status="inaccurate", reason=f"shape {given.shape}, expected {reference.shape}")
    relative = float(np.abs(given - reference).max() / np.abs(reference).max())
    result = replace(result, status="ok", error=relative)
    allowed = max(provider(result.provider).accurate, loosest)
    if relative <= allowed:
        return result
    reason = f"relative error {relative:.1e}, expected at most {allowed:.0e}"
    return replace(result, status="inaccurate", reason=reason)


def _checked_step(result: Measurement, folder: Path, loosest: float = 0.0) -> Measurement:
    """Check a training step's loss, gradients and running statistics likewise."""
    with np.load(folder / f"{result.provider}.npz") as given, np.load(folder / TRAINING_REFERENCE) as reference:
        if given.keys() != reference.keys():
            return replace(result, status="inaccurate", reason=f"no {', '.join(reference.keys() ^ given.keys())}")
        errors = {name: _relative(given[name], reference[name]) for name in reference}
    loss = errors.pop("loss")
    worst = max(errors, key=lambda name: np.nan_to_num(errors[name], nan=np.inf))
    result = replace(result, status="ok", error=errors[worst])
    limits = max(ACCURATE, loosest), max(ACCURATE_STEP, loosest)
    for name, error, limit in (("loss", loss, limits[0]), (worst, errors[worst], limits[1])):
        if not error <= limit:  # so not for a NaN
            reason = f"{name}: relative error {error:.1e}, expected at most {limit:.0e}"
            return replace(result, status="inaccurate", reason=reason)
    return result


def _relative(given: np.ndarray, reference: np.ndarray) -> float:
    return float(np.linalg.norm(given - reference) / np.linalg.norm(reference))


class WorkerError(RuntimeError):
    """A worker died or did not answer in time."""


class Worker:
    """A provider's process. It is stopped by a signal whenever it is not asked.

    It stays alive between rounds, because loading it again (a minute for a compiler) would take longer than timing it.
    A library's idle threads may go on spinning after a call, ONNX Runtime's for one, and would slow down whoever is
    timed next. Switching that off would slow down the library itself; a stopped process cannot spin.
    """

    def __init__(self, name: str, folder: Path, threads: int) -> None:
        self._log = folder / f"{name}.log"
        self._reader = concurrent.futures.ThreadPoolExecutor(1)  # Windows cannot wait for a pipe for some time only
        python, environment = sys.executable, dict(os.environ)
        if provider(name).apart:
            python, environment = peer_environment.python(), peer_environment.environment(folder)
        environment["OMP_NUM_THREADS"] = str(threads)
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [python, str(_WORKER), name, str(threads)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                bufsize=0,
                env=environment,
            )

    def ask(self, line: str, timeout: float) -> dict[str, Any]:
        """Send a line and wait for the answer."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        if sys.platform != "win32":
            self._process.send_signal(signal.SIGCONT)
        try:
            stdin.write(line.encode() + b"\n")
            answer = self._reader.submit(stdout.readline).result(timeout)
        except BrokenPipeError:
            answer = b""
        except concurrent.futures.TimeoutError:
            raise WorkerError(f"no answer within {timeout:.0f} s") from None
        if not answer:
            raise WorkerError(self._last_words())
        self._stop()
        return json.loads(answer)

    def _stop(self) -> None:
        """Stop the process, where the system can, and return when it stands still."""
        if sys.platform == "win32":
            return
        self._process.send_signal(signal.SIGSTOP)
        if hasattr(os, "waitid"):  # on macOS from Python 3.13 on
            # It may have ended instead; that is left for Popen to find.
            os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def _last_words(self) -> str:
        code = self._process.wait()
        lines = [line for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        if code < 0:
            return f"ended by signal {-code}"
        return lines[-1].strip() if lines else f"ended with code {code}"

    def kill(self) -> None:
        self._process.kill()
        self._reader.shutdown()  # reads to the end
        self._process.communicate()
