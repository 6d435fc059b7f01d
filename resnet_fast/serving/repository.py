"""A model repository: the folder that NVIDIA Triton Inference Server reads its models from."""

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Optional, Union

import torch
from torch import nn

import resnet_fast
from resnet_fast.export.folding import stock_copy
from resnet_fast.export.metadata import gather
from resnet_fast.export.to_onnx import ExportResult, export_onnx
from resnet_fast.models.named import build
from resnet_fast.serving.config import (
    LABELS,
    MARK,
    Batching,
    Signature,
    onnxruntime_config,
    python_config,
    shape,
    template_of,
)

_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
_CLIENT = {"TYPE_FP32": ("FP32", "float32"), "TYPE_FP16": ("FP16", "float16"), "TYPE_UINT8": ("UINT8", "uint8")}


@dataclass(frozen=True)
class Repository:
    """What ``write_repository`` wrote.

    Attributes:
        folder: the repository.
        models: the names of the models written: that of the Python backend, and that of the ONNX Runtime backend.
        runtime: what computes in the Python backend: "torch" or "onnxruntime".
        export: of the ONNX file.
    """

    folder: Path
    models: tuple[str, str]
    runtime: str
    export: ExportResult

    @property
    def readme(self) -> Path:
        """How to start a server on them, and to ask it."""
        return self.folder / self.models[0] / "README.md"


def write_repository(
    model: nn.Module,
    folder: Union[str, os.PathLike],
    *,
    name: str,
    architecture: Optional[str] = None,
    max_batch: int = 16,
    queue_delay: int = 1000,
    instances: int = 1,
    threads: int = 0,
    overwrite: bool = False,
    **export: Any,
) -> Repository:
    """Write ``model``, a classifier, into the model repository ``folder``, twice: for a server anywhere and with a GPU.

    ``NAME`` is for the server's Python backend, ``NAME_onnx`` for its ONNX Runtime backend with TensorRT; a README.md
    in ``NAME`` says how to start and to ask them. Both appear whole or not at all, beside the models that the
    repository has already.

    Args:
        model: what ``export_onnx`` takes.
        folder: a new or empty folder, or a model repository; its parent must exist.
        name: of the model, in requests and as the name of its folder: letters, digits, ``_``, ``.`` and ``-``.
        architecture: how to build the model anew, as ``resnet50`` or ``timm:resnet50d``. Then the Python backend runs
            it in PyTorch, accelerated; otherwise, and where the ONNX file computes more (8 bits, preprocessing), it
            runs the file in ONNX Runtime.
        max_batch: most images in a request, and in the batches that the server makes of several.
        queue_delay: microseconds that a request may wait for others to share a batch with.
        instances: copies of the model on each GPU, or on the CPU.
        threads: of an instance on a CPU; 0 shares the cores among the instances.
        overwrite: replace models of these names, if this function wrote them.
        export: for ``export_onnx``: ``precision``, ``input_size``, ``classes``, ``weights`` and so on.

    Raises:
        ValueError: an argument has a value that cannot be served, or ``architecture`` builds another model.
        FileExistsError: ``folder`` is no model repository, or has such models and may not replace them.
        FileNotFoundError: the parent of ``folder`` does not exist.
        Whatever ``export_onnx`` raises.
    """
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name, re.ASCII):
        raise ValueError(f"name is {name!r}, expected letters, digits, '_', '.' and '-'")
    for label, value, least in (
        ("max_batch", max_batch, 1),
        ("queue_delay", queue_delay, 0),
        ("instances", instances, 1),
        ("threads", threads, 0),
    ):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{label} is {value!r}, expected an integer of at least {least}")
    if not export.get("dynamic_batch", True):
        raise ValueError("dynamic_batch is False, expected True: the server makes batches of any size")
    names = (name, f"{name}_onnx")
    target = Path(os.path.realpath(folder))
    _check_target(target, folder, names, overwrite)

    batching = Batching(max_batch, queue_delay, instances)
    with _beside(target) as temporary:
        for one in names:
            (temporary / one / "1").mkdir(parents=True)
        file = temporary / names[1] / "1" / "model.onnx"
        result = export_onnx(model, file, **export)
        signature = Signature.of(file)
        labels = _labels(model, export)
        dtype = _DTYPES.get(export.get("precision", "fp32"))
        runtime = "torch" if architecture is not None and dtype is not None and signature.plain else "onnxruntime"
        title = architecture or type(model).__name__
        parameters = {"runtime": runtime, "threads": str(threads)}
        if runtime == "torch":
            assert architecture is not None
            assert dtype is not None
            classes = signature.outputs[0].dims[0]
            torch.save(_state(model, architecture, classes), temporary / name / "1" / "weights.pt")
            parameters |= {"model": architecture, "classes": str(classes), "dtype": dtype}
        else:
            shutil.copyfile(file, temporary / name / "1" / "model.onnx")
        code = files("resnet_fast.serving").joinpath("files", "model.py").read_text(encoding="utf-8")
        texts = {
            f"{name}/1/model.py": code,
            f"{name}/config.pbtxt": python_config(name, title, signature, batching, bool(labels), **parameters),
            f"{names[1]}/config.pbtxt": onnxruntime_config(names[1], title, signature, batching, bool(labels)),
            f"{name}/README.md": _readme(name, title, runtime, signature, batching),
        }
        if labels:
            texts |= {f"{one}/{LABELS}": "".join(f"{label}\n" for label in labels) for one in names}
        for place, text in texts.items():
            (temporary / place).write_text(text, encoding="utf-8")
        _check_target(target, folder, names, overwrite)  # others may have written there meanwhile
        _move(temporary, target, names)
    path = Path(folder, file.relative_to(temporary))
    return Repository(Path(folder), names, runtime, replace(result, path=path))


