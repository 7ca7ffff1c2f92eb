"""Streams: every row once in an epoch, in an order of the seed's, and from any place on to the last bit."""

import json
import threading
import weakref
from collections import Counter
from dataclasses import replace
from itertools import islice, pairwise

import datasets
import pyarrow as pa
import pytest
import torch
from PIL import Image as Picture
from torch import Tensor

from gac_plugin.errors import UsageError
from gac_plugin.training import train
from gac_plugin.training.config import Config
from gac_plugin.training.data import load_data
from gac_plugin.training.data.feed import Feed
from gac_plugin.training.data.streaming import Stream
from gac_plugin.training.data.unreadable import Unreadable, UnreadableError

pytestmark = pytest.mark.usefixtures("streams")
CLASSES = 3
SHARDS = {"one shard": (23,), "four uneven shards": (7, 4, 9, 3)}


def number(cell: str) -> Tensor:
    """What the samples of these tests are: a number, in the range of bytes."""
    if not cell.isdigit():
        raise UnreadableError(f"{cell!r} is not a number")
    return torch.tensor([int(cell)], dtype=torch.uint8)


@pytest.fixture
def stream_of(tmp_path):
    """Rows of each shard -> a stream of "0", "1", ..., whose labels are the numbers modulo CLASSES."""

    def make(shards: tuple[int, ...], block: int = 5, limit: int = 0, spoiled: tuple[int, ...] = ()) -> Stream:
        first = 0
        features = datasets.Features(
            {"cell": datasets.Value("string"), "label": datasets.ClassLabel(num_classes=CLASSES)}
        )
        for shard, count in enumerate(shards):
            numbers = range(first, first + count)
            columns = {
                "cell": ["spoiled" if n in spoiled else str(n) for n in numbers],
                "label": [n % CLASSES for n in numbers],
            }
            name = f"train-{shard:05d}-of-{len(shards):05d}.parquet"
            datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "data" / name)
            first += count
        rows = datasets.load_dataset(str(tmp_path), streaming=True)["train"]
        return Stream(rows, "cell", "label", number, CLASSES, block, Unreadable("train", limit=limit))

    return make


def draw(stream: Stream, batches: int, size: int = 4, start=None, **more) -> list[tuple[list[int], dict]]:
    """The numbers of so many batches and the place after each; their labels are checked."""
    found = []
    for samples, labels, place in islice(stream.batches(size, Tensor.float, 3, start=start, **more), batches):
        assert samples.shape == (size, 1)
        assert samples.dtype == torch.float32
        numbers = samples[:, 0].int().tolist()
        assert labels.tolist() == [n % CLASSES for n in numbers]
        found.append((numbers, place))
    return found


def without_states(batches) -> list[tuple]:
    """`datasets` may describe one and the same place in more than one way."""
    return [(numbers, {**place, "state": None}) for numbers, place in batches]


def numbers_of(batches) -> list[int]:
    return [n for numbers, _ in batches for n in numbers]


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("shards", SHARDS.values(), ids=SHARDS)
def test_every_row_is_read_once_in_an_epoch_by_one_process(stream_of, shards, processes):
    stream, total = stream_of(shards), sum(shards)
    shares = [
        # a batch of one shows where the first epoch ends
        [numbers for numbers, place in draw(stream, total, 1, rank=rank, processes=processes) if place["epoch"] == 0]
        for rank in range(processes)
    ]
    assert all(shares)
    assert sorted(n for share in shares for (n,) in share) == list(range(total))


@pytest.mark.parametrize("shards", SHARDS.values(), ids=SHARDS)
def test_epochs_follow_each_other_without_a_row_lost_between(stream_of, shards):
    total = sum(shards)
    drawn = numbers_of(draw(stream_of(shards), total))  # batches of 4: four epochs
    assert Counter(drawn) == dict.fromkeys(range(total), 4)
    epochs = [tuple(drawn[first : first + total]) for first in range(0, 4 * total, total)]
    assert len(set(epochs)) == 4, "each epoch has an order of its own"
    assert all(sorted(epoch) == list(range(total)) for epoch in epochs)


def test_the_order_is_the_seeds(stream_of):
    stream = stream_of((23,))
    seeds = [[samples.tolist() for samples, *_ in islice(stream.batches(4, Tensor.float, s), 5)] for s in (3, 3, 4)]
    assert seeds[0] == seeds[1] != seeds[2]


