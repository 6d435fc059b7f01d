"""A classifier for the Python backend of NVIDIA Triton Inference Server; config.pbtxt has its parameters.

The server's Python must find resnet_fast and PyTorch: start the server with the bin folder of their environment first
on PATH. The backend's Python ignores PYTHONPATH.

Tensors are passed on by DLPack, without a copy. Not by ``as_numpy``: in a server that was built for NumPy 1, that gives
an array of the first element, again and again, once NumPy 2 is installed, and no error.
"""

import json
from pathlib import Path
from typing import Any

import torch
import triton_python_backend_utils as pb_utils
from torch import Tensor

from resnet_fast.utils.cpuinfo import available_cores

FLOATS = {"TYPE_FP16": torch.float16, "TYPE_FP32": torch.float32}


class TritonPythonModel:
    """One instance of the model, in a process of its own."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the model.

        Args:
            args: of the server; ``model_config`` is config.pbtxt as JSON.
        """
        config = json.loads(args["model_config"])
        parameters = {name: value["string_value"] for name, value in config["parameters"].items()}
        folder = Path(args["model_repository"], args["model_version"])
        self._input: str = config["input"][0]["name"]
        self._outputs: list[str] = [output["name"] for output in config["output"]]
        gpu = args["model_instance_kind"] == "GPU" and torch.cuda.is_available()
        device = torch.device(f"cuda:{args['model_instance_device_id']}" if gpu else "cpu")
        if not gpu:
            instances = sum(int(group["count"]) for group in config["instance_group"])
            torch.set_num_threads(int(parameters["threads"]) or max(1, available_cores() // instances))
        if parameters["runtime"] == "torch":
            self._run = _torch(folder, parameters, FLOATS[config["output"][0]["data_type"]], device)
        else:
            self._run = _onnxruntime(folder, device)

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer ``requests``, which the server batched, each with its own part of one call's results.

        Their shapes and dtypes the server has compared with config.pbtxt. If the call fails all the same, every request
        is tried by itself, so that one with an image that the model cannot take spoils no other.
        """
        try:
            parts = [torch.from_dlpack(pb_utils.get_input_tensor_by_name(one, self._input)) for one in requests]
            with torch.inference_mode():
                results = self._run(parts[0] if len(parts) == 1 else torch.cat(parts))
            split = [result.split([len(part) for part in parts]) for result in results]
        except Exception as error:
            if len(requests) == 1:
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                return [pb_utils.InferenceResponse(error=pb_utils.TritonError(reason))]
            return [response for one in requests for response in self.execute([one])]
        return [
            pb_utils.InferenceResponse(
                [pb_utils.Tensor.from_dlpack(name, own) for name, own in zip(self._outputs, results, strict=True)]
            )
            for results in zip(*split, strict=True)
        ]


def _torch(folder: Path, parameters: dict[str, str], output: torch.dtype, device: torch.device) -> Any:
    """The accelerated PyTorch model: from images to a tuple of logits ``[batch, classes]`` on the CPU."""
    from resnet_fast import accelerate
    from resnet_fast.models.named import build

    model = build(parameters["model"], weights=str(folder / "weights.pt"), num_classes=int(parameters["classes"]))
    dtype = getattr(torch, parameters["dtype"])
    accelerate(model).to(device, dtype).to(memory_format=torch.channels_last)

    def run(images: Tensor) -> tuple[Tensor, ...]:
        return (model(images.to(device, dtype)).to("cpu", output).contiguous(),)

    return run


def _onnxruntime(folder: Path, device: torch.device) -> Any:
    """The ONNX file in ONNX Runtime: from images to a tuple of all its outputs on the CPU."""
    from resnet_fast import OnnxModel

    model = OnnxModel(folder / "model.onnx", device=device, threads=torch.get_num_threads())

    def run(images: Tensor) -> tuple[Tensor, ...]:
        results = model(images.to(device))
        return tuple(result.cpu() for result in (results if isinstance(results, tuple) else (results,)))

    return run
