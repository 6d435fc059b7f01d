"""Calibration of int8 files: counts, where they say to clip, and the images that are counted."""

import weakref

import numpy as np
import onnx_ir as ir
import pytest
import torch
from PIL import Image
from torch import nn

from resnet_fast.export import export_onnx
from resnet_fast.export.metadata import Metadata
from resnet_fast.export.quantise.calibration import observe
from resnet_fast.export.quantise.histogram import METHODS, Histogram, clip_at
from resnet_fast.export.quantise.images import Source, open_images

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
METADATA = Metadata("Net", (3, 16, 16), None, MEAN, STD)


def counted(*parts):
    histogram = Histogram()
    for part in parts:
        histogram.add(np.asarray(part, dtype=np.float32))
    return histogram


def symmetric(point):
    return point / 127


def rounding_error(values, point):
    step = symmetric(point)
    return float(np.mean((np.clip(np.rint(values / step) * step, -point, point) - values) ** 2))


# --- counts -----------------------------------------------------------------------------------------------------------


def test_growing_range_moves_no_count():
    generator = np.random.default_rng(0)
    parts = [generator.normal(0, scale, 5000).astype(np.float32) for scale in (1e-6, 1, 0.1, 300)]
    histogram = counted([0.0, 0.0], *parts)
    values = np.abs(np.concatenate([np.zeros(2, np.float32), *parts]))
    assert histogram.counts.sum() == values.size
    assert histogram.amax == values.max()
    assert histogram.limit / 2 < histogram.amax <= histogram.limit
    edges = np.linspace(0, histogram.limit, len(histogram.counts) + 1)
    # float32 may put a value that is all but on an edge on its other side.
    expected = np.cumsum(np.histogram(values, edges)[0])
    assert np.abs(np.cumsum(histogram.counts) - expected).max() <= 2


def test_extremes_and_zeros():
    histogram = counted(np.zeros((2, 3)), np.zeros(0), [-1.5, 0.25])
    assert (histogram.lowest, histogram.highest, histogram.amax) == (-1.5, 0.25, 1.5)
    assert histogram.counts.sum() == 8
    assert counted([2.0, 3.0]).lowest == 0  # 0 must stay a number that 8 bits have
    for method in METHODS:
        assert clip_at(counted(np.zeros(5)), method, symmetric) == 0


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite(value):
    with pytest.raises(ValueError, match="not finite"):
        counted([1.0, value])


def test_more_values_than_float32_counts():
    histogram = Histogram()
    histogram.add(np.array([1.0], dtype=np.float32))
    histogram.add(np.broadcast_to(np.float32(0), (2**24 + 3,)).copy())
    assert histogram.counts[0] == 2**24 + 3


# --- where to clip ----------------------------------------------------------------------------------------------------


def test_percentile():
    values = np.random.default_rng(0).normal(size=100_000)
    histogram = counted(values)
    width = histogram.limit / len(histogram.counts)
    for percentile in (50, 99, 99.9):
        found = clip_at(histogram, "percentile", symmetric, percentile)
        exact = np.quantile(np.abs(values), percentile / 100, method="inverted_cdf")
        assert exact * (1 - 1e-6) <= found <= exact + width  # the end of the bin that it lies in
    assert clip_at(histogram, "percentile", symmetric, 100) == histogram.amax
    assert clip_at(histogram, "max", symmetric) == histogram.amax


@pytest.mark.parametrize("method", ["mse", "entropy"])
def test_outliers_are_clipped(method):
    generator = np.random.default_rng(0)
    values = generator.normal(size=1_000_000)
    found = clip_at(counted(values, [30.0]), method, symmetric)
    assert 2 < found < 15
    assert rounding_error(values, found) < rounding_error(values, 30) / 3


@pytest.mark.parametrize("method", ["mse", "entropy"])
def test_what_has_no_outliers_is_not_clipped(method):
    values = np.random.default_rng(0).uniform(-3, 3, 100_000)
    assert clip_at(counted(values), method, symmetric) > 0.97 * 3


