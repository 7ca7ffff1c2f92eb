"""Images: pixels to samples and back, and decoding: once into memory or a file, or each time they are read."""

import math
import sys
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from tqdm.auto import tqdm

from gac_plugin.training.config import OUTPUT_RANGES
from gac_plugin.training.data.decoding import ColourError, decode, fitted
from gac_plugin.training.data.pixel_file import pixel_file
from gac_plugin.training.data.source import Decoded, Part
from gac_plugin.training.data.unreadable import Unreadable, UnreadableError
from gac_plugin.training.files import PICTURES, write_grid

DECODED_AT_ONCE = 64
"""Images that a thread decodes before it hands them on."""
Cell = Mapping[str, Any] | None


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
        image_size: side of the square that images are resized and cropped to, if any.
        sample_shape: (C, H, W); grey images are repeated to three channels if C = 3.
        unreadable: the rows that could not be read.
    """

    rows: Dataset
    feature: Any
    labels: Tensor | None
    image_size: int | None
    sample_shape: tuple[int, ...]
    unreadable: Unreadable

    @property
    def split(self) -> str:
        """The name of the split."""
        return self.unreadable.split

    @property
    def device(self) -> torch.device:
        """The CPU."""
        return torch.device("cpu")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: Tensor, /) -> Tensor:
        return self.read(rows).values

    def read(self, rows: Tensor, /) -> Part:
        """Row numbers, int64, shape (n,) -> uint8 pixels, shape (n, C, H, W).

        A row that cannot be read is replaced by the next one that can: the same one, whoever reads it.

        Raises:
            UsageError: an image is of another size, or in colour where C = 1; or more rows than may be so cannot be
                read.
        """
        pixels, found = np.empty((len(rows), *self.sample_shape), np.uint8), rows.tolist()
        met = self.unreadable.anew()
        for place, cell in enumerate(self._cells(rows.tolist())):
            found[place], image = self._next_readable(found[place], cell, met)
            self._fill(pixels[place], image, found[place])
        return Part(torch.from_numpy(pixels), torch.tensor(found, dtype=torch.int64), met.reasons)

    def decoded(self, memory: float, show: bool) -> Decoded:
        """All of them that can be read, in colour if any one is.

        Args:
            memory: bytes of pixels to hold; if there are more, they are decoded into a file of the datasets cache, or
                found there, and it is mapped into memory.
            show: tell what was left out, and show progress. Whoever decodes into a file shows it in any case.

        Raises:
            UsageError: images differ in size; more than may be so cannot be read; or the file cannot be written.
        """
        try:
            mapped = len(self) * math.prod(self.sample_shape) > memory
            values = self._in_file() if mapped else self._in_memory(show)
        except ColourError:
            return self.in_colour().decoded(memory, show)
        labels = self.labels
        if self.unreadable.reasons:
            if show:
                self.unreadable.tell("are left out")
            readable = torch.ones(len(self), dtype=torch.bool)
            readable[list(self.unreadable.reasons)] = False
            labels = None if labels is None else labels[readable]
        return Decoded(values, labels, self.split, self.unreadable, mapped)

    def in_colour(self) -> "Stored":
        """The same with three channels."""
        return replace(self, sample_shape=(3, *self.sample_shape[1:]))

    def _in_memory(self, show: bool) -> Tensor:
        pixels, count = np.empty((len(self), *self.sample_shape), np.uint8), 0
        for part in self._parts(show):
            pixels[count : count + len(part)] = part
            count += len(part)
        return torch.from_numpy(pixels[:count])

    def _in_file(self) -> Tensor:
        what = f"{self.rows._fingerprint} {self.rows.column_names} {self.feature} {self.image_size}"
        shape = (len(self), *self.sample_shape)
        return pixel_file(what, shape, lambda: self._parts(show=True), self.unreadable)

    def _parts(self, show: bool) -> Iterator[np.ndarray]:
        """All that can be read, in their order: uint8, shape (n, C, H, W) each."""
        progress = tqdm(
            total=len(self),
            desc=f"decoding {self.split!r}",
            unit="image",
            delay=2,
            mininterval=0.1 if sys.stderr.isatty() else 10,
            leave=False,
            disable=not show,
        )
        threads, every = torch.get_num_threads(), range(len(self))
        blocks = (every[first : first + DECODED_AT_ONCE] for first in every[::DECODED_AT_ONCE])
        with progress, ThreadPoolExecutor(threads) as pool:
            work = (pool.submit(self._part, rows, self._cells(rows)) for rows in blocks)
            waiting = deque(islice(work, 2 * threads))
            try:
                while waiting:
                    pixels, unreadable = waiting.popleft().result()
                    waiting.extend(islice(work, 1))
                    self.unreadable.add(unreadable)
                    yield pixels
                    progress.update(len(pixels) + len(unreadable))
            finally:
                pool.shutdown(cancel_futures=True)

    def _part(self, rows: range, cells: list[Cell]) -> tuple[np.ndarray, dict[int, str]]:
        pixels, count, unreadable = np.empty((len(rows), *self.sample_shape), np.uint8), 0, {}
        for row, cell in zip(rows, cells, strict=True):
            try:
                self._fill(pixels[count], decode(cell, self.feature, self.image_size), row)
                count += 1
            except UnreadableError as error:
                unreadable[row] = str(error)
        return pixels[:count], unreadable

    def _next_readable(self, row: int, cell: Cell, met: Unreadable) -> tuple[int, np.ndarray]:
        """The first image that can be read from a row on, after the last row from the first one, and its row."""
        while True:
            try:
                return row, decode(cell, self.feature, self.image_size)
            except UnreadableError as error:
                met.add({row: str(error)})
            row = (row + 1) % len(self)
            (cell,) = self._cells([row])

    def _cells(self, rows: list[int] | range) -> list[Cell]:
        (cells,) = self.rows[rows].values()
        return list(cells)

    def _fill(self, pixels: np.ndarray, image: np.ndarray, row: int) -> None:
        """An image as `decode` gives it -> pixels of the shape of all, (C, H, W)."""
        pixels[:] = fitted(image, self.sample_shape, f"row {row} of split {self.split!r}")


def stored_images(
    rows: Dataset,
    column: str,
    labels: Tensor | None,
    split: str,
    image_size: int | None = None,
    max_unreadable: int = 0,
) -> Stored:
    """The images of a column; the first one that can be read is decoded.

    Args:
        rows: at least one.
        column: holds images.
        labels: of the rows.
        split: name of the split.
        image_size: side of the square to resize and crop to, if any.
        max_unreadable: how many rows may be unreadable.

    Raises:
        UsageError: more rows than may be so cannot be read, or all of them.
    """
    feature = rows.features[column]
    cells = rows.select_columns(column).cast_column(column, type(feature)(decode=False))
    unreadable = Unreadable(split, len(rows), max_unreadable)
    stored = Stored(cells, feature, labels, image_size, (), unreadable)
    _, first = stored._next_readable(0, cells[0][column], unreadable)
    return replace(stored, sample_shape=(3 if first.ndim == 3 else 1, *first.shape[:2]))
