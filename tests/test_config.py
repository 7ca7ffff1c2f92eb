"""One description of a run: defaults, presets, files and flags, and what is refused."""

import json
from dataclasses import fields

import pytest

from gac_plugin.errors import UsageError
from gac_plugin.training.config import PRESETS, Config, make_config


def test_flags_win_over_the_file_the_file_over_the_preset_the_preset_over_the_defaults(tmp_path):
    file = tmp_path / "settings.json"
    file.write_text(json.dumps({"width": 7, "depth": 3}))
    config = make_config({"depth": 4}, preset="article", file=file)
    assert (config.latent_size, config.width, config.depth) == (100, 7, 4)
    assert config.steps == Config().steps


def test_a_config_survives_json():
    config = make_config({"steps": 3, "lr_generator": 1e-3, "score": "logit"}, preset="article")
    assert make_config(json.loads(json.dumps(config.to_json()))) == config


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_valid(preset):
    assert isinstance(make_config(preset=preset), Config)


def test_every_setting_has_a_help_text():
    assert all(item.metadata["help"] for item in fields(Config))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"los": "bce"}, "unknown setting 'los'; did you mean 'loss'"),
        ({"loss": "bcee"}, r"unknown loss 'bcee' \(did you mean 'bce'\?\); choose one of: bce, minimax"),
        ({"rule": "pr"}, r"unknown rule 'pr'.*choose one of: none, fr, pr\+"),
        ({"metric": "diag"}, "unknown metric 'diag'"),
        ({"score": "x"}, "unknown score 'x'"),
        ({"schedule": "late"}, "unknown schedule 'late'.*fresh, fused"),
        ({"output": "relu"}, "unknown output 'relu'"),
        ({"optimizer": "sgd"}, "unknown optimizer 'sgd'"),
        ({"mixed_precision": "fp8"}, "unknown mixed precision 'fp8'"),
        ({"lr_generator": -1e-3}, r"--lr-generator must be at least 0 and below 2\^32, got -0\.001"),
        ({"lr_discriminator": float("nan")}, "--lr-discriminator must be .*, got nan"),
        ({"steps": 0}, "--steps must be at least 1 .*, got 0"),
        ({"batch_size": -3}, "--batch-size must be at least 1 .*, got -3"),
        ({"schedule": "fused", "mixed_precision": "fp16"}, "--schedule fused needs the range"),
        ({"optimizer": "adam", "rule": "pr+"}, r"--rule pr\+ needs --optimizer conjugate"),
        ({"dataset": ""}, "--dataset is empty"),
        ({"ema": 1.0}, "--ema must be below 1, got 1.0"),
        ({"seed": 2**32}, "--seed must be .* got 4294967296"),
        ({"evaluation_samples": 3}, "--evaluation-samples must be 0 or at least 8, got 3"),
        ({"steps": "many"}, "steps must be of type int, got 'many'"),
        ({"steps": True}, "steps must be of type int, got True"),
        ({"cpu": 1}, "cpu must be of type bool, got 1"),
        ({"dataset": None}, "dataset must be of type str, got None"),
    ],
)
def test_a_value_that_cannot_be_right_is_refused_with_the_mend(values, message):
    with pytest.raises(UsageError, match=message):
        make_config(values)


@pytest.mark.parametrize(("text", "message"), [("{", "cannot read the settings"), ("[1]", "must hold a JSON object")])
def test_a_file_that_holds_no_settings_is_refused(tmp_path, text, message):
    file = tmp_path / "settings.json"
    file.write_text(text)
    with pytest.raises(UsageError, match=message):
        make_config(file=file)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"cannot read the settings in .*none\.json"):
        make_config(file=tmp_path / "none.json")


def test_an_unknown_preset_lists_the_known_ones():
    with pytest.raises(UsageError, match="unknown preset 'paper'; choose one of: default, article"):
        make_config(preset="paper")
