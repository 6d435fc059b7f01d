"""ONNX Runtime's execution providers: which of them work on this machine, why not the others, and their options.

``get_available_providers`` names what a build of ONNX Runtime was compiled with, and a session that cannot load one of
them goes on without it. So each is tried, and the reason kept.
"""

import contextlib
import ctypes
import hashlib
import importlib
import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, Optional, Union

import onnx

from resnet_fast.kernels.choices import cache_folder
from resnet_fast.utils.errors import first_line

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
TENSORRT = "TensorrtExecutionProvider"
PREFERRED = (TENSORRT, CUDA, CPU)

_LIBRARIES = {
    CUDA: "libonnxruntime_providers_cuda.so",
    TENSORRT: "libonnxruntime_providers_tensorrt.so",
}
_BATCHES = (1, 8, 32)
_SIZES = ((64, 64), (480, 640), (1080, 1920))

Options = dict[str, str]
Shape = Sequence[Union[int, str, None]]
"""Of an input or output: a number where an extent is fixed, else a name or None."""


class ProviderError(RuntimeError):
    """None of the execution providers that were asked for works on this machine."""


def refusal(runtime: ModuleType, provider: str) -> Optional[str]:
    """Return why ``provider`` cannot be used, as far as its libraries tell, or None.

    Loads the libraries of a GPU provider, which are then those that ONNX Runtime finds.
    """
    built = runtime.get_available_providers()
    if provider not in built:
        return f"this build of ONNX Runtime has {', '.join(built)}"
    if provider not in _LIBRARIES:
        return None
    if provider == TENSORRT and find_spec("tensorrt_libs") is not None:
        # The wheel's own folder is not among those that the loader searches; importing the package loads them.
        with contextlib.suppress(ImportError, OSError):
            importlib.import_module("tensorrt_libs")
    folder = Path(str(runtime.__file__)).parent / "capi"
    try:
        # Both providers take their functions from it.
        ctypes.CDLL(str(folder / "libonnxruntime_providers_shared.so"), mode=ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(folder / _LIBRARIES[provider]))
    except OSError as error:
        return str(error)
    return None


def open_session(
    runtime: ModuleType, path: str, settings: Any, providers: dict[str, Options], refused: dict[str, str]
) -> Any:
    """A session on those of ``providers``, best first, that work; the others go to ``refused``, with the reason.

    Raises:
        ValueError: ONNX Runtime cannot load ``path``.
        ProviderError: none works; the message has the reasons.
    """
    left = dict(providers)
    while left:
        try:
            session = runtime.InferenceSession(path, settings, providers=list(left.items()), enable_fallback=0)
        except Exception as error:  # ONNX Runtime's exceptions have no base of their own
            reason = first_line(error)
            on_gpu = [name for name in left if name in _LIBRARIES]
            if not on_gpu:
                raise ValueError(
                    f"path is {path!r}, which ONNX Runtime {runtime.__version__} cannot load: {reason}"
                ) from error
            failed = {on_gpu[0]: reason}
        else:
            # A CUDA provider that finds no device is left out without an exception.
            failed = {name: "ONNX Runtime could not start it" for name in left if name not in session.get_providers()}
            if not failed:
                return session
        refused |= failed
        left = {name: options for name, options in left.items() if name not in failed}
    raise ProviderError(f"none of providers works here: {explained(refused)}")


def explained(refused: dict[str, str]) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in refused.items())


def gpu_options(device_index: int, stream: int) -> Options:
    """Return what both GPU providers take: the device, and the CUDA stream, by its address, for all work."""
    return {"device_id": str(device_index), "has_user_compute_stream": "1", "user_compute_stream": str(stream)}


