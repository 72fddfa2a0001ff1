"""Every config composes and fits its target, the experiments hold the papers' numbers, and --help lists the options."""

import functools
import importlib
import inspect
import json
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import distilkit.conf.train
import pytest
import torch
import yaml
from hydra import compose, initialize_config_module
from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.callbacks import ProgressBar as LightningBar
from pytorch_lightning.loggers import Logger
from transformers import PreTrainedTokenizerBase

import distilkit
import distilkit.train
from distilkit.data.batches import DistillationDataModule
from distilkit.data.text_files import TextFiles
from distilkit.errors import UserError
from distilkit.objective import Objective
from distilkit.teacher import Teacher
from jobs import QUIET, SMALL, call, only
from tiny import build_teacher

CONF = Path(distilkit.conf.train.__file__).parent
OPTIONS = sorted(file.relative_to(CONF).with_suffix("").as_posix() for file in CONF.glob("*/**/*.yaml"))
FILLED = {  # what a user of the option has to fill in
    "data/hf": ["data.corpus.path=someone/something"],
    "data/text": ["data.corpus.paths=nothing.txt"],
    "student/hf": ["student.name=someone/something"],
    "student/layers": ["student.layers=[0,2,5]"],
    "teacher/hf": ["teacher.name=someone/something"],
    "trainer/multi_node": ["trainer.num_nodes=2"],
    "experiment/demo": ["stage=teacher"],
    "sweep/optuna": ["optuna.trial=0"],
    "experiment/demo_student": ["teacher.name=someone/something"],
}
GIVEN_BY_TRAIN = {"teacher", "tokenizer", "lm", "needs_head", "params", "callbacks", "logger"}


@pytest.fixture(autouse=True)
def forget_hydra() -> Iterator[None]:
    """Let no test see the config of the one before."""
    yield
    HydraConfig.instance().cfg = None


@functools.cache
def _composed(config_name: str, *overrides: str) -> DictConfig:
    with initialize_config_module(config_module="distilkit.conf.train", version_base="1.3"):
        return compose(config_name, ["output_dir=/nowhere", *overrides], return_hydra_config=True)


def composed(*overrides: str, config_name: str = "train") -> DictConfig:
    """Compose a config as the command line would, with a folder that nothing is written to."""
    cfg = _composed(config_name, *overrides).copy()
    HydraConfig.instance().set_config(cfg)
    return cfg


def with_option(option: str) -> DictConfig:
    """Compose train.yaml with one option, named as its file: ``objective/mlm``, ``sweep/ablation/no_ce``."""
    group, _, name = option.rpartition("/")
    chosen = [f"{group}={name}"] if "/" not in group else [f"+{group}={name}"]
    if group == "experiment/demo":
        chosen.append("experiment=demo")
    return composed(*chosen, *FILLED.get(option, ()))


def targets(node: Any, path: str = "") -> Iterator[tuple[str, DictConfig]]:
    """List all nodes below this one that name a target."""
    if isinstance(node, DictConfig):
        if "_target_" in node:
            yield path, node
        for name in map(str, node):
            if not OmegaConf.is_missing(node, name) and not OmegaConf.is_interpolation(node, name) and name != "hydra":
                yield from targets(node[name], f"{path}.{name}")
    elif isinstance(node, ListConfig):
        for index, child in enumerate(node):
            yield from targets(child, f"{path}[{index}]")


def flat(cfg: DictConfig) -> dict[str, Any]:
    """Flatten a job's config into dotted keys."""
    found: dict[str, Any] = {}

    def visit(value: Any, path: str) -> None:
        if isinstance(value, dict):
            for name, child in value.items():
                visit(child, f"{path}.{name}")
        else:
            found[path[1:]] = value

    visit({name: value for name, value in OmegaConf.to_container(cfg, resolve=False).items() if name != "hydra"}, "")
    return found


def changed(cfg: DictConfig, base: DictConfig) -> dict[str, Any]:
    """Return what differs from ``base``."""
    before, after = flat(base), flat(cfg)
    return {name: after.get(name) for name in before | after if before.get(name) != after.get(name)}


# ------------------------------------------------------------ each option of each group


