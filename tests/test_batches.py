"""The order of the images, where a stream starts, and the processes that decode."""

import multiprocessing
import os
import random
import signal
import subprocess
import sys
from itertools import islice

import datasets
import numpy as np
import pytest
import torch
from PIL import Image as Picture

from gac_plugin.errors import UsageError
from gac_plugin.training.config import Config
from gac_plugin.training.data import load_data
from gac_plugin.training.data.batches import batches, position
from gac_plugin.training.data.images import ImageCodec, Stored
from gac_plugin.training.data.source import Part
from gac_plugin.training.data.unreadable import Unreadable

COUNTING = torch.arange(10, dtype=torch.uint8).reshape(10, 1, 1, 1)
TANH = ImageCodec((1, 8, 8), "tanh").to_samples


def rows(count: int, batch_size: int, rank: int = 0, processes: int = 1, **settings) -> list[list[int]]:
    """The values of `count` batches out of the pixels 0 to 9."""
    stream = batches(COUNTING, batch_size, torch.Tensor.float, 7, rank, processes, **settings)
    return [batch.flatten().int().tolist() for batch, _ in islice(stream, count)]


@pytest.fixture
def stored() -> Stored:
    """The embedded digits, decoded when they are read."""
    images = load_data(Config(workers=1)).train
    assert isinstance(images, Stored)
    return images


@pytest.mark.parametrize(("output", "low", "high"), [("tanh", -1.0, 1.0), ("sigmoid", 0.0, 1.0)])
def test_pixels_and_samples_convert_back_and_forth(output, low, high):
    pixels, codec = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16), ImageCodec((1, 16, 16), output)
    samples = codec.to_samples(pixels)
    expected = low + (high - low) * np.arange(256) / 255
    np.testing.assert_allclose(samples.flatten().numpy(), expected, atol=2e-7)
    assert torch.equal(codec.to_stored(samples), pixels)
    assert codec.to_stored(torch.tensor([low - 9, high + 9])).tolist() == [0, 255]


def test_every_row_comes_once_in_an_epoch_and_processes_share_it():
    alone = rows(4, 4)
    for epoch in (alone[:2], alone[2:]):
        assert len({*epoch[0], *epoch[1]}) == 8, "an epoch of two batches, the two rows left over dropped"
    assert alone[:2] != alone[2:]
    first, second = rows(4, 2, 0, 2), rows(4, 2, 1, 2)
    assert [a + b for a, b in zip(first, second, strict=True)] == alone


def test_an_epoch_is_the_permutation_of_the_seed_and_the_epoch():
    for epoch in range(3):
        order = torch.randperm(10, generator=torch.Generator().manual_seed(7 * 1_000_003 + epoch)).tolist()
        assert rows(2, 4, start=2 * epoch) == [order[:4], order[4:8]]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("rank", "processes"), [(0, 1), (0, 2), (1, 2)])
