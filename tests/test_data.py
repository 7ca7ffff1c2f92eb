"""Data sets: the embedded digits, folders, and every way in which one can be wrong."""

import pickle
import re
from importlib.resources import files
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image as Picture
from sklearn.datasets import load_digits

from gac_plugin.errors import UsageError
from gac_plugin.training.config import Config
from gac_plugin.training.data import load_data
from gac_plugin.training.data.images import Stored
from gac_plugin.training.data.source import Decoded, Source, sample
from gac_plugin.training.data.splits import dataset_path


def load_images(config: Config) -> tuple[Source, Decoded]:
    """The training and the test images."""
    data = load_data(config)
    return data.train, data.test


def picture(size=(8, 6), mode="L", seed=0) -> Picture.Image:
    """A random picture of (width, height) pixels."""
    shape = (size[1], size[0]) if mode == "L" else (size[1], size[0], len(mode))
    return Picture.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8), mode)


def write_data_set(folder: Path, columns: dict, features: dict, split: str = "train") -> str:
    """A data set folder in Hub layout with one split."""
    rows = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    rows.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    return str(folder)


def test_the_embedded_digits_are_those_of_scikit_learn():
    train, test = load_images(Config())
    reference = load_digits()
    every_fifth = np.arange(len(reference.images)) % 5 == 0
    for images, rows in ((train, ~every_fifth), (test, every_fifth)):
        assert images.values.dtype == torch.uint8
        np.testing.assert_array_equal(np.rint(images.values[:, 0].double().numpy() * 16 / 255), reference.images[rows])
        np.testing.assert_array_equal(images.labels.numpy(), reference.target[rows])
    assert len(train.values) + len(test.values) == 1797


def test_the_embedded_data_set_is_an_ordinary_folder_in_hub_layout():
    assert dataset_path("digits") == str(files("gac_plugin") / "digits")
    by_name, by_path = load_images(Config())[0], load_images(Config(dataset=dataset_path("digits")))[0]
    assert torch.equal(by_name.values, by_path.values)


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGB", 3)])
def test_pixels_come_through_unchanged_and_channels_first(tmp_path, mode, channels):
    pictures = [picture(mode=mode, seed=seed) for seed in range(3)]
    source = write_data_set(tmp_path, {"photo": pictures}, {"photo": datasets.Image()})
    train, test = load_images(Config(dataset=source))
    assert train.values.shape == (3, channels, 6, 8)
    assert test is train, "without a test split the training images are the reference"
    assert train.labels is None
    expected = np.stack([np.asarray(p).reshape(6, 8, -1)[..., :channels] for p in pictures]).transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(train.values.numpy(), expected)


def test_images_of_mixed_sizes_are_resized_on_request(tmp_path):
    pictures = [picture((8, 6)), picture((12, 12)), picture((5, 9))]
    source = write_data_set(tmp_path, {"image": pictures}, {"image": datasets.Image()})
    assert load_images(Config(dataset=source, image_size=6))[0].values.shape == (3, 1, 6, 6)
    with pytest.raises(
        UsageError, match=r"images differ in size: 6x8 and 12x12 \(row 1 of split 'train'\); pass --image-size"
    ):
        load_images(Config(dataset=source))


def test_a_folder_of_image_files_works(tmp_path):
    for name, seed in (("a", 1), ("b", 2)):
        picture(seed=seed).save(tmp_path / f"{name}.png")
    assert load_images(Config(dataset=str(tmp_path)))[0].values.shape == (2, 1, 6, 8)


