"""TensorRT, from the ONNX file, with the precision that the workload asks for allowed in all layers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

TITLE = "TensorRT"
NEEDS = "tensorrt"
ONNX = True
DEVICES = ("cuda",)


def load(folder: Path, threads: int) -> Callable[[], np.ndarray]:
    import tensorrt as trt
    import torch

    from resnet_fast.bench.workload import ONNX as FILE
    from resnet_fast.bench.workload import load_images, load_setting, to_numpy

    dtype = load_setting(folder).dtype
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    config = builder.create_builder_config()
    if dtype != "float32":
        flag = {"float16": "FP16", "bfloat16": "BF16"}[dtype]
        if not hasattr(trt.BuilderFlag, flag):  # from TensorRT 11 on, precision comes from the graph alone
            raise RuntimeError(f"TensorRT {trt.__version__} takes {dtype} from the graph, and the ONNX file is float32")
        config.set_flag(getattr(trt.BuilderFlag, flag))
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse((folder / FILE).read_bytes()):
        raise RuntimeError(f"TensorRT did not take the file: {parser.get_error(0)}")
    images = load_images(folder).float().contiguous()
    profile = builder.create_optimization_profile()
    profile.set_shape(network.get_input(0).name, *[tuple(images.shape)] * 3)
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise RuntimeError("TensorRT built no engine")
    engine = trt.Runtime(logger).deserialize_cuda_engine(plan)
    context = engine.create_execution_context()
    given, made = (engine.get_tensor_name(i) for i in range(2))
    context.set_input_shape(given, tuple(images.shape))
    result = torch.empty(tuple(context.get_tensor_shape(made)), device=images.device)
    context.set_tensor_address(given, images.data_ptr())
    context.set_tensor_address(made, result.data_ptr())
    # The engine goes with its runtime and its buffers: they are kept as long as the call.
    kept: Any = (engine, images)

    def run() -> np.ndarray:
        stream = torch.cuda.current_stream().cuda_stream
        assert kept and context.execute_async_v3(stream)
        return to_numpy(result)

    return run
