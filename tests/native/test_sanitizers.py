"""The kernels under AddressSanitizer and UndefinedBehaviorSanitizer, driven from C++."""

import os
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest

from resnet_fast.kernels.native.abi import ALGORITHMS

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "kernels/native/src"
COMPILER = os.environ.get("CXX") or "g++"

pytestmark = pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"no {COMPILER}")


def test_sanitizers(tmp_path):
    """No access beyond an operand or the memory that a thread works in, no undefined behaviour, right results."""
    setup = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")
    # Not optimised, unlike what is shipped: that takes most of the time, and the accesses are the same. But for the
    # loops that they are compared with.
    flags = [flag for flag in setup["FLAGS"] if flag != "-O3"]
    flags += ["-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", f"-I{SOURCES}"]
    sources = [SOURCES / f"{name}.cpp" for name in ("variant", "int8", "dispatch")]
    setup["INT8"]["avx2_vnni"] = [*setup["INT8"]["avx2"], "-DRF_EMULATE"]  # few CPUs have it
    jobs = [arguments for _, arguments in setup["jobs_for"](list(setup["VARIANTS"]), *sources)]
    jobs[-1].append("-DRF_EMULATE")
    jobs.append(["-O1", "-c", str(Path(__file__).with_name("sanitize.cpp"))])
    objects = [str(tmp_path / f"{i}.o") for i in range(len(jobs))]
    running = [
        subprocess.Popen([COMPILER, *flags, *job, "-o", to], stderr=subprocess.PIPE, text=True)
        for job, to in zip(jobs, objects)
    ]
    for process in running:
        _, errors = process.communicate()
        if "cannot find" in errors or "unrecognized" in errors:
            pytest.skip(f"{COMPILER} has no sanitizers: {errors[:200]}")
        assert process.returncode == 0, errors[-3000:]
    program = tmp_path / "sanitize"
    linked = subprocess.run([COMPILER, *flags, *objects, "-o", program], capture_output=True, text=True)
    if "cannot find" in linked.stderr:
        pytest.skip(f"{COMPILER} has no sanitizers: {linked.stderr[:200]}")
    assert linked.returncode == 0, linked.stderr[-3000:]
    # libgomp never gives back the teams of its threads, which is no leak of ours.
    env = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    done = subprocess.run([program, "150", str(len(ALGORITHMS))], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-4000:]
    assert "portable" in done.stdout
    assert "avx2_vnni" in done.stdout or "avx2:" not in done.stdout
