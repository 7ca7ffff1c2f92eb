"""The main job end to end, small: what a run leaves behind, that it repeats, and that it goes through Accelerate."""

import json
from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image as Picture

from gac_plugin.errors import UsageError
from gac_plugin.training import load_generator, train
from gac_plugin.training.checkpoint import newest_intact
from gac_plugin.training.config import Config, make_config
from gac_plugin.training.generate import generate

SMALL = {"steps": 25, "log_every": 10, "sample_every": 20, "evaluation_samples": 200, "width": 16, "batch_size": 32}


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    """Accelerate keeps one state for a process, and refuses another precision in it."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def run(reports, tmp_path_factory):
    return train(make_config({**SMALL, "output_dir": str(tmp_path_factory.mktemp("runs") / "run"), "cpu": True}))


def test_a_run_folder_holds_what_the_documentation_says(run):
    paths = [path.relative_to(run.folder) for path in run.folder.rglob("*") if path.is_file()]
    assert sorted({path.parts[1] for path in paths if path.parts[0] == "checkpoints"}) == ["step-0000025"]
    assert sorted(path.as_posix() for path in paths if path.parts[0] != "checkpoints") == [
        "config.json",
        "discriminator/config.json",
        "discriminator/model.safetensors",
        "environment.json",
        "evaluation.json",
        "generator/README.md",
        "generator/config.json",
        "generator/model.safetensors",
        "generator/samples.png",
        "maps/step-0000020.png",
        "maps/step-0000025.png",
        "metrics.jsonl",
        "report.html",
        "samples/step-0000020.png",
        "samples/step-0000025.png",
    ]


def test_metrics_are_written_at_the_first_every_tenth_and_the_last_step(run):
    records = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 10, 20, 25]
    names = {"step", "seconds", "loss_d", "loss_g", "d_real", "d_fake", "penalty", "norm_d", "norm_g", "diversity"}
    names |= {"accuracy_real", "accuracy_fake", "norm_c", "update", "d_gap"}
    assert [set(record) - names for record in records] == [set(), *[{"cosine"}] * 3]  # the first step follows none
    assert all(set(record) >= names for record in records)
    seconds = [record["seconds"] for record in records]
    assert seconds == sorted(seconds)


def test_a_run_s_own_config_describes_it(run):
    config = make_config(file=run.folder / "config.json")
    assert (config.steps, config.width, config.batch_size) == (25, 16, 32)


def test_the_saved_generator_is_the_trained_one(run):
    assert torch.equal(
        generate(load_generator(run.folder), run.recipe, 9, seed=4), generate(run.generator, run.recipe, 9, seed=4)
    )


def test_generation_repeats_for_a_seed_and_not_for_another(run):
    assert torch.equal(generate(run.generator, run.recipe, 5, seed=1), generate(run.generator, run.recipe, 5, seed=1))
    assert not torch.equal(
        generate(run.generator, run.recipe, 5, seed=1), generate(run.generator, run.recipe, 5, seed=2)
    )


def test_the_sample_picture_shows_the_fixed_latents(run):
    with Picture.open(run.folder / "samples" / "step-0000025.png") as picture:
        sheet = np.asarray(picture)
    first = generate(run.generator, run.recipe, 64, seed=0)[0, 0]
    tile = np.asarray(Picture.fromarray(first.numpy()).resize((48, 48), Picture.Resampling.BICUBIC))
    np.testing.assert_array_equal(sheet[4:52, 4:52], tile)


def test_a_run_repeats_bit_for_bit(run, tmp_path):
    again = train(make_config({**SMALL, "output_dir": str(tmp_path / "run"), "cpu": True}))
    a, b = run.generator.state_dict(), again.generator.state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert again.evaluation == run.evaluation


@pytest.mark.parametrize(
    "settings",
    [
        {"schedule": "fused"},
        {"rule": "pr+"},
        {"metric": "spectral", "lr_generator": 0.01},
        {"loss": "relativistic"},
        {"score": "logit"},
        {"optimizer": "adam", "ema": 0.0, "r1": 0.0, "r2": 0.0},
        {"lr_schedule": "cosine", "warmup": 3, "max_norm": 1.0},
        {"accumulation": 3},
        {"workers": 1},
        {"output": "sigmoid", "adapter": "dcgan", "depth": 2},
        {"mixed_precision": "bf16"},
    ],
    ids=lambda settings: ", ".join(map(str, settings.values())),
)
def test_every_kind_of_run_goes_through(tmp_path, settings):
    values = {**SMALL, "steps": 6, "evaluation_samples": 0, **settings}
    result = train(make_config({**values, "output_dir": str(tmp_path / "run"), "cpu": True}))
    assert result.evaluation is None
    last = json.loads((result.folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert ("beta" in last) == (settings.get("rule") == "pr+")


def test_whole_numbers_from_python_do_for_fractions(tmp_path):
    train(
        Config(beta1=0, ema=0, r1=0, steps=2, width=8, evaluation_samples=0, output_dir=str(tmp_path / "a"), cpu=True)
    )


def test_without_an_average_the_generator_itself_is_kept(tmp_path):
    values = {**SMALL, "steps": 3, "evaluation_samples": 0, "metric": "adam", "lr_generator": 2e-3, "cpu": True}
    plain = train(make_config({**values, "ema": 0.0, "output_dir": str(tmp_path / "a")})).generator
    averaged = train(make_config({**values, "ema": 0.9, "output_dir": str(tmp_path / "b")})).generator
    # the average after steps 1, 2, 3 is 0.81 theta_1 + 0.09 theta_2 + 0.1 theta_3: close to theta_3 but not it
    pairs = list(zip(plain.parameters(), averaged.parameters(), strict=True))
    assert all(not torch.equal(a, b) for a, b in pairs)
    assert all(torch.allclose(a, b, atol=0.02) for a, b in pairs)


def test_a_conditional_run_makes_the_class_that_is_asked_for(tmp_path):
    """Measured by a classifier of the data, which the networks never see; chance is a tenth."""
    config = Config(conditional=True, steps=300, evaluation_samples=1000, output_dir=str(tmp_path / "run"), cpu=True)
    evaluation = train(config).evaluation
    assert evaluation.recognised > 0.8
    assert evaluation.recognised_real > 0.9
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["recognised"] == evaluation.recognised


def test_class_labels_that_are_not_there_are_said(tmp_path):
    rows = datasets.Dataset.from_dict(
        {"image": [Picture.new("L", (8, 8), 9)] * 9}, features=datasets.Features({"image": datasets.Image()})
    )
    rows.to_parquet(tmp_path / "data" / "train.parquet")
    with pytest.raises(
        UsageError, match=r"--conditional needs a class label for every row, which data set .* does not have"
    ):
        train(Config(dataset=str(tmp_path / "data"), conditional=True, output_dir=str(tmp_path / "run"), cpu=True))


def test_float16_on_the_cpu_is_refused(tmp_path):
    """Accelerate takes it and trains in float32, which proves nothing."""
    config = Config(mixed_precision="fp16", cpu=True, steps=1, output_dir=str(tmp_path / "run"))
    with pytest.raises(UsageError, match="fp16 needs a GPU, and this run is on the CPU; pass bf16 or no"):
        train(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("max_skipped", [0, 3])
def test_divergence_is_said_and_the_run_kept(tmp_path, max_skipped):
    settings = {**SMALL, "loss": "wasserstein", "r1": 0.0, "r2": 0.0, "lr_generator": 1e9, "lr_discriminator": 1e9}
    settings |= {"steps": 50, "checkpoint_every": 1, "max_skipped": max_skipped, "log_every": 1}
    message = (
        r"not finite in 3 steps in a row, up to step \d+; the checkpoint of step \d+ is kept; lower --lr-generator"
    )
    with pytest.raises(
        UsageError, match=message if max_skipped else r"diverged: .* not finite at step \d+; lower --lr"
    ):
        train(make_config({**settings, "output_dir": str(tmp_path / "run"), "cpu": True}))
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert None in last.values() or last["skipped"] == 2
    kept = newest_intact(tmp_path / "run" / "checkpoints", print)
    if max_skipped:
        assert all(torch.isfinite(value).all() for value in kept.states["generator"].values())


def test_too_few_images_to_evaluate_against_are_said_before_training(tmp_path):
    pictures = [Picture.new("L", (8, 8), 10 * level) for level in range(5)]
    rows = datasets.Dataset.from_dict({"image": pictures}, features=datasets.Features({"image": datasets.Image()}))
    rows.to_parquet(tmp_path / "data" / "train.parquet")
    config = Config(dataset=str(tmp_path / "data"), output_dir=str(tmp_path / "run"), batch_size=5, steps=2, cpu=True)
    with pytest.raises(UsageError, match=r"5 samples in split 'train' are too few .* pass --evaluation-samples 0"):
        train(config)
    assert not (tmp_path / "run").exists()
    assert train(replace(config, evaluation_samples=0)).evaluation is None


def test_a_run_on_data_that_do_not_suit_leaves_no_folder(tmp_path):
    rows = datasets.Dataset.from_dict({"number": [1]})
    rows.to_parquet(tmp_path / "data" / "train.parquet")
    with pytest.raises(UsageError, match="holds nothing that an installed adapter reads"):
        train(Config(dataset=str(tmp_path / "data"), output_dir=str(tmp_path / "runs" / "one"), cpu=True))
    assert not (tmp_path / "runs").exists()
