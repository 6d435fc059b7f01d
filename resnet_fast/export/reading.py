"""An ONNX file as it is found: valid or not, and what it says about itself."""

import os
from collections import Counter
from typing import Optional, Union

import onnx

from resnet_fast.export.metadata import Metadata


def check_file(path: Union[str, os.PathLike], opset: Optional[int] = None) -> tuple[onnx.ModelProto, dict[str, int]]:
    """The file at ``path`` and how often each operator occurs in it, after ONNX's checker has seen it.

    Raises:
        FileNotFoundError: there is no file ``path``.
        RuntimeError: it is not valid ONNX, or not in ``opset``, if that is given.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"path is {str(path)!r}, expected an ONNX file")
    try:
        onnx.checker.check_model(path, full_check=True)
        model = onnx.load(path)
    except Exception as error:  # protobuf, the checker and shape inference have nothing in common
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RuntimeError(f"path is {str(path)!r}, which is not valid ONNX: {reason}") from error
    # torch.onnx falls back to another opset when it cannot convert, and says so only in the log.
    found = opset_of(model)
    if opset is not None and found != opset:
        raise RuntimeError(f"opset is {opset}, but PyTorch could write this model only in opset {found}")
    return model, dict(sorted(Counter(node.op_type for node in model.graph.node).items()))


def opset_of(model: onnx.ModelProto) -> int:
    """Of the standard operators; 0 if the file uses none."""
    return {item.domain: item.version for item in model.opset_import}.get("", 0)


def metadata_of(model: onnx.ModelProto) -> Metadata:
    """What ``export_onnx`` wrote into the file; ValueError if it wrote none of it."""
    return Metadata.read({entry.key: entry.value for entry in model.metadata_props})
