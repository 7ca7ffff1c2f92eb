"""What a run survives, for real and in numbers: the slow suite, `pytest -m slow`. Seeds and figures are printed."""

import json

import pytest

from benchmarks import reliability, reliability_runs

pytestmark = pytest.mark.slow
SEED, KILLS, CORRUPTIONS = 0, 200, 1000


def measured(section: str, capsys: pytest.CaptureFixture[str]) -> list[dict]:
    """The figures of a section's findings, none of which failed."""
    with capsys.disabled():
        print(f"\n{section}: seed {SEED}")  # noqa: T201
        findings = reliability.measure([section], KILLS, CORRUPTIONS, SEED)[section]
    assert [failure for finding in findings for failure in finding.failures] == []
    return [finding.figures for finding in findings]


def test_kills_at_random_moments_lose_nothing_that_was_saved(capsys):
    (figures,) = measured("kills", capsys)
    assert figures["kills"] == KILLS
    assert figures["steps lost"] == 0
    assert figures["resumes"] > KILLS // 4, "or the kills came before anything was resumed"
    assert figures["half_written"] > KILLS // 20, "or no save was hit"
    assert figures["ends"] > 0


def test_damage_is_detected_or_of_no_consequence(capsys):
    checkpoints, networks = measured("corruptions", capsys)
    assert checkpoints["detected"] + checkpoints["harmless"] == CORRUPTIONS
    assert checkpoints["detected"] > 0.8 * CORRUPTIONS
    assert networks["detected"] + networks["equal"] == CORRUPTIONS
    assert networks["detected"] > CORRUPTIONS / 2


def test_signals_save_and_the_run_goes_on(capsys):
    one, two = measured("signals", capsys)
    assert one == {"cases": 2 * reliability_runs.MOMENTS, "failed": 0}
    assert two["left"] == 0


def test_a_full_disk_is_told_and_harms_nothing(capsys):
    (figures,) = measured("disk-full", capsys)
    assert len(figures["limits"]) == reliability_runs.MOMENTS


def test_nothing_is_unpickled(capsys):
    (figures,) = measured("pickles", capsys)
    assert figures["planted"] > 30


def test_the_table_is_what_the_figures_say():
    report = json.loads((reliability.HERE / "results" / "reliability.json").read_text())
    assert (reliability.HERE / "RELIABILITY.md").read_text() == reliability.table(report)
    assert report["findings"].keys() == reliability.SECTIONS.keys()
    assert not [finding for findings in report["findings"].values() for finding in findings if finding["failures"]]
