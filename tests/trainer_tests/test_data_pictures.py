"""Picture files of every mode become uint8 arrays of one size, or one line of refusal."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from trainer.config import DataError
from trainer.data.pictures import read_header, read_picture

_RGB = (3, 8, 8)
_GRAY = (1, 8, 8)


def _saved(path: Path, image: Image.Image, **options: Any) -> Path:
    image.save(path, **options)
    return path


def test_reading_pictures_needs_no_torch() -> None:
    code = "import sys, trainer.data.pictures; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "I;16"])
@pytest.mark.parametrize("input_size", [_RGB, _GRAY, (3, 40, 30)])
def test_every_mode_becomes_gray_or_rgb(
    tmp_path: Path, mode: str, input_size: tuple[int, int, int]
) -> None:
    path = tmp_path / ("picture.tif" if mode in ("CMYK", "PA", "I;16") else "picture.png")
    if mode == "PA":
        image = Image.new("RGBA", (20, 10), (255, 255, 255, 255))
    elif mode == "I;16":
        image = Image.fromarray(np.full((10, 20), 65535, dtype=np.uint16))
    else:
        image = Image.new("RGB", (20, 10), "white").convert(mode)
    pixels = read_picture(_saved(path, image), input_size=input_size)
    assert pixels.dtype == np.uint8
    assert pixels.shape == input_size
    assert pixels.flags["C_CONTIGUOUS"]
    assert (pixels == 255).all()


def test_an_image_of_the_right_size_keeps_its_pixels(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    path = _saved(tmp_path / "exact.png", Image.fromarray(values))
    assert np.array_equal(read_picture(path, input_size=_RGB), values.transpose(2, 0, 1))
    gray = _saved(tmp_path / "gray.png", Image.fromarray(values[..., 0]))
    assert np.array_equal(read_picture(gray, input_size=_GRAY), values[None, ..., 0])


def test_transparency_becomes_white(tmp_path: Path) -> None:
    clear = _saved(tmp_path / "clear.png", Image.new("RGBA", (8, 8), (255, 0, 0, 0)))
    assert (read_picture(clear, input_size=_RGB) == 255).all()
    half = _saved(tmp_path / "half.png", Image.new("RGBA", (8, 8), (0, 0, 0, 128)))
    assert (read_picture(half, input_size=_GRAY) == 127).all()
    palette = Image.new("P", (8, 8), 3)
    keyed = _saved(tmp_path / "keyed.gif", palette, transparency=3)
    assert (read_picture(keyed, input_size=_RGB) == 255).all()


@pytest.mark.parametrize("suffix", ["png", "pgm", "tif"])
def test_16_bits_are_scaled_to_8(tmp_path: Path, suffix: str) -> None:
    values = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1040
    path = _saved(tmp_path / f"deep.{suffix}", Image.fromarray(values))
    expected = np.rint(values / 257).astype(np.uint8)
    assert np.array_equal(read_picture(path, input_size=_GRAY)[0], expected)
    assert read_header(path).is_gray


def test_floating_point_pixels_are_refused(tmp_path: Path) -> None:
    path = _saved(tmp_path / "float.tif", Image.fromarray(np.ones((8, 8), dtype=np.float32)))
    with pytest.raises(DataError, match="floating-point"):
        read_picture(path, input_size=_GRAY)


def test_a_picture_is_turned_as_its_exif_data_says(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 8), "black")
    image.paste("white", (0, 0, 8, 4))
    exif = Image.Exif()
    exif[0x0112] = 6
    path = _saved(tmp_path / "turned.png", image, exif=exif)
    pixels = read_picture(path, input_size=_GRAY)[0]
    assert (pixels[:, 4:] == 255).all()
    assert (pixels[:, :4] == 0).all()


def test_the_first_frame_of_an_animation_is_read(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("white", "black")]
    path = _saved(tmp_path / "two.gif", frames[0], save_all=True, append_images=frames[1:])
    assert (read_picture(path, input_size=_RGB) == 255).all()


def test_shrinking_averages_instead_of_skipping(tmp_path: Path) -> None:
    stripes = np.tile(np.array([0, 255], dtype=np.uint8), (64, 32))
    path = _saved(tmp_path / "stripes.png", Image.fromarray(stripes))
    pixels = read_picture(path, input_size=_GRAY)
    assert abs(int(pixels.min()) - 127) < 25
    assert abs(int(pixels.max()) - 127) < 25


def test_a_large_photograph_is_read_nearly_as_without_skipped_detail(tmp_path: Path) -> None:
    ramp = np.linspace(0, 255, 1024).astype(np.uint8)
    picture = np.stack([np.tile(ramp, (700, 1))] * 3, axis=2)
    image = Image.fromarray(picture)
    path = _saved(tmp_path / "photo.jpg", image, quality=95)
    exact = np.asarray(image.resize((32, 32), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    pixels = read_picture(path, input_size=(3, 32, 32))
    assert np.abs(pixels.astype(int) - exact).max() <= 6


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\nbut nothing follows"])
def test_a_file_that_is_no_picture_is_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.png"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_picture(path, input_size=_RGB)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", ["bmp", "gif", "jpg", "png", "ppm", "tif", "webp"])
def test_a_torn_picture_is_refused_and_never_half_read(tmp_path: Path, suffix: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = _saved(tmp_path / f"torn.{suffix}", Image.fromarray(noise))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=f"torn.{suffix}"):
        read_picture(path, input_size=_RGB)


def test_a_decompression_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _saved(tmp_path / "bomb.png", Image.new("1", (100, 100)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 9_000)  # PIL raises from twice the limit on
    assert read_picture(path, input_size=_RGB).shape == _RGB
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4_000)
    with pytest.raises(DataError, match="decompression bomb"):
        read_picture(path, input_size=_RGB)


def test_a_missing_file_a_folder_and_a_pipe_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "missing.png", tmp_path, tmp_path / "pipe"):
        with pytest.raises(DataError, match="no such picture file"):
            read_picture(path, input_size=_RGB)


def test_two_channels_are_refused(tmp_path: Path) -> None:
    path = _saved(tmp_path / "any.png", Image.new("L", (8, 8)))
    with pytest.raises(DataError, match="not 2"):
        read_picture(path, input_size=(2, 8, 8))


def test_a_header_tells_side_and_colours(tmp_path: Path) -> None:
    gray = read_header(_saved(tmp_path / "gray.png", Image.new("L", (30, 20))))
    assert (gray.shorter_side, gray.is_gray) == (20, True)
    colour = read_header(_saved(tmp_path / "colour.png", Image.new("P", (5, 70))))
    assert (colour.shorter_side, colour.is_gray) == (5, False)
