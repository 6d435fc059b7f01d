"""What is shipped, and what importing it does not do."""

import ast
import functools
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from resnet_fast.kernels.native import library

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs the repository")


def _git(*args: str) -> list[str]:
    done = subprocess.run(["git", "-C", ROOT, *args], capture_output=True, text=True, check=True)
    return [name for name in done.stdout.split("\0") if name]


@functools.cache
def tracked() -> list[str]:
    return [name for name in _git("ls-files", "-z") if (ROOT / name).exists() or (ROOT / name).is_symlink()]


def _python(program: str, cwd: Path = ROOT, **environment: str) -> str:
    """Run a program in a process of its own, started in ``cwd`` and without what this one imports."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")} | environment
    done = subprocess.run([sys.executable, "-c", program], cwd=cwd, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


# --- the wheel --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of what is in the repository or would go into it."""
    source = tmp_path_factory.mktemp("source")
    for name in _git("ls-files", "-z", "--cached", "--others", "--exclude-standard"):
        if (ROOT / name).exists() or (ROOT / name).is_symlink():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, source / name, follow_symlinks=False)
    return source


def _build(source: Path, work: Path, **environment: str) -> tuple[dict[str, bytes], str]:
    """Contents of the wheel by name, and what its build printed."""
    work.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "pip", "wheel", "--verbose", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run(
        [*command, "--wheel-dir", work, source],
        capture_output=True,
        text=True,
        cwd=work,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    (built,) = work.glob("*.whl")
    with zipfile.ZipFile(built) as archive:
        files = {info.filename: archive.read(info) for info in archive.infolist() if not info.is_dir()}
    return files, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory) -> dict[str, bytes]:
    """Not optimised, which takes minutes: the kernels that other tests run are compiled with all our flags."""
    return _build(source, tmp_path_factory.mktemp("wheel"), CXXFLAGS="-O0")[0]


COMPILED = "resnet_fast/kernels/native/_native.so"


def _tag(wheel: dict[str, bytes]) -> str:
    """The Pythons and the machines that pip installs the wheel for."""
    (about,) = (text.decode() for name, text in wheel.items() if name.endswith(".dist-info/WHEEL"))
    (tag,) = re.findall("^Tag: (.*)$", about, re.MULTILINE)
    return tag


@pytest.mark.skipif(shutil.which(os.environ.get("CXX") or "g++") is None, reason="no C++ compiler")
def test_wheel_has_the_compiled_kernels(wheel):
    """And not their sources, which nothing there could use."""
    assert COMPILED in wheel
    assert not [name for name in wheel if name.endswith((".cpp", ".h"))]
    assert _tag(wheel) == f"py3-none-{re.sub(r'[-.]', '_', sysconfig.get_platform())}"


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"RESNET_FAST_NO_NATIVE": "1"}, "RESNET_FAST_NO_NATIVE is set"),
        ({"CXX": "no-such-compiler"}, "no-such-compiler"),
        ({"CXX": "false"}, "Command 'false"),
    ],
    ids=["not wanted", "no compiler", "a compiler that fails"],
)
def test_wheel_without_a_compiler(environment, reason, source, tmp_path):
    """The build says why the compiled kernels are missing, and the package works without them."""
    files, printed = _build(source, tmp_path / "wheel", **environment)
    assert COMPILED not in files
    assert _tag(files) == "py3-none-any"
    (warning,) = [line for line in printed.splitlines() if "WITHOUT its compiled CPU kernels" in line]
    assert reason in warning
    _unpack(files, tmp_path)
    program = """
import sys
sys.path.insert(0, "")
import torch, resnet_fast
from resnet_fast.kernels.native import library
resnet_fast.resnet18(num_classes=3).eval()(torch.ones(1, 3, 32, 32))
print(resnet_fast.__file__, library.unavailable())
"""
    where, _, told = _python(program, tmp_path, OMP_NUM_THREADS="1").partition(" ")
    assert where == str(tmp_path / "resnet_fast/__init__.py")
    assert "installed without a C++ compiler" in told


