"""Picture files as arrays of one size. Imports without torch: predict needs none."""

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

SUFFIXES = frozenset(
    {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"}
)
"""Of the files that count as pictures in a folder, in lower case."""
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
_GRAY_MODES = ("1", "L", "LA", "La", "I")


@dataclass(frozen=True, kw_only=True)
class PictureHeader:
    """What a picture file says of itself before it is decoded."""

    shorter_side: int
    """Pixels."""
    is_gray: bool


def read_header(path: Path) -> PictureHeader:
    """Size and colours of a picture file. Raises DataError if it is none."""
    with _opened(path) as image:
        is_gray = image.mode in _GRAY_MODES or image.mode.startswith("I;16")
        return PictureHeader(shorter_side=min(image.size), is_gray=is_gray)


def read_picture(path: Path, *, input_size: tuple[int, int, int]) -> NDArray[np.uint8]:
    """The first frame of a picture file, as its EXIF data turns it: uint8 (C,H,W).

    input_size: (C,H,W), C is 1 (gray) or 3 (RGB). Transparency becomes white, 16 bits become 8,
    and the sides are scaled to H and W (bilinear, with antialiasing), whatever their ratio was.
    Raises DataError, one line, if the file is no picture, is broken, or has more pixels than
    PIL's guard against decompression bombs lets pass.
    """
    channels, height, width = input_size
    if channels not in (1, 3):
        raise DataError(f"pictures have 1 or 3 channels, not {channels}")
    with _opened(path) as image:
        # lets a JPEG decoder skip detail, down to twice the size that is needed
        image.draft(None, (2 * max(height, width), 2 * max(height, width)))
        flat = _flatten(ImageOps.exif_transpose(image)).convert("L" if channels == 1 else "RGB")
        if flat.size != (width, height):
            flat = flat.resize((width, height), Image.Resampling.BILINEAR)
        pixels = np.asarray(flat, dtype=np.uint8).reshape(height, width, channels)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _flatten(image: Image.Image) -> Image.Image:
    """The same picture without transparency and with 8 bits a channel."""
    if image.mode == "I" or image.mode.startswith("I;16"):
        values: NDArray[Any] = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("it has more than 16 bits a pixel")
        return Image.fromarray(np.rint(values / 257).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer)
    return image


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    if not path.is_file():
        raise DataError(f"{path}: no such picture file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=_FORMATS) as image:
                yield image
    except UnidentifiedImageError as error:
        raise DataError(f"{path}: not a picture ({', '.join(_FORMATS)})") from error
    except Exception as error:  # PIL's decoders raise nearly anything on a broken file
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path}: can't be read as a picture: {reason}") from error
