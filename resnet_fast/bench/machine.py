"""The machine that a measurement was taken on, without anything that names it."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Optional

from resnet_fast.bench import peer_environment
from resnet_fast.utils.cpuinfo import available_cores, first_processor

PACKAGES = (
    "resnet-fast",
    "torch",
    "torchvision",
    "triton",
    "numpy",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "openvino",
    "timm",
    "safetensors",
    "scikit-learn",
    "scikit-image",
    "matplotlib",
    "jinja2",
)
_DISTRIBUTIONS = {"onnxruntime": ("onnxruntime", "onnxruntime-gpu")}
_ISA = ("avx2", "fma", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8")
_ISA_ARM = ("asimd", "asimddp", "sve", "sve2", "bf16", "i8mm")


def describe() -> dict[str, Any]:
    """CPU, memory, operating system and package versions, for people and for JSON."""
    import torch

    fields = first_processor()
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    return {
        "cpu": fields.get("model name") or platform.processor() or platform.machine(),
        "architecture": platform.machine(),
        "cores": available_cores(),
        "isa": [name for name in (*_ISA, *_ISA_ARM) if name in flags],
        "memory_gib": _memory_gib(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "torch_threads": torch.get_num_threads(),
        "packages": {
            **{name: _version(name) for name in PACKAGES},
            **{name: peer_environment.version(name) for name in peer_environment.PACKAGES},
        },
    }


def load() -> Optional[float]:
    """Processes that wanted to run in the last minute; None where the system does not say."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _version(name: str) -> Optional[str]:
    for distribution in _DISTRIBUTIONS.get(name, (name,)):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return None


def _memory_gib() -> Optional[float]:
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
