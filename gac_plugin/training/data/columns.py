"""Which columns of a data set hold the samples and the labels: found by their types, or named."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from gac_plugin.errors import UsageError
from gac_plugin.training.config import Config
from gac_plugin.training.data.splits import Rows
from gac_plugin.training.networks import adapter_names, find_adapter

IMAGES, CLASSES = "Image", "ClassLabel"
LABELS = ("bool", "int", "uint", "string")
"""Beginnings of the types that may hold labels beside `ClassLabel`."""


@dataclass(frozen=True)
class Labels:
    """Class labels of a data set.

    Attributes:
        column: where they stand.
        classes: what stands there, in the order of the class numbers; a number alone where it holds class numbers.
    """

    column: str
    classes: Sequence[Any] | int

    @property
    def count(self) -> int:
        """The number of classes."""
        return self.classes if isinstance(self.classes, int) else len(self.classes)

    def of(self, rows: Dataset) -> Tensor:
        """Class numbers, int64, shape (N,); -1 where a row has no label or one that is not among the classes."""
        values = rows.select_columns(self.column)[:][self.column]
        if isinstance(self.classes, int):
            return torch.tensor([-1 if value is None else value for value in values], dtype=torch.int64)
        numbers = {value: number for number, value in enumerate(self.classes)}
        return torch.tensor([numbers.get(value, -1) for value in values], dtype=torch.int64)


def find_labels(rows: Rows, config: Config) -> Labels | None:
    """The labels that a configuration names, or those of the column whose type tells; None if there are none.

    Args:
        rows: of the training split.
        config: names a column, or says by `conditional` that labels are needed.

    Raises:
        UsageError: no such column, or one that cannot hold labels; several fit and labels are needed; or the rows are
            streamed and the column's type does not tell the classes.
    """
    kinds = {name: kind(feature) for name, feature in rows.features.items()}
    telling = [name for name, found in kinds.items() if found == CLASSES]
    column = config.label_column
    if column is None:
        if len(telling) > 1 and config.conditional:
            raise UsageError(f"several {CLASSES} columns: {', '.join(telling)}; choose one with --label-column")
        if not telling:
            return None
        column = telling[0]
    if column not in kinds:
        raise UsageError(f"no column {column!r} in the data set; its columns: {_listing(kinds)}")
    if column in telling:
        return Labels(column, rows.features[column].num_classes)
    if not kinds[column].startswith(LABELS):
        raise UsageError(
            f"column {column!r} is of type {kinds[column]} and cannot hold labels; columns: {_listing(kinds)}"
        )
    if not isinstance(rows, Dataset):
        raise UsageError(
            f"column {column!r} is of type {kinds[column]}, which does not tell the classes of a stream; leave out "
            "--streaming, or give the column the type ClassLabel"
        )
    return Labels(column, sorted(value for value in rows.unique(column) if value is not None))


def find_column(features: Mapping[str, Any], config: Config) -> tuple[str, str | None]:
    """The column with the samples, and the adapter that reads its type; None for images, which several do.

    Raises:
        UsageError: no column fits, or several do.
    """
    kinds = {name: kind(feature) for name, feature in features.items()}
    if config.column is not None and config.column not in kinds:
        raise UsageError(f"no column {config.column!r} in the data set; its columns: {_listing(kinds)}")
    if config.column is not None and config.column == config.label_column:
        raise UsageError(
            f"column {config.column!r} cannot hold both the samples and the labels; its columns: {_listing(kinds)}"
        )
    if config.adapter is not None:
        medium = find_adapter(config.adapter).medium
        readers = {IMAGES if medium is None else medium.column: config.adapter}
    elif IMAGES in kinds.values() and kinds.get(config.column or "", IMAGES) == IMAGES:
        readers = {IMAGES: ""}
    else:
        readers = {IMAGES: "", **_readers()}
    chosen = {config.column: kinds[config.column]} if config.column is not None else kinds
    chosen = {name: found for name, found in chosen.items() if name != config.label_column}
    for wanted, adapter in readers.items():
        fitting = [name for name, found in chosen.items() if found == wanted]
        if len(fitting) > 1:
            raise UsageError(f"several {wanted} columns: {', '.join(fitting)}; choose one with --column")
        if fitting:
            return fitting[0], adapter or None
    what = f"column {config.column!r}" if config.column is not None else "the data set"
    reader = f"adapter {config.adapter!r}" if config.adapter is not None else "an installed adapter"
    raise UsageError(f"{what} holds nothing that {reader} reads ({', '.join(readers)}); columns: {_listing(kinds)}")


def kind(feature: Any) -> str:
    """The type of a column, as `datasets` calls it: "Image", "Audio", "ClassLabel", "string", "int64"."""
    name = type(feature).__name__
    return str(feature.dtype).removeprefix("large_") if name == "Value" else name


def _listing(kinds: Mapping[str, str]) -> str:
    return ", ".join(f"{name} ({found})" for name, found in kinds.items())


def _readers() -> dict[str, str]:
    """Types of columns other than images, each with the first adapter that reads it; plain text comes last."""
    found: dict[str, str] = {}
    for name in adapter_names():
        with suppress(UsageError):  # one that cannot be imported does not stand in the others' way
            medium = find_adapter(name).medium
            if medium is not None:
                found.setdefault(medium.column, name)
    return dict(sorted(found.items(), key=lambda entry: entry[0] == "string"))
