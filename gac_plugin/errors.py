"""Mistakes a user can mend, told in one line, and the look-up that turns a name into the thing it names."""

import sys
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import TypeVar

Thing = TypeVar("Thing")


class UsageError(ValueError):
    """A mistake in what the user gave: the message says what is wrong, with the value, and how to mend it.

    The command line prints it as one line and exits with code 2.
    """


class SaidElsewhereError(UsageError):
    """A mistake that another process of the same run tells: the command line is silent and exits with code 2."""


def resolve(thing: str | Thing, table: Mapping[str, Thing], kind: str) -> Thing:
    """Return `table[thing]` if `thing` is a name, and `thing` itself if it is the object already.

    Args:
        thing: a name in `table`, or an object of the kind that `table` holds.
        table: the known objects by name.
        kind: what the table holds, for the message ("loss", "metric").

    Raises:
        UsageError: the name is not in the table; the message lists the valid names.
    """
    if not isinstance(thing, str):
        return thing
    if thing in table:
        return table[thing]
    near = get_close_matches(thing, table, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise UsageError(f"unknown {kind} {thing!r}{hint}; choose one of: {', '.join(table)}")


def known_name(thing: str | Thing, table: Mapping[str, Thing]) -> str | Thing:
    """The name under which `thing` stands in `table`, so that it can be stored as text; `thing` itself otherwise."""
    return next((name for name, entry in table.items() if entry is thing), thing)


def exit_code(command: Callable[[], None]) -> int:
    """Run a command of the command line; a user's mistake becomes one line on standard error.

    Returns:
        0, or 2 after a `UsageError`, or 130 after Ctrl-C.
    """
    try:
        command()
    except SaidElsewhereError:
        return 2
    except UsageError as error:
        sys.stderr.write(f"gac: error: {' '.join(str(error).split())}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("gac: interrupted\n")
        return 130
    return 0