@pytest.mark.skipif(shutil.which("g++") is None or platform.machine() != "x86_64", reason="no g++ for x86-64")
def test_an_older_compiler_leaves_out_what_it_does_not_know(source, tmp_path):
    compiler = tmp_path / "g++-9"
    compiler.write_text("""#!/bin/sh
case "$*" in *avx512bf16*) echo "unrecognized command line option" >&2; exit 1;; esac
exec g++ "$@"
""")
    compiler.chmod(0o755)
    files, printed = _build(source, tmp_path / "wheel", CXX=str(compiler), CXXFLAGS="-O0")
    assert "is built WITHOUT" not in printed
    _unpack(files, tmp_path)
    program = """
import sys
sys.path.insert(0, "")
from resnet_fast.kernels.native import library
print(library._variant_names(library._loaded()))
"""
    assert _python(program, tmp_path) == "['portable', 'avx2', 'avx2_vnni', 'avx512', 'avx512_vnni']"


_ALL = {"portable", "avx2", "avx2_vnni", "avx512", "avx512_vnni", "avx512_bf16"}


@pytest.mark.skipif(shutil.which("g++") is None or platform.machine() != "x86_64", reason="no g++ for x86-64")
@pytest.mark.parametrize(
    ("environment", "host", "compiled"),
    [
        ({}, "-mavx2 -mfma -mbmi2", {"portable", "avx2"}),
        ({}, "-msse4.2", {"portable"}),
        ({}, "-mavx2 -mfma -mavxvnni", {"portable", "avx2", "avx2_vnni"}),
        ({}, "-mno-such-option", _ALL),
        ({"RESNET_FAST_VARIANTS": "all"}, "-mavx2 -mfma", _ALL),
    ],
    ids=["AVX2", "SSE", "AVX2 with VNNI", "a compiler that cannot tell", "all"],
)
def test_a_build_in_place_is_for_its_cpu(environment, host, compiled, source, tmp_path):
    """As seen by a compiler that says which instructions the CPU has, and compiles nothing."""
    compiler, calls = tmp_path / "g++", tmp_path / "calls"
    compiler.write_text(f"""#!/bin/sh
case "$*" in
*-march=native*) exec {shutil.which("g++")} {host} -dM -E -x c++ /dev/null;;
*-dM*) exec {shutil.which("g++")} "$@";;
esac
echo "$*" >> {calls}
for last; do :; done
touch "$last"
""")
    compiler.chmod(0o755)
    command = [sys.executable, "setup.py", "build_ext", "--inplace", "--build-lib", tmp_path, "--build-temp", tmp_path]
    env = {**os.environ, "CXX": str(compiler), **environment}
    subprocess.run(command, cwd=source, env=env, check=True, capture_output=True)
    said = calls.read_text()
    assert set(re.findall(r"-DRF_VARIANT=(\w+)", said)) == compiled
    # One of AVX2's two parts serves AVX2 with VNNI as well, which is then the only one to be picked.
    unneeded = {"avx2"} if "avx2_vnni" in compiled and compiled != _ALL else set()
    assert set(re.findall(r"-DRF_WITHOUT_(\w+)", said)) == _ALL - compiled | unneeded
    (source / "kernels/native/_native.so").unlink()


def _unpack(files: dict[str, bytes], to: Path) -> None:
    for name, data in files.items():
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        (to / name).write_bytes(data)


def test_sdist_has_the_sources_of_the_kernels(source, tmp_path):
    """It is what a wheel is built from elsewhere."""
    program = "import setuptools.build_meta, sys; print(setuptools.build_meta.build_sdist(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", program, tmp_path], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    sources = [name for name in tracked() if name.startswith("kernels/native/src/")]
    assert sources
    assert {f"resnet_fast/{name}" for name in sources} <= names


def test_wheel_has_no_top_level_kernels(wheel):
    """A top-level ``kernels`` would overwrite Hugging Face's package of that name without a word."""
    tops = {name.split("/")[0] for name in wheel}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"resnet_fast"}
    (metadata,) = (name for name in wheel if name.endswith("/METADATA"))
    assert b"\nName: resnet-fast\n" in wheel[metadata]