def test_the_options_on_disk_are_found() -> None:
    assert {"objective/distilbert", "data/text", "experiment/demo/teacher", "sweep/ablation/no_ce"} <= set(OPTIONS)
    assert {option.split("/")[0] for option in OPTIONS} == {path.name for path in CONF.iterdir() if path.is_dir()} - {
        "__pycache__"
    }


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_composes_and_gives_its_targets_only_what_they_take(option: str) -> None:
    cfg = with_option(option)
    found = dict(targets(cfg))
    assert {".objective", ".data", ".data.masking", ".optimizer", ".teacher", ".student", ".trainer"} <= set(found)
    for path, node in found.items():
        parameters = inspect.signature(get_object(node["_target_"])).parameters
        keys = set(map(str, node)) - {"_target_", "_partial_"}
        if not any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters.values()):
            assert keys <= set(parameters), f"{path} of {option}"
        needed = {name for name, parameter in parameters.items() if parameter.default is parameter.empty}
        needed -= {name for name in needed if parameters[name].kind == inspect.Parameter.VAR_KEYWORD}
        if option != "data/base":  # which the other options complete with a corpus
            assert needed <= keys | GIVEN_BY_TRAIN, f"{path} of {option}"


@pytest.mark.parametrize("option", [option for option in OPTIONS if "???" in (CONF / f"{option}.yaml").read_text()])
def test_what_an_option_wants_from_the_user_has_no_value_of_its_own(option: str) -> None:
    """A merge keeps an older value where the newer file has ``???``, so that an inherited one would go unnoticed."""
    wanted = {name for name, value in flat(OmegaConf.load(CONF / f"{option}.yaml")).items() if value == "???"}
    group, name = option.split("/")
    cfg = composed(f"{group}={name}")
    parent = cfg if group in ("experiment", "sweep") else cfg[group]
    for dotted in wanted:
        *above, last = dotted.split(".")
        node = OmegaConf.select(parent, ".".join(above)) if above else parent
        assert OmegaConf.is_missing(node, last), f"{dotted} of {option}"


def example(option: str) -> list[str]:
    """Return the overrides that follow ``group=name`` in the comments of an option."""
    group, name = option.split("/")
    found = re.search(rf"# .*{group}={name} (.*=.*)\n", (CONF / f"{option}.yaml").read_text("utf-8"))
    return shlex.split(found[1]) if found else []


@pytest.mark.parametrize(
    "option",
    [option for option in OPTIONS if not option.startswith(("experiment/", "sweep/")) and example(option)],
)
def test_the_example_in_the_comment_of_an_option_composes(option: str) -> None:
    group, name = option.split("/")
    cfg = composed(f"{group}={name}", *example(option))
    for override in example(option):
        key, _, value = override.partition("=")
        chosen = OmegaConf.to_container(OmegaConf.create({"value": OmegaConf.select(cfg, key)}))
        assert chosen == {"value": yaml.safe_load(value)}


def test_examples_are_found_in_comments() -> None:
    assert example("data/text") == ["data.corpus.paths=[my_folder,more/*.jsonl.gz]"]
    assert example("student/hf") == ["student.name=distilbert/distilbert-base-uncased"]


# -------------------------------------------------------------- what each option builds


@dataclass(frozen=True, kw_only=True)
class Given:
    """What an option is built on: a folder, a text, a tokenizer and tiny teachers."""

    folder: Path
    text_file: Path
    tokenizer: PreTrainedTokenizerBase
    save_teacher: Callable[..., Path]


@pytest.fixture
def given(
    tmp_path: Path, text_file: Path, tokenizer: PreTrainedTokenizerBase, save_teacher: Callable[..., Path]
) -> Given:
    return Given(folder=tmp_path, text_file=text_file, tokenizer=tokenizer, save_teacher=save_teacher)


def build_objective(cfg: DictConfig, given: Given) -> Any:
    objective = instantiate(cfg.objective)
    assert isinstance(objective, Objective)
    return objective.weights


def build_optimizer(cfg: DictConfig, given: Given) -> Any:
    optimizer = instantiate(cfg.optimizer)([{"params": [torch.nn.Parameter(torch.zeros(2))]}])
    assert isinstance(optimizer, torch.optim.Optimizer)
    return type(optimizer).__name__, optimizer.param_groups[0]["lr"]


def build_trainer(cfg: DictConfig, given: Given) -> Any:
    here = {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "strategy": "auto", "precision": "32-true"}
    trainer = instantiate(cfg.trainer, **here)
    assert isinstance(trainer, Trainer)
    assert trainer.gradient_clip_val == 5.0
    assert trainer.check_val_every_n_epoch is None  # callbacks.validation needs it
    strategy = cfg.trainer.strategy
    return cfg.trainer.accelerator, cfg.trainer.devices, strategy if isinstance(strategy, str) else strategy._target_


def build_loggers(cfg: DictConfig, given: Given) -> Any:
    loggers = instantiate(cfg.logger).values()
    assert all(isinstance(logger, Logger) for logger in loggers)
    return [type(logger).__name__ for logger in loggers]


