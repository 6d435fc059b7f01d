"""A GPU that is not there: kernels are compiled for it and launched through Triton's own code, down to the C launcher.

Only the last step is replaced, the C function that would hand the arguments to the driver: it notes them. Tensors of
the CPU pose as a GPU's. Streams are numbers, whichever ``Driver.stream`` says is current; what PyTorch would have them
wait for is noted.
"""

import contextlib
import os
import types
from collections.abc import Iterator
from typing import Any, NamedTuple, Optional
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.runtime.driver import driver

from resnet_fast.kernels import streams
from resnet_fast.kernels.triton import device, operands


class Started(NamedTuple):
    """One call of the C launcher."""

    grid: tuple[int, int, int]
    stream: int
    function: str
    hooks: tuple[Any, Any]
    arguments: tuple[Any, ...]  # all of the kernel's, constants too


class _Utils:
    """Of Triton's driver: loads nothing, launches nothing."""

    def __init__(self, driver: "Driver") -> None:
        self._driver = driver

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple:
        return object(), f"{name} on {device}", 0, 0, 1024

    def unload_module(self, module: Any) -> None:
        pass

    def build_signature_metadata(self, signature: list[str]) -> bytes:
        return b""

    def fill_tma_descriptor_tiled(self, address, swizzle, size, kind, block, shape, strides, padding) -> tuple:
        return "descriptor", address, tuple(block), tuple(shape), tuple(strides)

    fill_tma_descriptor = fill_tma_descriptor_tiled  # its name up to Triton 3.7

    def launcher(self, **source: Any) -> types.SimpleNamespace:
        """What Triton up to 3.7 compiles for each kernel: a module whose launcher takes all arguments one by one."""
        return types.SimpleNamespace(launch=self._launch_listed)

    def _launch_listed(self, *arguments: Any) -> None:
        # Triton 3.4 knows one kind of scratch memory, later ones two: it comes before the kernel's metadata.
        at = next(i for i, value in enumerate(arguments) if i > 6 and isinstance(value, tuple))
        self.launch(*arguments[:7], *arguments[at : at + 4], arguments[at + 4 :])

    def launch(self, x, y, z, stream, function, cooperative, pdl, packed, metadata, enter, leave, *rest) -> None:
        if enter is not None:
            enter(metadata)
        if self._driver.started is not None:
            self._driver.started.append(Started((x, y, z), stream, function, (enter, leave), tuple(rest[-1])))
        if leave is not None:
            leave(metadata)


class Driver:
    """As much of Triton's driver of NVIDIA GPUs as compiling and launching ask for."""

    launcher_cls = nvidia.CudaLauncher

    def __init__(self, capability: int = 90) -> None:
        self._target = GPUTarget("cuda", capability, 32)
        self.utils = _Utils(self)
        self.started: Optional[list[Started]] = []  # None: nothing is noted
        self.reset()

    def reset(self) -> None:
        self.stream, self.device, self.capturing = 0, 0, False
        self.waits: list[tuple[int, int]] = []  # the stream that waits, and the one that it waits for
        self.in_use: list[tuple[int, int]] = []  # addresses that the allocator was told of, and the streams

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return self.stream


class OnGpu(torch.Tensor):
    """Says that it is on GPU 0. Results of operations on it are ordinary tensors."""

    is_cuda = True
    device = torch.device("cuda", 0)  # type: ignore[assignment]
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]


def on_gpu(tensor: torch.Tensor) -> OnGpu:
    return tensor.as_subclass(OnGpu)


_driver = Driver()  # one for all: what Triton has compiled keeps the launcher it was given


class _Device:
    """Of ``torch.cuda.device``: makes the GPU of that number the current one."""

    def __init__(self, device: Any) -> None:
        self._index = getattr(device, "index", device)

    def __enter__(self) -> None:
        self._before, _driver.device = _driver.device, self._index

    def __exit__(self, *exception: object) -> None:
        _driver.device = self._before


class _Stream:
    """Of ``torch.cuda.Stream``: the one that is current."""

    def __init__(self, device: Any = None) -> None:
        self.number = _driver.stream

    def wait_event(self, event: "_Event") -> None:
        # What CUDA says to a stream that is captured and to an event that was (errors 905 and 907).
        assert not _driver.capturing, "a dependency which crosses the capture sequence boundary"
        assert event.stream is not None, "an event which was last recorded in a capturing stream"
        _driver.waits.append((self.number, event.stream))


class _Event:
    """Of ``torch.cuda.Event``: which stream it was recorded on; None in a capture."""

    def record(self, stream: _Stream) -> None:
        self.stream = None if _driver.capturing else stream.number


def _record_stream(tensor: torch.Tensor, stream: _Stream) -> None:
    _driver.in_use.append((tensor.data_ptr(), stream.number))


def _architecture(device: torch.device) -> str:
    return "sm_90"


def _allocate(x: torch.Tensor, shape: tuple[int, ...], dtype: Optional[torch.dtype] = None) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype or x.dtype, memory_format=torch.channels_last)


def _launchers(fake: Driver) -> Any:
    """Replaces what Triton's launchers take from C."""
    if hasattr(nvidia, "PyKernelArg"):
        return mock.patch.object(nvidia, "PyKernelArg", lambda nested_tuple, type: type)
    return mock.patch.multiple(nvidia, compile_module_from_src=fake.utils.launcher, library_dirs=list)


@contextlib.contextmanager
def installed() -> Iterator[Driver]:
    """Makes a fake GPU of compute capability 9.0 the active one, for Triton, for our plans and for streams."""
    fake = _driver
    fake.reset()
    fake.started = None
    before = dict(vars(driver))
    with (
        mock.patch.dict(os.environ, {"RESNET_FAST_MEASURE": "0"}),
        mock.patch.object(device, "architecture", _architecture),
        mock.patch.object(operands, "allocate", _allocate),
        _launchers(fake),
        mock.patch.object(streams, "current", fake.get_current_stream),
        mock.patch.multiple(
            torch.cuda,
            Event=_Event,
            current_stream=_Stream,
            device=_Device,
            is_current_stream_capturing=lambda: fake.capturing,
        ),
        mock.patch.object(torch.Tensor, "record_stream", _record_stream),
    ):
        driver.set_active(fake)
        try:
            yield fake
        finally:
            vars(driver).update(before)
