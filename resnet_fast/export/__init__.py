"""Models as files for other runtimes.

to_onnx.py         export_onnx: from a PyTorch classifier to a checked file
folding.py         batch norm into convolutions, on the traced graph
graph.py           clean-up of the ONNX graph
metadata.py        what the file says about itself
verification.py    the file against PyTorch in float64
tensorrt.py        the file as a TensorRT-RTX engine, built without a GPU in another process, tensorrt_build.py
files.py           files that appear whole or not at all
optional.py        packages that may be missing
"""

from resnet_fast.export.optional import MissingPackageError
from resnet_fast.export.to_onnx import ExportResult, export_onnx
from resnet_fast.export.verification import VerificationError

__all__ = ["ExportResult", "MissingPackageError", "VerificationError", "export_onnx"]
