"""The samples of one split, in memory or read as they are needed."""

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

KNOWN = 10_000
"""Samples that stand for a split which is not in memory."""


class Source(Protocol):
    """The samples of one split as a codec stores them, wherever they are."""

    @property
    def split(self) -> str:
        """The name of the split."""

    @property
    def labels(self) -> Tensor | None:
        """int64, shape (N,), if the data set has a column of class labels."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Tensor, /) -> Tensor:
        """Row numbers, int64, shape (n,) -> stored samples, shape (n, ...)."""


@dataclass(frozen=True)
class Decoded:
    """Samples of one split in memory.

    Attributes:
        values: as the codec stores them, shape (N, ...); for images uint8 pixels (N, C, H, W), C = 1 or 3.
        labels: int64, shape (N,), if the data set has a column of class labels.
        split: the name of the split.
    """

    values: Tensor
    labels: Tensor | None
    split: str

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one stored sample."""
        return tuple(self.values.shape[1:])

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, rows: Tensor, /) -> Tensor:
        return self.values[rows]

    def to(self, device: torch.device | str) -> "Decoded":
        """The same with the values on a device."""
        return replace(self, values=self.values.to(device))

    def in_colour(self) -> "Decoded":
        """Images with three channels."""
        return replace(self, values=self.values.expand(-1, 3, -1, -1).contiguous())


def sample(source: Source, count: int = KNOWN) -> Decoded:
    """At most `count` samples of a source in memory, evenly spaced over its rows: the same however it is stored."""
    count = min(count, len(source))
    rows = torch.arange(count) * len(source) // count
    return Decoded(source[rows], None if source.labels is None else source.labels[rows], source.split)


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
