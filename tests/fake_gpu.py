"""A GPU that is not there: kernels are compiled for it and launched through Triton's own code, down to the C launcher.

Only the last step is replaced, the C function that would hand the arguments to the driver: it notes them. Tensors of
the CPU pose as a GPU's.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple, Optional

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.runtime.driver import driver

from resnet_fast.kernels.triton import launch


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
        self.stream, self.device = 0, 0
        self.started: Optional[list[Started]] = []  # None: nothing is noted

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


@contextlib.contextmanager
def installed() -> Iterator[Driver]:
    """Makes a fake GPU of compute capability 9.0 the active one, for Triton and for ``launch``."""
    fake = _driver
    fake.stream, fake.device, fake.started = 0, 0, None
    names = ("architecture", "allocate")
    before = [getattr(launch, name) for name in names]
    launcher = nvidia.PyKernelArg
    active = driver._active
    driver.set_active(fake)
    launch.architecture = lambda device: "sm_90"
    launch.allocate = lambda x, shape: torch.empty(shape, dtype=x.dtype, memory_format=torch.channels_last)
    nvidia.PyKernelArg = lambda nested_tuple, type: type
    try:
        yield fake
    finally:
        for name, value in zip(names, before):
            setattr(launch, name, value)
        nvidia.PyKernelArg = launcher
        driver._active = active
