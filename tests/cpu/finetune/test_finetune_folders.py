"""Folders as people have them: which are understood, and what is said of the others, before any work."""

import logging
import os

import pytest
from PIL import Image

from resnet_fast.cli import main
from resnet_fast.finetune import Settings, open_data
from tests.cpu.finetune.finetune_data import TINY, write_folder


def put(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".png":
            Image.new("RGB", (8, 8)).save(path)
        else:
            path.write_bytes(b"")


def opened(folder):
    return open_data(str(folder), Settings())


PAIR = ("cat/1.png", "cat/2.png", "dog/1.png", "dog/2.png")


@pytest.mark.parametrize(("train", "val"), [("Train", "Val"), ("training", "validation"), ("TRAIN", "test")])
def test_parts_by_other_names(train, val, tmp_path):
    put(tmp_path, *(f"{part}/{name}" for part in (train, val) for name in PAIR))
    data = opened(tmp_path)
    assert data.classes == ("cat", "dog") and (len(data.train), len(data.validation)) == (4, 4)


def test_a_class_may_be_called_train(tmp_path):
    put(tmp_path, "bus/1.png", "bus/2.png", "train/1.png", "train/2.png")
    assert opened(tmp_path).classes == ("bus", "train")


def test_classes_may_have_names_of_annotations(tmp_path):
    put(tmp_path, *(f"{name}/{number}.png" for name in ("annotations", "photos", "val") for number in range(3)))
    assert opened(tmp_path).classes == ("annotations", "photos", "val")


def test_litter_is_no_class(tmp_path):
    put(tmp_path, *PAIR, ".ipynb_checkpoints/1.png", "__MACOSX/cat/._1.png", "cat/.ipynb_checkpoints/1-checkpoint.png")
    data = opened(tmp_path)
    assert data.classes == ("cat", "dog") and len(data.train) + len(data.validation) == 4


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["images/1.png", "images/2.png", "masks/1.png", "masks/2.png"], "images/ and masks/: a data set for segment"),
        (["images/1.png", "labels/1.txt"], "images/ and labels/: a data set for detection, in the format of YOLO"),
        (["train/images/1.png", "train/labels/1.txt", "val/images/1.png"], "train/ has images/ and labels/: a data"),
        (["train2017/1.png", "val2017/1.png"], "'train2017', 'val2017' .* seem to be parts and no classes"),
        (["training_set/cat/1.png", "test_set/cat/1.png"], "seem to be parts and no classes"),
        (["train_images/1.png", "test_images/1.png"], "seem to be parts and no classes"),
        (["annotations/a.json", "train2017/1.png", "val2017/1.png"], "annotations/: a data set for detection, in the"),
        (["train/_annotations.coco.json", "train/1.png", "valid/1.png"], r"_annotations.coco.json: a data set for det"),
        (["Annotations/1.xml", "JPEGImages/1.png", "ImageSets/a.txt"], "JPEGImages/: .* Pascal VOC"),
        (["cat/1.png", "cat/2.png"], "one class in .*, 'cat', expected 2 at least"),
        (["data/train/cat/1.png", "data/val/cat/1.png"], "one class in .*, 'data', .* is '.*data' meant"),
        (["train/cat/1.png", "val/cat/1.png"], "one class in .*train', 'cat'"),
        (["val/cat/1.png", "val/dog/1.png"], "which has val/, but no train/ beside it"),
        (["Train/cat/1.png", "Train/dog/1.png"], "which has Train/, but no val/"),
        (["1.png", "2.png"], "2 pictures, but no folder for each class"),
        ([*PAIR, "eel/x.heic", "fox/"], "no picture that can be read for 'eel', 'fox'"),
    ],
)
def test_other_layouts_are_refused_by_name(names, said, tmp_path):
    for name in names:
        if name.endswith("/"):
            (tmp_path / name).mkdir()
        else:
            put(tmp_path, name)
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        opened(tmp_path)


def test_parts_without_classes_are_refused(tmp_path):
    """Never is train learnt against val."""
    put(tmp_path, *(f"{part}/{number}.png" for part in ("train", "val") for number in range(3)))
    with pytest.raises(ValueError, match="train/ and val/ have pictures, but no folder for each class"):
        opened(tmp_path)


def test_what_is_left_out_is_counted(tmp_path, caplog):
    put(tmp_path, *PAIR, "cat/3.heic", "dog/4.heic", "dog/notes.txt", "loose.png")
    with caplog.at_level(logging.WARNING, "resnet_fast.finetune"):
        opened(tmp_path)
    said = [record.getMessage() for record in caplog.records]
    assert said[0].endswith("as no pictures that can be read: 2 .heic, 1 .txt")
    assert said[1].endswith("1 pictures beside the folders of the classes")


@pytest.mark.parametrize("name", ["two\nlines", "a\u2028b", os.fsdecode(b"caf\xe9")])
def test_names_that_no_line_can_hold_are_refused_before_the_work(name, tmp_path, capsys):
    put(tmp_path / "data", *PAIR, f"{name}/1.png")
    assert main(["finetune", str(tmp_path / "data"), *TINY, "--output", str(tmp_path / "out")]) == 1
    assert "rename its folder" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("one_thread")
def test_transparent_pictures_are_mentioned_once(tmp_path, capsys):
    data = write_folder(tmp_path / "data", 30)
    for path in sorted(data.rglob("*.png"))[:9]:
        Image.open(path).convert("RGBA").resize((32, 32)).rotate(30).save(path)
    assert main(["finetune", str(data), *TINY, "--workers", "2", "--epochs", "2", "--output", str(tmp_path / "o")]) == 0
    assert capsys.readouterr().err.count("are shown on white") in (1, 2)  # training, validation
