"""int8: an exported graph with QuantizeLinear and DequantizeLinear, for TensorRT or for ONNX Runtime on a CPU.

layers.py        what can be quantised, and where residual blocks end
images.py        images to calibrate and to judge by, from wherever they are
calibration.py   a pass over them that counts what the tensors hold
histogram.py     from counts to ranges
placement.py     pairs where TensorRT wants them; layers in half precision
cpu.py           ONNX Runtime's own quantiser, with our ranges
judging.py       errors of the whole and of each layer; which layers to leave out
pipeline.py      quantise: all of this, in order

Why not an existing quantiser for TensorRT. onnxruntime.quantization can leave out the pairs after Conv and Add and the
biases', but then has none on a shortcut convolution before its Add; its calibrators hold all activations of what they
are given, print to stdout, and know no mean squared error. nvidia-modelopt patches that quantiser and takes pairs away
afterwards; its 0.47 needs ONNX Runtime 1.24 and onnx 1.21, eight packages beside, and knows only max and entropy.
"""

from resnet_fast.export.quantise.calibration import Progress
from resnet_fast.export.quantise.images import Images, open_images
from resnet_fast.export.quantise.pipeline import (
    Method,
    Quantisation,
    Quantised,
    Target,
    check_choices,
    quantise,
)

__all__ = [
    "Images",
    "Method",
    "Progress",
    "Quantisation",
    "Quantised",
    "Target",
    "check_choices",
    "open_images",
    "quantise",
]
