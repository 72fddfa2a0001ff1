"""How the command lines report what a user can mend: one message, exit status 1, no traceback."""

import functools
import os
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from hydra.errors import InstantiationException

from distilkit.errors import UserError

P = ParamSpec("P")
R = TypeVar("R")


def _cause(error: Exception) -> Exception | None:
    """Return the user error behind ``error``, or None when the fault may be ours and the traceback is wanted."""
    if isinstance(error, UserError):
        return error
    if isinstance(error, InstantiationException):
        cause = error.__cause__
        if isinstance(cause, UserError):
            return cause
        if isinstance(cause, TypeError) and "argument" in str(cause):  # a key that the target does not take
            return error
    return None


def report_errors(entry: Callable[P, R]) -> Callable[P, R]:
    """Print a user error as one message and exit with status 1; ``HYDRA_FULL_ERROR=1`` keeps the traceback."""

    @functools.wraps(entry)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return entry(*args, **kwargs)
        except Exception as error:
            cause = _cause(error)
            if cause is None or os.environ.get("HYDRA_FULL_ERROR") == "1":
                raise
            print(f"error: {cause}", file=sys.stderr)
            sys.exit(1)

    return wrapped
