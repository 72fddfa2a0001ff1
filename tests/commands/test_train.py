"""The command lines from end to end: what a run writes, how it resumes, and that two ranks give the same."""

import json
import re
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import torch
import torch.nn.functional as F
import yaml
from hydra.utils import instantiate
from omegaconf import OmegaConf
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    DistilBertForMaskedLM,
    DistilBertModel,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    RobertaModel,
    pipeline,
)

import distilkit
import distilkit.data.cache
import distilkit.export.__main__
import distilkit.prepare
import distilkit.train
from distilkit.module import DistillationModule
from distilkit.records import read_metrics, read_rows
from jobs import QUIET, SMALL, Outcome, call, only, spawn
from watched import history, records

CHECKOUT = Path(__file__).parents[2]
Train = Callable[..., Path]


@dataclass(frozen=True, kw_only=True)
class Run:
    """A finished run: its folder, and what its command line printed."""

    folder: Path
    outcome: Outcome

    @property
    def summary(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.folder / "summary.json").read_text("utf-8"))
        return content


@pytest.fixture
def train(tmp_path: Path, text_file: Path, cache: Path) -> Train:
    """Train in this process and return the run's folder; ``name`` keeps several runs of a test apart."""

    def go(*overrides: str, name: str = "run") -> Path:
        paths = f"data.corpus.paths={text_file}", f"cache_dir={cache}"
        before = set(tmp_path.glob(f"outputs/{name}/*"))
        done = call(distilkit.train.main, *SMALL, *QUIET, *paths, f"name={name}", *overrides, cwd=tmp_path)
        assert (done.code, "Traceback" in done.err) == (0, False), done.err
        (folder,) = set(tmp_path.glob(f"outputs/{name}/*")) - before
        return folder

    return go


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory, save_teacher: Callable[..., Path], text_file: Path, cache: Path
) -> Run:
    """Distil a tiny BERT from a folder that has nothing to do with the checkout."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    outcome = spawn(
        "-m",
        "distilkit.train",
        "teacher=hf",
        f"teacher.name={save_teacher('bert')}",
        *SMALL,
        f"data.corpus.paths={text_file}",
        f"cache_dir={cache}",
        "trainer.max_steps=6",
        "callbacks.validation.optimizer_steps=2",
        "optimizer.lr=0.01",
        cwd=elsewhere,
    )
    assert outcome.code == 0, outcome.err
    return Run(folder=only(elsewhere, "outputs/distil/*"), outcome=outcome)


# ------------------------------------------------------------------ what a run leaves behind


def test_a_run_leaves_its_files_in_one_folder(run: Run) -> None:
    assert {file.name for file in run.folder.iterdir()} >= {
        "config.yaml",
        "checkpoints",
        "metrics.csv",
        "loss_curves.png",
        "student",
        "summary.json",
        "train.log",
    }
    assert {file.name for file in (run.folder / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt", "last-1.ckpt"}
    assert {file.name for file in (run.folder / "student").iterdir()} >= {
        "config.json",
        "model.safetensors",
        "README.md",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert [path for path in run.folder.rglob("*") if path.suffix == ".tmp" or ".tmp" in path.name] == []
    assert {path.name for path in run.folder.parents[2].iterdir()} == {"outputs"}


def test_a_run_says_where_the_student_is_and_raises_no_alarm(run: Run) -> None:
    assert f"student: {run.folder / 'student'}" in run.outcome.out
    assert "Traceback" not in run.outcome.err
    assert "Warning" not in run.outcome.err, run.outcome.err


def test_the_saved_config_is_complete_and_resolved(run: Run, save_teacher: Callable[..., Path]) -> None:
    text = (run.folder / "config.yaml").read_text("utf-8")
    assert "${" not in text
    assert "???" not in text
    config = yaml.safe_load(text)
    assert config["teacher"]["name"] == config["tokenizer"]["name"] == str(save_teacher("bert"))
    assert config["output_dir"] == config["logger"]["csv"]["save_dir"] == str(run.folder)
    assert (config["trainer"]["max_steps"], config["data"]["block_size"], config["optimizer"]["lr"]) == (6, 32, 0.01)


def test_the_summary_has_every_field_and_counts_right(run: Run, save_teacher: Callable[..., Path]) -> None:
    summary = run.summary
    assert set(summary) == {
        "name",
        "version",
        "teacher",
        "objective",
        "architecture",
        "layers",
        "layer_choice",
        "data",
        "packing",
        "block_size",
        "global_batch_size",
        "metadata",
        "student_parameters",
        "teacher_parameters",
        "optimizer_steps",
        "tokens_seen",
        "tokens_per_second",
        "wall_seconds",
        "training_seconds",
        "budget_seconds",
        "spikes",
        "skipped_steps",
        "machine",
        "peak_memory_mb",
        "input_forms",
        "before",
        "after",
        "intervals",
        "baseline_after",
        "verdict",
        "versions",
    }
    assert summary["teacher"]["name"] == str(save_teacher("bert"))
    assert re.fullmatch(r"[0-9a-f]{64}", summary["teacher"]["sha256"])
    teacher = AutoModelForMaskedLM.from_pretrained(save_teacher("bert"))
    student = DistilBertForMaskedLM.from_pretrained(run.folder / "student")
    assert summary["teacher_parameters"] == sum(parameter.numel() for parameter in teacher.parameters())
    assert summary["student_parameters"] == sum(parameter.numel() for parameter in student.parameters())
    assert (summary["optimizer_steps"], summary["tokens_seen"]) == (6, 6 * 16 * 32)
    assert summary["tokens_per_second"] > 0
    assert summary["wall_seconds"] > 0
    assert 0 < summary["training_seconds"] <= summary["wall_seconds"] + 0.1
    assert summary["budget_seconds"] is None
    assert (summary["spikes"], summary["skipped_steps"]) == ({"loss": 0, "gradient_norm": 0}, 0)
    assert summary["peak_memory_mb"]["host"] > 100
    assert summary["versions"]["torch"] == torch.__version__
    assert summary["input_forms"]["sequences"] > 8
    assert set(summary["input_forms"]["nll"]) == {"blocks", "documents"}
    expected = {
        "loss",
        "loss_ce",
        "loss_mlm",
        "loss_cos",
        "nll",
        "perplexity",
        "accuracy",
        "teacher_nll",
        "teacher_perplexity",
        "teacher_accuracy",
        "agreement",
    }
    assert set(summary["after"]) == set(summary["before"]) == {f"val/{name}" for name in expected}
    for name in ("teacher_nll", "teacher_accuracy"):  # the teacher is frozen
        assert summary["before"][f"val/{name}"] == summary["after"][f"val/{name}"]
    assert summary["after"]["val/loss"] < summary["before"]["val/loss"]


def test_the_student_in_the_folder_is_the_one_that_was_scored(run: Run) -> None:
    """Score student/ once more, with a plain loop over the held-out blocks."""
    config = OmegaConf.load(run.folder / "config.yaml")
    tokenizer = AutoTokenizer.from_pretrained(run.folder / "student")
    data = instantiate(config.data, tokenizer=tokenizer, lm="mlm")
    data.setup()
    model = DistilBertForMaskedLM.from_pretrained(run.folder / "student").eval()
    total, hits, count = 0.0, 0, 0
    for batch in data.val_dataloader():
        with torch.no_grad():
            logits = model(input_ids=batch["input_ids"], attention_mask=batch.get("attention_mask")).logits
        chosen = batch["labels"] != -100
        total += F.cross_entropy(logits[chosen], batch["labels"][chosen], reduction="sum").item()
        hits += int((logits[chosen].argmax(-1) == batch["labels"][chosen]).sum())
        count += int(chosen.sum())
    assert count > 20
    assert run.summary["after"]["val/nll"] == pytest.approx(total / count, rel=1e-5)
    assert run.summary["after"]["val/accuracy"] == pytest.approx(hits / count, rel=1e-5)


def test_the_metrics_hold_each_step_and_each_validation(run: Run) -> None:
    curves = read_metrics(run.folder / "metrics.csv")
    assert [step for step, _ in curves["train/loss"]] == [1, 2, 3, 4, 5, 6]
    logged = {"train/loss_ce", "train/loss_mlm", "train/loss_cos", "train/lr"}
    logged |= {"train/gradient_norm", "train/spikes_loss", "train/spikes_gradient_norm"}
    assert logged | {"throughput/tokens_per_second", "throughput/mfu"} <= set(curves)
    assert [step for step, _ in curves["val/nll"]] == [0, 2, 4, 6]  # before, then after every second step
    weighted = [
        5 * ce + 2 * mlm + cos
        for (_, ce), (_, mlm), (_, cos) in zip(
            curves["train/loss_ce"], curves["train/loss_mlm"], curves["train/loss_cos"], strict=True
        )
    ]
    assert [loss for _, loss in curves["train/loss"]] == pytest.approx(weighted, rel=1e-4)


def test_speed_and_memory_options_reach_the_models(
    train: Train, save_teacher: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {"compiled": []}

    def spy(module: DistillationModule, *args: Any) -> torch.Tensor:
        seen["checkpoints"] = module.student.is_gradient_checkpointing
        seen["precision"] = torch.get_float32_matmul_precision()
        return step(module, *args)

    step = DistillationModule.training_step
    monkeypatch.setattr(DistillationModule, "training_step", spy)
    monkeypatch.setattr(distilkit.train, "compile_backbone", lambda model: seen["compiled"].append(model.name_or_path))
    teacher = save_teacher("bert")
    given = "compile=true", "activation_checkpointing=true", "matmul_precision=high", "trainer.max_steps=1"
    train("teacher=hf", f"teacher.name={teacher}", *given)
    assert len(seen["compiled"]) == 2 and str(teacher) in seen["compiled"]
    assert seen["checkpoints"]
    assert seen["precision"] == "high"


def test_the_sharding_of_lightning_is_refused_and_ours_named(
    save_teacher: Callable[..., Path], text_file: Path, cache: Path, tmp_path: Path
) -> None:
    given = "teacher=hf", f"teacher.name={save_teacher('bert')}", f"data.corpus.paths={text_file}", f"cache_dir={cache}"
    other = "trainer.strategy={_target_: pytorch_lightning.strategies.ModelParallelStrategy}"
    done = call(distilkit.train.main, *SMALL, *QUIET, *given, other, cwd=tmp_path)
    assert done.code == 1
    assert re.search("trainer.strategy=.*ModelParallelStrategy.* is not supported; set trainer=fsdp to shard", done.err)
    copies = "trainer.strategy=ddp_fork", "trainer.devices=2"
    done = call(distilkit.train.main, *SMALL, *QUIET, *given, *copies, cwd=tmp_path)
    assert done.code == 1
    assert "trainer.strategy=ddp_fork trains in copies of this process, which cannot export from them" in done.err


def test_a_run_without_held_out_scores_says_so_and_writes_its_student(
    train: Train, save_teacher: Callable[..., Path]
) -> None:
    few = "teacher=hf", f"teacher.name={save_teacher('bert')}", "trainer.max_steps=1"
    folder = train(*few, "+trainer.limit_val_batches=0")
    assert "trainer.limit_val_batches=0: the student is never scored" in only(folder, "*.log").read_text("utf-8")
    assert (folder / "student" / "model.safetensors").is_file()
    assert summary_of(folder)["after"] == {}
    without = train(*few, "callbacks.validation=null", name="without")
    assert summary_of(without)["after"]["val/nll"] > 0


def test_a_limit_of_time_is_given_in_lightnings_own_form(train: Train, save_teacher: Callable[..., Path]) -> None:
    few = "teacher=hf", f"teacher.name={save_teacher('bert')}", "trainer.max_steps=1", "validate_first=false"
    clock = "callbacks.checkpoint.train_time_interval={_target_: datetime.timedelta, minutes: 9}"
    folder = train(*few, "+trainer.max_time={seconds: 300}", clock)
    assert summary_of(folder)["optimizer_steps"] == 1


def test_max_steps_decides_alone_unless_epochs_are_given_too(train: Train, save_teacher: Callable[..., Path]) -> None:
    few = "teacher=hf", f"teacher.name={save_teacher('distilbert', num_layers=2)}", "student.layers=[0]"
    many = *few, "trainer.max_steps=50", "data.global_batch_size=256", "data.micro_batch_size=256"
    assert summary_of(train(*many))["optimizer_steps"] == 50  # of 2 an epoch
    assert summary_of(train(*many, "trainer.max_epochs=2", name="both"))["optimizer_steps"] == 4


def test_the_best_checkpoint_is_the_one_with_the_lowest_held_out_loss(run: Run) -> None:
    in_training = read_metrics(run.folder / "metrics.csv")["val/loss"][1:]
    best = torch.load(run.folder / "checkpoints" / "best.ckpt", weights_only=True)
    lowest = min(range(len(in_training)), key=lambda index: in_training[index][1])
    assert best["global_step"] == [2, 4, 6][lowest]
    assert torch.load(run.folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 6


def test_a_checkpoint_leaves_the_teacher_out(run: Run) -> None:
    state = torch.load(run.folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert {name.split(".")[0] for name in state} == {"student"}


def test_the_loss_curves_are_a_picture_with_something_on_it(run: Run) -> None:
    picture = matplotlib.image.imread(run.folder / "loss_curves.png")
    height, width, _ = picture.shape
    assert 300 < height < 1500
    assert 900 < width < 3000
    coloured = picture[..., :3].max(axis=-1) - picture[..., :3].min(axis=-1) > 0.3
    assert coloured[:, : width // 3].mean() > 0.001  # the terms of the loss
    assert coloured[:, width // 3 :].mean() > 0.0005  # the held-out metrics


def test_the_model_card_says_how_the_student_was_made(run: Run, save_teacher: Callable[..., Path]) -> None:
    card = (run.folder / "student" / "README.md").read_text("utf-8")
    _, head, body = card.split("---\n", 2)
    metadata = yaml.safe_load(head)
    (index,) = metadata.pop("model-index")
    assert metadata == {
        "library_name": "transformers",
        "pipeline_tag": "fill-mask",
        "tags": ["knowledge-distillation", "distilkit"],
    }
    metrics = [metric for result in index["results"] for metric in result["metrics"]]
    assert [metric["type"] for metric in metrics] == ["nll", "perplexity", "accuracy"]
    assert metrics[0]["value"] == round(run.summary["after"]["val/nll"], 4)
    for fact in (
        f"distilled from `{save_teacher('bert').name}` (58,718 parameters) with distilkit",
        "A DistilBertForMaskedLM of",
        "| layers kept | [0, 2, 5] |",
        "alpha_ce 5.0, alpha_mlm 2.0, alpha_cos 1.0, temperature 2.0, soft_targets all",
        "| data | text files",
        "| block size | 32 tokens, 16 blocks a step |",
        "| tokens seen | 3,072 |",
        f"| hardware | {run.summary['machine']}, precision 32-true |",
        "| chosen by | `student.layers=half`: at equal distances from the first to the last |",
        "| held-out text | teacher | before training | this model |",
        f"| agreement with the teacher |  | {run.summary['before']['val/agreement']:.4f} | ",
    ):
        assert fact in body


# ------------------------------------------------------------------------- loading students


def test_a_bert_teachers_student_loads_as_a_distilbert_and_fills_a_mask(run: Run) -> None:
    folder = run.folder / "student"
    weights = load_file(folder / "model.safetensors")
    for load in (DistilBertForMaskedLM, AutoModelForMaskedLM):
        model, info = load.from_pretrained(folder, output_loading_info=True)
        assert isinstance(model, DistilBertForMaskedLM)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert torch.equal(model.vocab_transform.weight, weights["vocab_transform.weight"])
    backbone = DistilBertModel.from_pretrained(folder)
    assert torch.equal(
        backbone.transformer.layer[2].ffn.lin1.weight, weights["distilbert.transformer.layer.2.ffn.lin1.weight"]
    )
    answers = pipeline("fill-mask", model=str(folder))("ba be [MASK] bo bu", top_k=3)
    assert len(answers) == 3
    assert answers[0]["score"] >= answers[1]["score"] > 0


def test_the_students_of_gpt2_and_roberta_load_by_their_own_classes(
    train: Train, save_teacher: Callable[..., Path], tmp_path: Path
) -> None:
    few = "teacher=hf", "trainer.max_steps=1", "validate_first=false"
    gpt2 = train(*few, f"teacher.name={save_teacher('gpt2')}", "objective=distilgpt2", name="gpt2")
    model, info = GPT2LMHeadModel.from_pretrained(gpt2 / "student", output_loading_info=True)
    assert not info["missing_keys"]
    assert model.config.n_layer == 3
    tokenizer = AutoTokenizer.from_pretrained(gpt2 / "student")
    written = model.generate(**tokenizer("ba be", return_tensors="pt"), max_new_tokens=3, pad_token_id=0)
    assert written.shape == (1, 5)
    distilkit.export.export_checkpoint(gpt2 / "checkpoints" / "last.ckpt", tmp_path / "exported")
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path / "exported"), GPT2LMHeadModel)
    expected, exported = (load_file(path / "model.safetensors") for path in (gpt2 / "student", tmp_path / "exported"))
    assert expected.keys() == exported.keys()
    assert all(torch.equal(expected[name], exported[name]) for name in expected)
    roberta = train(*few, f"teacher.name={save_teacher('roberta')}", "student=third_depth", name="roberta")
    assert RobertaModel.from_pretrained(roberta / "student").config.num_hidden_layers == 2


@pytest.mark.parametrize(("tokenizer", "mask"), [("wordpiece", "[MASK]"), ("bpe", "<mask>")])
def test_a_teacher_is_trained_from_nothing_with_a_tokenizer_of_its_own(tokenizer: str, mask: str, train: Train) -> None:
    folder = train(
        "teacher=none",
        "student=new",
        "student.config={hidden_size: 16, num_attention_heads: 2, num_hidden_layers: 2, intermediate_size: 32}",
        "objective=mlm",
        f"tokenizer={tokenizer}",
        "tokenizer.vocab_size=300",
        "trainer.max_steps=2",
    )
    summary = json.loads((folder / "summary.json").read_text("utf-8"))
    assert summary["teacher"] is None
    assert summary["layers"] is None
    assert summary["objective"] == {"alpha_mlm": 1.0}
    assert "trained without a teacher" in (folder / "student" / "README.md").read_text("utf-8")
    trained = AutoTokenizer.from_pretrained(folder / "student")
    assert trained.mask_token == mask
    model = AutoModelForMaskedLM.from_pretrained(folder / "student")
    assert model.config.vocab_size == len(trained)
    # And it is a teacher: its student is cut from it.
    again = train("teacher=hf", f"teacher.name={folder / 'student'}", "trainer.max_steps=1", name="student")
    assert json.loads((again / "summary.json").read_text("utf-8"))["layers"] == [0]


@pytest.mark.parametrize("teacher, kind", [("bert", "bert"), ("modernbert", "bert"), ("gpt2", "gpt2")])
def test_relations_train_a_student_of_another_width_depth_and_number_of_heads(
    train: Train, save_teacher: Callable[..., Path], teacher: str, kind: str
) -> None:
    shape = "hidden_size: 24, num_attention_heads: 3, num_hidden_layers: 2, intermediate_size: 48"
    if kind == "gpt2":
        shape = "n_embd: 24, n_head: 3, n_layer: 2, n_positions: 64"
    folder = train(
        "teacher=hf",
        f"teacher.name={save_teacher(teacher)}",
        "student=new",
        f"student.model_type={kind}",
        f"student.config={{{shape}}}",
        "objective=minilm",
        "objective.relation_heads=4",
        "trainer.max_steps=12",
        "optimizer.lr=0.01",
    )
    summary = json.loads((folder / "summary.json").read_text("utf-8"))
    layers = {"relation_heads": 4, "student_layer": 1, "teacher_layer": 5}
    assert summary["objective"] == {"alpha_rel": 1.0, **layers}
    assert summary["after"]["val/loss_rel"] < 0.9 * summary["before"]["val/loss_rel"]
    card = (folder / "student" / "README.md").read_text("utf-8")
    assert "by the method of [MiniLMv2](https://arxiv.org/abs/2012.15828)" in card and "relation_heads 4" in card
    auto = AutoModelForCausalLM if kind == "gpt2" else AutoModelForMaskedLM
    model = auto.from_pretrained(folder / "student")
    assert (model.config.hidden_size, model.config.num_hidden_layers, model.config.num_attention_heads) == (24, 2, 3)


def test_an_existing_student_is_distilled_further_from_its_own_weights(
    train: Train, run: Run, save_teacher: Callable[..., Path]
) -> None:
    folder = train(
        "teacher=hf",
        f"teacher.name={save_teacher('bert')}",
        "student=hf",
        f"student.name={run.folder / 'student'}",
        "trainer.max_steps=1",
    )
    summary = json.loads((folder / "summary.json").read_text("utf-8"))
    assert summary["before"] == pytest.approx(run.summary["after"], rel=1e-5)


# ------------------------------------------------------------------------------- going on


@pytest.mark.parametrize(
    ("batch", "every", "broken_off"),
    [
        pytest.param((16, 8), 2, 5, id="within the first epoch"),
        pytest.param((100, 50), 2, 5, id="within the second epoch, after a last step with fewer micro-batches"),
        pytest.param((100, 50), 3, 4, id="at the end of an epoch"),
    ],
)
def test_a_run_that_broke_off_and_was_resumed_ends_with_the_weights_of_an_unbroken_one(
    batch: tuple[int, int], every: int, broken_off: int, train: Train, tmp_path: Path, save_teacher: Callable[..., Path]
) -> None:
    settings = (
        "teacher=hf",
        f"teacher.name={save_teacher('bert')}",  # with dropout
        f"data.global_batch_size={batch[0]}",
        f"data.micro_batch_size={batch[1]}",
        "data.val_share=0.5",
        "trainer.max_steps=6",
        f"callbacks.validation.optimizer_steps={every}",
    )
    unbroken = train(*settings, name="unbroken")
    with pytest.raises(AssertionError, match="the power went out"):
        train(*settings, f"+callbacks.stop={{_target_: jobs.StopAfter, step: {broken_off}}}", name="broken")
    broken = only(tmp_path, "outputs/broken/*")
    assert not (broken / "student").exists()
    saved = torch.load(broken / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == broken_off - broken_off % every
    resumed = train(*settings, "ckpt_path=last", name="broken")
    expected = load_file(unbroken / "student" / "model.safetensors")
    actual = load_file(resumed / "student" / "model.safetensors")
    assert expected.keys() == actual.keys()
    for name in expected:
        assert torch.equal(expected[name], actual[name]), name
    fields = "tokens_seen", "optimizer_steps", "before", "after", "verdict"
    summaries = [json.loads((folder / "summary.json").read_text("utf-8")) for folder in (unbroken, resumed)]
    assert [summaries[0][field] for field in fields] == [summaries[1][field] for field in fields]


def test_the_last_checkpoint_is_the_newest_where_the_held_out_loss_got_no_better(
    train: Train, save_teacher: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(AssertionError, match="the power went out"):
        train(
            "teacher=hf",
            f"teacher.name={save_teacher('bert')}",
            "trainer.max_steps=6",
            "callbacks.validation.optimizer_steps=2",
            "callbacks.checkpoint.mode=max",  # so that the first is the best
            "+callbacks.stop={_target_: jobs.StopAfter, step: 5}",
            "validate_first=false",
            "optimizer.lr=0.01",
        )
    steps = {
        name: torch.load(only(tmp_path, f"outputs/run/*/checkpoints/{name}.ckpt"), weights_only=True)["global_step"]
        for name in ("best", "last")
    }
    assert steps == {"best": 2, "last": 4}


def test_a_folder_below_home_with_brackets_is_made_and_printed_as_it_is(
    tmp_path: Path, text_file: Path, cache: Path, save_teacher: Callable[..., Path]
) -> None:
    few = "teacher=hf", f"teacher.name={save_teacher('bert')}", "trainer.max_steps=1", "validate_first=false"
    korean = tmp_path / "ko.txt"  # which a C locale cannot print
    korean.write_text(text_file.read_text("utf-8").replace("ba", "나는"), "utf-8")
    given = *few, *SMALL, f"data.corpus.paths={korean}", f"cache_dir={cache}", 'hydra.run.dir="~/run [v2]"'
    locale = {"HOME": str(tmp_path), "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = spawn("-m", "distilkit.train", *given, cwd=cache, environment={**locale, "PYTHONIOENCODING": None})
    assert done.code == 0, done.err
    assert "Logging error" not in done.err
    assert f"student: {tmp_path}/run [v2]/student" in done.out.splitlines()
    assert (tmp_path / "run [v2]" / "student").is_dir()
    assert not (cache / "~").exists()


def test_two_runs_in_a_row_have_folders_of_their_own(train: Train, save_teacher: Callable[..., Path]) -> None:
    few = "teacher=hf", f"teacher.name={save_teacher('bert')}", "trainer.max_steps=1", "validate_first=false"
    first, second = train(*few), train(*few)
    assert first != second
    assert first.parent == second.parent
    assert (first / "student").is_dir()
    assert (second / "student").is_dir()


def test_a_run_on_the_cpu_leaves_alone_a_gpu_that_an_earlier_run_used(
    train: Train, save_teacher: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    folder = train("teacher=hf", f"teacher.name={save_teacher('bert')}", "trainer.max_steps=1")
    assert (folder / "student").is_dir()


# -------------------------------------------------------------------- prepare and export


def test_training_uses_the_cache_that_prepare_made(
    tmp_path: Path, text_file: Path, save_teacher: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    common = (
        "teacher=hf",
        f"teacher.name={save_teacher('bert')}",
        *SMALL,
        f"data.corpus.paths={text_file}",
        f"cache_dir={tmp_path}/cache",
    )
    prepared = call(distilkit.prepare.main, *common, cwd=tmp_path)
    assert prepared.code == 0, prepared.err
    said = json.loads(prepared.out.splitlines()[-1])
    assert sum(said["documents"].values()) == 400
    meta = json.loads((Path(said["cache"]) / "meta.json").read_text("utf-8"))
    assert meta["tokens"] == said["tokens"]

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the corpus was tokenized again")

    monkeypatch.setattr(distilkit.data.cache, "tokenize", refuse)
    done = call(distilkit.train.main, *common, "trainer.max_steps=1", "logger=none", cwd=tmp_path)
    assert done.code == 0, done.err
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "cache").iterdir() if path.is_dir()] == [Path(said["cache"]).name]


def logits_of(folder: Path) -> torch.Tensor:
    model: PreTrainedModel = AutoModelForMaskedLM.from_pretrained(folder).eval()
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=torch.arange(2, 30)[None, :]).logits
    return logits


def test_export_turns_the_last_checkpoint_into_the_student_of_the_run(run: Run, tmp_path: Path) -> None:
    ckpt = run.folder / "checkpoints" / "last.ckpt"
    done = call(distilkit.export.__main__.main, f"ckpt={ckpt}", "out=exported", cwd=tmp_path)
    assert done.code == 0, done.err
    said = json.loads(done.out.splitlines()[-1])
    assert said == {"out": str(tmp_path / "exported"), "parameters": run.summary["student_parameters"]}
    assert torch.equal(logits_of(tmp_path / "exported"), logits_of(run.folder / "student"))
    assert {path.name for path in tmp_path.iterdir()} == {"exported"}  # nothing but the student
    assert {path.name for path in (tmp_path / "exported").iterdir()} == {
        path.name for path in (run.folder / "student").iterdir()
    }
    card = (tmp_path / "exported" / "README.md").read_text("utf-8")
    assert "| layers kept | [0, 2, 5] |" in card
    assert card == (run.folder / "student" / "README.md").read_text("utf-8")  # by the summary of its run


def test_export_takes_the_best_checkpoint_too(run: Run, tmp_path: Path) -> None:
    state = torch.load(run.folder / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    distilkit.export.export_checkpoint(run.folder / "checkpoints" / "best.ckpt", tmp_path / "best")
    weights = load_file(tmp_path / "best" / "model.safetensors")
    assert torch.equal(weights["vocab_transform.weight"], state["student.vocab_transform.weight"])


# --------------------------------------------------------------------------------- sweeps


@pytest.fixture(scope="module")
def sweep(
    tmp_path_factory: pytest.TempPathFactory, save_teacher: Callable[..., Path], text_file: Path, cache: Path
) -> Run:
    """Sweep two temperatures with the W&B logger, on a machine without a key."""
    elsewhere = tmp_path_factory.mktemp("sweep")
    outcome = spawn(
        "-m",
        "distilkit.train",
        "-m",
        "teacher=hf",
        f"teacher.name={save_teacher('bert')}",
        *SMALL,
        f"data.corpus.paths={text_file}",
        f"cache_dir={cache}",
        "trainer.max_steps=2",
        "logger=wandb",
        "objective.temperature=1,2",
        cwd=elsewhere,
        environment={"WANDB_MODE": None, "WANDB_API_KEY": None, "NETRC": None, "HOME": str(elsewhere / "home")},
    )
    assert outcome.code == 0, outcome.err
    return Run(folder=only(elsewhere, "outputs/distil/*"), outcome=outcome)


def test_a_multirun_trains_each_temperature_in_a_folder_of_its_own(sweep: Run) -> None:
    runs = [json.loads((sweep.folder / job / "summary.json").read_text("utf-8")) for job in ("0", "1")]
    assert [summary["objective"]["temperature"] for summary in runs] == [1, 2]
    assert runs[0]["before"]["val/nll"] == runs[1]["before"]["val/nll"]
    assert runs[0]["after"]["val/nll"] != runs[1]["after"]["val/nll"]


def test_a_multirun_compares_its_runs(sweep: Run) -> None:
    table = (sweep.folder / "comparison.md").read_text("utf-8").splitlines()
    rows = [line.split("|")[1].strip() for line in table[2:]]
    assert rows == ["teacher", "objective.temperature=1", "objective.temperature=2"]
    content = json.loads((sweep.folder / "comparison.json").read_text("utf-8"))
    assert [one["after"] for one in content["runs"]] == [
        json.loads((sweep.folder / job / "summary.json").read_text("utf-8"))["after"] for job in ("0", "1")
    ]
    assert matplotlib.image.imread(sweep.folder / "comparison.png").shape[1] > 900
    assert "objective.temperature=2: " in sweep.outcome.out


def test_wandb_runs_offline_without_a_key_and_says_so_in_one_line_a_run(sweep: Run) -> None:
    said = [line for line in sweep.outcome.out.splitlines() if "W&B runs offline" in line]
    assert len(said) == 3
    assert f"{sweep.folder}/wandb/offline-run-*" in said[2]  # of the comparison
    for job, line in zip(("0", "1"), said[:2], strict=True):
        assert "no API key is set (wandb login)" in line
        assert f"{job}/wandb/offline-run-*" in line
        assert len(list((sweep.folder / job / "wandb").glob("offline-run-*/run-*.wandb"))) == 1
    assert "Traceback" not in sweep.outcome.err


def test_the_comparison_of_a_sweep_is_a_run_of_wandb_in_its_group(sweep: Run) -> None:
    found = records(sweep.folder)
    (about,) = [record.run for record in found if record.WhichOneof("record_type") == "run"]
    assert (about.run_group, about.job_type, about.project) == (sweep.folder.name, "comparison", "distilkit")
    logged = {name: value for row in history(sweep.folder) for name, value in row.items()}
    assert (logged["comparison/nrows"], logged["comparison_plot/count"]) == (3, 1)
    file = only(sweep.folder, "wandb/offline-run-*/files") / logged["comparison/path"]
    rows = json.loads(file.read_text("utf-8"))["data"]
    assert [row[0] for row in rows] == ["teacher", "objective.temperature=1", "objective.temperature=2"]


def test_wandb_groups_the_runs_of_a_sweep_and_keeps_them_apart(sweep: Run) -> None:
    from wandb.proto import wandb_internal_pb2

    group = wandb_internal_pb2.RunRecord(run_group=sweep.folder.name).SerializeToString()
    files = [only(sweep.folder / job, "wandb/offline-run-*/run-*.wandb") for job in ("0", "1")]
    assert files[0].name != files[1].name
    for file in files:
        content = file.read_bytes()
        assert group in content
        assert b"val/nll" in content
        assert summary_of(file.parents[2])["verdict"]["line"].encode("ascii", "backslashreplace") in content
        assert "finishing run" in (file.parent / "logs" / "debug.log").read_text("utf-8")  # by its job, not after it


# ------------------------------------------------------------------------------ what changes over a training


def test_a_run_follows_the_points_of_its_command_and_says_so(train: Train, save_teacher: Callable[..., Path]) -> None:
    run = train(
        "teacher=hf",
        f"teacher.name={save_teacher('bert')}",
        "trainer.max_steps=8",
        "objective.alpha_ce=[[0,5],[0.5,0],[1,0]]",
        "objective.alpha_mlm=[[0,1],[1,3]]",
        "objective.soft_targets=masked",
        "data.masking.mlm_probability=[[0,0.3],[1,0.15]]",
        "scheduler.name=piecewise",
        "+scheduler.kwargs.points=[[0,0],[0.25,1],[0.5,1],[1,0]]",
        "optimizer.lr=0.01",
        "logger=csv",
    )
    weights = {"alpha_ce": "5 at 0% → 0 at 50% → 0 at 100%", "alpha_mlm": "1 at 0% → 3 at 100%", "alpha_cos": 1.0}
    assert summary_of(run)["objective"] == {**weights, "temperature": 2.0, "soft_targets": "masked"}
    card = (run / "student" / "README.md").read_text("utf-8")
    assert "alpha_ce 5 at 0% → 0 at 50% → 0 at 100%, alpha_mlm 1 at 0% → 3 at 100%, alpha_cos 1.0, temperature" in card
    curves = read_metrics(run / "metrics.csv")
    rates = [rate for _, rate in curves["train/lr"]]
    assert rates == pytest.approx([0, 0.005, 0.01, 0.01, 0.01, 0.0075, 0.005, 0.0025])
    assert [step for step, _ in curves["train/loss_ce"]] == [step for step, _ in curves["train/loss_mlm"]][:4]
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 8


@pytest.mark.parametrize(
    ("overrides", "last"),
    [
        (["scheduler.name=cosine_with_min_lr", "+scheduler.kwargs.min_lr_rate=0.1"], 0.1 + 0.9 * 0.5),
        (["scheduler.name=wsd", "+scheduler.kwargs.decay_share=0.4"], 0.5),
    ],
)
def test_a_schedule_with_arguments_is_that_of_its_command(
    train: Train, save_teacher: Callable[..., Path], overrides: list[str], last: float
) -> None:
    teacher = "teacher=hf", f"teacher.name={save_teacher('bert')}"
    length = ["trainer.max_steps=2"] if "cosine" in overrides[0] else ["trainer.max_steps=5"]
    run = train(*teacher, *overrides, *length, "scheduler.warmup_share=0", "optimizer.lr=1.0e-3", "logger=csv")
    rates = [rate for _, rate in read_metrics(run / "metrics.csv")["train/lr"]]
    assert rates == pytest.approx([1e-3] * (len(rates) - 1) + [last * 1e-3])


# ------------------------------------------------------------------------------ two ranks

TWO_RANKS = "trainer.accelerator=cpu", "trainer.devices=2", "trainer.strategy=ddp"


@pytest.fixture
def deterministic(save_teacher: Callable[..., Path], text_file: Path, cache: Path) -> tuple[str, ...]:
    """Four steps without dropout, so that the loss does not depend on the ranks' random numbers."""
    teacher = save_teacher("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return (
        "teacher=hf",
        f"teacher.name={teacher}",
        *SMALL,
        f"data.corpus.paths={text_file}",
        f"cache_dir={cache}",
        "trainer.max_steps=4",
        "optimizer.lr=0.01",
    )


