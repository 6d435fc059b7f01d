"""How the compiled kernels are found, chosen and offered as an implementation of the ops."""

import subprocess
import sys

import pytest
import torch

from resnet_fast.kernels import onednn
from resnet_fast.kernels.contract import Case
from resnet_fast.kernels.native import inference as native
from resnet_fast.kernels.native import library, planner
from tests.cpu.ops.cases import WINOGRAD_TILES, Conv, exact_conv, make, tolerance


def _python(program: str, input: str = "", **environment: str) -> subprocess.CompletedProcess:
    program = f"import os; os.environ.update({environment!r})\n{program}"
    return subprocess.run([sys.executable, "-c", program], input=input, capture_output=True, text=True)


BY_NAME = """
import sys
from resnet_fast.kernels.native import abi, library
for name in sys.stdin.read().splitlines():
    if os.fork() == 0:  # a process that has loaded nothing
        os.environ["RESNET_FAST_ISA"] = name
        print(library.variant(), flush=True)
        os._exit(0)
    os.wait()
"""


def test_every_instruction_set_by_name():
    """``RESNET_FAST_ISA`` picks one for the process; the best one serves if it is empty."""
    names = library.usable_variants()
    done = _python(BY_NAME, input="\n".join(["", *names]))
    assert done.stdout.splitlines() == [names[-1], *names], done.stderr


def test_unknown_instruction_set():
    """The error names the variable, what it is, and what it may be."""
    done = _python("from resnet_fast.kernels.native import library; library.unavailable()", RESNET_FAST_ISA="avx1024")
    assert "ValueError: RESNET_FAST_ISA is 'avx1024', expected one that this CPU runs: portable" in done.stderr
    with pytest.raises(ValueError, match=r"variant is 'avx1024', expected one of portable"):
        library.select("avx1024")


def test_importing_loads_nothing():
    """The library is opened at the first call that may use it."""
    done = _python(
        "import resnet_fast.ops, sys; from resnet_fast.kernels.native import library; print(library._library)"
    )
    assert done.stdout.strip() == "None", done.stderr


WITHOUT = """
import sys, torch, resnet_fast
from pathlib import Path
from resnet_fast.kernels.contract import Case
from resnet_fast.kernels.native import abi, library
from resnet_fast import ops
{change}
case = Case("conv_bn_act", "cpu", torch.float32, 3, 8, (7, 7), (2, 2), (3, 3))
print(library.unavailable())
print(ops.implementation_for(case))
x, w, v = torch.randn(1, 3, 32, 32), torch.randn(8, 3, 7, 7), torch.ones(8)
print(tuple(torch.ops.resnet_fast.stem(x, w, v, v).shape), tuple(torch.ops.resnet_fast.global_avg_pool(x).shape))
"""


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("library.LIBRARY = Path('nowhere/_native.so')", "without a C++ compiler"),
        ("library.LIBRARY = Path(ops.__file__)", "cannot be loaded"),
        ("abi.ABI = 99", "expected 99"),
    ],
    ids=["missing", "not a library", "other interface"],
)
def test_works_without_the_library(change, reason):
    """Installed without a compiler, or left over from another version: oneDNN serves, and the reason is told."""
    if reason == "expected 99" and not library.LIBRARY.exists():
        pytest.skip("needs the library")
    done = _python(WITHOUT.format(change=change), OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr[-2000:]
    told, server, result = done.stdout.strip().splitlines()
    assert reason in told
    assert server == "onednn"
    assert result == "(1, 8, 8, 8) (1, 3, 1, 1)"


def test_supports_says_why_not():
    case = Case("conv_bn_act", "cpu", torch.float32, 8, 8)
    assert native.supports(case) is None
    assert "cuda" in native.supports(case._replace(device="cuda"))
    assert "float16" in native.supports(case._replace(dtype=torch.float16))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "variant", lambda: "avx512")
        assert "bfloat16" in native.supports(case._replace(dtype=torch.bfloat16))
    assert "geometry" in native.supports(case._replace(stride=(1, 2**40)))
    assert "geometry" in native.supports(case._replace(padding=(2**31, 0), stride=(2**31, 1)))


def test_geometry_beyond_32_bits():
    """A stride that no 32-bit number holds is a stride all the same: the op gives the one output that it has."""
    data = make(Conv(1, 4, 5, 6, 4, stride=(2**33, 2**40)), torch.float32)
    args = data.args(True, True)
    actual = torch.ops.resnet_fast.conv_bn_act(*args)
    assert actual.shape == (1, 4, 1, 1)
    torch.testing.assert_close(actual.double(), exact_conv(args), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("algorithm", planner.CANDIDATES)
def test_the_planner_is_obeyed(algorithm, monkeypatch):
    """Packs and calls made under one choice are not used under the next, PyTorch's convolution included."""
    data = make(Conv(2, 32, 9, 8, 32), torch.float32)
    args, calls = data.args(True, True), []
    convolution = onednn.conv_bn_act
    monkeypatch.setattr(onednn, "conv_bn_act", lambda *args: calls.append(args) or convolution(*args))
    native.conv_bn_act(*args)
    with planner.forced(algorithm):
        actual = native.conv_bn_act(*args)
        exact = exact_conv(args)
        served = algorithm if planner.supports(_shape(data), algorithm) else "winograd4"  # by whatever the rule says
        allowed = tolerance(args, exact, None, WINOGRAD_TILES.get(served, 0))
        assert ((actual - exact).abs() <= allowed).all()
    assert bool(calls) == (algorithm == planner.ONEDNN)


def _shape(data):
    return native.conv_shape(data.x.shape, data.weight.shape, *data.conv.geometry, True, False)


def test_defaults_of_the_process_do_not_matter():
    """Results are float32 on the CPU whatever torch makes new tensors of."""
    data = make(Conv(1, 16, 5, 5, 24), torch.float32)
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):
            y, mean = native.conv_bn_act(*data.args(True, True)), native.global_avg_pool(data.x)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {(t.dtype, t.device.type) for t in (y, mean)} == {(torch.float32, "cpu")}
    assert torch.equal(y, native.conv_bn_act(*data.args(True, True)))


def test_weights_of_other_dtypes():
    """A float64 weight, scale and shift beside a float32 image are rounded once, after the scale is multiplied in."""
    data = make(Conv(1, 16, 5, 5, 24, (1, 1), padding=(0, 0)), torch.float32)
    x, weight, scale, shift, *rest = data.args(True, True)
    args = (x, weight.double(), scale.double(), shift.double(), *rest)
    assert torch.equal(native.conv_bn_act(*args), native.conv_bn_act(*data.args(True, True)))


def test_no_output_channels():
    """Refused in PyTorch's words; the kernels would divide nothing among threads."""
    x, weight, vector = torch.randn(1, 4, 5, 5), torch.randn(0, 4, 3, 3), torch.randn(0)
    with pytest.raises(RuntimeError, match="at least 1 at dimension 0"):
        native.conv_bn_act(x, weight, vector, vector, None, (1, 1), (1, 1), (1, 1), 1, True)


def test_more_sizes_than_are_kept():
    """A detector's: calls are forgotten and made again, the pack stays."""
    data = make(Conv(1, 8, 5, 5, 8, (1, 1), padding=(0, 0)), torch.float32)
    for size in [*range(1, 90), *range(1, 20)]:
        x = torch.randn(1, 8, 1, size)
        args = (x, data.weight, data.scale, data.shift, None, *data.conv.geometry, True)
        torch.testing.assert_close(native.conv_bn_act(*args).double(), exact_conv(args), rtol=1e-5, atol=1e-5)
