"""What a run says while it trains: trackers, alarms, goals, limits."""

import json
from dataclasses import replace

import pytest
import torch
from accelerate.state import AcceleratorState
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gac_plugin import GAC
from gac_plugin.errors import UsageError
from gac_plugin.training import train
from gac_plugin.training.config import Config
from gac_plugin.training.journal import tracker_names
from gac_plugin.training.stopping import Stop

RUN = Config(steps=12, width=16, batch_size=32, log_every=4, evaluation_samples=0, checkpoint_every=0, cpu=True)


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def records(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_tracker_sees_the_metrics_and_the_settings(tmp_path):
    result = train(replace(RUN, tracker="tensorboard", rule="pr+", output_dir=str(tmp_path / "run")))
    events = EventAccumulator(str(tmp_path / "run" / "logs" / "gac"))
    events.Reload()
    written = records(result.folder)
    for name in ("loss_d", "loss_g", "d_real", "d_fake", "penalty", "beta", "diversity", "norm_g"):
        seen = {event.step: event.value for event in events.Scalars(name)}
        assert seen == pytest.approx({record["step"]: record[name] for record in written}, rel=1e-6)
    settings = next((tmp_path / "run" / "logs" / "gac").rglob("hparams.yml")).read_text()
    assert "rule: pr+" in settings


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tensorbord", r"unknown tracker 'tensorbord' \(did you mean 'tensorboard'\?\); choose one of: .*wandb"),
        (
            "tensorboard,clearml",
            "tracker 'clearml' is not installed; pip install clearml, or leave out --tracker clearml",
        ),
    ],
)
def test_a_tracker_that_is_missing_is_an_error_before_anything_is_written(tmp_path, name, message):
    with pytest.raises(UsageError, match=message):
        train(replace(RUN, tracker=name, output_dir=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_no_tracker_is_none():
    assert tracker_names(None) == tracker_names("") == []
    assert tracker_names(" tensorboard ,") == ["tensorboard"]


def test_a_run_stops_at_its_goal(tmp_path):
    def scores(result) -> dict[int, float]:
        return {record["step"]: record["frechet"] for record in records(result.folder) if "frechet" in record}

    run = replace(RUN, steps=120, evaluation_samples=100, evaluate_every=30, checkpoint_every=120)
    whole = scores(train(replace(run, output_dir=str(tmp_path / "whole"))))
    assert list(whole) == [30, 60, 90, 120]
    goal = whole[90]
    reached = next(step for step, score in whole.items() if score <= goal)
    result = train(replace(run, until=f"frechet={goal}", output_dir=str(tmp_path / "run")))
    assert (result.stopped, result.step) == (Stop.GOAL, reached)
    assert scores(result) == {step: score for step, score in whole.items() if step <= reached}
    assert result.evaluation.frechet == whole[reached]
    assert (result.folder / "checkpoints" / f"step-{reached:07d}").is_dir()
    assert (result.folder / "generator").is_dir()


def test_a_run_stops_when_its_time_is_up(tmp_path):
    result = train(
        replace(RUN, steps=10**6, max_hours=0.5 / 3600, output_dir=str(tmp_path / "run"), checkpoint_every=500)
    )
    assert result.stopped is Stop.TIME
    assert 0.5 <= result.seconds < 30
    assert (result.folder / "checkpoints" / f"step-{result.step:07d}").is_dir()
    assert (result.folder / "generator").is_dir()


def test_a_collapsed_generator_is_said(tmp_path, capsys):
    """A generator that is not trained and ends in zeros makes one picture."""
    result = train(replace(RUN, steps=16, lr_generator=0.0, width=1, output_dir=str(tmp_path / "run")))
    assert "gac: step 8: the generator has collapsed: its samples are" in capsys.readouterr().err
    assert [record.get("alarms", []) for record in records(result.folder)][:4] == [[], [], ["collapsed"], ["collapsed"]]


def test_an_overpowering_discriminator_is_said(tmp_path, capsys):
    run = replace(RUN, steps=200, lr_generator=0.0, lr_discriminator=0.02, r1=0.0, r2=0.0, log_every=20)
    result = train(replace(run, output_dir=str(tmp_path / "run")))
    assert "the discriminator overpowers the generator: its loss is" in capsys.readouterr().err
    assert "overpowering" in records(result.folder)[-1]["alarms"]


def test_a_healthy_run_raises_no_alarm(tmp_path, capsys):
    result = train(replace(RUN, steps=300, width=None, batch_size=64, output_dir=str(tmp_path / "run"), log_every=50))
    assert "collapsed" not in capsys.readouterr().err
    assert not any("alarms" in record for record in records(result.folder))
    assert records(result.folder)[-1]["diversity"] > 0.5


@pytest.mark.parametrize("accumulation", [1, 2])
def test_steps_that_are_not_finite_are_left_out_counted_and_written(tmp_path, monkeypatch, accumulation):
    original, calls = GAC.step, iter(range(10_000))

    def spoiled(gac, real, z):
        return original(gac, real * float("nan") if next(calls) // accumulation in (3, 5) else real, z)

    monkeypatch.setattr(GAC, "step", spoiled)
    result = train(replace(RUN, log_every=1, accumulation=accumulation, output_dir=str(tmp_path / "run")))
    assert [record.get("skipped", 0) for record in records(result.folder)] == [0, 0, 0, 1, 1, 2, 2, 2, 2, 2, 2, 2]
    assert all(torch.isfinite(value).all() for value in result.generator.state_dict().values())
