"""MNN on the CPU, in float32 (precision "high").

For one image its weights are rearranged at loading: ResNet-18 took 16.5 ms so on two cores, and 18.4 without. On 16
images it did not help: ResNet-50 took at best 624 ms, and 579 without.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np

TITLE = "MNN"
NEEDS = "MNN"
ONNX = True
APART = True


def load(folder: Path, threads: int) -> Callable[[], np.ndarray]:
    import _tools  # the converter itself: MNN.tools.mnnconvert, around it, runs pip and reports to its makers
    import MNN

    images = np.load(folder / "images.npy")
    model = str(folder / "model.mnn")
    _tools.mnnconvert(["mnnconvert", "-f", "ONNX", "--modelFile", str(folder / "model.onnx"), "--MNNModel", model])
    settings = {"backend": "CPU", "numThread": threads, "precision": "high"}
    module = MNN.nn.load_module_from_file(
        model,
        ["input"],
        ["logits"],
        runtime_manager=MNN.nn.create_runtime_manager((settings,)),
        rearrange=len(images) == 1,
    )
    batch = MNN.expr.const(images, images.shape, MNN.expr.NCHW, MNN.expr.float)
    return lambda: np.array(module.forward(batch).read())
