"""Pictures of bytes as a file's input: resized, cropped and normalised in the graph, as torchvision does it."""

import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.models import ResNet50_Weights
from torchvision.transforms import InterpolationMode, v2

from resnet_fast.export import Preprocess, export_onnx, tensorrt
from resnet_fast.export.file_checks import metadata_of
from resnet_fast.export.metadata import gather

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Pixels(nn.Module):
    """A classifier that gives every 16th pixel: what it gives shows what it was given."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1, bias=False)
        self.conv.weight.data = torch.eye(3).view(3, 3, 1, 1)

    def forward(self, x):
        return self.conv(x)[:, :, ::16, ::16].flatten(1)


def photographs():
    from skimage import data
    from sklearn.datasets import load_sample_image

    tall = data.coffee()[:, 100:277]
    return [
        data.astronaut(),
        data.chelsea(),
        tall,
        data.rocket(),
        load_sample_image("china.jpg"),
        data.chelsea()[::4, ::4],
    ]


def exported(path, preprocess, **kwargs):
    export_onnx(Pixels(), path, preprocess=preprocess, tensorrt=False, **kwargs)
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def transforms(preprocess, *kind):
    """torchvision's own, up to bytes."""
    mode = InterpolationMode(preprocess.interpolation)
    return v2.Compose([*kind, v2.Resize(preprocess.resize, interpolation=mode), v2.CenterCrop(preprocess.crop)])


def normalised(pixels, preprocess):
    mean, std = (
        torch.tensor(values, dtype=torch.float64).view(-1, 1, 1) for values in (preprocess.mean, preprocess.std)
    )
    return (torch.as_tensor(np.array(pixels)).permute(2, 0, 1).double() / 255 - mean) / std


# torchvision rounds to bytes after the horizontal pass and after the vertical one, half a level each. The weights of
# the second enlarge the first by the sum of their magnitudes: 1 for the triangle, at most 1.25 for the cubic (half-way
# between two pixels, 9/16 of each and -1/16 of their neighbours). Pillow's weights are integers of 22 bits: 255 * 10 *
# 2**-22 is the little that is left.
LEVELS = {"bilinear": 0.5 + 0.5 + 0.001, "bicubic": 0.5 + 0.5 * 1.25 + 0.001}


