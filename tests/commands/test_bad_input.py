"""A wrong input gives one message with value, limit and cure, exit status 1, and no partial output."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hydra.errors import InstantiationException
from transformers import BertModel, DistilBertForMaskedLM, PreTrainedTokenizerBase

import distilkit.export.__main__
import distilkit.prepare
import distilkit.train
from distilkit.errors import UserError
from jobs import QUIET, SMALL, Outcome, call, only, spawn
from tiny import build_model, make_documents

Attempt = Callable[..., Outcome]


@pytest.fixture
def settings(text_file: Path, cache: Path, save_teacher: Callable[..., Path]) -> tuple[str, ...]:
    """Return the overrides of a run that succeeds; the tests add a wrong one."""
    return (
        "teacher=hf",
        f"teacher.name={save_teacher('bert')}",
        *SMALL,
        f"data.corpus.paths={text_file}",
        f"cache_dir={cache}",
        *QUIET,
        "trainer.max_steps=1",
        "validate_first=false",
    )


def assert_refused(outcome: Outcome, *facts: str) -> None:
    """Check that the command failed with one message that states these facts, and without a traceback."""
    assert outcome.code == 1, outcome.err
    assert "Traceback" not in outcome.err, outcome.err
    for fact in facts:
        assert fact in outcome.err, outcome.err


def assert_nothing_half_made(*folders: Path) -> None:
    """Check that no student was written, and that each cache and tokenizer is complete."""
    for folder in folders:
        assert list(folder.glob("**/student")) == []
        assert [path for path in folder.rglob("*") if path.is_dir() and ".tmp" in path.name] == []
        for tokens in folder.rglob("train.bin"):
            assert (tokens.parent / "meta.json").is_file()
        for tokenizer in folder.glob("**/tokenizers/*/"):
            assert (tokenizer / "tokenizer.json").is_file()


@pytest.fixture
def refused(settings: tuple[str, ...], tmp_path: Path, cache: Path) -> Callable[..., None]:
    """Train with these overrides in this process, and check the refusal."""

    def attempt(*overrides: str, facts: list[str]) -> None:
        assert_refused(call(distilkit.train.main, *settings, *overrides, cwd=tmp_path), *facts)
        assert_nothing_half_made(tmp_path, cache)

    return attempt


def test_the_settings_that_the_cases_spoil_are_good(settings: tuple[str, ...], tmp_path: Path) -> None:
    done = call(distilkit.train.main, *settings, cwd=tmp_path)
    assert done.code == 0, done.err


# --------------------------------------------------------------------------------- overrides


@pytest.mark.parametrize(
    ("override", "facts"),
    [
        (
            "objective.temprature=1",
            ["objective.temprature is not in the config", "did you mean objective.temperature?"],
        ),
        ("objective=distillbert", ["Could not find 'objective/distillbert'", "\tdistilbert\n"]),
        ("nonsense=1", ["error: nonsense is not in the config; --help lists"]),
        ("+objective.temprature=1", ["objective.temprature is unknown", "alpha_ce", "temperature, soft_targets"]),
        ("+student.layer=half", ["student.layer is unknown", "layers, num_layers"]),
        ("+optimizer.learning_rate=1", ["optimizer.learning_rate is unknown", "lr, betas"]),
        ("+scheduler.warmup=0.1", ["scheduler.warmup is unknown; scheduler takes name, warmup_share, kwargs"]),
        ("+scheduler.kwargs.power=2", ["scheduler.kwargs.power is unknown to scheduler.name=linear", "no arguments"]),
        ("+data.batch_size=8", ["data.batch_size is unknown", "global_batch_size, micro_batch_size"]),
        ("+data.masking.probability=0.1", ["data.masking.probability is unknown", "mlm_probability"]),
        ("+data.corpus.path=x", ["data.corpus.path is unknown", "paths, column"]),
        ("trainer.max_step=1", ["trainer.max_step is unknown", "; did you mean trainer.max_steps"]),
        ("+nope=1", ["nope is unknown, and no other key reads it", "teacher, student, objective", "scheduler"]),
        ("++nope.deeper=1", ["nope is unknown", "the config takes teacher"]),
        ("+callbacks.validation.steps=1", ["callbacks.validation.steps is unknown", "optimizer_steps"]),
    ],
)
def test_an_unknown_key_is_refused_with_the_known_ones(
    override: str, facts: list[str], refused: Callable[..., None]
) -> None:
    refused(override, facts=facts)


@pytest.mark.parametrize("key", ["cache_dir", "data.cache_dir", "hydra.run.dir", "DISTILKIT_CACHE"])
def test_an_empty_text_is_no_folder_to_write_into(
    key: str, settings: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISTILKIT_CACHE", "")
    given = (
        [each for each in settings if not each.startswith("cache_dir=")] if key.isupper() else [*settings, f"{key}="]
    )
    key = "cache_dir" if key.isupper() else key
    refusal = f"{key}='' would write into the working folder; name a folder, or write {key}=."
    assert_refused(call(distilkit.train.main, *given, cwd=tmp_path), refusal)
    assert_nothing_half_made(tmp_path)


def test_an_added_key_that_another_reads_is_taken(settings: tuple[str, ...], tmp_path: Path) -> None:
    done = call(distilkit.train.main, *settings, "+half=0.5", "objective.alpha_cos=${half}", cwd=tmp_path)
    assert done.code == 0, done.err


@pytest.mark.parametrize(
    ("overrides", "facts"),
    [
        (["objective.temperature=0"], ["objective.temperature=0", "above 0", "the paper uses 2"]),
        (["objective.temperature=-1"], ["objective.temperature=-1", "at least 0"]),
        (["objective.alpha_ce=-5"], ["objective.alpha_ce=-5", "at least 0"]),
        (
            ["objective.alpha_ce=0", "objective.alpha_mlm=0", "objective.alpha_cos=0"],
            ["all alphas of the objective are 0", "set at least one above 0"],
        ),
        (
            ["objective.alpha_ce=[[0,5],[0.5,1]]"],
            ["objective.alpha_ce=[[0, 5], [0.5, 1]]", "do not rise from 0 to 1", "give"],
        ),
        (["objective.soft_targets=1.5"], ["objective.soft_targets is 1.5", "all or masked"]),
        (
            ["data.masking.mlm_probability=[[0,0.3],[1,0]]"],
            ["data.masking.mlm_probability=[[0, 0.3], [1, 0]]", "each value must be between 0 and 1"],
        ),
        (
            ["scheduler.name=piecewise", "+scheduler.kwargs.points=[[0,1]]"],
            ["scheduler.kwargs.points=[[0, 1]]", "do not rise from 0 to 1"],
        ),
        (["scheduler.name=wsd"], ["scheduler.name=wsd needs decay_share; add +scheduler.kwargs.decay_share=..."]),
        (["objective.alpha_clm=1"], ["alpha_mlm=2.0 and objective.alpha_clm=1", "set one of them to 0"]),
        (["objective=distilgpt2"], ["objective.alpha_clm=2.0 on a masked language model", "objective=distilbert"]),
        (["student.layers=[0,9]"], ["keeps layer 9", "has layers 0 to 5", "set student.layers"]),
        (["student.layers=[0,-1]"], ["keeps layer -1", "has layers 0 to 5"]),
        (["student.layers=[1,1]"], ["student.layers=[1, 1] repeats a layer", "each layer once"]),
        (["student.layers=[3,1]"], ["student.layers=[3, 1]", "not increasing", "in the teacher's order"]),
        (["student.layers=[]"], ["student.layers is empty", "at least one of layers 0 to 5"]),
        (
            ["student.layers=quarter"],
            ["student.layers is 'quarter'", "half, third, first, last, greedy, influence or a list"],
        ),
        (["student.layers=greedy", "student.num_blocks=0"], ["student.num_blocks=0", "at least 1"]),
        (
            ["student.layers=greedy", "student.init=random"],
            ["student.init=random copies no", "set student.layers=half"],
        ),
        (["student.layers=last", "student.num_layers=7"], ["student.num_layers=7", "from 1 to 6"]),
        (["student.layers=influence", "student.num_layers=half"], ["student.num_layers=half, but it takes int | None"]),
        (
            ["student.num_layers=4"],
            ["student.num_layers=4, but student.layers=half keeps 3", "leave student.num_layers"],
        ),
        (["student.layers=greedy", "data.block_size=65"], ["data.block_size=65", "has 64 positions"]),
        (["data.block_size=65"], ["data.block_size=65", "has 64 positions", "set data.block_size=64 or less"]),
        (["data.global_batch_size=0"], ["data.global_batch_size=0", "at least 1"]),
        (
            ["data.global_batch_size=5000"],
            ["training blocks of 32 tokens", "data.global_batch_size=5000", "add more text or set a smaller batch"],
        ),
        (["data.val_share=0"], ["data.val_share=0", "above 0 and below 1"]),
        (
            ["scheduler.name=sawtooth"],
            ["scheduler.name=sawtooth is unknown", "it takes constant", "cosine, ", "linear"],
        ),
        (["scheduler.name=[cosine]"], ["scheduler.name=['cosine'] is unknown", "it takes constant"]),
        (["scheduler=cosine"], ["scheduler=cosine, but it is no group", "set scheduler.name=cosine"]),
        (["scheduler=constant"], ["scheduler=constant, but", "set scheduler.name=constant_with_warmup"]),
        (
            ["scheduler.name=warmup_stable_decay"],
            ["warmup_stable_decay needs num_decay_steps", "add +scheduler.kwargs.num_decay_steps=..."],
        ),
        (["scheduler.kwargs=[1]"], ["scheduler.kwargs=[1]", "it takes keys and values"]),
        (["card.license=3"], ["card.license=3", "must be a text or a list of texts"]),
        (["scheduler.warmup_share=2"], ["scheduler.warmup_share=2", "between 0 and 1", "the paper's is 0.05"]),
        (["scheduler.warmup_share=few"], ["scheduler.warmup_share='few'", "between 0 and 1"]),
        (["optimizer.lr=-1"], ["optimizer cannot be built: Invalid learning rate: -1", "change optimizer.*"]),
        (["optimizer.lr=nan"], ["optimizer.lr=nan, but it takes float", "give a finite number"]),
        (["optimizer.lr=fast"], ["optimizer.lr=fast, but it takes float"]),
        (["optimizer._partial_=1"], ["optimizer._partial_=1", "takes true or false"]),
        (["trainer.precision=8"], ["Lightning refuses the settings of trainer", "Precision 8 is invalid", "32-true"]),
        (["trainer.max_steps=abc"], ["trainer.max_steps=abc, but it takes int"]),
        (["trainer.max_steps=1.5"], ["trainer.max_steps=1.5, but it takes int"]),
        (["trainer.gradient_clip_val=-1"], ["trainer.gradient_clip_val=-1", "at least 0; 0 turns it off"]),
        (["trainer.check_val_every_n_epoch=1"], ["check_val_every_n_epoch=1, but callbacks.validation counts"]),
        (
            ["trainer.strategy=fsdp"],
            ["Lightning refuses the settings of trainer", "set trainer=cpu"],
        ),
        (["data.num_workers=-1"], ["data.num_workers=-1, but it must be at least 0"]),
        (["data.block_size=[32]"], ["data.block_size=[32], but it takes int"]),
        (["data.attend_across_documents=maybe"], ["data.attend_across_documents=maybe, but it takes bool"]),
        (["data.masking.smoothing=1e9"], ["data.masking.smoothing=1000000000.0 makes weights", "between 0 and 1"]),
        (["objective.alpha_ce=[[0,inf],[1,1]]"], ["objective.alpha_ce=[[0, inf], [1, 1]]", "give a finite number"]),
        (["teacher.revision=123456"], ["teacher.revision=123456, but it takes str", "in quotes"]),
        (["scheduler.kwargs=0"], ["scheduler.kwargs=0", "it takes keys and values"]),
        (["seed=-1"], ["seed=-1, but it must be between 0 and 4294967295"]),
        (["compile=perhaps"], ["compile=perhaps, but it takes bool"]),
        (["callbacks.progress=loud"], ["callbacks.progress=loud is no Callback", "set callbacks.progress=null"]),
        (["card=3"], ["card=3, but it takes dict | None"]),
        (["teacher.dtype=float16"], ["teacher.dtype is 'float16'", "auto or float32"]),
        (["trainer.max_epochs=-1", "trainer.max_steps=-1"], ["are both -1", "set one of them above 0"]),
        (["optimizer._target_=torch.optim.AdamV"], ["optimizer._target_", "torch.optim.AdamV"]),
        (
            ["trainer.precision=bf16-true"],
            ["trainer.precision=bf16-true holds weights", "set trainer.precision=bf16-mixed"],
        ),
        (
            ["trainer.precision=16-true"],
            ["trainer.precision=16-true holds weights", "set trainer.precision=bf16-mixed"],
        ),
        (["matmul_precision=low"], ["matmul_precision=low", "takes highest, high or medium"]),
        (["callbacks.validation.optimizer_steps=0"], ["callbacks.validation.optimizer_steps=0", "at least 1"]),
        (["student=hf", "student.name=nobody/nothing"], ["'nobody/nothing'", "needs the network"]),
    ],
)
def test_a_setting_out_of_range_is_refused(
    overrides: list[str], facts: list[str], refused: Callable[..., None]
) -> None:
    refused(*overrides, facts=facts)


NARROW = "{hidden_size: 24, num_attention_heads: 3, num_hidden_layers: 2, intermediate_size: 48}"


@pytest.mark.parametrize(
    "overrides, facts",
    [
        ([], ["objective.alpha_cos=1.0", "the student is 24 wide and the teacher 32", "set objective=minilm"]),
        (["objective=minilm", "objective.relation_heads=6"], ["relation_heads=6", "[24, 32]", "set one of 1, 2, 4, 8"]),
        (["objective=minilm", "objective.student_layer=2"], ["student_layer=2", "layers 0 to 1", "set it within"]),
        (["objective=minilm", "objective.teacher_layer=-1"], ["teacher_layer=-1", "null or a whole number"]),
    ],
)
def test_relations_and_cosines_that_do_not_fit_the_models_are_refused(
    overrides: list[str], facts: list[str], refused: Callable[..., None]
) -> None:
    refused("student=new", "student.model_type=bert", f"student.config={NARROW}", *overrides, facts=facts)


def test_a_student_that_is_larger_than_its_teacher_gets_a_warning(settings: tuple[str, ...], tmp_path: Path) -> None:
    wide = "{hidden_size: 40, num_attention_heads: 4, num_hidden_layers: 6, intermediate_size: 90}"
    student = "student=new", "student.model_type=bert", f"student.config={wide}"
    done = call(
        distilkit.train.main, *settings, *student, "objective=minilm", "objective.relation_heads=4", cwd=tmp_path
    )
    assert done.code == 0, done.err
    assert "the student has more parameters than its teacher" in done.out + done.err


def test_a_causal_teacher_refuses_a_masked_lm_weight(
    refused: Callable[..., None], save_teacher: Callable[..., Path]
) -> None:
    refused(
        f"teacher.name={save_teacher('gpt2')}",
        facts=["objective.alpha_mlm=2.0 on a causal language model (gpt2)", "set objective=distilgpt2 or clm"],
    )


def test_no_teacher_refuses_the_terms_that_read_one(settings: tuple[str, ...], tmp_path: Path, cache: Path) -> None:
    alone = [item for item in settings if not item.startswith("teacher")]
    tokenizer = "tokenizer=wordpiece", "tokenizer.vocab_size=200"
    new = call(distilkit.train.main, "teacher=none", "student=new", *tokenizer, *alone, cwd=tmp_path)
    assert_refused(new, "objective.alpha_ce=5.0", "objective.alpha_cos=1.0", "teacher=none", "set objective=mlm")
    cut = call(distilkit.train.main, "teacher=none", "objective=mlm", *tokenizer, *alone, cwd=tmp_path)
    assert_refused(cut, "cannot be cut from teacher=none", "set student=new")
    bare = call(distilkit.train.main, "teacher=none", "student=new", "objective=mlm", *alone, cwd=tmp_path)
    assert_refused(bare, "teacher=none brings no tokenizer", "tokenizer=wordpiece")
    assert_nothing_half_made(tmp_path, cache)


# ---------------------------------------------------------------------------------- teachers


def test_a_teacher_that_is_nowhere_is_refused_by_name_on_the_command_line(
    settings: tuple[str, ...], tmp_path: Path
) -> None:
    done = spawn("-m", "distilkit.train", *settings, "teacher.name=nobody/nothing", cwd=tmp_path)
    assert_refused(done, "error: ", "'nobody/nothing'", "A hub id needs the network")
    assert done.err.count("error: ") == 1
    assert_nothing_half_made(tmp_path)


@pytest.mark.parametrize(
    ("kept", "facts"),
    [
        ([], ["cannot load a tokenizer from", "folder"]),
        (["tokenizer"], ["cannot load folder", "folder", "a folder needs config.json and model.safetensors"]),
        (["tokenizer", "config"], ["no file named model.safetensors", "folder", "a folder needs config.json"]),
    ],
)
def test_a_folder_without_a_model_is_refused(
    kept: list[str],
    facts: list[str],
    refused: Callable[..., None],
    tmp_path: Path,
    save_teacher: Callable[..., Path],
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for file in save_teacher("bert").iterdir():
        if file.name.startswith(tuple(kept)):
            shutil.copy(file, folder)
    refused(f"teacher.name={folder}", facts=facts)


def test_pickled_weights_are_not_read(
    refused: Callable[..., None], tmp_path: Path, save_teacher: Callable[..., Path]
) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(save_teacher("bert"), folder)
    (folder / "model.safetensors").unlink()
    torch.save(build_model("bert").state_dict(), folder / "pytorch_model.bin")
    refused(f"teacher.name={folder}", facts=["cannot load folder", "model.safetensors"])


def test_a_teacher_without_its_head_is_refused_only_where_its_logits_are_read(
    settings: tuple[str, ...], refused: Callable[..., None], tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    folder = tmp_path / "encoder"
    encoder: BertModel = build_model("bert").bert
    encoder.config.architectures = ["BertModel"]
    encoder.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    refused(
        f"teacher.name={folder}",
        facts=[
            "has no trained language-model head",
            "cls.predictions.transform.dense.weight",
            "set objective.alpha_ce=0 and objective.alpha_mse=0",
        ],
    )
    done = call(distilkit.train.main, *settings, f"teacher.name={folder}", "objective.alpha_ce=0", cwd=tmp_path)
    assert done.code == 0, done.err


# ------------------------------------------------------------------------------------ corpora


@pytest.mark.parametrize(
    ("name", "content", "facts"),
    [
        ("empty.txt", b" \n\n \n", ["the corpus is empty", "check data.corpus"]),
        ("other.jsonl", b'{"body": "ba be"}\n', ["other.jsonl, line 1 has no column 'text'", "it has body", "column"]),
        ("latin.txt", "ba bé bi".encode("latin1"), ["latin.txt is not UTF-8", "iconv -f latin1 -t utf-8"]),
        ("broken.jsonl", b'{"text": "ba"\n', ["broken.jsonl, line 1 is not a JSON object", "fix or drop that line"]),
        ("picture.png", b"\x89PNG", ["picture.png has an unknown format", ".txt, .jsonl, .csv, .parquet"]),
        ("cut.txt.gz", b"\x1f\x8b\x08\x00", ["cut.txt.gz", "cut short"]),
    ],
)
def test_a_corpus_that_cannot_be_read_is_refused_and_leaves_no_cache(
    name: str, content: bytes, facts: list[str], refused: Callable[..., None], tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    refused(f"data.corpus.paths={name}", f"cache_dir={tmp_path}/cache", facts=facts)
    assert not list(tmp_path.rglob("*.bin"))


def test_a_path_that_matches_nothing_is_refused(refused: Callable[..., None]) -> None:
    refused("data.corpus.paths=nowhere/*.txt", facts=["'nowhere/*.txt' matches no file", ".jsonl"])


@pytest.mark.parametrize(
    ("left_out", "overrides", "fact"),
    [
        ("data.corpus.paths", [], "data.corpus.paths is not set; add data.corpus.paths=..."),
        ("teacher.name", [], "teacher.name is not set; add teacher.name=..."),
        ("nothing", ["student=hf"], "student.name is not set; add student.name=..."),
        ("nothing", ["student=layers"], "student.layers is not set; add student.layers=..."),
        ("nothing", ["trainer=multi_node"], "trainer.num_nodes is not set; add trainer.num_nodes=..."),
    ],
)
def test_what_was_left_out_is_asked_for(
    left_out: str, overrides: list[str], fact: str, settings: tuple[str, ...], tmp_path: Path
) -> None:
    given = [item for item in settings if not item.startswith(left_out)]
    assert_refused(call(distilkit.train.main, *given, *overrides, cwd=tmp_path), fact)
    assert_nothing_half_made(tmp_path)


def test_prepare_reports_a_bad_corpus_too(settings: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    refused = call(distilkit.prepare.main, *settings, "data.corpus.paths=empty.txt", cwd=tmp_path)
    assert_refused(refused, "the corpus is empty")
    unknown = call(distilkit.prepare.main, *settings, "+data.batch_size=8", cwd=tmp_path)
    assert_refused(unknown, "data.batch_size is unknown")


def test_a_cache_that_was_cut_short_is_refused_with_the_cure_and_prepared_again_after_it(
    settings: tuple[str, ...], tmp_path: Path
) -> None:
    (tmp_path / "own.txt").write_text("\n\n".join(make_documents(200, seed=5)), "utf-8")
    own = *settings, "data.corpus.paths=own.txt", f"cache_dir={tmp_path}/cache"
    prepared = call(distilkit.prepare.main, *own, cwd=tmp_path)
    folder = Path(json.loads(prepared.out.splitlines()[-1])["cache"])
    tokens = (folder / "train.bin").read_bytes()
    (folder / "train.bin").write_bytes(tokens[:-10])
    refused = call(distilkit.train.main, *own, cwd=tmp_path)
    assert_refused(refused, f"{len(tokens) - 10:,} bytes instead of {len(tokens):,}", f"delete {folder}")
    assert_nothing_half_made(tmp_path)
    shutil.rmtree(folder)
    assert call(distilkit.train.main, *own, cwd=tmp_path).code == 0
    assert (folder / "train.bin").read_bytes() == tokens


# ------------------------------------------------------------------------------- checkpoints


@pytest.fixture
def finished(settings: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train one step, once for this file."""
    folder = tmp_path_factory.getbasetemp() / "finished-run"
    if not folder.exists():
        done = call(distilkit.train.main, *settings, f"hydra.run.dir={folder}", cwd=folder.parent)
        assert done.code == 0, done.err
    return folder


