"""ONNX Runtime's CPU provider, batch size known to it, all graph optimisations on (its default)."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

TITLE = "ONNX Runtime"
NEEDS = "onnxruntime"
ONNX = True


def load(folder: Path, threads: int) -> Callable[[], np.ndarray]:
    import onnxruntime

    images = np.load(folder / "images.npy")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_free_dimension_override_by_name("batch", len(images))
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {"input": images})[0]