def test_a_stream_started_later_is_the_rest_of_the_whole_one(rank, processes, workers):
    whole = rows(16, 3 // processes, rank, processes)  # 3 or, of 2 taken by two processes, 5 batches in an epoch
    for start in (0, 1, 2, 3, 5, 6, 10, 13):
        part = rows(16 - start, 3 // processes, rank, processes, start=start, workers=workers)
        assert part == whole[start:], f"from batch {start}"


def test_the_position_tells_epoch_and_number_within_it():
    assert [position(batch, 10, 4) for batch in (0, 1, 2, 7)] == [(0, 0), (0, 1), (1, 0), (3, 1)]
    epoch, index = position(12_345, 10, 3)
    assert 3 * epoch + index == 12_345


@pytest.mark.parametrize("batch_size", [1, 3, 5])
def test_a_batch_lies_in_memory_as_a_tensor_of_its_own_does(batch_size):
    """Kernels may round otherwise where it does not, and several small batches are read at once."""
    stream = batches(COUNTING, batch_size, torch.Tensor.float, 7)
    assert all(batch.data_ptr() % 64 == 0 and batch.is_contiguous() for batch, _ in islice(stream, 40))


def test_batches_before_the_start_are_not_read():
    class Recording:
        """Pixels that note which rows are asked for."""

        asked: list[list[int]] = []  # noqa: RUF012
        device, unreadable = COUNTING.device, Unreadable()

        def __len__(self) -> int:
            return 10

        def read(self, wanted: torch.Tensor) -> Part:
            self.asked.append(wanted.tolist())
            return Part(COUNTING[wanted], wanted, {})

    taken = [
        batch.flatten().int().tolist()
        for batch, _ in islice(batches(Recording(), 4, torch.Tensor.float, 7, start=5), 3)
    ]
    assert Recording.asked == taken == rows(8, 4)[5:]


def test_a_data_set_smaller_than_a_batch_is_refused():
    with pytest.raises(UsageError, match="10 samples, fewer than one batch of 24; pass a --batch-size of at most 5"):
        batches(COUNTING, 12, TANH, seed=0, processes=2)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_batches_are_bit_identical_however_they_are_decoded(stored, workers):
    whole = load_data(Config()).train
    expected = batches(whole, 300, TANH, seed=3)
    stream = batches(stored, 300, TANH, seed=3, workers=workers)
    for (ours, numbers), (theirs, expected_numbers) in islice(zip(stream, expected, strict=True), 6):  # four an epoch
        assert ours.dtype == torch.float32
        assert torch.equal(ours, theirs)
        assert torch.equal(numbers, expected_numbers)
        assert torch.equal(TANH(whole[numbers]), ours), "the rows are those of the samples"


def test_workers_leave_the_random_numbers_of_this_process_alone(stored):
    def states() -> tuple:
        return torch.get_rng_state().tolist(), str(np.random.get_state(legacy=False)), random.getstate()

    before = states()
    next(batches(stored, 8, TANH, seed=0, workers=2))
    assert states() == before


def test_a_mistake_in_a_worker_is_told_in_one_line(tmp_path):
    cells = [{"bytes": b"not a picture", "path": None}] * 8
    Picture.new("L", (4, 4)).save(tmp_path / "first.png")
    cells[0] = {"bytes": (tmp_path / "first.png").read_bytes(), "path": None}
    broken = datasets.Dataset.from_dict({"image": cells}, features=datasets.Features({"image": datasets.Image()}))
    broken.to_parquet(tmp_path / "set" / "data" / "train-00000-of-00001.parquet")
    good = datasets.Dataset.from_dict({"image": cells[:1]}, features=datasets.Features({"image": datasets.Image()}))
    good.to_parquet(tmp_path / "set" / "data" / "test-00000-of-00001.parquet")
    assert len(load_data(Config(dataset=str(tmp_path / "set"))).train) == 1, "below the limit"
    images = load_data(Config(dataset=str(tmp_path / "set"), workers=1, max_unreadable=3)).train
    message = r"^at least \d rows of split 'train' cannot be read, and 3 may be so: row \d \(not .*\), row \d .* --max"
    with pytest.raises(UsageError, match=message) as caught:
        next(batches(images, 8, TANH, seed=0, workers=2))
    assert "\n" not in str(caught.value)
    assert not multiprocessing.active_children(), "though the error is still held"


@pytest.mark.parametrize("end", ["close", "drop"])
def test_workers_end_with_the_stream(stored, end):
    stream = batches(stored, 8, TANH, seed=0, workers=2)
    next(stream)
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    if end == "close":
        stream.close()
    else:
        del stream
    assert not any(worker.is_alive() for worker in workers)
    assert [worker.exitcode for worker in workers] == [0, 0], "of themselves, not killed"


def test_signals_are_for_the_main_process_but_sigterm_to_a_worker_ends_it(stored):
    before = signal.signal(signal.SIGTERM, lambda *_: None)  # the main process's own handler is none of theirs
    try:
        stream = batches(stored, 8, TANH, seed=0, workers=1)
        next(stream)
        (worker,) = multiprocessing.active_children()
        assert os.getpgid(worker.pid) != os.getpgrp(), "what is sent to the process group is for the main process"
        os.kill(worker.pid, signal.SIGINT)
        assert len(list(islice(stream, 20))) == 20, "more than were decoded ahead"
        os.kill(worker.pid, signal.SIGTERM)
        worker.join(60)
        assert worker.exitcode is not None
    finally:
        signal.signal(signal.SIGTERM, before)


SCRIPT = """
import multiprocessing, torch
from gac_plugin.training.data.batches import batches
from gac_plugin.training.config import Config
from gac_plugin.training.data import load_data

if __name__ == "__main__":
    torch.set_num_threads(2)
    torch.randn(300, 300) @ torch.randn(300, 300) + torch.randn(2_000_000).sum()
    data = load_data(Config(workers=2))
    stream = batches(data.train, 64, data.codec.to_samples, seed=0, workers=2)
    for _ in range(50):
        torch.randn(300, 300) @ torch.randn(300, 300) + torch.randn(2_000_000).exp().sum()
        next(stream)
    print(*(worker.pid for worker in multiprocessing.active_children()))
"""


def test_workers_started_after_threads_work_and_end_with_their_process(tmp_path):
    (tmp_path / "main.py").write_text(SCRIPT)
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-W", "error:::multiprocessing", str(tmp_path / "main.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, env=environment, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
