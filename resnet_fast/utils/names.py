"""Words that users choose from, as types. They import nothing, so that the command line lists them at once."""

from typing import Literal

Dtype = Literal["float32", "float16", "bfloat16"]
"""Of images and weights."""

PrecisionName = Literal["fp32", "fp16", "bf16", "int8"]
"""Of an exported file's weights and arithmetic."""

IoDtype = Literal["fp32", "fp16"]
"""What an exported file may take and give: no server has bfloat16 for its inputs."""

Target = Literal["tensorrt", "cpu"]
"""What is to run an int8 file."""

Method = Literal["max", "percentile", "entropy", "mse"]
"""How calibration finds where an int8 range ends."""
