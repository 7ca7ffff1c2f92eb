"""Data sets of every kind of folder, by path and by name on the Hub, loaded and streamed, and what can go wrong there.

The Hub is the stand-in of hub_server.py, and the clients that ask it are the real ones.
"""

import errno
import io
import json
import os
import tarfile
from dataclasses import replace
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image as Picture

from gac_plugin.cli import main
from gac_plugin.errors import UsageError
from gac_plugin.training import remote
from gac_plugin.training.config import Config
from gac_plugin.training.data import Data, load_data
from gac_plugin.training.data.feed import Feed

pytestmark = pytest.mark.usefixtures("streams", "_no_waiting")
SHARED = Path(os.environ.get("GAC_DATA", Path(__file__).parents[2] / "shared" / "data"))
"""Where MNIST, CIFAR-10, FSDD and names lie, if they do: folders mnist, cifar10, fsdd and names."""
COUNT = 12


@pytest.fixture
def _no_waiting(monkeypatch) -> None:
    monkeypatch.setattr(remote, "WAITS", (0, 0))
    monkeypatch.setattr(datasets.config, "STREAMING_READ_RETRY_INTERVAL", 0)


def pictures() -> list[Picture.Image]:
    draws = np.random.default_rng(0).integers(0, 256, (COUNT, 5, 7), dtype=np.uint8)
    return [Picture.fromarray(pixels) for pixels in draws]


