"""The error that reports a wrong input, and the end of a command by one."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """Report a wrong input; the message gives the value, the limit and the cure."""


@contextmanager
def ends_command() -> Iterator[None]:
    """End the command with the message of a ``UserError``: Hydra would turn an error of its callbacks into a warning."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from error
