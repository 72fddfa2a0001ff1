"""Every config of distilkit.evaluate composes and fits its target."""

import inspect
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import distilkit.conf.evaluate
import pytest
from hydra import compose, initialize_config_module
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning import Trainer

import distilkit.evaluate.__main__
import distilkit.report.__main__
from distilkit.evaluate.texts import TextTask
from jobs import call

CONF = Path(distilkit.conf.evaluate.__file__).parent
GLUE = ("cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb", "wnli")
TASKS = sorted(file.stem for file in (CONF / "task").glob("[!_]*.yaml"))
TEXTS = [*GLUE, "imdb", "xnli"]


@pytest.fixture(autouse=True)
def forget_hydra() -> Iterator[None]:
    yield
    HydraConfig.instance().cfg = None


def composed(*overrides: str) -> DictConfig:
    with initialize_config_module("distilkit.conf.evaluate", version_base="1.3"):
        return compose("evaluate", ["model=somewhere", *overrides], return_hydra_config=True)


def plain(node: Any) -> Any:
    return OmegaConf.to_container(node, resolve=True)


@pytest.mark.parametrize("task", [task for task in TASKS if task != "glue"])
def test_a_task_gives_its_target_what_it_takes(task: str) -> None:
    node = composed(f"task={task}").task
    parameters = inspect.signature(get_object(node._target_)).parameters
    keys = set(map(str, node)) - {"_target_"}
    needed = {name for name, each in parameters.items() if each.default is each.empty}
    assert needed <= keys <= set(parameters)
    assert node.name == task


def test_glue_sweeps_over_the_same_nine_tasks() -> None:
    cfg = composed("task=glue", "task.data_dir=there")
    assert cfg.hydra.mode.name == "MULTIRUN"
    assert plain(cfg.hydra.sweeper.params) == {"evaluate/task@task": ",".join(GLUE)}
    for task in GLUE:
        job = composed("task=glue", f"evaluate/task@task={task}", "task.data_dir=there", "task.max_train_rows=7")
        alone = composed(f"task={task}", "task.data_dir=there", "task.max_train_rows=7")
        assert plain(job.task) == plain(alone.task)


@pytest.mark.parametrize("task", TEXTS)
def test_a_task_of_texts_builds_and_reads_hub_and_files_by_the_same_names(task: str) -> None:
    node = composed(f"task={task}").task
    assert isinstance(instantiate(node), TextTask)
    files, hub = ({name for name, split in part.scored.items() if split} for part in (node.files, node.hub))
    assert files == hub
    named = [node.hub.train, *(split for split in node.hub.scored.values() if split)]
    assert task not in GLUE or {split.name for split in named} == {task}
    assert node.hub.path in ("nyu-mll/glue", "stanfordnlp/imdb", "facebook/xnli")


@pytest.mark.parametrize(
    ("task", "labels", "metrics"),
    [
        ("cola", ["unacceptable", "acceptable"], ["matthews"]),
        ("mnli", ["entailment", "neutral", "contradiction"], ["accuracy"]),
        ("mrpc", ["not_equivalent", "equivalent"], ["accuracy", "f1"]),
        ("qnli", ["entailment", "not_entailment"], ["accuracy"]),
        ("qqp", ["not_duplicate", "duplicate"], ["accuracy", "f1"]),
        ("rte", ["entailment", "not_entailment"], ["accuracy"]),
        ("sst2", ["negative", "positive"], ["accuracy"]),
        ("stsb", None, ["pearson", "spearman"]),
        ("wnli", ["not_entailment", "entailment"], ["accuracy"]),
        ("imdb", ["neg", "pos"], ["accuracy"]),
        ("xnli", ["entailment", "neutral", "contradiction"], ["accuracy"]),
    ],
)
def test_labels_are_in_the_hubs_order_and_metrics_are_glues(
    task: str, labels: list[str] | None, metrics: list[str]
) -> None:
    node = composed(f"task={task}").task
    assert (plain(node).get("labels"), plain(node.metrics)) == (labels, metrics)