def build_callbacks(cfg: DictConfig, given: Given) -> Any:
    callbacks = instantiate(cfg.callbacks).values()
    assert all(isinstance(callback, Callback) for callback in callbacks)
    return [type(callback).__name__ for callback in callbacks]


def build_data(cfg: DictConfig, given: Given) -> Any:
    corpus = {}
    if "corpus" not in cfg.data:  # data/base, which the other options complete
        corpus = {"corpus": TextFiles(paths=str(given.text_file))}
    elif "paths" in cfg.data.corpus:
        cfg.data.corpus.paths = str(given.text_file)
    data = instantiate(cfg.data, tokenizer=given.tokenizer, lm="mlm", **corpus)
    assert isinstance(data, DistillationDataModule)
    assert data.corpus.fingerprint()
    assert list(given.folder.iterdir()) == []  # nothing is read or written yet
    assert "${" not in str(cfg.data.get("description", ""))
    return type(data.corpus).__name__


def build_tokenizer(cfg: DictConfig, given: Given) -> Any:
    cfg.teacher.name = str(given.save_teacher("bert"))
    cfg.data.corpus = {"_target_": "distilkit.data.text_files.TextFiles", "paths": str(given.text_file)}
    if "vocab_size" in cfg.tokenizer:
        cfg.tokenizer.vocab_size = 120 if "coverage" in cfg.tokenizer else 300
    built = instantiate(cfg.tokenizer)
    assert 100 < len(built) <= 300
    return built.mask_token


def build_a_teacher(cfg: DictConfig, given: Given) -> Any:
    if cfg.teacher.name is None:
        return instantiate(cfg.teacher, needs_head=False)
    if f"teacher.name={cfg.teacher.name}" not in FILLED["teacher/hf"]:
        assert cfg.teacher.lm is None
        return cfg.teacher.name
    cfg.teacher.name = str(given.save_teacher("bert"))
    return type(instantiate(cfg.teacher, needs_head=True))


def build_student(cfg: DictConfig, given: Given) -> Any:
    if "name" in cfg.student:
        cfg.student.name = str(given.save_teacher("distilbert"))
    if "model_type" in cfg.student:
        cfg.student.config = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    student = instantiate(cfg.student)(teacher=build_teacher("bert", num_layers=12), tokenizer=given.tokenizer)
    assert student.training
    return type(student).__name__, student.config.distilkit_layers


BUILDERS: dict[str, Callable[[DictConfig, Given], Any]] = {
    "callbacks": build_callbacks,
    "data": build_data,
    "logger": build_loggers,
    "objective": build_objective,
    "optimizer": build_optimizer,
    "student": build_student,
    "teacher": build_a_teacher,
    "tokenizer": build_tokenizer,
    "trainer": build_trainer,
}
BUILT: dict[str, Any] = {
    "callbacks/default": [
        *("Checkpoints", "Throughput", "GradientNorms", "StopOnSignal", "ValidateEvery"),
        *("CompareForms", "Predictions", "ProgressBar"),
    ],
    "data/base": "TextFiles",
    "data/docstrings": "Docstrings",
    "data/hf": "HubDataset",
    "data/openwebtext": "HubDataset",
    "data/text": "TextFiles",
    "data/wikipedia_bookcorpus": "Concatenation",
    "data/wikipedia_multilingual": "MultilingualWikipedia",
    "data/wikitext103": "HubDataset",
    "logger/csv": ["CSVLogger"],
    "logger/none": [],
    "logger/tensorboard": ["CSVLogger", "TensorBoardLogger"],
    "logger/trackio": ["CSVLogger", "TrackioLogger"],
    "logger/wandb": ["CSVLogger", "WandbLogger"],
    "objective/clm": {"clm": 1.0},
    "objective/distilbert": {"ce": 5.0, "mlm": 2.0, "cos": 1.0},
    "objective/distilgpt2": {"ce": 5.0, "clm": 2.0, "cos": 1.0},
    "objective/minilm": {"rel": 1.0},
    "objective/mlm": {"mlm": 1.0},
    "optimizer/adamw": ("AdamW", 5e-4),
    "student/half_depth": ("DistilBertForMaskedLM", [0, 2, 4, 7, 9, 11]),
    "student/hf": ("DistilBertForMaskedLM", None),
    "student/layers": ("DistilBertForMaskedLM", [0, 2, 5]),
    "student/new": ("BertForMaskedLM", None),
    "student/scratch": ("DistilBertForMaskedLM", None),
    "student/third_depth": ("DistilBertForMaskedLM", [0, 4, 7, 11]),
    "teacher/bert-base-cased": "google-bert/bert-base-cased",
    "teacher/bert-base-multilingual-cased": "google-bert/bert-base-multilingual-cased",
    "teacher/bert-base-uncased": "google-bert/bert-base-uncased",
    "teacher/distilbert-base-uncased": "distilbert/distilbert-base-uncased",
    "teacher/gpt2": "openai-community/gpt2",
    "teacher/hf": Teacher,
    "teacher/none": None,
    "teacher/roberta-base": "FacebookAI/roberta-base",
    "teacher/xlm-roberta-base": "FacebookAI/xlm-roberta-base",
    "tokenizer/bpe": "<mask>",
    "tokenizer/pretrained": "[MASK]",
    "tokenizer/trimmed": "[MASK]",
    "tokenizer/wordpiece": "[MASK]",
    "trainer/auto": ("auto", 1, "auto"),
    "trainer/cpu": ("cpu", 1, "auto"),
    "trainer/ddp": ("gpu", -1, "ddp"),
    "trainer/fsdp": ("gpu", -1, "distilkit.sharding.FullyShardedStrategy"),
    "trainer/gpu": ("gpu", 1, "auto"),
    "trainer/multi_node": ("gpu", -1, "ddp"),
}


