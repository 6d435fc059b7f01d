"""An ONNX file called like the PyTorch model that it was exported from."""

import contextlib
import functools
import json
import os
import threading
from collections import namedtuple
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, Optional, Union

import torch
from torch import Tensor

from resnet_fast.export.onnx_providers import (
    CPU,
    PREFERRED,
    TENSORRT,
    Options,
    ProviderError,
    Shape,
    explained,
    gpu_options,
    open_session,
    profile_for,
    refusal,
    tensorrt_options,
)
from resnet_fast.utils.devices import gpu_missing
from resnet_fast.utils.optional import require

_TYPES = {  # ONNX Runtime's name: PyTorch's type, ONNX's number
    "tensor(float)": (torch.float32, 1),
    "tensor(uint8)": (torch.uint8, 2),
    "tensor(int32)": (torch.int32, 6),
    "tensor(int64)": (torch.int64, 7),
    "tensor(float16)": (torch.float16, 10),
    "tensor(double)": (torch.float64, 11),
    "tensor(bfloat16)": (torch.bfloat16, 16),
}


class Argument(NamedTuple):
    """An input or output of the file; ``code`` is ONNX's number for ``dtype``."""

    name: str
    dtype: torch.dtype
    code: int
    shape: Shape


class OnnxModel:
    """Runs an ONNX file in ONNX Runtime, on TensorRT, CUDA or the CPU, with PyTorch tensors in and out.

    ``model(x)`` takes what the file's only input takes, with any strides, and gives its output on the same device. For
    a file of ``export_onnx`` that is float32 ``[batch, channels, height, width]`` to float32 ``[batch, classes]``;
    with preprocessing inside, uint8 ``[batch, height, width, channels]``. Several outputs come as a named tuple, in the
    file's order. Gradients there are none.

    On a GPU, ONNX Runtime reads and writes PyTorch's memory, so that nothing goes through the host. It works on a CUDA
    stream that waits for PyTorch's current one, and that stream waits for it; a call returns before the result is
    there, as PyTorch's do. This route follows the documentation of ONNX Runtime and was never run.

    Several threads may call one model. ``copy`` and ``pickle`` keep the arguments, and open the file again.

    Args:
        path: an ONNX file with one input.
        device: where ``x`` lies, "cpu" or "cuda"; by default "cuda" where PyTorch and a provider can use it.
        providers: names of ONNX Runtime's execution providers, best first; by default TensorRT, CUDA and CPU on a GPU,
            and CPU on the CPU. Those that do not work are left out; ``refused`` says why.
        cache: folder for TensorRT's engines, by default in the cache folder of resnet_fast.
        profile: smallest shape of ``x`` that TensorRT's engine takes, the one that it is optimised for, and the
            largest. By default batches of 1, 8 and 32, with pictures of 64x64, 480x640 and 1080x1920 where the file
            takes any size. A shape outside makes TensorRT build an engine again.
        threads: of a call on the CPU, as many as PyTorch uses by default. They wait busily within a call, but not
            after it, where ONNX Runtime's own default takes processors from what runs next.

    Attributes:
        path: of the file.
        device: where ``x`` must lie.
        providers: ONNX Runtime's providers in use, best first.
        refused: why a provider is not in use, by its name.
        metadata: what the file says about itself, as text.
        classes: names of the classes, or None.
        input: name, type and shape of ``x``.
        outputs: the same of the results.

    Raises:
        FileNotFoundError: there is no file ``path``.
        ValueError: ONNX Runtime cannot load ``path``, it has several inputs, or another argument does not fit.
        ProviderError: no provider that was asked for works, or none that reaches the device that was asked for.
        MissingPackageError: ONNX Runtime is not installed.
        OSError: ``cache`` cannot be written.
    """

    def __init__(
        self,
        path: Union[str, os.PathLike],
        *,
        device: Union[str, torch.device, None] = None,
        providers: Optional[Sequence[str]] = None,
        cache: Union[str, os.PathLike, None] = None,
        profile: Optional[Sequence[Sequence[int]]] = None,
        threads: Optional[int] = None,
    ) -> None:
        runtime = require("onnxruntime", "running an ONNX file")
        if not os.path.isfile(path):
            raise FileNotFoundError(f"path is {str(path)!r}, expected an ONNX file")
        if threads is not None and (not isinstance(threads, int) or threads < 1):
            raise ValueError(f"threads is {threads!r}, expected a positive integer")
        if providers is not None and (isinstance(providers, str) or not providers):
            raise ValueError(f"providers is {providers!r}, expected names, such as {list(PREFERRED)}")
        self.path = Path(path)
        self._again: Callable[[], OnnxModel] = functools.partial(
            OnnxModel,
            self.path.absolute(),
            device=device,
            providers=providers,
            cache=cache,
            profile=profile,
            threads=threads,
        )
        self.device = _device(device)
        # Its own, since a session takes one for life, and PyTorch's default stream is 0, which would mean none.
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._turn = threading.Lock()  # for the stream

        names = tuple(providers or (PREFERRED if self._stream else (CPU,)))
        self.refused = {name: reason for name in names if (reason := refusal(runtime, name))}
        usable: dict[str, Options] = {name: {} for name in names if name not in self.refused}
        for name, options in usable.items():
            if self._stream and name != CPU:
                options |= gpu_options(self._stream.device_index, self._stream.cuda_stream)
            if name == TENSORRT:
                options |= tensorrt_options(self.path, profile, cache)
        self._session = open_session(runtime, os.fspath(path), _settings(runtime, threads), usable, self.refused)
        self.providers: tuple[str, ...] = tuple(self._session.get_providers())
        if self._stream and self.providers == (CPU,):
            if device is not None:
                raise ProviderError(f"device is {str(device)!r}, and no provider reaches it: {explained(self.refused)}")
            self.device, self._stream = torch.device("cpu"), None

        self.input, self.outputs = _signature(self.path, self._session)
        if profile is not None:
            profile_for(self.input.shape, profile)
        self._result = _result(self.outputs)
        self._run_options = runtime.RunOptions()
        if self._stream:  # no waiting for the GPU; streams wait for each other
            self._run_options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        self.metadata: dict[str, str] = dict(self._session.get_modelmeta().custom_metadata_map)
        classes = json.loads(self.metadata.get("classes", "null"))
        self.classes: Optional[tuple[str, ...]] = None if classes is None else tuple(classes)

    def __call__(self, x: Tensor) -> Any:
        """Run the file on ``x``.

        Raises:
            TypeError: ``x`` is no tensor, or one of another type than the file takes.
            ValueError: ``x`` has another shape than the file takes, lies on another device, or wants gradients.
        """
        self._check(x)
        x = x.detach().contiguous()
        results = [torch.empty(self._extents(out, x), dtype=out.dtype, device=x.device) for out in self.outputs]
        if len(x) > 0:
            binding = self._session.io_binding()
            place = (x.device.type, x.device.index or 0)
            binding.bind_input(self.input.name, *place, self.input.code, x.shape, x.data_ptr())
            for out, result in zip(self.outputs, results):
                binding.bind_output(out.name, *place, out.code, result.shape, result.data_ptr())
            with self._on_stream([x, *results]):
                self._session.run_with_iobinding(binding, self._run_options)
        return self._result(*results)

    def warm_up(self, batch_sizes: Sequence[int] = (1,), image_size: Optional[tuple[int, int]] = None) -> None:
        """Call the model on zeros, and wait: engines are built and memory is taken now, not by the first request.

        Args:
            batch_sizes: of the calls.
            image_size: ``(height, width)``, where the file takes any.
        """
        for batch in batch_sizes:
            sizes = iter(image_size or ())
            shape = [batch] + [extent if isinstance(extent, int) else next(sizes, 0) for extent in self.input.shape[1:]]
            if 0 in shape[1:] or next(sizes, None) is not None:
                raise ValueError(f"image_size is {image_size}, which does not fit an input of {list(self.input.shape)}")
            self(torch.zeros(shape, dtype=self.input.dtype, device=self.device))
        if self._stream:
            self._stream.synchronize()

    def explain(self) -> str:
        """Tell in a line for each provider how many nodes of the graph it took, or why it is not in use."""
        nodes = dict.fromkeys(self.providers, 0)
        for part in self._session.get_provider_graph_assignment_info():
            nodes[part.ep_name] = nodes.get(part.ep_name, 0) + len(part.get_nodes())
        lines = [f"{name}: {count} nodes" for name, count in nodes.items()]
        return "\n".join(lines + [f"{name}: not used, {reason}" for name, reason in self.refused.items()])

    def __repr__(self) -> str:
        return f"OnnxModel({str(self.path)!r}, device={str(self.device)!r}, providers={self.providers})"

    def __reduce__(self) -> tuple:
        return self._again, ()

    def _check(self, x: Tensor) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"x is {type(x).__name__}, expected a torch.Tensor")
        if x.dtype != self.input.dtype:
            raise TypeError(f"x is {x.dtype}, expected {self.input.dtype}, which {self.path.name} takes")
        wanted = self.input.shape
        fits = len(x.shape) == len(wanted) and all(
            not isinstance(want, int) or want == extent for want, extent in zip(wanted, x.shape)
        )
        if not fits or 0 in x.shape[1:]:
            raise ValueError(f"x has shape {list(x.shape)}, expected [{', '.join(map(str, wanted))}]")
        if x.device != self.device:
            raise ValueError(f"x is on {x.device}, expected {self.device}: {self.explain()}")
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError("x requires gradients, which ONNX Runtime does not compute: pass x.detach()")

    def _extents(self, out: Argument, x: Tensor) -> list[int]:
        known = {name: extent for name, extent in zip(self.input.shape, x.shape) if isinstance(name, str)}
        extents = []
        for place, extent in enumerate(out.shape):
            # Other exporters name the batch anew in the output. ONNX Runtime checks the shape that comes of it.
            extents.append(extent if isinstance(extent, int) else known.get(extent or "", len(x) if place == 0 else 0))
        return extents

    @contextlib.contextmanager
    def _on_stream(self, tensors: Sequence[Tensor]) -> Iterator[None]:
        """Work of the session, ordered after what PyTorch's current stream has to do, and before what it gets next."""
        if self._stream is None:
            yield
            return
        current = torch.cuda.current_stream(self.device)
        with self._turn, torch.cuda.device(self.device):  # ONNX Runtime sets the thread's device, and leaves it so
            self._stream.wait_stream(current)
            yield
            current.wait_stream(self._stream)
        for tensor in tensors:  # so that its memory is not given to others while the stream still uses it
            tensor.record_stream(self._stream)


