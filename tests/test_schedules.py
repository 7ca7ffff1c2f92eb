"""How settings change over a run, against values worked out by hand."""

import pytest

from gac_plugin.errors import UsageError
from gac_plugin.training.schedules import Schedule


@pytest.mark.parametrize(
    ("text", "factors"),
    [
        ("constant", [1, 1, 1, 1, 1]),
        ("linear", [1, 0.75, 0.5, 0.25, 0]),
        ("linear:0.2", [1, 0.8, 0.6, 0.4, 0.2]),
        ("linear:3", [1, 1.5, 2, 2.5, 3]),
        ("cosine", [1, (2 + 2**0.5) / 4, 0.5, (2 - 2**0.5) / 4, 0]),
        ("cosine:0.5", [1, 0.5 + (2 + 2**0.5) / 8, 0.75, 0.5 + (2 - 2**0.5) / 8, 0.5]),
    ],
)
def test_a_schedule_runs_from_one_to_its_share(text, factors):
    schedule = Schedule.parse(text, "--lr-schedule")
    assert [schedule.factor(step, 5) for step in range(1, 6)] == pytest.approx(factors, abs=1e-12)
    assert schedule.factor(9, 5) == pytest.approx(factors[-1], abs=1e-12), "beyond the end it stays"


def test_a_run_of_one_step_starts_at_the_full_value():
    assert Schedule.parse("linear", "x").factor(1, 1) == 1


@pytest.mark.parametrize("text", ["", "square", "linear:", "linear:-1", "linear:nan", "cosine:inf", "cosine:0.1:2"])
def test_anything_else_is_refused(text):
    with pytest.raises(UsageError, match="--lr-schedule must be SHAPE or SHAPE:SHARE"):
        Schedule.parse(text, "--lr-schedule")