def png(picture: Picture.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def parquet(folder: Path) -> None:
    features = datasets.Features({"photo": datasets.Image(), "kind": datasets.ClassLabel(names=["a", "b"])})
    rows = datasets.Dataset.from_dict({"photo": pictures(), "kind": [n % 2 for n in range(COUNT)]}, features=features)
    for shard in range(2):
        rows.shard(2, shard, contiguous=True).to_parquet(folder / "data" / f"train-{shard:05d}-of-00002.parquet")


def imagefolder(folder: Path) -> None:
    for n, picture in enumerate(pictures()):
        (folder / "train" / "ab"[n % 2]).mkdir(parents=True, exist_ok=True)
        picture.save(folder / "train" / "ab"[n % 2] / f"{n:02d}.png")


def webdataset(folder: Path) -> None:
    with tarfile.open(folder / "train-000.tar", "w") as archive:
        for n, picture in enumerate(pictures()):
            for suffix, content in (("png", png(picture)), ("cls", str(n % 2).encode())):
                member = tarfile.TarInfo(f"{n:02d}.{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


def audiofolder(folder: Path) -> None:
    import soundfile

    for n in range(COUNT):
        (folder / "train" / "ab"[n % 2]).mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(n).uniform(-0.5, 0.5, 2000)
        soundfile.write(folder / "train" / "ab"[n % 2] / f"{n:02d}.wav", noise, 8000)


def words() -> list[str]:
    return [f"w{'abcdefghijkl'[n]}" for n in range(COUNT)]


def csv(folder: Path) -> None:
    (folder / "train.csv").write_text("name,age\n" + "".join(f"{word},{n % 2}\n" for n, word in enumerate(words())))


def jsonl(folder: Path) -> None:
    lines = [json.dumps({"name": word, "age": n % 2}) for n, word in enumerate(words())]
    (folder / "train.jsonl").write_text("\n".join(lines))


FORMATS = {write.__name__: write for write in (parquet, imagefolder, webdataset, audiofolder, csv, jsonl)}
LABELLED = {"webdataset": "cls", "csv": "age", "jsonl": "age"}
"""Formats whose labels are plain numbers."""


def settings(dataset: str, format: str, **more) -> Config:
    return Config(dataset=dataset, label_column=None if more.get("streaming") else LABELLED.get(format), **more)


def by_content(data: Data) -> dict[bytes, int]:
    """The training samples, in no order, each with its label."""
    known = Feed(Config(), data, 0, 1, torch.device("cpu")).known()
    labels = [None] * len(known.values) if known.labels is None else known.labels.tolist()
    return {value.numpy().tobytes(): label for value, label in zip(known.values, labels, strict=True)}


@pytest.mark.parametrize("format", FORMATS)
def test_every_kind_of_folder_by_path_by_name_and_streamed(hub, tmp_path, format):
    if format == "audiofolder":
        pytest.importorskip("soundfile", reason="needs the extra speech")
    FORMATS[format](tmp_path)
    hub.add_folder("ada/things", tmp_path)
    loaded = load_data(settings(str(tmp_path), format))
    content = by_content(loaded)
    assert len(content) == COUNT
    assert sorted(content.values()) == [0] * (COUNT // 2) + [1] * (COUNT // 2)
    for dataset in (str(tmp_path), "ada/things"):
        for streaming in (False, True):
            data = load_data(settings(dataset, format, streaming=streaming))
            assert data.codec == loaded.codec
            assert data.adapter == loaded.adapter
            assert by_content(data).keys() == content.keys()
            if not (streaming and format in LABELLED):
                assert by_content(data) == content
            assert data.classes == (0 if streaming and format in LABELLED else 2)


@pytest.mark.parametrize("streaming", [False, True], ids=["loaded", "streamed"])
def test_the_folders_of_splits_are_no_classes_of_sounds(tmp_path, streaming):
    soundfile = pytest.importorskip("soundfile", reason="needs the extra speech")
    for n in range(COUNT):
        (tmp_path / ("train" if n % 2 else "test")).mkdir(exist_ok=True)
        noise = np.random.default_rng(n).uniform(-0.5, 0.5, 2000)
        soundfile.write(tmp_path / ("train" if n % 2 else "test") / f"{n:02d}.wav", noise, 8000)
    data = load_data(Config(dataset=str(tmp_path), streaming=streaming))
    assert data.classes == 0
    assert data.test.labels is None
    assert len(by_content(data)) == len(data.test) == COUNT // 2


def test_pixels_come_through_every_format_unchanged(tmp_path):
    expected = {np.asarray(picture).tobytes() for picture in pictures()}
    for format in ("parquet", "imagefolder", "webdataset"):
        (tmp_path / format).mkdir()
        FORMATS[format](tmp_path / format)
        assert by_content(load_data(Config(dataset=str(tmp_path / format)))).keys() == expected


def test_a_subset_a_revision_and_a_part_of_a_split(hub, tmp_path):
    for subset, first in (("small", "a"), ("big", "b")):
        (tmp_path / subset).mkdir()
        (tmp_path / subset / "train.csv").write_text("name\n" + "".join(f"{first}{c}\n" for c in "abcdefghij"))
    configs = "".join(f"- config_name: {name}\n  data_files: {name}/*.csv\n" for name in ("small", "big"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    earlier = hub.add_folder("ada/words", tmp_path)
    (tmp_path / "big" / "train.csv").write_text("name\n" + "".join(f"c{c}\n" for c in "abcdefghij"))
    hub.add_folder("ada/words", tmp_path)

    def alphabet(**more) -> set[str]:
        return set(load_data(Config(dataset="ada/words", **more)).codec.to_json()["letters"]) - {"\0"}

    assert alphabet(subset="small") == set("abcdefghij")
    assert alphabet(subset="big") == set("abcdefghij") | {"c"}
    assert alphabet(subset="big", split="train[:2]") == set("cab")
    assert alphabet(subset="big", split="train[:2]", revision=earlier) == set("ab")
    with pytest.raises(UsageError, match=r"^cannot load data set 'ada/words': .*choose a configuration with --subset$"):
        load_data(Config(dataset="ada/words"))
    with pytest.raises(UsageError, match=r"--revision main is for data sets on the Hub; '.*' is a folder"):
        load_data(Config(dataset=str(tmp_path), revision="main"))


@pytest.mark.parametrize("streaming", [False, True], ids=["loaded", "streamed"])
def test_a_private_data_set_by_token(hub, tmp_path, monkeypatch, streaming):
    csv(tmp_path)
    hub.add_folder("ada/words", tmp_path, private=True)
    config = Config(dataset="ada/words", streaming=streaming)
    for token in (None, "hf_reader"):
        if token:
            monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(UsageError, match=r"^cannot load data set 'ada/words': .*hf auth login or set HF_TOKEN$"):
            load_data(config)
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    assert len(by_content(load_data(config))) == COUNT
    assert not any("hf_" in request.path for request in hub.requests)


@pytest.mark.parametrize("fault", [401, 403, 404, 500, 503, "drop"], ids=str)
def test_a_hub_that_fails_is_told_in_one_line(hub, tmp_path, capsys, fault):
    hub.add_folder("ada/words", tmp_path)
    hub.always(".*", fault)
    arguments = ["train", "--dataset", "ada/words", "--cpu", "--output-dir", str(tmp_path / "run")]
    assert main(arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert [line for line in lines if line.startswith("gac: error: cannot load data set 'ada/words': ")] == lines[-1:]
    assert "Traceback" not in "".join(lines)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("faults", [(503,), ("drop",), ("half",)], ids=str)
@pytest.mark.parametrize("streaming", [False, True], ids=["loaded", "streamed"])
def test_what_fails_for_a_moment_is_tried_again(hub, tmp_path, faults, streaming):
    parquet(tmp_path)
    hub.add_folder("ada/things", tmp_path)
    hub.fail(r"GET /datasets/ada/things/resolve/.*parquet", *faults)
    data = load_data(Config(dataset="ada/things", streaming=streaming))
    assert by_content(data) == by_content(load_data(Config(dataset=str(tmp_path))))


@pytest.mark.parametrize("format", ["imagefolder", "audiofolder"])
def test_a_file_that_the_hub_does_not_give_is_not_taken_for_a_damaged_one(hub, tmp_path, format):
    if format == "audiofolder":
        pytest.importorskip("soundfile", reason="needs the extra speech")
    FORMATS[format](tmp_path)
    hub.add_folder("ada/things", tmp_path)
    config = Config(dataset="ada/things", streaming=True, shuffle_buffer=2, batch_size=2)
    hub.fail(r"GET .*/05\.", "half", "half")
    data = load_data(config)
    assert len(by_content(data)) == COUNT, "what fails for a moment is tried again"
    hub.always(r"GET .*/05\.", 404)
    with pytest.raises(
        UsageError, match=r"^cannot read on in split 'train': 404 [^\n]*; look at the files, then go on"
    ):
        list(islice(Feed(config, data, 0, 1, torch.device("cpu")).batches(), 6))
    with pytest.raises(UsageError, match=r"^cannot load data set 'ada/things': 404 [^\n]*$"):
        load_data(config)


def test_a_stream_that_breaks_for_good_is_told_in_one_line(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "STREAMING_READ_MAX_RETRIES", 2)
    csv(tmp_path)
    hub.add_folder("ada/words", tmp_path)
    config = Config(dataset="ada/words", streaming=True, shuffle_buffer=2, batch_size=2)
    feed = Feed(config, load_data(config), 0, 1, torch.device("cpu"))
    hub.always("GET .*train.csv", "drop")
    with pytest.raises(UsageError, match=r"^cannot read on in split 'train': [^\n]*; go on with --resume auto$"):
        list(islice(feed.batches(), 3))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"train.csv": "name,age\na,1\nb,2,3,4\n"}, r"Expected 2 fields in line 3, saw 4; repair its files$"),
        ({"train.jsonl": '{"name": "a"}\n{"name": \n'}, r"JSON parse error: .*; repair its files$"),
        ({"a.csv": "name,age\na,1\n", "b.csv": "name,city\na,x\n"}, r"city: .*string.*; repair its files$"),
        ({"train.parquet": "PAR1"}, r"Parquet .*; check the name or folder, and that it holds rows$"),
    ],
    ids=["csv", "json", "columns", "parquet"],
)
def test_files_that_cannot_be_read_say_why(tmp_path, files, message):
    folder = tmp_path / "config"  # no word of such a name is taken for datasets' own
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_text(content)
    with pytest.raises(UsageError, match=message) as caught:
        load_data(Config(dataset=str(folder)))
    assert "\n" not in str(caught.value)


def test_a_full_disk_is_told_as_that(tmp_path, monkeypatch):
    def full(self, *arguments, **more):
        raise OSError(errno.ENOSPC, "No space left on device")

    csv(tmp_path)
    monkeypatch.setattr(datasets.arrow_writer.ArrowWriter, "write_table", full)
    with pytest.raises(UsageError, match=r"No space left on device; set HF_HOME to a folder that has the space and"):
        load_data(Config(dataset=str(tmp_path)))


def test_a_part_of_a_data_set_that_is_not_there_is_told(tmp_path):
    csv(tmp_path)
    config = Config(dataset=str(tmp_path), split="train[:9]", test_split="train[7:9]")
    data = load_data(config)
    assert (len(data.train), len(data.test)) == (9, 2)
    assert len(load_data(replace(config, split="train[:3]+train[5:9]")).train) == 7
    with pytest.raises(UsageError, match=r"split 'train\[:0\]' of data set .* is empty"):
        load_data(replace(config, split="train[:0]"))
    with pytest.raises(UsageError, match=r"^'train\[:x\]' is no part of a split: .*; write train\[:90%\]"):
        load_data(replace(config, split="train[:x]"))
    with pytest.raises(UsageError, match=r"has no split 'tset\[:3\]'; it has: train"):
        load_data(replace(config, test_split="tset[:3]"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"label_column": "wrong"}, r"no column 'wrong' in the data set; its columns: name \(string\), age \(int64\)"),
        ({"label_column": "age", "streaming": True}, "does not tell the classes of a stream; leave out --streaming"),
        ({"conditional": True}, "or name the column with --label-column"),
    ],
)
def test_labels_that_cannot_be_had_are_told(tmp_path, settings, message):
    csv(tmp_path)
    with pytest.raises(UsageError, match=message):
        load_data(Config(dataset=str(tmp_path), **settings))