@pytest.mark.parametrize("option", [option for option in OPTIONS if not option.startswith(("experiment/", "sweep/"))])
def test_every_option_builds(option: str, given: Given) -> None:
    cfg = with_option(option)
    cfg.output_dir = cfg.cache_dir = str(given.folder)
    assert BUILDERS[option.partition("/")[0]](cfg, given) == BUILT[option]


# --------------------------------------------------------------------------------- --help


def help_of(command: str, tmp_path: Path) -> str:
    """Return what ``python -m distilkit.<command> --help`` prints."""
    module = f"distilkit.{command}.__main__" if command in ("export", "trim") else f"distilkit.{command}"
    done = call(importlib.import_module(module).main, "--help", cwd=tmp_path)
    assert done.code == 0, done.err
    return done.out


def groups_of(text: str) -> dict[str, set[str]]:
    """Return the groups of a help text and their options, without the text in parentheses."""
    section = re.search(r"== Groups.*?==\n(.*?)\n\n==", text, re.DOTALL)
    groups: dict[str, set[str]] = {}
    for line in section[1].splitlines() if section else []:
        if line[0] != " ":
            name = line.split()[0]
            groups[name] = set()
        items = re.sub(r"\(.*?\)", "", line.removeprefix(name)).split(",")
        groups[name] |= {item.strip() for item in items if re.fullmatch(r"[\w-]+", item.strip())}
    return groups


def options_of(group: str) -> set[str]:
    return {file.stem for file in (CONF / group).glob("*.yaml")} - {"base"}  # data/base is completed by the others


@pytest.mark.parametrize(
    ("given", "bars"),
    [
        ((), ["ProgressBar"]),
        (("callbacks.progress=null",), []),  # Lightning would take its own, which counts micro-batches as steps
        (("trainer.enable_progress_bar=false",), []),
        (("callbacks.progress=null", "trainer.enable_progress_bar=true"), ["RichProgressBar"]),
    ],
)
def test_progress_is_shown_unless_either_key_turns_it_off(given: tuple[str, ...], bars: list[str]) -> None:
    cfg = composed("trainer=cpu", "trainer.precision=32-true", "logger=none", *given)
    trainer: Any = distilkit.train.build_trainer(cfg)
    assert [type(each).__name__ for each in trainer.callbacks if isinstance(each, LightningBar)] == bars


def test_the_help_of_train_lists_each_group_and_option(tmp_path: Path) -> None:
    text = help_of("train", tmp_path)
    defaults = [next(iter(entry)) for entry in OmegaConf.load(CONF / "train.yaml").defaults if entry != "_self_"]
    assert groups_of(text) == {str(group): options_of(group) for group in defaults}
    assert "\n  temperature: 2.0\n" in text  # and the config


def test_the_help_of_prepare_lists_what_decides_a_token_cache(tmp_path: Path) -> None:
    groups = ("teacher", "tokenizer", "data", "experiment")
    assert groups_of(help_of("prepare", tmp_path)) == {group: options_of(group) for group in groups}


@pytest.mark.parametrize("command", ["export", "trim"])
def test_the_help_of_export_and_trim_lists_their_keys(command: str, tmp_path: Path) -> None:
    text = help_of(command, tmp_path)
    assert groups_of(text) == ({"data": options_of("data")} if command == "trim" else {})
    with initialize_config_module(config_module="distilkit.conf.train", version_base="1.3"):
        keys = set(map(str, compose(command))) - {"data"}
    assert (
        set(re.findall(r"^(\w+) +\S", text.partition("== Keys")[2].partition("== Examples")[0], re.MULTILINE)) == keys
    )


