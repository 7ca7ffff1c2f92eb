"""One description of a run: defaults, presets, files and flags, and what is refused."""

import json
from dataclasses import fields, replace

import pytest

from gac_plugin.errors import UsageError
from gac_plugin.train import OneLineParser, add_arguments
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
        (
            {"lr_schedule": "cosin"},
            "--lr-schedule must be SHAPE or SHAPE:SHARE, constant, linear, cosine .* got 'cosin'",
        ),
        ({"ema_schedule": "linear:x"}, "--ema-schedule must be .* got 'linear:x'"),
        ({"penalty_schedule": "linear:-1"}, "--penalty-schedule must be .* got 'linear:-1'"),
        ({"max_norm": 0.0}, "--max-norm must be above 0, got 0.0"),
        ({"max_hours": float("nan")}, "--max-hours must be above 0, got nan"),
        ({"until": "fid=3", "evaluate_every": 5}, "--until must be FIGURE=NUMBER with one of frechet, .*; got 'fid=3'"),
        ({"until": "frechet", "evaluate_every": 5}, "--until must be .* got 'frechet'"),
        ({"until": "recall=.3", "evaluation_samples": 0}, "--until needs evaluations .* pass --evaluation-samples"),
        ({"resume": "auto"}, "--resume auto needs --output-dir"),
        ({"resume": "auto", "output_dir": "a", "overwrite": True}, "--resume goes on .* --overwrite replaces it"),
        ({"accumulation": 0}, "--accumulation must be at least 1"),
        ({"keep_checkpoints": 0}, "--keep-checkpoints must be at least 1"),
        ({"workers": -1}, "--workers must be at least 0"),
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


def test_yaml_json_flags_and_python_give_the_same_run(tmp_path):
    values = {"lr_generator": 2e-3, "mixed_precision": "no", "steps": 7, "cpu": True, "score": None, "until": None}
    yaml, as_json = tmp_path / "run.yaml", tmp_path / "run.json"
    # as people write it: no quotes, a number that YAML 1.1 takes for text, a precision that it takes for a boolean
    yaml.write_text("lr_generator: 2e-3\nmixed_precision: no\nsteps: 7\ncpu: true\nscore: null\nuntil: ~\n")
    as_json.write_text(json.dumps(values))
    parser = OneLineParser(prog="gac train")
    add_arguments(parser)
    flags = vars(parser.parse_args(["--lr-generator", "2e-3", "--mixed-precision", "no", "--steps", "7", "--cpu"]))
    flags = {name: value for name, value in flags.items() if name in {item.name for item in fields(Config)}}
    expected = Config(**values)
    assert make_config(file=yaml) == make_config(file=as_json) == make_config(flags) == expected
    assert expected.mixed_precision == "no"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "cannot read the settings"),
        ("- steps", "must hold settings, one NAME: VALUE a line, got a list"),
        ("stps: 3", "unknown setting 'stps'; did you mean 'steps'"),
        ("steps: 3.5", "steps must be of type int, got '3.5'"),
        ("cpu: maybe", "cpu must be of type bool, got 'maybe'"),
        ("steps: [1]", r"steps must be of type int, got \['1'\]"),
        ("x: !!python/object/apply:os.system [exit]", "unknown setting 'x'"),
    ],
)
def test_a_yaml_file_that_is_wrong_is_refused(tmp_path, text, message):
    file = tmp_path / "run.yml"
    file.write_text(text)
    with pytest.raises(UsageError, match=message):
        make_config(file=file)


def test_a_goal_is_looked_for_as_often_as_asked_or_with_checkpoints():
    goal = Config(until="frechet=20")
    assert goal.evaluation_interval == Config().checkpoint_every
    assert replace(goal, checkpoint_every=0).evaluation_interval == 1000
    assert replace(goal, evaluate_every=50).evaluation_interval == 50
    assert (Config().evaluation_interval, Config(evaluate_every=7, evaluation_samples=0).evaluation_interval) == (0, 0)


def test_a_run_is_gone_on_with_under_its_own_settings():
    begun = Config(lr_generator=1e-3, steps=10).to_json()
    assert make_config({"steps": 20}, earlier=begun) == Config(lr_generator=1e-3, steps=20)
    Config(lr_generator=1e-3, steps=99, workers=2, until=None).require_same_run(begun)
    with pytest.raises(UsageError, match=r"the run to resume has --lr-generator 0\.001 and not 0\.004; pass the same"):
        Config().require_same_run(begun)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"cannot read the settings in .*none\.json"):
        make_config(file=tmp_path / "none.json")


def test_an_unknown_preset_lists_the_known_ones():
    with pytest.raises(UsageError, match="unknown preset 'paper'; choose one of: default, article"):
        make_config(preset="paper")
