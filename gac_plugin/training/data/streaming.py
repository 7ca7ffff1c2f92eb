"""Samples of data larger than memory: read in order, a block ahead of their use, and shuffled within blocks.

A block's order is fixed by the seed, the epoch and the block's number. So where a stream stands is where its block
begins and how much of that is used up, and it goes on from there to the last bit.
"""

import zlib
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Event
from typing import Any

import torch
from datasets import IterableDataset
from datasets.distributed import split_dataset_by_node
from torch import Tensor

from gac_plugin.errors import UsageError
from gac_plugin.training.data.source import Decoded, first_line
from gac_plugin.training.data.splits import FAILURES
from gac_plugin.training.data.unreadable import Unreadable, UnreadableError
from gac_plugin.training.remote import may_pass


@dataclass(frozen=True)
class Block:
    """Samples that are shuffled together.

    Attributes:
        values: as the codec stores them, in the order in which they were read, shape (n, ...).
        labels: int64, shape (n,), if there are any.
        order: in which they are used, int64, shape (n,).
        place: where reading stood before the block, JSON values.
    """

    values: Tensor
    labels: Tensor | None
    order: Tensor
    place: dict[str, Any]


@dataclass(frozen=True)
class Stream:
    """The samples of one split, read in order.

    Attributes:
        rows: the data set; every row is read once in an epoch, by one process.
        column: holds the samples, undecoded.
        label: column of class labels, if there is one.
        decode: a cell -> the sample as the codec stores it.
        classes: the number of classes, 0 without labels.
        block: rows in a block, at least 1; two blocks are in memory.
        unreadable: says how many rows of a pass may be so that they cannot be read.
        labelled: whether a row without one of the classes is among those.
    """

    rows: IterableDataset
    column: str
    label: str | None
    decode: Callable[[Any], Tensor]
    classes: int
    block: int
    unreadable: Unreadable
    labelled: bool = False

    @property
    def split(self) -> str:
        """The name of the split."""
        return self.unreadable.split

    def sample(self, count: int) -> Decoded:
        """The first samples, at most `count`, in memory.

        Raises:
            UsageError: there are none, or they cannot be read.
        """
        for found in self._blocks(self.rows.take(count).with_format("arrow"), count, self.unreadable.anew(), Event()):
            return Decoded(*found, self.split)
        raise UsageError(f"split {self.split!r} holds no row that can be decoded; check the column and the files")

    def batches(
        self,
        batch_size: int,
        to_samples: Callable[[Tensor], Tensor],
        seed: int,
        rank: int = 0,
        processes: int = 1,
        device: torch.device | str = "cpu",
        start: Mapping[str, Any] | None = None,
    ) -> Iterator[tuple[Tensor, Tensor | None, dict[str, Any]]]:
        """Endless batches of this process's rows; one may reach from an epoch's end into the next.

        Args:
            batch_size: samples in a batch of this process.
            to_samples: of the codec.
            seed: fixes the order, together with the number of processes.
            rank, processes: this process and how many there are.
            device: where batches are wanted.
            start: the place of an earlier batch, to go on after it.

        Returns:
            An iterator of float32 samples, shape (batch_size, ...), their labels, int64, shape (batch_size,), if there
            are any, and the place, JSON values. It raises `UsageError` when files or the network fail.
        """
        taken: list[tuple[Tensor, ...]] = []
        missing, used = batch_size, int((start or {}).get("used", 0))
        for block in self._ahead(seed, rank, processes, start):
            tensors = (block.values,) if block.labels is None else (block.values, block.labels)
            while used < len(block.values):
                part = block.order[used : used + missing]
                taken.append(tuple(tensor[part] for tensor in tensors))
                used, missing = used + len(taken[-1][0]), missing - len(taken[-1][0])
                if not missing:
                    whole = [torch.cat(parts).to(device, non_blocking=True) for parts in zip(*taken, strict=True)]
                    labels = whole[1] if len(whole) > 1 else None
                    yield to_samples(whole[0]), labels, {**block.place, "used": used}
                    taken, missing = [], batch_size
            used = 0

    def _ahead(self, seed: int, rank: int, processes: int, start: Mapping[str, Any] | None) -> Iterator[Block]:
        """The blocks, the next one read by a thread while one is used."""
        closed = Event()
        blocks = self._shuffled(seed, rank, processes, start or {}, closed)
        with ThreadPoolExecutor(1, "gac-stream") as reader:
            try:
                ahead = reader.submit(next, blocks)
                while True:
                    block = ahead.result()
                    ahead = reader.submit(next, blocks)
                    yield block
            finally:
                closed.set()
                reader.submit(blocks.close)

    def _shuffled(
        self, seed: int, rank: int, processes: int, start: Mapping[str, Any], closed: Event
    ) -> Generator[Block]:
        """This process's blocks, epoch after epoch."""
        epoch, number, state = start.get("epoch", 0), start.get("block", 0), start.get("state")
        while True:
            rows = split_dataset_by_node(self.rows.with_format("arrow"), rank, processes)
            rows.set_epoch(seed * 1_000_003 + epoch + 1)
            if state is not None:
                rows.load_state_dict(state)
            place = {"epoch": epoch, "block": number, "state": state or rows.state_dict()}
            unreadable = self.unreadable.anew()
            try:
                for values, labels in self._blocks(rows, self.block, unreadable, closed):
                    draw = torch.Generator().manual_seed(zlib.crc32(f"block {seed} {rank} {epoch} {number}".encode()))
                    yield Block(values, labels, torch.randperm(len(values), generator=draw), place)
                    number += 1
                    place = {"epoch": epoch, "block": number, "state": rows.state_dict()}
            except GeneratorExit:
                unreadable.tell("are left out of this pass")
                raise
            unreadable.tell("are left out of this pass")
            if closed.is_set():
                return
            if number == 0:
                raise UsageError(
                    f"split {self.split!r} holds no row for process {rank} of {processes} that can be decoded; "
                    "check the files, or start fewer processes"
                )
            epoch, number, state = epoch + 1, 0, None

    def _blocks(
        self, rows: IterableDataset, size: int, unreadable: Unreadable, closed: Event
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Decoded rows by the block, in their order; the rows are in the format "arrow"."""
        read = 0
        try:
            for table in rows.iter(size):
                found = self._decoded(table, read, unreadable, closed)
                read += len(table[self.column])
                del table
                if closed.is_set():
                    return
                if found is not None:
                    yield found
        except UsageError:
            raise
        except FAILURES as error:
            mend = "go on with --resume auto" if may_pass(error) else "look at the files, then go on with --resume auto"
            raise UsageError(f"cannot read on in split {self.split!r}: {first_line(error)}; {mend}") from error

    def _decoded(
        self, table: Any, first: int, unreadable: Unreadable, closed: Event
    ) -> tuple[Tensor, Tensor | None] | None:
        """The rows of a table that can be read, the first of them with the number `first`; None if there are none."""
        cells = _listed(table[self.column])
        labels = _listed(table[self.label]) if self.label else [None] * len(cells)
        values, numbers = torch.empty(0), list[int]()
        for row, (cell, label) in enumerate(zip(cells, labels, strict=True), first):
            if closed.is_set():
                break
            try:
                number = self._class_number(label)
                value = self.decode(cell)
            except UnreadableError as error:
                unreadable.add({row: str(error)})
                continue
            if not numbers:
                values = torch.empty((len(cells), *value.shape), dtype=value.dtype)
            values[len(numbers)] = value
            numbers.append(number)
        return (values[: len(numbers)], torch.tensor(numbers) if self.label else None) if numbers else None

    def _class_number(self, label: int | None) -> int:
        """What stands in a cell of labels -> the number of the class, below 0 for none."""
        if self.labelled and (label is None or not 0 <= label < self.classes):
            raise UnreadableError(f"{label} is none of the {self.classes} classes")
        return -1 if label is None else label


def _listed(column: Any) -> list[Any]:
    # older versions of `datasets` give lists in place of Arrow's arrays where they take every n-th row
    return column if isinstance(column, list) else column.to_pylist()
