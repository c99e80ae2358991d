"""Picture files as arrays of one size. Imports without torch: predict needs none."""

import hashlib
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from trainer.config import DataError
from trainer.data.findings import one_line

SUFFIXES = frozenset(
    {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"}
)
"""Of the files that count as pictures in a folder, in lower case."""
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
_GRAY_MODES = ("1", "L", "LA", "La", "I")


_KEPT_SIDE = 448
"""Pixels of the shorter side down to which a JPEG decoder skips detail, or more if wanted."""
THUMBNAIL_SIDE = 32


@dataclass(frozen=True, kw_only=True)
class PictureHeader:
    """What a picture file says of itself before it is decoded."""

    shorter_side: int
    """Pixels."""
    is_gray: bool


@dataclass(frozen=True, kw_only=True)
class DecodedPicture:
    """A picture file, read and decoded once."""

    sha256: str
    """Of the file's bytes, 64 hex digits."""
    pixels: NDArray[np.uint8]
    """(C,H,W)."""
    thumbnail: NDArray[np.uint8]
    """(32,32), gray; the same whatever size was asked for."""


def read_header(path: Path) -> PictureHeader:
    """Size and colours of a picture file. Raises DataError if it is none."""
    with _opened(path) as image:
        is_gray = image.mode in _GRAY_MODES or image.mode.startswith("I;16")
        return PictureHeader(shorter_side=min(image.size), is_gray=is_gray)


def read_picture(path: Path, *, input_size: tuple[int, int, int]) -> NDArray[np.uint8]:
    """The first frame of a picture file, as its EXIF data turns it: uint8 (C,H,W).

    input_size: (C,H,W), C is 1 (gray) or 3 (RGB). Transparency becomes white, 16 bits become 8,
    and the sides are scaled to H and W (bilinear, with antialiasing), whatever their ratio was.
    Raises DataError, one line, if the file is no picture, is broken, or has more than the 179
    million pixels that PIL's guard against decompression bombs lets pass.
    """
    with _opened(path) as image:
        return _scale(_decode(image, _kept_side(input_size)), input_size)


def decode_picture(path: Path, *, input_size: tuple[int, int, int]) -> DecodedPicture:
    """What read_picture gives, with the file's digest and a thumbnail of it."""
    if not path.is_file():
        raise DataError(f"{one_line(path)}: no such picture file")
    content = path.read_bytes()
    with _opened(path, content) as image:
        flat = _decode(image, _kept_side(input_size))
        pixels = _scale(flat, input_size)
        is_jpeg = image.format == "JPEG"
    if is_jpeg and _kept_side(input_size) > _KEPT_SIDE:
        # again, smaller: the thumbnail must not depend on the size that is asked for
        with _opened(path, content) as image:
            flat = _decode(image, _KEPT_SIDE)
    return DecodedPicture(
        sha256=hashlib.sha256(content).hexdigest(), pixels=pixels, thumbnail=_thumbnail(flat)
    )


def _kept_side(input_size: tuple[int, int, int]) -> int:
    """The side down to which a JPEG decoder may skip detail: twice what is needed, or more."""
    channels, height, width = input_size
    if channels not in (1, 3):
        raise DataError(f"pictures have 1 or 3 channels, not {channels}")
    return max(_KEPT_SIDE, 2 * max(height, width))


def _decode(image: Image.Image, kept_side: int) -> Image.Image:
    image.draft(None, (kept_side, kept_side))
    ImageOps.exif_transpose(image, in_place=True)
    return _flatten(image)


def _scale(flat: Image.Image, input_size: tuple[int, int, int]) -> NDArray[np.uint8]:
    channels, height, width = input_size
    mode = "L" if channels == 1 else "RGB"
    scaled = flat if flat.mode == mode else flat.convert(mode)
    if scaled.size != (width, height):
        # large pictures are averaged down to three times the size first
        scaled = scaled.resize((width, height), Image.Resampling.BILINEAR, reducing_gap=3.0)
    pixels = np.asarray(scaled, dtype=np.uint8).reshape(height, width, channels)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _thumbnail(flat: Image.Image) -> NDArray[np.uint8]:
    colours = flat if flat.mode in ("L", "RGB") else flat.convert("RGB")
    factor = min(flat.size) // (2 * THUMBNAIL_SIDE)
    smaller = colours.reduce(factor) if factor > 1 else colours
    side = (THUMBNAIL_SIDE, THUMBNAIL_SIDE)
    return np.asarray(smaller.convert("L").resize(side, Image.Resampling.BILINEAR), dtype=np.uint8)


def _flatten(image: Image.Image) -> Image.Image:
    """The same picture without transparency and with 8 bits a channel."""
    if image.mode == "I" or image.mode.startswith("I;16"):
        values: NDArray[Any] = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("it has more than 16 bits a pixel")
        return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer)
    return image


@contextmanager
def _opened(path: Path, content: bytes | None = None) -> Iterator[Image.Image]:
    """content: of the file, where it was read before."""
    shown = one_line(path)
    if content is None and not path.is_file():
        raise DataError(f"{shown}: no such picture file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            file = path if content is None else io.BytesIO(content)
            with Image.open(file, formats=_FORMATS) as image:
                yield image
    except UnidentifiedImageError as error:
        raise DataError(f"{shown}: not a picture ({', '.join(_FORMATS)})") from error
    except DataError:
        raise
    except Exception as error:  # PIL's decoders raise nearly anything on a broken file
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{shown}: can't be read as a picture: {reason}") from error
