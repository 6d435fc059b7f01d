"""The roofline: counts and times against arithmetic by hand, the figures it was made to show, and the command."""

import json
import sys

import pytest
import torch
from torch import Tensor, nn

from resnet_fast.bench import pipelines, roofline
from resnet_fast.bench.ledger import Move, Place, Value
from resnet_fast.bench.roofline import Assumptions, Roofline, peak_of, predict
from resnet_fast.bench.traffic import blocks, compare
from resnet_fast.cli import main
from resnet_fast.kernels.contract import Affine, Gate, Geometry
from resnet_fast.kernels.triton import dgrad, forward, gram, tail_backward, wgrad
from resnet_fast.kernels.triton.cost_model.gpus import GPUS
from resnet_fast.models.named import build

H100 = GPUS["h100"]
HALF = torch.float16
IDEAL = Assumptions(1.0, 1.0, 0.0)
SHAPE = (8, 3, 224, 224)
NARROW, WIDE = (2 * 8 * channels * 56 * 56 for channels in (64, 256))  # bytes of a first stage's images


def model_of(name: str) -> nn.Module:
    """Without data: it takes time to draw random weights."""
    with torch.device("meta"):
        return build(name)


@pytest.fixture(scope="module")
def evaluated() -> Roofline:
    return predict(model_of("resnet50"), (128, 3, 224, 224), HALF, H100, back_to_back=True)


@pytest.fixture(scope="module")
def trained() -> Roofline:
    return predict(model_of("resnet50").train(), (128, 3, 224, 224), HALF, H100)


def layers_of(result: Roofline) -> dict:
    return {layer.name: layer for layer in result.layers}


def images_of(kernels: list, layer: str, backward: bool = False) -> int:
    moves = [kernel.move for kernel in kernels if kernel.move.layer == layer and kernel.move.backward is backward]
    return sum(move.images for move in moves)


# --- one layer by hand ------------------------------------------------------------------------------------------------


def test_inference_of_one_layer_by_hand():
    """A 3x3 convolution of 64 channels at 56x56, batch norm, ReLU."""
    result = predict(model_of("resnet50"), SHAPE, HALF, H100, Assumptions(0.5, 0.8, 3.0))
    layer = layers_of(result)["layer1.1.conv2"]
    flops = 2 * 8 * 64 * 56 * 56 * 64 * 9
    weight, vectors = 2 * 64 * 64 * 9, 64
    fused = 2 * NARROW + weight + 2 * 4 * vectors  # scale and shift are float32
    assert (layer.limit.flops, layer.costs["ours"].flops, layer.costs["ours"].bytes) == (flops, flops, fused)
    # What batch norm has: four vectors in half precision.
    assert layer.limit.bytes == 2 * NARROW + weight + 4 * 2 * vectors
    assert layer.costs["compile"].bytes == (2 + 2) * NARROW + weight + 4 * 2 * vectors
    # Eager batch norm also returns two vectors of float32.
    assert layer.costs["eager"].bytes == (2 + 2 + 2) * NARROW + weight + (4 * 2 + 2 * 4) * vectors
    assert [layer.costs[name].launches for name in ("eager", "compile", "ours")] == [3, 2, 1]
    assert layer.costs["ours"].us == pytest.approx(
        1e6 * max(flops / (0.5 * 989.4e12), fused / (0.8 * 3.352e12)) + 3.0
    )  # fmt: skip
    assert layer.limit.us == pytest.approx(1e6 * max(flops / 989.4e12, layer.limit.bytes / 3.352e12))
    assert (layer.block, result.bound(layer)) == ("layer1.1", "memory")


def test_inference_with_a_shortcut_by_hand():
    """Expand convolutions: with the identity, and beside a projection, whose batch norm a compiler adds on the way."""
    moves = compare(model_of("resnet50"), SHAPE, HALF)
    eager, compiled = pipelines.eager(moves["stock"]), pipelines.compiled(moves["stock"])
    ours = pipelines.ours(moves["ours"])
    assert images_of(eager, "layer1.1.conv3") == NARROW + WIDE * (1 + 2 + 3 + 2)
    assert images_of(compiled, "layer1.1.conv3") == NARROW + WIDE * (1 + 3)
    assert images_of(ours, "layer1.1.conv3") == NARROW + WIDE * 2
    assert images_of(compiled, "layer1.0.conv3") == NARROW + WIDE * (1 + 3)
    assert images_of(compiled, "layer1.0.downsample.0") == NARROW + WIDE
    assert images_of(eager, "layer1.0.downsample.0") == NARROW + WIDE * (1 + 2)