def summary_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "summary.json").read_text("utf-8"))
    return content


@pytest.mark.slow
def test_two_ranks_reach_the_loss_of_one_process(deterministic: tuple[str, ...], tmp_path: Path) -> None:
    deterministic = *deterministic, "data.masking.mlm_probability=[[0,0.4],[1,0.15]]"
    deterministic = *deterministic, "callbacks.predictions.enabled=true"
    one = call(distilkit.train.main, *deterministic, "hydra.run.dir=one", cwd=tmp_path)
    assert one.code == 0, one.err
    two = spawn("-m", "distilkit.train", *deterministic, *TWO_RANKS, "hydra.run.dir=two", cwd=tmp_path)
    assert two.code == 0, two.err
    alone, shared = summary_of(tmp_path / "one"), summary_of(tmp_path / "two")
    assert shared["after"] == pytest.approx(alone["after"], rel=1e-5, abs=1e-4)  # rel: perplexities are in the hundreds
    assert shared["before"] == pytest.approx(
        alone["before"], rel=1e-5, abs=1e-4
    )  # rel: perplexities are in the hundreds
    assert abs(alone["after"]["val/loss"] - alone["before"]["val/loss"]) > 1e-2  # it did learn
    assert shared["verdict"]["better_than_cut"] == pytest.approx(alone["verdict"]["better_than_cut"], abs=1e-4)
    pages = [(tmp_path / run / "predictions.md").read_text("utf-8") for run in ("one", "two")]
    assert [page.count("| student |") for page in pages] == [8, 8]  # of the first rank alone
    one_rows, two_rows = (read_rows(tmp_path / run, "val") for run in ("one", "two"))
    assert one_rows is not None and two_rows is not None
    assert one_rows.ids.tolist() == two_rows.ids.tolist()
    assert (shared["tokens_seen"], shared["optimizer_steps"]) == (alone["tokens_seen"], alone["optimizer_steps"])
    expected = load_file(tmp_path / "one" / "student" / "model.safetensors")
    actual = load_file(tmp_path / "two" / "student" / "model.safetensors")
    for name, weight in expected.items():
        assert torch.allclose(actual[name], weight, atol=1e-4), name
    assert "sync_dist" not in two.err


