"""The parts that all commands share: config checks, one-line errors, warnings and memory."""

import ctypes
import functools
import inspect
import io
import json
import logging
import os
import platform
import re
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from hydra.utils import get_object
from omegaconf import DictConfig, ListConfig, OmegaConf, flag_override

from distilkit.errors import UserError, ends_command
from distilkit.overrides import explain_keys as explain_keys  # which each command takes from here
from distilkit.overrides import near, unknown_key
from distilkit.runs import signals  # as a whole: a launcher's processes get a copy of what wrapped() names
from distilkit.runs.credentials import refuse_credentials
from distilkit.runs.run_folder import release
from distilkit.runs.signals import ENDING, Stopped, command_again, first_rank, listening
from distilkit.runs.storage import storage_fault, writing

log = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")

failures: list[str] = []  # a line for each failed job of the sweep that this process runs
notes: list[Path] = []  # the folder in which jobs that run in other processes leave theirs
_shown: set[str] = set()  # where the errors were raised whose traceback was logged


def user_cause(error: Exception) -> Exception | None:
    """Return the user error behind ``error``, or None if it may be a bug, which needs the traceback."""
    if unknown := unknown_key(error):
        return unknown
    if full := storage_fault(error, None, cure="write to another disk, and set TMPDIR to a folder on another one"):
        return full
    refused = type(error).__name__ == "MisconfigurationException"  # Lightning's, whose import takes seconds
    if not isinstance(error, InstantiationException):
        return error if isinstance(error, UserError) else UserError(f"Lightning refuses: {error}") if refused else None
    cause = error.__cause__
    if isinstance(cause, TypeError) and "argument" in str(cause):  # a key that the target does not take
        return error
    target = re.search(r"call to target '([\w.]+)'", str(error))
    refused = type(cause).__name__ == "MisconfigurationException" or isinstance(
        cause, ValueError | TypeError | RuntimeError
    )
    foreign = target and (not target[1].startswith("distilkit.") or "Misconfiguration" in type(cause).__name__)
    if refused and target and foreign and not isinstance(cause, UserError):
        key = str(error).rpartition("full_key: ")[2]
        who = "Lightning" if target[1].startswith("pytorch_lightning.") else target[1]
        cure = " Without a GPU, set trainer=cpu" if re.search("gpu|cuda", str(cause), re.IGNORECASE) else ""
        return UserError(f"{who} refuses the settings of {key}: {cause}{cure}")
    return cause if isinstance(cause, UserError) else None


def in_sweep() -> bool:
    """Return whether this is a job of a multirun."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def changes_of_sweep() -> dict[str, str]:
    """Return the overrides with which the command of this process goes on with its sweep, if it is one."""
    return {"hydra.sweep.dir": str(Path(HydraConfig.get().sweep.dir).resolve())} if in_sweep() else {}


def replace_unprintable() -> None:
    """Print a replacement for what the encoding of standard output lacks, where Python would raise an error."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def expand_home(node: DictConfig | ListConfig) -> None:
    """Expand a ``~`` at the start of every text of a config: any key may take a folder.

    Interpolations follow what they refer to, and ``cache_dir``'s default is expanded by each machine of a run.
    """
    for key in list(node) if isinstance(node, DictConfig) else range(len(node)):
        if OmegaConf.is_missing(node, key) or OmegaConf.is_interpolation(node, key):
            continue
        value = node[key]
        if isinstance(value, DictConfig | ListConfig):
            expand_home(value)
        elif isinstance(value, str) and (value == "~" or value.startswith("~/")):
            with flag_override(node, "readonly", False):
                node[key] = str(Path(value).expanduser())


