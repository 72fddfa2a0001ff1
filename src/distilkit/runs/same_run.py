"""Whether a run that resumes has the settings of its checkpoint: which of them may change, and which may not."""

import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from importlib.metadata import version
from pathlib import Path, PurePath
from typing import Any

from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.utilities import rank_zero_only

from distilkit.errors import UserError

log = logging.getLogger(__name__)

_COMPARED = (
    "objective",
    "teacher",
    "student",
    "tokenizer",
    "data",
    "optimizer",
    "scheduler",
    "seed",
    "trainer",
    "budget",
)
# These change nothing that is trained: places, and what other keys repeat.
_LEFT_OUT: tuple[str, ...] = (
    "*cache_dir",
    "data.description",
    "data.num_workers",
    "data.seed",
    "tokenizer.corpus*",
    "student.num_blocks",
)
_LEFT_OUT += ("objective.implementation", "trainer.default_root_dir", "trainer.enable_*")
# These are applied. A teacher's weights and a corpus' tokens are compared by their content later.
_MAY_CHANGE: tuple[str, ...] = ("teacher.*", "student.name", "student.revision", "tokenizer.name", "tokenizer.revision")
_MAY_CHANGE += ("*.trust_remote_code", "data.micro_batch_size", "trainer.*", "budget")
_MAY_NOT = ("*_target_",)
_LENGTH = ("trainer.max_steps", "trainer.max_epochs", "budget")


def check(checkpoint: Mapping[str, Any], cfg: DictConfig, *, file: Path) -> None:
    """Refuse settings that differ from those of a checkpoint, all in one ``UserError``; log those that are applied.

    1. Numbers of the optimizer, the length of the training, the teacher's place, the micro-batch size and the trainer's
       options may differ. A schedule of the same name then runs over the new length.
    2. What decides the loss, the order of the data or the schedule may not, but for the keys in ``cfg.may_change``.
    3. Fewer steps than the checkpoint has done are refused.
    """
    applied, refused = _compare(checkpoint["distilkit"]["record"], cfg)
    done, most = checkpoint["global_step"], cfg.trainer.max_steps
    if 0 <= most < done:
        cure = f"set more, or export it: python -m distilkit.export ckpt={file} out=my-student"
        raise UserError(f"trainer.max_steps={most}, but {file} has done {done} steps; {cure}")
    if refused:
        cure = "resume with the same settings, or start again with student=hf student.name=<exported student>"
        some = ",".join(sorted({each.partition("=")[0].partition(".")[0] for each in refused}))
        cure += f"; may_change=[{some}] lets them change on purpose"
        raise UserError(f"{file} was trained with {'; '.join(refused)}: {cure}")
    if applied:
        longer = any(each.startswith(_LENGTH) for each in applied)
        over = f"; scheduler.name={cfg.scheduler.name} goes on over the new length" * longer
        rank_zero_only(log.info)("the checkpoint was trained with %s, which is applied%s", "; ".join(applied), over)


def differences(record: Mapping[str, Any], cfg: DictConfig) -> list[str]:
    """Return the settings of a run's ``record``, as a checkpoint holds it, that a resumed run may not change."""
    return _compare(record, cfg)[1]


def _compare(record: Mapping[str, Any], cfg: DictConfig) -> tuple[list[str], list[str]]:
    """Return the differences that are applied, and those that are refused, each as ``key=was, this run has now``."""
    if not record.get("config"):  # of a module that was built without one
        return [], []
    was, now = (dict(_leaves(each)) for each in (record["config"], OmegaConf.to_container(cfg, resolve=True)))
    choice = record.get("layer_choice")
    if choice and isinstance(now.get("student.layers"), str):  # the record has the layers that were measured
        was["student.layers"] = choice["method"]
    applied: list[str] = []
    refused: list[str] = []
    other: list[str] = []
    for key in sorted(was.keys() | now.keys(), key=lambda key: (not key.endswith("_target_"), key)):
        before, after = was.get(key), now.get(key)
        unknown = key not in was and record["version"] != version("distilkit")  # then its default is what was
        within = key.startswith(tuple(other)) or any(fnmatchcase(key, each) for each in _LEFT_OUT)
        if unknown or within or _same(before, after, key=key) or key.partition(".")[0] not in _COMPARED:
            continue
        if key.endswith("_target_"):  # its other keys are those of another class
            other.append(key.removesuffix("_target_"))
        line = f"{key}={_shown(before)}, this run has {_shown(after)}"
        (applied if on_purpose(key, cfg.may_change) or _may_change(key, before, after) else refused).append(line)
    return applied, refused


def _leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of a config by their dotted keys, as JSON has them; empty nodes have none."""
    if isinstance(node, Mapping):
        for name, value in node.items():
            yield from _leaves(value, f"{path}.{name}" if path else str(name))
    else:
        yield path, json.loads(json.dumps(node, default=str))


def _same(before: Any, after: Any, *, key: str) -> bool:
    """Return whether two values are equal; files of a corpus may have moved, and their tokens are compared later."""
    if key == "data.corpus.paths" and before and after:
        before, after = (
            [PurePath(each).name for each in ([value] if isinstance(value, str) else value)]
            for value in (before, after)
        )
    return bool(before == after)


def on_purpose(key: str, may_change: Iterable[str]) -> bool:
    """Return whether ``may_change`` names a key, or a node that it is in."""
    return any(f"{key}.".startswith(f"{each}.") for each in may_change)


def _may_change(key: str, before: Any, after: Any) -> bool:
    if key.startswith("optimizer."):  # flags are part of the optimizer's state
        return all(isinstance(each, int | float | list) and not isinstance(each, bool) for each in (before, after))
    if key.startswith("trainer.strategy"):  # a checkpoint is that of one process, whatever the strategy
        return True
    allowed, not_allowed = (any(fnmatchcase(key, each) for each in keys) for keys in (_MAY_CHANGE, _MAY_NOT))
    return allowed and not not_allowed


def _shown(value: Any) -> str:
    text = "null" if value is None else str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