def _check_target(target: Path, folder: Union[str, os.PathLike], names: Sequence[str], overwrite: bool) -> None:
    """Raise, before anything is computed, where ``_move`` could not end well."""
    if not target.parent.is_dir():
        raise FileNotFoundError(f"folder is {str(folder)!r}, but {str(target.parent)!r} does not exist")
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"folder is {str(folder)!r}, a file; expected a model repository or a new folder")
    held = [entry for entry in target.iterdir() if not entry.name.startswith(".")] if target.exists() else []
    strange = [entry.name for entry in held if not (entry / "config.pbtxt").is_file()]
    if strange:
        raise FileExistsError(
            f"folder is {str(folder)!r}, which holds {strange[0]!r}; expected a model repository or a new folder"
        )
    for name in {entry.name for entry in held} & set(names):
        if not overwrite:
            raise FileExistsError(f"folder is {str(folder)!r}, which has a model {name!r}: overwrite=True replaces it")
        if not (target / name / "config.pbtxt").read_text(encoding="utf-8", errors="replace").startswith(MARK):
            raise FileExistsError(f"folder is {str(folder)!r}, whose model {name!r} was not written by resnet-fast")


@contextlib.contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """A temporary folder in the one that ``target`` lies in, so that what is in it can be moved there at once."""
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        temporary.mkdir()
    except OSError as error:
        raise type(error)(error.errno, f"cannot write beside folder {str(target)!r}: {error.strerror}") from error
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _move(temporary: Path, target: Path, names: Sequence[str]) -> None:
    """Move the models from ``temporary`` to ``target``, in place of those that are there; or change nothing."""
    replaced = temporary / ".replaced"
    replaced.mkdir()
    created = not target.exists()
    moves = [(target / name, replaced / name) for name in names if (target / name).exists()]
    moves += [(temporary / name, target / name) for name in names]
    done: list[tuple[Path, Path]] = []
    try:
        if created:
            target.mkdir()
        for source, destination in moves:
            source.rename(destination)
            done.append((source, destination))
    except BaseException:
        for source, destination in reversed(done):
            destination.rename(source)
        if created:
            target.rmdir()
        raise


def _labels(model: nn.Module, export: dict[str, Any]) -> Optional[Sequence[str]]:
    """The names of the classes, from where ``export_onnx`` takes them."""
    given = (export.get(key) for key in ("input_size", "classes", "mean", "std", "weights"))
    labels = gather(model, *given).classes
    broken = [label for label in labels or () if len(label.splitlines()) != 1]
    if broken:
        raise ValueError(f"classes has {broken[0]!r}, expected names of one line each")
    return labels


def _state(model: nn.Module, architecture: str, classes: int) -> dict[str, torch.Tensor]:
    """The state_dict of ``model``, known to fit what ``architecture`` builds."""
    state = stock_copy(model).state_dict()
    try:
        build(architecture, num_classes=classes).load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(
            f"architecture is {architecture!r}, which has other parameters than the model, a {type(model).__name__}"
        ) from error
    return state


def _readme(name: str, title: str, runtime: str, signature: Signature, batching: Batching) -> str:
    client, numpy = _CLIENT.get(signature.input.dtype, ("FP32", "float32"))
    described = [f"Input `{signature.input.name}`, {_shape_text(signature.input.dims)}, {numpy}."]
    described += [f"Output `{output.name}`, {_shape_text(output.dims)}." for output in signature.outputs]
    return template_of("README.md").substitute(
        title=title,
        version=resnet_fast.__version__,
        name=name,
        runtime="PyTorch with this package's kernels" if runtime == "torch" else "ONNX Runtime",
        ports=" ".join(described),
        max_batch=batching.max_batch,
        input=signature.input.name,
        output=signature.outputs[0].name,
        example_dims=", ".join(map(str, signature.input.example)),
        client_dtype=client,
        numpy_dtype=numpy,
        min_shape=shape(signature, 1),
        opt_shape=shape(signature, batching.usual),
        max_shape=shape(signature, batching.max_batch),
    )


def _shape_text(dims: Sequence[int]) -> str:
    return f"`[{', '.join(['batch', *('any' if extent == -1 else str(extent) for extent in dims)])}]`"
