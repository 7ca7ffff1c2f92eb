"""A run that was interrupted and resumed is the run that was not: weights, losses, pictures, to the last bit."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image as Picture
from safetensors.torch import load_file

from gac_plugin import GAC
from gac_plugin.cli import main
from gac_plugin.errors import UsageError
from gac_plugin.training import train
from gac_plugin.training.checkpoint import read_checkpoint
from gac_plugin.training.config import Config
from gac_plugin.training.stopping import Stop

RUN = Config(
    steps=24,
    batch_size=32,
    width=16,
    log_every=4,
    sample_every=12,
    evaluation_samples=64,
    checkpoint_every=5,
    keep_checkpoints=9,
    penalty_interval=3,
    cpu=True,
)
KINDS = {
    "default": {},
    "pr+, spectral, fused": {"rule": "pr+", "schedule": "fused", "metric": "spectral"},
    "adam, no average": {"optimizer": "adam", "ema": 0.0, "beta1": 0.5},
    "windows, two workers": {"accumulation": 2, "workers": 2},
    "one worker, relativistic": {"workers": 1, "loss": "relativistic"},
    "schedules": {"lr_schedule": "cosine:0.1", "warmup": 7, "ema_schedule": "linear:0.1", "penalty_schedule": "linear"},
    "bf16, clipped": {"mixed_precision": "bf16", "rule": "hz", "max_norm": 0.5},
    "conditional": {"conditional": True, "workers": 1},
    "mapped file": {"memory": 0.0},
    "evaluated": {"evaluate_every": 6, "keep_checkpoints": 1},
}


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def signal_at(monkeypatch):
    """Send this process a signal in the middle of a step of the run."""

    def arm(number: int, step: int) -> None:
        original, steps = GAC.step, iter(range(1, 10_000))

        def counted(gac, *arguments, **conditions):
            if next(steps) == step:
                os.kill(os.getpid(), number)
            return original(gac, *arguments, **conditions)

        monkeypatch.setattr(GAC, "step", counted)

    yield arm
    monkeypatch.undo()


def outcome(folder: Path) -> tuple[dict[str, torch.Tensor], list[dict], dict[str, bytes]]:
    """Weights of both saved networks, the metrics but for the clock, and the pictures."""
    weights = {
        f"{role}.{name}": value
        for role in ("generator", "discriminator")
        for name, value in load_file(folder / role / "model.safetensors").items()
    }
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    pictures = {path.name: path.read_bytes() for path in (folder / "samples").iterdir()}
    return weights, [{k: v for k, v in record.items() if k != "seconds"} for record in records], pictures


def assert_same_run(a: Path, b: Path) -> None:
    (weights_a, records_a, pictures_a), (weights_b, records_b, pictures_b) = outcome(a), outcome(b)
    assert weights_a.keys() == weights_b.keys()
    assert [name for name, value in weights_a.items() if not torch.equal(value, weights_b[name])] == []
    assert records_a == records_b
    assert pictures_a == pictures_b


def checkpoints(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (folder / "checkpoints").iterdir())


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_the_run_that_was_not_interrupted(tmp_path, signal_at, kind):
    config = replace(RUN, **KINDS[kind])
    whole = train(replace(config, output_dir=str(tmp_path / "whole")))
    signal_at(signal.SIGTERM, 13 * config.accumulation)
    config = replace(config, output_dir=str(tmp_path / "parts"))
    first = train(config)
    assert (first.stopped, first.step) == (Stop.TERMINATED, 13)
    assert 13 in checkpoints(first.folder)
    second = train(replace(config, resume="auto"))
    assert (second.stopped, second.step) == (Stop.NO, 24)
    assert_same_run(whole.folder, second.folder)
    assert second.evaluation == whole.evaluation


def test_a_resumed_run_replaces_the_same_damaged_images(tmp_path, signal_at):
    """With labels, and whatever the number of workers."""
    pixels = np.random.default_rng(0).integers(0, 256, (150, 8, 8), dtype=np.uint8)
    rows = datasets.Dataset.from_dict(
        {
            "image": [None if row % 11 == 3 else Picture.fromarray(image) for row, image in enumerate(pixels)],
            "label": [row % 5 for row in range(150)],
        },
        datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=5)}),
    )
    rows.to_parquet(tmp_path / "set" / "data" / "train-00000-of-00001.parquet")
    config = replace(RUN, dataset=str(tmp_path / "set"), conditional=True, workers=1, max_unreadable=14)
    whole = train(replace(config, output_dir=str(tmp_path / "whole")))
    signal_at(signal.SIGTERM, 13)
    config = replace(config, workers=2, output_dir=str(tmp_path / "parts"))
    assert train(config).step == 13
    second = train(replace(config, max_unreadable=20, resume="auto"))
    assert_same_run(whole.folder, second.folder)
    with pytest.raises(UsageError, match=r"at least 14 rows of split 'train' cannot be read, and 13 may be so"):
        train(replace(config, max_unreadable=13, output_dir=str(tmp_path / "few")))


def test_a_run_killed_after_its_checkpoint_goes_on_from_it_as_well(tmp_path):
    """What the dead run wrote after its last checkpoint is taken back."""
    whole = train(replace(RUN, output_dir=str(tmp_path / "whole")))
    dead = tmp_path / "dead"
    shutil.copytree(whole.folder, dead)
    for step in checkpoints(dead):
        if step > 10:
            shutil.rmtree(dead / "checkpoints" / f"step-{step:07d}")
    (dead / "checkpoints" / ".step-0000015.new").mkdir()
    for part in ("generator", "discriminator"):
        shutil.rmtree(dead / part)
    train(replace(RUN, output_dir=str(dead), resume="auto"))
    assert_same_run(whole.folder, dead)
    assert checkpoints(dead) == [5, 10, 15, 20, 24]


def test_a_run_can_be_made_longer(tmp_path):
    """At constant rates; those that fall do so over the length of the run."""
    run = replace(RUN, log_every=8, lr_schedule="constant")
    whole = train(replace(run, output_dir=str(tmp_path / "whole")))
    short = replace(run, steps=16, output_dir=str(tmp_path / "short"), sample_every=8)
    train(short)
    train(replace(short, steps=24, sample_every=12, resume="auto"))
    weights, records, _ = outcome(tmp_path / "short")
    expected, expected_records, _ = outcome(whole.folder)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert records == expected_records


def test_a_checkpoint_can_be_the_start_of_another_run(tmp_path):
    """--resume with a folder: the old run stays as it is."""
    whole = train(replace(RUN, output_dir=str(tmp_path / "whole")))
    before = outcome(whole.folder)[1]
    other = replace(RUN, output_dir=str(tmp_path / "other"), resume=str(whole.folder / "checkpoints" / "step-0000010"))
    train(other)
    weights, records, _ = outcome(tmp_path / "other")
    assert all(torch.equal(weights[name], value) for name, value in outcome(whole.folder)[0].items())
    assert records == before
    assert checkpoints(whole.folder) == [5, 10, 15, 20, 24]


def test_resume_auto_starts_a_run_where_there_is_none(tmp_path):
    result = train(replace(RUN, steps=3, evaluation_samples=0, output_dir=str(tmp_path / "new"), resume="auto"))
    assert checkpoints(result.folder) == [3]


def test_another_setting_is_refused_and_nothing_changes(tmp_path):
    run = replace(RUN, steps=5, evaluation_samples=0, output_dir=str(tmp_path / "run"))
    train(run)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(UsageError, match=r"the run to resume has --lr-generator 0\.004 and not 0\.1; pass the same"):
        train(replace(run, lr_generator=0.1, steps=9, resume="auto"))
    with pytest.raises(UsageError, match=r"has --rule none and not pr\+"):
        train(replace(run, rule="pr+", steps=9, resume="auto"))
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_the_command_line_needs_no_setting_again(tmp_path, capsys):
    folder = str(tmp_path / "run")
    arguments = [
        "train",
        "--cpu",
        "--width",
        "16",
        "--loss",
        "hinge",
        "--evaluation-samples",
        "0",
        "--output-dir",
        folder,
    ]
    assert main([*arguments, "--steps", "4"]) == 0
    assert main(["train", "--resume", "auto", "--output-dir", folder, "--steps", "6"]) == 0
    assert "going on from" in capsys.readouterr().err
    settings = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (settings["loss"], settings["width"], settings["steps"]) == ("hinge", 16, 6)
    assert checkpoints(tmp_path / "run") == [4, 6]


def test_a_damaged_checkpoint_is_said_and_the_one_before_it_used(tmp_path, capsys):
    run = replace(RUN, output_dir=str(tmp_path / "run"))
    train(run)
    whole = outcome(tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / "step-0000024" / "generator.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    train(replace(run, resume="auto"))
    told = capsys.readouterr().err
    assert "step-0000024 is damaged: generator.safetensors" in told
    assert "step-0000020, step 20" in told
    assert all(torch.equal(value, outcome(tmp_path / "run")[0][name]) for name, value in whole[0].items())
    for step in (5, 10, 15, 20, 24):
        (tmp_path / "run" / "checkpoints" / f"step-{step:07d}" / "manifest.json").unlink()
    with pytest.raises(UsageError, match=r"no checkpoint in .* is intact; choose another --output-dir, or pass"):
        train(replace(run, resume="auto"))


def test_the_best_evaluated_checkpoint_is_kept_beside_the_newest(tmp_path):
    run = replace(RUN, steps=60, evaluate_every=6, keep_checkpoints=1, lr_schedule="constant", lr_generator=0.02)
    result = train(replace(run, output_dir=str(tmp_path / "run")))
    records = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    scores = {record["step"]: record["frechet"] for record in records if "frechet" in record}
    assert list(scores) == list(range(6, 61, 6))
    best = min(scores, key=scores.__getitem__)
    assert checkpoints(result.folder) == sorted({best, 60})
    facts = read_checkpoint(result.folder / "checkpoints" / f"step-{best:07d}").facts
    assert facts["best"] == {"step": best, "frechet": scores[best]}


def test_ctrl_c_saves_and_interrupts(tmp_path, signal_at, capsys):
    signal_at(signal.SIGINT, 7)
    run = replace(RUN, output_dir=str(tmp_path / "run"))
    with pytest.raises(KeyboardInterrupt):
        train(run)
    assert checkpoints(tmp_path / "run") == [5, 7]
    assert "gac: Ctrl-C: step 7 saved; go on with --resume auto --output-dir" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_the_exit_code_of_a_stopped_run(tmp_path, signal_at, number, code):
    signal_at(number, 3)
    arguments = ["train", "--cpu", "--width", "16", "--steps", "50", "--output-dir", str(tmp_path / "run")]
    assert main(arguments) == code
    assert checkpoints(tmp_path / "run") == [3]
    assert not (tmp_path / "run" / "generator").exists()


@pytest.mark.parametrize(
    "later",
    [("--workers", "2"), pytest.param(("--streaming", "--shuffle-buffer", "64"), marks=pytest.mark.slow)],
    ids=" ".join,
)
def test_in_two_processes_as_well(tmp_path, later):
    """Interrupted and resumed against the whole run; loader workers, unlike a stream, may come in later."""
    arguments = ["--cpu", "--width", "16", "--batch-size", "16", "--evaluation-samples", "0", "--log-every", "8"]
    arguments += ["--lr-schedule", "constant"]  # for a run that is made longer

    def launch(name: str, *more: str) -> Path:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        program = ["-m", "gac_plugin.train", *arguments, "--output-dir", str(tmp_path / name), *more]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        finished = subprocess.run(
            [*launcher, *program], capture_output=True, text=True, timeout=300, env=environment, check=False
        )
        assert finished.returncode == 0, finished.stderr[-2000:]
        return tmp_path / name

    whole = launch("whole", "--steps", "24", "--sample-every", "8", *later)
    launch("parts", "--steps", "16", "--sample-every", "8", *(() if "--workers" in later else later))
    parts = launch("parts", "--steps", "24", "--sample-every", "8", *later, "--resume", "auto")
    assert_same_run(whole, parts)
    assert read_checkpoint(parts / "checkpoints" / "step-0000024").facts["processes"] == 2
