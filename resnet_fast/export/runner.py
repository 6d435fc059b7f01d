"""ONNX files in ONNX Runtime on the CPU, and what they are run with: noise, and pictures of the user.

Those in a type that ONNX Runtime has no kernels for are run as the same graph in float32.
"""

import logging
import os
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional, Union

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes import common
from onnx_ir.tape import Tape
from torch import Tensor

from resnet_fast.export.metadata import Metadata
from resnet_fast.export.precision import Precision
from resnet_fast.utils.errors import first_line
from resnet_fast.utils.optional import require
from resnet_fast.utils.pictures import TRANSPARENT, Remarks, find_files, read_picture

logger = logging.getLogger(__name__)

_NUMPY = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(uint8)": np.uint8}
_IO = {"fp32": torch.float32, "fp16": torch.float16}


def session(path: Union[str, os.PathLike], threads: int = 0) -> Any:
    """An ONNX Runtime session on the CPU.

    Raises:
        FileNotFoundError: there is no file ``path``.
        ValueError: ONNX Runtime cannot read it as a model.
        MissingPackageError: ONNX Runtime is not installed.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"path is {str(path)!r}, expected an ONNX file")
    return open_session(os.fspath(path), f"path is {str(path)!r}, which", threads)


def open_session(source: Union[str, bytes], subject: str, threads: int = 0) -> Any:
    """Open a session on a path or a file's content; ``subject`` begins the message if it cannot be loaded."""
    runtime = require("onnxruntime", "running an ONNX file")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.log_severity_level = 3
    try:
        return runtime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exception classes have no common base but this
        raise ValueError(f"{subject} ONNX Runtime {runtime.__version__} cannot load: {first_line(error)}") from error


