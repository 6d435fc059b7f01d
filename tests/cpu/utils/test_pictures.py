"""Pictures of every kind that people have, as 8 bits a channel, upright and on white."""

import struct

import numpy as np
import pytest
from PIL import Image

from resnet_fast.utils.pictures import TRANSPARENT, find_files, read_picture

RAMP = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)


def rotated(path, orientation, size=(6, 4)):
    """A picture with a white left upper corner, which EXIF data say to turn."""
    picture = Image.new("RGB", size)
    picture.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture.save(path, exif=exif)
    return path


@pytest.mark.parametrize("suffix", [".png", ".tif", ".pgm"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_16_bits_are_scaled_to_8(suffix, mode, tmp_path):
    Image.fromarray(RAMP).save(tmp_path / f"x{suffix}")
    picture = read_picture(tmp_path / f"x{suffix}", mode)
    assert picture.mode == mode
    found = np.asarray(picture).reshape(8, 8, -1)[..., 0]
    assert np.abs(found - RAMP / 257).max() <= 0.5


@pytest.mark.parametrize(("dtype", "said"), [(np.float32, "floating point"), (np.int32, "integers of 32 bits")])
def test_numbers_of_no_known_range_are_refused(dtype, said, tmp_path):
    Image.fromarray(np.ones((4, 4), dtype)).save(tmp_path / "x.tif")
    with pytest.raises(ValueError, match=said):
        read_picture(tmp_path / "x.tif")


@pytest.mark.parametrize(("orientation", "corner"), [(1, (0, 0)), (3, (3, 5)), (6, (0, 3)), (8, (5, 0))])
def test_pictures_are_turned_as_their_exif_data_say(orientation, corner, tmp_path):
    found = np.asarray(read_picture(rotated(tmp_path / "x.png", orientation), "L"))
    assert np.argwhere(found == 255).tolist() == [list(corner)]


def test_broken_exif_data_do_not_make_a_picture_unreadable(tmp_path):
    Image.new("RGB", (4, 4), "red").save(
        tmp_path / "x.jpg", exif=b"Exif\0\0MM\0*" + struct.pack(">I", 99) + b"\xff" * 20
    )
    assert read_picture(tmp_path / "x.jpg").size == (4, 4)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_white(mode, tmp_path):
    picture = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    picture.putpixel((1, 0), (0, 0, 0, 255))
    picture.convert(mode).save(tmp_path / "x.png")
    found = read_picture(tmp_path / "x.png")
    assert np.asarray(found)[0, :, 0].tolist() == [255, 0]
    assert TRANSPARENT in found.info


def test_opaque_pictures_are_as_they_were(tmp_path):
    Image.new("RGBA", (2, 2), (9, 8, 7, 255)).save(tmp_path / "x.png")
    found = read_picture(tmp_path / "x.png")
    assert found.getpixel((0, 0)) == (9, 8, 7) and TRANSPARENT not in found.info


def test_files_that_end_too_early_are_refused(tmp_path):
    rotated(tmp_path / "x.png", 6, (60, 40))
    (tmp_path / "x.png").write_bytes((tmp_path / "x.png").read_bytes()[:-40])
    with pytest.raises(OSError):  # noqa: PT011  the words are Pillow's
        read_picture(tmp_path / "x.png")


def test_pictures_are_found_and_others_counted(tmp_path):
    for name in ("b.GIF", "a.jfif", "sub/c.webp", "x.heic", "y.txt", "README", ".hidden.png", "._a.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    for folder in ("__MACOSX", ".ipynb_checkpoints"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a-checkpoint.png").write_bytes(b"")
    pictures, others = find_files(tmp_path)
    assert [path.relative_to(tmp_path).as_posix() for path in pictures] == ["a.jfif", "b.GIF", "sub/c.webp"]
    assert others == {".heic": 1, ".txt": 1, "without a suffix": 1}
