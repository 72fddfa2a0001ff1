"""Odd values for every key of a training: each is refused in one message, or trained with as it was given.

``make fuzz`` tries all pairs of a key and a value; the quick tests try a sample.
"""

import contextlib
import copy
import io
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from omegaconf import DictConfig, OmegaConf

import distilkit.train
from distilkit.cli import quiet, user_cause
from distilkit.runs.run_folder import release
from jobs import QUIET, SMALL
from tiny import make_documents

Config = Callable[[str], DictConfig]

NAN, INF, HUGE = math.nan, math.inf, 10**9
ODD = [NAN, INF, -1, 0, 1, 2.5, HUGE, -0.5, "text", "", [], [1], [None], [[0, NAN], [1, 1]], None, {}, {"a": 1}]
ODD += ["ü\0\U0001f600", "../../x", True, "1", "1e-3"]

NEW = "student=new", "student.config={hidden_size:32,num_hidden_layers:2,num_attention_heads:4,intermediate_size:64}"
VARIANTS: dict[str, tuple[str, ...]] = {
    "distilbert": (),
    "minilm": ("objective=minilm", *NEW),
    "documents": (
        *("teacher=none", "objective=mlm", *NEW, "tokenizer=wordpiece", "tokenizer.vocab_size=200", "logger=csv"),
        *("scheduler.name=wsd", "+scheduler.kwargs.decay_share=0.2", "data.packing=documents"),
        *("data.masking.whole_word=true", "data.masking.smoothing=0.7"),
    ),
}
ENDLESS = {  # they would train for ever, start processes without number, or take hours and all memory to build
    *(("trainer.max_steps", HUGE), ("trainer.max_steps", -1), ("trainer.devices", HUGE), ("trainer.devices", -1)),
    *(("trainer.num_nodes", HUGE), ("data.num_workers", HUGE), ("compile", True)),
    *((f"student.config.{name}", HUGE) for name in ("hidden_size", "num_hidden_layers", "intermediate_size")),
}
# What may differ in type from the default: by the documentation of the key, of torch or of Lightning.
ALSO = {
    "name": object,
    "budget": object,
    "data.corpus.paths": (str, list),
    "student.layers": (str, list),
    "trainer.devices": (str, list),
    "trainer.val_check_interval": object,  # callbacks.validation replaces it
    "trainer.precision": type(None),
    "trainer.max_epochs": type(None),
    "trainer.gradient_clip_val": type(None),
    "trainer.log_every_n_steps": type(None),
    "trainer.enable_model_summary": type(None),
    "trainer.enable_progress_bar": type(None),
    "trainer.default_root_dir": type(None),
    "trainer.fast_dev_run": int,
    "optimizer.fused": type(None),
    "objective.soft_targets": (int, float),
}
ALSO |= {f"objective.alpha_{name}": (float, list) for name in ("ce", "mlm", "clm", "cos", "mse", "rel")}
_PASSED_ON = "dirpath", "filename", "monitor", "mode", "auto_insert_metric_name", "enable_version_counter"  # untyped
ALSO |= {f"callbacks.{each}.{name}": object for each in ("checkpoint", "last") for name in _PASSED_ON}
ALSO |= {f"logger.csv.{name}": object for name in ("version", "name", "prefix")}
ALSO |= {f"callbacks.{name}": type(None) for name in ("checkpoint", "last", "signals", "validation", "forms")}


def leaves(node: DictConfig, path: str = "") -> Iterator[str]:
    """List the keys below a node that hold a value, dotted."""
    for name in map(str, node):
        if OmegaConf.is_interpolation(node, name) or not isinstance(node[name], DictConfig) or not node[name]:
            yield f"{path}{name}"
        else:
            yield from leaves(node[name], f"{path}{name}.")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, save_teacher: Callable[..., Path]) -> Config:
    """Compose a run of one step that succeeds, by the name of a variant."""
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "corpus.txt").write_text("\n\n".join(make_documents(60)), "utf-8")
    teacher = "teacher=hf", f"teacher.name={save_teacher('bert', num_layers=2)}"
    common = f"data.corpus.paths={folder / 'corpus.txt'}", f"cache_dir={folder / 'cache'}", "trainer.max_steps=1"
    composed: dict[str, DictConfig] = {}

    def get(variant: str) -> DictConfig:
        if variant not in composed:
            given = [*teacher, *SMALL, *QUIET, *common, "validate_first=false", *VARIANTS[variant]]
            given = [each for each in given if variant != "documents" or not each.startswith("teacher.name")]
            given = given[1:] if variant == "documents" else given
            with initialize_config_module("distilkit.conf.train", version_base="1.3"):
                composed[variant] = compose("train", given)
        return composed[variant]

    return get