def test_mse_is_the_smallest_that_can_be_found():
    values = np.random.default_rng(0).laplace(size=50_000)
    found = clip_at(counted(values), "mse", symmetric)
    best = min(rounding_error(values, point) for point in np.linspace(0.02, 1, 200) * np.abs(values).max())
    # The counts round a value by at most half a bin, 1/4096 of the range; a step in 8 bits is larger by far.
    assert rounding_error(values, found) <= 1.02 * best


# --- images -----------------------------------------------------------------------------------------------------------


def all_of(images, outputs=3, metadata=METADATA):
    source = open_images(images, "calibration", metadata, outputs)
    batches = list(source.batches(4))
    labels = [label for _, label in batches]
    return torch.cat([batch for batch, _ in batches]), None if None in labels else torch.cat(labels).tolist(), source


@pytest.fixture
def pictures(tmp_path):
    """Two in each of three folders of classes, with what they should become."""
    generator = np.random.default_rng(0)
    expected = []
    for index, name in enumerate("cab"):
        (tmp_path / name).mkdir()
        for number in range(2):
            colour = generator.integers(0, 256, 3, dtype=np.uint8)
            Image.fromarray(np.tile(colour, (20 + index, 40, 1))).save(tmp_path / name / f"{number}.png")
            expected.append((name, (colour / 255 - MEAN) / STD))
    (tmp_path / "a" / "notes.txt").write_text("no image")
    return tmp_path, [values for _, values in sorted(expected, key=lambda pair: pair[0])]


def test_folder(pictures):
    folder, expected = pictures
    images, labels, source = all_of(folder)
    assert images.shape == (6, 3, 16, 16)
    assert source.total == 6
    assert labels == [0, 0, 1, 1, 2, 2]
    for image, values in zip(images, expected, strict=True):
        torch.testing.assert_close(image, torch.tensor(values).float().view(3, 1, 1).expand(3, 16, 16))


def test_labels_of_folders(pictures):
    folder, _ = pictures
    named = Metadata("Net", (3, 16, 16), ("x", "b", "c", "a"), MEAN, STD)
    assert all_of(folder, 4, named)[1] == [3, 3, 1, 1, 2, 2]
    assert all_of(folder, 4)[1] is None  # three folders cannot be the classes of a model of four
    assert all_of(folder / "a", 1)[1] is None


def test_folder_keeps_what_the_crop_keeps(tmp_path):
    """A grey ramp: 7/8 of the short side are left, from its middle."""
    ramp = np.tile(np.arange(112, dtype=np.uint8)[:, None], (1, 128))
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    metadata = Metadata("Net", (1, 98, 98), None, (0.0,), (1.0,))
    image = all_of(tmp_path, metadata=metadata)[0][0, 0] * 255
    assert image[:, 0].tolist() == pytest.approx(np.arange(7, 105))


def test_files_of_tensors(tmp_path):
    images, labels = torch.randn(5, 3, 16, 16), torch.tensor([2, 0, 1, 1, 0])
    np.save(tmp_path / "a.npy", images.numpy())
    np.savez(tmp_path / "a.npz", images=images.double().numpy(), labels=labels.numpy())
    torch.save(images, tmp_path / "a.pt")
    torch.save({"images": images, "labels": labels}, tmp_path / "b.pt")
    for name, expected in (("a.npy", None), ("a.npz", labels.tolist()), ("a.pt", None), ("b.pt", labels.tolist())):
        found, found_labels, source = all_of(tmp_path / name)
        assert torch.equal(found, images)
        assert found_labels == expected
        assert source.total == 5


def test_bytes_are_normalised():
    raw = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    expected = (raw.double() / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    torch.testing.assert_close(all_of(raw)[0], expected.float())


def test_iterables():
    images, labels = torch.randn(6, 3, 16, 16), torch.tensor([0, 1, 2, 0, 1, 2])
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), batch_size=4)
    for given, expected, total in (
        (list(images), None, None),
        (images.split(4), None, None),
        (loader, labels.tolist(), 6),
        ((pair for pair in zip(images, labels, strict=True)), labels.tolist(), None),
    ):
        found, found_labels, source = all_of(given)
        assert torch.equal(found, images)
        assert found_labels == expected
        assert source.total == total


