"""What ``resnet-fast finetune`` reads, in what order, and what it says of data that is not right."""

import itertools
import logging
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from resnet_fast.finetune import Settings, open_data
from resnet_fast.finetune.distributed import Processes
from resnet_fast.finetune.loading import Loader
from resnet_fast.finetune.transforms import for_evaluation, for_training, mixing
from tests.cpu.finetune.finetune_data import pixels, write_cifar10, write_cifar100, write_folder

CPU = torch.device("cpu")


def loaded(images, settings, *, epoch=0, processes=None, kind="folder"):
    loader = Loader(images, for_training(kind, settings), settings, processes or Processes(CPU), shuffled=True)
    return list(loader.epoch(epoch))


# --- kinds of data ------------------------------------------------------------------------------------------------


def test_folder_with_train_and_val(tmp_path):
    write_folder(tmp_path / "train", 30)
    write_folder(tmp_path / "valid", 12)
    data = open_data(str(tmp_path), Settings())
    assert data.classes == ("one", "two", "zero")  # by name, as torchvision's ImageFolder
    assert (len(data.train), len(data.validation)) == (30, 12)
    label = torchvision.datasets.ImageFolder(tmp_path / "train").samples[7]
    assert (data.train.name(7), data.train.label(7)) == label
    assert data.train.load(7).mode == "RGB"


def test_folder_of_classes_alone_is_split(tmp_path):
    write_folder(tmp_path, 60)
    parts = [open_data(str(tmp_path), Settings(seed=seed)) for seed in (0, 0, 1)]
    names = [{part.train.name(index) for index in range(len(part.train))} for part in parts]
    apart = {parts[0].validation.name(index) for index in range(len(parts[0].validation))}
    assert len(names[0]) == 48 and len(apart) == 12 and not names[0] & apart
    assert {parts[0].validation.label(index) for index in range(12)} == {0, 1, 2}
    assert names[0] == names[1] != names[2]


@pytest.mark.parametrize(("write", "sizes"), [(write_cifar10, (40, 8)), (write_cifar100, (24, 12))])
@pytest.mark.parametrize("inside", [False, True])
def test_cifar(write, sizes, inside, tmp_path):
    folder = write(tmp_path)
    data = open_data(str(folder if inside else tmp_path), Settings())
    assert (len(data.train), len(data.validation)) == sizes
    assert data.classes[:2] == ("class0", "class1")
    images, labels = pixels(sum(sizes), 10)
    assert [data.train.label(index) for index in range(sizes[0])] == labels[: sizes[0]].tolist()
    assert np.array_equal(data.train.load(sizes[0] - 1)[2].numpy(), images[sizes[0] - 1])
    with (folder / ("test_batch" if write is write_cifar10 else "test")).open("rb") as file:
        assert np.array_equal(pickle.load(file, encoding="latin1")["data"][0, :1024].reshape(32, 32), images[sizes[0]])


def test_digits():
    data = open_data("digits", Settings())
    assert (len(data.train), len(data.validation), len(data.classes)) == (1347, 450, 10)
    assert data.train.load(0).shape == (3, 32, 32) and data.train.load(0).dtype == torch.uint8
    assert data.train.load(0).max() > 200


# --- data that is not right ---------------------------------------------------------------------------------------


