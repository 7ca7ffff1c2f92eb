"""What becomes of an image: its mode, orientation and frames; damaged ones; and the file of decoded pixels."""

import io
import json
import os
import resource
import struct
import subprocess
import sys
import tracemalloc
import zlib
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image as Picture
from PIL import features

from gac_plugin.errors import UsageError
from gac_plugin.training.config import Config
from gac_plugin.training.data import images, load_data
from gac_plugin.training.data.batches import batches
from gac_plugin.training.data.decoding import decode
from gac_plugin.training.data.images import Stored, stored_images
from gac_plugin.training.data.source import Decoded, sample
from gac_plugin.training.data.unreadable import UnreadableError

H, W = 6, 8
BYTES = np.random.default_rng(0).integers(0, 256, (H, W, 4), dtype=np.uint8)
WORDS = np.random.default_rng(1).integers(0, 65536, (H, W, 3), dtype=np.uint16)
PALETTE = np.random.default_rng(2).integers(0, 256, (256, 3), dtype=np.uint8)
ALPHAS = np.random.default_rng(3).integers(0, 256, 256, dtype=np.uint8)
INDICES = BYTES[..., 0]


# ---- files, as their formats say


def saved(picture: Picture.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def png(samples: np.ndarray, colour: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """16 bits a sample, most significant byte first; no filter."""
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in samples)
    header = struct.pack(">IIBBBBB", samples.shape[1], samples.shape[0], 16, colour, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(lines)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in parts
    )


def tiff(samples: np.ndarray, order: str, orientation: int = 1) -> bytes:
    """16 bits a sample, uncompressed, in one strip; `order` is "<" or ">"."""
    height, width, *rest = samples.shape
    channels, data = (rest or [1])[0], samples.astype(f"{order}u2").tobytes()
    tags = {
        256: width,
        257: height,
        258: 16,
        259: 1,
        262: 2 if channels == 3 else 1,
        273: 8,
        274: orientation,
        277: channels,
        278: height,
        279: len(data),
    }
    end = 8 + len(data)
    file = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", end) + data
    file += struct.pack(f"{order}H", len(tags))
    for tag, value in tags.items():
        if tag == 258 and channels == 3:  # three values stand behind the directory
            file += struct.pack(f"{order}HHII", tag, 3, 3, end + 2 + 12 * len(tags) + 4)
        else:
            file += struct.pack(f"{order}HHIHH", tag, 3, 1, value, 0)
    return file + struct.pack(f"{order}I", 0) + struct.pack(f"{order}HHH", 16, 16, 16)


def with_palette(**options) -> bytes:
    picture = Picture.fromarray(INDICES)
    picture.putpalette(PALETTE.tobytes())
    return saved(picture, "PNG", **options)


def on_white(colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None] / 255
    return share * colours + (1 - share) * 255


def frames(kind: str, **options) -> bytes:
    first, *more = (Picture.fromarray(np.roll(BYTES[..., :3] // 128 * 255, shift, 0)) for shift in range(3))
    return saved(first, kind, save_all=True, append_images=more, duration=50, **options)


GREY, COLOUR = BYTES[..., 0], BYTES[..., :3]
INKS = 255.0 - BYTES
MODES: dict[str, tuple[Callable[[], bytes], np.ndarray]] = {
    "1": (lambda: saved(Picture.fromarray(GREY > 127), "PNG"), 255 * (GREY > 127)),
    "L": (lambda: saved(Picture.fromarray(GREY), "PNG"), GREY),
    "L, one level transparent": (
        lambda: saved(Picture.fromarray(GREY), "PNG", transparency=int(GREY[2, 3])),
        np.where(GREY[2, 3] == GREY, 255, GREY),
    ),
    "LA": (lambda: saved(Picture.fromarray(BYTES[..., :2]), "PNG"), on_white(GREY[..., None], BYTES[..., 1])[..., 0]),
    "RGB": (lambda: saved(Picture.fromarray(COLOUR), "PNG"), COLOUR),
    "RGBA": (lambda: saved(Picture.fromarray(BYTES), "PNG"), on_white(COLOUR, BYTES[..., 3])),
    "RGBA, TIFF": (lambda: saved(Picture.fromarray(BYTES), "TIFF"), on_white(COLOUR, BYTES[..., 3])),
    "P": (with_palette, PALETTE[INDICES]),
    "P, transparent in parts": (
        lambda: with_palette(transparency=ALPHAS.tobytes()),
        on_white(PALETTE[INDICES], ALPHAS[INDICES]),
    ),
    "P, one colour transparent": (
        lambda: with_palette(transparency=int(INDICES[0, 0])),
        np.where((INDICES[0, 0] == INDICES)[..., None], 255, PALETTE[INDICES]),
    ),
    # paper reflects what neither the ink nor black takes away
    "CMYK": (
        lambda: saved(Picture.frombytes("CMYK", (W, H), BYTES.tobytes()), "TIFF"),
        INKS[..., :3] * INKS[..., 3:] / 255,
    ),
    "16 bit grey, PNG": (lambda: png(WORDS[..., 0], 0), WORDS[..., 0] // 256),
    "16 bit grey, PNG, one level transparent": (
        lambda: png(WORDS[..., 0], 0, (b"tRNS", struct.pack(">H", WORDS[1, 1, 0]))),
        np.where(WORDS[..., 0] == WORDS[1, 1, 0], 255, WORDS[..., 0] // 256),
    ),
    "16 bit grey, TIFF, little end first": (lambda: tiff(WORDS[..., 0], "<"), WORDS[..., 0] // 256),
    "16 bit grey, TIFF, big end first": (lambda: tiff(WORDS[..., 0], ">"), WORDS[..., 0] // 256),
    "16 bit RGB, PNG": (lambda: png(WORDS, 2), WORDS // 256),
    "16 bit RGB, TIFF, little end first": (lambda: tiff(WORDS, "<"), WORDS // 256),
    "16 bit RGB, TIFF, big end first": (lambda: tiff(WORDS, ">"), WORDS // 256),
    "animated GIF": (lambda: frames("GIF"), COLOUR // 128 * 255),
    "animated WebP": (lambda: frames("WEBP", lossless=True), COLOUR // 128 * 255),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_becomes_the_grey_or_colour_that_is_seen_on_white(mode):
    if "WebP" in mode and not features.check("webp"):
        pytest.skip("this Pillow was built without WebP")
    make, expected = MODES[mode]
    pixels = decode({"bytes": make(), "path": None}, datasets.Image())
    assert (pixels.dtype, pixels.shape) == (np.uint8, expected.shape)
    exact = expected.dtype.kind != "f"
    np.testing.assert_allclose(pixels, expected, rtol=0, atol=0 if exact else 1)
    assert not exact or (pixels == expected).all()


TURNED: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("orientation", TURNED)
@pytest.mark.parametrize("kind", ["PNG", "TIFF, 16 bit, big end first", "TIFF, 16 bit, little end first", "JPEG"])
def test_images_are_turned_as_their_exif_orientation_says(orientation, kind):
    exif = Picture.Exif()
    exif[0x0112] = orientation
    source, tolerance = GREY, 0
    if kind == "PNG":
        file = saved(Picture.fromarray(GREY), "PNG", exif=exif)
    elif kind == "JPEG":
        source, tolerance = np.add.outer(np.arange(16), 9 * np.arange(24)), 6  # smooth, so that little is lost
        file = saved(Picture.fromarray(source.astype(np.uint8)), "JPEG", exif=exif, quality=100)
    else:
        source = WORDS[..., 0] // 256
        file = tiff(WORDS[..., 0], ">" if "big" in kind else "<", orientation)
    pixels = decode({"bytes": file, "path": None}, datasets.Image())
    expected = TURNED[orientation](source)
    assert pixels.shape == expected.shape
    assert np.abs(pixels.astype(int) - expected).max() <= tolerance


def test_floating_point_pixels_are_not_guessed_at():
    file = saved(Picture.fromarray(np.zeros((4, 4), np.float32)), "TIFF")
    with pytest.raises(UnreadableError, match="pixels of mode 'F' have no known range"):
        decode({"bytes": file, "path": None}, datasets.Image())


@pytest.mark.parametrize("cell", [None, {"bytes": None, "path": None}])
def test_an_empty_cell_is_told(cell):
    with pytest.raises(UnreadableError, match=r"^the cell is empty$"):
        decode(cell, datasets.Image())


# ---- damaged images


def number(value: int) -> dict:
    """A cell with a grey image of one level."""
    return {"bytes": saved(Picture.new("L", (4, 4), value), "PNG"), "path": None}


def bomb() -> bytes:
    """A file of a few bytes that claims to be 60,000 pixels wide and high."""
    file = bytearray(saved(Picture.new("L", (4, 4)), "BMP"))
    file[18:26] = struct.pack("<II", 60_000, 60_000)
    return bytes(file)


NOISE = Picture.fromarray(np.random.default_rng(4).integers(0, 256, (64, 64, 3), dtype=np.uint8))
DAMAGED = {
    "PNG cut short": ({"bytes": saved(NOISE, "PNG")[:5000], "path": None}, "truncated"),
    "JPEG cut short": ({"bytes": saved(NOISE, "JPEG")[:1500], "path": None}, "truncated"),
    "PNG with a damaged chunk": (
        {"bytes": saved(NOISE, "PNG").replace(b"IHDR", b"IHDX"), "path": None},
        "not an image",
    ),
    "not an image": ({"bytes": b"GIF, but not really", "path": None}, "not an image, or of a format"),
    "no bytes": ({"bytes": b"", "path": None}, "not an image"),
    "bomb": ({"bytes": bomb(), "path": None}, "exceeds limit"),
    "no file": ({"bytes": None, "path": "nowhere/missing.png"}, "No such file"),
    "None": (None, "the cell is empty"),
}


def stored(cells: list, limit: int = 100, split: str = "train") -> Stored:
    """Images with their row numbers as labels."""
    rows = datasets.Dataset.from_dict({"image": cells}, features=datasets.Features({"image": datasets.Image()}))
    return stored_images(rows, "image", torch.arange(len(cells)), split, None, limit)


@pytest.mark.parametrize("damage", DAMAGED)
@pytest.mark.parametrize("place", [0, 2, 4], ids=["first", "middle", "last"])
def test_a_damaged_image_is_left_out_with_its_label_and_said_once(damage, place, capsys):
    cell, reason = DAMAGED[damage]
    cells = [number(10 * row) for row in range(5)]
    cells[place] = cell
    decoded = stored(cells).decoded(1e9, show=True)
    left = [row for row in range(5) if row != place]
    assert decoded.values[:, 0, 0, 0].tolist() == [10 * row for row in left]
    assert decoded.labels.tolist() == left
    assert list(decoded.unreadable.reasons) == [place]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        f"gac: 1 of 5 rows of split 'train' cannot be read and are left out; the first: row {place} ("
    )
    assert reason in line
    stored(cells).decoded(1e9, show=False)
    assert capsys.readouterr().err == ""


def test_the_limit_on_damaged_images():
    cells = [DAMAGED["None"][0] if row in (1, 2, 5, 7, 8) else number(row) for row in range(10)]
    assert len(stored(cells, 5).decoded(1e9, show=False)) == 5
    message = (
        r"^at least 5 rows of split 'train' cannot be read, and 4 may be so: row 1 \(the cell is empty\), "
        r"row 2 \(the cell is empty\), row 5 \(the cell is empty\); repair or remove what is damaged, or raise "
        r"--max-unreadable$"
    )
    with pytest.raises(UsageError, match=message):
        stored(cells, 4).decoded(1e9, show=False)
    cells[2:] = [number(0)]
    with pytest.raises(UsageError, match=r"^at least 1 row of .*: row 1 \(the cell is empty\);.*--max-unreadable N"):
        stored(cells, 0).decoded(1e9, show=False)
    with pytest.raises(UsageError, match="no row of split 'train' can be read: row 0"):
        stored([None] * 3)
    assert len(stored([number(0)], 0).decoded(1e9, show=False)) == 1


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_read_as_they_are_needed_the_next_image_stands_in_for_a_damaged_one(workers, capsys):
    damaged = {3, 4, 11}
    source = stored([None if row in damaged else number(20 * row) for row in range(12)])
    order = torch.cat(
        [torch.randperm(12, generator=torch.Generator().manual_seed(5 * 1_000_003 + epoch)) for epoch in range(3)]
    )
    expected = [{3: 5, 4: 5, 11: 0}.get(row, row) for row in order.tolist()]
    for start in (0, 2):
        stream = batches(source, 4, torch.Tensor.float, 5, workers=workers, start=start)
        taken = list(islice(stream, 9 - start))
        found = torch.cat([rows for _, rows in taken]).tolist()
        assert found == expected[4 * start :]
        assert torch.cat([values[:, 0, 0, 0] for values, _ in taken]).tolist() == [20 * row for row in found]
        assert set(source.unreadable.reasons) == damaged, "each counted once"
        capsys.readouterr()
        stream.close()
        assert capsys.readouterr().err.startswith("gac: 3 of 12 rows of split 'train' cannot be read and were replaced")
    other = batches(source, 4, torch.Tensor.float, 5, rank=1, processes=2, workers=workers)
    next(other)
    other.close()
    assert capsys.readouterr().err == "", "the first process tells it"


def test_the_labels_of_a_sample_are_those_of_its_images():
    some = sample(stored([None if row in (0, 3) else number(row) for row in range(9)]), 3)
    assert some.values[:, 0, 0, 0].tolist() == some.labels.tolist() == [1, 4, 6]


def test_samples_other_than_images_are_left_out_likewise(tmp_path, capsys):
    """The letters are those of the training split, so that a test text may have one that cannot be encoded."""
    for split, texts in (("train", ["ab", "ba", "aab"]), ("test", ["a", "xyz", "bb", "q"])):
        (tmp_path / f"{split}.txt").write_text("\n".join(texts))
    data = load_data(Config(dataset=str(tmp_path)))
    assert data.codec.texts(data.test.values) == ["a", "bb"]
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("gac:")]
    assert len(told) == 1
    assert told[0].startswith("gac: 2 of 4 rows of split 'test' cannot be read and are left out; the first: row 1 (")
    with pytest.raises(UsageError, match="2 rows of split 'test' cannot be read, and 1 may be so: row 1"):
        load_data(Config(dataset=str(tmp_path), max_unreadable=1))


# ---- decoding all, into memory or a file


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """The folder of decoded pixels."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache" / "gac-plugin"


MANY = [None if row in (7, 150) else number(row) for row in range(200)]


def test_pixels_are_held_once_while_they_are_decoded():
    cells = [{"bytes": saved(Picture.new("RGB", (64, 64), row), "PNG"), "path": None} for row in range(1000)]
    source = stored(cells)
    tracemalloc.start()
    decoded = source.decoded(1e9, show=False)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    size = 1000 * 3 * 64 * 64
    assert decoded.values.nbytes == size
    assert size < peak < 1.5 * size + 5e6, "numpy tells tracemalloc what it takes"


@pytest.mark.parametrize("first", ["grey", "colour"])
def test_what_is_mapped_is_what_would_be_in_memory(cache, first):
    cells = [*MANY]
    cells[0 if first == "colour" else 130] = {
        "bytes": saved(Picture.new("RGB", (4, 4), "#102030"), "PNG"),
        "path": None,
    }
    memory, file = stored(cells).decoded(1e9, show=False), stored(cells).decoded(0, show=False)
    assert (memory.mapped, file.mapped) == (False, True)
    assert file.sample_shape == (3, 4, 4)
    assert torch.equal(memory.values, file.values)
    assert torch.equal(memory.labels, file.labels)
    rows = torch.tensor([5, 197, 5, 0])
    assert torch.equal(file[rows], memory.values[rows])
    assert file.to("meta") is file, "a device is not to take it all"
    assert torch.equal(sample(file).values, memory.values)


def test_grey_pixels_are_not_copied_to_be_in_colour(cache):
    grey = stored(MANY).decoded(0, show=False)
    coloured = grey.in_colour()
    assert coloured.sample_shape == (3, 4, 4)
    assert coloured.values.data_ptr() == grey.values.data_ptr()
    rows = torch.tensor([3, 1])
    assert coloured[rows].is_contiguous()
    assert torch.equal(coloured[rows], grey.values[rows].repeat(1, 3, 1, 1))


def test_the_file_is_found_again_by_a_run_of_the_same_images(cache, monkeypatch, capsys):
    whole = stored(MANY).decoded(0, show=True).values.clone()
    told = capsys.readouterr().err
    assert "2 of 200 rows" in told
    assert sorted(path.suffix for path in cache.iterdir() if path.suffix != ".lock") == [".json", ".pixels"]
    calls = count_decoding(monkeypatch)
    again = stored(MANY).decoded(0, show=True)
    assert torch.equal(again.values, whole)
    assert again.labels.tolist() == [row for row in range(200) if row not in (7, 150)]
    assert len(calls) == 1, "the first one, for the shape"
    assert capsys.readouterr().err == told
    with pytest.raises(UsageError, match=r"2 rows of split 'train' cannot be read, and 1 may be so"):
        stored(MANY, 1).decoded(0, show=True)
    stored(MANY[:100]).decoded(0, show=False)
    assert len(list(cache.glob("*.pixels"))) == 2, "other images, another file"


def count_decoding(monkeypatch) -> list:
    """Cells that are decoded from here on."""
    calls: list = []
    original = images.decode
    monkeypatch.setattr(images, "decode", lambda cell, *more: calls.append(cell) or original(cell, *more))
    return calls


@pytest.mark.parametrize(
    "damage", ["pixels cut short", "pixels gone", "no facts", "other facts", "other format", "text"]
)
def test_a_damaged_or_foreign_file_is_made_again(cache, monkeypatch, damage):
    whole = stored(MANY).decoded(0, show=False).values.clone()
    (pixels,), (facts,) = cache.glob("*.pixels"), cache.glob("*.json")
    found = json.loads(facts.read_text())
    if damage == "pixels cut short":
        pixels.write_bytes(pixels.read_bytes()[:-1])
    elif damage == "pixels gone":
        pixels.unlink()
    elif damage == "no facts":
        facts.unlink()
    elif damage == "other facts":
        facts.write_text(json.dumps(found | {"shape": [1, 1, 4, 4]}))
    elif damage == "other format":
        facts.write_text(json.dumps(found | {"format": 0}))
    else:
        facts.write_text("[1, 2")
    calls = count_decoding(monkeypatch)
    assert torch.equal(stored(MANY).decoded(0, show=False).values, whole)
    assert len(calls) == 1 + 200


def test_nothing_is_left_of_a_file_that_does_not_fit_on_the_disk(cache, monkeypatch):
    source = stored(MANY)
    usage = type("Usage", (), {"free": 100})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(
        UsageError, match=r"cannot write .*\.pixels: 0\.0 GB .* do not fit; free some space, .*--workers"
    ):
        source.decoded(0, show=False)
    assert not [path for path in cache.iterdir() if path.suffix != ".lock"]
    monkeypatch.undo()


def test_a_disk_that_fills_up_while_pixels_are_written_is_told_in_one_line(cache):
    source = stored(MANY)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, before[1]))  # of 3,168 bytes
    try:
        with pytest.raises(UsageError, match=r"cannot write .*\.pixels: File too large; free some space") as caught:
            source.decoded(0, show=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(caught.value)
    assert not [path for path in cache.iterdir() if path.suffix != ".lock"]
    assert len(source.decoded(0, show=False)) == 198


def test_a_file_that_holds_too_many_damaged_images_is_not_kept(cache):
    with pytest.raises(UsageError, match="2 rows of split 'train' cannot be read, and 1 may be so"):
        stored(MANY, 1).decoded(0, show=False)
    assert not [path for path in cache.iterdir() if path.suffix != ".lock"]


def test_training_does_not_depend_on_where_the_images_are(cache):
    whole, mapped = load_data(Config()), load_data(Config(memory=1e-6))
    assert isinstance(mapped.train, Decoded)
    assert mapped.train.mapped
    assert not mapped.test.mapped
    assert torch.equal(mapped.test.values, whole.test.values)
    streams = (batches(data.train, 48, data.codec.to_samples, seed=1) for data in (whole, mapped))
    for (ours, rows), (theirs, expected) in islice(zip(*streams, strict=True), 70):  # two epochs, and windows of 16
        assert torch.equal(ours, theirs)
        assert torch.equal(rows, expected)


def test_in_two_processes_one_decodes_and_one_tells(tmp_path):
    (tmp_path / "set").mkdir()
    for row in range(40):
        file = b"damaged" if row in (3, 20) else saved(Picture.fromarray(np.full((8, 8), 6 * row, np.uint8)), "PNG")
        (tmp_path / "set" / f"{row:02d}.png").write_bytes(file)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    flags = ["--cpu", "--width", "8", "--batch-size", "8", "--steps", "2", "--evaluation-samples", "0"]
    program = [
        "-m",
        "gac_plugin.train",
        "--dataset",
        str(tmp_path / "set"),
        "--output-dir",
        str(tmp_path / "run"),
        *flags,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}

    done = subprocess.run(
        [*launcher, *program, "--memory", "0"],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr.count("gac: 2 of 40 rows of split 'train' cannot be read and are left out") == 1
    assert len(list((tmp_path / "cache" / "gac-plugin").glob("*.pixels"))) == 1
