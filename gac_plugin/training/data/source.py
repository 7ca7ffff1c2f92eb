"""The samples of one split, in memory, in a mapped file, or read as they are needed."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from gac_plugin.training.data.unreadable import Unreadable

KNOWN = 10_000
"""Samples that stand for a split which is not in memory."""


class Part(NamedTuple):
    """What was read for some row numbers.

    Attributes:
        values: stored samples, shape (n, ...).
        rows: the rows they are of, int64, shape (n,): those asked for, and for one that cannot be read the next one.
        unreadable: the rows that were passed over, and why.
    """

    values: Tensor
    rows: Tensor
    unreadable: Mapping[int, str]


class Source(Protocol):
    """The samples of one split as a codec stores them, wherever they are."""

    @property
    def split(self) -> str:
        """The name of the split."""

    @property
    def labels(self) -> Tensor | None:
        """int64, shape (N,), if the data set has a column of class labels."""

    @property
    def unreadable(self) -> Unreadable:
        """The rows that could not be read."""

    @property
    def device(self) -> torch.device:
        """Where samples are, and row numbers are wanted."""

    def __len__(self) -> int: ...

    def read(self, rows: Tensor, /) -> Part:
        """Row numbers, int64, shape (n,), on the device -> what is there."""


@dataclass(frozen=True)
class Decoded:
    """Samples of one split in memory, or in a file that is mapped into it.

    Attributes:
        values: as the codec stores them, shape (N, ...); for images uint8 pixels (N, C, H, W), C = 1 or 3.
        labels: int64, shape (N,), if the data set has a column of class labels.
        split: the name of the split.
        unreadable: the rows that were left out; N does not count them.
        mapped: whether the values are in a file, larger than what is to be held in memory.
    """

    values: Tensor
    labels: Tensor | None
    split: str
    unreadable: Unreadable = field(default_factory=Unreadable)
    mapped: bool = False

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one stored sample."""
        return tuple(self.values.shape[1:])

    @property
    def device(self) -> torch.device:
        """Where the values are."""
        return self.values.device

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, rows: Tensor, /) -> Tensor:
        return self.values.index_select(0, rows.to(self.device))

    def read(self, rows: Tensor, /) -> Part:
        """Row numbers, int64, shape (n,) -> their values."""
        return Part(self[rows], rows, {})

    def to(self, device: torch.device | str) -> "Decoded":
        """The same with the values on a device; in a mapped file they stay where they are."""
        return self if self.mapped else replace(self, values=self.values.to(device))

    def in_colour(self) -> "Decoded":
        """Images with three channels; grey ones are repeated when they are read, and held once."""
        return replace(self, values=self.values.expand(-1, 3, -1, -1))


def sample(source: Source, count: int = KNOWN) -> Decoded:
    """At most `count` samples of a source in memory, evenly spaced over its rows: the same however it is stored.

    Raises:
        UsageError: more rows cannot be read than may be so.
    """
    count = min(count, len(source))
    values, rows, unreadable = source.read((torch.arange(count) * len(source) // count).to(source.device))
    source.unreadable.add(unreadable)
    labels = None if source.labels is None else source.labels[rows.cpu()]
    return Decoded(values, labels, source.split, source.unreadable)


def in_memory(source: Source) -> Decoded:
    """The source itself if it is in memory, a sample of it if not."""
    return source if isinstance(source, Decoded) and not source.mapped else sample(source)


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
