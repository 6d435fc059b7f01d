"""The stub of ``libcuda.so.1`` (libcuda.c): compiled, put where Triton and ours find it, and what it recorded."""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import triton

_KEPT = 256  # entries, in libcuda.c
_NAME = "libcuda.so.1"
_INCLUDE = Path(triton.__file__).parent / "backends/nvidia/include"

COMPILER = shutil.which(os.environ.get("CC", "cc"))


class _Entry(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_uint32) for name in ("kind", "device")),
        ("grid", ctypes.c_uint32 * 3),
        *((name, ctypes.c_uint32) for name in ("threads", "shared", "bytes", "count")),
        *((name, ctypes.c_uint64) for name in ("stream", "other")),
        ("name", ctypes.c_char * 256),
        *((name, ctypes.c_uint16 * 64) for name in ("offsets", "sizes")),
        ("block", ctypes.c_uint8 * 4096),
    )


class Launch(NamedTuple):
    """A kernel that was started, with the block of its parameters as the GPU would have got it."""

    name: str
    device: int
    grid: tuple[int, ...]
    threads: int
    shared: int
    stream: int
    function: int
    parameters: tuple[bytes, ...]
    block: bytes


class Ordering(NamedTuple):
    """An event that was recorded on a stream, or waited for by one."""

    kind: str
    stream: int
    event: int


class Stub:
    """The library, loaded into this process as ``libcuda.so.1``, for whoever asks for that name later."""

    def __init__(self, folder: Path) -> None:
        """Compile it into ``folder``."""
        assert COMPILER is not None
        path = folder / _NAME
        source = Path(__file__).with_name("libcuda.c")
        flags = ["-std=gnu11", "-O2", "-Wall", "-Werror", "-shared", "-fPIC", f"-Wl,-soname,{_NAME}"]
        subprocess.run([COMPILER, *flags, f"-I{_INCLUDE}", str(source), "-o", str(path)], check=True)
        (folder / "libcuda.so").symlink_to(path)  # the name by which Triton up to 3.5 links to it
        os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
        self.cuda = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        self.cuda.stub_entries.restype = ctypes.POINTER(_Entry)

    def __call__(self, name: str, *arguments: object) -> None:
        """Call a function of the driver's; raises what it refuses."""
        code = getattr(self.cuda, name)(*arguments)
        if code:
            text = ctypes.c_char_p()
            self.cuda.cuGetErrorString(code, ctypes.byref(text))
            raise RuntimeError(f"{name}: {(text.value or b'').decode()}")

    def make(self, name: str, *arguments: object) -> int:
        """What a function of the driver's makes: a handle."""
        handle = ctypes.c_void_p()
        self(name, ctypes.byref(handle), *arguments)
        assert handle.value is not None
        return handle.value

    def quiet(self, wanted: bool) -> None:
        """Whether launches are neither checked nor recorded, so that a call can be timed."""
        self.cuda.stub_quiet(wanted)

    def taken(self) -> list:
        """What was recorded since the last time."""
        count = ctypes.c_size_t()
        entries = self.cuda.stub_entries(ctypes.byref(count))
        assert count.value < _KEPT, "some may be missing"
        found = [_read(entries[i]) for i in range(count.value)]
        self.cuda.stub_forget()
        return found


def _read(one: _Entry) -> object:
    if one.kind != 1:
        return Ordering("recorded" if one.kind == 2 else "waits", one.stream, one.other)
    block = bytes(one.block[: one.bytes])
    places = zip(one.offsets[: one.count], one.sizes[: one.count])
    parameters = tuple(block[at : at + size] for at, size in places)
    return Launch(
        one.name.decode(),
        one.device,
        tuple(one.grid),
        one.threads,
        one.shared,
        one.stream,
        one.other,
        parameters,
        block,
    )
