"""Prepared calls and Triton's own launches, through its unmodified driver and launcher, on a stub of NVIDIA's driver.

See tests/driver: calls.py makes the calls, in a process of its own, and libcuda.c checks them.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.driver import stub
from tests.driver.cases import CASES

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or stub.COMPILER is None, reason="needs Linux and a compiler of C"
)

REFUSED = {
    "threads": "256 threads, it is compiled for 128",
    "shared memory": "300000 bytes of shared memory",
    "grid": "a grid of 1 x 65536 x 1",
    "no such stream": "stream 0x3039 does not exist",
    "another device's stream": "the stream is of device 1, current is device 0",
    "no such function": "function 0x3039 does not exist",
    "another device's function": "loaded on device 0, current is 1",
    "a pointer to nothing": "parameter 0: nothing lies at 0x10",
    "a tensor of nowhere": "cannot be accessed from Triton",
    "another architecture": "a binary for sm_90, device 1 is an sm_80",
    "no binary": "no ELF file",
    "unaligned tensor map": "16 does not divide the address 0x8",
    "stride of a tensor map": "a stride of 120 bytes",
    "box of a tensor map": "a box of 512",
}


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("driver")
    environment = os.environ | {"RESNET_FAST_CACHE": str(folder / "choices"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.driver.calls", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", CASES)
def test_a_prepared_call_gives_the_gpu_what_triton_does(name, found):
    """Kernel, grid, threads, shared memory, stream, and every byte of the parameters."""
    if CASES[name].refused():
        pytest.skip("this Triton has no such descriptors")
    assert found["cases"][name] == []


def test_swapped_arguments_are_noticed(found):
    assert [text.split(":")[1] for text in found["noticed"]["swapped"]] == [" parameter 2", " parameter 3", " block"]


def test_an_address_that_the_binary_is_not_for_is_noticed(found):
    (text,) = found["noticed"]["unaligned"]
    assert text.startswith("conv_kernel: x_ptr is") and text.endswith("16 does not divide it")


@pytest.mark.parametrize("name", REFUSED)
def test_the_stub_refuses(name, found):
    """Launches with one thing wrong, each with the reason."""
    if "tensor map" in name and name not in found["refusals"]:
        pytest.skip("this Triton has no such descriptors")
    (text,) = found["refusals"][name]
    assert REFUSED[name] in text


def test_another_stream_waits_for_the_first_calls_event(found):
    """Once, and before it launches."""
    assert found["streams"][""] == ["A launches", "A launches", "B waits for A", "B launches", "B launches"]


def test_the_machine_that_choices_are_filed_under(found):
    """With the driver's version, which is asked of the driver: PyTorch has no function that tells it."""
    (name,) = found["machine"][""]
    assert "sm_90, 132 multiprocessors, CUDA driver 13000" in name


def test_no_large_image_is_described_as_a_small_one(found):
    """In Triton 3.9 the last byte's place is an ``int``, which wraps at 2 GiB."""
    assert found["large"][""] == []
