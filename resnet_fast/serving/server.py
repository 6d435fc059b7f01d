"""The program of NVIDIA Triton Inference Server on this machine, and a process of it."""

import contextlib
import ctypes
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Optional, Union

from resnet_fast.utils.optional import MissingPackageError

VARIABLE = "RESNET_FAST_SERVER"
"""Names the virtual environment that ``make server`` made; ``.venv-server`` in the current folder if it is not set."""

_STUB = "triton_python_backend_stub"
_SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class Installation:
    """A server's program and its backends; ``stubs`` has a folder for each Python, where the backend has none."""

    program: Path
    backends: Path
    stubs: Optional[Path] = None

    @property
    def backend_names(self) -> list[str]:
        """The names of the backends installed, as in ``backend: "python"``."""
        return sorted(path.name for path in self.backends.iterdir() if any(path.glob("libtriton_*.so")))


def installation() -> Installation:
    """The server in the environment that ``VARIABLE`` names, or the one on PATH, as in NVIDIA's containers.

    Raises:
        MissingPackageError: there is none.
    """
    environment = Path(os.environ.get(VARIABLE, ".venv-server"))
    for folder in sorted(environment.glob("lib/python3*/site-packages/pytriton/tritonserver")):
        # Absolute but not resolved: what is in the environment belongs together.
        folder = folder.absolute()
        return Installation(folder / "bin/tritonserver", folder / "backends", folder / "python_backend_stubs")
    on_path = shutil.which("tritonserver")
    if on_path is not None:
        program = Path(on_path).resolve()
        return Installation(program, program.parent.parent / "backends")
    raise MissingPackageError(
        f"serving needs NVIDIA Triton Inference Server, which is neither in {str(environment)!r} nor on PATH: "
        f"make server, or name the environment that holds nvidia-pytriton in {VARIABLE}",
        name="pytriton",
    )


def backend_of(model: Path) -> Optional[str]:
    """The backend that the model in the folder ``model`` asks for; None if its config.pbtxt does not say."""
    text = (model / "config.pbtxt").read_text(encoding="utf-8")
    found = re.search(r'^\s*backend\s*:\s*"([^"]*)"', text, re.MULTILINE)
    return found and found[1]


def servable(repository: Union[str, os.PathLike], installed: Installation) -> tuple[list[str], list[str]]:
    """The models in ``repository`` that the server can load, and those whose backend it lacks.

    Raises:
        FileNotFoundError: ``repository`` is no folder with models in it.
    """
    models = sorted(path.parent for path in Path(repository).glob("*/config.pbtxt"))
    if not models:
        raise FileNotFoundError(f"repository is {str(repository)!r}, expected a folder with models in it")
    able = {model.name: backend_of(model) in (None, *installed.backend_names) for model in models}
    return [name for name in able if able[name]], [name for name in able if not able[name]]


def python_library() -> Optional[Path]:
    """The folder of this Python's shared library, which the Python backend loads; None if the loader finds it itself.

    Raises:
        MissingPackageError: there is no such library.
    """
    name = f"libpython{sysconfig.get_python_version()}.so.1.0"
    folder = Path(sysconfig.get_config_var("LIBDIR") or "")
    if (folder / name).is_file():
        return folder
    try:
        ctypes.CDLL(name)
    except OSError as error:
        raise MissingPackageError(
            f"the server's Python backend needs {name}, which this Python ({sys.executable}) comes without", name=name
        ) from error
    return None


