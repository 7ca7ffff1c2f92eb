"""The order of a run's samples, and float batches in that order: read out of memory, or decoded by worker processes.

Batch n of a run is fixed by the seed and n alone. So a stream can start anywhere, and it is the same to the last bit
however many processes decode it.
"""

import os
import signal
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from itertools import islice

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from gac_plugin.errors import UsageError
from gac_plugin.training.data.source import Decoded, Part, Source

GATHERED, MOST_TOGETHER = 2**20, 16
"""Bytes of stored samples, and number of batches, that are read out of memory at once: several cost little more than
one. A larger batch is read alone."""
ALIGNED = 64
"""Memory of a tensor's own starts at a multiple of so many bytes; elsewhere, kernels may round otherwise."""


def position(batch: int, rows: int, taken: int) -> tuple[int, int]:
    """Where in its epoch a batch of the run lies.

    Args:
        batch: its number over the whole run, from 0.
        rows: images in the data set.
        taken: images in one batch of all processes together.

    Returns:
        Epoch, and number within the epoch, both from 0.
    """
    return divmod(batch, rows // taken)


def batches(
    source: Source | Tensor,
    batch_size: int,
    to_samples: Callable[[Tensor], Tensor],
    seed: int,
    rank: int = 0,
    processes: int = 1,
    device: torch.device | str | None = None,
    workers: int = 0,
    start: int = 0,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches: each epoch a new permutation, the same in every process, of which each takes its share.

    Args:
        source: the samples as they are stored; in the CPU's memory if there are workers.
        batch_size: samples in a batch of one process.
        to_samples: of the codec.
        seed: fixes the order; epoch e is shuffled with seed and e alone, so a position can be found again.
        rank, processes: this process and how many there are.
        device: where batches are wanted; default: where the source's samples are.
        workers: processes that read the source, from the first batch until the iterator is closed or dropped; with 0,
            this process does.
        start: the first batch, counted over the whole run from 0; those before it are not read.

    Returns:
        An iterator of float32 samples, shape (batch_size, ...), and their row numbers, int64, shape (batch_size,), on
        the same device; what is left over at an epoch's end is dropped. Rows that cannot be read are replaced by the
        next ones that can, and counted; where there are more than may be so, it raises `UsageError`, whichever process
        met them. How many there were the first process says when the iterator is closed or dropped.

    Raises:
        UsageError: the data set is smaller than one batch of all processes.
    """
    rows, taken = len(source), batch_size * processes
    if rows < taken:
        raise UsageError(
            f"the data set has {rows} samples, fewer than one batch of {taken}; pass a --batch-size of at most "
            f"{rows // processes}"
        )
    source = Decoded(source, None, "") if isinstance(source, Tensor) else source
    order = _order(rows, batch_size, seed, rank, taken, start, source.device)
    wanted = source.device if device is None else torch.device(device)
    if workers:
        parts = _by_workers(source, order, workers, pin_memory=wanted.type == "cuda")
    else:
        parts = _read(source, order, _together(source, batch_size))
    return _samples(source, parts, batch_size, to_samples, wanted, tell=rank == 0)


def _order(
    rows: int, batch_size: int, seed: int, rank: int, taken: int, start: int, device: torch.device
) -> Iterator[Tensor]:
    """The row numbers of each batch, int64, shape (batch_size,), on the device."""
    epoch, index = position(start, rows, taken)
    while True:
        shuffled = torch.randperm(rows, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).to(device)
        for first in range(index * taken + rank * batch_size, rows - rows % taken, taken):
            yield shuffled[first : first + batch_size]
        epoch, index = epoch + 1, 0


def _together(source: Source, batch_size: int) -> int:
    """How many batches to read at once."""
    if not isinstance(source, Decoded):
        return 1
    return max(1, min(MOST_TOGETHER, GATHERED // (batch_size * source.values[0].nbytes)))


def _read(source: Source, order: Iterator[Tensor], together: int) -> Generator[Part]:
    while batches := list(islice(order, together)):
        yield source.read(torch.cat(batches))


def _by_workers(source: Source, order: Iterator[Tensor], workers: int, pin_memory: bool) -> Generator[Part]:
    loader = DataLoader(
        _Reader(source),
        batch_size=None,  # an item is a batch already
        sampler=map(Tensor.tolist, order),
        num_workers=workers,
        pin_memory=pin_memory,
        worker_init_fn=_leave_signals_to_the_main_process,
        generator=torch.Generator(),  # else the loader draws from torch's global one
    )
    for part in loader:
        if isinstance(part, UsageError):
            raise part
        yield part


def _samples(
    source: Source,
    parts: Generator[Part],
    batch_size: int,
    to_samples: Callable[[Tensor], Tensor],
    device: torch.device,
    tell: bool,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Parts of one or several batches -> batches of float samples, and their row numbers."""
    replaced = False
    try:
        with closing(parts):
            for part in parts:
                replaced = replaced or bool(part.unreadable)
                source.unreadable.add(part.unreadable)
                samples = to_samples(part.values.to(device, non_blocking=True))
                rows = part.rows.to(device, non_blocking=True)
                for batch, numbers in zip(samples.split(batch_size), rows.split(batch_size), strict=True):
                    yield batch.clone() if batch.data_ptr() % ALIGNED else batch, numbers
    except GeneratorExit:
        if tell and replaced:
            source.unreadable.tell("were replaced by the next ones that can")
        raise


class _Reader(Dataset[Part | UsageError]):
    """What a worker does: row numbers -> what is there.

    A user's mistake is returned, since torch hands on what is raised with the worker's traceback as its message.
    """

    def __init__(self, source: Source) -> None:
        self.source = source

    def __getitem__(self, rows: list[int]) -> Part | UsageError:
        try:
            return self.source.read(torch.tensor(rows))
        except UsageError as error:
            return error


def _leave_signals_to_the_main_process(worker: int) -> None:
    # A terminal's Ctrl-C and the SIGTERM of `timeout` go to the whole process group, and a worker that dies is an error
    # in the main process, wherever that is. A SIGTERM to the worker itself still ends it, by torch's handler.
    if sys.platform != "win32":
        os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