def same_kind(key: str, default: Any, value: Any) -> bool:
    """Return whether a value is of the type of a default, or of another that is documented."""
    if default is None or isinstance(value, ALSO.get(key, ())):
        return True
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(value, bool) and isinstance(default, bool)
    if isinstance(default, float):
        return isinstance(value, int | float) and math.isfinite(value)
    if isinstance(default, DictConfig):
        return value is None or isinstance(value, dict)
    return isinstance(value, type(default)) or (OmegaConf.is_list(default) and isinstance(value, list))


def fault(cfg: DictConfig, key: str, value: Any, out: Path) -> str | None:
    """Train with one value changed, and return what is wrong with how that ended."""
    default = OmegaConf.select(cfg, key, throw_on_resolution_failure=False)
    cfg = copy.deepcopy(cfg)
    cfg.output_dir = str(out)
    try:
        OmegaConf.update(cfg, key, value, force_add=True)
        with quiet(), contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            nll = distilkit.train.run(distilkit.train.build(cfg))
    except Exception as error:
        if (cause := user_cause(error)) is None:
            return f"{type(error).__name__}: {str(error)[:200]}"
        if (out / "student").exists() or (out / "summary.json").exists():
            return f"a student is left after: {cause}"
        return None if len(str(cause)) > 20 else f"says nothing: {cause}"
    finally:
        release()
    if not math.isfinite(nll) or not (out / "student" / "model.safetensors").is_file():
        return f"ended without a student and scores: {nll}"
    return None if same_kind(key, default, value) else f"was taken in silence in place of {default!r}"


def pairs(cfg: DictConfig) -> list[tuple[str, Any]]:
    """List all pairs of a key and a value that are tried."""
    keys = [key for key in leaves(cfg) if key != "output_dir"]
    return [(key, value) for key in keys for value in ODD if not any(key == k and value is v for k, v in ENDLESS)]


def faults(cfg: DictConfig, tried: list[tuple[str, Any]], tmp_path: Path) -> str:
    """Try pairs, each in a folder of its own, and return a line for each that is wrong."""
    found = []
    for number, (key, value) in enumerate(tried):
        if wrong := fault(cfg, key, value, tmp_path / str(number)):
            found.append(f"{key}={value!r} {wrong}")
    return "\n".join(found)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a relative path among the values stay in a folder of the test, and undo what a run sets."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.setenv("PL_SEED_WORKERS", "1")


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_sample_of_odd_values_is_refused_or_used(variant: str, config: Config, tmp_path: Path) -> None:
    cfg = config(variant)
    assert faults(cfg, [("seed", 3)], tmp_path / "good") == ""
    assert faults(cfg, random.Random(0).sample(pairs(cfg), 25), tmp_path) == ""


GROUPS = ["callbacks", "data", "logger", "objective", "optimizer", "scheduler", "student", "teacher", "tokenizer"]
GROUPS += ["trainer", ""]


@pytest.mark.fuzz
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_odd_value_of_every_key_is_refused_or_used(
    variant: str, group: str, config: Config, tmp_path: Path
) -> None:
    cfg = config(variant)
    mine = [(key, value) for key, value in pairs(cfg) if (key.split(".")[0] if "." in key else "") == group]
    print(f"{len(mine)} cases")
    assert faults(cfg, mine, tmp_path) == ""


def test_there_are_more_than_a_thousand_cases(config: Config) -> None:
    assert sum(len(pairs(config(variant))) for variant in VARIANTS) > 1000
