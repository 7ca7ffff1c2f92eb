"""Images: pixels to samples and back, and decoding, once into memory or each time they are read."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from PIL import Image as Picture
from torch import Tensor

from gac_plugin.errors import UsageError
from gac_plugin.training.config import OUTPUT_RANGES
from gac_plugin.training.files import PICTURES, write_grid
from gac_plugin.training.source import Decoded, first_line

GREY_MODES = {"1", "L", "LA"}


@dataclass(frozen=True)
class ImageCodec:
    """uint8 pixels (N, C, H, W) as they are stored, and float samples in the generator's range.

    Attributes:
        sample_shape: (C, H, W)
        output: a name in `OUTPUT_RANGES`.
    """

    sample_shape: tuple[int, ...]
    output: str
    suffixes: tuple[str, ...] = PICTURES

    def to_samples(self, stored: Tensor) -> Tensor:
        """uint8 pixels -> float32 samples in the range, same shape and device."""
        low, high = OUTPUT_RANGES[self.output]
        return stored.to(torch.float32).mul_((high - low) / 255).add_(low)

    def to_stored(self, samples: Tensor) -> Tensor:
        """Samples in the range -> uint8 pixels, rounded and clamped, same shape and device."""
        low, high = OUTPUT_RANGES[self.output]
        return ((samples.float() - low) * (255 / (high - low))).round_().clamp_(0, 255).to(torch.uint8)

    def pictures(self, stored: Tensor) -> Tensor:
        """The pixels themselves."""
        return stored

    def write(self, path: Path, stored: Tensor, columns: int | None = None) -> None:
        """Write the images side by side as one picture; see `write_grid`."""
        write_grid(path, stored, columns)

    def figures(self, train: Tensor, test: Tensor, generated: Tensor) -> dict[str, float]:
        """None of their own."""
        return {}

    def to_json(self) -> dict[str, Any]:
        """Nothing: the recipe of the networks says it all."""
        return {}


@dataclass(frozen=True)
class Stored:
    """Images of one split, decoded each time they are read; the first one tells the shape of all.

    Attributes:
        rows: the image column alone, undecoded.
        feature: the `datasets.Image` that decodes it.
        labels: int64, shape (N,), if the data set has a column of class labels.
        split: the name of the split.
        image_size: side of the square that images are resized and cropped to, if any.
        sample_shape: (C, H, W); grey images are repeated to three channels if C = 3.
    """

    rows: Dataset
    feature: Any
    labels: Tensor | None
    split: str
    image_size: int | None
    sample_shape: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: Tensor, /) -> Tensor:
        """Row numbers, int64, shape (n,) -> uint8 pixels, shape (n, C, H, W).

        Raises:
            UsageError: an image cannot be decoded, is of another size, or in colour where C = 1.
        """
        channels, *size = self.sample_shape
        pixels = np.empty((len(rows), *size, channels), np.uint8)
        indices = rows.tolist()
        (cells,) = self.rows[indices].values()
        for image, index, cell in zip(pixels, indices, cells, strict=True):
            decoded = _decode(cell, index, self.feature, self.split, self.image_size)
            _require_size(decoded, tuple(size), index)
            if decoded.ndim == 3 and channels == 1:
                raise UsageError(
                    f"image {index} of split {self.split!r} is in colour and the first one is not; convert them all "
                    "to one mode, or decode them into memory with --workers 0"
                )
            image[:] = decoded if decoded.ndim == 3 else decoded[..., None]
        return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()

    def in_memory(self) -> Decoded:
        """All of them decoded, in colour if any one is."""
        decoded: list[np.ndarray] = []
        for index, row in enumerate(self.rows):
            (cell,) = row.values()
            decoded.append(_decode(cell, index, self.feature, self.split, self.image_size))
            _require_size(decoded[-1], decoded[0].shape[:2], index)
        if any(image.ndim == 3 for image in decoded):
            decoded = [image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2) for image in decoded]
        stack = torch.from_numpy(np.stack(decoded))
        pixels = stack.unsqueeze(1) if stack.dim() == 3 else stack.permute(0, 3, 1, 2).contiguous()
        return Decoded(pixels, self.labels, self.split)

    def in_colour(self) -> "Stored":
        """The same with three channels."""
        return replace(self, sample_shape=(3, *self.sample_shape[1:]))


def stored_images(
    rows: Dataset, column: str, labels: Tensor | None, split: str, image_size: int | None = None
) -> Stored:
    """The images of a column; the first one is decoded.

    Args:
        rows: at least one.
        column: holds images.
        labels: of the rows.
        split: name of the split.
        image_size: side of the square to resize and crop to, if any.

    Raises:
        UsageError: the first image cannot be decoded.
    """
    feature = rows.features[column]
    cells = rows.select_columns(column).cast_column(column, type(feature)(decode=False))
    first = _decode(cells[0][column], 0, feature, split, image_size)
    shape = (3 if first.ndim == 3 else 1, *first.shape[:2])
    return Stored(cells, feature, labels, split, image_size, shape)


def _decode(cell: Mapping[str, Any], index: int, feature: Any, split: str, image_size: int | None) -> np.ndarray:
    """The image in a cell: uint8, shape (H, W) if it is grey, (H, W, 3) if not."""
    try:
        picture = feature.decode_example(cell)
    except (OSError, ValueError, TypeError, KeyError, Picture.DecompressionBombError) as error:
        raise UsageError(
            f"image {index} of split {split!r} cannot be decoded: {first_line(error)}; remove the row or repair it"
        ) from error
    return np.asarray(_resized(_eight_bit(picture, index), image_size))


def _require_size(image: np.ndarray, size: tuple[int, ...], index: int) -> None:
    if image.shape[:2] != size:
        wanted, other = ("x".join(map(str, shape)) for shape in (size, image.shape[:2]))
        raise UsageError(f"images differ in size: {wanted} and {other} (image {index}); pass --image-size N")


def _eight_bit(picture: Picture.Image, index: int) -> Picture.Image:
    """Grey pictures as mode L, 16-bit ones by their upper byte; all others as RGB."""
    if picture.mode.startswith("I;16"):
        return Picture.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if picture.mode in ("I", "F"):
        raise UsageError(
            f"image {index} has pixels of mode {picture.mode!r}, whose range is unknown; store 8 or 16 bits"
        )
    return picture.convert("L" if picture.mode in GREY_MODES else "RGB")


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
