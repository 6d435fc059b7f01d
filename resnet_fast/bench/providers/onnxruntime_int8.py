"""ONNX Runtime's CPU provider on the file in 8 bits that this package exports for it (docs/int8.md)."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

TITLE = "ONNX Runtime int8"
NEEDS = "onnxruntime"
ONNX = "int8"
ACCURATE = 0.5


def load(folder: Path, threads: int) -> Callable[[], np.ndarray]:
    import onnxruntime

    images = np.load(folder / "images.npy")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_free_dimension_override_by_name("batch", len(images))
    session = onnxruntime.InferenceSession(str(folder / "model_int8.onnx"), options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {"input": images})[0]