def test_wheel_has_the_kernels(wheel):
    """As real files with the code in them, not as the link that the repository has."""
    for name in tracked():
        if name.startswith("kernels/") and name.endswith((".py", ".json")):
            shipped = f"resnet_fast/{name}"
            assert shipped in wheel, f"{shipped} is missing"
            assert wheel[shipped] == (ROOT / name).read_bytes()
    assert "resnet_fast/kernels/onednn.py" in wheel


def test_wheel_has_every_module_and_its_data(wheel):
    """Subpackages without an ``__init__.py`` included; typing marker, tile tables and templates too."""
    kinds = (".py", ".json", ".html", ".typed", ".pbtxt", ".md")
    for name in tracked():
        if name.startswith("resnet_fast/") and name.endswith(kinds):
            assert name in wheel, f"{name} is missing"
    assert "resnet_fast/py.typed" in wheel
    assert any(re.fullmatch(r"resnet_fast/kernels/triton/tiles/\w+\.json", name) for name in wheel)


def test_wheel_has_nothing_else(wheel):
    """No tests, no caches, no benchmarks, no builds, no file that the repository would not hold."""
    for name in wheel:
        assert "__pycache__" not in name
        assert ".dist-info/" in name or name.startswith("resnet_fast/")
        if name.startswith("resnet_fast/kernels/"):
            assert name == COMPILED or (ROOT / name.removeprefix("resnet_fast/")).is_file()


def test_wheel_works_where_it_is_unpacked(wheel, tmp_path):
    """From a folder that is not the repository, it imports its own kernels and computes."""
    _unpack(wheel, tmp_path)
    program = """
import sys
sys.path.insert(0, "")
import torch, resnet_fast
from resnet_fast.kernels import onednn
assert "kernels" not in sys.modules
y = resnet_fast.resnet18(num_classes=3).eval()(torch.ones(1, 3, 32, 32))
print(resnet_fast.__file__, onednn.__file__, tuple(y.shape))
"""
    out = _python(program, tmp_path, OMP_NUM_THREADS="1").split(maxsplit=2)
    assert out[:2] == [str(tmp_path / "resnet_fast/__init__.py"), str(tmp_path / "resnet_fast/kernels/onednn.py")]
    assert out[2] == "(1, 3)"


def test_version_is_told_once(wheel):
    """The version of the wheel is that of the package."""
    import resnet_fast

    (dist_info,) = {name.split("/")[0] for name in wheel if ".dist-info/" in name}
    assert dist_info == f"resnet_fast-{resnet_fast.__version__}.dist-info"


# --- the repository ---------------------------------------------------------------------------------------------------


def test_kernels_is_a_namespace_and_a_link():
    """No ``kernels/__init__.py``: a checkout must not shadow Hugging Face's package. The link is stored as one."""
    assert not (ROOT / "kernels/__init__.py").exists()
    assert not (ROOT / "kernels/__init__.pyi").exists()
    link = ROOT / "resnet_fast/kernels"
    assert link.is_symlink()
    assert os.readlink(link) == "../kernels"
    (entry,) = _git("ls-files", "-z", "--stage", "resnet_fast/kernels")
    assert entry.startswith("120000 ")


def test_a_real_kernels_package_is_not_shadowed(tmp_path):
    """With another ``kernels`` installed, ``import kernels`` in the repository's root finds that one."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels/__init__.py").write_text("whose = 'theirs'\n")
    program = f"""