@pytest.mark.parametrize("command", ["train", "prepare", "trim", "export", "dashboard"])
def test_the_help_ends_with_five_examples_that_compose(command: str, tmp_path: Path) -> None:
    examples = help_of(command, tmp_path).strip().partition("== Examples ==\n")[2].splitlines()
    assert len(examples) == 5
    for line in examples:
        python, m, module, *overrides = shlex.split(line)
        assert (python, m, module) == ("python", "-m", f"distilkit.{command}")
        with initialize_config_module(config_module="distilkit.conf.train", version_base="1.3"):
            if overrides[0] == "-m":
                (sweep,) = overrides[1:]
                key, _, values = sweep.partition("=")
                assert [OmegaConf.select(compose(command, [f"{key}={value}"]), key) for value in values.split(",")]
            else:
                cfg = compose(command, overrides)
                assert (
                    "teacher" in cfg
                    or "dry_run" in cfg
                    or {"out", "formats"} < set(cfg)
                    or {"out", "coverage"} < set(cfg)
                )


# ------------------------------------------------------------------ prepare, export, folders


def test_prepare_and_export_compose_and_prepare_shares_the_settings_of_train() -> None:
    train, prepare = composed(), composed(config_name="prepare")
    assert changed(prepare, train) == {"name": "prepare", "verify": False}
    with initialize_config_module(config_module="distilkit.conf.train", version_base="1.3"):
        export = compose("export")
    assert (export.formats, export.dtype, export.private, export.trust_remote_code) == (["hf"], "float32", True, False)
    assert {name for name, value in export.items() if value is None} == {
        "ckpt",
        "out",
        "texts",
        "license",
        "push_to_hub",
    }


def test_a_fresh_run_has_a_folder_of_its_own_within_one_second() -> None:
    directory = OmegaConf.to_container(composed().hydra.run, resolve=False)["dir"]
    assert re.fullmatch(r"outputs/\$\{name\}/\$\{now:%Y-%m-%d_%H-%M-%S-%f\}", directory)
    assert OmegaConf.to_container(composed().hydra.sweep, resolve=False)["dir"] == directory


# ---------------------------------------------------------------------------- experiments

PAPERS = {
    "distilbert": ("google-bert/bert-base-uncased", (5, 2, 0, 1), ["wikimedia/wikipedia", "rojagtap/bookcorpus"], 512),
    "distilroberta": ("FacebookAI/roberta-base", (5, 2, 0, 1), ["Skylion007/openwebtext"], 512),
    "distilgpt2": ("openai-community/gpt2", (5, 0, 2, 1), ["Skylion007/openwebtext"], 1024),
    "distilmbert": ("google-bert/bert-base-multilingual-cased", (5, 2, 0, 1), ["wikimedia/wikipedia"], 512),
}


@pytest.mark.parametrize("name", PAPERS)
def test_an_experiment_holds_the_numbers_of_the_paper(name: str) -> None:
    teacher, alphas, hub_paths, block_size = PAPERS[name]
    cfg = composed(f"experiment={name}")
    assert cfg.name == name
    assert cfg.teacher.name == teacher
    objective = cfg.objective
    assert (objective.alpha_ce, objective.alpha_mlm, objective.alpha_clm, objective.alpha_cos) == alphas
    assert (objective.alpha_mse, objective.temperature, objective.soft_targets) == (0, 2, "all")
    assert cfg.optimizer._target_ == "torch.optim.AdamW"
    assert (cfg.optimizer.lr, cfg.optimizer.betas, cfg.optimizer.eps) == (5e-4, [0.9, 0.98], 1e-6)
    assert cfg.optimizer.weight_decay == 0
    assert (cfg.scheduler.name, cfg.scheduler.warmup_share, cfg.scheduler.kwargs) == ("linear", 0.05, None)
    assert (cfg.trainer.gradient_clip_val, cfg.trainer.max_epochs, cfg.trainer.max_steps) == (5.0, 3, -1)
    assert (cfg.data.global_batch_size, cfg.data.block_size) == (4096, block_size)
    masking = cfg.data.masking
    assert (masking.mlm_probability, masking.mask_share, masking.random_share) == (0.15, 0.8, 0.1)
    assert masking.smoothing == 0.7
    assert (cfg.student.layers, cfg.student.init, cfg.trainer.strategy) == ("half", "teacher", "ddp")
    assert cfg.tokenizer.name == teacher
    corpus = instantiate(cfg.data.corpus)
    assert [getattr(part, "path", None) for part in getattr(corpus, "parts", [corpus])] == hub_paths


