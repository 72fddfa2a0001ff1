"""The ONNX files of a student: equal to torch with and without padding, in the places of transformers.js, and int8 held."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer, PreTrainedTokenizerBase

import distilkit
import distilkit.export.__main__
from distilkit.data.cache import prepare, split_of
from distilkit.data.text_files import TextFiles
from distilkit.errors import UserError
from distilkit.export import parity
from distilkit.export.parity import Loss, OnnxFiles, encode, largest_difference, measure_loss, read_sentences
from jobs import Outcome, call
from tiny import build_model, make_documents, save_student

SENTENCES = ["ba be bo.", "ba ben der dor du fa fe fen.", "ga", *make_documents(9)]
ALL = "formats=[hf,onnx,onnx_int8]"


def export(folder: Path, *arguments: str) -> Outcome:
    return call(distilkit.export.__main__.main, "ckpt=last.ckpt", "out=made", *arguments, cwd=folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> tuple[Path, Outcome]:
    folder = tmp_path_factory.mktemp("onnx")
    save_student(folder / "last.ckpt", tokenizer, num_layers=2)
    (folder / "texts.txt").write_text("\n".join(SENTENCES), "utf-8")
    done = export(folder, ALL, "texts=texts.txt", "max_loss=1", "license=mit")
    assert done.code == 0, done.err
    return folder / "made", done


def test_the_files_are_where_transformers_js_looks(made: tuple[Path, Outcome]) -> None:
    folder, done = made
    names = {"model.onnx", "model_quantized.onnx", "encoder.onnx", "encoder_quantized.onnx"}
    sizes = {file.name: file.stat().st_size for file in (folder / "onnx").iterdir()}
    assert set(sizes) == names
    assert sizes["model_quantized.onnx"] < sizes["model.onnx"]
    assert {"config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"} < {
        file.name for file in folder.iterdir()
    }
    said = json.loads(done.out.splitlines()[-1])["onnx"]
    assert said["files"] == sizes
    assert said["sentences"] == len(SENTENCES)
    assert 0 < said["difference"] < 1e-4


@pytest.mark.parametrize(("file", "auto"), [("model", AutoModelForMaskedLM), ("encoder", AutoModel)])
def test_onnxruntime_gives_torchs_outputs_for_padded_and_for_single_texts(
    file: str, auto: Any, made: tuple[Path, Outcome]
) -> None:
    tokenizer, model = AutoTokenizer.from_pretrained(made[0]), auto.from_pretrained(made[0]).eval()
    session = onnxruntime.InferenceSession(str(made[0] / "onnx" / f"{file}.onnx"))
    for texts in (SENTENCES, SENTENCES[:1], SENTENCES[1:2]):
        batch = tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False)
        with torch.inference_mode():
            expected = model(**batch)[0].numpy()
        (found,) = session.run(None, {name: tensor.numpy() for name, tensor in batch.items()})
        real = batch["attention_mask"].numpy() == 1
        np.testing.assert_allclose(found[real], expected[real], atol=1e-4 * max(1, np.abs(expected).max()))


def test_the_card_gives_the_loss_of_int8(made: tuple[Path, Outcome]) -> None:
    folder, done = made
    loss = json.loads(done.out.splitlines()[-1])["onnx"]["int8"]
    card = (folder / "README.md").read_text("utf-8")
    assert f"of {loss['tokens']:,} masked tokens right" in card
    assert f"a difference of {100 * (loss['int8'] - loss['float32']):+.2f} ± {100 * loss['margin']:.2f} points" in card
    assert "differ from torch by at most" in card and "- transformers.js" in card


class Says:
    """A session whose logits are a function of its inputs."""

    def __init__(self, logits: Callable[[dict[str, Any]], Any]) -> None:
        self.logits = logits

    def run(self, names: Any, inputs: dict[str, Any]) -> list[Any]:
        return [np.asarray(self.logits(inputs))]

    def get_outputs(self) -> list[Any]:
        return [SimpleNamespace(name="logits")]


def always(token: int) -> Says:
    return Says(lambda inputs: np.broadcast_to(np.eye(200)[token], (*inputs["input_ids"].shape, 200)))


def test_each_token_of_the_sentences_is_masked_once(tokenizer: PreTrainedTokenizerBase) -> None:
    batches = list(encode(SENTENCES, tokenizer, build_model("distilbert", num_layers=1)))
    words = [word for text in SENTENCES for word in tokenizer(text, add_special_tokens=False)["input_ids"]]
    words = [word for word in words if word not in tokenizer.all_special_ids]
    common, echo = max(set(words), key=words.count), Says(lambda inputs: np.eye(200)[inputs["input_ids"]])
    loss = measure_loss(always(common), echo, batches, tokenizer, lm="mlm")
    assert loss[:2] == (words.count(common) / len(words), 0.0)  # no token sees itself
    assert loss.tokens == len(words)
    assert loss.margin is not None and loss.margin > 0


def test_a_causal_model_predicts_each_next_token(causal_tokenizer: PreTrainedTokenizerBase) -> None:
    texts = ["ba ba ba be", "ba be"]
    batches = list(encode(texts, causal_tokenizer, build_model("gpt2", num_layers=1)))
    ba, be = (causal_tokenizer.convert_tokens_to_ids(word) for word in ("ba", "be"))
    loss = measure_loss(always(ba), always(be), batches, causal_tokenizer, lm="clm")
    assert loss == Loss(float32=2 / 4, int8=2 / 4, margin=None, tokens=4)


def test_a_model_that_reads_padding_is_found(tokenizer: PreTrainedTokenizerBase) -> None:
    model = build_model("distilbert", num_layers=1)
    batches = list(encode(SENTENCES, tokenizer, model))
    assert all((batch["attention_mask"] == 0).any() for batch in batches)

    def run(**inputs: Any) -> Any:
        with torch.inference_mode():
            return model(**{name: torch.from_numpy(each) for name, each in inputs.items()}).logits

    assert largest_difference(Says(lambda inputs: run(**inputs)), model, batches) == 0
    unmasked = Says(lambda inputs: run(input_ids=inputs["input_ids"]))
    alone = [{name: tensor[:1, :3] for name, tensor in batches[0].items()}]
    assert largest_difference(unmasked, model, alone) == 0
    assert largest_difference(unmasked, model, batches) > 1e-3
    broken = Says(lambda inputs: run(**inputs) * np.nan)
    assert np.isnan(largest_difference(broken, model, batches))


def refused(folder: Path, *arguments: str) -> str:
    """Return the message of a refusal, which leaves nothing behind."""
    before = sorted(path.name for path in folder.iterdir())
    done = export(folder, *arguments)
    assert done.code == 1, done.out
    assert sorted(path.name for path in folder.iterdir()) == before
    return done.err


@pytest.fixture
def student(tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a checkpoint and sentences, where ONNX files cost nothing and sessions agree with torch."""
    save_student(tmp_path / "last.ckpt", tokenizer)
    (tmp_path / "texts.txt").write_text("\n".join(SENTENCES), "utf-8")

    def write(*given: Any, **settings: Any) -> None:
        file = next(each for each in reversed(given) if isinstance(each, Path))
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"x")

    monkeypatch.setattr(parity, "export_onnx", write)
    monkeypatch.setattr(parity, "quantize_int8", write)
    monkeypatch.setattr(parity, "open_session", lambda *given, **settings: None)
    monkeypatch.setattr(parity, "largest_difference", lambda *given: 1e-6)
    monkeypatch.setattr(parity, "measure_loss", lambda *given, **settings: Loss(0.5, 0.48, None, 100))
    return tmp_path