def _device(device: Union[str, torch.device, None]) -> torch.device:
    """Return the device, a GPU with its index, as tensors have it."""
    reason = gpu_missing()
    if device is None:
        device = "cpu" if reason else "cuda"
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device is {device!r}, expected 'cpu' or 'cuda'") from error
    if chosen.type not in ("cpu", "cuda"):
        raise ValueError(f"device is {str(device)!r}, expected 'cpu' or 'cuda'")
    if chosen.type == "cpu":
        return torch.device("cpu")
    if reason:
        raise ProviderError(f"device is {str(device)!r}, but {reason}")
    return torch.device("cuda", torch.cuda.current_device() if chosen.index is None else chosen.index)


def _settings(runtime: ModuleType, threads: Optional[int]) -> Any:
    settings = runtime.SessionOptions()
    settings.intra_op_num_threads = threads or torch.get_num_threads()
    settings.log_severity_level = 3
    settings.add_session_config_entry("session.force_spinning_stop", "1")  # when a call ends
    settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")  # for explain
    return settings


def _signature(path: Path, session: Any) -> tuple[Argument, tuple[Argument, ...]]:
    """The input and the outputs, all of types and shapes that ``__call__`` can handle."""
    inputs = session.get_inputs()
    if len(inputs) != 1:
        raise ValueError(f"path is {str(path)!r}, which has {len(inputs)} inputs, expected one")
    arguments = []
    for value in (*inputs, *session.get_outputs()):
        if value.type not in _TYPES:
            raise ValueError(f"path is {str(path)!r}, where {value.name!r} is a {value.type}, expected {[*_TYPES]}")
        arguments.append(Argument(value.name, *_TYPES[value.type], tuple(value.shape)))
    source, *results = arguments
    for result in results:
        unknown = [extent for extent in result.shape[1:] if extent is None or isinstance(extent, str)]
        if any(extent is None or extent not in source.shape for extent in unknown):
            raise ValueError(
                f"path is {str(path)!r}, whose output {result.name!r} has shape {list(result.shape)}: expected "
                f"numbers, or names from the input's {list(source.shape)}"
            )
    return source, tuple(results)


def _result(outputs: Sequence[Argument]) -> Callable[..., Any]:
    """Return what makes the result of a call from the tensors of all outputs."""
    if len(outputs) == 1:
        return lambda tensor: tensor
    return namedtuple("Outputs", [out.name for out in outputs], rename=True)
