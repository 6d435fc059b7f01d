"""Models as files for other runtimes.

to_onnx.py         export_onnx: from a PyTorch classifier to a checked file
stock.py           the plain model behind it
precision.py       float32, float16, bfloat16: the traced network in one of them
folding.py         batch norm into convolutions, on the traced graph
graph.py           clean-up of the ONNX graph
borders.py         types of inputs and outputs, softmax, top-k
preprocessing.py   from the bytes of a picture, in the graph
quantise/          int8: calibration, where to quantise, which layers not to
metadata.py        what the file says about itself
report.py          verify_onnx: all that is asked of a file
verification.py    the file against PyTorch in float64
consistency.py     the file by itself
reading.py         the file as it is found
samples.py         what it is verified with
running.py         the file in ONNX Runtime
tensorrt.py        the file as a TensorRT-RTX engine, built without a GPU in another process, tensorrt_build.py
files.py           files that appear whole or not at all
optional.py        packages that may be missing
"""

from resnet_fast.export.compare import VerificationError
from resnet_fast.export.preprocessing import Preprocess
from resnet_fast.export.to_onnx import export_onnx
from resnet_fast.export.verify import ExportResult, verify_onnx
from resnet_fast.utils.optional import MissingPackageError

__all__ = ["ExportResult", "MissingPackageError", "Preprocess", "VerificationError", "export_onnx", "verify_onnx"]