def test_distilmbert_reads_the_104_languages_of_mbert_that_the_dump_has() -> None:
    languages = list(composed("experiment=distilmbert").data.corpus.languages)
    assert len(languages) == len(set(languages))
    assert 100 <= len(languages) <= 104
    assert {"en", "de", "zh", "sw", "th", "mn", "no"} <= set(languages)
    assert all(isinstance(language, str) for language in languages)  # a bare "no" would be False


@pytest.mark.parametrize(
    ("name", "model_type", "student_class"),
    [
        ("distilbert", "bert", "DistilBertForMaskedLM"),
        ("distilroberta", "roberta", "RobertaForMaskedLM"),
        ("distilgpt2", "gpt2", "GPT2LMHeadModel"),
        ("distilmbert", "bert", "DistilBertForMaskedLM"),
    ],
)
def test_an_experiment_trains_a_tiny_stand_in_teacher_into_the_right_student(
    name: str,
    model_type: str,
    student_class: str,
    text_file: Path,
    save_teacher: Callable[..., Path],
    tmp_path: Path,
) -> None:
    done = call(
        distilkit.train.main,
        f"experiment={name}",
        f"teacher.name={save_teacher(model_type)}",
        *SMALL,
        *QUIET,
        "data.num_workers=0",
        f"data.corpus.paths={text_file}",
        f"cache_dir={tmp_path}/cache",
        "trainer.max_steps=2",
        cwd=tmp_path,
    )
    assert (done.code, "Traceback" in done.err) == (0, False), done.err
    run = only(tmp_path, f"outputs/{name}/*")
    summary = OmegaConf.load(run / "summary.json")
    assert (summary.name, summary.architecture, summary.layers) == (name, student_class, [0, 2, 5])
    assert summary.objective == {
        f"alpha_{term}": alpha
        for term, alpha in zip(("ce", "mlm", "clm", "cos"), PAPERS[name][1], strict=True)
        if alpha
    } | {"temperature": 2.0, "soft_targets": "all"}
    assert OmegaConf.load(run / "student/config.json").architectures == [student_class]
    for file in ("student/model.safetensors", "checkpoints/best.ckpt", "checkpoints/last.ckpt"):
        assert (run / file).stat().st_size > 0, file


def commands(file: Path) -> list[list[str]]:
    """Return the overrides of each distilkit.train command in a config's comments."""
    found = re.findall(r"python -m distilkit\.train ([^\n]*)", file.read_text("utf-8"))
    return [shlex.split(command) for command in found]


@pytest.mark.parametrize(
    "option", [option for option in OPTIONS if re.fullmatch(r"(experiment|sweep)/[a-z0-9_]+", option)]
)
def test_the_commands_in_the_head_of_a_recipe_compose(option: str) -> None:
    file = CONF / f"{option}.yaml"
    assert re.match(r"(# .*\n)+", file.read_text("utf-8")), "a recipe begins with a comment"
    group, name = option.split("/")
    assert commands(file)
    assert commands(file)[0][0] == f"{group}={name}"
    for overrides in commands(file):
        cfg = composed(*overrides)
        if f"{group}={name}" == "experiment=distilbert" and "trainer.devices=8" in overrides:
            assert cfg.trainer.devices == 8


# ---------------------------------------------------------------------------- sweeps


def test_the_temperature_sweep_changes_the_temperature_alone() -> None:
    cfg = composed("sweep=temperature")
    assert cfg.hydra.mode.name == "MULTIRUN"
    (name, values), *rest = cfg.hydra.sweeper.params.items()
    assert (name, rest) == ("objective.temperature", [])
    for value in values.split(","):
        one = changed(composed("sweep=temperature", f"{name}={value}"), composed())
        assert one == ({} if value == "2" else {"objective.temperature": int(value)})


def test_each_row_of_the_ablation_changes_one_thing() -> None:
    cfg = composed("sweep=ablation")
    assert cfg.hydra.mode.name == "MULTIRUN"
    (group, values), *rest = cfg.hydra.sweeper.params.items()
    assert (group, rest) == ("+sweep/ablation", [])
    rows = {
        value: changed(composed("sweep=ablation", f"{group}={value}"), composed("sweep=ablation"))
        for value in values.split(",")
    }
    assert rows == {
        "full": {},
        "no_ce": {"objective.alpha_ce": 0.0},
        "no_mlm": {"objective.alpha_mlm": 0.0},
        "no_cos": {"objective.alpha_cos": 0.0},
        "random_init": {"student.init": "random"},
    }
    assert {option.removeprefix("sweep/ablation/") for option in OPTIONS if "sweep/ablation/" in option} == set(rows)