def test_training_of_one_layer_by_hand():
    """The layer as above: convolution; statistics, batch norm; ReLU. Back: ReLU; sums, batch norm; two products."""
    model = model_of("resnet50").train()
    moves = compare(model, SHAPE, HALF, backward=True)
    eager, compiled = pipelines.eager(moves["stock"]), pipelines.compiled(moves["stock"])
    ours = pipelines.ours(moves["ours"])
    name = "layer1.1.conv2"
    assert images_of(eager, name) == NARROW * (2 + 3 + 2)
    assert images_of(eager, name, backward=True) == NARROW * (3 + 2 + 3 + 2 + 2)
    # The ReLU is on the way to its reader: of what is read twice, the first reader writes a copy.
    assert images_of(compiled, name) == NARROW * (2 + 1 + 2)
    assert images_of(compiled, name, backward=True) == NARROW * (4 + 3 + 2 + 2)
    # The next convolution applies batch norm and ReLU; the gradient goes back through them where it is made.
    assert images_of(ours, name) == NARROW * 2
    assert images_of(ours, name, backward=True) == NARROW * (3 + 2 + 3)
    result = layers_of(predict(model, SHAPE, HALF, H100))[name]
    flops = 2 * 8 * 64 * 56 * 56 * 64 * 9
    assert result.limit.flops == 3 * flops
    weight = 2 * 64 * 64 * 9
    # Input, result; then their gradients, and the input again for the weight's.
    assert result.limit.bytes == pytest.approx(2 * NARROW + 3 * NARROW + 3 * weight, abs=50 * 64)


def test_flops_of_the_network(evaluated, trained):
    products = sum(layer.limit.flops for layer in evaluated.layers)
    assert products == evaluated.limit.flops == pytest.approx(128 * 2 * 4.089e9, rel=1e-3)
    assert {total.cost.flops for total in evaluated.totals.values()} == {products}
    stem = layers_of(evaluated)["conv1"].limit.flops
    assert trained.limit.flops == 3 * products - stem  # nobody asks for the images' gradient
    # Forward, statistics by ``gram``; backward, products of its matrices.
    assert 1.0 < trained.totals["ours"].cost.flops / trained.limit.flops < 1.1


def test_strided_projection_reads_the_pixels_that_it_needs():
    moves = compare(model_of("resnet50"), SHAPE, HALF)
    for name, found in moves.items():
        (convolution,) = [move for move in found if move.layer == "layer2.0.downsample.0" and move.flops]
        assert convolution.reads[0].size == 2 * 8 * 256 * 28 * 28, name


def test_eval_mode_folds_batch_norms_once():
    moves = compare(model_of("resnet18"), (2, 3, 64, 64), HALF)["ours"]
    assert {move.op for move in moves} == {"stem", "conv_bn_act", "head"}


# --- any fused op -----------------------------------------------------------------------------------------------------