@pytest.mark.slow
def test_a_sweep_on_two_ranks_trains_both_ranks_on_the_same_job_and_finishes_both(
    deterministic: tuple[str, ...], tmp_path: Path
) -> None:
    swept = spawn(
        "-m",
        "distilkit.train",
        "-m",
        *deterministic,
        *TWO_RANKS,
        "objective.temperature=1,4",
        "hydra.sweep.dir=sweep",
        cwd=tmp_path,
    )
    assert swept.code == 0, swept.err
    for job, temperature in (("0", 1), ("1", 4)):
        alone = call(
            distilkit.train.main,
            *deterministic,
            f"objective.temperature={temperature}",
            f"hydra.run.dir=alone{job}",
            cwd=tmp_path,
        )
        assert alone.code == 0, alone.err
        shared = summary_of(tmp_path / "sweep" / job)
        assert shared["objective"]["temperature"] == temperature
        assert shared["after"] == pytest.approx(
            summary_of(tmp_path / f"alone{job}")["after"], rel=1e-5, abs=1e-4
        )  # rel: perplexities are in the hundreds
    assert (tmp_path / "sweep" / "comparison.md").is_file()


@pytest.mark.slow
def test_a_sweep_on_two_ranks_goes_on_after_a_job_that_failed_on_both(
    deterministic: tuple[str, ...], tmp_path: Path
) -> None:
    rates = "optimizer.lr=1e30,0.01", "hydra.sweep.dir=sweep"
    swept = spawn("-m", "distilkit.train", "-m", *deterministic, *TWO_RANKS, *rates, cwd=tmp_path)
    assert swept.code == 1, swept.err
    assert re.search(r"job 0 \(optimizer.lr=1e.?30\) failed: the loss is not finite at step", swept.out)
    assert summary_of(tmp_path / "sweep" / "1")["optimizer_steps"] == 4