def test_int8_that_loses_too_much_is_refused(student: Path) -> None:
    said = refused(student, ALL, "texts=texts.txt")
    assert "int8 loses 0.0200 of the student's accuracy (0.5000 to 0.4800 on 100 tokens), more than" in said
    assert "max_loss=0.01; leave onnx_int8 out of formats, or set a larger max_loss" in said
    assert export(student, "formats=[onnx_int8]", "texts=texts.txt", "max_loss=0.03").code == 0
    assert {file.name for file in (student / "made" / "onnx").iterdir()} == {
        "model_quantized.onnx",
        "encoder_quantized.onnx",
    }
    assert not (student / "made" / "model.safetensors").exists()


@pytest.mark.parametrize("difference", [2e-4, np.nan])
def test_a_file_that_differs_from_torch_is_refused(
    difference: float, student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parity, "largest_difference", lambda *given: difference)
    said = refused(student, "formats=[onnx]", "texts=texts.txt")
    assert f"onnx/model.onnx differs from torch by {difference:.1e} of its largest output on 12 sentences" in said
    assert "more than 1e-04; leave onnx and onnx_int8 out of formats" in said


def test_too_little_space_is_found_before_a_file_is_written(student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=20_000))
    said = refused(student, "formats=[onnx]", "texts=texts.txt")
    assert "the ONNX files take up to" in said and "has 0 MB free; free some, choose another folder, or leave" in said


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("formats=[hf,pickle]", "formats=['hf', 'pickle'], but it takes a list of hf, onnx, onnx_int8, each once"),
        ("formats=[]", "formats=[], but it takes a list of"),
        ("formats=[hf,hf]", "each once: formats=[hf,onnx]"),
        ("formats=onnx", "formats=onnx, but it takes list[str]"),
        ("dtype=int8", "dtype=int8, but it takes float32, bfloat16, float16"),
        ("max_loss=-0.1", "max_loss=-0.1, but it must be between 0 and 1"),
        ("max_loss=much", "max_loss=much, but it takes"),
        ("texts=nowhere.txt", "texts: 'nowhere.txt' matches no file"),
    ],
)
def test_wrong_values_are_refused_before_anything_is_written(argument: str, message: str, student: Path) -> None:
    more = ["formats=[onnx]"] if "texts" in argument else []
    assert message in refused(student, argument, *more)