def tensorrt_options(
    path: Path, profile: Optional[Sequence[Sequence[int]]], cache: Union[str, os.PathLike, None]
) -> Options:
    """Options of TensorRT: engines that are kept, for one range of shapes, in the precision of the file.

    A kept engine is taken again for the same weights and the same range of shapes; a shape outside the range makes ONNX
    Runtime build another. Its cache goes by the graph, not by the weights, so every model
    gets a folder of its own. TensorRT 10, which ONNX Runtime 1.31 loads, wants each precision of the graph allowed
    again by a flag; TensorRT 11 has no such flags.

    Args:
        path: an ONNX file with one input.
        profile: see ``profile_for``.
        cache: where engines are kept; by default the cache folder of resnet_fast.

    Raises:
        ValueError: ``profile`` does not fit the file.
        OSError: the folder cannot be made.
    """
    root = Path(cache) if cache is not None else cache_folder() / "tensorrt"
    try:
        graph = onnx.load(path, load_external_data=False).graph
    except Exception as error:
        raise ValueError(f"path is {str(path)!r}, which is not an ONNX file: {error}") from error
    weights = {tensor.name for tensor in graph.initializer}
    source, *others = [value for value in graph.input if value.name not in weights] or [None]
    if source is None or others:
        raise ValueError(f"path is {str(path)!r}, expected an ONNX file with one input")
    shape = [dim.dim_value or None for dim in source.type.tensor_type.shape.dim]
    smallest, likeliest, largest = (
        f"{source.name}:{'x'.join(map(str, extents))}" for extents in profile_for(shape, profile)
    )
    folder = root / _digest(path, graph)
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise type(error)(error.errno, f"cache is {str(root)!r}, which cannot be written: {error.strerror}") from error
    types = {tensor.data_type for tensor in graph.initializer}
    precisions = {
        "trt_fp16_enable": onnx.TensorProto.FLOAT16 in types,
        "trt_bf16_enable": onnx.TensorProto.BFLOAT16 in types,
        "trt_int8_enable": any(node.op_type == "DequantizeLinear" for node in graph.node),
    }
    return {
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(folder),
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(root),
        "trt_profile_min_shapes": smallest,
        "trt_profile_opt_shapes": likeliest,
        "trt_profile_max_shapes": largest,
        **{name: "1" for name, wanted in precisions.items() if wanted},
    }


def profile_for(shape: Shape, given: Optional[Sequence[Sequence[int]]] = None) -> list[list[int]]:
    """Smallest, likeliest and largest shape of an input of ``shape``: ``given``, or what its open extents suggest.

    Raises:
        ValueError: ``given`` is not three shapes that grow and fit, or is None although more than batch, height and
            width is open.
    """
    fixed = [extent if isinstance(extent, int) else None for extent in shape]
    shapes = [list(one) for one in given] if given is not None else _usual(fixed)
    fit = len(shapes) == 3 and all(
        len(one) == len(fixed) and all(want in (None, extent) for want, extent in zip(fixed, one)) for one in shapes
    )
    if not fit or not all(1 <= low <= best <= high for low, best, high in zip(*shapes)):
        raise ValueError(f"profile is {given}, expected a smallest, a likeliest and a largest shape for {list(shape)}")
    return shapes


def _usual(fixed: list[Optional[int]]) -> list[list[int]]:
    """Three shapes, or none if it is not clear which extents are open."""
    places = [place for place, extent in enumerate(fixed) if extent is None and place > 0]
    if len(places) not in (0, 2):
        return []
    shapes = []
    for batch, size in zip(_BATCHES, _SIZES):
        likely = dict(zip(places, size)) | {0: batch}
        shapes.append([likely[place] if extent is None else extent for place, extent in enumerate(fixed)])
    return shapes


def _digest(path: Path, graph: onnx.GraphProto) -> str:
    """Hash the file and those beside it that hold its weights, if any do."""
    beside = {entry.value for tensor in graph.initializer for entry in tensor.external_data if entry.key == "location"}
    content = hashlib.sha256()
    for file in (path, *(path.parent / name for name in sorted(beside))):
        content.update(file.read_bytes())
    return content.hexdigest()[:32]