def test_rows_are_shuffled_within_blocks(stream_of):
    drawn = numbers_of(draw(stream_of((20,), block=10), 10, 2))
    assert sorted(drawn[:10]) == list(range(10))
    assert drawn[:10] != list(range(10))
    assert drawn[10:] != [n + 10 for n in drawn[:10]], "each block in an order of its own"


def test_the_order_of_shards_changes_from_epoch_to_epoch(stream_of):
    """As far as `datasets` shuffles them, which version 3 does not."""
    drawn = numbers_of(draw(stream_of((1,) * 12, block=1), 36, 1))
    assert sorted(drawn[:12]) == sorted(drawn[12:24]) == list(range(12))
    if int(datasets.__version__.split(".")[0]) >= 5:
        assert len({tuple(drawn[first : first + 12]) for first in (0, 12, 24)}) == 3


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("shards", SHARDS.values(), ids=SHARDS)
def test_a_stream_goes_on_from_any_place_to_the_last_bit(stream_of, shards, processes):
    stream = stream_of(shards)
    for rank in range(processes):
        whole = draw(stream, 20, rank=rank, processes=processes)
        for batch, (_, place) in enumerate(whole[:-1]):
            written = json.loads(json.dumps(place))
            rest = draw(stream, 19 - batch, start=written, rank=rank, processes=processes)
            assert without_states(rest) == without_states(whole[batch + 1 :]), f"after batch {batch}"


def test_rows_that_cannot_be_read_are_left_out_and_said(stream_of, capsys):
    stream = stream_of((12,), limit=2, spoiled=(3, 8))
    drawn = numbers_of(draw(stream, 10, 2))
    assert sorted(drawn[:10]) == [0, 1, 2, 4, 5, 6, 7, 9, 10, 11]
    said = "gac: 2 rows of split 'train' cannot be read and are left out of this pass; the first: row 3 ('spoiled' is "
    assert said in capsys.readouterr().err


def test_a_conditional_run_leaves_out_rows_without_a_class(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=CLASSES)})
    labels = [None if n == 4 else -1 if n == 9 else n % CLASSES for n in range(24)]
    pictures = [Picture.new("L", (4, 4), 10 * n) for n in range(24)]
    datasets.Dataset.from_dict({"image": pictures, "label": labels}, features=features).to_parquet(
        tmp_path / "data" / "train-00000-of-00001.parquet"
    )
    config = Config(dataset=str(tmp_path), streaming=True, conditional=True, batch_size=22)
    data = load_data(config)
    samples, drawn = next(iter(Feed(config, data, 0, 1, torch.device("cpu")).batches()))
    pixels = data.codec.to_stored(samples)[:, 0, 0, 0].tolist()
    assert dict(zip(pixels, drawn.tolist(), strict=True)) == {10 * n: n % CLASSES for n in range(24) if n not in (4, 9)}
    assert len(data.train.sample(24)) == 22
    with pytest.raises(
        UsageError, match=r"2 rows of .* cannot be read, and 1 may be so: row 4 \(None is none of the 3"
    ):
        load_data(replace(config, max_unreadable=1))


def test_a_limit_is_one_of_a_pass_and_ends_the_stream(stream_of):
    assert draw(stream_of((6,), limit=1, spoiled=(3,)), 20, 5), "20 passes, one such row in each"
    with pytest.raises(UsageError, match=r"2 rows of split 'train' cannot be read, and 1 may be so: row 3 \('spoiled'"):
        draw(stream_of((9,), limit=1, spoiled=(3, 8)), 20)


def test_a_block_of_damaged_rows_does_not_end_the_epoch(stream_of):
    stream = stream_of((6,), block=2, limit=2, spoiled=(2, 3))
    assert sorted(numbers_of(draw(stream, 4, 1))) == [0, 1, 4, 5]


def test_a_process_without_rows_is_told(stream_of):
    with pytest.raises(UsageError, match=r"split 'train' holds no row for process 2 of 3 that can be decoded"):
        draw(stream_of((2,)), 1, rank=2, processes=3)


def test_a_sample_is_a_streams_beginning(stream_of):
    first = stream_of((7, 4)).sample(9)
    assert first.values[:, 0].tolist() == list(range(9))
    assert first.labels.tolist() == [n % CLASSES for n in range(9)]
    assert first.split == "train"


def test_nothing_goes_on_reading_once_the_batches_are_closed(stream_of):
    batches = stream_of((23,)).batches(4, Tensor.float, 3)
    next(batches)
    assert [thread for thread in threading.enumerate() if thread.name.startswith("gac-stream")]
    batches.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("gac-stream")]


