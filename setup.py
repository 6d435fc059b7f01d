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
# Instruction sets that variant.cpp (floating-point numbers) and int8.cpp are compiled for, and the flags.
FLOATS: dict[str, list[str]] = {"portable": []}
INT8: dict[str, list[str]] = {"portable": []}
# The names that users see: of each the two parts. The best one that the CPU runs is picked at load.
VARIANTS: dict[str, tuple[str, str]] = {"portable": ("portable", "portable")}
if sysconfig.get_platform().endswith("x86_64"):
    AVX2 = ["-mavx2", "-mfma"]
    AVX512 = [*AVX2, "-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", "-mprefer-vector-width=512"]
    FLOATS |= {"avx2": AVX2, "avx512": AVX512, "avx512_bf16": [*AVX512, "-mavx512bf16"]}
    INT8 |= {"avx2": AVX2, "avx2_vnni": [*AVX2, "-mavxvnni"], "avx512": AVX512}
    INT8["avx512_vnni"] = [*AVX512, "-mavx512vnni"]
    VARIANTS |= {
        "avx2": ("avx2", "avx2"),
        "avx2_vnni": ("avx2", "avx2_vnni"),
        "avx512": ("avx512", "avx512"),
        "avx512_vnni": ("avx512", "avx512_vnni"),
        "avx512_bf16": ("avx512_bf16", "avx512_vnni"),
    }


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

    def _variants(self, compiler: list[str]) -> list[str]:
        """Those of ``VARIANTS`` to compile: all that the compiler knows, or the portable one and the host's best."""
        instructions = {
            name: [_instructions(compiler, flags) for flags in (FLOATS[floats], INT8[int8])]
            for name, (floats, int8) in VARIANTS.items()
        }
        # g++ before 11 does not know all; one that knows nothing says so when it compiles.
        variants = [name for name, sets in instructions.items() if None not in sets or name == "portable"]
        wanted = os.environ.get("RESNET_FAST_VARIANTS") or self.usual
        if wanted not in ("all", "host"):
            raise SystemExit(f"RESNET_FAST_VARIANTS is {wanted!r}, expected all or host")
        host = _instructions(compiler, ["-march=native"])
        if wanted == "all" or host is None:
            return variants
        best = [name for name in variants if all(used is not None and used <= host for used in instructions[name])][-1:]
        return list(dict.fromkeys(["portable", *best]))

    def _compile(self, target: Path, variant: Path, int8: Path, dispatch: Path) -> None:
        """Raises OSError or CalledProcessError where there is no compiler, or it does not know what we ask for."""
        compiler = [*shlex.split(os.environ.get("CXX") or "g++"), *FLAGS, *shlex.split(os.environ.get("CXXFLAGS", ""))]
        variants = self._variants(compiler)
        jobs = jobs_for(variants, variant, int8, dispatch)
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


def jobs_for(variants: list[str], variant: Path, int8: Path, dispatch: Path) -> list[tuple[str, list[str]]]:
    """What to compile for these of ``VARIANTS``: the objects' names, each with the compiler's arguments."""
    floats, int8s = (dict.fromkeys(parts) for parts in zip(*(VARIANTS[name] for name in variants)))
    jobs = [(name, [f"-DRF_VARIANT={name}", *FLOATS[name], "-c", str(variant)]) for name in floats]
    jobs += [(f"{name}_int8", [f"-DRF_VARIANT={name}", *INT8[name], "-c", str(int8)]) for name in int8s]
    without = [f"-DRF_WITHOUT_{name}" for name in VARIANTS if name not in variants]
    return [*jobs, ("dispatch", [*without, "-c", str(dispatch)])]


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
                [f"{NATIVE}/src/{name}.cpp" for name in ("variant", "int8", "dispatch")],
                depends=sorted(map(str, Path(NATIVE, "src").glob("*.h"))),
                language="c++",
                optional=True,
            )
        ],
        cmdclass={"build_ext": BuildKernels, "bdist_wheel": Wheel},
    )
