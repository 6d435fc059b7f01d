"""PyTorch's view of the GPUs that the stub has: what ``torch.cuda`` says of devices, streams and events.

PyTorch's own CUDA needs more than a stub, and none of it is needed: the memory is the CPU's. So tensors of the CPU pose
as a GPU's, and of ``torch.cuda`` the functions are replaced that Triton's driver and ours ask; only those that this
PyTorch has. Nothing of Triton's is touched, and nothing of ours. It lasts as long as the process.
"""

import ctypes
import os
from types import SimpleNamespace
from typing import Any

import torch

from tests.driver.stub import Stub

_MULTIPROCESSORS = 16  # of torch's attributes of a device: CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT
_MAJOR, _MINOR = 75, 76


class Memory:
    """An allocator that gives the same addresses again: from ``again`` on, of each size the first block, the next."""

    def __init__(self) -> None:
        self._blocks: dict[int, list[torch.Tensor]] = {}
        self._given: dict[int, int] = {}

    def again(self) -> None:
        self._given.clear()

    def __call__(self, index: int, shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Any:
        bytes_ = max(1, sum((size - 1) * stride for size, stride in zip(shape, strides)) + 1) * dtype.itemsize
        at = self._given[bytes_] = self._given.get(bytes_, -1) + 1
        blocks = self._blocks.setdefault(bytes_, [])
        if at == len(blocks):
            blocks.append(torch.zeros(bytes_, dtype=torch.uint8))
        return on_gpu(blocks[at].view(dtype).as_strided(shape, strides), index)


memory = Memory()


class OnGpu(torch.Tensor):
    """Says that it is on a GPU, and so do results of operations on it. What it allocates comes from ``memory``."""

    is_cuda = True
    device = torch.device("cuda", 0)  # type: ignore[assignment]

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        result = super().__torch_function__(function, types, arguments, options or {})
        if function is not torch.conv2d:
            return result
        own = memory(result.device.index, tuple(result.shape), result.stride(), result.dtype)  # as cuDNN's would be
        return own.copy_(result)

    def new_empty_strided(self, shape: Any, strides: Any, dtype: Any = None, **options: Any) -> torch.Tensor:
        return memory(self.device.index, tuple(shape), tuple(strides), dtype or self.dtype)

    def new_empty(self, *shape: Any, dtype: Any = None, **options: Any) -> torch.Tensor:
        shape = torch.Size(shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape)
        strides = torch.empty(shape, device="meta").stride()
        return memory(self.device.index, tuple(shape), strides, dtype or self.dtype)

    def new_zeros(self, *shape: Any, **options: Any) -> torch.Tensor:
        return self.new_empty(*shape, **options).zero_()


class OnGpu1(OnGpu):
    device = torch.device("cuda", 1)  # type: ignore[assignment]


class OnGpu2(OnGpu):
    device = torch.device("cuda", 2)  # type: ignore[assignment]


def on_gpu(tensor: torch.Tensor, index: int = 0) -> Any:
    return tensor.as_subclass((OnGpu, OnGpu1, OnGpu2)[index])


class Gpus:
    """The stub's devices, for PyTorch. ``stream`` is the current stream of all, a handle of the driver's."""

    def __init__(self, stub: Stub) -> None:
        self.stub, self.stream = stub, 0
        self.current = -1
        self._empty = torch.empty
        self._select(0)

    def install(self) -> None:
        """Before resnet_fast is imported, which keeps some of PyTorch's functions."""
        gpus = self

        class Device:
            """Of ``torch.cuda.device``."""

            def __init__(self, device: Any) -> None:
                self._index = gpus.index(device)

            def __enter__(self) -> None:
                self._before = gpus.current
                gpus._select(self._index)

            def __exit__(self, *exception: object) -> None:
                gpus._select(self._before)

        class Stream:
            """Of ``torch.cuda.Stream``: the one that is current."""

            def __init__(self, device: Any = None) -> None:
                self.cuda_stream = gpus.stream

            def wait_event(self, event: "Event") -> None:
                gpus.stub("cuStreamWaitEvent", ctypes.c_void_p(self.cuda_stream), ctypes.c_void_p(event.handle), 0)

        class Event:
            """Of ``torch.cuda.Event``."""

            def __init__(self, **options: Any) -> None:
                self.handle = gpus.stub.make("cuEventCreate", 0)

            def record(self, stream: Stream) -> None:
                gpus.stub("cuEventRecord", ctypes.c_void_p(self.handle), ctypes.c_void_p(stream.cuda_stream))

        _replace(torch._C, _cuda_getCurrentRawStream=lambda index: gpus.stream)
        _replace(torch.Tensor, record_stream=lambda tensor, stream: None)
        _replace(torch, empty=self._allocate)
        _replace(
            torch.cuda,
            is_available=lambda: True,
            device_count=lambda: 3,
            current_device=lambda: gpus.current,
            set_device=lambda device: gpus._select(gpus.index(device)),
            device=Device,
            get_device_capability=lambda device=None: (
                gpus.attribute(device, _MAJOR),
                gpus.attribute(device, _MINOR),
            ),
            get_device_properties=lambda device=None: SimpleNamespace(
                name="a GPU of the stub", multi_processor_count=gpus.attribute(device, _MULTIPROCESSORS)
            ),
            current_stream=Stream,
            Event=Event,
            is_current_stream_capturing=lambda: False,
        )

    def index(self, device: Any) -> int:
        index = getattr(device, "index", device)
        return self.current if index is None else index

    def attribute(self, device: Any, number: int) -> int:
        value = ctypes.c_int()
        self.stub("cuDeviceGetAttribute", ctypes.byref(value), number, self.index(device))
        return value.value

    def _select(self, index: int) -> None:
        """As the CUDA runtime does it: the primary context of that device becomes the thread's."""
        if index != self.current:
            self.stub("cuCtxSetCurrent", ctypes.c_void_p(self.stub.make("cuDevicePrimaryCtxRetain", index)))
            self.current = index

    def _allocate(self, *arguments: Any, device: Any = None, **options: Any) -> torch.Tensor:
        """``torch.empty``, which on a GPU takes the stub's memory."""
        if device is None or torch.device(device).type != "cuda":
            return self._empty(*arguments, device=device, **options)
        like = self._empty(*arguments, device="meta", **options)
        return memory(torch.device(device).index, tuple(like.shape), like.stride(), like.dtype)


def _replace(owner: Any, **values: Any) -> None:
    """Of a name that is not there, the test must not make one: users' PyTorch has none either."""
    for name, value in values.items():
        getattr(owner, name)
        setattr(owner, name, value)


def install(stub: Stub) -> Gpus:
    os.environ["RESNET_FAST_MEASURE"] = "0"  # a first call has nothing here that could be timed
    gpus = Gpus(stub)
    gpus.install()
    return gpus
