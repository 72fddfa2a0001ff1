"""Fine-tuning and scoring through the command line: what is learnt, resumed, chosen, kept and refused."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import sklearn.metrics
import torch
import transformers.utils.hub
from huggingface_hub import ModelCard
from hydra import compose, initialize_config_module
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

import distilkit.evaluate.__main__
from distilkit.evaluate.finetune import Batches, FinetuningModule, hold_out
from distilkit.evaluate.job import job_id, prepare
from distilkit.evaluate.models import tokenizer_id, weights_id
from distilkit.metrics import measure
from distilkit.records import read_results, read_rows
from distilkit.report.frame import gather
from jobs import Outcome, call, only, write_rows
from tiny import build_model

FAST = (
    "trainer=cpu",
    "trainer.enable_progress_bar=false",
    "trainer.log_every_n_steps=1",
    "finetune.lr=2e-3",
    "finetune.batch_size=16",
    "task.max_length=60",
    "finetune.epochs=2",
    "seed=1",
    "save_model=true",
)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("glue") / "SST-2").parent


@pytest.fixture
def score(rows: Path, save_teacher: Callable[..., Path], tmp_path: Path) -> Callable[..., Outcome]:
    def run(*overrides: str, model: str | Path | None = None, task: str = "sst2") -> Outcome:
        model = model or save_teacher("distilbert", num_layers=2)
        given = [f"model={model}", f"task={task}", f"task.data_dir={rows}", *FAST, *overrides]
        return call(distilkit.evaluate.__main__.main, *given, cwd=tmp_path)

    return run


def result(folder: Path) -> Any:
    (found,) = read_results([folder])
    return found


def test_a_model_learns_a_task_and_leaves_its_record(score: Callable[..., Outcome], rows: Path, tmp_path: Path) -> None:
    done = score("finetune.epochs=6", "name=mine")
    assert (done.code, "Traceback" in done.err) == (0, False), done.err
    found = result(tmp_path)
    assert found.score > 0.85
    assert found.scores == {"accuracy": found.score}
    assert (found.name, found.task, found.kind, found.seed) == ("mine", "sst2", "finetuned", 1)
    assert (found.model_type, found.details["rows"]) == ("distilbert", {"dev": 60})
    expected = {"lr": 2e-3, "epochs": 6, "batch_size": 16, "max_length": 60, "precision": "32-true", "train_rows": 160}
    assert expected.items() <= found.settings.items()
    assert found.settings["labels"] == found.details["task"]["labels"] == ["negative", "positive"]
    assert found.details["task"]["data_dir"] == str(rows)
    assert found.cost["tokens"] > 6 * 160 * 3
    folder = only(tmp_path, "outputs/evaluate/mine/sst2/seed1-*")
    files = ["model", "predictions-dev.json", "results.json", "rows-dev.npz"]
    assert sorted(path.name for path in folder.iterdir()) == files
    said = json.loads((folder / "predictions-dev.json").read_text("utf-8"))
    wanted = [line[-1] for line in (rows / "SST-2" / "dev.tsv").read_text("utf-8").splitlines()[1:]]
    right = sum((word == "positive") == (label == "1") for word, label in zip(said, wanted, strict=True))
    assert right / len(said) == pytest.approx(found.score)
    kept = read_rows(found.folder, "dev")
    assert kept is not None
    assert measure(["accuracy"], kept) == found.scores
    assert (kept.ids.tolist(), kept.gold.tolist()) == (list(range(60)), list(map(int, wanted)))
    assert [("negative", "positive")[each] for each in kept.said] == said
    assert (kept.logits.argmax(axis=1) == kept.said).all() and kept.logits.dtype == np.float16
    model = AutoModelForSequenceClassification.from_pretrained(folder / "model")
    assert model.config.id2label == {0: "negative", 1: "positive"}


def test_the_same_command_again_scores_nothing_anew(score: Callable[..., Outcome], tmp_path: Path) -> None:
    assert score("finetune.epochs=1").code == 0
    file = only(tmp_path, "outputs/**/results.json")
    before = file.stat().st_mtime_ns
    assert score("finetune.epochs=1").code == 0
    assert file.stat().st_mtime_ns == before
    assert score("finetune.epochs=1", "finetune.lr=1e-3").code == 0  # other settings are another job
    assert len(read_results([tmp_path])) == 2


def scored_once(tmp_path: Path) -> tuple[int, set[str]]:
    """Return how many results there are, and the times of their files."""
    files = sorted(tmp_path.glob("outputs/**/results.json"))
    return len(files), {f"{file} {file.stat().st_mtime_ns}" for file in files}


def test_a_job_is_known_by_its_rows_and_not_by_the_folder_they_lie_in(
    score: Callable[..., Outcome], rows: Path, tmp_path: Path
) -> None:
    for name in ("glue", "copy"):
        shutil.copytree(rows, tmp_path / name)
    assert score("task.data_dir=glue", "finetune.epochs=1").code == 0
    before = scored_once(tmp_path)
    for same in ("./glue", f"{tmp_path}/glue", "copy", "glue/SST-2"):
        done = score(f"task.data_dir={same}", "finetune.epochs=1")
        assert done.code == 0, done.err
        assert scored_once(tmp_path) == before
    for name in ("train", "dev"):
        file = tmp_path / "copy" / "SST-2" / f"{name}.tsv"
        text = file.read_text("utf-8")
        file.write_text(text[:-2] + str(1 - int(text[-2])) + "\n", "utf-8")  # one label
        assert score("task.data_dir=copy", "finetune.epochs=1").code == 0
    found = [each.settings for each in read_results([tmp_path])]
    data = {(each["train_data"], each["scored_data"]) for each in found}
    assert [len(each) for each in (data, {train for train, _ in data}, {scored for _, scored in data})] == [3, 2, 2]


def test_another_tokenizer_in_the_same_folder_is_another_model(
    score: Callable[..., Outcome], save_teacher: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tmp_path / "own"
    shutil.copytree(save_teacher("distilbert", num_layers=2), folder)
    before = weights_id(str(folder), revision="main")
    (folder / "README.md").write_text("It is a model.\n", "utf-8")
    assert weights_id(str(folder), revision="main") == before
    file = folder / "tokenizer.json"
    file.write_text(file.read_text("utf-8").replace('"ba":', '"zzz":'), "utf-8")
    assert weights_id(str(folder), revision="main") != before
    assert tokenizer_id(str(folder)) != tokenizer_id(str(save_teacher("distilbert", num_layers=2)))


def test_a_timing_is_known_by_the_models_that_it_is_set_against(
    save_teacher: Callable[..., Path], tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(save_teacher("distilbert", num_layers=2), other)
    (tmp_path / "lines.txt").write_text("ba be\nbi\n", "utf-8")

    def folder() -> Path:
        own = f"model={save_teacher('bert', num_layers=2)}"
        with initialize_config_module("distilkit.conf.evaluate", version_base="1.3"):
            given = [own, "task=speed", f"task.data_dir={tmp_path}/lines.txt", f"task.against={other}"]
            return prepare(compose("evaluate", given))[1].folder

    before = folder()
    assert folder() == before
    shutil.copy(save_teacher("distilbert", num_layers=1) / "model.safetensors", other)
    assert folder() != before


def test_results_with_other_labels_or_metrics_are_kept_apart(score: Callable[..., Outcome], tmp_path: Path) -> None:
    for overrides in ([], ["task.labels=[positive,negative]"], ["task.metrics=[accuracy,f1_macro,roc_auc]"]):
        assert score("finetune.epochs=1", *overrides).code == 0
    found = read_results([tmp_path])
    assert len({json.dumps(each.settings, sort_keys=True) for each in found}) == 3
    (last,) = [each for each in found if "roc_auc" in each.scores]
    kept = read_rows(last.folder, "dev")
    assert kept is not None
    assert measure(list(last.scores), kept) == last.scores
    assert last.scores["f1_macro"] == sklearn.metrics.f1_score(kept.gold, kept.said, average="macro")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save_teacher: Callable[..., Path]) -> Callable[[str], None]:
    """Fill a cache of the hub with a model, and return what moves its main branch to a commit."""
    repository = tmp_path / "hub" / "models--org--mine"
    for commit, layers in (("a" * 40, 1), ("b" * 40, 2)):
        shutil.copytree(save_teacher("distilbert", num_layers=layers), repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(transformers.utils.hub, "HF_HUB_CACHE", str(tmp_path / "hub"), raising=False)
    return lambda commit: (repository / "refs" / "main").write_text(commit, "utf-8") and None


def test_a_hub_model_is_known_by_the_commit_that_was_scored(
    score: Callable[..., Outcome], hub: Callable[[str], None], tmp_path: Path
) -> None:
    for commit in ("a" * 40, "b" * 40):
        hub(commit)
        done = score("finetune.epochs=1", model="org/mine")
        assert done.code == 0, done.err
    before = scored_once(tmp_path)
    assert score("finetune.epochs=1", f"revision={'a' * 40}", model="org/mine").code == 0
    assert scored_once(tmp_path) == before  # it has been scored as main
    found = {each.sha256: each for each in read_results([tmp_path])}
    assert set(found) == {"a" * 40, "b" * 40}
    assert found["a" * 40].parameters < found["b" * 40].parameters
    assert weights_id("org/other", revision="main") == "org/other@main"  # loading it says what is wrong


def test_a_broken_run_goes_on_and_ends_with_the_same_weights(
    score: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert score("name=whole").code == 0
    step = FinetuningModule.training_step

    def breaks(self: FinetuningModule, batch: Any, batch_idx: int) -> Any:
        if self.trainer.global_step == 14:  # in the second epoch of ten steps
            raise RuntimeError("the power went out")
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patched:
        patched.setattr(FinetuningModule, "training_step", breaks)
        assert "the power went out" in score("name=broken").err
    assert not list(tmp_path.glob("outputs/evaluate/broken/**/results.json"))
    assert score("name=broken").code == 0
    whole, broken = (
        load_file(only(tmp_path, f"outputs/evaluate/{name}/sst2/*/model/model.safetensors"))
        for name in ("whole", "broken")
    )
    assert whole.keys() == broken.keys()
    assert all(torch.equal(whole[name], broken[name]) for name in whole)
    first, second = (result(tmp_path / "outputs/evaluate" / name) for name in ("whole", "broken"))
    assert first.cost["tokens"] == second.cost["tokens"]


def test_seeds_differ_and_a_seed_repeats(score: Callable[..., Outcome], tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert score(f"name={name}", f"seed={seed}", "finetune.epochs=1").code == 0
    weights = [load_file(only(tmp_path, f"outputs/evaluate/{name}/sst2/*/model/model.safetensors")) for name in "abc"]
    same, other = (
        all(torch.equal(weights[0][key], each[key]) for key in weights[0]) for each in (weights[1], weights[2])
    )
    assert (same, other) == (True, False)


def test_a_second_distillation_follows_its_teacher(
    score: Callable[..., Outcome], save_teacher: Callable[..., Path], tmp_path: Path
) -> None:
    """On labels that are all wrong, the student says what the teacher says."""
    teacher = save_teacher("bert", num_layers=2)
    assert score("finetune.epochs=6", "name=teacher", model=teacher).code == 0
    folder = only(tmp_path, "outputs/evaluate/teacher/sst2/*/model")
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    source = tmp_path / "source"
    write_rows(source)
    for name in ("train", "dev"):
        lines = (source / f"{name}.tsv").read_text("utf-8").splitlines()
        turned = [line[:-1] + str(1 - int(line[-1])) for line in lines[1:]] if name == "train" else lines[1:]
        (wrong / f"{name}.tsv").write_text("\n".join([lines[0], *turned]) + "\n", "utf-8")
    common = (f"task.data_dir={wrong}", "finetune.epochs=6")
    done = score(*common, f"teacher={folder}", "distil.alpha_task=0", "distil.alpha_ce=1", "name=student")
    assert done.code == 0, done.err
    assert score(*common, "name=alone").code == 0
    student, alone = (result(tmp_path / "outputs/evaluate" / name) for name in ("student", "alone"))
    assert student.score > 0.8 > 0.4 > alone.score
    assert student.teacher == {"name": str(folder), "alpha_task": 0, "alpha_ce": 1, "temperature": 2.0}
    assert alone.teacher is None


def test_early_stopping_takes_the_best_epoch_by_held_out_rows(score: Callable[..., Outcome], tmp_path: Path) -> None:
    done = score("finetune.epochs=40", "finetune.patience=2", "finetune.held_out=0.25", "finetune.lr=1e-2")
    assert done.code == 0, done.err
    found = result(tmp_path)
    assert found.details["train_rows"] == 120
    assert 0.5 < found.held_out <= 1
    held_out = read_rows(found.folder, "held_out")
    assert held_out is not None and len(held_out) == len(set(held_out.ids)) == 40
    assert measure(["accuracy"], held_out) == {"accuracy": found.held_out}
    one = 120 * 9  # tokens of an epoch at most
    assert found.cost["tokens"] < 30 * one  # it stopped before its forty epochs
    assert not list(tmp_path.glob("**/*.ckpt"))


def test_held_out_rows_are_the_same_for_every_setting() -> None:
    rows = list(range(100))
    kept, held = hold_out(rows, 0.1)
    assert len(held) == 10 and sorted(kept + held) == rows
    assert held != rows[:10]
    assert hold_out(rows, 0.1) == (kept, held)
    assert hold_out(rows, 0.0) == (rows, [])


def test_questions_on_one_paragraph_are_held_out_together() -> None:
    rows = [SimpleNamespace(context=f"paragraph {index // 5}", index=index) for index in range(100)]
    kept, held = hold_out(rows, 0.2)
    assert len(kept) + len(held) == 100 and len(held) >= 20
    assert not {row.context for row in kept} & {row.context for row in held}


def test_early_stopping_resumed_takes_the_epoch_that_an_unbroken_run_takes(
    score: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first epoch is the best; a run that breaks in the second must not forget it."""
    settings = ("finetune.epochs=4", "finetune.patience=3", "finetune.held_out=0.25", "finetune.lr=1e-3")
    by_epoch = {0: 0.9, 1: 0.6, 2: 0.8, 3: 0.5}

    def log_fixed(self: FinetuningModule) -> None:
        self.log("held_out", by_epoch[self.current_epoch])

    monkeypatch.setattr(FinetuningModule, "on_validation_epoch_end", log_fixed)
    step = FinetuningModule.training_step

    def breaks(self: FinetuningModule, batch: Any, batch_idx: int) -> Any:
        if self.current_epoch == 1 and batch_idx == 3:
            raise RuntimeError("the power went out")
        return step(self, batch, batch_idx)

    assert score("name=whole", *settings).code == 0
    with monkeypatch.context() as patched:
        patched.setattr(FinetuningModule, "training_step", breaks)
        score("name=broken", *settings)
    assert score("name=broken", *settings).code == 0
    whole, broken = (
        load_file(only(tmp_path, f"outputs/evaluate/{name}/sst2/*/model/model.safetensors"))
        for name in ("whole", "broken")
    )
    assert all(torch.equal(whole[name], broken[name]) for name in whole)