def test_what_is_wrong_with_a_folder_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected digits or a folder"):
        open_data(str(tmp_path / "absent"), Settings())
    with pytest.raises(FileNotFoundError, match="has no class folder"):
        open_data(str(tmp_path), Settings())
    (tmp_path / "cat").mkdir()
    (tmp_path / "dog").mkdir()
    with pytest.raises(FileNotFoundError, match="no picture that can be read for 'cat', 'dog' in"):
        open_data(str(tmp_path), Settings())
    Image.new("RGB", (8, 8)).save(tmp_path / "dog" / "one.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "cat" / "only.png")
    with pytest.raises(ValueError, match="class 'cat' has one image"):
        open_data(str(tmp_path), Settings())


def test_train_and_val_must_have_the_same_classes(tmp_path):
    write_folder(tmp_path / "train", 10, classes=3)
    with pytest.raises(FileNotFoundError, match="val/, valid/"):
        open_data(str(tmp_path), Settings())
    write_folder(tmp_path / "val", 10, classes=2)
    with pytest.raises(ValueError, match=r"has 2 classes, but train/ has 3, among them not 'two'"):
        open_data(str(tmp_path), Settings())
    (tmp_path / "val" / "one").rename(tmp_path / "val" / "uno")
    write_folder(tmp_path / "more", 3, classes=3)
    (tmp_path / "more" / "two").rename(tmp_path / "val" / "two")
    with pytest.raises(ValueError, match=r"has 'two' as class 0, but train/ has 'one'"):
        open_data(str(tmp_path), Settings())


def test_code_in_a_cifar_file_is_not_run(tmp_path):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "marker"),)

    folder = write_cifar10(tmp_path)
    (folder / "data_batch_3").write_bytes(pickle.dumps({"data": Payload(), "labels": []}))
    with pytest.raises(ValueError, match=r"data_batch_3' is no CIFAR file.*mkdir"):
        open_data(str(tmp_path), Settings())
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\x80\x02}", "no CIFAR file"),
        (pickle.dumps({"labels": [0]}), "has no 'data'"),
        (pickle.dumps({"data": np.zeros((2, 3072)), "labels": [0, 1]}), r"data float64\[2, 3072\]"),
        (pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [0]}), "1 labels"),
        (pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [0, 10]}), "labels from 0 to 10"),
    ],
)
def test_damaged_cifar_file(content, said, tmp_path):
    folder = write_cifar10(tmp_path)
    (folder / "data_batch_5").write_bytes(content)
    with pytest.raises(ValueError, match=said):
        open_data(str(tmp_path), Settings())


def test_missing_cifar_file(tmp_path):
    (write_cifar10(tmp_path) / "data_batch_2").unlink()
    with pytest.raises(FileNotFoundError, match="data_batch_2"):
        open_data(str(tmp_path), Settings())


# --- order and augmentation ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return open_data(str(write_folder(tmp_path_factory.mktemp("images"), 60)), Settings()).train


AUGMENTED = {"batch_size": 8, "image_size": 32, "auto_augment": "ta_wide", "random_erase": 0.5}


def test_batches_depend_on_seed_and_epoch_alone(images):
    settings = Settings(**AUGMENTED, workers=0)
    torch.manual_seed(1)
    first = loaded(images, settings)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    again = loaded(images, settings)
    assert torch.equal(torch.get_rng_state(), state)
    in_workers = loaded(images, Settings(**AUGMENTED, workers=2))
    assert len(first) == 6
    for batches in (again, in_workers):
        for one, other in zip(first, batches, strict=True):
            assert torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)
    assert not torch.equal(first[0].images, loaded(images, settings, epoch=1)[0].images)
    assert not torch.equal(first[0].images, loaded(images, Settings(**AUGMENTED, workers=0, seed=1))[0].images)


def test_the_same_image_is_augmented_anew_each_epoch(images):
    settings = Settings(**{**AUGMENTED, "batch_size": 48}, workers=0)
    both = [loaded(images, settings, epoch=epoch)[0].images.flatten(1) for epoch in (0, 1)]
    assert torch.cdist(both[0], both[1]).min() > 0


def test_workers_that_stay_hear_of_the_next_epoch(images):
    settings = Settings(**AUGMENTED, workers=1)
    loader = Loader(images, for_training("folder", settings), settings, Processes(CPU), shuffled=True)
    for epoch in (3, 4):
        expected = loaded(images, Settings(**AUGMENTED, workers=0), epoch=epoch)
        for one, other in zip(loader.epoch(epoch), expected, strict=True):
            assert torch.equal(one.images, other.images)


