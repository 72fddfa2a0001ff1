"""Distil from Python in one call, on the same configs as ``python -m distilkit.train``."""

import contextlib
import io
import os
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.utils import instantiate
from hydra.version import VersionBase
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from distilkit.cli import check_added, expand_home, keep_large_buffers, quiet, replace_unprintable, user_cause
from distilkit.data.batches import DistillationDataModule
from distilkit.data.corpus import write_documents
from distilkit.errors import UserError
from distilkit.export.__main__ import export
from distilkit.language_model import Batch, lm_of_name
from distilkit.runs.run_folder import release
from distilkit.train import build, run
from distilkit.verdict import Verdict

Paths = str | Path | Sequence[str | Path]


@dataclass(frozen=True, kw_only=True)
class Distilled:
    """A distilled student: its Hugging Face folder, the folder of its run, and its held-out metrics.

    ``before`` and ``metrics`` are those before and after training: ``nll`` in nats per labelled token, ``accuracy``,
    the terms of the loss, and with a teacher ``teacher_nll``, ``agreement`` and so on. ``verdict.line`` sums them up; on
    other ranks than the first, ``verdict`` is None.
    """

    path: Path
    run: Path
    before: dict[str, float]
    metrics: dict[str, float]
    verdict: Verdict | None


def distill(
    teacher: str | Path | None,
    *,
    out: str | Path,
    text: Iterable[str] | None = None,
    paths: Paths | None = None,
    student: str = "half_depth",
    max_steps: int | None = None,
    budget: str | float | None = None,
    progress: bool = True,
    overrides: Sequence[str] = (),
) -> Distilled:
    """Distil a student from a teacher, and write it to ``out``/student.

    ``teacher`` is a hub id or a folder; None trains a student without one. The corpus is ``text``, the documents
    themselves, or ``paths``, files, folders and globs; without either it is the docstrings of installed packages.
    ``student`` is an option of conf/train/student, and ``overrides`` are those of the command line. Training ends after
    ``max_steps``, after a ``budget`` of time, ``40m`` or seconds, or without both after three epochs. ``out`` gets
    config.yaml, metrics.csv, checkpoints/, summary.json and student/. A wrong setting, a finished run in ``out`` and a
    loss that is not finite raise a ``UserError``. Ctrl-C raises ``KeyboardInterrupt`` after the step is saved;
    ``overrides=["ckpt_path=auto"]`` goes on.
    Example::

        result = distilkit.distill(
            "roberta-base", text=documents, out="runs/a", max_steps=500, overrides=["objective.temperature=4"]
        )
        model = AutoModelForMaskedLM.from_pretrained(result.path)
    """
    options = [] if progress else ["callbacks.progress=null"]
    given: dict[str, Any] = {"text": text, "paths": paths, "max_steps": max_steps, "budget": budget}
    with isolated(), quiet():
        cfg = composed(teacher, out=out, student=student, **given, overrides=overrides, options=options)
        job = build(cfg)
        try:
            run(job)
        except SystemExit as stop:  # which would end the caller's Python, too
            if stop.code != 128 + signal.SIGINT:
                raise
            raise KeyboardInterrupt from stop
    before, after = (
        {name.removeprefix("val/"): value for name, value in scores.items()}
        for scores in (job.module.before, job.module.after)
    )
    return Distilled(path=job.out / "student", run=job.out, before=before, metrics=after, verdict=job.module.verdict)


def composed(
    teacher: str | Path | None,
    *,
    out: str | Path,
    text: Iterable[str] | None,
    paths: Paths | None,
    student: str,
    max_steps: int | None,
    budget: str | float | None,
    overrides: Sequence[str],
    options: Sequence[str] = (),
    config: str = "train",
    caller: str = "distill",
    taken: Set[str] = frozenset(),
) -> DictConfig:
    """Compose the config of a command from the arguments of ``distill``, within ``isolated``.

    ``options`` are overrides that the ``caller`` adds, and ``taken`` the keys that it sets besides.
    """
    if text is not None and paths is not None:
        raise UserError("both text and paths are given; give one of them, or neither for the docstring corpus")
    for name, value in (("out", out), ("paths", paths)):
        if value in ("", Path()):
            raise UserError(f"{name}={str(value)!r} is the working folder; name a folder or file, or write it in full")
    taken = taken | {"teacher", "teacher.name", "student", "output_dir", "hydra.run.dir"}
    taken |= {"data", "data.corpus.paths"} if text is not None or paths is not None else set()
    taken |= set() if max_steps is None else {"trainer.max_steps"}
    taken |= set() if budget is None else {"budget"}
    _check_overrides(overrides, taken, caller=caller)
    groups = ["teacher=none" if teacher is None else "teacher=hf", f"student={student}"]
    groups += ["data=text"] if text is not None or paths is not None else []
    cfg = _compose([*groups, *options, *overrides], name=config)
    cfg.output_dir = _literal(Path(out).expanduser().resolve())
    if teacher is not None:
        cfg.teacher.name = _literal(teacher)
    if max_steps is not None:
        cfg.trainer.max_steps = max_steps
    if budget is not None:
        cfg.budget = budget
    if text is not None:
        cfg.data.corpus.paths, count = write_documents(text, Path(cfg.cache_dir).expanduser() / "texts")
        cfg.data.description = f"{count:,} documents given to distilkit.{caller}"
    elif paths is not None:
        several = [paths] if isinstance(paths, str | Path) else paths
        cfg.data.corpus.paths = [_literal(path) for path in several]
    expand_home(cfg)
    return cfg


