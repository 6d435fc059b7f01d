"""All parts one after the other, within a time limit: what there is no time for is left out, and said to be."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple, Optional

import torch

from resnet_fast.bench.gpu.parts import PARTS
from resnet_fast.bench.providers import GPU_NAMES, TRAINING
from resnet_fast.bench.runner import Bench
from resnet_fast.bench.workload import Setting, prepare, prepare_training


class Workload(NamedTuple):
    """A whole model that is timed. ``dtype``: of weights and images, or in training of autocast."""

    model: str
    batch: int
    dtype: str
    size: int = 224
    training: bool = False


INFERENCE = (
    *(Workload("resnet50", batch, "float16") for batch in (32, 1, 256)),
    Workload("resnet18", 32, "float16"),
    Workload("resnet50", 32, "bfloat16"),
    Workload("resnet50", 128, "float16"),
    Workload("resnet50", 8, "float16"),
    Workload("resnet50", 32, "float32"),
)
STEPS = (
    Workload("resnet50", 64, "bfloat16", training=True),
    Workload("resnet18", 64, "float16", training=True),
    Workload("resnet50", 64, "float16", training=True),
)
OURS = ("ours", "graphed")
TUNED = (INFERENCE[0], INFERENCE[1], INFERENCE[5])
"""Those that are timed again when ``layers`` has measured their convolutions."""
_SHARES = {
    "numerics": 0.16,
    "repeats": 0.08,
    "inference": 0.24,
    "training": 0.16,
    "layers": 0.18,
    "tuned": 0.08,
    "peers": 0.1,
}
"""Of the time, what is worth most first; what a part leaves goes to those after it."""
_COMPILERS = 14  # processes, at most: on a GPU nearly all the time of numerics goes into compiling
_LAST = 15.0  # seconds below which nothing is begun any more
_RULES: dict[str, Any] = {"rounds": 3, "seconds": 0.3}


@dataclass
class Part:
    """What a part found.

    Attributes:
        status: "ok", "failed" (something is wrong), "crashed" (its process ended) or "out of time"; what was found
            before that is in ``results``.
        left_out: what there was no time for.
    """

    name: str
    status: str = "ok"
    reason: str = ""
    seconds: float = 0.0
    results: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


@dataclass
class Suite:
    """All parts, in their order."""

    device: str
    minutes: float
    quick: bool
    parts: list[Part]
    seconds: float

    @property
    def checks(self) -> list[dict[str, Any]]:
        return [result for part in self.parts for result in part.results if "passed" in result]

    @property
    def passed(self) -> bool:
        """Nothing wrong was seen, and every check was made."""
        complete = all(part.status == "ok" for part in self.parts if part.name in ("numerics", "repeats"))
        broken = any(part.status in ("failed", "crashed") for part in self.parts)
        return complete and not broken and bool(self.checks) and all(check["passed"] for check in self.checks)


def run(
    device: str = "cuda",
    minutes: float = 10.0,
    quick: bool = False,
    only: Optional[Sequence[str]] = None,
    progress: Callable[[str], None] = lambda text: None,
    save: Callable[[Suite], Any] = lambda suite: None,
) -> Suite:
    """Run the suite.

    Args:
        device: "cuda", or "cpu" to try the suite itself.
        minutes: for all of it. Each part has a share; the checks come first.
        quick: small cases and models.
        only: some of ``numerics``, ``repeats``, ``inference``, ``training``, ``layers``, ``tuned``, ``peers``.
        save: is given what was found so far, after each part and each model.

    Raises:
        ValueError: ``only`` names no part.
    """
    names = list(_SHARES if only is None else only)
    for name in names:
        if name not in _SHARES:
            raise ValueError(f"only has {name!r}, expected some of {', '.join(_SHARES)}")
    start = time.perf_counter()
    end = start + 60 * minutes
    suite = Suite(device, minutes, quick, [], 0.0)
    for i, name in enumerate(names):
        weight = _SHARES[name] / sum(_SHARES[later] for later in names[i:])
        began = time.perf_counter()
        limit = began + weight * (end - began)
        progress(name)
        part = Part(name)
        suite.parts.append(part)
        fill = (
            _in_process(part, device, quick, limit) if name in PARTS else _models(part, device, quick, limit, progress)
        )
        for _ in fill:
            now = time.perf_counter()
            part.seconds, suite.seconds = round(now - began, 1), round(now - start, 1)
            save(suite)
    return suite


def _in_process(part: Part, device: str, quick: bool, limit: float) -> Iterator[None]:
    """A part of ``parts.py``; its results up to the moment that it ended, or was ended."""
    many = device == "cuda" and part.name == "numerics"
    count = max(1, min(_COMPILERS, (os.cpu_count() or 1) - 2)) if many else 1
    command = [sys.executable, "-m", "resnet_fast.bench.gpu.parts", part.name, device, "quick" if quick else "full"]
    with contextlib.ExitStack() as stack:
        running = [stack.enter_context(_Process.started([*command, str(i), str(count)])) for i in range(count)]
        for one in running:
            status, reason = one.ended(limit)
            if part.status != "crashed" and status != "ok":
                part.status, part.reason = status, reason
        for one in running:
            part.results += one.results()
    if part.results and "planned" in part.results[0]:
        planned = part.results.pop(0)["planned"]
        made = {result["layer"] for result in part.results}
        part.left_out = [name for name in planned if name not in made]
    failed = [result for result in part.results if not result.get("passed", True)]
    if failed and part.status != "crashed":
        part.status, part.reason = "failed", f"{len(failed)} of {len(part.results)} checks failed"
    yield


class _Process(NamedTuple):
    """One that prints a line of JSON for every result."""

    process: "subprocess.Popen[bytes]"
    out: IO[str]
    log: IO[str]

    @classmethod
    @contextlib.contextmanager
    def started(cls, command: list[str]) -> "Iterator[_Process]":
        """It ends with the context at the latest."""
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as log:
            process = subprocess.Popen(command, stdout=out, stderr=log)
            try:
                yield cls(process, out, log)
            finally:
                process.kill()
                process.wait()

    def ended(self, limit: float) -> tuple[str, str]:
        """Status and reason of its end, which comes at ``limit`` at the latest."""
        try:
            code = self.process.wait(timeout=max(1.0, limit - time.perf_counter()))
        except subprocess.TimeoutExpired:
            self.process.kill()
            return "out of time", ""
        if not code:
            return "ok", ""
        self.log.seek(0)
        lines = [line.strip() for line in self.log if line.strip()]
        return "crashed", lines[-1] if lines else f"ended with code {code}"

    def results(self) -> list[dict[str, Any]]:
        self.out.seek(0)
        return [json.loads(line) for line in self.out if line.endswith("\n")]  # the last one may have been cut off


def _models(part: Part, device: str, quick: bool, limit: float, progress: Callable[[str], None]) -> Iterator[None]:
    """Whole models side by side with their peers, each provider in a process of its own."""
    training = part.name == "training"
    workloads = {"inference": INFERENCE, "training": STEPS, "tuned": TUNED}[part.name]
    providers: tuple[str, ...] = {"inference": GPU_NAMES, "training": TRAINING, "tuned": OURS}[part.name]
    if quick:
        workloads = (Workload("resnet18", 2, "float32", 64, training),)
        providers = tuple(name for name in providers if name != "compile")
    slowest = 0.0  # seconds that a workload took so far
    with Bench(providers, threads=torch.get_num_threads(), device=device) as bench:
        for workload in workloads:
            began = time.perf_counter()
            if began + max(slowest, _LAST) > limit and part.results:
                part.left_out.append(_title(workload))
                continue
            progress(f"{part.name}: {_title(workload)}")
            found = _measured(bench, workload, device, limit, progress)
            slowest = max(slowest, time.perf_counter() - began)
            part.results.append({**workload._asdict(), "providers": found})
            yield
    wrong = [
        f"{entry['title']}: {entry['reason']}"
        for result in part.results
        for entry in result["providers"]
        if entry["provider"] == "ours" and entry["status"] != "ok"
    ]
    if wrong:
        part.status, part.reason = "failed", wrong[0]
    yield


def _measured(
    bench: Bench, workload: Workload, device: str, limit: float, progress: Callable[[str], None]
) -> list[dict[str, Any]]:
    from resnet_fast.bench.norms import randomise_batch_norm, settle_relus
    from resnet_fast.models.named import build

    name, batch, dtype, size, training = workload
    generator = torch.Generator().manual_seed(0)
    model = build(name)
    randomise_batch_norm(model, 0)
    images = torch.randn(batch, 3, size, size, generator=generator)
    with tempfile.TemporaryDirectory(prefix="resnet-fast-gpu-") as path:
        folder = Path(path)
        if training:
            settle_relus(model.train())
            setting = Setting(device, autocast=None if dtype == "float32" else dtype)
            prepare_training(folder, model, images, torch.randint(1000, (batch,), generator=generator), setting)
        else:
            onnx = "tensorrt" in bench.present
            prepare(folder, model.eval(), images, onnx=onnx, setting=Setting(device, dtype))
        order, patience = "train" if training else "load", max(_LAST, limit - time.perf_counter())
        found = bench.measure(folder, order=order, progress=progress, patience=patience, **_RULES)
    ours = next((one for one in found if one.provider == "ours"), None)
    return [one.as_dict(ours) for one in found]


def _title(workload: Workload) -> str:
    return f"{workload.model}, batch {workload.batch}, {workload.dtype}"