@pytest.mark.slow
def test_torchrun_starts_all_ranks_with_one_command_line(deterministic: tuple[str, ...], tmp_path: Path) -> None:
    one = call(distilkit.train.main, *deterministic, "hydra.run.dir=one", cwd=tmp_path)
    assert one.code == 0, one.err
    torchrun = "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"
    two = spawn("-m", *torchrun, "-m", "distilkit.train", *deterministic, *TWO_RANKS, "name=shared", cwd=tmp_path)
    assert two.code == 0, two.err
    run = only(tmp_path, "outputs/shared/*/summary.json").parent
    assert summary_of(run)["after"] == pytest.approx(
        summary_of(tmp_path / "one")["after"], rel=1e-5, abs=1e-4
    )  # rel: perplexities are in the hundreds


@pytest.mark.slow
def test_two_sharded_ranks_that_broke_off_are_resumed_by_one_and_scored_again(
    deterministic: tuple[str, ...], tmp_path: Path
) -> None:
    settings = *deterministic, "optimizer.weight_decay=0.5", "callbacks.validation.optimizer_steps=2"
    one = call(distilkit.train.main, *settings, "hydra.run.dir=one", cwd=tmp_path)
    assert one.code == 0, one.err
    sharded = "trainer=fsdp", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.precision=32-true"
    environment = {"PYTHONPATH": str(CHECKOUT / "tests")}
    command = "-m", "distilkit.train", *settings, *sharded, "name=two"
    broken = spawn(
        *command, "+callbacks.stop={_target_: jobs.StopAfter, step: 3}", cwd=tmp_path, environment=environment
    )
    assert "the power went out" in broken.err, broken.err
    two = call(distilkit.train.main, *settings, "name=two", "ckpt_path=last", cwd=tmp_path)
    assert two.code == 0, two.err
    run = only(tmp_path, "outputs/two/*/summary.json").parent
    last = run / "checkpoints" / "last.ckpt"
    # The run has no step left: what is new is the score, by two ranks.
    again = spawn(*command[:-1], f"ckpt_path={last}", "hydra.run.dir=again", cwd=tmp_path, environment=environment)
    assert again.code == 0, again.err
    expected = load_file(tmp_path / "one" / "student" / "model.safetensors")
    for folder in (run, tmp_path / "again"):
        assert summary_of(folder)["after"] == pytest.approx(
            summary_of(tmp_path / "one")["after"], rel=1e-5, abs=1e-4
        )  # rel: perplexities are in the hundreds
        actual = load_file(folder / "student" / "model.safetensors")
        for name, weight in expected.items():
            assert torch.allclose(actual[name], weight, atol=1e-4), name


