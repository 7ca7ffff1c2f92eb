"""Goals, and signals that only leave word."""

import os
import signal
import threading

import pytest

from gac_plugin.errors import UsageError
from gac_plugin.training.stopping import Goal, Signals, Stop


@pytest.mark.parametrize(
    ("text", "reached", "missed"),
    [("frechet=20", [20, 3.5], [20.1]), ("precision=.8", [0.8, 1.0], [0.79]), ("recall=0.5", [0.5, 0.9], [0.0])],
)
def test_a_goal_is_reached_from_the_better_side(text, reached, missed):
    goal = Goal.parse(text)
    assert all(goal.is_met({goal.figure: value}) for value in reached)
    assert not any(goal.is_met({goal.figure: value}) for value in missed)


@pytest.mark.parametrize("text", ["", "frechet", "frechet=", "frechet=low", "frechet=nan", "fid=3", "20"])
def test_any_other_goal_is_refused(text):
    with pytest.raises(UsageError, match="--until must be FIGURE=NUMBER with one of frechet, precision, recall"):
        Goal.parse(text)


@pytest.mark.parametrize(("number", "stop"), [(signal.SIGTERM, Stop.TERMINATED), (signal.SIGINT, Stop.INTERRUPTED)])
def test_a_signal_leaves_word_and_the_handlers_come_back(number, stop):
    before = signal.getsignal(number)
    with Signals() as signals:
        assert signals.stop is Stop.NO
        os.kill(os.getpid(), number)
        assert signals.stop is stop
    assert signal.getsignal(number) is before


def test_a_second_interrupt_does_not_wait():
    with Signals():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_outside_the_main_thread_signals_are_left_alone():
    met = []

    def work() -> None:
        with Signals() as signals:
            met.append(signals.stop)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert met == [Stop.NO]


def test_of_several_reasons_the_strongest_counts():
    assert max(Stop.GOAL, Stop.INTERRUPTED, Stop.TIME) is Stop.INTERRUPTED
    assert max(Stop) is Stop.FAILED
