"""Why a run ends before its last step: a goal is reached, time is up, or a signal asks for it."""

import signal
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from types import FrameType
from typing import Any

from gac_plugin.errors import UsageError

GOALS = {"frechet": -1, "precision": 1, "recall": 1}
"""Figures of an evaluation, with the direction in which each is better."""


class Stop(IntEnum):
    """Reasons to stop, the stronger one the greater, so that several processes agree on the greatest of theirs."""

    NO = 0
    GOAL = 1
    TIME = 2
    TERMINATED = 3
    INTERRUPTED = 4
    FAILED = 5


@dataclass(frozen=True)
class Goal:
    """A figure of merit to train for.

    Attributes:
        figure: a name in `GOALS`.
        value: what it must reach.
    """

    figure: str
    value: float

    @classmethod
    def parse(cls, text: str) -> "Goal":
        """A goal from "frechet=20".

        Raises:
            UsageError: the text is not FIGURE=NUMBER.
        """
        figure, _, number = text.partition("=")
        try:
            value = float(number)
        except ValueError:
            value = float("nan")
        if figure not in GOALS or value != value:
            raise UsageError(f"--until must be FIGURE=NUMBER with one of {', '.join(GOALS)}; got {text!r}")
        return cls(figure, value)

    def is_met(self, figures: Mapping[str, Any]) -> bool:
        """Whether an evaluation's figures reach the value."""
        return GOALS[self.figure] * (figures[self.figure] - self.value) >= 0


class Signals:
    """While open, SIGTERM and SIGINT (Ctrl-C) only leave word; a second SIGINT interrupts at once.

    Outside a program's main thread, where signals cannot be caught, it does nothing.

    Attributes:
        stop: what has been asked for.
    """

    def __init__(self) -> None:
        self.stop = Stop.NO
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.stop is Stop.INTERRUPTED:
            raise KeyboardInterrupt
        self.stop = Stop.INTERRUPTED if number == signal.SIGINT else Stop.TERMINATED
