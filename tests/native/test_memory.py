"""Training steps run in the memory of the step before."""

import os
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator is told")

# The first steps still take new memory now and then: which piece of the heap an image gets depends on the order in
# which two threads free. Half of the later ones must take none.
STEPS = """
import resource, statistics, torch, resnet_fast
from torchvision.models.resnet import BasicBlock
block = resnet_fast.accelerate(BasicBlock(64, 64).train())
x = torch.randn(11, 64, 112, 112, requires_grad=True)  # images of 34 MiB, which glibc would map anew
faults = []
for _ in range(12):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block(x).sum().backward()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(int(statistics.median(faults[5:])))
"""


def _faults(**environment: str) -> int:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", STEPS]
    return int(subprocess.run(command, env=kept | environment, capture_output=True, text=True, check=True).stdout)


def test_a_step_takes_no_new_memory():
    assert _faults() < 2000


def test_what_the_environment_says_stands():
    assert _faults(MALLOC_ARENA_MAX="8") > 20000