import sys
sys.path[:0] = [""]
sys.path.append({str(tmp_path)!r})
import kernels, resnet_fast.kernels.contract
print(kernels.whose)
"""
    assert _python(program) == "theirs"


def test_imports_go_through_the_package():
    """``kernels.x`` and ``resnet_fast.kernels.x`` would be two modules, with two caches and two registrations."""
    wrong = re.compile(r"^\s*(from|import)\s+kernels\b", re.MULTILINE)
    sources = [name for name in tracked() if name.endswith(".py") and "/test_package.py" not in name]
    assert len(sources) > 20
    assert [name for name in sources if wrong.search((ROOT / name).read_text())] == []


def test_no_module_starts_with_an_import_of_what_only_unix_has():
    """Windows could not import it."""
    wrong = re.compile(r"^(import|from) (fcntl|grp|pwd|resource|termios)\b", re.MULTILINE)
    sources = [name for name in tracked() if name.startswith(("resnet_fast/", "kernels/")) and name.endswith(".py")]
    assert len(sources) > 100
    assert [name for name in sources if wrong.search((ROOT / name).read_text())] == []


def test_no_machine_paths():
    """Nothing tracked names a folder of the machine that it was written on."""
    paths = re.compile(rb"(?<![\w.~-])/(work|root|tmp|home)/\w")
    found = []
    for name in tracked():
        path = ROOT / name
        if path.is_file() and not path.is_symlink() and name != "tests/cpu/test_package.py":
            for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
                if paths.search(line):
                    found.append(f"{name}:{number}: {line[:100].decode(errors='replace')}")
    assert not found, "\n".join(found)


def test_the_tests_find_the_tree_they_lie_in():
    """Not an installed copy."""
    import resnet_fast

    assert Path(resnet_fast.__file__).resolve() == (ROOT / "resnet_fast/__init__.py").resolve()


def test_import_from_the_root():
    """``python`` started in the root imports the package, and no top-level ``kernels`` comes along."""
    program = "import sys; sys.path.insert(0, ''); import resnet_fast, resnet_fast.ops, resnet_fast.kernels.onednn\n"
    assert _python(program + "print('kernels' in sys.modules, resnet_fast.__file__)") == (
        f"False {ROOT / 'resnet_fast/__init__.py'}"
    )


# --- what importing does not do ---------------------------------------------------------------------------------------

IMPORTS = """
import sys
{before}
import torch, torchvision
known = set(sys.modules)
threads = torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(), torch.backends.cudnn.benchmark
import resnet_fast
assert threads == (
    torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(), torch.backends.cudnn.benchmark
), "a global setting was changed"
new = set(sys.modules) - known
"""


def test_the_first_use_imports_no_more_than_it_needs():
    """Beside torch and torchvision, nothing but ourselves: no Triton, no ONNX, no command line, no model builders."""
    program = (
        IMPORTS.format(before="")
        + """
resnet_fast.accelerate(torchvision.models.resnet18().eval())(torch.ones(1, 3, 32, 32))
new = set(sys.modules) - known
others = {name.partition(".")[0] for name in new} - {"resnet_fast"} - set(sys.stdlib_module_names)
assert others <= {"torch", "torchvision"}, others
heavy = ("torch._dynamo", "torch._inductor", "torch.onnx", "torch.utils.benchmark", "sympy", "mpmath")
assert not [name for name in new if name.startswith(heavy)], new
unused = ("bench", "cli", "export", "finetune", "serving", "tuning", "cuda_graph", "explanation", "verify")
assert not [name for name in new if name.startswith(tuple(f"resnet_fast.{one}" for one in unused))], new
assert not torch.cuda.is_initialized()
print("fine")
"""
    )
    assert _python(program, OMP_NUM_THREADS="1") == "fine"


def test_import_alone_takes_no_time():
    """So that ``resnet-fast --help`` answers at once; see tests/cpu/cli/test_cli.py."""
    program = "import sys, resnet_fast; print({'torch', 'torchvision', 'numpy', 'typer'} & set(sys.modules) or 'none')"
    assert _python(program) == "none"


@pytest.mark.parametrize(
    "imports",
    ["resnet_fast, torch, torchvision", "torch, resnet_fast, torchvision", "torchvision, resnet_fast"],
)
def test_archives_and_the_registry_find_us_in_any_order(imports):
    """Both are asked without a name of ours being used."""
    program = f"""
import {imports}
import torch
from torchvision import models
assert torch.ops.resnet_fast.conv_bn_act
assert "fast_wide_resnet50_2" in models.list_models()
print(type(models.get_model("fast_resnet18")).__module__)
"""
    assert _python(program) == "resnet_fast.models.resnet"


@pytest.mark.parametrize("module", ["kernels.contract", "graph.conditions", "quantised", "finetune.data"])
def test_whatever_module_of_ours_comes_first(module):
    """It may be half imported when torch and torchvision are there."""
    program = f"""
