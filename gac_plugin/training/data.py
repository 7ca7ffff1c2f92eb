"""Images of a data set (embedded, a local folder, or on the Hub) as one uint8 tensor, and batches out of it.

Every source goes through `datasets.load_dataset`. Images are decoded once; a batch is an index into a tensor that lives
on the training device, so that data is never what a step waits for.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.resources import files
from itertools import count
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, load_dataset
from PIL import Image as Picture
from torch import Tensor

from gac_plugin.errors import UsageError
from gac_plugin.training.config import EMBEDDED, Config

GREY_MODES = {"1", "L", "LA"}


@dataclass(frozen=True)
class Images:
    """The images of one split.

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


def load_images(config: Config) -> tuple[Images, Images]:
    """The training images and those to evaluate against.

    Raises:
        UsageError: no such data set or split; no image column or several; no images; images of mixed sizes without
            `config.image_size`; an image that cannot be decoded.
    """
    splits = _load(config.dataset)
    if config.split not in splits:
        raise UsageError(f"data set {config.dataset!r} has no split {config.split!r}; it has: {', '.join(splits)}")
    train = _decode(splits[config.split], config, config.split)
    if config.test_split not in splits or config.test_split == config.split:
        return train, train
    test = _decode(splits[config.test_split], config, config.test_split)
    train, test = _in_colour_if_either(train, test)
    if train.sample_shape != test.sample_shape:
        raise UsageError(
            f"images of the splits {config.split!r} and {config.test_split!r} differ in shape: {train.sample_shape} "
            f"and {test.sample_shape}; pass --image-size"
        )
    return train, test


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


def _decode(rows: Dataset, config: Config, split: str) -> Images:
    column = _image_column(rows, config.column)
    if len(rows) == 0:
        raise UsageError(f"split {split!r} of data set {config.dataset!r} is empty")
    feature = rows.features[column]
    stored = rows.select_columns(column).cast_column(column, type(feature)(decode=False))
    decoded: list[np.ndarray] = []
    for index, row in enumerate(stored):
        try:
            picture = feature.decode_example(row[column])
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UsageError(
                f"image {index} of split {split!r} cannot be decoded: {_first_line(error)}; remove the row or repair it"
            ) from error
        decoded.append(np.asarray(_resized(_eight_bit(picture, index), config.image_size)))
        if decoded[-1].shape[:2] != decoded[0].shape[:2]:
            first, other = ("x".join(map(str, a.shape[:2])) for a in (decoded[0], decoded[-1]))
            raise UsageError(f"images differ in size: {first} and {other} (image {index}); pass --image-size N")
    if any(image.ndim == 3 for image in decoded):
        decoded = [image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2) for image in decoded]
    stack = torch.from_numpy(np.stack(decoded))
    pixels = stack.unsqueeze(1) if stack.dim() == 3 else stack.permute(0, 3, 1, 2).contiguous()
    return Images(pixels, _labels(rows), split)


def _eight_bit(picture: Picture.Image, index: int) -> Picture.Image:
    """Grey pictures as mode L, 16-bit ones by their upper byte; all others as RGB."""
    if picture.mode.startswith("I;16"):
        return Picture.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if picture.mode in ("I", "F"):
        raise UsageError(
            f"image {index} has pixels of mode {picture.mode!r}, whose range is unknown; store 8 or 16 bits"
        )
    return picture.convert("L" if picture.mode in GREY_MODES else "RGB")


def _in_colour_if_either(a: Images, b: Images) -> tuple[Images, Images]:
    channels = max(a.pixels.shape[1], b.pixels.shape[1])
    grown = (
        images
        if images.pixels.shape[1] == channels
        else replace(images, pixels=images.pixels.repeat(1, channels, 1, 1))
        for images in (a, b)
    )
    first, second = grown
    return first, second


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


def to_samples(pixels: Tensor, value_range: tuple[float, float]) -> Tensor:
    """uint8 pixels -> float32 samples in the value range, same shape and device."""
    low, high = value_range
    return pixels.to(torch.float32).mul_((high - low) / 255).add_(low)


def to_pixels(samples: Tensor, value_range: tuple[float, float]) -> Tensor:
    """Samples in the value range -> uint8 pixels, rounded and clamped, same shape and device."""
    low, high = value_range
    return ((samples.float() - low) * (255 / (high - low))).round_().clamp_(0, 255).to(torch.uint8)


def batches(
    pixels: Tensor, batch_size: int, value_range: tuple[float, float], seed: int, rank: int = 0, processes: int = 1
) -> Iterator[Tensor]:
    """Endless batches: each epoch a new permutation, the same in every process, of which each takes its share.

    Args:
        pixels: uint8, shape (N, C, H, W), on the device where batches are wanted.
        batch_size: samples in a batch of one process.
        value_range: lowest and highest value of a sample.
        seed: fixes the order; epoch e is shuffled with seed and e alone, so a position can be found again.
        rank, processes: this process and how many there are.

    Returns:
        An iterator of float32 samples of shape (batch_size, C, H, W); what is left over at an epoch's end is dropped.

    Raises:
        UsageError: the data set is smaller than one batch of all processes.
    """
    rows, taken = pixels.shape[0], batch_size * processes
    if rows < taken:
        raise UsageError(
            f"the data set has {rows} images, fewer than one batch of {taken}; pass a --batch-size of at most "
            f"{rows // processes}"
        )
    return _epochs(pixels, batch_size, value_range, seed, rank, taken)


def _epochs(
    pixels: Tensor, batch_size: int, value_range: tuple[float, float], seed: int, rank: int, taken: int
) -> Iterator[Tensor]:
    rows = pixels.shape[0]
    for epoch in count():
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        order = order.to(pixels.device)
        for start in range(rank * batch_size, rows - rows % taken, taken):
            yield to_samples(pixels[order[start : start + batch_size]], value_range)
