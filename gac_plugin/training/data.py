"""Finding the images of a data set (embedded, a local folder, or on the Hub), and decoding them.

Every source goes through `datasets.load_dataset`. Images are decoded once, into one uint8 tensor; or, where they are
more than memory holds, each time they are read.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from datasets import Dataset, load_dataset
from PIL import Image as Picture
from torch import Tensor

from gac_plugin.errors import UsageError
from gac_plugin.training.config import EMBEDDED, Config

GREY_MODES = {"1", "L", "LA"}


class Source(Protocol):
    """The images of one split, wherever they are: `Images` or `Stored`."""

    @property
    def split(self) -> str:
        """The name of the split."""

    @property
    def labels(self) -> Tensor | None:
        """int64, shape (N,), if the data set has a column of class labels."""

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """(C, H, W)"""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Tensor, /) -> Tensor:
        """Row numbers, int64, shape (n,) -> uint8 pixels, shape (n, C, H, W)."""


@dataclass(frozen=True)
class Images:
    """Decoded images of one split.

    Attributes:
        pixels: uint8, shape (N, C, H, W), C = 1 or 3.
        labels: int64, shape (N,), if the data set has a column of class labels.
        split: the name of the split.
    """

    pixels: Tensor
    labels: Tensor | None
    split: str

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """(C, H, W)"""
        return tuple(self.pixels.shape[1:])

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, rows: Tensor, /) -> Tensor:
        return self.pixels[rows]

    def to(self, device: torch.device | str) -> "Images":
        """The same with the pixels on a device."""
        return replace(self, pixels=self.pixels.to(device))

    def in_colour(self) -> "Images":
        """The same with three channels."""
        return replace(self, pixels=self.pixels.expand(-1, 3, -1, -1).contiguous())


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

    def in_memory(self) -> Images:
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
        return Images(pixels, self.labels, self.split)

    def in_colour(self) -> "Stored":
        """The same with three channels."""
        return replace(self, sample_shape=(3, *self.sample_shape[1:]))


def load_images(config: Config, device: torch.device | str = "cpu") -> tuple[Images | Stored, Images]:
    """The training images and those to evaluate against.

    Args:
        config: names the data set, and says whether training images are decoded by workers or into memory.
        device: where to keep training images that are in memory.

    Returns:
        Training images, and those of the test split, always in memory. Where there is no test split, the training
        images stand for it: the same object, or 10,000 of them where they are `Stored` (see `sample`).

    Raises:
        UsageError: no such data set or split; no image column or several; no images; images of mixed sizes without
            `config.image_size`; an image that cannot be decoded.
    """
    splits = _load(config.dataset)
    if config.split not in splits:
        raise UsageError(f"data set {config.dataset!r} has no split {config.split!r}; it has: {', '.join(splits)}")
    stored = _stored(splits[config.split], config, config.split)
    train = stored if config.workers else stored.in_memory().to(device)
    if config.test_split not in splits or config.test_split == config.split:
        return train, train if isinstance(train, Images) else sample(train)
    test = _stored(splits[config.test_split], config, config.test_split).in_memory()
    if 3 in (train.sample_shape[0], test.sample_shape[0]):
        train, test = train.in_colour(), test.in_colour()
    if train.sample_shape != test.sample_shape:
        raise UsageError(
            f"images of the splits {config.split!r} and {config.test_split!r} differ in shape: {train.sample_shape} "
            f"and {test.sample_shape}; pass --image-size"
        )
    return train, test


def sample(source: Source, count: int = 10_000) -> Images:
    """At most `count` images of a source in memory, evenly spaced over its rows: the same however it is stored."""
    count = min(count, len(source))
    rows = torch.arange(count) * len(source) // count
    return Images(source[rows], None if source.labels is None else source.labels[rows], source.split)


def dataset_path(dataset: str) -> str:
    """What to hand to `datasets.load_dataset`: the embedded data set's folder, or the path or Hub name as given.

    Raises:
        UsageError: something that can only be a local path does not exist.
    """
    if dataset == EMBEDDED:
        return str(files("gac_plugin") / "digits")
    local = Path(dataset).expanduser()
    if local.is_file():
        raise UsageError(f"{dataset!r} is a file; give the folder that holds the data set")
    if local.is_dir():
        return str(local)
    if dataset.startswith((".", "/", "~")) or dataset.count("/") > 1:
        raise UsageError(f"no folder {dataset!r}; give a folder in Hub layout, a data set on the Hub, or {EMBEDDED!r}")
    return dataset


def _load(dataset: str) -> Mapping[str, Dataset]:
    source = dataset_path(dataset)
    try:
        return load_dataset(source)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"cannot load data set {dataset!r}: {_first_line(error)}; check the name or folder, and that it holds rows"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _stored(rows: Dataset, config: Config, split: str) -> Stored:
    column = _image_column(rows, config.column)
    if len(rows) == 0:
        raise UsageError(f"split {split!r} of data set {config.dataset!r} is empty")
    feature = rows.features[column]
    cells = rows.select_columns(column).cast_column(column, type(feature)(decode=False))
    first = _decode(cells[0][column], 0, feature, split, config.image_size)
    shape = (3 if first.ndim == 3 else 1, *first.shape[:2])
    return Stored(cells, feature, _labels(rows), split, config.image_size, shape)


def _decode(cell: Mapping[str, Any], index: int, feature: Any, split: str, image_size: int | None) -> np.ndarray:
    """The image in a cell: uint8, shape (H, W) if it is grey, (H, W, 3) if not."""
    try:
        picture = feature.decode_example(cell)
    except (OSError, ValueError, TypeError, KeyError, Picture.DecompressionBombError) as error:
        raise UsageError(
            f"image {index} of split {split!r} cannot be decoded: {_first_line(error)}; remove the row or repair it"
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


def _image_column(rows: Dataset, wanted: str | None) -> str:
    kinds = {name: type(feature).__name__ for name, feature in rows.features.items()}
    listing = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
    images = [name for name, kind in kinds.items() if kind == "Image"]
    if wanted is not None and wanted not in kinds:
        raise UsageError(f"no column {wanted!r} in the data set; its columns: {listing}")
    if wanted is not None and wanted not in images:
        raise UsageError(f"column {wanted!r} holds no images; the data set's columns: {listing}")
    if not images:
        raise UsageError(f"the data set has no image column; its columns: {listing}")
    if wanted is None and len(images) > 1:
        raise UsageError(f"several image columns: {', '.join(images)}; choose one with --column")
    return wanted or images[0]


def _labels(rows: Dataset) -> Tensor | None:
    for name, feature in rows.features.items():
        if type(feature).__name__ == "ClassLabel":
            return torch.tensor(rows.select_columns(name).with_format("numpy")[:][name], dtype=torch.int64)
    return None


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