def test_samples_are_not_held_twice(stream_of):
    decoded, most = [], 0

    def decode(cell: str) -> Tensor:
        nonlocal most
        value = number(cell)
        decoded.append(weakref.ref(value))
        most = max(most, sum(reference() is not None for reference in decoded))
        return value

    assert len(draw(replace(stream_of((23,)), decode=decode), 12)) == 12
    assert most <= 2, "a sample is gone as soon as its block holds it"


def test_closing_reads_nothing_more_and_tells_what_was_left_out(stream_of, monkeypatch, capsys):
    passes, iterate = [], datasets.IterableDataset.iter
    monkeypatch.setattr(datasets.IterableDataset, "iter", lambda rows, n: passes.append(n) or iterate(rows, n))
    ahead = threading.Event()

    def decode(cell: str) -> Tensor:
        if cell == "5":  # of the second block, which is read while the first one is used
            ahead.set()
            closing.wait(10)
        return number(cell)

    closing = threading.Event()
    batches = replace(stream_of((23,), limit=1, spoiled=(3,)), decode=decode).batches(2, Tensor.float, 3)
    next(batches)
    assert ahead.wait(10)
    threading.Timer(0.2, closing.set).start()
    batches.close()
    assert passes == [5], "no second pass begins"
    assert "gac: 1 row of split 'train' cannot be read and are left out of this pass" in capsys.readouterr().err


def test_a_network_that_fails_is_told_in_one_line(stream_of, monkeypatch):
    stream = stream_of((23,))

    def broken(self, batch_size):
        yield pa.table({"cell": ["0"], "label": [0]})
        raise ConnectionError("the other end has gone\nand more")

    monkeypatch.setattr(datasets.IterableDataset, "iter", broken)
    with pytest.raises(UsageError, match=r"^cannot read on in split 'train': the other end has gone; .*--resume auto$"):
        draw(stream, 1)


RUN = Config(
    streaming=True,
    shuffle_buffer=100,
    steps=60,
    batch_size=32,
    width=16,
    log_every=4,
    sample_every=30,
    evaluation_samples=64,
    checkpoint_every=25,
    cpu=True,
)


def test_the_test_split_is_in_memory_and_the_pixels_are_those_of_loading(tmp_path):
    streamed, loaded = load_data(RUN), load_data(replace(RUN, streaming=False))
    assert torch.equal(streamed.test.values, loaded.test.values)
    assert torch.equal(streamed.test.labels, loaded.test.labels)
    assert (streamed.classes, streamed.codec) == (loaded.classes, loaded.codec)
    first = Feed(RUN, streamed, 0, 1, torch.device("cpu")).known(50)
    assert torch.equal(first.values, loaded.train.values[:50])
    assert torch.equal(first.labels, loaded.train.labels[:50])


@pytest.mark.parametrize("more", [{}, {"conditional": True, "accumulation": 2}], ids=["plain", "conditional, windows"])
def test_a_streamed_run_resumed_is_the_run_that_was_not_interrupted(tmp_path, more):
    config = replace(RUN, lr_schedule="constant", **more)  # rates that fall do so over the length of the run
    whole = train(replace(config, output_dir=str(tmp_path / "whole")))
    parts = replace(config, output_dir=str(tmp_path / "parts"))
    train(replace(parts, steps=25))
    second = train(replace(parts, resume="auto"))
    assert second.evaluation == whole.evaluation
    for a, b in pairwise((whole, second)):
        for name, value in a.generator.state_dict().items():
            assert torch.equal(value, b.generator.state_dict()[name]), name


def test_a_streamed_run_goes_on_in_as_many_processes_as_it_began_with():
    feed = Feed(RUN, load_data(RUN), 0, 1, torch.device("cpu"))
    with pytest.raises(UsageError, match="was streamed by 2 processes and not by 1; start as many"):
        feed.restore({"streams": [None, None]})
    with pytest.raises(UsageError, match="was streamed by 0 processes"):
        feed.restore({"epoch": 0, "images": 64})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"workers": 2}, "--streaming reads by itself; leave out --workers"),
        ({"split": "train[:50%]"}, "a stream is read from its beginning to its end; pass a whole"),
        ({"shuffle_buffer": 0}, "--shuffle-buffer must be at least 1"),
        ({"split": "wrong"}, "has no split 'wrong'; it has: train, test"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_a_stream_cannot_do_is_refused(settings, message):
    with pytest.raises(UsageError, match=message.replace("[", r"\[")):
        load_data(replace(RUN, **settings))
