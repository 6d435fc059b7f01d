"""What pyproject.toml cannot say: the packages, the version's place, and how the kernels for the CPU are compiled.

``resnet_fast/kernels`` is a link to ``kernels/`` (a namespace package, so that a checkout never shadows Hugging Face's
package of that name), which the automatic discovery would follow to a top-level ``kernels``.
"""

import os
import re
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Optional

from setuptools import Extension, find_namespace_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

NATIVE = Path("resnet_fast/kernels/native")

OPENMP = ["-fopenmp"]
if sys.platform == "darwin":  # untested: Apple's clang has no OpenMP of its own, so that of torch is compiled against
    torch = sysconfig.get_path("purelib") + "/torch"
    OPENMP = ["-Xclang", "-fopenmp", f"-I{torch}/include", f"-L{torch}/lib", "-lomp"]
    OPENMP += ["-Wl,-rpath,@loader_path/../../../torch/lib"]
FLAGS = [
    *("-std=gnu++17", "-O3", "-ffp-contract=off", *OPENMP, "-fPIC", "-fvisibility=hidden"),
    *("-Wall", "-Wextra"),
]
# Name to flags: variant.cpp is compiled once for each, and the best one that the CPU runs is picked at load.
VARIANTS: dict[str, list[str]] = {"portable": []}
if sysconfig.get_platform().endswith("x86_64"):
    VARIANTS["avx2"] = ["-mavx2", "-mfma"]
    VARIANTS["avx512"] = [
        *VARIANTS["avx2"],
        *("-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", "-mprefer-vector-width=512"),
    ]
    VARIANTS["avx512_bf16"] = [*VARIANTS["avx512"], "-mavx512vnni", "-mavx512bf16"]
NEWEST = "avx512_bf16"  # left out where the compiler does not know it: g++ before 10


class BuildKernels(build_ext):
    """Compiles a plain shared library, not a Python module, by calling g++ (or ``$CXX``) with our flags alone.

    Python's own flags would come along otherwise, among them ``-fwrapv``. Where that fails the package is installed
    without the library and works through PyTorch's convolutions. ``RESNET_FAST_NO_NATIVE=1`` asks for that.

    ``RESNET_FAST_VARIANTS`` says which instruction sets to compile for: ``all``, by default for a wheel, or ``host``,
    which is the portable variant and the best that this CPU runs, by default for a build in place.
    """

    def run(self) -> None:
        self.usual = "host" if self.inplace else "all"  # read here, for setuptools hides it from what it calls
        super().run()
        for extension in self.extensions:
            name = self.get_ext_filename(extension.name)
            if self.inplace and not Path(self.build_lib, name).exists():
                Path(name).unlink(missing_ok=True)  # what an earlier build left would be taken for this one

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.build_lib, self.get_ext_filename(ext.name))
        target.unlink(missing_ok=True)
        if os.environ.get("RESNET_FAST_NO_NATIVE", "0") not in ("", "0"):
            reason = "RESNET_FAST_NO_NATIVE is set"
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            Path(self.build_temp).mkdir(parents=True, exist_ok=True)
            try:
                return self._compile(target, *map(Path, ext.sources))
            except (OSError, subprocess.CalledProcessError) as error:
                reason = f"{error} (they need g++ with OpenMP; $CXX names another)"
        self.warn(f"resnet_fast is built WITHOUT its compiled CPU kernels, and will be slower on a CPU: {reason}")

    def _variants(self, compiler: list[str]) -> dict[str, list[str]]:
        """Those of ``VARIANTS`` to compile: all that the compiler knows, or the portable one and the host's best."""
        variants = {name: flags for name, flags in VARIANTS.items() if name != NEWEST or _instructions(compiler, flags)}
        wanted = os.environ.get("RESNET_FAST_VARIANTS") or self.usual
        if wanted not in ("all", "host"):
            raise SystemExit(f"RESNET_FAST_VARIANTS is {wanted!r}, expected all or host")
        host = _instructions(compiler, ["-march=native"])
        if wanted == "all" or host is None:
            return variants
        used = {name: _instructions(compiler, flags) for name, flags in variants.items()}
        best = [name for name, instructions in used.items() if instructions is not None and instructions <= host][-1]
        return {name: variants[name] for name in ("portable", best)}

    def _compile(self, target: Path, variant: Path, dispatch: Path) -> None:
        """Raises OSError or CalledProcessError where there is no compiler, or it does not know what we ask for."""
        compiler = [*shlex.split(os.environ.get("CXX") or "g++"), *FLAGS, *shlex.split(os.environ.get("CXXFLAGS", ""))]
        variants = self._variants(compiler)
        jobs = [(name, [f"-DRF_VARIANT={name}", *flags, "-c", str(variant)]) for name, flags in variants.items()]
        jobs.append(
            ("dispatch", [*(f"-DRF_WITHOUT_{name}" for name in VARIANTS.keys() - variants), "-c", str(dispatch)])
        )
        objects = [str(Path(self.build_temp, f"{name}.o")) for name, _ in jobs]
        running = []
        for (_, arguments), to in zip(jobs, objects):
            print(shlex.join([*compiler, *arguments, "-o", to]), flush=True)
            running.append(subprocess.Popen([*compiler, *arguments, "-o", to]))
        for status, process in [(process.wait(), process) for process in running]:
            if status:
                raise subprocess.CalledProcessError(status, shlex.join(map(str, process.args)))
        subprocess.run([*compiler, "-shared", *objects, "-o", str(target)], check=True)


class Wheel(bdist_wheel):
    """Is for every Python, which the library knows nothing of; where that is missing, for every machine as well."""

    def get_tag(self) -> tuple[str, str, str]:
        self.root_is_pure = not Path(self.bdist_dir, f"{NATIVE}/_native.so").exists()
        return "py3", "none", super().get_tag()[2]


def _instructions(compiler: list[str], flags: list[str]) -> Optional[set[str]]:
    """The extensions of x86-64 that the compiler uses with ``flags``, from AVX on; None if it refuses them."""
    command = [*compiler, *flags, "-dM", "-E", "-x", "c++", os.devnull]
    done = subprocess.run(command, capture_output=True, text=True)
    return set(re.findall("__(AVX[^ ]*|FMA)__", done.stdout)) if done.returncode == 0 else None


if __name__ == "__main__":  # the tests read the flags above
    version = re.search(r'__version__ = "(.+)"', Path("resnet_fast/__init__.py").read_text())[1]

    setup(
        version=version,
        packages=find_namespace_packages(
            include=["resnet_fast", "resnet_fast.*"], exclude=["*__pycache__*", "resnet_fast.kernels.native.src"]
        ),
        # Named one by one: the sources of the kernels are in the sdist, but a wheel has no use for them.
        include_package_data=False,
        package_data={"resnet_fast": ["py.typed"], "": ["*.json", "*.html", "*.pbtxt", "*.md"]},
        ext_modules=[
            Extension(
                "resnet_fast.kernels.native._native",
                [f"{NATIVE}/src/variant.cpp", f"{NATIVE}/src/dispatch.cpp"],
                depends=sorted(map(str, Path(NATIVE, "src").glob("*.h"))),
                language="c++",
                optional=True,
            )
        ],
        cmdclass={"build_ext": BuildKernels, "bdist_wheel": Wheel},
    )