def test_missing_packages_are_named_with_the_extra(student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distilkit.export.__main__, "missing_packages", lambda: ["onnxscript"])
    said = refused(student, "formats=[onnx_int8]")
    assert (
        "needs onnx, onnxruntime, onnxscript, but onnxscript cannot be imported: pip install 'distilkit[onnx]'" in said
    )
    assert export(student).code == 0  # which hf does not need


def test_python_exports_what_the_command_exports(student: Path) -> None:
    given: dict[str, Any] = {"formats": ["hf", "onnx", "onnx_int8"], "overrides": ["max_loss=0.5", "dtype=bfloat16"]}
    made = distilkit.export_student(student / "last.ckpt", student / "mine", texts=student / "texts.txt", **given)
    done = export(student, ALL, "texts=texts.txt", "max_loss=0.5", "dtype=bfloat16")
    assert made == {**json.loads(done.out.splitlines()[-1]), "out": str(student / "mine")}
    mine, theirs = (
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (student / "mine", student / "made")
    )
    assert mine == theirs
    with pytest.raises(UserError, match="format is unknown, and no other key reads it; the config takes ckpt, out"):
        distilkit.export_student(student / "last.ckpt", student / "other", overrides=["+format=onnx"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"overrides": "dtype=bfloat16"},
            r"overrides='dtype=bfloat16' is one string, but it takes a list; give \['dtype",
        ),
        ({"overrides": ["out=other"]}, "overrides set out, which an argument of export_student sets too; drop one"),
        ({"formats": ["hf"], "overrides": ["formats=[onnx]"]}, "overrides set formats, which an argument of export_st"),
        ({"formats": "hf"}, r"formats='hf' is one string, but it takes a list; give \['hf'\]"),
    ],
)
def test_arguments_that_python_takes_otherwise_are_refused(given: dict[str, Any], message: str, student: Path) -> None:
    with pytest.raises(UserError, match=message):
        distilkit.export_student(student / "last.ckpt", student / "mine", **given)
    assert not (student / "mine").exists()


# ----------------------------------------------------------------------------------- sentences


def test_sentences_are_held_out_documents_of_the_run(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    documents = make_documents(60)
    (tmp_path / "text.txt").write_text("\n\n".join(documents), "utf-8")
    corpus = {"_target_": "distilkit.data.text_files.TextFiles", "paths": str(tmp_path / "text.txt")}
    corpus |= {"column": "text", "document": "blank_line"}
    data = {"corpus": corpus, "val_share": 0.3, "cache_dir": str(tmp_path / "cache")}
    read: dict[str, Any] = {"config": {"data": data}, "tokenizer": tokenizer}
    with pytest.raises(UserError, match=r"held-out text of this run is not cached here .*; give texts=<a .txt file"):
        read_sentences(None, **read)
    assert not (tmp_path / "cache").exists()  # which may take hours to make
    files = TextFiles(**{name: value for name, value in corpus.items() if name != "_target_"})
    prepare(files, tokenizer, cache_dir=tmp_path / "cache", val_share=0.3)
    held_out = [text for text in documents if split_of(text, val_share=0.3) == "val"]
    assert 5 < len(held_out) < 40
    spaceless = [text.replace(" ", "") for text in read_sentences(None, **read)]
    assert spaceless == [text.replace(" ", "") for text in held_out]
    (tmp_path / "text.txt").unlink()
    with pytest.raises(UserError, match="is not cached here"):
        read_sentences(None, **read)


FOREIGN = {"_target_": "pathlib.Path.touch", "self": "ran"}


@pytest.mark.parametrize(
    "corpus", [{}, FOREIGN, {"_target_": "distilkit.data.corpus.Concatenation", "parts": [FOREIGN]}]
)
def test_a_corpus_that_is_not_ours_is_not_built(corpus: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UserError, match=r"not cached here \(its corpus is no class of distilkit.data\); give texts="):
        read_sentences(None, config={"data": {"corpus": corpus}} if corpus else {}, tokenizer=tokenizer)


def test_sentences_can_be_given_in_a_list(tokenizer: PreTrainedTokenizerBase) -> None:
    assert read_sentences(["a", " ", "b"], config={}, tokenizer=tokenizer) == ["a", "b"]
    with pytest.raises(UserError, match="holds no sentence; give texts="):
        read_sentences([" "], config={}, tokenizer=tokenizer)


def test_a_causal_model_without_a_padding_token_is_exported(
    causal_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    model, files = build_model("gpt2", num_layers=1), OnnxFiles(formats=["onnx"], texts=SENTENCES, max_loss=0)
    files.write(
        model,
        type(causal_tokenizer)(tokenizer_object=causal_tokenizer.backend_tokenizer, unk_token="[UNK]"),
        tmp_path,
        config={},
    )
    assert files.measured["difference"] < 1e-4
    assert set(files.measured["files"]) == {"model.onnx", "encoder.onnx"}
