"""Asking the Hub: what a repository's name looks like, and every failure of the client told in one line."""

import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from huggingface_hub import constants, get_token
from huggingface_hub.errors import (
    DisabledRepoError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars, logging
from huggingface_hub.utils import validate_repo_id as check_name

from gac_plugin.errors import UsageError

CONNECTION_ERRORS: tuple[type[BaseException], ...] = (OSError, *HfHubHTTPError.__bases__)
"""Its versions speak HTTP by different packages, whose errors share a base with the client's own."""
CLIENT_ERRORS: tuple[type[BaseException], ...] = (RuntimeError, ValueError, KeyError, *CONNECTION_ERRORS)
"""What the client raises."""
UNREADABLE = (json.JSONDecodeError, KeyError)
"""What the client raises over an answer that is not one of the Hub's, such as a proxy's page."""
WAITS = (1, 4, 15)
"""Seconds before each further try of what may be tried again."""
Result = TypeVar("Result")
TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")


def is_repo_id(name: str) -> bool:
    """Whether something can be the name of a repository, "user/name"."""
    try:
        check_name(name)
    except HFValidationError:
        return False
    return name.count("/") == 1


def require_repo_id(name: str) -> None:
    """Refuse what cannot be the name of a repository.

    Raises:
        UsageError: it is not of the form "user/name".
    """
    if not is_repo_id(name):
        raise UsageError(
            f"{name!r} is not the name of a repository; give USER/NAME, such as ada/digits, in letters, digits, "
            "-, _ and ."
        )


@contextmanager
def asking(repo_id: str, token: str | None = None, revision: str | None = None) -> Iterator[None]:
    """Calls of the Hub's client: a failure becomes one line, and where nobody looks on there are no progress bars.

    Args:
        repo_id: of the repository that the calls are about.
        token: the one that was given; no message holds it.
        revision: the one that was asked for.

    Raises:
        UsageError: something failed; the message says what, and how to mend it.
    """
    bars = not are_progress_bars_disabled() and not sys.stderr.isatty()
    bars = bars and "HF_HUB_DISABLE_PROGRESS_BARS" not in os.environ
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # the client's notes on each try; what came of them is in the message
    if bars:
        disable_progress_bars()
    try:
        yield
    except UsageError:
        raise
    except CLIENT_ERRORS as error:
        raise UsageError(_without_token(_told(error, repo_id, revision or "main"), token)) from error
    finally:
        logging.set_verbosity(level)
        if bars:
            enable_progress_bars()


def status_of(error: BaseException) -> int:
    """The HTTP status of an answer that the client took for an error, 0 where there was no answer."""
    return getattr(getattr(error, "response", None), "status_code", 0) or 0


def may_pass(error: BaseException | None) -> bool:
    """Whether trying again may help: the Hub is out of order, or the connection broke off."""
    if error is None or isinstance(error, UsageError | OfflineModeIsEnabled):
        return False
    if status := status_of(error):
        return status in (408, 500, 502, 503, 504)
    broken_off = isinstance(error, (*CONNECTION_ERRORS, *UNREADABLE))
    return (broken_off and not isinstance(error, FileNotFoundError | PermissionError)) or may_pass(error.__cause__)


def persistently(call: Callable[[], Result]) -> Result:
    """Try again, a few times, what failed for a reason that may pass. The call must be one that may be made twice."""
    for seconds in WAITS:
        try:
            return call()
        except Exception as error:
            if not may_pass(error):
                raise
        time.sleep(seconds)
    return call()


def _told(error: BaseException, repo_id: str, revision: str) -> str:
    """What to tell the user of a failure of the client."""
    cause = error.__cause__
    if isinstance(error, RuntimeError | LocalEntryNotFoundError) and isinstance(cause, CLIENT_ERRORS):
        return _told(cause, repo_id, revision)
    page = f"{constants.ENDPOINT}/{repo_id}"
    messages: dict[type[BaseException], str] = {
        OfflineModeIsEnabled: f"{repo_id!r} is not in the cache, and HF_HUB_OFFLINE forbids to ask the Hub; unset it",
        LocalEntryNotFoundError: f"{repo_id!r} is not in the cache, and the Hub does not answer; check the connection",
        GatedRepoError: f"the owner of {repo_id!r} lets in only those who asked; ask at {page}, then `hf auth login`",
        DisabledRepoError: f"the Hub has closed {repo_id!r}; {page} tells why",
        RevisionNotFoundError: f"{repo_id!r} has no revision {revision!r}; give one of its branches, tags or commits",
        RepositoryNotFoundError: (
            f"there is no {repo_id!r} on the Hub, or it is private; check the name, and log in with `hf auth login` or "
            "set HF_TOKEN to a token that may see it"
        ),
    }
    for kind, message in messages.items():
        if isinstance(error, kind):
            return message
    status = status_of(error)
    by_status = {
        401: "the Hub does not know the token, or wants one; log in again with `hf auth login`, or set HF_TOKEN",
        402: f"the Hub wants a subscription of the owner of {repo_id!r} for this",
        403: f"the token may not do this with {repo_id!r}; {constants.ENDPOINT}/settings/tokens shows its rights",
        412: f"somebody changed {repo_id!r} in the meantime, and nothing was sent; look at {page} and try again",
        413: f"the Hub says that a file for {repo_id!r} is too large",
        429: "the Hub has had too many requests from here; wait a few minutes and try again",
    }
    if status in by_status:
        return by_status[status]
    if status >= 500:
        return f"the Hub is out of order (status {status}); try again later, see https://status.huggingface.co"
    reason = " ".join(str(getattr(error, "server_message", None) or error).split()) or type(error).__name__
    if status:
        return f"the Hub refused {repo_id!r} (status {status}): {reason}"
    if isinstance(error, UNREADABLE):
        return "the Hub is out of order (its answer cannot be read); try again later, see https://status.huggingface.co"
    if isinstance(error, ValueError):
        return f"the Hub and {repo_id!r}: {reason}"
    if isinstance(error, OSError) and error.errno and not isinstance(error, ConnectionError):
        return (
            f"cannot keep the files of {repo_id!r} in {constants.HF_HUB_CACHE}: {error.strerror}; set HF_HOME elsewhere"
        )
    return f"the Hub cannot be reached, or the connection broke off ({reason}); check the connection and try again"


def _without_token(text: str, token: str | None) -> str:
    for secret in filter(None, (token, get_token())):
        text = text.replace(secret, "hf_***")
    return TOKEN.sub("hf_***", text)
