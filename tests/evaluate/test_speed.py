"""Sizes against hand counts, times against a clock that the test moves, ONNX against torch."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from transformers import PreTrainedTokenizerBase

import distilkit.evaluate.speed
import distilkit.export.onnx
import distilkit.timing
from distilkit.errors import UserError
from distilkit.evaluate.speed import Candidate, Speed, encode, file_size
from distilkit.export.onnx import export_onnx, open_session, quantize_int8
from distilkit.language_model import num_parameters_without_embeddings
from distilkit.records import Result, model_name
from distilkit.timing import latency, seconds_in_turn, throughput, times_faster, torch_threads
from jobs import make_job
from tiny import build_model, make_documents

CONFIG = Path(__file__).parents[2] / "conf/evaluate/task/speed.yaml"
PAIRS = [(text, text[::-1].replace(".", "") + " ba") for text in make_documents(9, seed=3)]


def build_speed(**changes: Any) -> Speed:
    """Make the task from its own config, small enough for tests."""
    small = {"max_sentences": 5, "batch_sizes": [1, 3], "warm_up": 1, "rounds": 2, "devices": "cpu", "onnx": False}
    small["whole_pass"] = False
    task = instantiate(OmegaConf.merge(OmegaConf.load(CONFIG), {**small, **changes}))
    assert isinstance(task, Speed)
    return task


def measure(task: Speed, model: Path | str, *, name: str = "mine", tokenizer: str | None = None) -> list[Result]:
    return task.measure(make_job(model, name=name, seed=1, tokenizer=tokenizer))


def load(folder: Path, *, batch_sizes: tuple[int, int] = (1, 3), max_length: int = 128) -> Candidate:
    task = build_speed(batch_sizes=list(batch_sizes), max_length=max_length)
    return task.load(make_job(folder, name="tiny"), PAIRS)


@pytest.fixture
def glue(tmp_path: Path) -> Path:
    """GLUE's folder with nine pairs in STS-B's layout; a quote in it is a letter."""
    lines = [f'{i}\tgenre\t"{one}\t{two}\t{i / 2}' for i, (one, two) in enumerate(PAIRS)]
    folder = tmp_path / "glue" / "STS-B"
    folder.mkdir(parents=True)
    (folder / "dev.tsv").write_text("\n".join(["index\tgenre\tsentence1\tsentence2\tscore", *lines]) + "\n", "utf-8")
    return folder.parent


class Clock:
    """A clock that stands still until something is run."""

    def __init__(self) -> None:
        self.now = 0.0
        self.ran: list[str] = []

    def __call__(self) -> float:
        return self.now

    def run(self, name: str, seconds: float) -> Callable[[], None]:
        def advance() -> None:
            self.ran.append(name)
            self.now += seconds

        return advance


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    clock = Clock()
    monkeypatch.setattr(distilkit.timing, "time", SimpleNamespace(perf_counter=clock))
    return clock


# ------------------------------------------------------------------------------------- times


def test_models_are_timed_in_turn_after_a_warm_up(clock: Clock) -> None:
    passes = [[clock.run("a0", 1), clock.run("a1", 2)], [clock.run("b0", 4), clock.run("b1", 8)]]
    seconds = seconds_in_turn(passes, warm_up=3, rounds=2)
    warm, timed = clock.ran[:6], clock.ran[6:]
    assert warm == ["a0", "a1", "a0", "b0", "b1", "b0"]
    assert timed == ["a0", "b0", "a1", "b1", "b0", "a0", "b1", "a1"]
    assert [own.tolist() for own in seconds] == [[[1, 2], [1, 2]], [[4, 8], [4, 8]]]


def test_latency_is_numpys_percentiles_of_each_batchs_median() -> None:
    seconds = np.random.default_rng(0).gamma(2, 0.01, size=(5, 37))
    seconds[3] *= 50  # a slow moment of the machine: medians over rounds drop it
    medians = np.array([sorted(column)[2] for column in seconds.T])
    expected = {"latency_ms": 50, "latency_ms_p10": 10, "latency_ms_p90": 90}
    assert latency(seconds) == pytest.approx({key: 1000 * np.percentile(medians, p) for key, p in expected.items()})


def test_throughput_is_the_median_round() -> None:
    assert throughput(np.array([[1.0, 1.0], [2.0, 3.0], [0.5, 0.5]]), num_sentences=10) == {"sentences_per_second": 5}


def test_a_ratio_above_one_is_faster() -> None:
    student = {"cpu/latency_ms": 10.0, "cpu/sentences_per_second": 300.0, "cpu/pass_seconds": 2.0, "file_mb": 1.0}
    teacher = {"cpu/latency_ms": 25.0, "cpu/sentences_per_second": 100.0, "cpu/pass_seconds": 8.0, "file_mb": 2.0}
    expected = {"cpu/latency_ms": 2.5, "cpu/sentences_per_second": 3.0, "cpu/pass_seconds": 4.0}
    assert times_faster(student, teacher) == expected


def test_each_model_is_set_against_the_others(
    clock: Clock, glue: Path, save_teacher: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fake_pass(model: Any, batches: Any, *, device: str) -> Any:
        layers = model.config.num_hidden_layers
        return [clock.run(str(layers), 0.01 * layers * len(batch["input_ids"])) for batch in batches]

    monkeypatch.setattr(distilkit.evaluate.speed, "torch_pass", fake_pass)
    student, teacher, other = (save_teacher("bert", num_layers=layers) for layers in (1, 4, 2))
    task = build_speed(data_dir=str(glue), against=[str(teacher), str(other)], warm_up=0)
    mine, theirs, third = measure(task, student)
    assert [result.name for result in (mine, theirs, third)] == ["mine", teacher.name, other.name]
    assert mine.scores["cpu/latency_ms"] == pytest.approx(10)
    assert mine.scores["cpu/sentences_per_second"] == pytest.approx(100)
    keys = ("cpu/latency_ms", "cpu/latency_ms_p10", "cpu/latency_ms_p90", "cpu/sentences_per_second")
    for result, expected in ((mine, (4, 2)), (theirs, (None, 0.5)), (third, (2, None))):
        ratios = {name: ratio for name, ratio in zip((teacher.name, other.name), expected, strict=True) if ratio}
        assert result.details["against"].keys() == ratios.keys()
        for name, ratio in ratios.items():
            assert result.details["against"][name] == pytest.approx(dict.fromkeys(keys, ratio))
    one_round = ["1", "4", "2"], ["2", "4", "1"]
    assert clock.ran == [*one_round[0] * 5, *one_round[1] * 5, *one_round[0] * 2, *one_round[1] * 2]
    assert mine.cost["seconds"] == pytest.approx(2 * 5 * 0.01 * 2, abs=0.051)


def test_a_whole_pass_takes_every_sentence_once_and_alone(
    clock: Clock, glue: Path, save_teacher: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fake_pass(model: Any, batches: Any, *, device: str) -> Any:
        layers = model.config.num_hidden_layers
        return [
            clock.run(f"{layers}x{len(batch['input_ids'])}", layers * batch["input_ids"].shape[1]) for batch in batches
        ]

    monkeypatch.setattr(distilkit.evaluate.speed, "torch_pass", fake_pass)
    student, teacher = (save_teacher("bert", num_layers=layers) for layers in (1, 4))
    task = build_speed(data_dir=str(glue), against=str(teacher), warm_up=0, whole_pass=True, batch_sizes=[2, 3])
    mine, theirs = measure(task, student)
    alone = build_speed().load(make_job(student), [(f'"{one}', two) for one, two in PAIRS])
    lengths = sum(batch["input_ids"].shape[1] for batch in alone.batches[0])
    assert (mine.scores["cpu/pass_seconds"], theirs.scores["cpu/pass_seconds"]) == (lengths, 4 * lengths)
    assert mine.details["against"][teacher.name]["cpu/pass_seconds"] == 4
    assert mine.details["pass_sentences"] == 9
    assert mine.details["num_sentences"] == 5
    assert clock.ran[-18:] == ["1x1", "4x1"] * 9
    rounds = 2 * 2 * mine.details["tokens_per_sentence"] * 5
    assert mine.cost["tokens"] == pytest.approx(rounds + alone.num_tokens)


# ------------------------------------------------------------------------------------- sizes


def test_parameters_without_embeddings_of_bert_by_hand(save_teacher: Callable[..., Path]) -> None:
    width, inner = 32, 64
    layer = 4 * (width * width + width) + 2 * width * inner + inner + width + 2 * 2 * width
    pooler_and_head = width * width + width + width + 1
    model = load(save_teacher("bert", num_layers=2)).model
    assert num_parameters_without_embeddings(model) == 2 * layer + 2 * width + pooler_and_head
    tables = (model.config.vocab_size + 64 + 2) * width  # tokens, positions, segments
    assert (
        sum(parameter.numel() for parameter in model.parameters()) == num_parameters_without_embeddings(model) + tables
    )


def test_parameters_without_embeddings_of_a_tied_gpt2_by_hand() -> None:
    width, inner = 32, 128
    layer = 4 * width * width + 4 * width + 2 * width * inner + inner + width + 2 * 2 * width
    assert num_parameters_without_embeddings(build_model("gpt2", num_layers=3)) == 3 * layer + 2 * width


def test_the_file_is_measured_where_it_holds_float32(save_teacher: Callable[..., Path], tmp_path: Path) -> None:
    folder = save_teacher("bert", num_layers=1)
    size = (folder / "model.safetensors").stat().st_size / 1e6
    assert file_size(str(folder), num_params=7) == (size, "model.safetensors")
    assert file_size("some/hub-id", num_params=1_500_000) == (6.0, "parameters x 4 bytes")
    build_model("bert", num_layers=1).half().save_pretrained(tmp_path)
    assert file_size(str(tmp_path), num_params=1_500_000) == (6.0, "parameters x 4 bytes")


# -------------------------------------------------------------------------------------- ONNX


@pytest.mark.parametrize("model_type", ["bert", "distilbert", "roberta", "gpt2"])
def test_onnx_gives_torchs_logits_for_any_batch(
    model_type: str, save_teacher: Callable[..., Path], tmp_path: Path
) -> None:
    candidate = load(save_teacher(model_type, num_layers=1), batch_sizes=(1, 4))
    single, many = candidate.batches
    if model_type == "bert":  # real ones take token types too
        for batch in [*single, *many]:
            types = torch.arange(batch["input_ids"].shape[1]) > 7
            batch["token_type_ids"] = types.long().expand_as(batch["input_ids"]).contiguous()
    file = tmp_path / "onnx" / "model.onnx"
    export_onnx(candidate.model, file, example=single[0], name="tiny", cure="")
    quantized = quantize_int8(file, tmp_path / "onnx-int8" / "model.onnx")
    plain, int8 = (open_session(each, threads=1) for each in (file, quantized))
    for batch in [single[0], single[1], *many]:
        inputs = {key: tensor.numpy() for key, tensor in batch.items()}
        with torch.inference_mode():
            expected = candidate.model(**batch).logits.numpy()
        np.testing.assert_allclose(plain.run(None, inputs)[0], expected, atol=1e-3)
        assert int8.run(None, inputs)[0].shape == expected.shape == (len(batch["input_ids"]), 1)
    assert any((batch["attention_mask"] == 0).any() for batch in many)
    sizes = [sum(part.stat().st_size for part in each.parent.iterdir()) for each in (file, quantized)]
    weights = 4 * sum(parameter.numel() for parameter in candidate.model.parameters())
    assert sizes[0] > weights
    assert sizes[1] < sizes[0] - weights / 2


def test_a_model_that_torch_cannot_export_is_named(
    save_teacher: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise torch.onnx.OnnxExporterError("no translation\nand a long report")

    candidate = load(save_teacher("bert", num_layers=1))
    monkeypatch.setattr(torch.onnx, "export", refuse)
    with pytest.raises(UserError, match=r"^tiny \(bert\) .* ONNX: no translation; set task.onnx=false$"):
        example, cure = candidate.batches[0][0], "set task.onnx=false"
        export_onnx(candidate.model, tmp_path / "new", example=example, name="tiny", cure=cure)


# ------------------------------------------------------------------------------- whole results


def test_all_is_measured_of_a_causal_model_without_a_pad_token(glue: Path, save_teacher: Callable[..., Path]) -> None:
    folder = save_teacher("gpt2", num_layers=1)
    (result,) = measure(build_speed(data_dir=str(glue), onnx="auto", rounds=1), folder)
    times = ("latency_ms", "latency_ms_p10", "latency_ms_p90", "sentences_per_second")
    timed = {f"{place}/{time}" for place in ("cpu", "cpu/onnx", "cpu/onnx-int8") for time in times}
    assert set(result.scores) == timed | {"file_mb", "onnx_mb", "onnx_int8_mb"}
    assert all(value > 0 for value in result.scores.values())
    assert result.scores["cpu/latency_ms_p10"] <= result.scores["cpu/latency_ms"] <= result.scores["cpu/latency_ms_p90"]
    assert (result.name, result.task, result.kind, result.score) == ("mine", "speed", "speed", None)
    assert (result.model, result.model_type, result.seed) == (str(folder), "gpt2", 1)
    assert result.details["num_sentences"] == 5
    assert result.details["rounds"] == 1
    assert result.details["threads"] == torch.get_num_threads()
    assert result.details["against"] == {}
    assert result.details["file"] == "model.safetensors"
    assert result.settings["batch_sizes"] == [1, 3]
    assert result.cost["tokens"] == pytest.approx(6 * 5 * result.details["tokens_per_sentence"])


def test_models_of_one_name_get_their_whole_path(glue: Path, save_teacher: Callable[..., Path], tmp_path: Path) -> None:
    folder = save_teacher("bert", num_layers=1)
    task = build_speed(data_dir=str(glue), against=str(folder))
    other = tmp_path / "other"
    other.symlink_to(folder)
    assert [result.name for result in measure(task, other, name=folder.name)] == [folder.name, str(folder)]
    with pytest.raises(UserError, match="is given twice; task.against takes models other than model="):
        measure(task, folder)


def test_batches_are_padded_within_themselves_and_cut(
    save_teacher: Callable[..., Path], tokenizer: PreTrainedTokenizerBase
) -> None:
    lengths = [len(tokenizer(*pair)["input_ids"]) for pair in PAIRS]
    assert min(lengths) < 40 < 64 < max(lengths)
    bert = load(save_teacher("bert", num_layers=1))
    assert [batch["input_ids"].shape[1] for batch in bert.batches[0]] == [min(length, 64) for length in lengths]
    pieces = [lengths[start : start + 3] for start in (0, 3, 6)]
    assert [batch["input_ids"].shape[1] for batch in bert.batches[1]] == [min(max(piece), 64) for piece in pieces]
    assert bert.num_tokens == sum(min(length, 64) for length in lengths)
    short = load(save_teacher("distilbert", num_layers=1), max_length=16)
    assert {batch["input_ids"].shape[1] for batch in short.batches[0]} == {16}


def test_token_types_go_to_models_that_have_two(tokenizer: PreTrainedTokenizerBase) -> None:
    typed = copy.deepcopy(tokenizer)
    typed.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    for model_type, fields in (("bert", {}), ("distilbert", {}), ("roberta", {"type_vocab_size": 1})):
        (batch, *_) = encode(PAIRS, typed, build_model(model_type, num_layers=1, **fields), batch_size=9, max_length=32)
        types = {"token_type_ids"} if model_type == "bert" else set()
        assert set(batch) == {"input_ids", "attention_mask"} | types
        assert not types or batch["token_type_ids"].max() == 1


def test_threads_are_set_for_a_while() -> None:
    before = torch.get_num_threads()
    with torch_threads(3) as threads:
        assert threads == torch.get_num_threads() == 3
    assert torch.get_num_threads() == before
    with torch_threads(None) as threads:
        assert threads == before


# ---------------------------------------------------------------------------------- sentences


def test_sentences_come_from_glue_or_lines_and_are_spread_evenly(glue: Path, tmp_path: Path) -> None:
    quoted = [(f'"{one}', two) for one, two in PAIRS]
    assert list(build_speed(data_dir=str(glue), max_sentences=None).sentences()) == quoted
    assert list(build_speed(data_dir=str(glue / "STS-B"), max_sentences=3).sentences()) == quoted[::3]
    file = tmp_path / "lines.txt"
    file.write_text("one\n\n two \nthree\n", "utf-8")
    assert list(build_speed(data_dir=str(file), max_sentences=50).sentences()) == [("one",), ("two",), ("three",)]


def test_sentences_of_the_hub_are_stsbs_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(*names: Any, **settings: Any) -> Any:
        import datasets

        asked.append((*names, settings["split"]))
        columns = {"sentence1": ["a", "c"], "sentence2": ["b", "d"], "label": [1.0, 2.0]}
        return datasets.Dataset.from_dict(columns)

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert list(build_speed().sentences()) == [("a", "b"), ("c", "d")]
    assert asked == [("nyu-mll/glue", "stsb", "validation")]


def test_sentences_that_cannot_be_read_are_refused(glue: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="task.data_dir=nowhere does not exist; give GLUE's folder, or a .txt file"):
        build_speed(data_dir="nowhere").check_data()
    empty = tmp_path / "empty.txt"
    empty.write_text("\n\n", "utf-8")
    with pytest.raises(UserError, match="empty.txt has no sentence; give a file with one a line"):
        build_speed(data_dir=str(empty)).sentences()
    with pytest.raises(UserError, match=r"has 0 files 'dev.tsv'"):
        build_speed(data_dir=str(tmp_path)).sentences()
    file = glue / "STS-B" / "dev.tsv"
    file.write_text(file.read_text("utf-8") + "9\tgenre\tonly one\n", "utf-8")
    with pytest.raises(UserError, match=r"1 of 10 rows cannot be used; the first: line 11"):
        build_speed(data_dir=str(glue)).sentences()
    assert len(build_speed(data_dir=str(glue), skip_malformed=True, max_sentences=None).sentences()) == 9


# ------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rounds": 0}, "task.rounds=0, but it must be at least 1"),
        ({"warm_up": -1}, "task.warm_up=-1, but it must be at least 0"),
        ({"max_sentences": 0}, "task.max_sentences=0, but it must be at least 1"),
        ({"max_length": 4}, "task.max_length=4, but it must be at least 8"),
        ({"threads": 0}, "task.threads=0, but it must be at least 1"),
        ({"batch_sizes": [1]}, "task.batch_sizes=[1], but it takes two sizes of at least 1"),
        ({"batch_sizes": 32}, "task.batch_sizes=32, but it takes two sizes of at least 1"),
        ({"batch_sizes": [0, 32]}, "task.batch_sizes=[0, 32], but it takes two sizes of at least 1"),
        ({"devices": ["tpu"]}, "task.devices=tpu, but it takes auto, cpu and cuda"),
        ({"devices": []}, "task.devices is empty; it takes auto, cpu and cuda"),
        ({"devices": "cuda"}, "task.devices=cuda, but CUDA is not available; set task.devices=cpu"),
        ({"onnx": "yes"}, "task.onnx=yes, but it takes auto, true and false"),
        ({"onnx": False, "int8": True}, "task.int8=true needs the ONNX model; set task.onnx=true"),
    ],
)
def test_values_out_of_range_are_refused(
    changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(Exception) as raised:  # Hydra wraps what a constructor raises
        build_speed(**changes)
    assert isinstance(raised.value.__cause__, UserError)
    assert message in str(raised.value.__cause__)


def test_onnx_is_left_out_or_asked_for_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert build_speed(onnx="auto")._runtimes() == ["onnx", "onnx-int8"]
    assert build_speed(onnx=True, int8=False)._runtimes() == ["onnx"]
    monkeypatch.setattr(distilkit.export.onnx, "PACKAGES", ("onnx", "onnx_of_nobody"))
    assert build_speed(onnx="auto")._runtimes() == []
    for key in ("onnx", "int8"):
        with pytest.raises(Exception) as raised:
            build_speed(**{"onnx": "auto", key: True})
        assert f"task.{key}=true needs" in str(raised.value.__cause__)
        assert "onnx_of_nobody cannot be imported: pip install 'distilkit[onnx]'" in str(raised.value.__cause__)


def test_onnx_needs_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert build_speed(onnx="auto", devices="auto")._devices() == ["cpu", "cuda"]
    assert build_speed(onnx="auto", devices=["cuda"])._runtimes() == []
    with pytest.raises(Exception) as raised:
        build_speed(onnx=True, devices=["cuda"])
    assert "task.onnx=true is timed on the CPU; add cpu to task.devices" in str(raised.value.__cause__)


def test_a_folder_that_is_no_model_is_refused(glue: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot load folder .* needs config.json and model.safetensors"):
        measure(build_speed(data_dir=str(glue)), tmp_path)


def test_a_missing_tokenizer_is_refused_and_another_is_taken(
    glue: Path, tmp_path: Path, save_teacher: Callable[..., Path]
) -> None:
    build_model("bert", num_layers=1).save_pretrained(tmp_path / "bare")
    task = build_speed(data_dir=str(glue))
    with pytest.raises(
        UserError, match=r"bare' has no tokenizer: there is no vocabulary in it; add the tokenizer's files"
    ):
        measure(task, tmp_path / "bare")
    assert measure(task, tmp_path / "bare", tokenizer=str(save_teacher("bert", num_layers=1)))[0].name == "mine"


def test_a_tokenizer_with_nothing_to_pad_with_is_refused(
    glue: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    build_model("bert", num_layers=1).save_pretrained(tmp_path / "mute")
    mute = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, unk_token="[UNK]")
    mute.save_pretrained(tmp_path / "mute")
    with pytest.raises(UserError, match="has no padding token; set its pad_token and save it"):
        measure(build_speed(data_dir=str(glue)), tmp_path / "mute")


# ---------------------------------------------------------------------------------------- names


def test_a_row_is_named_after_the_folder_its_run_or_the_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("student", "model", "tiny"):
        (tmp_path / "run" / name).mkdir(parents=True)
    assert model_name(str(tmp_path / "run" / "student")) == "run"
    assert model_name(f"{tmp_path}/run/model/") == "run"
    assert model_name(str(tmp_path / "run" / "tiny")) == "tiny"
    monkeypatch.chdir(tmp_path / "run")
    assert model_name("student") == "run"
    assert model_name(".") == "run"
    assert model_name("google-bert/bert-base-uncased") == "bert-base-uncased"
    assert model_name("gpt2") == "gpt2"