def test_the_precision_of_products_reaches_torch_and_keeps_scores_apart(
    score: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = []
    step = FinetuningModule.training_step

    def spy(module: FinetuningModule, *args: Any) -> Any:
        used.append(torch.get_float32_matmul_precision())
        return step(module, *args)

    monkeypatch.setattr(FinetuningModule, "training_step", spy)
    for precision in ("highest", "high"):
        assert score("finetune.epochs=1", f"matmul_precision={precision}").code == 0
        assert set(used) == {precision}
        used.clear()
    found = read_results([tmp_path])
    assert sorted(str(each.settings.get("matmul_precision")) for each in found) == ["None", "high"]


def test_mixed_precision_clips_and_trains(score: Callable[..., Outcome], tmp_path: Path) -> None:
    done = score("finetune.epochs=1", "trainer.precision=bf16-mixed")
    assert done.code == 0, done.err
    assert result(tmp_path).settings["precision"] == "bf16-mixed"


def test_what_the_trainer_changes_is_another_job(score: Callable[..., Outcome], tmp_path: Path) -> None:
    for overrides in ([], ["trainer.gradient_clip_val=0.01"], ["trainer.log_every_n_steps=3"]):
        assert score("finetune.epochs=1", *overrides).code == 0
    found = read_results([tmp_path])  # how often it logs changes nothing
    assert sorted(each.settings["gradient_clip_val"] for each in found) == [0.01, 1.0]
    assert gather(found).frame["row"].nunique() == 2


def test_a_model_that_was_not_kept_is_trained_again_when_it_is_wanted(
    score: Callable[..., Outcome], tmp_path: Path
) -> None:
    assert score("finetune.epochs=1", "save_model=false").code == 0
    assert not list(tmp_path.glob("outputs/**/model"))
    assert score("finetune.epochs=1").code == 0
    assert only(tmp_path, "outputs/**/model").is_dir()
    assert len(read_results([tmp_path])) == 1


OURS = "---\ntags: [knowledge-distillation, distilkit]\n---\n# mine\n\nText.\n"


@pytest.fixture
def student(save_teacher: Callable[..., Path], tmp_path: Path) -> Path:
    """A student with the start of a card as training writes it."""
    folder = tmp_path / "run" / "student"
    shutil.copytree(save_teacher("distilbert", num_layers=2), folder)
    (folder / "README.md").write_text(OURS, "utf-8")
    return folder


def test_the_folder_that_is_evaluated_is_only_read(
    score: Callable[..., Outcome], student: Path, tmp_path: Path
) -> None:
    before = {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in student.iterdir()}
    assert score("finetune.epochs=1", model=student).code == 0
    assert {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in student.iterdir()} == before


def test_a_card_says_on_which_rows_its_scores_are_and_which_are_partial(
    score: Callable[..., Outcome], student: Path, tmp_path: Path
) -> None:
    for overrides in (["seed=1"], ["seed=2"], ["task.name=some", "task.max_train_rows=50", "task.max_scored_rows=20"]):
        done = score("finetune.epochs=1", "card=true", *overrides, model=student)
        assert done.code == 0, done.err
    card = ModelCard.load(student / "README.md")
    whole, partial = card.text.partition("Partial results, on some of the rows:")[::2]
    how = "(epochs 1, lr 0.002, batch_size 16, max_length 60, precision 32-true)"
    assert f"- SST-2: fine-tuned on 160 rows {how}, scored on 60 dev rows, 2 seeds" in whole
    assert f"- some: fine-tuned on 50 rows {how}, scored on 20 dev rows, 1 seed" in partial
    assert "| some |" not in whole and "| some |" in partial
    assert {each.dataset_type for each in card.data.eval_results} == {"sst2"}


def test_a_card_that_is_not_ours_stays_as_it_is(score: Callable[..., Outcome], student: Path) -> None:
    (student / "README.md").write_text("# Someone else's\n", "utf-8")
    done = score("finetune.epochs=1", "card=true", model=student)
    assert "README.md was not written by distilkit, and stays as it is" in done.out
    assert (student / "README.md").read_text("utf-8") == "# Someone else's\n"


def test_only_a_folder_of_ones_own_has_a_card_to_write_into(
    score: Callable[..., Outcome], student: Path, hub: Callable[[str], None], tmp_path: Path
) -> None:
    hub("a" * 40)
    snapshot = tmp_path / "hub" / "models--org--mine" / "snapshots" / ("a" * 40)
    shutil.move(student / "README.md", tmp_path / "hub" / "models--org--mine" / "README.md")
    (snapshot / "README.md").symlink_to("../../README.md")
    for model in ("org/mine", snapshot, student):  # a hub id, a folder of its cache, and one without a card
        done = score("card=true", model=model)
        assert done.code == 1
        assert f"card=true writes scores into README.md of model={model}, but that is no folder of yours" in done.err


def test_weights_cut_short_are_named(
    score: Callable[..., Outcome], save_teacher: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tmp_path / "cut"
    shutil.copytree(save_teacher("distilbert", num_layers=2), folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    done = score(model=folder)
    assert (done.code, "Traceback" in done.err) == (1, False)
    assert f"cannot load folder '{folder}'" in done.err


def test_a_finetuned_model_is_scored_without_training(score: Callable[..., Outcome], tmp_path: Path) -> None:
    assert score("finetune.epochs=4", "name=tuned").code == 0
    folder = only(tmp_path, "outputs/evaluate/tuned/sst2/*/model")
    assert score("finetune.epochs=0", "name=again", model=folder).code == 0
    tuned, again = (result(tmp_path / "outputs/evaluate" / name) for name in ("tuned", "again"))
    assert again.score == tuned.score
    assert 0 < again.cost["tokens"] < tuned.cost["tokens"] / 4
    copy = tmp_path / "copy"  # the files, and nothing else, decide
    shutil.copytree(folder, copy)
    assert score("finetune.epochs=0", "name=copied", model=copy).code == 0
    assert result(tmp_path / "outputs/evaluate/copied").score == tuned.score


@pytest.mark.parametrize("model_type", ["bert", "roberta", "electra", "modernbert", "gpt2"])
def test_every_family_is_finetuned(
    model_type: str, score: Callable[..., Outcome], save_teacher: Callable[..., Path], tmp_path: Path
) -> None:
    done = score("finetune.epochs=1", model=save_teacher(model_type, num_layers=2))
    assert done.code == 0, done.err
    assert result(tmp_path).model_type == model_type


def test_the_id_of_a_job_survives_a_move_of_its_classes() -> None:
    def id_of(*overrides: str) -> str:
        with initialize_config_module("distilkit.conf.evaluate", version_base="1.3"):
            cfg = compose("evaluate", ["model=m", "task=rte", *overrides])
        return job_id(cfg, ids={"model": "0"})

    before = id_of()
    for same in ("task._target_=elsewhere.TextTask", "trainer._target_=Trainer", "trainer.accelerator=cpu", "seed=7"):
        assert id_of(same) == before
    tuned = [id_of("task=wikitext103", f"task.train.paths={path}", "task.device=cpu") for path in ("a.txt", "./a.txt")]
    assert len(set(tuned)) == 1 and id_of("task=wikitext103", "task.train.max_tokens=9") not in tuned
    for other in ("task._target_=elsewhere.MyTask", "finetune.lr=1e-3", "task.max_length=9", "matmul_precision=high"):
        assert id_of(other) != before


def test_batches_hold_like_lengths_and_every_row_once_an_epoch(tokenizer: PreTrainedTokenizerBase) -> None:
    rng = random.Random(0)
    features = [{"input_ids": [7] * rng.randint(3, 60), "target": index} for index in range(200)]
    for feature in features:
        feature["attention_mask"] = [1] * len(feature["input_ids"])
        feature["token_type_ids"] = [0] * len(feature["input_ids"])
    data = Batches(train=features, held_out=[], held_out_examples=[], tokenizer=tokenizer, batch_size=8, seed=0)
    batches = list(data.train_dataloader())
    assert sorted(torch.cat([batch["target"] for batch in batches]).tolist()) == list(range(200))
    padded = sum(batch["input_ids"].numel() for batch in batches)
    real = sum(int(batch["attention_mask"].sum()) for batch in batches)
    assert real == sum(len(feature["input_ids"]) for feature in features)
    assert padded < 1.3 * real  # in random batches it is 1.8 times as much
    rows = [row for batch in data.ordered(features) for row in batch["row"].tolist()]
    assert sorted(rows) == list(range(200)) and rows != sorted(rows)


# ------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["task=nothing"], "Could not find 'task/nothing'"),
        (["finetune.lr=0"], "finetune.lr=0, but it must be a number above 0"),
        (["finetune.batch_size=0"], "finetune.batch_size=0, but it must be a whole number of at least 1"),
        (["finetune.held_out=1"], "finetune.held_out=1, but it must be a number of at least 0 and at most 0.9"),
        (["finetune.held_out=0.001"], "of 160 training rows leaves one side empty"),
        (["finetune.patience=2"], "finetune.patience=2 needs held-out rows, but finetune.held_out=0.0; set"),
        (["finetune.patience=0", "finetune.held_out=0.1"], "finetune.patience=0, but it must be a whole number of at"),
        (["finetune.epochs=three"], "finetune.epochs=three, but it must be a whole number of at least 0"),
        (["finetune.lr=null"], "finetune.lr=None, but it must be a number above 0"),
        (["finetune.epochs=0.5"], "finetune.epochs=0.5, but it must be a whole number of at least 0"),
        (["finetune.warmup_share=2"], "finetune.warmup_share=2, but it must be a number of at least 0 and at most 1"),
        (["distil.alpha_task=0", "distil.alpha_ce=0"], "distil.alpha_task=0 and distil.alpha_ce=0 leave no loss"),
        (["seed=-1"], "seed=-1, but it must be a whole number of at least 0"),
        (["finetune.epochs=0", "teacher=x"], "finetune.epochs=0 trains nothing, so a teacher has no effect"),
        (["task.max_length=128"], "has 64 positions; set task.max_length=64 or less"),
        (["distil.temperature=0"], "distil.temperature=0, but it must be a number above 0"),
        (["+finetune.learning_rate=1"], "finetune.learning_rate is unknown; finetune takes lr, batch_size"),
        (["task.max_length=2"], "task.max_length=2"),
        (["task.name=../x"], "task.name=../x, but it names a folder in output_dir; give a name without /"),
        (["name=../x"], "name=../x, but it names a folder in output_dir; give a name without .."),
        (["name=/x"], "name=/x, but it names a folder in output_dir"),
        (["task.files.scored.dev=null"], "task.files.scored or task.hub.scored names no split to score; name one"),
        (["task.metrics=[f1_marco]"], "'f1_marco' is no metric; near it are f1_macro"),
        (["task.data_dir=nowhere"], "task.data_dir=nowhere is no folder"),
        (["trainer.devices=2"], "a model is fine-tuned on one device; set trainer.devices=1"),
        (["teacher=nowhere/at-all"], "cannot load hub id 'nowhere/at-all'"),
        (["tokenizer=nowhere/at-all"], "cannot load a tokenizer from 'nowhere/at-all'"),
    ],
)
def test_wrong_settings_end_with_one_message(
    overrides: list[str], message: str, score: Callable[..., Outcome], tmp_path: Path
) -> None:
    done = score(*overrides)
    assert done.code == 1
    assert message in done.err
    assert "Traceback" not in done.err
    assert not list(tmp_path.glob("outputs/**/results.json"))


def test_a_folder_that_is_no_model_is_named(score: Callable[..., Outcome], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    done = score(model=tmp_path / "empty")
    assert done.code == 1
    assert "has no config.json or no .safetensors" in done.err


def test_a_model_without_a_tokenizer_says_where_to_get_one(
    score: Callable[..., Outcome], save_teacher: Callable[..., Path], tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    build_model("distilbert", num_layers=1).save_pretrained(bare)
    done = score(model=bare)
    assert done.code == 1
    assert "or name another with tokenizer=<folder or hub id>" in done.err
    done = score(f"tokenizer={save_teacher('distilbert', num_layers=2)}", "finetune.epochs=1", model=bare)
    assert done.code == 0, done.err


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(
    score: Callable[..., Outcome], tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    folder = tmp_path / "small"
    build_model("distilbert", num_layers=1, vocab_size=50).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    done = score(model=folder)
    assert done.code == 1
    assert f"has {len(tokenizer)} words, but the model '{folder}' only 50" in done.err


def test_a_model_that_is_not_finetuned_is_neither_scored_nor_a_teacher(
    score: Callable[..., Outcome], save_teacher: Callable[..., Path]
) -> None:
    for overrides in (["finetune.epochs=0"], [f"teacher={save_teacher('bert', num_layers=2)}"]):
        done = score(*overrides)
        assert done.code == 1
        assert "has no weights for" in done.err and "fine-tune it first" in done.err


def test_a_teacher_of_another_vocabulary_is_refused(
    score: Callable[..., Outcome], tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    assert score("finetune.epochs=1", "name=t").code == 0
    folder = only(tmp_path, "outputs/evaluate/t/sst2/*/model")
    file = folder / "tokenizer.json"
    content = file.read_text("utf-8")
    file.write_text(content.replace('"ba":', '"qqq":', 1), "utf-8")
    done = score(f"teacher={folder}", "name=s")
    assert done.code == 1
    assert "has another vocabulary" in done.err
