"""Findings: every sign on made-up curves that must and must not show it, and two real runs, one well and one not."""

import json
import math

import pytest
from accelerate.state import AcceleratorState

from gac_plugin.errors import UsageError
from gac_plugin.losses import LOSSES
from gac_plugin.train import main
from gac_plugin.training.config import Config
from gac_plugin.training.health import ALIKE, BEATEN, blind_loss
from gac_plugin.training.judging.findings import SIGNS, findings, read_metrics

LINES = 40
WELL = {
    "loss_d": 1.2,
    "accuracy_real": 0.7,
    "accuracy_fake": 0.72,
    "norm_c": 0.3,
    "norm_g": 0.4,
    "update": 2e-3,
    "cosine": 0.1,
    "diversity": 0.9,
}


def run(**curves) -> list[dict]:
    """A healthy run of `LINES` lines but for some figures: a number, or a function of the share of the run gone by."""
    records = []
    for line in range(1, LINES + 1):
        at = {name: curve(line / LINES) if callable(curve) else curve for name, curve in curves.items()}
        records.append({"step": 100 * line, "seconds": line, **WELL, **{k: v for k, v in at.items() if v is not None}})
    return records


def late(well, sick):
    """A figure that turns at three quarters of the run."""
    return lambda gone: sick if gone > 0.75 else well


def every_quarter(*values):
    """An evaluation at the end of each quarter."""
    return lambda gone: dict(zip((0.25, 0.5, 0.75, 1.0), values, strict=True)).get(gone)


BLIND = 2 * math.log(2)
MUST = {
    "steps left out": [{"skipped": late(None, 3)}],
    "D wins": [
        {"accuracy_real": 0.99, "accuracy_fake": 0.995},
        {"loss_d": late(1.2, 0.04 * BLIND)},
        {"loss_d": 0.01, "accuracy_real": None},
    ],
    "G is saturated": [{"norm_g": late(0.4, 0.0)}, {"norm_g": 0.0, "update": 0.0}],
    "G has collapsed": [{"diversity": late(0.9, 0.05)}],
    "G narrows": [{"diversity": lambda gone: 1 - 0.6 * gone}],
    "D is blind": [{"accuracy_real": 0.5, "accuracy_fake": 0.51}],
    "directions oppose each other": [{"cosine": late(0.1, -0.5)}],
    "steps too long": [{"update": 0.3}],
    "G stands still": [{"update": 1e-7}],
    "covectors have faded": [{"norm_c": lambda gone: 0.3 * math.exp(-8 * gone)}],
    "D learns by heart": [{"d_gap": late(0.0, 1.1)}],
    "far from the data": [{"evaluation": {"frechet": 60.5, "floor": 6.0}}],
    "the best came earlier": [{"frechet": every_quarter(90.0, 40.0, 60.0, 80.0)}],
    "still improving": [{"frechet": every_quarter(90.0, 70.0, 60.0, 50.0)}],
}
MUST_NOT = {
    "steps left out": [{"skipped": None}],
    "D wins": [
        {"accuracy_real": 0.99, "accuracy_fake": 0.9},
        {"loss_d": late(0.01, 0.2)},
        {"loss_d": lambda gone: 0.01 if round(gone * LINES) % 3 == 0 else 1.2},  # now and then
    ],
    "G has collapsed": [{"diversity": late(0.05, 0.9)}, {"diversity": None}],
    "G narrows": [
        {"diversity": late(0.9, 0.8)},
        {"diversity": lambda gone: 1.5 if gone == 0.5 else 0.8},
        {"diversity": lambda gone: 2 - 1.1 * gone},  # noise at first, and the data's own variety in the end
    ],
    "D is blind": [{"accuracy_real": 0.5, "accuracy_fake": 0.7}],
    "G is saturated": [{"norm_g": late(0.0, 0.1)}, {"norm_g": 1e-3, "norm_c": 100.0}, {"norm_c": None}],
    "directions oppose each other": [{"cosine": late(-0.5, 0.1)}, {"cosine": -0.1}],
    "steps too long": [{"update": late(0.3, 0.1)}],
    "G stands still": [{"update": late(1e-3, 1e-7)}, {"update": 0.0, "norm_g": 0.0}],  # rates fall to 0; saturated
    "covectors have faded": [{"norm_c": lambda gone: 0.3 * math.exp(-3 * gone)}],
    "D learns by heart": [{"d_gap": late(1.1, 0.9)}, {"d_gap": None}],
    "far from the data": [
        {"evaluation": {"frechet": 59.5, "floor": 6.0}},
        {"evaluation": {"frechet": 60.5}},
        {"evaluation": {"frechet": 60.5, "floor": 0.0}},
        {"evaluation": {"frechet": "far", "floor": 6.0}},
    ],
    "the best came earlier": [{"frechet": every_quarter(90.0, 42.0, 55.0, 50.0)}, {"frechet": late(None, None)}],
    "still improving": [
        {"frechet": every_quarter(90.0, 70.0, 54.0, 50.0)},
        {"frechet": every_quarter(90.0, 40.0, 60.0, 50.0)},
        {"frechet": lambda gone: 50.0 if gone == 1 else None},
    ],
}


def told(evaluation=None, **curves):
    return findings(run(**curves), Config(), evaluation)


def cases(table):
    return [pytest.param(name, curves, id=f"{name} {n}") for name in table for n, curves in enumerate(table[name])]


