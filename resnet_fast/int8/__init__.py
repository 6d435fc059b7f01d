"""int8 inside PyTorch: a model that is calibrated once, and runs in 8 bits wherever the accelerated one is fused.

quantising.py      quantize: from a model in float32 to one in int8; quantisation_of: what was done
files.py           save_quantized and load_quantized
checking.py        the model against the definition of its own steps
torchao_config.py  a configuration for torchao's quantize_; the only file that imports torchao

The ranges come from the same code as those of an exported file (``export/quantise``), the steps of the program and the
rounding of weights are in ``network/precision.py``.
"""

from resnet_fast.int8.files import load_quantized, save_quantized
from resnet_fast.int8.quantising import quantisation_of, quantize

__all__ = ["load_quantized", "quantisation_of", "quantize", "save_quantized"]