def report_errors(entry: Callable[P, R]) -> Callable[P, R]:
    """Print a user error as one message and exit with status 1; ``HYDRA_FULL_ERROR=1`` keeps the traceback.

    Errors of a sweep's job are raised, for ``SweepFailures``.
    """

    @functools.wraps(entry)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        replace_unprintable()
        for given in args:
            if isinstance(given, DictConfig):
                expand_home(given)
        with listening(*ENDING):
            spec = getattr(entry, "__globals__", {}).get("__spec__")  # run by python -m, __module__ is __main__
            signals.inbox.command = [spec.name.removesuffix(".__main__") if spec else sys.argv[0], *sys.argv[1:]]
            try:
                return entry(*args, **kwargs)
            except Exception as error:
                cause = user_cause(error)
                if cause is None or in_sweep() or os.environ.get("HYDRA_FULL_ERROR") == "1":
                    raise
                print(f"error: {cause}", file=sys.stderr)
                sys.exit(1)
            except Stopped:
                if first_rank():
                    name, again = signal.Signals(signals.inbox.received).name, command_again(changes_of_sweep())
                    log.warning("%s ended the command, which starts again with: %s", name, again)
                raise
            finally:
                release()

    return wrapped


class ExpandHome(Callback):
    """Hydra callback: let ``~`` begin the folder of a run or a sweep, and say in one line if it cannot be written."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Expand hydra.run.dir."""
        self._expand(config, "run")

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Expand hydra.sweep.dir."""
        self._expand(config, "sweep")

    def _expand(self, config: DictConfig, kind: str) -> None:
        folder = str(config.hydra[kind].dir)
        if folder.startswith("~"):
            set_folder(config, kind, Path(folder).expanduser())
        made = Path(config.hydra[kind].dir)
        with ends_command(), writing(made, cure=f"set hydra.{kind}.dir to another folder"):  # before Hydra's traceback
            check_folder(folder, key=f"hydra.{kind}.dir")
            made.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=made) as file:  # Hydra's own files take no more
                file.write(bytes(2**16))


def set_folder(config: DictConfig, kind: str, folder: Path) -> None:
    """Set the folder of a ``run`` or a ``sweep``, also for the jobs of the sweep."""
    with flag_override(config, "readonly", False), flag_override(config.hydra, "readonly", False):
        config.hydra[kind].dir = str(folder)
        quoted = str(folder).replace("'", r"\'")
        config.hydra.overrides.hydra.append(f"hydra.{kind}.dir='{quoted}'")  # each job of a sweep reads these


def unresolved(overrides: Any) -> list[str]:
    """Return overrides with each ``${...}`` as it was given, which may have a value in its own job only."""
    given: Any = OmegaConf.to_container(overrides, resolve=False)
    return list(map(str, given))


def note_failure(what: str, error: Exception) -> str:
    """Add to ``failures`` and log why ``what`` failed; a fault of ours with its traceback, the first of its kind."""
    cause = user_cause(error)
    reason = " ".join(str(cause or f"{type(error).__name__}: {error}").split())
    failures.append(f"{what} failed: {reason}")
    raised_at = "".join(traceback.format_tb(error.__traceback__))
    bug = os.environ.get("HYDRA_FULL_ERROR") == "1" or (cause is None and raised_at not in _shown)
    _shown.add(raised_at)
    log.error("%s", failures[-1], exc_info=error if bug else None)
    return failures[-1]


def forget_failures(folder: Path) -> None:
    """Begin a sweep; its jobs in other processes will leave a file for each failure in ``folder``."""
    failures.clear()
    _shown.clear()
    notes[:] = [folder]


def all_failures() -> list[str]:
    """Return ``failures`` with those of jobs that ran in other processes first, in the order of the jobs."""
    files = sorted(file for folder in notes for file in folder.glob("*"))
    failures[:0] = [file.read_text("utf-8") for file in files]
    for folder in notes if files else ():
        shutil.rmtree(folder, ignore_errors=True)
    return failures


def check_names(names: Iterable[Any], known: Iterable[str], *, path: str) -> None:
    """Check that the keys of the config node at ``path`` are known."""
    for name in names:
        if name not in known:
            meant = near(f"{path}.{name}", (f"{path}.{each}" for each in known))
            raise UserError(f"{path}.{name} is unknown; {path} takes {', '.join(known)}{meant}")


_OF_HYDRA = {"_target_", "_args_", "_partial_", "_convert_", "_recursive_"}


def check_folder(value: Any, *, key: str) -> None:
    """Refuse an empty text, as of a variable that is not set, which would be the working folder."""
    if value == "":
        raise UserError(f"{key}='' would write into the working folder; name a folder, or write {key}=.")


def check_added(cfg: DictConfig, *, config: str, overrides: Iterable[str] | None = None) -> None:
    """Check that each top-level key that ``+key=value`` has added is known to a file below conf/, or read by another.

    A key or a password among the values is refused, too, and an empty text in place of a folder that is written to.
    ``overrides`` are those of Hydra's command line, if there is one, by default.
    """
    refuse_credentials(cfg)
    for place in ("cache_dir", "data.cache_dir", "tokenizer.cache_dir", "output_dir", "out"):
        check_folder(OmegaConf.select(cfg, place, throw_on_resolution_failure=False), key=place)
    if overrides is None:
        overrides = unresolved(HydraConfig.get().overrides.task) if HydraConfig.initialized() else ()
    own: Any = OmegaConf.create(resources.files("distilkit.conf").joinpath(config).read_text("utf-8"))
    groups = [name for entry in own.defaults if isinstance(entry, DictConfig) for name in map(str, entry)]
    known = [
        *(name for name in groups if " " not in name),
        *(name for name in own if name not in ("defaults", "hydra")),
    ]
    for override in overrides:
        key = re.match(r"\+{1,2}(\w+)(?=[.=])", override)
        if key and key[1] in cfg and key[1] not in known and f"${{{key[1]}" not in OmegaConf.to_yaml(cfg):
            raise UserError(f"{key[1]} is unknown, and no other key reads it; the config takes {', '.join(known)}")


def _parameters(target: Any) -> dict[str, inspect.Parameter] | None:
    """Return the parameters of a class or function; None of what is written in C, as datetime.timedelta."""
    try:
        try:
            return dict(inspect.signature(target, eval_str=True).parameters)
        except NameError:  # an annotation that only type checkers import
            return dict(inspect.signature(target).parameters)
    except (ValueError, TypeError):
        return None


def check_type(value: Any, annotation: Any, *, name: str) -> None:
    """Check that a value of a config is what its annotation says, and finite."""
    from pydantic import ConfigDict, TypeAdapter, ValidationError  # which takes 0.1 s

    if OmegaConf.is_config(value):
        value = OmegaConf.to_container(value, resolve=False)
    given = json.dumps(value, default=str)  # JSON has the types of YAML
    if "_target_" in given:  # an object of its own
        return
    try:
        adapter = TypeAdapter(annotation, config=ConfigDict(arbitrary_types_allowed=True, allow_inf_nan=False))
        adapter.validate_json(given, strict=True)
        return
    except ValidationError as error:
        kinds = {each["type"] for each in error.errors()}
    except Exception:  # a protocol, or a class that describes itself, of which this value is none
        kinds = {"object"} if inspect.isclass(annotation) else {"literal_error"}
    if not kinds & {"literal_error", "callable_type"}:  # a choice is left to the target
        wanted = re.sub(r"[\w.]+\.(?=\w)", "", inspect.formatannotation(annotation))
        wanted = wanted.replace("NoneType", "None").replace("Sequence[", "list[")
        finite = "; give a finite number" if "finite_number" in kinds else ""
        quoted = "; put a name of digits in quotes" if "string_type" in kinds and type(value) in (int, float) else ""
        raise UserError(f"{name}={value}, but it takes {wanted}{finite}{quoted}")


def check_keys(node: DictConfig, *, path: str = "") -> None:
    """Check that all values below ``node`` are set, and that each target accepts its keys and their types."""
    parameters: dict[str, inspect.Parameter] | None = None
    if "_target_" in node:
        try:
            target = get_object(node["_target_"])
        except (ImportError, AttributeError, ValueError) as error:  # no module, no text, an empty part
            raise UserError(f"{path}._target_={node['_target_']} cannot be imported: {error}") from error
        if not isinstance(node.get("_partial_", True), bool):
            raise UserError(f"{path}._partial_={node['_partial_']}, but it takes true or false")
        parameters = _parameters(target)
        if parameters is not None and all(parameter.kind != parameter.VAR_KEYWORD for parameter in parameters.values()):
            check_names(set(node) - _OF_HYDRA, parameters, path=path)
    keys: Iterable[Any] = node  # a key may be a number
    for name in keys:
        full_name = f"{path}.{name}".lstrip(".")
        if OmegaConf.is_missing(node, name):
            raise UserError(f"{full_name} is not set; add {full_name}=...")
        if OmegaConf.is_interpolation(node, name):
            continue
        if isinstance(node[name], DictConfig):
            check_keys(node[name], path=full_name)
        if isinstance(node[name], str) and "\0" in node[name]:
            raise UserError(f"{full_name}={node[name]!r} holds a null byte, which no file and no model takes; drop it")
        if parameters and name in parameters and (annotation := parameters[name].annotation) is not inspect._empty:
            check_type(node[name], annotation, name=full_name)


_EXPECTED_WARNINGS = (
    "Found .* module\\(s\\) in eval mode",  # the teacher
    "Experiment logs directory .* exists",  # the run's folder
    "Checkpoint directory .* exists",
    "The dirpath has changed",  # a resumed run has a new folder
    ".*LeafSpec",  # Lightning's use of torch
    ".*does not have many workers",  # batches come from a memory map
    ".*sync_dist=True",  # logged values are summed over ranks already
    "flex_attention called without torch.compile",  # checks of a few batches run without compiled code
)

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # <malloc.h>
_LARGEST_INT = 2**31 - 1  # mallopt takes an int


@contextmanager
def quiet() -> Iterator[None]:
    """Hide expected warnings, Lightning's tips and the loading bars of transformers."""
    from transformers.utils import logging as transformers_logging

    lightning = logging.getLogger("pytorch_lightning.utilities.rank_zero")
    level, bars = lightning.level, transformers_logging.is_progress_bar_enabled()
    with warnings.catch_warnings():
        for message in _EXPECTED_WARNINGS:
            warnings.filterwarnings("ignore", message=message)
        lightning.setLevel(logging.WARNING)
        transformers_logging.disable_progress_bar()
        try:
            yield
        finally:
            lightning.setLevel(level)
            if bars:
                transformers_logging.enable_progress_bar()


def quiet_downloads() -> None:
    """Print no loading bars and no line for each request, in a command whose output is JSON."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    for name in ("httpx", "httpx2"):  # of huggingface_hub, by version
        logging.getLogger(name).setLevel(logging.WARNING)


@contextmanager
def silenced() -> Iterator[None]:
    """Silence the warnings of other libraries, such as those on a new head or on missing torchvision."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def keep_large_buffers() -> bool:
    """Raise glibc's thresholds for returning memory, or return False with another C library.

    Vocabulary-wide tensors exceed the default thresholds, so that each step maps and unmaps hundreds of megabytes. With
    30,522 words on 2 cores, this took half of the time of a training step.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all(mallopt(name, _LARGEST_INT) == 1 for name in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD))


def set_matmul_precision(name: str) -> None:
    """Set the precision of float32 matrix products in torch: ``highest``, ``high`` or ``medium``."""
    import torch

    if name not in ("highest", "high", "medium"):
        raise UserError(f"matmul_precision={name}, but it takes highest, high or medium")
    torch.set_float32_matmul_precision(name)