def test_every_sign_has_cases():
    assert {sign.name for sign in SIGNS} == MUST.keys() == MUST_NOT.keys()


@pytest.mark.parametrize(("name", "curves"), cases(MUST))
def test_a_sign_that_is_there_is_told_and_no_other(name, curves):
    found = told(**curves)
    assert [finding.name for finding in found] == [name]
    assert "{" not in found[0].text


@pytest.mark.parametrize(("name", "curves"), cases(MUST_NOT))
def test_a_sign_that_is_not_there_is_not_told(name, curves):
    assert name not in [finding.name for finding in told(**curves)]


def test_a_healthy_run_has_nothing_unusual():
    assert [finding.name for finding in findings(run(), Config())] == ["nothing unusual"]


def test_a_gap_in_logits_that_have_no_scale_says_nothing():
    assert [finding.name for finding in findings(run(d_gap=5.0), Config(loss="wasserstein"))] == ["nothing unusual"]


def test_the_gravest_comes_first():
    found = findings(run(loss_d=0.01, cosine=-0.5, skipped=2), Config())
    assert [finding.name for finding in found] == ["steps left out", "D wins", "directions oppose each other"]


def test_a_mend_names_flags_that_exist():
    flags = {f"--{name.replace('_', '-')}" for name in Config.__dataclass_fields__}
    for sign in SIGNS:
        named = {word.strip(":,;()") for word in sign.text.split() if word.startswith(("--", "(--"))}
        assert named <= flags, sign.name


def test_the_evidence_stands_in_the_sentence():
    (found,) = findings(run(diversity=0.05), Config())
    assert found.text.startswith("G has collapsed: its samples are 5% as far apart as real ones")
    (found,) = findings(run(frechet=every_quarter(90.0, 40.0, 60.0, 80.0)), Config())
    assert "was 40 at step 2000 and is 80:" in found.text
    (found,) = findings(run(frechet=every_quarter(0.9, 0.041, 0.06, 0.08)), Config())
    assert "was 0.041 at step 2000 and is 0.08:" in found.text
    (found,) = findings(run(frechet=every_quarter(0.09, 0.07, 0.06, 0.05)), Config())
    assert "fell from 0.06 to 0.05 in" in found.text


def test_figures_that_are_missing_are_not_told():
    (found,) = findings(run(loss_d=0.01, accuracy_real=math.nan, accuracy_fake=math.nan), Config())
    assert found.text.startswith("D wins: its loss is 0.01: raise")
    (found,) = findings(run(loss_d=math.nan, accuracy_real=1.0, accuracy_fake=1.0), Config())
    assert found.text.startswith("D wins: it is right about 100% of the samples: raise")


def test_the_thresholds_of_the_alarms_count():
    assert findings(run(diversity=ALIKE * 0.99), Config())[0].name == "G has collapsed"
    assert findings(run(diversity=ALIKE * 1.01), Config())[0].name == "nothing unusual"  # it never was wider
    limit = BEATEN * blind_loss(LOSSES["hinge"])
    assert findings(run(loss_d=limit * 0.99), Config(loss="hinge"))[0].name == "D wins"
    assert findings(run(loss_d=limit * 1.01), Config(loss="hinge"))[0].name == "nothing unusual"
    assert findings(run(loss_d=-3.0), Config(loss="wasserstein"))[0].name == "nothing unusual"


def test_too_few_lines_and_old_ones_say_little():
    assert [finding.name for finding in findings(run()[:3], Config())] == ["too short"]
    assert [finding.name for finding in findings([], Config())] == ["too short"]
    old = [{"step": record["step"], "loss_d": record["loss_d"]} for record in run()]
    assert [finding.name for finding in findings(old, Config())] == ["nothing unusual"]
    lost = [{**record, "loss_d": None, "cosine": None} for record in run()]
    assert [finding.name for finding in findings(lost, Config())] == ["nothing unusual"]


def test_metrics_are_read_as_far_as_they_are_whole(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "loss_d": 2.0}\n{"step": 2}\n{"st')
    assert read_metrics(file) == [{"step": 1, "loss_d": 2.0}, {"step": 2}]
    for text in ('{"loss": 2}\n', "nonsense\n"):
        file.write_text(text)
        with pytest.raises(UsageError, match=r"metrics\.jsonl"):
            read_metrics(file)


@pytest.fixture
def _fresh_accelerate():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


QUICK = ["--cpu", "--evaluation-samples", "0", "--checkpoint-every", "0", "--log-every", "25", "--sample-every", "9999"]


@pytest.mark.usefixtures("_fresh_accelerate")
def test_a_real_run_that_is_well_and_one_in_which_d_wins(tmp_path, capsys):
    def said(name, *flags):
        assert main([*QUICK, *flags, "--output-dir", str(tmp_path / name)]) == 0
        return capsys.readouterr().out.partition("\nfindings\n")[2]

    assert said("well", "--steps", "600") == "  nothing unusual in the figures\n"
    sick = said("sick", "--steps", "300", "--lr-generator", "0", "--lr-discriminator", "0.02", "--r1", "0", "--r2", "0")
    assert sick.startswith("  D wins: it is right about 100% of the samples")
    record = json.loads((tmp_path / "well" / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"accuracy_real", "accuracy_fake", "norm_c", "norm_g", "update", "cosine", "diversity"} <= record.keys()