def test_the_ablation_goes_with_an_experiment() -> None:
    base = composed("experiment=distilroberta", "sweep=ablation")
    row = composed("experiment=distilroberta", "sweep=ablation", "+sweep/ablation=no_cos")
    assert changed(row, base) == {"objective.alpha_cos": 0.0}


def row_of(name: str, *overrides: str) -> DictConfig:
    """Compose a job of sweep=versus, and let its row win over the command line as a run does."""
    cfg = composed("sweep=versus", f"+sweep/versus={name}", *overrides)
    distilkit.train._apply_row(cfg)
    return cfg


def finished(folder: Path, **summary: Any) -> str:
    """Write the summary of a distilled job below a sweep's folder; return that folder as an override."""
    (folder / "distilled").mkdir()
    (folder / "distilled" / "summary.json").write_text(json.dumps(summary), "utf-8")
    return f"hydra.sweep.dir={folder}"


def test_equal_rows_are_four_jobs_in_folders_named_after_them() -> None:
    cfg = composed("sweep=versus")
    assert cfg.hydra.mode.name == "MULTIRUN"
    assert cfg.hydra.sweeper.params == {"+sweep/versus": "cut,distilled,baseline,baseline_time"}
    rows = cfg.hydra.sweeper.params["+sweep/versus"].split(",")
    assert [composed("sweep=versus", f"+sweep/versus={row}").hydra.sweep.subdir for row in rows] == rows
    assert sorted(file.stem for file in (CONF / "sweep/versus").glob("*.yaml")) == sorted(rows)


def test_a_row_changes_only_what_makes_it_that_row(tmp_path: Path) -> None:
    sweep = finished(tmp_path, optimizer_steps=30, training_seconds=61.5)
    base = row_of("distilled", sweep)
    assert changed(base, composed("sweep=versus", sweep)) == {}
    alone = {"objective.alpha_ce": 0.0, "objective.alpha_cos": 0.0, "objective.alpha_mlm": 1.0}
    rows = {name: changed(row_of(name, sweep), base) for name in ("cut", "baseline", "baseline_time")}
    found = {
        name: {key: value for key, value in row.items() if key.split(".")[0] != "row"} for name, row in rows.items()
    }
    assert found == {
        "cut": {"trainer.max_steps": 0},
        "baseline": alone,
        "baseline_time": alone | {"budget": 61.5, "trainer.max_epochs": -1},
    }


@pytest.mark.parametrize("row", ["baseline", "baseline_time"])
@pytest.mark.parametrize(
    ("preset", "lm"),
    [
        *(("distilbert", "mlm"), ("mlm", "mlm"), ("distilgpt2", "clm"), ("clm", "clm")),
        *(("minilm", "mlm"), ("minilm", "clm")),
    ],
)
def test_a_baseline_has_the_lm_loss_of_its_teacher_alone(
    preset: str, lm: str, row: str, save_teacher: Callable[..., Path], tmp_path: Path
) -> None:
    given = ["teacher=hf", f"teacher.name={save_teacher('bert' if lm == 'mlm' else 'gpt2')}", f"objective={preset}"]
    given += ["objective.alpha_mse=3", finished(tmp_path, training_seconds=61.5)]
    cfg = row_of(row, *given)
    assert instantiate(cfg.objective).weights == {lm: 1.0}


def test_weights_that_change_over_training_are_the_distilled_rows_own(tmp_path: Path) -> None:
    given = ["objective.alpha_mlm=[[0,0],[1,2]]", "objective.alpha_ce=[[0,5],[1,0]]"]
    assert instantiate(row_of("baseline", *given).objective).weights == {"mlm": 1.0}
    assert row_of("distilled", *given).objective.alpha_mlm == [[0, 0], [1, 2]]


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        (
            ["trainer.max_steps=300"],
            {"cut": (None, 0, -1), "baseline": (None, 300, -1), "baseline_time": (61.5, -1, -1)},
        ),
        (["trainer.max_epochs=2"], {"cut": (None, 0, 2), "baseline": (None, -1, 2), "baseline_time": (61.5, -1, -1)}),
        (["budget=1m"], {"cut": (None, 0, -1), "baseline": (None, 30, -1), "baseline_time": (61.5, -1, -1)}),
    ],
)
def test_a_row_ends_at_equal_tokens_or_time_whatever_ends_the_command(
    end: list[str], expected: dict[str, Any], tmp_path: Path
) -> None:
    sweep = finished(tmp_path, optimizer_steps=30, training_seconds=61.5)
    for name, ends in expected.items():
        cfg = row_of(name, sweep, *end)
        assert (cfg.budget, cfg.trainer.max_steps, cfg.trainer.max_epochs) == ends, name