def test_of_several_label_columns_one_is_asked_for(tmp_path):
    kinds = datasets.ClassLabel(num_classes=4)
    rows = {"image": pictures(), "coarse": [n % 2 for n in range(COUNT)], "fine": [n % 4 for n in range(COUNT)]}
    features = datasets.Features(
        {"image": datasets.Image(), "coarse": datasets.ClassLabel(num_classes=2), "fine": kinds}
    )
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "data" / "train-00000-of-00001.parquet")
    config = Config(dataset=str(tmp_path), conditional=True)
    with pytest.raises(UsageError, match="several ClassLabel columns: coarse, fine; choose one with --label-column"):
        load_data(config)
    for column, classes in (("coarse", 2), ("fine", 4)):
        data = load_data(replace(config, label_column=column))
        assert data.classes == classes
        assert data.train.labels.tolist() == [n % classes for n in range(COUNT)]


def test_a_label_that_the_training_split_does_not_know_is_none(tmp_path):
    (tmp_path / "train.csv").write_text("name,kind\naa,x\nbb,y\n")
    (tmp_path / "test.csv").write_text("name,kind\naa,y\nbb,z\n")
    data = load_data(Config(dataset=str(tmp_path), label_column="kind"))
    assert data.train.labels.tolist() == [0, 1]
    assert data.test.labels.tolist() == [1, -1]