class Two(nn.Module):
    """Two 1x1 convolutions in an op that no count knows by name."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(8, 32, 1, bias=False), nn.Conv2d(32, 8, 1, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ops.resnet_fast.roofline_test_pair(x, self.first.weight, self.second.weight)


def test_fused_ops_are_counted_from_their_operands():
    library = torch.library.Library("resnet_fast", "FRAGMENT")
    library.define("roofline_test_pair(Tensor x, Tensor first, Tensor second) -> (Tensor, Tensor)")

    def fake(x: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        n, _, h, w = x.shape
        return x.new_empty(n, first.shape[0], h, w), x.new_empty(n, second.shape[0], h, w)

    torch.library.register_fake("resnet_fast::roofline_test_pair", fake, lib=library)
    model = nn.Sequential(Two()).eval()
    (move,) = compare(model, (2, 8, 4, 4), HALF)["ours"]
    pixels = 2 * 4 * 4
    assert (move.read, move.written) == (2 * 8 * pixels, 2 * (32 + 8) * pixels)
    assert move.other == 2 * 2 * 8 * 32
    assert move.flops == 2 * 2 * pixels * 8 * 32
    assert (move.layer, move.block) == ("0.first", "0")
    # The second layer is computed in the first one's kernel.
    assert [kernel.launches for kernel in pipelines.ours([move])] == [1]


# --- the figures that were asked for ----------------------------------------------------------------------------------


def test_resnet50_at_batch_128(evaluated, trained):
    assert evaluated.totals["ours"].blocks <= 6.5e9
    assert evaluated.totals["back_to_back"].blocks <= 5.5e9
    assert evaluated.totals["compile"].images / 128 == pytest.approx(95e6, rel=0.01)
    assert trained.totals["eager"].blocks == pytest.approx(21.7e9, rel=0.005)
    assert trained.totals["ours"].blocks <= 7.0e9


def test_launches_of_resnet50(evaluated, trained):
    launches = {name: total.cost.launches for name, total in evaluated.totals.items()}
    # Convolutions, batch norms, ReLUs, additions, max-pool, average pool, linear layer.
    assert launches["eager"] == 53 + 53 + 49 + 16 + 3
    # Projections' batch norms are computed in passes of others, the average pool in the last of them.
    assert launches["compile"] == 53 + 49 + 2
    # The stem: zeros, a copy of the images, the convolution, the max-pool.
    assert launches["ours"] == 52 + 4 + 2
    trained_launches = {name: total.cost.launches for name, total in trained.totals.items()}
    assert trained_launches["compile"] < trained_launches["eager"]
    # What ours computes of vectors of channels is many launches, and said so.
    assert trained.totals["ours"].small_launches > trained_launches["ours"] / 2


def test_back_to_back_skips_the_results_that_narrow_layers_read(evaluated):
    saved = evaluated.totals["ours"].blocks - evaluated.totals["back_to_back"].blocks
    # Blocks with the identity: two, three and five; in the last stage 512 channels are too many.
    assert saved == 2 * 128 * (2 * 256 * 56**2 + 3 * 512 * 28**2 + 5 * 1024 * 14**2)
    for first, second in (("layer1.0.conv3", "layer1.1.conv1"), ("layer3.4.conv3", "layer3.5.conv1")):
        ours, fused = ({name: layer.costs[kind] for name, layer in layers_of(evaluated).items()}
                       for kind in ("ours", "back_to_back"))  # fmt: skip
        assert fused[first] == ours[first]
        assert fused[second].bytes < ours[second].bytes


def test_blocks_agree_with_traffic(evaluated, trained):
    for result, model in ((evaluated, model_of("resnet50")), (trained, model_of("resnet50").train())):
        counted = compare(model, (128, 3, 224, 224), HALF)
        for pipeline, name in (("eager", "stock"), ("ours", "ours")):
            assert result.totals[pipeline].blocks == sum(blocks(counted[name]).values())


# --- sums and bounds, over models and GPUs ----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize(
    "name", ["resnet18", "resnext50_32x4d", "wide_resnet50_2", "timm:test_resnet", "timm:resnet26d", "timm:seresnet18"]
)
def test_sums_and_bounds(name, mode):
    model = model_of(name).train(mode == "train")
    result = predict(model, (4, 3, 64, 64), HALF, GPUS["mi300x"], IDEAL)
    for pipeline, total in result.totals.items():
        costs = [layer.costs[pipeline] for layer in result.layers]
        assert (total.cost.bytes, total.cost.launches) == (sum(c.bytes for c in costs), sum(c.launches for c in costs))
        assert total.cost.us == pytest.approx(sum(cost.us for cost in costs))
        assert total.blocks <= total.images < total.cost.bytes
        assert total.cost.bytes > result.limit.bytes
        assert total.cost.us > result.limit.us
    moved = [total.images for total in result.totals.values()]
    assert moved == sorted(moved, reverse=True)  # eager, compile, ours
    assert len(set(moved)) == 3
    assert all(layer.name for layer in result.layers)
    convolutions = {path for path, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))}
    assert {layer.name for layer in result.layers} == convolutions
    assert all(layer.limit.flops > 0 for layer in result.layers)


def test_no_layer_is_faster_than_its_limit():
    limits = layers_of(predict(model_of("resnet50"), SHAPE, HALF, H100, IDEAL))
    for layer in limits.values():
        for cost in layer.costs.values():
            # Vectors of channels may be fewer, or be read by the kernel of another layer.
            assert cost.us >= layer.limit.us * (1 - 5e-3), layer.name


def test_the_model_is_left_alone():
    model = build("resnet18").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    predict(model, (2, 3, 64, 64), HALF, H100)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_peaks():
    assert peak_of(H100, HALF) == peak_of(H100, torch.bfloat16) == 989.4e12
    assert peak_of(H100, torch.float32) == 494.7e12  # TF32
    assert peak_of(GPUS["mi300x"], torch.float32) == 163.4e12
    with pytest.raises(ValueError, match=r"dtype is torch.float64, expected torch.float16"):
        peak_of(H100, torch.float64)


def test_bound_changes_with_the_gpu():
    model = model_of("resnet18")
    slow, fast = (predict(model, SHAPE, HALF, GPUS[name]) for name in ("rtx3090", "b200"))
    assert slow.ridge < fast.ridge
    bound = [sum(result.bound(layer) == "compute" for layer in result.layers) for result in (slow, fast)]
    assert bound[0] > bound[1]


def test_back_to_back_is_for_inference():
    with pytest.raises(ValueError, match="back_to_back is for inference"):
        predict(model_of("resnet18").train(), (2, 3, 64, 64), HALF, H100, back_to_back=True)


# --- launches ---------------------------------------------------------------------------------------------------------


def image(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=HALF, device="meta", memory_format=torch.channels_last)


def launches(op: str, reads: list[Tensor], writes: list[Tensor]) -> int:
    def values(tensors: list[Tensor]) -> tuple[Value, ...]:
        return tuple(
            Value(i, tuple(t.shape), t.nbytes, t.dim() == 4 and t is not weight) for i, t in enumerate(tensors)
        )

    weight = reads[1] if len(reads) > 1 else None
    return pipelines.ours([Move(Place(), op, values(reads), values(writes))])[0].launches


@pytest.mark.parametrize("shape", [(128, 64, 56, 56), (128, 64, 7, 7), (2, 64, 7, 7)])
def test_launches_are_those_that_the_kernels_plan(shape):
    x, weight, vector = image(*shape), image(64, 64, 3, 3), torch.empty(64, device="meta")
    affine, geometry, target = Affine(vector, vector), Geometry((1, 1), (1, 1)), "sm_90"
    statistics_plan = forward.plan_conv_statistics(x, affine, weight, geometry, target=target)
    assert launches("conv_statistics", [x, weight], [x, vector]) == len(statistics_plan.launches)
    statistics = torch.empty(65, 64, device="meta")
    assert launches("gram", [x], [statistics]) == len(gram.plan_gram(x, affine, (1, 1), target).launches)
    for gate, sums in ((None, []), (Gate(affine, vector), [vector, vector])):
        back = dgrad.plan_dgrad(x, weight, geometry, x, gate, None, target)
        assert launches("dgrad", [x, weight], [x, *sums]) == len(back.launches)
    wide = image(shape[0], 256, *shape[2:])
    matrices = torch.empty(256, 64, device="meta"), torch.empty(64, 64, device="meta")
    back = dgrad.plan_dgrad_expand(wide, *matrices, vector, (1, 1), x, affine, gate, None, target)
    assert launches("dgrad_expand", [wide, matrices[0]], [x, vector, vector]) == len(back.launches)
    back = tail_backward.plan_tail_backward(x, x, x, vector, None, None, target)
    assert launches("tail_backward", [x], [x, vector, vector]) == len(back.launches)
    pooled = image(shape[0], 64, (shape[2] + 1) // 2, (shape[3] + 1) // 2)
    back = tail_backward.plan_tail_pool_backward(pooled, x, affine, vector, target)
    assert launches("tail_pool_backward", [pooled], [x, vector, vector]) == len(back.launches)
    # A sum in few parts may need no second launch.
    back = wgrad.plan_wgrad(x, x, affine, weight, geometry, target)
    assert launches("wgrad", [x, x], [weight]) >= len(back.launches)


# --- the command ------------------------------------------------------------------------------------------------------

SMALL = ["roofline", "--model", "resnet18", "--batch", "2", "--size", "64"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpu", "h900"], "'h900', expected one of a100, rtx3090"),
        (["--mode", "test"], "'test' is not one of 'eval', 'train'"),
        (["--dtype", "int8"], "'int8' is not one of 'float32', 'float16', 'bfloat16'"),
        (["--plot", "chart.bmp"], "ends in .svg or .png"),
        (["--mode", "train", "--back-to-back"], "is for --mode eval"),
        (["--model", "resnt50"], "did you mean resnet50"),
        (["--batch", "0"], "--batch"),
        (["--memory-efficiency", "1.5"], "--memory-efficiency"),
    ],
)
def test_bad_arguments(arguments, said, capsys):
    assert main(["roofline", *arguments]) == 2
    output = capsys.readouterr()
    assert said in " ".join(output.err.replace("│", " ").split())
    assert output.out == ""


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_command(mode, tmp_path, capsys):
    target = tmp_path / "r.json"
    options = ["--mode", mode, "--gpu", "mi355x", "--dtype", "float32", "--launch", "0"]
    assert main([*SMALL, *options, "--json", str(target)]) == 0
    said = capsys.readouterr().err
    assert roofline.NOTE in said
    assert "AMD Instinct MI355X" in said
    data = json.loads(target.read_text())
    assert data["note"] == roofline.NOTE == "A model: nothing was measured on a GPU."
    assert (data["model"], data["mode"], data["batch"], data["dtype"]) == ("resnet18", mode, 2, "float32")
    assert data["gpu"]["architecture"] == "gfx950"
    assert data["peak_flops_per_second"] == 157.3e12
    assert data["assumptions"] == {
        "compute_efficiency": 0.7, "memory_efficiency": 0.85, "launch_us": 0.0, "caches": "ignored",
    }  # fmt: skip
    cost = {"flops", "bytes", "us", "launches"}
    more = {"title", "images_per_second", "block_bytes", "block_bytes_backward", "image_bytes", "small_launches"}
    assert list(data["totals"]) == ["eager", "compile", "ours"]
    for name, total in data["totals"].items():
        assert set(total) == cost | more
        assert total["images_per_second"] == pytest.approx(2e6 / total["us"])
        assert (total["block_bytes_backward"] > 0) is (mode == "train")
        assert total["bytes"] == sum(layer[name]["bytes"] for layer in data["layers"])
    assert [layer["layer"] for layer in data["layers"]][:2] == ["conv1", "layer1.0.conv1"]
    for layer in data["layers"]:
        assert set(layer) == {"layer", "block", "flops", "intensity", "bound", "limit", "eager", "compile", "ours"}
        assert layer["bound"] in ("memory", "compute")
        assert set(layer["limit"]) == set(layer["ours"]) == cost


def test_help_says_that_it_is_a_model(capsys):
    assert main(["roofline", "--help"]) == 0
    assert "Nothing is measured, and no GPU is needed" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(("suffix", "start"), [(".png", b"\x89PNG"), (".svg", b"<?xml")])
def test_chart(suffix, start, tmp_path):
    pytest.importorskip("matplotlib")
    chart = tmp_path / f"chart{suffix}"
    assert main([*SMALL, "--back-to-back", "--plot", str(chart)]) == 0
    first = chart.read_bytes()
    assert first.startswith(start)
    assert main([*SMALL, "--back-to-back", "--plot", str(chart)]) == 0
    assert chart.read_bytes() == first
    assert list(tmp_path.iterdir()) == [chart]


def test_chart_survives_a_failure(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    from resnet_fast.bench import roofline_chart

    chart = tmp_path / "chart.png"
    chart.write_bytes(b"before")

    def fail(*_: object) -> None:
        raise RuntimeError("the disk is full")

    monkeypatch.setattr(roofline_chart, "_draw", fail)
    assert main([*SMALL, "--plot", str(chart)]) == 1
    assert "the disk is full" in capsys.readouterr().err
    assert chart.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [chart]


def test_chart_needs_matplotlib(tmp_path, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main([*SMALL, "--plot", str(tmp_path / "chart.png")]) == 4
    assert "pip install 'resnet-fast[finetune]'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