def test_unusable_images(tmp_path):
    empty, broken = tmp_path / "empty", tmp_path / "broken"
    empty.mkdir()
    broken.mkdir()
    (broken / "x.jpg").write_bytes(b"no picture")
    np.save(tmp_path / "flat.npy", np.zeros((5, 3)))
    (tmp_path / "text.pt").write_text("no tensors")
    np.savez(tmp_path / "other.npz", data=np.zeros((1, 3, 16, 16)))
    (tmp_path / "a.txt").write_text("")
    unnormalised = Metadata("Net", (3, 16, 16))
    image = torch.zeros(1, 3, 16, 16)
    for given, error, message in (
        (empty, FileNotFoundError, "calibration is '.*empty', expected a folder with pictures in it or below"),
        (broken, ValueError, "calibration is .*broken., where none of 1 pictures can be read"),
        (tmp_path / "absent", FileNotFoundError, "absent', expected a folder of images or a file"),
        (tmp_path / "flat.npy", ValueError, r"calibration has shape \[5, 3\], expected \[N, C, H, W\]"),
        (tmp_path / "text.pt", ValueError, "text.pt': "),
        (tmp_path / "other.npz", ValueError, r"holds the keys \['data'\], expected images"),
        (tmp_path / "a.txt", ValueError, "expected a folder, or a file that ends in .npy, .npz, .pt or .pth"),
        (torch.zeros(0, 3, 16, 16), ValueError, "N of at least 1"),
        (
            torch.zeros(2, 3, 15, 16),
            ValueError,
            r"calibration\[0\] is an image of shape \[3, 15, 16\], expected \[3, 1",
        ),
        ([image, image * torch.nan], ValueError, r"calibration\[1\] is an image with NaN"),
        ([image.int()], ValueError, "of torch.int32, expected floating point or uint8"),
        ([], ValueError, "calibration is empty"),
        ([(image, torch.tensor([3]))], ValueError, r"calibration\[0\] has label 3, expected 0 to 2"),
        ([(image, torch.tensor([1, 2]))], ValueError, "2 labels for a batch of 1 images"),
        (5, TypeError, "calibration is int, expected a path, a tensor or an iterable"),
    ):
        with pytest.raises(error, match=message):
            all_of(given)
    with pytest.raises(ValueError, match="mean is None and std is None, expected 3 numbers each"):
        all_of(image.byte(), metadata=unnormalised)


# --- a pass over them -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)).eval()
    path = tmp_path_factory.mktemp("network") / "m.onnx"
    export_onnx(model, path, input_size=(3, 16, 16), verify=False)
    return model, ir.load(path)


def test_observed_values(network):
    model, program = network
    images = torch.randn(21, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    told = []
    source = open_images(images, "calibration", METADATA, 3)
    observed = observe(program, ["input", "relu", "view"], source, lambda *stage: told.append(stage))
    with torch.inference_mode():
        relu = model[:2](images)
        expected = {"input": images, "relu": relu, "view": model[2:4](relu)}
    assert observed.images == 21
    assert torch.equal(observed.kept[0], images)
    assert told == [("calibrating", count, 21) for count in (0, 16, 21)]
    for name, values in expected.items():
        histogram = observed.histograms[name]
        assert histogram.counts.sum() == values.numel()
        assert histogram.highest == pytest.approx(values.max().item(), rel=1e-5)
        assert histogram.lowest == pytest.approx(min(values.min().item(), 0), rel=1e-5)


def test_only_the_first_images_stay_in_memory(network):
    alive, most = weakref.WeakSet(), 0

    def items():
        nonlocal most
        generator = torch.Generator().manual_seed(0)
        for _ in range(500):
            image = torch.randn(3, 16, 16, generator=generator)
            alive.add(image)
            most = max(most, len(alive))
            yield image, None

    observed = observe(network[1], ["relu"], Source(items, None), lambda *stage: None)
    assert observed.images == 500
    assert len(observed.kept[0]) == 128
    assert most <= 2 * 16 + 1  # a batch, the one before it, and the next image


def test_model_that_overflows_is_named(network):
    model, program = network
    images = torch.zeros(2, 3, 16, 16)
    images[0, :, 4:7, 4:7] = 3e38 * model[0].weight[0].detach().sign()
    with pytest.raises(ValueError, match="gives relu values that are not finite"):
        observe(program, ["relu"], open_images(images, "calibration", METADATA, 3), lambda *stage: None)
