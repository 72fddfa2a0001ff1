"""Keys of the command line: any argument of Lightning's Trainer, and what an unknown key may have meant."""

import contextlib
import functools
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from difflib import SequenceMatcher
from typing import Any, ParamSpec, TypeVar

import hydra._internal.utils as hydra_run
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import ConfigCompositionException
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError

from distilkit.errors import UserError

P = ParamSpec("P")
R = TypeVar("R")

_NEAR, _ELSEWHERE = 0.7, 0.1  # the least likeness, and what another group takes from it

# The first default of conf/*/trainer/auto.yaml: Hydra takes keys that are not in the file, and ``check_keys`` refuses
# those that the Trainer does not take.
ConfigStore.instance().store(
    group="trainer", name="_open", node=OmegaConf.create({}, flags={"struct": False}), provider="distilkit"
)


def near(key: str, known: Iterable[str]) -> str:
    """Return a question that names up to three known keys whose last part is spelt like that of ``key``, or nothing."""
    group, _, name = key.rpartition(".")

    def likeness(other: str) -> float:
        its_group, _, its_name = other.rpartition(".")
        return SequenceMatcher(None, name, its_name).ratio() - _ELSEWHERE * (group != its_group)

    found = sorted((-likeness(other), other) for other in set(known))
    names = [other for least, other in found if -least >= _NEAR][:3]
    return f"; did you mean {' or '.join(names)}?" if names else ""


def _keys(node: DictConfig, path: str = "") -> Iterator[str]:
    """Yield the dotted keys of a config."""
    for name in map(str, node):
        yield path + name
        child = node._get_node(name)
        if isinstance(child, DictConfig) and not child._is_none() and not child._is_missing():
            yield from _keys(child, f"{path}{name}.")


def unknown_key(error: BaseException) -> UserError | None:
    """Return what to say where Hydra found an override's key in no config, or None for another error."""
    cause: Any = error.__cause__
    composing = isinstance(error, ConfigCompositionException) and isinstance(
        cause, ConfigKeyError | ConfigAttributeError
    )
    if not composing or not cause.full_key or cause.parent_node is None:
        return None
    root: Any = cause.parent_node._get_root()
    known = [key for key in _keys(root) if key.split(".")[0] != "hydra"]
    if "trainer" in root and "_target_" in root.trainer:
        with contextlib.suppress(Exception):  # a class that cannot be imported is reported later
            known += [f"trainer.{name}" for name in inspect.signature(get_class(root.trainer._target_)).parameters]
    if GlobalHydra.instance().is_initialized():
        known += GlobalHydra.instance().config_loader().list_groups("")
    key = str(cause.full_key)
    hint = near(key, (each for each in known if each != key))
    return UserError(f"{key} is not in the config{hint or ';'} --help lists its keys, and +{key}=... adds one")


def explain_keys(main: Callable[P, R]) -> Callable[P, R]:
    """Say in one message which keys are near, where a command's override has an unknown one; exit with status 1."""

    @functools.wraps(main)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        report: Any = hydra_run.run_and_report  # it prints what Hydra raises, and exits

        def explain(func: Callable[[], Any]) -> Any:
            def run() -> Any:
                try:
                    return func()
                except ConfigCompositionException as error:
                    found = unknown_key(error)
                    if found is None or os.environ.get("HYDRA_FULL_ERROR") == "1":
                        raise
                    print(f"error: {found}", file=sys.stderr)
                    sys.exit(1)

            return report(run)

        hydra_run.run_and_report = explain
        try:
            return main(*args, **kwargs)
        finally:
            hydra_run.run_and_report = report

    return wrapped
