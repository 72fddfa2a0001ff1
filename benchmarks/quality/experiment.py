"""The settings, the rows and the folders of an experiment, and the overrides of its trainings."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from transformers import AutoConfig

from benchmarks.quality.runner import Command, Runner
from distilkit.errors import UserError
from distilkit.language_model import LM, lm_of
from distilkit.records import write_json

HERE = Path(__file__).parent
_UNITS = {"s": 1, "m": 60, "h": 3600}
# What may change from one call to the next.
_FREE = {"stage", "rows", "rows_file", "tasks", "similarity", "task_seeds", "data_dir", "curve", "curve_rows", "jobs"}
_FREE |= {"out", "threads", "extensions", "learning_rates", "speed_runs", "speed_steps"}
_KEYS = {"overrides", "train", "like", "best_of", "tune_only", "select", "tuned_as"}


@dataclass(frozen=True, kw_only=True)
class Row:
    """A student to be trained: overrides of ``distilkit.train``, and how its learning rate is found."""

    name: str
    overrides: tuple[str, ...] = ()
    train: bool = True
    like: str | None = None
    best_of: tuple[str, ...] = ()
    tune_only: bool = False
    select: str | None = None
    tuned_as: str | None = None


def merged(*parts: Sequence[str]) -> list[str]:
    """Join overrides, of which later ones replace earlier ones of the same key in their place."""
    found: dict[str, str] = {}
    for override in (each for part in parts for each in part):
        found[override.partition("=")[0].lstrip("+~")] = override
    return list(found.values())


def listed(values: Sequence[str]) -> str:
    """Write texts as a list of Hydra's."""
    return f"[{','.join(value if re.fullmatch(r'[-./A-Za-z0-9_*]+', value) else repr(value) for value in values)}]"