@pytest.mark.parametrize(
    ("columns", "features", "settings", "message"),
    [
        (
            {"x": [0.5], "n": [1]},
            {"x": datasets.Value("float32"), "n": datasets.Value("int64")},
            {},
            r"set holds nothing that an installed adapter reads \(Image.*\); columns: x \(float32\), n \(int64\)",
        ),
        (
            {"image": [picture()]},
            {"image": datasets.Image()},
            {"column": "x"},
            r"no column 'x'.*image \(Image\)",
        ),
        (
            {"image": [picture()], "n": [1]},
            {"image": datasets.Image(), "n": datasets.Value("int64")},
            {"column": "n"},
            "column 'n' holds nothing that an installed adapter reads",
        ),
        (
            {"n": [1]},
            {"n": datasets.Value("int64")},
            {"adapter": "mlp"},
            r"holds nothing that adapter 'mlp' reads \(Image\)",
        ),
        (
            {"a": [picture()], "b": [picture()]},
            {"a": datasets.Image(), "b": datasets.Image()},
            {},
            "several Image columns: a, b; choose one with --column",
        ),
        ({"image": []}, {"image": datasets.Image()}, {}, "no data.*check .* that it holds rows"),
        (
            {"image": [picture()]},
            {"image": datasets.Image()},
            {"split": "dev"},
            "no split 'dev'; it has: train",
        ),
        (
            {"image": [{"bytes": b"not a picture", "path": None}]},
            {"image": datasets.Image()},
            {},
            r"no row of split 'train' can be read: row 0 \(not an image, or of a format",
        ),
    ],
    ids=[
        "no images",
        "missing column",
        "wrong column",
        "wrong adapter",
        "two columns",
        "no rows",
        "missing split",
        "damaged image",
    ],
)
def test_a_data_set_that_cannot_be_used_is_refused(tmp_path, columns, features, settings, message):
    source = write_data_set(tmp_path, columns, features)
    with pytest.raises(UsageError, match=message):
        load_images(Config(dataset=source, **settings))


@pytest.mark.parametrize("name", ["./nothing/here", "/nothing/here", "a/b/c"])
def test_a_folder_that_does_not_exist_is_named(name):
    with pytest.raises(UsageError, match=f"no folder '{re.escape(name)}'"):
        dataset_path(name)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(UsageError, match="cannot load data set"):
        load_images(Config(dataset=str(tmp_path)))


def test_sixteen_bit_pictures_keep_their_upper_byte(tmp_path):
    levels = np.random.default_rng(0).integers(0, 65536, (6, 8), dtype=np.uint16)
    Picture.fromarray(levels).save(tmp_path / "a.png")
    np.testing.assert_array_equal(load_images(Config(dataset=str(tmp_path)))[0].values[0, 0].numpy(), levels // 256)


def test_one_colour_picture_makes_a_colour_data_set(tmp_path):
    pictures = [picture(), picture(mode="RGB")]
    source = write_data_set(tmp_path, {"image": pictures}, {"image": datasets.Image()})
    write_data_set(tmp_path, {"image": pictures[:1]}, {"image": datasets.Image()}, split="test")
    train, test = load_images(Config(dataset=source))
    assert train.values.shape == (2, 3, 6, 8)
    assert test.values.shape == (1, 3, 6, 8)
    np.testing.assert_array_equal(train.values[1].permute(1, 2, 0).numpy(), np.asarray(pictures[1]))
    assert all((train.values[0, c].numpy() == np.asarray(pictures[0])).all() for c in range(3))


def test_a_file_is_not_a_data_set(tmp_path):
    picture().save(tmp_path / "a.png")
    with pytest.raises(UsageError, match=r"is a file; give the folder"):
        dataset_path(str(tmp_path / "a.png"))


def test_images_decoded_when_read_are_those_decoded_into_memory(tmp_path):
    pictures = [picture((8, 6), mode, seed) for seed, mode in enumerate(["RGB", "L", "RGBA", "RGB"])]
    labels = {"image": pictures, "label": [1, 0, 1, 1]}
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])}
    source = write_data_set(tmp_path, labels, features)
    for size in (None, 4):
        whole, _ = load_images(Config(dataset=source, image_size=size))
        stored, test = load_images(Config(dataset=source, image_size=size, workers=1))
        assert isinstance(whole, Decoded)
        assert isinstance(stored, Stored)
        assert isinstance(test, Decoded), "what is evaluated against is in memory"
        assert (len(stored), stored.sample_shape, stored.split) == (4, whole.sample_shape, "train")
        assert torch.equal(stored.labels, torch.tensor([1, 0, 1, 1]))
        rows = torch.tensor([3, 0, 3, 1])
        assert torch.equal(stored[rows], whole.values[[3, 0, 3, 1]])
        assert torch.equal(stored[rows], whole[rows])
        assert torch.equal(pickle.loads(pickle.dumps(stored))[rows], whole[rows]), "for workers that are not forked"
        assert torch.equal(test.values, whole.values)


