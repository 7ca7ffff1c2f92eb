"""One image of a data set, as it is stored there -> pixels."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image as Picture
from PIL import UnidentifiedImageError

from gac_plugin.errors import UsageError
from gac_plugin.training.data.source import first_line
from gac_plugin.training.data.unreadable import UnreadableError

GREY_MODES = {"1", "L", "LA"}


class ColourError(UsageError):
    """An image in colour where the first one was not."""


def decode(cell: Mapping[str, Any] | None, feature: Any, image_size: int | None = None) -> np.ndarray:
    """The image in an undecoded cell, turned as its EXIF orientation says; of an animation the first frame.

    Transparency is composited over white, 16-bit pixels keep their upper byte, and all modes other than grey (1, L, LA,
    16 bit) become RGB.

    Args:
        cell: `bytes` of a file, or its `path`.
        feature: the `datasets.Image` of the column.
        image_size: side of the square to resize and crop to, if any.

    Returns:
        uint8, shape (H, W) for a grey image, (H, W, 3) for any other.

    Raises:
        UnreadableError: there is no image, it is damaged, or its range is unknown.
    """
    if cell is None or (cell["bytes"] is None and cell["path"] is None):
        raise UnreadableError("the cell is empty")
    try:
        return np.asarray(_resized(_eight_bit(feature.decode_example(cell)), image_size))
    except (MemoryError, UnreadableError):
        raise
    except UnidentifiedImageError as error:
        raise UnreadableError("not an image, or of a format that Pillow does not read") from error
    except Exception as error:  # on damaged files Pillow's readers raise nearly everything there is
        raise UnreadableError(first_line(error)) from error


def fitted(image: np.ndarray, shape: tuple[int, ...], what: str) -> np.ndarray:
    """An image as `decode` gives it -> pixels of one shape for all, (C, H, W).

    Raises:
        UsageError: it is of another size.
        ColourError: it is in colour where C = 1.
    """
    channels, *size = shape
    if image.shape[:2] != tuple(size):
        wanted, other = ("x".join(map(str, sizes)) for sizes in (size, image.shape[:2]))
        raise UsageError(f"images differ in size: {wanted} and {other} ({what}); pass --image-size N")
    if image.ndim == 3 and channels == 1:
        raise ColourError(
            f"{what} is in colour and the first one is not; convert them all to one mode, or decode them once, without "
            "--workers and --streaming"
        )
    return np.broadcast_to(image.transpose(2, 0, 1) if image.ndim == 3 else image, shape)


def _eight_bit(picture: Picture.Image) -> Picture.Image:
    """Opaque, grey pictures in mode L, all others in RGB."""
    if picture.mode.startswith("I;16"):
        levels = np.asarray(picture)
        grey = (levels >> 8).astype(np.uint8)
        grey[levels == picture.info.get("transparency")] = 255
        return Picture.fromarray(grey)
    if picture.mode in ("I", "F"):
        raise UnreadableError(f"pixels of mode {picture.mode!r} have no known range, store 8 or 16 bits")
    mode = "L" if picture.mode in GREY_MODES else "RGB"
    return (_on_white(picture) if picture.has_transparency_data else picture).convert(mode)


def _on_white(picture: Picture.Image) -> Picture.Image:
    # alpha * pixel + (1 - alpha) * white
    return Picture.alpha_composite(Picture.new("RGBA", picture.size, "white"), picture.convert("RGBA"))


def _resized(picture: Picture.Image, size: int | None) -> Picture.Image:
    if size is None or picture.size == (size, size):
        return picture
    scale = size / min(picture.size)
    larger = picture.resize(
        tuple(max(size, round(length * scale)) for length in picture.size),  # type: ignore[arg-type]
        Picture.Resampling.LANCZOS,
    )
    left, top = (larger.width - size) // 2, (larger.height - size) // 2
    return larger.crop((left, top, left + size, top + size))