class Server:
    """A server's process on a model repository; as a context manager it is stopped at the end.

    Its Python backend runs in the environment of this Python: that one's programs come first on PATH, and its shared
    library is loaded. PYTHONPATH has no effect there.
    """

    def __init__(
        self,
        repository: Union[str, os.PathLike],
        *,
        models: Optional[Sequence[str]] = None,
        address: str = "127.0.0.1",
        http_port: int = 8000,
        grpc_port: int = 8001,
        metrics_port: int = 8002,
        arguments: Sequence[str] = (),
        log: Optional[Path] = None,
    ) -> None:
        """Start a server; ``wait`` says when it is ready.

        Args:
            repository: the folder of the models.
            models: the names of those to load; by default all whose backend the server has.
            address: of the network interface to listen at; ``0.0.0.0`` is all.
            arguments: further ones for the server.
            log: a file for what the server says, by default on stderr.

        Raises:
            MissingPackageError: there is no server, or this Python has no shared library.
            FileNotFoundError: there are no models, or not that one.
            ValueError: the server has no backend for any of the models.
        """
        installed = installation()
        able, unable = servable(repository, installed)
        for name in models or ():
            if name not in able:
                known = "backend for it is not installed" if name in unable else "folder in the repository is called so"
                raise FileNotFoundError(f"models has {name!r}, but no {known}")
        self.models = list(models or able)
        if not self.models:
            raise ValueError(
                f"repository is {str(repository)!r}, whose models need backends that this server lacks; "
                f"it has {', '.join(installed.backend_names)}"
            )
        self.http, self.grpc, self.metrics = (f"{address}:{port}" for port in (http_port, grpc_port, metrics_port))
        self._log = log
        # What a killed process leaves in shared memory is found by this prefix.
        self._shared = f"resnet_fast_{secrets.token_hex(4)}_"
        self._folder = tempfile.TemporaryDirectory(prefix="resnet-fast-serve-")
        command = [
            str(installed.program),
            f"--model-repository={repository}",
            f"--backend-directory={_backends(installed, Path(self._folder.name))}",
            f"--backend-config=python,shm-region-prefix-name={self._shared}",
            "--model-control-mode=explicit",
            *(f"--load-model={name}" for name in self.models),
            # Or every Python model would be loaded twice, first of all to ask what its configuration says already.
            "--disable-auto-complete-config",
            f"--http-address={address}",
            f"--http-port={http_port}",
            f"--grpc-address={address}",
            f"--grpc-port={grpc_port}",
            f"--metrics-address={address}",
            f"--metrics-port={metrics_port}",
            *arguments,
        ]
        with contextlib.ExitStack() as stack:
            output = stack.enter_context(log.open("wb")) if log else None
            # A session of its own: a Ctrl-C in a terminal goes to the caller, who stops the server in good order.
            self.process = subprocess.Popen(
                command,
                stdout=output,
                stderr=output,
                env=_environment(),
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )

    def wait(self, seconds: float = 300) -> None:
        """Return when every model is loaded and warmed up.

        Raises:
            RuntimeError: the server ended; the message has its last error.
            TimeoutError: it is not ready within ``seconds``.
        """
        end = time.monotonic() + seconds
        while not self.ready():
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended with code {self.process.returncode}{self._last_error()}")
            if time.monotonic() > end:
                raise TimeoutError(f"the server is not ready after {seconds:.0f} s{self._last_error()}")
            time.sleep(0.1)

    def ready(self) -> bool:
        """Return whether the server answers, and has all its models."""
        try:
            with urllib.request.urlopen(f"http://{self.http}/v2/health/ready", timeout=5) as answer:
                return answer.status == 200
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False

    def _last_error(self) -> str:
        if self._log is None:
            return ""
        lines = self._log.read_text(errors="replace").splitlines()
        errors = [line for line in lines if re.match(r"E\d{4} |error: ", line)] or lines
        return f": {errors[-1].strip()}" if errors else ""

    def stop(self, seconds: float = 60) -> int:
        """End it: requests that are under way are answered, no others accepted. Killed if that takes too long.

        Returns its exit code.
        """
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(seconds)
        self.kill()
        return self.process.returncode

    def kill(self) -> None:
        """End it and the processes of its models at once, and remove what they leave."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for left in _SHARED_MEMORY.glob(f"{self._shared}*"):
            left.unlink(missing_ok=True)
        self._folder.cleanup()

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *raised: object) -> None:
        self.stop()


def _backends(installed: Installation, folder: Path) -> Path:
    """The folder of the backends; one in ``folder``, with this Python's stub beside the backend, if that has none."""
    if installed.stubs is None:
        return installed.backends
    stub = installed.stubs / sysconfig.get_python_version() / _STUB
    if not stub.is_file():
        raise MissingPackageError(f"the server's Python backend is not for Python {sysconfig.get_python_version()}")
    for backend in installed.backends.iterdir():
        (folder / backend.name).mkdir()
        for file in backend.iterdir():
            (folder / backend.name / file.name).symlink_to(file)
    (folder / "python" / _STUB).symlink_to(stub)
    return folder


def _end_with_parent() -> None:
    """Be told to stop when the parent ends, however it ends: nobody else would know of this process."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def _environment() -> dict[str, str]:
    variables = dict(os.environ)
    # Not resolved: it may be a link, and the folder that it lies in is what makes it this environment's.
    variables["PATH"] = os.pathsep.join([str(Path(sys.executable).absolute().parent), os.environ.get("PATH", "")])
    library = python_library()
    if library is not None:
        variables["LD_LIBRARY_PATH"] = os.pathsep.join(
            filter(None, [str(library), os.environ.get("LD_LIBRARY_PATH", "")])
        )
    return variables
