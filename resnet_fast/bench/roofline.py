"""A model of the time that a network takes on a GPU. Nothing here is measured: see ``Assumptions``.

The roofline (Williams, Waterman and Patterson 2009): a kernel takes as long as its arithmetic at the GPU's peak rate,
or its bytes at its memory's bandwidth, whichever is longer. Which kernels there are, and what they move, says
``pipelines.py``, from the operations that ``traffic.py`` counts.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Optional

import torch
from torch import nn

from resnet_fast.bench import pipelines
from resnet_fast.bench.ledger import Move, Value
from resnet_fast.bench.pipelines import Kernel
from resnet_fast.bench.traffic import blocks, compare
from resnet_fast.kernels.triton.cost_model.gpus import Gpu

NOTE = "A model: nothing was measured on a GPU."
PIPELINES = {
    "eager": "eager PyTorch, a kernel for every operation",
    "compile": "torch.compile-style, cuDNN's convolutions and fused pointwise passes",
    "ours": "ours, as the accelerated model calls its ops",
    "back_to_back": "ours, with each block's end fused with the next block's begin",
}


@dataclass(frozen=True)
class Assumptions:
    """What the times rest on, the same for every pipeline, so that they differ by fusion alone.

    A kernel takes ``max(flops / (peak * compute_efficiency), bytes / (bandwidth * memory_efficiency)) + launches *
    launch_us``. The limit has efficiencies of 1 and no launches. Caches are ignored: what one kernel writes, the next
    reads from memory, which a small batch may not need to.

    Attributes:
        compute_efficiency: of the peak rate that the data sheet gives. Good implicit-GEMM kernels of large layers reach
            about 0.7; small and narrow layers less, which the model does not know.
        memory_efficiency: of the bandwidth that the data sheet gives. Large copies reach about 0.85.
        launch_us: microseconds in which a kernel starts and ends without using the GPU, in a CUDA graph or where the
            CPU is ahead. One that waits for Python takes longer.
    """

    compute_efficiency: float = 0.7
    memory_efficiency: float = 0.85
    launch_us: float = 2.0


@dataclass(frozen=True)
class Cost:
    """``bytes`` read and written, of images, weights and the rest; ``us``: microseconds, by the model."""

    flops: int = 0
    bytes: int = 0
    us: float = 0.0
    launches: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.flops + other.flops, self.bytes + other.bytes, self.us + other.us, self.launches + other.launches
        )


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer with what follows it (batch norm, addition, ReLU, pooling), and in training with
    their backward passes.

    Attributes:
        name: path of the convolution or linear layer.
        block: path of its block; "" for stem and head.
        limit: of the layer by itself: its products, and its inputs read and results written once.
        costs: by pipeline. One that computes the layer in the kernel of another has nothing here.
    """

    name: str
    block: str
    limit: Cost
    costs: dict[str, Cost]

    @property
    def intensity(self) -> float:
        """Operations a byte, at the limit."""
        return self.limit.flops / self.limit.bytes if self.limit.bytes else 0.0


@dataclass(frozen=True)
class Total:
    """What a pipeline takes for the whole network.

    Attributes:
        blocks: bytes of images, as ``resnet-fast traffic`` counts them: of residual blocks, forward.
        blocks_backward: the same, backward.
        images: bytes of images of the whole network, both passes.
        small_launches: those of kernels that read and write no image, but vectors of channels or weights.
    """

    cost: Cost
    blocks: int
    blocks_backward: int
    images: int
    small_launches: int


@dataclass(frozen=True)
class Roofline:
    gpu: Gpu
    peak: float  # operations a second
    assumptions: Assumptions
    batch: int
    layers: list[Layer]
    limit: Cost
    totals: dict[str, Total] = field(default_factory=dict)

    def bound(self, layer: Layer) -> str:
        """Which of "compute" and "memory" takes longer at the layer's limit."""
        return "compute" if layer.intensity > self.ridge else "memory"

    @property
    def bandwidth(self) -> float:
        """Bytes a second."""
        return self.gpu.bandwidth * 1e9

    @property
    def ridge(self) -> float:
        """Operations a byte from which on a kernel is bound by compute."""
        return self.peak / self.bandwidth

    def as_dict(self) -> dict[str, Any]:
        """For JSON, with the note that this is a model."""
        assumptions = self.assumptions
        return {
            "note": NOTE,
            "gpu": self.gpu._asdict(),
            "peak_flops_per_second": self.peak,
            "bandwidth_bytes_per_second": self.bandwidth,
            "assumptions": {**vars(assumptions), "caches": "ignored"},
            "limit": vars(self.limit),
            "totals": {
                name: {
                    "title": PIPELINES[name],
                    **vars(total.cost),
                    "images_per_second": self.batch / total.cost.us * 1e6,
                    "block_bytes": total.blocks,
                    "block_bytes_backward": total.blocks_backward,
                    "image_bytes": total.images,
                    "small_launches": total.small_launches,
                }
                for name, total in self.totals.items()
            },
            "layers": [
                {
                    "layer": layer.name,
                    "block": layer.block,
                    "flops": layer.limit.flops,
                    "intensity": layer.intensity,
                    "bound": self.bound(layer),
                    "limit": vars(layer.limit),
                    **{name: vars(cost) for name, cost in layer.costs.items()},
                }
                for layer in self.layers
            ],
        }