def test_a_checkpoint_of_another_teacher_is_not_resumed(
    finished: Path, refused: Callable[..., None], save_teacher: Callable[..., Path]
) -> None:
    other = save_teacher("bert", seed=1)
    refused(
        f"ckpt_path={finished}/checkpoints/last.ckpt",
        f"teacher.name={other}",
        facts=["distilled from teacher", str(save_teacher("bert")), str(other), "resume with the same settings"],
    )


def test_a_checkpoint_of_another_objective_is_not_resumed(finished: Path, refused: Callable[..., None]) -> None:
    refused(
        f"ckpt_path={finished}/checkpoints/last.ckpt",
        "objective.temperature=8",
        facts=["objective.temperature=2.0, this run has 8", "start again with student=hf"],
    )


def test_a_checkpoint_of_another_student_is_not_resumed(finished: Path, refused: Callable[..., None]) -> None:
    refused(
        f"ckpt_path={finished}/checkpoints/last.ckpt",
        "student=third_depth",
        "seed=7",
        facts=[
            f"{finished}/checkpoints/last.ckpt was trained with seed=42, this run has 7; student.layers=half, this run has third",
            "resume with the same settings",
            "may_change=[seed,student] lets them change on purpose",
        ],
    )


def test_a_student_of_other_shapes_is_not_resumed_where_it_is_meant(
    finished: Path, refused: Callable[..., None]
) -> None:
    refused(
        f"ckpt_path={finished}/checkpoints/last.ckpt",
        "student=third_depth",
        "may_change=[student]",
        facts=["the checkpoint has another student", "resume with the same settings"],
    )