class Runner:
    """A file made ready to run on the CPU.

    ONNX Runtime has no bfloat16 convolution for a CPU. Such a file is run as the same graph in float32 with the result
    of every node rounded to bfloat16, which is what hardware does that multiplies bfloat16 and adds in float32.

    Attributes:
        method: how it is run, for people.
        outputs: names of what it gives.
    """

    def __init__(self, path: Union[str, os.PathLike], precision: Precision, *, exact: bool = False) -> None:
        """``exact``: run the graph in float32 without any rounding, with the file's weights as they are."""
        version = require("onnxruntime", "running an ONNX file").__version__
        subject = f"path is {str(path)!r}, whose graph in float32"
        if exact:
            self.method = f"ONNX Runtime {version}, the graph in float32"
            self._session = open_session(in_float32(path, {ir.DataType.FLOAT16, ir.DataType.BFLOAT16}), subject)
        elif precision.dtype is torch.bfloat16:
            self.method = f"ONNX Runtime {version}, the graph in float32 with every result rounded to bfloat16"
            self._session = open_session(in_float32(path, {ir.DataType.BFLOAT16}, rounding=True), subject)
        else:
            self.method = f"ONNX Runtime {version}"
            self._session = session(path)
        (self._input,) = self._session.get_inputs()
        self.outputs: Sequence[str] = [value.name for value in self._session.get_outputs()]

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Return the outputs by name; ``images`` are converted to the type that the file takes."""
        fed = np.ascontiguousarray(images, dtype=_NUMPY[self._input.type])
        return dict(zip(self.outputs, self._session.run(None, {self._input.name: fed}), strict=True))


def in_float32(path: Union[str, os.PathLike], low: Set[ir.DataType], *, rounding: bool = False) -> bytes:
    """The file's graph with every tensor of a type in ``low`` in float32; if ``rounding``, with its old type's numbers.

    Weights keep their values, as float32 has all those of float16 and bfloat16.
    """
    model = ir.from_proto(onnx.shape_inference.infer_shapes(onnx.load(path), strict_mode=True))
    common.LiftConstantsToInitializersPass()(model)
    graph, single = model.graph, ir.TensorType(ir.DataType.FLOAT)
    for value in (*graph.inputs, *graph.initializers.values()):
        if value.dtype in low:
            if value.const_value is not None:
                value.const_value = ir.tensor(value.const_value.numpy().astype(np.float32), name=value.name)
            value.type = single
    for node in list(graph):
        if node.op_type == "Cast" and node.attributes.get_int("to") in low:
            node.attributes.add(ir.AttrInt64("to", ir.DataType.FLOAT))
        for value in node.outputs:
            if value.dtype in low:
                old, value.type = value.dtype, single
                if rounding and old is not None:
                    _round(graph, node, value, old)
    return ir.to_proto(model).SerializeToString()


def _round(graph: ir.Graph, node: ir.Node, value: ir.Value, low: ir.DataType) -> None:
    tape = Tape()
    rounded: Optional[ir.Value] = value
    for to in (low, ir.DataType.FLOAT):
        rounded = tape.op("Cast", [rounded], {"to": to}, name=f"{value.name}_to_{to.name}")
    assert rounded is not None
    assert not value.is_graph_output(), "a file gives nothing in a type that is emulated"
    first = tape.nodes[0]
    for user, index in list(value.uses()):
        if user is not first:
            user.replace_input_with(index, rounded)
    graph.insert_after(node, tape.nodes)


# --- what it is given -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """One batch, as the file takes it and as the network reads it.

    ``fed`` is uint8 ``[N, height, width, C]``, or float ``[N, C, height, width]``; ``precise`` and ``single`` are
    ``[N, C, height, width]`` in float64 and float32.
    """

    fed: np.ndarray
    precise: Tensor
    single: Tensor


def noise(metadata: Metadata, batches: Sequence[int]) -> list[Sample]:
    """A sample of each batch size, from a fixed seed; no two images are the same.

    Pictures of any size are given wide, tall and small, so that they are both enlarged and reduced.
    """
    generator = torch.Generator().manual_seed(0)
    channels, height, width = metadata.input_size
    samples = []
    for index, batch in enumerate(batches):
        if metadata.preprocess is None:
            samples.append(_plain(metadata, torch.randn(batch, channels, height, width, generator=generator)))
            continue
        if (resize := metadata.preprocess.resize) is not None:
            height, width = [(resize + 31, 2 * resize), (resize + 64, resize + 1), (resize // 2 + 1, resize)][index % 3]
        shape = (batch, height, width, channels)
        samples.append(_pictured(metadata, torch.randint(256, shape, dtype=torch.uint8, generator=generator)))
    return samples


def pictures(metadata: Metadata, files: Sequence[Path], remarks: Optional[Remarks] = None) -> Iterator[Sample]:
    """One sample for each of ``files``, resized and cropped as the metadata says where the graph does not do it.

    Those that cannot be read are left out, and named in the log, or in ``remarks`` if several calls share them.
    """
    remarks = remarks or Remarks(logger)
    mode = {1: "L", 3: "RGB"}.get(metadata.input_size[0])
    if mode is None:
        raise ValueError(f"input_size is {metadata.input_size}, expected 1 or 3 channels, as pictures have")
    preprocess = metadata.preprocess or metadata.preprocessing()
    for file in files:
        try:
            picture = read_picture(file, mode)
        except Exception as error:  # a decoder of a broken file can raise anything
            remarks.unreadable(str(file), str(error) or type(error).__name__)
            continue
        if TRANSPARENT in picture.info:
            remarks.transparent(str(file))
        pixels = np.array(picture)
        image = torch.from_numpy(pixels).view(1, *pixels.shape[:2], -1)
        if metadata.preprocess is None:
            yield _plain(metadata, preprocess(image))
        elif preprocess.resize is None:  # the client resizes, and gives bytes
            whole = metadata.preprocessing()
            plain = type(whole)(whole.crop, (0.0,) * image.shape[3], (1 / 255,) * image.shape[3], whole.resize)
            yield _pictured(metadata, plain(image).round().byte().permute(0, 2, 3, 1))
        else:
            yield _pictured(metadata, image)


def find_pictures(folder: Union[str, os.PathLike], name: str = "images") -> list[Path]:
    """Files in ``folder``, which was given as the argument ``name``, and below with the name of a picture, in order.

    Raises:
        FileNotFoundError: there is no such folder, or no picture in it.
    """
    found, others = find_files(folder)
    if not found:
        raise FileNotFoundError(f"{name} is {str(folder)!r}, expected a folder with pictures in it or below")
    if others:
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common())
        logger.warning("left out of %s, as no pictures that can be read: %s", folder, kinds)
    return sorted(found)


def _plain(metadata: Metadata, images: Tensor) -> Sample:
    given = images.to(_IO[metadata.io_dtype])
    return Sample(given.numpy(), given.double(), given.float())


def _pictured(metadata: Metadata, images: Tensor) -> Sample:
    assert metadata.preprocess is not None
    return Sample(images.numpy(), metadata.preprocess(images, torch.float64), metadata.preprocess(images))
