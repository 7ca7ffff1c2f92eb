"""What a run is trained on, batch by batch, and where it stands in that: in memory, stored or streamed."""

import json
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from gac_plugin.errors import UsageError
from gac_plugin.training.config import Config
from gac_plugin.training.data import Data
from gac_plugin.training.data.batches import batches
from gac_plugin.training.data.source import KNOWN, Decoded, Source, sample
from gac_plugin.training.data.streaming import Stream
from gac_plugin.training.processes import everyones_text

Batch = tuple[Tensor, Tensor | None]
"""Float32 samples, shape (B, ...), and class labels, int64, shape (B,), if there are any."""


class Feed:
    """The batches of one process.

    Args:
        config: batch size, seed, workers.
        data: of the run.
        rank, processes: this process and how many there are.
        device: where batches are wanted.
    """

    def __init__(self, config: Config, data: Data, rank: int, processes: int, device: torch.device) -> None:
        self.config, self.data, self.rank, self.processes, self.device = config, data, rank, processes, device
        self._given = 0
        self._place: Mapping[str, Any] | None = None
        # where there is no test split, the stream's first samples stand for it
        first = isinstance(data.train, Stream) and data.test.split == data.train.split
        self._known: dict[int, Decoded] = {KNOWN: data.test} if first else {}

    def restore(self, facts: Mapping[str, Any]) -> None:
        """Go on where an earlier run stood.

        Args:
            facts: of `facts`.

        Raises:
            UsageError: a stream was read by another number of processes.
        """
        if not isinstance(self.data.train, Stream):
            # the position counts samples, so that another number of processes goes on with the same ones
            in_epoch = len(self.data.train) // self._taken
            self._given = facts["epoch"] * in_epoch + facts["images"] // self._taken
            return
        places = facts.get("streams", [])
        if len(places) != self.processes:
            raise UsageError(
                f"the run to resume was streamed by {len(places)} processes and not by {self.processes}; "
                "start as many, or leave out --streaming in a new run"
            )
        self._place = places[self.rank]

    def facts(self) -> dict[str, Any]:
        """Where the feed stands, JSON values; to be called by all processes."""
        if isinstance(self.data.train, Stream):
            return {"streams": [json.loads(text) for text in everyones_text(json.dumps(self._place))]}
        epoch, batch = divmod(self._given, len(self.data.train) // self._taken)
        return {"epoch": epoch, "images": batch * self._taken}

    def batches(self) -> Generator[Batch]:
        """Endless batches, from where the feed stands; see `data.batches.batches` and `Stream.batches`.

        Raises:
            UsageError: the data set is smaller than one batch of all processes.
        """
        train = self.data.train
        return self._streamed(train) if isinstance(train, Stream) else self._stored(train)

    def known(self, count: int = KNOWN) -> Decoded:
        """Real samples to compare with, at most `count`: evenly spaced over the split, or a stream's first ones."""
        train = self.data.train
        if not isinstance(train, Stream):
            return sample(train, count)
        if count not in self._known:
            self._known[count] = train.sample(count)
        return self._known[count]

    @property
    def labels(self) -> Tensor | None:
        """Class labels of the training samples, int64, shape (N,), on the CPU; of a stream, of its first ones."""
        train = self.data.train
        return self.known().labels if isinstance(train, Stream) else train.labels

    @property
    def _share(self) -> tuple[int, Callable[[Tensor], Tensor], int, int, int, torch.device]:
        """What both kinds of batches are told."""
        config = self.config
        return config.batch_size, self.data.codec.to_samples, config.seed, self.rank, self.processes, self.device

    @property
    def _taken(self) -> int:
        return self.config.batch_size * self.processes

    def _stored(self, source: Source) -> Generator[Batch]:
        config, labels = self.config, None if source.labels is None else source.labels.to(self.device)
        return self._counted(batches(source, *self._share, config.workers, self._given), labels)

    def _counted(self, found: Iterator[tuple[Tensor, Tensor]], labels: Tensor | None) -> Generator[Batch]:
        for samples, rows in found:
            self._given += 1
            yield samples, None if labels is None else labels[rows]

    def _streamed(self, stream: Stream) -> Generator[Batch]:
        for samples, labels, place in stream.batches(*self._share, self._place):
            self._place = place
            yield samples, labels