# ----------------------------------------------------------------------------------- demo


@pytest.mark.slow
def test_the_demo_runs_from_nothing_to_the_table(tmp_path: Path) -> None:
    done = spawn(
        "-m",
        "distilkit.train",
        "experiment=demo",
        "sweep=versus",
        "data.corpus.packages=[transformers.utils]",
        "data.val_share=0.2",
        "data.block_size=32",
        "data.global_batch_size=8",
        "data.micro_batch_size=8",
        "data.max_val_blocks=8",
        "tokenizer.vocab_size=500",
        "trainer=cpu",
        "trainer.max_steps=30",  # the baseline of equal time needs ten
        f"cache_dir={tmp_path}/cache",
        cwd=tmp_path,
    )
    assert done.code == 0, done.err
    demo = only(tmp_path, "outputs/demo/*")
    stages = ["teacher", "cut", "distilled", "baseline", "baseline_time", "random_init"]
    runs = {stage: summary_of(demo / stage) for stage in stages}
    assert runs["teacher"]["teacher"] is None
    assert {tmp_path / runs[stage]["teacher"]["name"] for stage in stages[1:]} == {demo / "teacher" / "student"}
    assert len({runs[stage]["teacher"]["sha256"] for stage in stages[1:]}) == 1
    assert runs["distilled"]["teacher_parameters"] == runs["teacher"]["student_parameters"]
    assert runs["distilled"]["layers"] == runs["baseline"]["layers"] == [0, 3]
    assert runs["random_init"]["layers"] is None
    assert runs["distilled"]["tokens_seen"] == runs["baseline"]["tokens_seen"] == runs["random_init"]["tokens_seen"]
    assert runs["cut"]["tokens_seen"] == 0
    assert runs["baseline_time"]["budget_seconds"] == pytest.approx(runs["distilled"]["training_seconds"])
    assert runs["cut"]["after"]["val/nll"] == runs["distilled"]["before"]["val/nll"]
    assert runs["distilled"]["before"]["val/nll"] == runs["baseline"]["before"]["val/nll"]
    table, _, said = (demo / "comparison.md").read_text("utf-8").partition("\n\n")
    assert "At equal tokens, " in said
    header, _, *rows = table.splitlines()
    assert [row.split("|")[1].strip() for row in rows] == stages
    assert "latency ms" in header
    assert (demo / "comparison.png").is_file()


