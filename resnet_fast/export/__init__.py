"""Models as files for other runtimes.

to_onnx.py         export_onnx: from a PyTorch classifier to a checked file
folding.py         the plain model behind it, and its batch norms folded into the convolutions
precision.py       float32, float16, bfloat16: the traced network in one of them
graph_edits.py     clean-up of the ONNX graph; types of inputs and outputs, softmax, top-k
preprocessing.py   from the bytes of a picture, in the graph
quantise/          int8: calibration, where to quantise, which layers not to
metadata.py        what the file says about itself
verify.py          verify_onnx: all that is asked of a file
compare.py         the file against PyTorch in float64
file_checks.py     the file by itself
runner.py          the file in ONNX Runtime, and what it is verified with
tensorrt.py        the file as a TensorRT-RTX engine, built without a GPU in another process, tensorrt_build.py
onnx_model.py      OnnxModel: the file used as a model
onnx_providers.py  where ONNX Runtime runs it: CPU, CUDA, TensorRT
"""

from resnet_fast.export.file_checks import VerificationError
from resnet_fast.export.preprocessing import Preprocess
from resnet_fast.export.to_onnx import export_onnx
from resnet_fast.export.verify import ExportResult, verify_onnx
from resnet_fast.utils.optional import MissingPackageError

__all__ = ["ExportResult", "MissingPackageError", "Preprocess", "VerificationError", "export_onnx", "verify_onnx"]