FILES = {  # the official layouts: file, header, one row
    "cola": ("CoLA/train.tsv", None, "gj04\t1\t\tOur friends won't buy this."),
    "mrpc": ("MRPC/train.tsv", "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", "1\t70\t71\tone\ttwo"),
    "stsb": (
        "STS-B/train.tsv",
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
        "0\tm\tf\t2012\t1\tn\tn\tone\ttwo\t1.000",
    ),
    "qqp": ("QQP/train.tsv", "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", "1\t2\t3\tone\ttwo\t1"),
    "mnli": (
        "MNLI/train.tsv",
        "index\tpromptID\tpairID\tgenre\tsentence1\tsentence2\tlabel1\tgold_label",
        "0\t3\t3n\tfiction\tone\ttwo\tneutral\tneutral",
    ),
    "qnli": ("QNLI/train.tsv", "index\tquestion\tsentence\tlabel", "0\tone\ttwo\tnot_entailment"),
    "rte": ("RTE/train.tsv", "index\tsentence1\tsentence2\tlabel", "0\tone\ttwo\tnot_entailment"),
    "wnli": ("WNLI/train.tsv", "index\tsentence1\tsentence2\tlabel", "0\tone\ttwo\t1"),
    "sst2": ("SST-2/train.tsv", "sentence\tlabel", "one \t1"),
    "xnli": ("XNLI/multinli.train.en.tsv", "premise\thypo\tlabel", "one\ttwo\tneutral"),
    "boolq": ("BoolQ/train.jsonl", None, '{"question": "is it", "passage": "It is.", "idx": 0, "label": true}'),
    "cb": ("CB/train.jsonl", None, '{"premise": "one", "hypothesis": "two", "label": "contradiction", "idx": 0}'),
    "wic": (
        "WiC/train.jsonl",
        None,
        '{"word": "bank", "sentence1": "one", "sentence2": "two", "idx": 0, "label": true, "start1": 0, "version": 1.1}',
    ),
    "superglue_rte": ("RTE/train.jsonl", None, '{"premise": "a", "hypothesis": "b", "label": "not_entailment"}'),
    "axb": ("RTE/train.jsonl", None, '{"premise": "a", "hypothesis": "b", "label": "not_entailment", "idx": 0}'),
    "axg": ("RTE/train.jsonl", None, '{"premise": "a", "hypothesis": "b", "label": "not_entailment", "idx": 0}'),
}


@pytest.mark.parametrize("task", FILES)
def test_the_official_files_of_a_task_are_read(task: str, tmp_path: Path) -> None:
    name, header, row = FILES[task]
    (tmp_path / name).parent.mkdir()
    (tmp_path / name).write_text("\n".join([*([header] if header else []), row]) + "\n", "utf-8")
    (example,) = instantiate(composed(f"task={task}", f"task.data_dir={tmp_path}").task).train_examples()
    assert example.label == 1
    assert len(example.texts) == (1 if task in ("cola", "sst2") else 2)


def test_the_word_of_a_sense_stands_before_its_first_sentence(tmp_path: Path) -> None:
    (tmp_path / "WiC").mkdir()
    (tmp_path / "WiC" / "train.jsonl").write_text(FILES["wic"][2] + "\n", "utf-8")
    (example,) = instantiate(composed("task=wic", f"task.data_dir={tmp_path}").task).train_examples()
    assert example.texts == ("bank: one", "two")


@pytest.mark.parametrize(
    ("task", "row"),
    [
        ("axb", '{"sentence1": "one", "sentence2": "two", "label": "entailment", "logic": "Negation", "idx": 0}'),
        ("axg", '{"premise": "one", "hypothesis": "two", "label": "entailment", "pair_id": 551, "idx": 0}'),
    ],
)
def test_a_diagnostic_set_is_scored_by_a_model_of_rte(task: str, row: str, tmp_path: Path) -> None:
    name = {"axb": "AX-b", "axg": "AX-g"}[task]
    (tmp_path / name).mkdir()
    (tmp_path / name / f"{name}.jsonl").write_text(row + "\n", "utf-8")
    scored = instantiate(composed(f"task={task}", f"task.data_dir={tmp_path}").task).scored_examples()
    assert [(split, example.texts, example.label) for split, (example,) in scored.items()] == [
        ("test", ("one", "two"), 0)
    ]