@pytest.mark.parametrize("streaming", [False, True], ids=["loaded", "streamed"])
def test_damaged_text_is_left_out_and_labels_stay_with_theirs(tmp_path, capsys, streaming):
    features = datasets.Features({"name": datasets.Value("string"), "kind": datasets.ClassLabel(num_classes=3)})
    rows = {"name": ["aa", "\0", "bb", "a\0", "ab"], "kind": [0, 1, 2, 1, 0]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "data" / "train-00000-of-00001.parquet")
    config = Config(dataset=str(tmp_path), streaming=streaming)
    data = load_data(config)
    known = Feed(config, data, 0, 1, torch.device("cpu")).known()
    assert data.codec.texts(known.values) == ["aa", "bb", "ab"]
    assert known.labels.tolist() == [0, 2, 0]
    if not streaming:
        said = capsys.readouterr().err
        assert "2 of 5 rows of split 'train' cannot be read and are left out; the first: row 1 (the text" in said
    with pytest.raises(UsageError, match=r"at least \d rows of split 'train' cannot be read, and 1 may be so: row 1 "):
        load_data(replace(config, max_unreadable=1))


SETS = {
    "mnist": {"shape": (1, 28, 28), "classes": 10, "adapter": None},
    "cifar10": {"shape": (3, 32, 32), "classes": 10, "adapter": None},
    "fsdd": {"shape": None, "classes": 10, "adapter": "speech"},
    "names": {"shape": None, "classes": 0, "adapter": "text"},
}


@pytest.mark.parametrize("name", SETS)
def test_real_data_sets_load_by_path_and_by_name(hub, name):
    folder, expected = SHARED / name, SETS[name]
    if not folder.is_dir():
        pytest.skip(f"no {name} in the folder that GAC_DATA names, or in ../shared/data")
    if name == "fsdd":
        pytest.importorskip("soundfile", reason="needs the extra speech")
    hub.add_folder(f"ada/{name}", folder)
    column = {"column": "audio"} if name == "fsdd" else {}
    few = {"split": "train[:300]", "test_split": "test[:100]", **column}
    path, there = (load_data(Config(dataset=dataset, **few)) for dataset in (str(folder), f"ada/{name}"))
    streamed = load_data(Config(dataset=f"ada/{name}", streaming=True, **column))
    for data in (path, there, streamed):
        assert (data.classes, data.adapter) == (expected["classes"], expected["adapter"])
        assert expected["shape"] in (None, data.codec.sample_shape)
    assert torch.equal(path.train.values, there.train.values)
    assert torch.equal(path.test.values, there.test.values)
    assert len(path.train) == 300
    if expected["shape"]:  # the codecs of sounds and text are fitted to what is seen
        assert torch.equal(streamed.train.sample(300).values, path.train.values)
        assert torch.equal(streamed.test.values[:100], path.test.values)
