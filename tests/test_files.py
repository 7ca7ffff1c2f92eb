"""Files are whole or absent; a run that fails before its first step leaves nothing behind."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image as Picture

from gac_plugin.errors import UsageError
from gac_plugin.training.files import (
    GAP,
    MARK,
    append_line,
    clear_run,
    next_run,
    run_folder,
    sweep_run,
    write_grid,
    write_json,
    write_whole,
)


def test_a_file_appears_whole(tmp_path):
    write_json(tmp_path / "new" / "facts.json", {"a": 1})
    assert (tmp_path / "new" / "facts.json").read_text() == '{\n  "a": 1\n}\n'
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["facts.json"]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    target = tmp_path / "facts.json"
    target.write_text("old")

    def fail(path):
        path.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(UsageError, match=r"cannot write .*facts\.json: No space left on device; free some space"):
        write_whole(target, fail)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("facts.json", "old")]


@pytest.mark.parametrize("channels", [1, 3])
def test_a_grid_shows_every_image_in_its_place(tmp_path, channels):
    levels = torch.tensor([10, 90, 170, 250, 50], dtype=torch.uint8)
    pixels = levels.reshape(-1, 1, 1, 1).expand(5, channels, 6, 8)
    write_grid(tmp_path / "grid.png", pixels)
    with Picture.open(tmp_path / "grid.png") as picture:
        sheet = np.asarray(picture.convert("L"))
    height, width = 6 * 6 + GAP, 8 * 6 + GAP
    assert sheet.shape == (2 * height + GAP, 3 * width + GAP), "five images in rows of three, six times enlarged"
    for index, level in enumerate(levels.tolist()):
        row, column = divmod(index, 3)
        tile = sheet[row * height + GAP : (row + 1) * height, column * width + GAP : (column + 1) * width]
        assert (tile == level).all()


def test_a_grid_takes_a_number_of_columns(tmp_path):
    write_grid(tmp_path / "row.png", torch.zeros(4, 1, 48, 48, dtype=torch.uint8), columns=4)
    with Picture.open(tmp_path / "row.png") as row:
        assert row.size == (4 * (48 + GAP) + GAP, 48 + 2 * GAP)


def test_a_run_that_fails_before_it_writes_leaves_no_folder(tmp_path):
    with pytest.raises(UsageError, match="no such data"), run_folder(tmp_path / "a" / "b", overwrite=False):
        raise UsageError("no such data")
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_fails_later_keeps_what_it_wrote(tmp_path):
    def diverge():
        with run_folder(tmp_path / "run", overwrite=False) as folder:
            (folder / "metrics.jsonl").write_text("{}\n")
            raise UsageError("diverged")

    with pytest.raises(UsageError, match="diverged"):
        diverge()
    assert (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_folder_that_holds_a_run_is_replaced_only_when_told(tmp_path):
    (tmp_path / MARK).write_text("{}")
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="holds a run already"), run_folder(tmp_path, overwrite=False):
        pass
    with run_folder(tmp_path, overwrite=True) as folder:
        assert (tmp_path / "metrics.jsonl").exists(), "the old run stays until the new one works"
        clear_run(folder)
        assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"], "files that are not the run's stay"


def test_all_that_a_run_leaves_is_cleared_and_nothing_else(tmp_path):
    left = ["config.json", "metrics.jsonl", "evaluation.json", "environment.json", "memorisation.json", "report.html"]
    left += ["calibrated/discriminator/model.safetensors"]
    left += ["memorisation.png", "samples/step-0000001.png", "maps/step-0000001.png", "generator/model.safetensors"]
    mine = ["comparison.html", "maps.txt", "my samples/a.png"]
    for name in (*left, *mine):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    clear_run(tmp_path)
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()) == mine


def test_a_folder_with_something_else_is_not_touched(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match="is not empty and holds no run"), run_folder(tmp_path, overwrite=True):
        pass
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_line_that_cannot_be_written_is_told(tmp_path):
    append_line(tmp_path / "a.txt", "one")
    append_line(tmp_path / "a.txt", "two")
    assert (tmp_path / "a.txt").read_text() == "one\ntwo\n"
    with pytest.raises(UsageError, match=r"cannot write .*: Is a directory; choose a folder you can write to"):
        append_line(tmp_path, "one")


def test_what_a_killed_process_left_half_written_is_swept_and_nothing_else(tmp_path):
    program = (
        "import os, sys; from pathlib import Path; from gac_plugin.training.files import write_whole\n"
        "for path in sys.argv[1:]:\n"
        "    if not os.fork(): write_whole(Path(path), lambda temporary: os.kill(os.getpid(), 9))\n"
        "    assert os.waitstatus_to_exitcode(os.wait()[1]) == -9"
    )
    names = ("samples/step-0000100.png", "maps/step-0000100.png", "generator/model.safetensors", "report.html")
    subprocess.run([sys.executable, "-c", program, *(tmp_path / name for name in names)], check=True, timeout=60)
    kept = [tmp_path / name for name in ("samples/step-0000050.png", "samples/.notes.txt", ".hidden-notes.md")]
    for path in kept:
        path.write_text("mine")
    files = {path for path in tmp_path.rglob("*") if path.is_file()}
    assert len(files) == 4 + len(kept), "each kill leaves a file behind"
    sweep_run(tmp_path)
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == set(kept)


def test_what_safetensors_leaves_of_a_killed_save_is_swept(tmp_path):
    program = (
        "import sys, torch; from safetensors.torch import save_file\n"
        "tensors = {'a': torch.zeros(10_000_000)}\n"
        "for _ in range(100): save_file(tensors, sys.argv[1])"
    )
    folder = tmp_path / "generator"
    folder.mkdir()
    left = []
    while not left:
        with subprocess.Popen([sys.executable, "-c", program, folder / "model.safetensors"]) as process:
            while (code := process.poll()) is None and not list(folder.glob(".*")):
                pass
            if code == 0:
                pytest.skip("this safetensors writes files in place")
            assert code is None, "saving failed"
            process.kill()
        left = list(folder.glob(".*"))
    sweep_run(tmp_path)
    assert not list(folder.glob(".*"))


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UsageError, match=r"cannot write to .*file/run: Not a directory; choose another --output-dir"),
        run_folder(tmp_path / "file" / "run", overwrite=False),
    ):
        pass


def test_runs_are_numbered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert next_run("digits").as_posix() == "runs/digits-1"
    (tmp_path / "runs" / "digits-1").mkdir(parents=True)
    assert next_run("digits").as_posix() == "runs/digits-2"
