"""The order of a run's samples, and float batches in that order: read out of memory, or decoded by worker processes.

Batch n of a run is fixed by the seed and n alone. So a stream can start anywhere, and it is the same to the last bit
however many processes decode it.
"""

import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from gac_plugin.errors import UsageError
from gac_plugin.training.source import Source


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
        the same device; what is left over at an epoch's end is dropped. It raises `UsageError` at an image that cannot
        be decoded, whichever process met it.

    Raises:
        UsageError: the data set is smaller than one batch of all processes.
    """
    rows, taken = len(source), batch_size * processes
    if rows < taken:
        raise UsageError(
            f"the data set has {rows} samples, fewer than one batch of {taken}; pass a --batch-size of at most "
            f"{rows // processes}"
        )
    # row numbers go to the workers from the CPU, and index a tensor in memory on its own device
    order = _order(rows, batch_size, seed, rank, taken, start, "cpu" if workers else device)
    if workers:
        return _by_workers(source, order, to_samples, torch.device(device or "cpu"), workers)
    return ((to_samples(source[rows].to(device)), rows) for rows in order)


def _order(
    rows: int, batch_size: int, seed: int, rank: int, taken: int, start: int, device: torch.device | str | None
) -> Iterator[Tensor]:
    """The row numbers of each batch, int64, shape (batch_size,), on the device."""
    epoch, index = position(start, rows, taken)
    while True:
        shuffled = torch.randperm(rows, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).to(device)
        for first in range(index * taken + rank * batch_size, rows - rows % taken, taken):
            yield shuffled[first : first + batch_size]
        epoch, index = epoch + 1, 0


def _by_workers(
    source: Source | Tensor,
    order: Iterable[Tensor],
    to_samples: Callable[[Tensor], Tensor],
    device: torch.device,
    workers: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    loader = DataLoader(
        _Reader(source),
        batch_size=None,  # an item is a batch already
        sampler=map(Tensor.tolist, order),
        num_workers=workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=_leave_signals_to_the_main_process,
        generator=torch.Generator(),  # else the loader draws from torch's global one
    )
    for stored, rows in loader:
        if isinstance(stored, UsageError):
            raise stored
        yield to_samples(stored.to(device, non_blocking=True)), rows.to(device, non_blocking=True)


class _Reader(Dataset[tuple[Tensor | UsageError, Tensor]]):
    """What a worker does: row numbers -> stored samples, and the row numbers.

    A user's mistake is returned, since torch hands on what is raised with the worker's traceback as its message.
    """

    def __init__(self, source: Source | Tensor) -> None:
        self.source = source

    def __getitem__(self, rows: list[int]) -> tuple[Tensor | UsageError, Tensor]:
        numbers = torch.tensor(rows)
        try:
            return self.source[numbers], numbers
        except UsageError as error:
            return error, numbers


def _leave_signals_to_the_main_process(worker: int) -> None:
    # A terminal's Ctrl-C and the SIGTERM of `timeout` go to the whole process group, and a worker that dies is an error
    # in the main process, wherever that is. A SIGTERM to the worker itself still ends it, by torch's handler.
    if sys.platform != "win32":
        os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