def _check_overrides(overrides: Sequence[str], taken: Set[str], *, caller: str) -> None:
    """Refuse overrides that are no list, and those of keys that arguments of the ``caller`` have ``taken``."""
    if isinstance(overrides, str):
        raise UserError(f"overrides={overrides!r} is one string, but it takes a list; give [{overrides!r}]")
    if wrong := set(taken) & {str(override).lstrip("+~").partition("=")[0] for override in overrides}:
        raise UserError(f"overrides set {wrong.pop()}, which an argument of {caller} sets too; drop one of the two")


def export_student(
    ckpt: str | Path,
    out: str | Path,
    *,
    formats: Sequence[str] | None = None,
    texts: Sequence[str] | str | Path | None = None,
    push_to_hub: str | None = None,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Export a checkpoint as ``python -m distilkit.export`` does, and return what that prints.

    ``formats`` holds hf, onnx and onnx_int8, ``texts`` are sentences or a file of them, and ``overrides`` are those of
    the command line. The values of conf/train/export.yaml are taken for what is not given.
    Example::

        made = distilkit.export_student("runs/a/checkpoints/best.ckpt", "my-student", formats=["hf", "onnx"])
        made["onnx"]["difference"]
    """
    given = {"formats": formats, "texts": texts, "push_to_hub": push_to_hub}
    taken = {"ckpt", "out", *(name for name, value in given.items() if value is not None)}
    _check_overrides(overrides, taken, caller="export_student")
    if isinstance(formats, str):
        raise UserError(f"formats={formats!r} is one string, but it takes a list; give [{formats!r}]")
    with isolated(), quiet():
        cfg = _compose(list(overrides), name="export")
        cfg.ckpt, cfg.out = _literal(ckpt), _literal(out)
        if formats is not None:
            cfg.formats = list(formats)
        if texts is not None:
            cfg.texts = _literal(texts) if isinstance(texts, str | Path) else [_literal(text) for text in texts]
        if push_to_hub is not None:
            cfg.push_to_hub = push_to_hub
        expand_home(cfg)
        return export(cfg)


def replay(
    run: str | Path, *, epoch: int, step: int, rank: int = 0, world_size: int = 1, progress: float = 0.0
) -> list[Batch]:
    """Make the batch of an optimizer step of a run again, as micro-batches of one of ``world_size`` ranks.

    ``run`` is its folder. ``epoch`` and ``step``, both from 0, are those that a message about the batch names; by default
    one rank has the blocks of all. ``progress``, the share of the training before it, matters to a masking rate that
    changes alone. Nothing is written.
    """
    file = Path(run).expanduser() / "config.yaml"
    if not file.is_file():
        raise UserError(f"run={str(run)!r} has no config.yaml; give the folder of a run of distilkit.train")
    cfg: Any = OmegaConf.load(file)
    with isolated(), quiet():
        lm = next(
            (each for each in ("mlm", "clm") if each in instantiate(cfg.objective).weights), cfg.teacher.get("lm")
        )
        source = {name: cfg.teacher[name] for name in ("name", "revision", "trust_remote_code")}
        tokenizer = instantiate(cfg.tokenizer)
        data: DistillationDataModule = instantiate(cfg.data, tokenizer=tokenizer, lm=lm or lm_of_name(**source))
        return data.replay(epoch=epoch, step=step, rank=rank, world_size=world_size, progress=progress)


def _literal(path: str | Path) -> str:
    """Keep OmegaConf from reading ``${`` in a path as an interpolation."""
    return str(path).replace("${", "\\${")


def _compose(overrides: list[str], *, name: str = "train") -> DictConfig:
    with initialize_config_module("distilkit.conf.train", version_base="1.3"):
        cfg = compose(name, overrides)
    check_added(cfg, config=f"train/{'train' if name == 'plan' else name}.yaml", overrides=overrides)
    if "sweep" in {override.lstrip("+").partition("=")[0] for override in overrides}:
        raise UserError("sweep= needs python -m distilkit.train; from Python, call distill once for each run")
    return cfg


@contextlib.contextmanager
def isolated() -> Iterator[None]:
    """Set the caller's own Hydra aside, and turn the errors of Hydra that a user can fix into ``UserError``."""
    hydra, job, version = GlobalHydra.instance(), HydraConfig.instance(), VersionBase.instance()
    before = hydra.hydra, job.cfg, version.version_base
    precision, environment = torch.get_float32_matmul_precision(), dict(os.environ)
    keep_large_buffers()
    encoding_errors = getattr(sys.stdout, "errors", None)  # it may be None, or of a class of the caller
    replace_unprintable()
    hydra.hydra = job.cfg = None
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(str(user_cause(error) or error)) from error
    finally:
        release()
        GlobalHydra.set_instance(hydra)
        hydra.hydra, job.cfg, version.version_base = before
        torch.set_float32_matmul_precision(precision)
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors=encoding_errors)
        for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):  # Lightning's, which would seed the caller's next run
            os.environ.pop(name, None)
            os.environ.update({name: environment[name]} if name in environment else {})