import resnet_fast.{module}
import torch, torchvision
print(torch.ops.resnet_fast.stem, torchvision.models.get_model_builder("fast_resnet18").__name__)
"""
    assert _python(program) == "resnet_fast.stem resnet18"


def test_import_asks_no_driver_and_compiles_nothing():
    """Every way to a driver or a compiler is barred; the import does not notice."""
    program = (
        IMPORTS.format(before="import subprocess, ctypes, torch")
        + """
print("fine")
"""
    )
    barred = """
import torch, subprocess, torch.utils.cpp_extension
def refuse(*args, **kwargs):
    raise AssertionError(f"import went to the machine: {args}")
for name in ("init", "_lazy_init", "is_available", "device_count", "get_device_capability", "get_device_name"):
    setattr(torch.cuda, name, refuse)
import torchvision
subprocess.Popen.__init__ = refuse
torch.utils.cpp_extension.load = torch.utils.cpp_extension.load_inline = refuse
torch.compile = refuse
"""
    assert _python(barred + program) == "fine"


def test_import_works_without_triton():
    """On a platform where it is not installed, the CPU route serves."""
    program = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
import torch, resnet_fast
print(tuple(resnet_fast.resnet18(num_classes=3).eval()(torch.ones(1, 3, 32, 32)).shape))
print(resnet_fast.explain(resnet_fast.resnet18()).rows[0].steps[0])
"""
    out = _python(program, OMP_NUM_THREADS="1").splitlines()
    server = "onednn" if library.unavailable() else "native"
    assert out[0] == "(1, 3)"
    assert out[1].startswith(f"conv1+bn1+relu+maxpool: {server}")


def test_public_names():
    """``from resnet_fast import *`` gives what the package lists, and the version is a plain one."""
    import resnet_fast

    space: dict = {}
    exec("from resnet_fast import *", space)
    assert set(resnet_fast.__all__) <= set(space)
    assert set(resnet_fast.__all__) <= set(dir(resnet_fast))
    assert all(getattr(resnet_fast, name) is space[name] for name in resnet_fast.__all__)
    assert re.fullmatch(r"\d+\.\d+\.\d+", resnet_fast.__version__)
    with pytest.raises(AttributeError, match="has no attribute 'acelerate'"):
        resnet_fast.acelerate  # noqa: B018


def test_type_checkers_and_python_find_the_same_names():
    import resnet_fast

    tree = ast.parse(Path(resnet_fast.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    typed = {alias.name: node.module for node in block.body for alias in node.names}
    assert sorted(typed) == sorted(resnet_fast.__all__)
    found = {name: resnet_fast._ELSEWHERE.get(name, "models.resnet") for name in resnet_fast.__all__}
    assert typed == {name: f"resnet_fast.{module}" for name, module in found.items()}
    assert set(resnet_fast._ELSEWHERE) <= set(resnet_fast.__all__)


def test_no_module_has_the_name_of_what_the_package_holds():
    """Importing ``resnet_fast.accelerate``, were there one, would put the module in the function's place."""
    import resnet_fast

    modules = {path.stem for path in Path(resnet_fast.__file__).parent.iterdir()}
    assert not modules & set(resnet_fast.__all__)


def test_type_checkers_notice_a_slip(tmp_path):
    (tmp_path / "slip.py").write_text("import resnet_fast\nresnet_fast.acelerate, resnet_fast.accelerate\n")
    mypy = [sys.executable, "-m", "mypy", "--strict", "--no-incremental", "--follow-imports=skip"]
    done = subprocess.run(
        [*mypy, "slip.py", str(ROOT / "resnet_fast/__init__.py")],
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert [line for line in done.stdout.splitlines() if "error:" in line] == [
        'slip.py:2: error: Module has no attribute "acelerate"; maybe "accelerate"?  [attr-defined]'
    ]


def test_wheel_carries_the_readme(wheel):
    """It is the page on PyPI; setuptools only warns where the file is missing."""
    (metadata,) = (name for name in wheel if name.endswith("/METADATA"))
    assert wheel[metadata].partition(b"\n\n")[2].strip(), "no description: is README.md there?"