def test_a_sample_is_spread_over_the_rows_and_the_same_from_both_sources():
    whole, stored = (load_images(Config(workers=workers))[0] for workers in (0, 1))
    for images in (whole, stored):
        some = sample(images, 7)
        rows = [1437 * i // 7 for i in range(7)]
        assert torch.equal(some.values, whole.values[rows])
        assert torch.equal(some.labels, whole.labels[rows])
        assert some.split == "train"
        assert torch.equal(sample(images).values, whole.values), "all there are"


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("modes", [("L", "RGB"), ("RGB", "L")], ids=["grey", "colour"])
def test_a_split_in_colour_makes_the_other_one_colour(tmp_path, modes, workers):
    for mode, split in zip(modes, ("train", "test"), strict=True):
        source = write_data_set(tmp_path, {"image": [picture(mode=mode)]}, {"image": datasets.Image()}, split=split)
    for images, mode in zip(load_images(Config(dataset=source, workers=workers)), modes, strict=True):
        assert images.sample_shape == (3, 6, 8)
        expected = np.asarray(picture(mode=mode).convert("RGB")).transpose(2, 0, 1)
        np.testing.assert_array_equal(images[torch.tensor([0])][0].numpy(), expected)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (picture(mode="RGB"), "row 1 of split 'train' is in colour and the first one is not"),
        (picture((12, 12)), r"images differ in size: 6x8 and 12x12 \(row 1 of split 'train'\); pass --image-size"),
    ],
    ids=["colour", "size"],
)
def test_an_image_unlike_the_first_is_refused_when_it_is_read(tmp_path, second, message):
    source = write_data_set(tmp_path, {"image": [picture(), second]}, {"image": datasets.Image()})
    write_data_set(tmp_path, {"image": [picture()]}, {"image": datasets.Image()}, split="test")
    stored, _ = load_images(Config(dataset=source, workers=1))
    assert stored[torch.tensor([0])].shape == (1, 1, 6, 8)
    with pytest.raises(UsageError, match=message):
        stored[torch.tensor([0, 1])]


def test_a_damaged_header_that_claims_a_huge_picture_is_a_damaged_image(tmp_path):
    picture().save(tmp_path / "a.bmp")
    data = bytearray((tmp_path / "a.bmp").read_bytes())
    data[18:26] = (60_000).to_bytes(4, "little") * 2  # width and height
    (tmp_path / "a.bmp").write_bytes(data)
    with pytest.raises(UsageError, match=r"no row of split 'train' can be read: row 0 \(Image size"):
        load_images(Config(dataset=str(tmp_path)))


def test_text_that_is_not_utf_8_is_told_in_one_line(tmp_path):
    """In a file of lines, decoded while `datasets` loads it, and in a column, decoded when it is read."""
    (tmp_path / "lines").mkdir()
    (tmp_path / "lines" / "train.txt").write_bytes("anna\nzoë\n".encode("latin-1"))
    with pytest.raises(UsageError, match=r"cannot load data set .*'utf-8' codec can't decode byte 0xeb"):
        load_data(Config(dataset=str(tmp_path / "lines")))
    raw = pa.array([b"anna", "zoë".encode("latin-1")], pa.binary())
    column = pa.StringArray.from_buffers(len(raw), *raw.buffers()[1:])
    pq.write_table(pa.table({"text": column}), tmp_path / "train.parquet")
    with pytest.raises(UsageError, match=r"column 'text' holds text that is not UTF-8: .*; convert it"):
        load_data(Config(dataset=str(tmp_path), split="train"))


def test_the_column_tells_the_adapter_and_text_comes_last(tmp_path):
    clip = {"bytes": b"not a sound file", "path": None}
    rows = datasets.Dataset.from_dict({"speaker": ["a"], "audio": [clip], "name": ["b"]})
    rows.cast_column("audio", datasets.Audio(decode=False)).to_parquet(tmp_path / "train.parquet")
    source = str(tmp_path)
    assert load_data(Config(dataset=source, column="name")).adapter == "text"
    with pytest.raises(UsageError, match="several string columns: speaker, name; choose one with --column"):
        load_data(Config(dataset=source, adapter="text"))
    with pytest.raises(UsageError, match="row 0: not a sound file"):  # of the three, the audio column was chosen
        load_data(Config(dataset=source))
