"""One provider in a process of its own: ``python worker.py PROVIDER THREADS``.

The provider's file is run by its path, so that ``resnet_fast``, and with it PyTorch, is imported by those providers
alone that need it: the others' memory is their own. Some providers' Python is of another environment
(peer_environment.py), which has numpy alone in common with this one's.

The process does what the lines on stdin say, and answers each on stdout with a line of JSON:

    load FOLDER     load the workload in that folder in place of the last one, and save its result there as PROVIDER.npy
    train FOLDER    the same for a training workload, with PROVIDER.npz; a call is a step
    time SECONDS    a round of timed calls

It ends with its stdin.
"""

import ctypes
import json
import os
import runpy
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional, TextIO

import numpy as np

ROOT = Path(__file__).parents[2]  # where the package resnet_fast lies

WARM_UP_CALLS, TIMED_CALLS = 2, 3  # at the least


def main(name: str, threads: str) -> None:
    _end_with_parent()
    answers = _private_stdout()

    def answer(**values: Any) -> None:
        answers.write(json.dumps(values) + "\n")
        answers.flush()

    del sys.path[0]  # this file's folder
    provider = runpy.run_path(str(Path(__file__).with_name("providers") / f"{name}.py"))
    if not provider.get(
        "APART"
    ):  # where the package is installed, its folder holds that environment's libraries as well
        sys.path.insert(0, str(ROOT))
    run: Any = None
    for line in sys.stdin:
        order, value = line.rstrip("\n").split(" ", 1)
        if order == "load":
            run = None  # first of all: its threads may still spin
            folder, start = Path(value), time.perf_counter()
            run = provider["load"](folder, int(threads))
            np.save(folder / f"{name}.npy", run())
            answer(seconds=time.perf_counter() - start)
        elif order == "train":
            run = None
            folder, start = Path(value), time.perf_counter()
            run = provider["train"](folder, int(threads))
            np.savez(folder / f"{name}.npz", **run.first())
            answer(seconds=time.perf_counter() - start, saved_bytes=run.saved_bytes())
        else:
            answer(times=timed_round(run, float(value)), peak_bytes=peak_bytes())


def timed_round(run: Callable[[], Any], seconds: float) -> list[float]:
    """Seconds of each call over at least ``seconds``, after a quarter of that to fill the caches and wake the cores."""
    start = time.perf_counter()
    calls = 0
    while calls < WARM_UP_CALLS or time.perf_counter() - start < seconds / 4:
        run()
        calls += 1
    times: list[float] = []
    start = time.perf_counter()
    while len(times) < TIMED_CALLS or time.perf_counter() - start < seconds:
        before = time.perf_counter()
        run()
        times.append(time.perf_counter() - before)
    return times


def peak_bytes() -> Optional[int]:
    """The most memory that this process has held; once it uses a GPU, that PyTorch has held there. None on Windows."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():
        # Not ru_maxrss: on Linux it starts from the memory of the process that forked this one.
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(fields["VmHWM"].split()[0]) * 1024
    if sys.platform == "win32":
        return None
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _private_stdout() -> TextIO:
    """The stdout that was given; whatever a library prints goes to stderr from now on."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def _end_with_parent() -> None:
    """Be killed with the parent, even while stopped, when the end of stdin is not seen."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


if __name__ == "__main__":
    main(*sys.argv[1:])