def peak_of(gpu: Gpu, dtype: torch.dtype) -> float:
    """Operations a second: of tensor cores; float32 is TF32 there on NVIDIA, as in PyTorch's convolutions by default.

    Raises:
        ValueError: no kernel computes in ``dtype`` on a GPU.
    """
    if dtype in (torch.float16, torch.bfloat16):
        return gpu.half * 1e12
    if dtype is not torch.float32:
        raise ValueError(f"dtype is {dtype}, expected torch.float16, torch.bfloat16 or torch.float32")
    tf32 = gpu.tf32 if gpu.architecture.startswith("sm_") else None
    return (tf32 or gpu.float32) * 1e12


def predict(
    model: nn.Module,
    shape: Any,
    dtype: torch.dtype,
    gpu: Gpu,
    assumptions: Optional[Assumptions] = None,
    back_to_back: bool = False,
) -> Roofline:
    """The model's time and traffic in its mode: in training mode, a forward and a backward pass.

    Args:
        model: a stock one, on the CPU; it is left alone.
        shape: of the images, ``[N, C, H, W]``.
        dtype: of images, weights and vectors alike.
        back_to_back: in eval mode, add a pipeline in which convolutions are fused with those of the next block.

    Raises:
        ValueError: ``back_to_back`` in training mode, or as ``peak_of`` does.
    """
    if back_to_back and model.training:
        raise ValueError("back_to_back is for inference, and the model is in training mode")
    assumptions = assumptions or Assumptions()
    peak = peak_of(gpu, dtype)
    moves = compare(model, shape, dtype, backward=model.training)
    kernels = {
        "eager": pipelines.eager(moves["stock"]),
        "compile": pipelines.compiled(moves["stock"]),
        "ours": pipelines.ours(moves["ours"]),
    }
    if back_to_back:
        kernels["back_to_back"] = pipelines.ours(pipelines.back_to_back(moves["ours"]))

    rates = peak * assumptions.compute_efficiency, gpu.bandwidth * 1e9 * assumptions.memory_efficiency
    by_layer: dict[str, dict[str, Cost]] = {name: {} for name in kernels}
    for name, costs in by_layer.items():
        for kernel in kernels[name]:
            layer = kernel.move.layer
            costs[layer] = costs.get(layer, Cost()) + _cost(kernel, *rates, assumptions.launch_us)
    limits = _limits(moves["stock"], peak, gpu.bandwidth * 1e9)
    blocks_of = {move.layer: move.block for found in moves.values() for move in reversed(found)}
    names = dict.fromkeys([*limits, *(layer for costs in by_layer.values() for layer in costs)])
    layers = [
        Layer(
            layer,
            blocks_of[layer],
            limits.get(layer, Cost()),
            {name: costs.get(layer, Cost()) for name, costs in by_layer.items()},
        )
        for layer in names
    ]
    totals = {name: _total(kernels[name], by_layer[name].values()) for name in kernels}
    return Roofline(gpu, peak, assumptions, shape[0], layers, sum(limits.values(), Cost()), totals)


def _cost(kernel: Kernel, rate: float, bandwidth: float, launch_us: float) -> Cost:
    move = kernel.move
    seconds = max(move.flops / rate, move.bytes / bandwidth)
    return Cost(move.flops, move.bytes, seconds * 1e6 + kernel.launches * launch_us, kernel.launches)


def _total(kernels: list[Kernel], costs: Iterable[Cost]) -> Total:
    forward = [kernel.move for kernel in kernels if not kernel.move.backward]
    backward = [kernel.move for kernel in kernels if kernel.move.backward]
    return Total(
        sum(costs, Cost()),
        sum(blocks(forward).values()),
        sum(blocks(backward).values()),
        sum(move.images for move in (*forward, *backward)),
        sum(kernel.launches for kernel in kernels if not kernel.move.images),
    )


def _limits(moves: list[Move], rate: float, bandwidth: float) -> dict[str, Cost]:
    """Sum by layer, in order, what its moves read that it has not made, and make for others, each once.

    Backward, that leaves the gradients of its results, inputs and weights, its inputs and its weights. A kernel that
    keeps to this would have to make again what the layer's forward pass made for itself.
    """
    makers = {value.id: move.layer for move in moves for value in move.writes}
    readers: dict[int, set[str]] = {}
    passes: dict[tuple[str, bool], list[Move]] = {}
    for move in moves:
        passes.setdefault((move.layer, move.backward), []).append(move)
        for value in move.reads:
            readers.setdefault(value.id, set()).add(move.layer)
    result = {value.id for value in [move for move in moves if not move.backward][-1].writes}

    def wanted(value: Value, layer: str, backward: bool) -> bool:
        """Return whether another layer or the caller wants it; nothing reads the gradients of parameters."""
        elsewhere = readers.get(value.id, set()) - {layer}
        return bool(elsewhere) or value.id in result or (backward and value.id not in readers)

    limits: dict[str, Cost] = {}
    for (layer, backward), mine in passes.items():
        reads = [value for move in mine for value in move.reads if makers.get(value.id) != layer]
        writes = [value for move in mine for value in move.writes if wanted(value, layer, backward)]
        flops, size = sum(move.flops for move in mine), _size(reads) + _size(writes)
        limits[layer] = limits.get(layer, Cost()) + Cost(flops, size, max(flops / rate, size / bandwidth) * 1e6)
    return limits


def _size(values: Iterable[Value]) -> int:
    """Bytes of all together, each once."""
    sizes: dict[int, int] = {}
    for value in values:
        sizes[value.id] = max(value.size, sizes.get(value.id, 0))
    return sum(sizes.values())
