"""The rows of a split that cannot be read: left out and counted, up to a limit."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import islice

from tqdm.auto import tqdm

from gac_plugin.errors import UsageError


class UnreadableError(ValueError):
    """Why a cell cannot be read, in one line."""


@dataclass(frozen=True)
class Unreadable:
    """What was met in a split so far.

    Attributes:
        split: its name.
        rows: how many it has, 0 where that is not known.
        limit: how many of them may be unreadable.
        reasons: row number -> why it cannot be read, in the order in which they were met.
    """

    split: str = ""
    rows: int = 0
    limit: int = 0
    reasons: dict[int, str] = field(default_factory=dict)

    def add(self, reasons: Mapping[int, str]) -> None:
        """Count rows, each once however often it is met.

        Raises:
            UsageError: there are more than the limit by now, or no other rows.
        """
        self.reasons.update(reasons)
        if len(self.reasons) > self.limit:
            remedy = "or raise --max-unreadable" if self.limit else "or leave such rows out with --max-unreadable N"
            raise UsageError(
                f"at least {self._rows(len(self.reasons))} of split {self.split!r} cannot be read, and {self.limit} "
                f"may be so: {self._first(3)}; repair or remove what is damaged, {remedy}"
            )
        if self.rows and len(self.reasons) == self.rows:
            raise UsageError(
                f"no row of split {self.split!r} can be read: {self._first(3)}; repair them, or choose another --split "
                "or --column"
            )

    def anew(self) -> "Unreadable":
        """The same with nothing met."""
        return replace(self, reasons={})

    def tell(self, what: str) -> None:
        """Say how many of how many rows there are, what became of them, and the first reason; if there are any."""
        if self.reasons:
            met = f"{len(self.reasons)} of {self._rows(self.rows)}" if self.rows else self._rows(len(self.reasons))
            text = f"{met} of split {self.split!r} cannot be read and {what}"
            tqdm.write(f"gac: {text}; the first: {self._first(1)}", file=sys.stderr)

    def _first(self, count: int) -> str:
        return ", ".join(f"row {row} ({reason})" for row, reason in islice(self.reasons.items(), count))

    @staticmethod
    def _rows(count: int) -> str:
        return f"{count:,} row" + "s" * (count != 1)