@pytest.mark.parametrize(("row", "end"), [("baseline_time", "trainer.max_steps=9"), ("baseline", "budget=1m")])
def test_a_row_that_reads_a_distilled_job_that_failed_is_refused_in_one_line(
    row: str, end: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=rf"^{tmp_path}/distilled/summary.json does not exist; .*[^\n]$"):
        row_of(row, end, f"hydra.sweep.dir={tmp_path}")
    assert row_of("baseline", "trainer.max_steps=9", f"hydra.sweep.dir={tmp_path}").trainer.max_steps == 9


def test_the_baselines_take_the_learning_rate_of_the_command_or_their_own(tmp_path: Path) -> None:
    sweep = finished(tmp_path, training_seconds=61.5)
    for given, rates in (
        (["optimizer.lr=1e-3"], (1e-3, 1e-3)),
        (["optimizer.lr=1e-3", "versus.baseline_lr=2e-4"], (1e-3, 2e-4)),
    ):
        found = [row_of(name, sweep, *given).optimizer.lr for name in ("distilled", "baseline", "baseline_time")]
        assert found == [rates[0], rates[1], rates[1]]


@pytest.mark.parametrize("row", ["baseline", "baseline_time"])
def test_a_baseline_takes_the_layers_that_the_distilled_row_has_measured(row: str, tmp_path: Path) -> None:
    given = "student=layers", "student.layers=greedy", "student.num_layers=3"
    sweep = finished(tmp_path, training_seconds=61.5, layers=[0, 4, 5], layer_choice={"method": "greedy"})
    cfg = row_of(row, sweep, *given)
    assert (cfg.student.layers, cfg.student.num_layers) == ([0, 4, 5], 3)
    (tmp_path / "distilled/summary.json").write_text('{"training_seconds": 61.5, "layers": [0, 4, 5]}', "utf-8")
    assert row_of(row, sweep, *given).student.layers == "greedy"


def test_equal_rows_go_with_an_experiment() -> None:
    cfg = row_of("baseline", "experiment=distilgpt2")
    assert (cfg.teacher.name, instantiate(cfg.objective).weights) == ("openai-community/gpt2", {"clm": 1.0})


DEMO = ("teacher", "cut", "distilled", "baseline", "baseline_time", "random_init")


@pytest.mark.parametrize("more", [(), ("sweep=versus",)])
def test_the_demo_runs_its_teacher_and_the_equal_rows(more: tuple[str, ...]) -> None:
    cfg = composed("experiment=demo", "stage=teacher", *more)
    assert cfg.hydra.mode.name == "MULTIRUN"
    assert cfg.hydra.callbacks.sweep_report.measure_latency is True
    assert cfg.hydra.sweeper.params == {"+sweep/versus": "[]", "+experiment/demo": ",".join(DEMO)}
    assert OmegaConf.to_container(cfg.hydra.sweep, resolve=False)["subdir"] == "${stage}"
    assert cfg.versus.tasks == []  # and any can be given


def test_the_students_of_the_demo_differ_in_one_thing_each(tmp_path: Path) -> None:
    sweep = finished(tmp_path, training_seconds=61.5)
    stages = {name: composed("experiment=demo", "+sweep/versus=[]", f"+experiment/demo={name}", sweep) for name in DEMO}
    assert {name: stage.stage for name, stage in stages.items()} == {name: name for name in stages}
    assert {stage.name for stage in stages.values()} == {"demo"}
    teacher, distilled = stages["teacher"], stages["distilled"]
    assert teacher.teacher.name is None
    assert teacher.student._target_ == "distilkit.student.new_student"
    assert instantiate(teacher.objective).weights == {"mlm": 1.0}
    assert OmegaConf.to_container(distilled.teacher, resolve=False)["name"] == "${hydra:sweep.dir}/teacher/student"
    assert instantiate(distilled.objective).weights == {"ce": 5.0, "mlm": 2.0, "cos": 1.0}
    assert distilled.student.layers == "half"
    assert changed(stages["random_init"], distilled) == {"stage": "random_init", "student.init": "random"}
    for name in ("cut", "baseline", "baseline_time"):
        own = composed("sweep=versus", f"+sweep/versus={name}").row
        assert OmegaConf.to_container(stages[name].row) == OmegaConf.to_container(own)
        assert {key.split(".")[0] for key in changed(stages[name], distilled)} == {"stage", "row"}