@pytest.mark.parametrize(
    ("task", "hub"), [("boolq", "boolq"), ("wic", "wic"), ("axb", "rte"), ("superglue_rte", "rte")]
)
def test_superglue_comes_from_the_hub_with_numbers_for_labels(
    task: str, hub: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def load_dataset(*names: Any, **settings: Any) -> Any:
        import datasets

        asked.append((*names, settings["split"], settings["revision"]))
        columns = ("passage", "question", "word", "sentence1", "sentence2")
        columns += () if names[1] == "axb" else ("premise", "hypothesis")
        return datasets.Dataset.from_dict({"label": [1], **{column: [column] for column in columns}})

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    built = instantiate(composed(f"task={task}").task)
    (example,), scored = built.train_examples(), built.scored_examples()
    (split, (other,)) = next(iter(scored.items()))
    assert example.label == other.label == 1
    own = ("axb", "test") if task == "axb" else (hub, "validation")
    source = ("aps/super_glue", "refs/convert/parquet")
    assert asked == [(source[0], hub, "train", source[1]), (source[0], *own, source[1])]
    assert split == ("test" if task == "axb" else "dev")
    assert other.texts[0] == {"axb": "sentence1", "boolq": "passage", "wic": "word: sentence1"}.get(task, "premise")


def test_xnli_scores_each_language_by_itself(tmp_path: Path) -> None:
    lines = ["language\tgold_label\tsentence1\tsentence2"]
    lines += [
        f"{language}\tneutral\tpremise {language}\thypothesis"
        for language in ["en", "es", "zh", "de", "ar", "ur", "fr"]
    ]
    (tmp_path / "xnli.test.tsv").write_text("\n".join(lines) + "\n", "utf-8")
    scored = instantiate(composed("task=xnli", f"task.data_dir={tmp_path}").task).scored_examples()
    assert {name: example.texts[0] for name, (example,) in scored.items()} == {
        name: f"premise {name}" for name in ["en", "es", "zh", "de", "ar", "ur"]
    }


def test_a_task_of_ones_own_is_filled_in_on_the_command_line() -> None:
    task = instantiate(composed("task=text", "task.name=mine", "task.texts=[sentence]", "task.labels=[no,yes]").task)
    assert (task.name, task.texts, task.labels) == ("mine", ["sentence"], ["no", "yes"])


@pytest.mark.parametrize("name", ["auto", "cpu", "gpu"])
def test_every_trainer_builds_on_one_cpu(name: str) -> None:
    cfg = composed(f"trainer={name}")
    trainer = instantiate(cfg.trainer, accelerator="cpu", precision="32-true")
    assert isinstance(trainer, Trainer)
    assert (trainer.max_epochs, trainer.gradient_clip_val, trainer.world_size) == (3, 1.0, 1)
    assert cfg.trainer.accelerator == name


@pytest.mark.parametrize("name", ["none", "csv", "wandb", "tensorboard"])
def test_loggers_are_those_of_training(name: str) -> None:
    ours = composed(f"logger={name}", "output_dir=x", "name=n").logger
    with initialize_config_module("distilkit.conf.train", version_base="1.3"):
        theirs = compose("train", [f"logger={name}", "output_dir=x", "name=n"]).logger
    theirs = plain(theirs)
    theirs.get("wandb", {}).pop("log_model", None)  # an evaluation makes no student
    assert plain(ours) == theirs


def test_the_grid_is_berts_and_chooses_by_held_out_rows() -> None:
    cfg = composed("grid=bert")
    assert plain(cfg.hydra.sweeper.params) == {
        "finetune.lr": "5e-5,3e-5,2e-5",
        "finetune.batch_size": "16,32",
        "finetune.epochs": "2,3,4",
    }
    assert cfg.finetune.held_out == 0.1
    assert cfg.hydra.mode.name == "MULTIRUN"


def test_a_job_keeps_no_model_and_writes_into_no_card_unless_it_is_asked_to() -> None:
    cfg = composed()
    assert (cfg.save_model, cfg.card) == (False, False)


def test_teacher_and_tokenizer_are_values_here() -> None:
    cfg = composed("teacher=outputs/some/model", "tokenizer=org/name")
    assert (cfg.teacher, cfg.tokenizer) == ("outputs/some/model", "org/name")


def help_of(name: str, folder: Path) -> str:
    entry = {"evaluate": distilkit.evaluate.__main__, "report": distilkit.report.__main__}[name].main
    done = call(entry, "--help", cwd=folder)
    assert done.code == 0, done.err
    return done.out


def test_the_help_of_evaluation_lists_its_own_groups_and_options(tmp_path: Path) -> None:
    block = help_of("evaluate", tmp_path).partition("Groups (group=option):\n")[2].partition("\n\n")[0]
    block = re.sub(r",\n +", ", ", block)
    groups = {
        name: options.split(", ") for name, _, options in (line.strip().partition(": ") for line in block.splitlines())
    }
    folders = [folder for folder in CONF.iterdir() if folder.is_dir() and folder.name != "__pycache__"]
    assert groups == {folder.name: sorted(file.stem for file in folder.glob("[!_]*.yaml")) for folder in folders}


def test_the_help_of_the_report_lists_its_keys_and_no_group(tmp_path: Path) -> None:
    text = help_of("report", tmp_path)
    assert "roup" not in text
    keys = re.findall(r"^  (\w+) +\S", text.partition("Keys (key=value):\n")[2].partition("\n\n")[0], flags=re.M)
    with initialize_config_module("distilkit.conf.evaluate", version_base="1.3"):
        assert keys == list(compose("report"))


@pytest.mark.parametrize("name", ["evaluate", "report"])
def test_the_help_ends_with_five_examples_that_compose(name: str, tmp_path: Path) -> None:
    examples = [line.strip() for line in help_of(name, tmp_path).strip().partition("Examples:\n")[2].splitlines()]
    assert len(examples) == 5
    for example in examples:
        assert example.startswith(f"python -m distilkit.{name} ")
        given = [word for word in shlex.split(example)[3:] if word != "--multirun"]
        assert len(given) == len(shlex.split(example)[3:]) - example.count("--multirun")
        with initialize_config_module("distilkit.conf.evaluate", version_base="1.3"):
            (jobs,) = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(given), max_batch_size=None)
            for job in jobs:
                compose(name, job)
        assert (len(jobs) > 1) == ("--multirun" in example)