@pytest.mark.parametrize(
    ("interpolation", "crop", "resize"), [("bilinear", (224, 224), 256), ("bicubic", (160, 192), 208)]
)
def test_photographs_arrive_as_torchvision_gives_them(interpolation, crop, resize, tmp_path):
    preprocess = Preprocess(crop, MEAN, STD, resize, interpolation)
    runtime = exported(tmp_path / "m.onnx", preprocess, input_size=(3, *crop))
    (taken,) = runtime.get_inputs()
    assert (taken.name, taken.type, taken.shape) == ("image", "tensor(uint8)", ["batch", "height", "width", 3])
    scale = 255 * torch.tensor(STD).view(-1, 1, 1)
    for image in photographs():
        if interpolation == "bicubic":
            # Pillow cuts off what overshoots between its passes as well; with half the contrast, nothing does.
            image = image // 2 + np.uint8(64)
        (found,) = runtime.run(None, {"image": image[None]})
        found = torch.from_numpy(found).double().view(3, -(-crop[0] // 16), -(-crop[1] // 16))
        expected = normalised(transforms(preprocess)(Image.fromarray(image)), preprocess)[:, ::16, ::16]
        assert ((found - expected).abs() * scale).max() <= LEVELS[interpolation]


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_pictures_arrive_as_float64_gives_them(interpolation, tmp_path):
    preprocess = Preprocess((96, 128), MEAN, STD, 144, interpolation)
    runtime = exported(tmp_path / "m.onnx", preprocess, input_size=(3, 96, 128))
    scale = 255 * torch.tensor(STD).view(-1, 1, 1)
    noise = np.random.default_rng(0).integers(0, 256, (1000, 777, 3), np.uint8)
    for image in (*photographs(), noise, noise[:50, :60]):
        (found,) = runtime.run(None, {"image": image[None]})
        found = torch.from_numpy(found).double().view(3, 6, 8)
        precise = preprocess(torch.from_numpy(np.array(image))[None], torch.float64)[0, :, ::16, ::16]
        # Centres up to 1000 in float32 are off by up to 1000 * 2**-24 pixels after each of two roundings; a pixel is at
        # most 255 levels from the next, in each direction.
        assert ((found - precise).abs() * scale).max() <= 2 * 2 * 1000 * 2**-24 * 255


def test_a_batch_is_what_its_pictures_are_alone(tmp_path):
    preprocess = Preprocess((96, 96), MEAN, STD, 110)
    runtime = exported(tmp_path / "m.onnx", preprocess, input_size=(3, 96, 96))
    images = np.random.default_rng(0).integers(0, 256, (3, 200, 150, 3), np.uint8)
    (together,) = runtime.run(None, {"image": images})
    for image, row in zip(images, together, strict=True):
        (alone,) = runtime.run(None, {"image": image[None]})
        np.testing.assert_allclose(alone[0], row, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(300, 451), (451, 300), (77, 91), (224, 256), (257, 256), (1, 5)])
def test_sizes_and_crops_are_those_of_torchvision(size):
    """Against float64 tensors, where nothing is rounded to bytes."""
    preprocess = Preprocess((223, 224), (0.0,) * 3, (1 / 255,) * 3, 256)
    image = torch.randint(256, (*size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = transforms(preprocess)(image.permute(2, 0, 1).double())
    torch.testing.assert_close(preprocess(image[None], torch.float64)[0], expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_normalise_takes_pictures_of_the_network_s_size(precision, tmp_path):
    path = tmp_path / "m.onnx"
    export_onnx(Pixels(), path, precision=precision, preprocess="normalise", input_size=(3, 32, 48), mean=MEAN, std=STD)
    (taken,) = onnx.load(path).graph.input
    assert [dim.dim_value for dim in taken.type.tensor_type.shape.dim] == [0, 32, 48, 3]
    said = metadata_of(onnx.load(path))
    assert said.preprocess == Preprocess((32, 48), MEAN, STD)
    if precision == "fp32":
        image = np.random.default_rng(0).integers(0, 256, (2, 32, 48, 3), np.uint8)
        (found,) = onnxruntime.InferenceSession(path).run(None, {"image": image})
        expected = [normalised(one, said.preprocess)[:, ::16, ::16].flatten().numpy() for one in image]
        np.testing.assert_allclose(found, expected, rtol=0, atol=4 * 2**-23 * 3)


def test_file_says_how_it_preprocesses(tmp_path):
    weights = ResNet50_Weights.IMAGENET1K_V2
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 1000))
    path = tmp_path / "m.onnx"
    export_onnx(model, path, preprocess=True, weights=weights, verify=False)
    said = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert said["input_layout"] == "NHWC"
    assert json.loads(said["preprocess"]) == {
        "crop": [224, 224], "mean": list(MEAN), "std": list(STD), "resize": 232, "interpolation": "bilinear"
    }  # fmt: skip
    assert metadata_of(onnx.load(path)).preprocess == Preprocess((224, 224), MEAN, STD, 232)


def test_what_a_model_of_timm_says_is_used():
    timm = pytest.importorskip("timm")
    metadata = gather(timm.create_model("resnet50d"), None, None, None, None, None)
    config = timm.data.resolve_data_config({}, model=timm.create_model("resnet50d"))
    resize, _, crop = timm.data.create_transform(**config).transforms[:3][0], None, config["input_size"][1:]
    preprocess = metadata.preprocessing()
    assert preprocess.crop == tuple(crop)
    assert preprocess.resize == resize.size
    assert preprocess.interpolation == config["interpolation"]


def test_resizing_follows_another_size():
    metadata = gather(Pixels(), (3, 112, 112), None, None, None, ResNet50_Weights.IMAGENET1K_V1)
    assert metadata.preprocessing().resize == 128


@pytest.mark.skipif(not tensorrt.available(), reason="the TensorRT-RTX wheels (extra `tensorrt`) are missing")
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_tensorrt_takes_pictures_of_any_size(interpolation, tmp_path):
    preprocess = Preprocess((64, 64), MEAN, STD, 72, interpolation)
    result = export_onnx(
        Pixels(), tmp_path / "m.onnx", precision="fp16", preprocess=preprocess, input_size=(3, 64, 64), tensorrt=True
    )
    operators = {operator for layer in result.engine.layers for operator in layer.operators}
    assert {"MatMul", "Conv"} <= operators


@pytest.mark.parametrize(
    ("preprocess", "message"),
    [
        (True, "mean is None, expected a number per channel"),
        ("resize", "preprocess is 'resize', expected False, True, 'normalise' or a Preprocess"),
        (Preprocess((32, 32), MEAN, STD, 36), r"preprocess gives \(3, 32, 32\), expected input_size \(3, 32, 48\)"),
    ],
)
def test_bad_preprocess(preprocess, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        export_onnx(Pixels(), tmp_path / "m.onnx", preprocess=preprocess, input_size=(3, 32, 48))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"resize": 223}, r"resize is 223, expected at least 224, so that the crop \(200, 224\) fits in"),
        ({"interpolation": "nearest"}, "interpolation is 'nearest', expected one of bilinear, bicubic"),
        ({"std": (1.0, 0.0, 1.0)}, "expected 3 positive numbers"),
        ({"std": (1.0,)}, "expected 3 positive numbers"),
    ],
)
def test_bad_descriptions(arguments, message):
    with pytest.raises(ValueError, match=message):
        Preprocess(**{"crop": (200, 224), "mean": MEAN, "std": STD, "resize": 256, **arguments})
