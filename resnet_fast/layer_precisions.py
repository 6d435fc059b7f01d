"""In which precision the layers of a quantised model run, and why not in int8."""

from dataclasses import dataclass

from torch import nn

from resnet_fast import network
from resnet_fast.graph.ranges import description


@dataclass(frozen=True)
class LayerPrecision:
    """A layer of a quantised model.

    Attributes:
        path: of its module.
        precision: "int8" or "fp32"; in the last call, if there was one.
        ranges: largest magnitudes: of its "input", and of the "residual" that is added to its result.
        reason: why it is not in int8.
    """

    path: str
    precision: str
    ranges: dict[str, float]
    reason: str = ""

    def __str__(self) -> str:
        ranges = ", ".join(f"{name} ±{amax:.4g}" for name, amax in self.ranges.items())
        return "; ".join(filter(None, [ranges, self.reason]))


def layer_precisions(model: nn.Module) -> list[LayerPrecision]:
    """The layers of a quantised model, in its order; of any other, none."""
    about = description(model)
    return [] if about is None else [_layer(model, layer) for layer in about["layers"]]


def _layer(model: nn.Module, layer: dict) -> LayerPrecision:
    reason = layer["reason"] or _refusal(model, layer["path"])
    ranges = {name: high for name, (_, high) in layer["ranges"].items()}
    return LayerPrecision(layer["path"], "fp32" if reason else "int8", ranges, reason)


def _refusal(model: nn.Module, path: str) -> str:
    """Why the layer did not run in int8 when the model was called last, or ''. The outermost program runs it."""
    names, module, said = path.split("."), model, ""
    for i, name in enumerate(names):
        last, rest = network.last_plan(module), tuple(names[i:])
        if isinstance(last, network.Plan):
            if rest in last.in_int8:
                return ""
            if rest in last.refusals:
                return last.refusals[rest]
            said = said or "no program called it in the last call"
        elif last is not None:
            said = f"the last call ran in float32: {last}"
        module = module.get_submodule(name)
    return said
