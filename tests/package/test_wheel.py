"""The wheels that ``make wheel`` has put into ``dist/``, as they are installed where there is no compiler."""

import json
import os
import platform
import re
import shutil
import subprocess
import sysconfig
import time
import venv
import zipfile
from pathlib import Path

import pytest

import resnet_fast
from resnet_fast.kernels.native.abi import ALGORITHMS

ROOT = Path(__file__).parents[2]
WHEELS = sorted((ROOT / "dist").glob("*.whl"))
COMPILED = "resnet_fast/kernels/native/_native.so"
MOST_BYTES = 8 << 20
MOST_SECONDS = 60  # 30 are wanted; other tests may run beside this one
VARIANTS = {"x86_64": ["portable", "avx2", "avx512", "avx512_bf16"], "aarch64": ["portable"], "any": []}

pytestmark = pytest.mark.skipif(not WHEELS, reason="make wheel")


def _wheel(machine: str) -> Path:
    found = [wheel for wheel in WHEELS if wheel.stem.endswith(machine)]
    if not found:
        pytest.skip(f"make wheel had no compiler for {machine}")
    (wheel,) = found
    return wheel


@pytest.mark.parametrize("machine", VARIANTS)
def test_wheel_is_for_every_python_and_small(machine):
    """For every Linux that PyTorch's own wheels are for: those of glibc 2.28."""
    wheel = _wheel(machine)
    name = re.fullmatch(r"resnet_fast-(.+)-py3-none-(?:manylinux_2_(\d+)_\w+|any)", wheel.stem)
    assert name[1] == resnet_fast.__version__
    assert int(name[2] or 0) <= 28
    assert wheel.stat().st_size <= MOST_BYTES
    with zipfile.ZipFile(wheel) as archive:
        assert (COMPILED in archive.namelist()) == bool(VARIANTS[machine])
        for source in (name for name in archive.namelist() if name.endswith(".py")):
            path = ROOT / source
            assert archive.read(source) == path.read_bytes(), f"{source} has changed since: make wheel"
        (about,) = (archive.read(name).decode() for name in archive.namelist() if name.endswith(".dist-info/WHEEL"))
    assert f"Root-Is-Purelib: {str(machine == 'any').lower()}\n" in about
    assert re.findall(r"Tag: (.*)", about) == [wheel.stem.split("-", 2)[2]]


# What the first user's program does, and then what this test wants to know.
PROGRAM = """
import json, time, torch, torchvision, resnet_fast
stock = torchvision.models.resnet18().eval()
image = torch.randn(2, 3, 224, 224)
with torch.inference_mode():
    model = resnet_fast.accelerate(stock, inplace=False)
    result = model(image)
    end = time.time()
    expected = stock(image)

from importlib.metadata import requires, version
from packaging.requirements import Requirement
from resnet_fast.kernels.native import library
refused = []
for needed in map(Requirement, requires("resnet-fast")):
    if needed.marker is None or needed.marker.evaluate({"extra": ""}):
        if version(needed.name) not in needed.specifier:
            refused.append(f"{needed}, but {version(needed.name)} is there")
variants, ran = [], 0
if library.unavailable() is None:
    variants = library._variant_names(library._loaded())
    with torch.inference_mode(), library.recorded() as timings:
        model(image)
    ran = len(timings)
error = float((result - expected).abs().max() / expected.abs().max())
print(json.dumps(dict(end=end, error=error, refused=refused, variants=variants, ran=ran, where=resnet_fast.__file__)))
"""


@pytest.mark.parametrize("machine", [platform.machine(), "any"])
def test_first_call_after_pip_install(machine, tmp_path, capsys):
    """In a fresh environment that has this one's torch: no compiler, no other torch, half a minute."""
    wheel = _wheel(machine)
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=True)
    python = environment / "bin/python"
    variables = {"PATH": str(python.parent), "HOME": str(tmp_path)}
    assert not any(shutil.which(compiler, path=variables["PATH"]) for compiler in ("c++", "g++", "cc", "gcc", "clang"))

    def run(*command: str) -> str:
        done = subprocess.run([python, *command], cwd=tmp_path, env=variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    start = time.time()
    run("-m", "pip", "install", "--no-deps", "--no-index", "--disable-pip-version-check", str(wheel))
    # Not before: this environment may have the package too, which pip would take for that one's.
    (packages,) = environment.glob("lib/python3*/site-packages")
    (packages / "torch_of_another.pth").write_text(sysconfig.get_path("purelib") + "\n")
    said = json.loads(run("-c", PROGRAM).splitlines()[-1])
    assert Path(said["where"]) == packages / "resnet_fast/__init__.py"
    assert said["refused"] == []
    assert said["error"] < 1e-4
    assert said["variants"] == VARIANTS[machine]
    assert (said["ran"] > 20) == bool(VARIANTS[machine])
    seconds = said["end"] - start
    assert seconds < MOST_SECONDS
    with capsys.disabled():
        print(f"\n{wheel.name}: {seconds:.1f} s from pip install to the end of the first call")


def test_auditwheel_finds_nothing_to_add(tmp_path):
    """Beside the C and C++ runtimes that every Linux of that age has, and PyTorch's OpenMP."""
    auditwheel = shutil.which("auditwheel", path=os.pathsep.join([str(ROOT / ".venv-wheel/bin"), os.environ["PATH"]]))
    if auditwheel is None:
        pytest.skip("no auditwheel")
    wheel = _wheel(platform.machine())
    variables = {**os.environ, "PATH": os.pathsep.join([str(Path(auditwheel).parent), os.environ["PATH"]])}
    command = [auditwheel, "repair", "--exclude", "libgomp.so.1", "--plat", f"manylinux_2_28_{platform.machine()}"]
    command += ["--only-plat", "--wheel-dir", tmp_path, wheel]
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    with zipfile.ZipFile(tmp_path / wheel.name) as repaired, zipfile.ZipFile(wheel) as ours:
        assert sorted(repaired.namelist()) == sorted(ours.namelist())


def test_aarch64_library_in_an_emulator(tmp_path):
    """Against double loops, by the program that the sanitizers look at."""
    compiler = "aarch64-linux-gnu-g++"
    for needed in (compiler, "qemu-aarch64"):
        if shutil.which(needed) is None:
            pytest.skip(f"no {needed}")
    with zipfile.ZipFile(_wheel("aarch64")) as archive:
        library = archive.extract(COMPILED, tmp_path)
    program = tmp_path / "program"
    source, headers = ROOT / "tests/native/sanitize.cpp", ROOT / "kernels/native/src"
    command = [compiler, "-std=gnu++17", "-O1", f"-I{headers}", source, library, "-o", program]
    linked = subprocess.run(command, capture_output=True, text=True)
    assert linked.returncode == 0, linked.stderr[-3000:]
    command = ["qemu-aarch64", "-L", "/usr/aarch64-linux-gnu", program, "100", str(len(ALGORITHMS))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-3000:]
    assert int(re.fullmatch(r"portable: (\d+) cases so far\n", done.stdout)[1]) > 100