def seconds(text: str) -> float:
    """Read a time such as 90s, 40m or 1.5h."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", str(text))
    if not found or not float(found[1]):
        raise UserError(f"budget={text}, but it takes a time above zero, such as 90s, 40m or 3h")
    return float(found[1]) * _UNITS[found[2]]


def has_bf16_units(info: str) -> bool:
    """Return whether the text of /proc/cpuinfo names units for bfloat16."""
    return bool({"amx_bf16", "avx512_bf16"} & set(info.split()))


def read_settings(arguments: Sequence[str]) -> DictConfig:
    """Merge ``key=value`` arguments into settings.yaml; an unknown key raises a ``UserError``."""
    settings: Any = OmegaConf.load(HERE / "settings.yaml")
    OmegaConf.set_struct(settings, True)
    try:
        settings = OmegaConf.merge(settings, OmegaConf.from_dotlist(list(arguments)))
        missing = OmegaConf.is_missing(settings, "teacher")
    except (OmegaConfBaseException, ValueError) as error:
        raise UserError(f"{str(error).splitlines()[0]}; the keys are {', '.join(map(str, settings))}") from error
    if missing:
        raise UserError("teacher is not set: python -m benchmarks.quality teacher=<hub id or folder> 'text=[wiki.txt]'")
    if settings.clock not in ("wall", "cpu"):
        raise UserError(f"clock={settings.clock}, but it takes wall or cpu")
    seconds(settings.budget)
    for key in ("text", "stage"):
        if isinstance(settings[key], str):
            settings[key] = [settings[key]]
    for key in ("teacher", "out", "data_dir", "rows_file"):
        path = Path(str(settings[key])).expanduser()
        if settings[key] is not None and (key == "out" or path.exists()):
            settings[key] = str(path.resolve())
    settings.text = settings.text and [str(Path(path).expanduser().absolute()) for path in settings.text]
    if settings.precision is None:
        info = Path("/proc/cpuinfo")
        fast = settings.trainer != "cpu" or (info.is_file() and has_bf16_units(info.read_text("utf-8")))
        settings.precision = "bf16-mixed" if fast else "32-true"
    settings.threads = settings.threads or max(1, (os.cpu_count() or 1) // settings.jobs)
    return settings  # type: ignore[no-any-return]


def read_rows(table: Mapping[str, Any], chosen: Sequence[str] | None) -> dict[str, Row]:
    """Read the rows of one kind of model with those that they refer to; ``chosen`` None takes them all."""
    every = {}
    for name, given in table.items():
        if unknown := set(given) - _KEYS:
            raise UserError(f"row {name} has {', '.join(sorted(unknown))}; a row takes {', '.join(sorted(_KEYS))}")
        lists = {key: tuple(given[key]) for key in ("overrides", "best_of") if key in given}
        every[name] = Row(name=name, **{**given, **lists})
    wanted, found = list(every if chosen is None else chosen), {}
    while wanted:
        name = wanted.pop(0)
        if name not in every:
            raise UserError(f"row {name} is unknown; the rows are {', '.join(every)}")
        row = found[name] = every[name]
        # Those that a row refers to are read, too: candidates are tuned.
        wanted += [each for each in (*row.best_of, row.tuned_as) if each and each not in found]
    return {name: found[name] for name in every if name in found}


def check_unchanged(settings: DictConfig, file: Path) -> None:
    """Write the settings that decide results, or make sure that they are those of an earlier call."""
    # The steps of clock=cpu, timed on one machine, may be trained on another.
    free = _FREE | ({"trainer"} if settings.clock == "cpu" else set())
    own = {str(key): value for key, value in OmegaConf.to_container(settings).items() if key not in free}  # type: ignore[union-attr]
    if not file.is_file():
        write_json(file, own)
    before = json.loads(file.read_text("utf-8"))
    changed = [f"{key}={own[key]}, before {before.get(key)}" for key in own if own[key] != before.get(key)]
    if changed:
        raise UserError(f"{file.parent} holds results with other settings: {'; '.join(changed)}; choose another out")


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """The settings with their rows; ``every`` row of the file, by name, may be what another is like."""

    settings: DictConfig
    lm: LM
    rows: dict[str, Row]
    every: dict[str, Row]
    runner: Runner

    @property
    def out(self) -> Path:
        """The folder of all results."""
        return self.runner.out

    def read(self, name: str) -> dict[str, Any]:
        """Read a JSON file of ``out``, or nothing if there is none."""
        file = self.out / name
        return dict(json.loads(file.read_text("utf-8"))) if file.is_file() else {}

    def common(self) -> list[str]:
        """Return the overrides of all trainings and held-out scores."""
        own = self.settings
        text = ["data=text", f"data.corpus.paths={listed(own.text)}"] if own.text else []
        sizes = {"block_size": own.block_size, "global_batch_size": own.batch_size, "micro_batch_size": own.batch_size}
        sizes |= {"val_share": own.val_share, "max_val_blocks": own.val_blocks, "packing": own.packing}
        return merged(
            ["teacher=hf", f"teacher.name={own.teacher}", *text],
            [f"data.{key}={value}" for key, value in sizes.items()],
            [f"trainer={own.trainer}", f"trainer.precision={own.precision}", f"seed={own.seed}"],
            own.overrides,
        )

    def overrides(self, name: str) -> list[str]:
        """Return the overrides of a row alone, with those of the rows that it is like or the best of."""
        row = self.every[name]
        base = [row.like] if row.like else [self.read("tuning.json").get(name, {}).get("best")] if row.best_of else []
        if base == [None]:
            raise UserError(f"row {name} is the best of {', '.join(row.best_of)}, which are not tuned; add stage=tune")
        return merged(*(self.overrides(str(each)) for each in base), row.overrides)

    def training(self, name: str, folder: Path, overrides: Sequence[str], *, steps: int | None = None) -> Command:
        """Return the command of one training in ``folder``, with a limit of ``steps``, or else with its own budget."""
        limit = [] if steps is None else [f"trainer.max_steps={steps}"]
        quiet = ["validate_first=false", "callbacks.progress=null", "+trainer.enable_progress_bar=false"]
        # The end is scored anyway; before it, scores of a short run would take as long as its steps.
        seldom = ["callbacks.validation.optimizer_steps=500"]
        clock = ["+callbacks.clock._target_=benchmarks.quality.clock.Clock"]
        return Command(
            name=name.replace("/", "-"),
            module="distilkit.train",
            arguments=[
                f"name={name.partition('/')[2] or name}",
                *merged(self.common(), ["student=half_depth"], overrides, limit),
                *quiet,
                *seldom,
                *clock,
                f"hydra.run.dir={folder}",
            ],
            done=(folder / "summary.json").is_file,
            run=folder,
        )


def prepare(settings: DictConfig) -> Experiment:
    """Read the teacher's kind and the rows."""
    config = AutoConfig.from_pretrained(settings.teacher)
    lm = lm_of(config.model_type, config.architectures)
    table: Any = OmegaConf.to_container(OmegaConf.load(settings.rows_file or HERE / "rows.yaml"), resolve=True)
    out = Path(settings.out)
    out.mkdir(parents=True, exist_ok=True)
    check_unchanged(settings, out / "settings.json")
    runner = Runner(out=out, jobs=settings.jobs, threads=settings.threads)
    rows, every = read_rows(table[lm], settings.rows), read_rows(table[lm], None)
    return Experiment(settings=settings, lm=lm, rows=rows, every=every, runner=runner)