def test_processes_share_the_batches_of_one(images):
    alone = loaded(images, Settings(**{**AUGMENTED, "batch_size": 8}, workers=0))
    half = Settings(**{**AUGMENTED, "batch_size": 4}, workers=0)
    shares = [loaded(images, half, processes=Processes(CPU, rank, 2)) for rank in range(2)]
    assert len(alone) == len(shares[0]) == len(shares[1])
    for whole, one, other in zip(alone, *shares, strict=True):
        assert torch.equal(whole.images[::2], one.images) and torch.equal(whole.images[1::2], other.images)


def test_validation_images_are_each_seen_once(images):
    settings = Settings(batch_size=8, image_size=32, workers=0)
    prepare = for_evaluation("folder", settings)
    loaders = [Loader(images, prepare, settings, Processes(CPU, rank, 5), shuffled=False) for rank in range(5)]
    counts = [sum(len(batch.labels) for batch in loader.epoch(0)) for loader in loaders]
    assert counts == [10, 10, 10, 9, 9]
    assert sum(counts) == len(images)


def test_evaluation_takes_the_centre_of_a_folders_images_and_all_of_small_ones():
    wide = Image.new("RGB", (400, 100))
    wide.paste((255, 255, 255), (150, 0, 250, 100))
    centre = for_evaluation("folder", Settings(image_size=56))(wide)
    assert centre.shape == (3, 56, 56)
    white = (1 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(centre.mean((1, 2)), white)
    whole = for_evaluation("digits", Settings())(torch.full((3, 32, 32), 255, dtype=torch.uint8))
    assert torch.equal(whole, torch.ones(3, 32, 32))


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.4, 0.0), (0.0, 1.0), (0.4, 1.0)])
def test_mixing_keeps_shares_of_classes(mixup, cutmix):
    torch.manual_seed(0)
    mix = mixing(Settings(mixup_alpha=mixup, cutmix_alpha=cutmix), 5)
    seen = set()
    for _ in range(20):
        images = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 16, 16).contiguous()
        mixed, shares = mix(images, torch.arange(4))
        assert mixed.shape == images.shape and shares.shape == (4, 5)
        torch.testing.assert_close(shares.sum(1), torch.ones(4))
        # An image is mixed of classes in the shares that its label says.
        torch.testing.assert_close(mixed.mean((1, 2, 3)), shares @ torch.arange(5.0), atol=1e-5, rtol=0)
        pasted = all(value in (0, 1, 2, 3) for value in mixed.unique().tolist())
        seen.add("cutmix" if pasted else "mixup")
    assert seen == {name for name, alpha in (("mixup", mixup), ("cutmix", cutmix)) if alpha}


def test_no_mixing():
    assert mixing(Settings(), 5) is None


# --- unreadable images --------------------------------------------------------------------------------------------


def test_unreadable_image_is_left_out_and_named_once(tmp_path, caplog):
    folder = write_folder(tmp_path, 30)
    images = open_data(str(folder), Settings(val_fraction=0.01)).train
    broken = [Path(images.name(index)) for index in (0, 13, 26)]
    broken[0].write_bytes(broken[0].read_bytes()[:60])
    broken[1].write_bytes(b"")
    broken[2].write_text("no image")
    settings = Settings(batch_size=9, image_size=32, workers=1)
    loader = Loader(images, for_training("folder", settings), settings, Processes(CPU), shuffled=True)
    with caplog.at_level(logging.WARNING, "resnet_fast.finetune"):
        for epoch in range(2):
            batches = list(loader.epoch(epoch))
            skipped = list(itertools.chain.from_iterable(batch.unreadable for batch in batches))
            assert {name for name, _ in skipped} <= {str(path) for path in broken}
            assert [len(batch.labels) + len(batch.unreadable) for batch in batches] == [9, 9, 9]
            assert all(len(batch.images) == len(batch.labels) for batch in batches)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == len(set(said)) == 3
    assert all(any(str(path) in line for line in said) for path in broken)
