"""How the command lines report what a user can mend: one message, exit status 1, no traceback."""

import functools
import inspect
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any, ParamSpec, TypeVar

from hydra.errors import InstantiationException
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from distilkit.errors import UserError

P = ParamSpec("P")
R = TypeVar("R")


def user_cause(error: Exception) -> Exception | None:
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


def check_names(names: Iterable[Any], known: Iterable[str], *, path: str) -> None:
    """Make sure that the keys of the config node at ``path`` are known ones.

    Raises:
        UserError: one is not.
    """
    for name in names:
        if name not in known:
            raise UserError(f"{path}.{name} is unknown; {path} takes {', '.join(known)}")


def check_keys(node: DictConfig, *, path: str = "") -> None:
    """Make sure that nothing below ``node`` is left out, and that each target takes the keys it is given.

    Raises:
        UserError: a mandatory value is missing, a target cannot be imported, or a key is unknown to it.
    """
    if "_target_" in node:
        try:
            target = get_object(node["_target_"])
        except ImportError as error:
            raise UserError(f"{path}._target_: {error}") from error
        parameters = inspect.signature(target).parameters
        if all(parameter.kind != parameter.VAR_KEYWORD for parameter in parameters.values()):
            check_names(set(node) - {"_target_", "_partial_", "_convert_", "_recursive_"}, parameters, path=path)
    for name in map(str, node):
        full_name = f"{path}.{name}".lstrip(".")
        if OmegaConf.is_missing(node, name):
            raise UserError(f"{full_name} is not set; add {full_name}=...")
        if not OmegaConf.is_interpolation(node, name) and isinstance(node[name], DictConfig):
            check_keys(node[name], path=full_name)


def report_errors(entry: Callable[P, R]) -> Callable[P, R]:
    """Print a user error as one message and exit with status 1; ``HYDRA_FULL_ERROR=1`` keeps the traceback."""

    @functools.wraps(entry)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return entry(*args, **kwargs)
        except Exception as error:
            cause = user_cause(error)
            if cause is None or os.environ.get("HYDRA_FULL_ERROR") == "1":
                raise
            print(f"error: {cause}", file=sys.stderr)
            sys.exit(1)

    return wrapped