@pytest.mark.slow
def test_one_stage_of_the_demo_runs_alone(tmp_path: Path) -> None:
    done = spawn(
        "-m",
        "distilkit.train",
        "experiment=demo",
        "+experiment/demo=teacher",
        "data.corpus.packages=[transformers.utils]",
        "data.val_share=0.2",
        "data.global_batch_size=8",
        "data.micro_batch_size=8",
        "data.max_val_blocks=8",
        "tokenizer.vocab_size=500",
        "trainer=cpu",
        "trainer.max_steps=1",
        f"cache_dir={tmp_path}/cache",
        cwd=tmp_path,
    )
    assert done.code == 0, done.err
    assert [path.name for path in only(tmp_path, "outputs/demo/*").iterdir() if path.is_dir()] == ["teacher"]


# ---------------------------------------------------------------------------------- wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the sdist, and the wheel from it, out of a copy of the checkout."""
    copy, built = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("built")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(CHECKOUT / name, copy)
    for name in ("src", "conf"):
        shutil.copytree(CHECKOUT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    done = spawn("-m", "build", "--no-isolation", "--outdir", str(built), str(copy), cwd=copy)
    assert done.code == 0, done.err
    only(built, "*.tar.gz")
    return only(built, "*.whl")


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel next to the environment, in a folder that comes before the checkout on the path."""
    target = tmp_path_factory.mktemp("installed")
    done = spawn("-m", "pip", "install", "--no-deps", "--no-index", "--target", str(target), str(wheel), cwd=target)
    assert done.code == 0, done.err
    return target


@pytest.mark.slow
def test_the_wheel_holds_every_module_every_config_and_the_licence(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder, prefix in (("src/distilkit", "distilkit"), ("conf", "distilkit/conf")):
        files = [file for kind in ("py", "yaml", "j2") for file in (CHECKOUT / folder).rglob(f"*.{kind}")]
        assert len(files) > 50
        assert {f"{prefix}/{file.relative_to(CHECKOUT / folder).as_posix()}" for file in files} <= names
    assert "distilkit/py.typed" in names
    assert [name for name in names if name.endswith("LICENSE")]


@pytest.mark.slow
def test_the_installed_wheel_prints_its_config_and_trains_without_the_checkout(
    installed: Path,
    tmp_path: Path,
    save_teacher: Callable[..., Path],
    text_file: Path,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    environment = {"PYTHONPATH": str(installed)}
    where = spawn(
        "-c",
        "import distilkit, distilkit.conf; print(distilkit.__file__); print(distilkit.conf.__file__)",
        cwd=tmp_path,
        environment=environment,
    )
    assert where.out.splitlines() == [
        str(installed / "distilkit" / "__init__.py"),
        str(installed / "distilkit" / "conf" / "__init__.py"),
    ]
    shown = spawn("-m", "distilkit.train", "--cfg", "job", cwd=tmp_path, environment=environment)
    assert shown.code == 0, shown.err
    assert yaml.safe_load(shown.out)["objective"]["alpha_ce"] == 5.0
    settings = (
        "teacher=hf",
        f"teacher.name={save_teacher('bert')}",
        *SMALL,
        f"data.corpus.paths={text_file}",
        f"cache_dir={tmp_path}/cache",
        "trainer.max_steps=1",
    )
    script = installed / "bin" / "distilkit-train"
    done = spawn(str(script), *settings, cwd=tmp_path, environment=environment)
    assert done.code == 0, done.err
    student = only(tmp_path, "outputs/distil/*/student")
    assert AutoModelForMaskedLM.from_pretrained(student).config.n_layers == 3


def test_all_folders_may_begin_with_the_home_folder(
    save_teacher: Callable[..., Path], text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(save_teacher("bert"), tmp_path / "m")
    shutil.copy(text_file, tmp_path / "t.txt")
    monkeypatch.setenv("HOME", str(tmp_path))
    models = ("teacher=hf", 'teacher.name="~/m"', "student=hf", 'student.name="~/m"', 'tokenizer.name="~/m"')
    folders = ('data.corpus.paths=["~/t.txt"]', 'cache_dir="~/cache"', "hydra.run.dir=run", "trainer.max_steps=1")
    done = call(distilkit.train.main, *models, *folders, *SMALL, *QUIET, cwd=tmp_path)
    assert done.code == 0, done.err
    result = distilkit.distill(
        "~/m", paths="~/t.txt", out="~/second", overrides=[*SMALL[1:], *QUIET, *folders[1:2]], max_steps=1
    )
    assert result.path == tmp_path / "second" / "student"
    exported = call(distilkit.export.__main__.main, 'ckpt="~/run/checkpoints/last.ckpt"', 'out="~/mine"', cwd=tmp_path)
    assert exported.code == 0, exported.err
    assert (tmp_path / "mine" / "model.safetensors").is_file()
    assert not (tmp_path / "~").exists()