def test_fewer_steps_than_the_checkpoint_has_write_no_student(finished: Path, refused: Callable[..., None]) -> None:
    file = f"{finished}/checkpoints/last.ckpt"
    facts = [
        "trainer.max_steps=0, but",
        f"has done 1 steps; set more, or export it: python -m distilkit.export ckpt={file}",
    ]
    refused(f"ckpt_path={file}", "trainer.max_steps=0", facts=facts)


def test_another_batch_size_does_not_resume(finished: Path, refused: Callable[..., None]) -> None:
    refused(
        f"ckpt_path={finished}/checkpoints/last.ckpt",
        "data.global_batch_size=12",
        facts=["was trained with data.global_batch_size=", "this run has 12", "resume with the same settings"],
    )


def test_there_is_no_last_checkpoint_before_the_first_run(refused: Callable[..., None], tmp_path: Path) -> None:
    refused("ckpt_path=last", facts=["ckpt_path=last", f"{tmp_path}/outputs/distil", "start without ckpt_path"])


@pytest.mark.parametrize("damage", ["cut", "text", "foreign", "flipped", "missing"])
def test_what_is_not_a_checkpoint_is_neither_resumed_nor_exported(
    damage: str, finished: Path, refused: Callable[..., None], tmp_path: Path
) -> None:
    file = tmp_path / "some.ckpt"
    good = (finished / "checkpoints" / "last.ckpt").read_bytes()
    if damage == "cut":
        file.write_bytes(good[: len(good) // 2])
    elif damage == "text":
        file.write_text("not a checkpoint")
    elif damage == "foreign":
        torch.save({"state_dict": {}, "pytorch-lightning_version": "2.6.0"}, file)
    elif damage == "flipped":  # in the first bytes of the pickle
        place = good.index(b"pytorch-lightning_version")
        file.write_bytes(good[: place - 30] + bytes([good[place - 30] ^ 1]) + good[place - 29 :])
    facts = {
        "cut": "some.ckpt is cut short or damaged",
        "text": "some.ckpt is not a checkpoint, or its beginning is damaged",
        "foreign": "some.ckpt is not a checkpoint of distilkit.train",
        "flipped": "some.ckpt is damaged: the checksum of its part archive/data.pkl differs",
        "missing": "is no file",
    }
    refused(f"ckpt_path={file}", facts=[facts[damage]])
    exported = call(distilkit.export.__main__.main, f"ckpt={file}", "out=student", cwd=tmp_path)
    assert_refused(exported, facts[damage])
    assert_nothing_half_made(tmp_path)


def test_export_asks_for_what_is_missing_and_overwrites_nothing(finished: Path, tmp_path: Path) -> None:
    assert_refused(
        call(distilkit.export.__main__.main, "out=x", cwd=tmp_path), "ckpt is not set", "ckpt=<file> out=<folder>"
    )
    ckpt = f"ckpt={finished}/checkpoints/last.ckpt"
    assert_refused(call(distilkit.export.__main__.main, ckpt, cwd=tmp_path), "out is not set")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    assert_refused(
        call(distilkit.export.__main__.main, ckpt, "out=mine", cwd=tmp_path), "mine exists", "choose another folder"
    )
    assert [file.name for file in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_a_finished_run_is_not_trained_over(finished: Path, settings: tuple[str, ...]) -> None:
    before = (finished / "summary.json").read_bytes(), (finished / "checkpoints" / "last.ckpt").read_bytes()
    again = call(distilkit.train.main, *settings, f"hydra.run.dir={finished}", cwd=finished.parent)
    assert_refused(again, f"{finished} holds a finished run", "choose another hydra.run.dir", "delete")
    assert before == ((finished / "summary.json").read_bytes(), (finished / "checkpoints" / "last.ckpt").read_bytes())


# ------------------------------------------------------------------------------ runaway losses


@pytest.mark.parametrize("log_every", [1, 1000])
def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_the_last_good_checkpoint(
    log_every: int, settings: tuple[str, ...], tmp_path: Path
) -> None:
    done = call(
        distilkit.train.main,
        *settings,
        "trainer.max_steps=8",
        "callbacks.validation.optimizer_steps=2",
        f"trainer.log_every_n_steps={log_every}",
        "+callbacks.poison={_target_: jobs.Poison, step: 3}",
        cwd=tmp_path,
    )
    assert_refused(done, "not finite at step", "Lower optimizer.lr", "trainer.precision=32-true")
    assert_nothing_half_made(tmp_path)
    run = only(tmp_path, "outputs/distil/*")
    assert not (run / "summary.json").exists()
    for name in ("best.ckpt", "last.ckpt"):
        checkpoint = torch.load(run / "checkpoints" / name, weights_only=True)
        assert checkpoint["global_step"] == 2
        assert all(tensor.isfinite().all() for tensor in checkpoint["state_dict"].values())
    distilkit.export.export_checkpoint(run / "checkpoints" / "last.ckpt", tmp_path / "saved")
    student = DistilBertForMaskedLM.from_pretrained(tmp_path / "saved").eval()
    with torch.no_grad():
        assert student(input_ids=torch.arange(5, 15)[None, :]).logits.isfinite().all()


def test_a_learning_rate_far_too_high_stops_the_run(settings: tuple[str, ...], tmp_path: Path) -> None:
    done = call(
        distilkit.train.main,
        *settings,
        "optimizer.lr=1e30",
        "trainer.max_steps=4",
        "trainer.log_every_n_steps=1000",
        cwd=tmp_path,
    )
    assert_refused(done, "not finite at step", "Lower optimizer.lr")
    assert_nothing_half_made(tmp_path)


def test_a_fault_of_ours_keeps_its_traceback(settings: tuple[str, ...], tmp_path: Path) -> None:
    done = call(distilkit.train.main, *settings, "+callbacks.stop={_target_: jobs.StopAfter, step: 0}", cwd=tmp_path)
    assert done.code == 1
    assert "Traceback" in done.err
    assert "RuntimeError: the power went out" in done.err
    assert_nothing_half_made(tmp_path)


def test_full_errors_are_shown_on_request(
    settings: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(InstantiationException) as raised:
        call(distilkit.train.main, *settings, "objective.temperature=0", cwd=tmp_path)
    assert isinstance(raised.value.__cause__, UserError)
