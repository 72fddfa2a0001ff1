"""The card of a student: the hub's metadata, what a reader learns of the training, and scores that replace older ones."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from omegaconf import OmegaConf

from distilkit.data.corpus import Concatenation
from distilkit.data.docstrings import Docstrings
from distilkit.data.hub import HubDataset, MultilingualWikipedia
from distilkit.export.card import add_scores, student_card, teacher_metadata
from distilkit.summary import _hub_datasets, card_metadata
from tiny import RECORD

RESULTS = {"val/nll": 4.5, "val/perplexity": 90.017, "val/accuracy": 0.25, "val/agreement": 0.6}


def card(record: dict[str, Any] | None = None, **fields: Any) -> ModelCard:
    given = {"summary": {"after": RESULTS}, "tokens_seen": 1000, "num_params": 66_000_000, "lm": "mlm", **fields}
    return student_card(RECORD | (record or {}), **given)


def head(content: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(content.split("---\n")[1])
    return found


def test_the_hub_learns_what_the_student_is() -> None:
    metadata = head(card().content)
    (index,) = metadata.pop("model-index")
    assert metadata == {
        "base_model": "google-bert/bert-base-uncased",
        "datasets": ["wikimedia/wikipedia"],
        "language": "en",
        "library_name": "transformers",
        "license": "apache-2.0",
        "pipeline_tag": "fill-mask",
        "tags": ["knowledge-distillation", "distilkit"],
    }
    assert index["name"] == "demo"
    values = {result["metrics"][0]["type"]: result["metrics"][0]["value"] for result in index["results"]}
    # One dataset gives one entry with all its metrics.
    values |= {metric["type"]: metric["value"] for metric in index["results"][0]["metrics"]}
    assert values == {"nll": 4.5, "perplexity": 90.017, "accuracy": 0.25}


def test_a_reader_learns_how_the_student_was_made() -> None:
    text = card().text
    for fact in (
        "A DistilBertForMaskedLM of 66,000,000 parameters, distilled from `google-bert/bert-base-uncased` (110,000,000 "
        "parameters) with distilkit 1.2.3, by the method of [DistilBERT]",
        "| layers kept | [0, 2, 4] |",
        "| objective | alpha_ce 5.0, temperature 2.0 |",
        "| block size | 64 tokens, 16 blocks a step |",
        "| perplexity | 90.0170 |",
        'pipeline("fill-mask", "path/to/this/folder")("The capital of France is [MASK].")',
    ):
        assert fact in text


@pytest.mark.parametrize(
    ("objective", "tokens_seen", "facts"),
    [
        (
            {"alpha_ce": 5.0},
            0,
            ["made from `google-bert/bert-base-uncased` (110", ", and not trained.", "pipeline("],
        ),
        (
            {"alpha_mlm": 1.0},
            9,
            ["trained on the LM loss alone with distilkit 1.2.3; its layers come from `google", "pipeline("],
        ),
        (
            {"alpha_rel": 1.0},
            9,
            ["by the method of [MiniLMv2]", "AutoModel.from_pretrained(", "no term of the loss trained"],
        ),
        ({"alpha_rel": 1.0, "alpha_mlm": 1.0}, 9, ["by the method of [MiniLMv2]", "pipeline("]),
        ({"alpha_cos": 1.0}, 9, ["by the method of [DistilBERT]", "AutoModel.from_pretrained("]),
    ],
)
def test_a_card_claims_no_teaching_and_no_predictions_that_there_were_not(
    objective: dict[str, float], tokens_seen: int, facts: list[str]
) -> None:
    text = card({"objective": objective}, tokens_seen=tokens_seen).text
    assert [fact for fact in facts if fact not in text] == []
    assert ("distilled from" in text) == any("method" in fact for fact in facts)
    assert ("pipeline(" in text) == ("pipeline(" in facts)


def test_scores_stand_beside_those_of_teacher_start_and_baseline_with_intervals() -> None:
    after = {**RESULTS, "val/teacher_nll": 3.25, "val/teacher_accuracy": 0.5, "val/loss": 9.0}
    before, baseline = {"val/nll": 6.5, "val/accuracy": 0.125}, {"val/nll": 5.5}
    summary = {"after": after, "before": before, "baseline_after": baseline, "intervals": {"nll": 0.0625}}
    made = card(summary={**summary, "verdict": {"line": "kept 50.0 % of it, by /home/me/x"}})
    table = (
        "| held-out text | teacher | before training | baseline | this model |\n|---|---:|---:|---:|---:|\n"
        "| cross-entropy, nats per token | 3.2500 | 6.5000 | 5.5000 | 4.5000 ± 0.0625 |\n"
        "| perplexity |  |  |  | 90.0170 |\n"
        "| masked accuracy | 0.5000 | 0.1250 |  | 0.2500 |\n"
        "| agreement with the teacher |  |  |  | 0.6000 |\n\n"
        "Verdict: kept 50.0 % of it, by x. ± is half of a 95 % interval over held-out blocks. The baseline is another"
    )
    assert table in made.text


def test_a_card_says_time_machine_energy_and_the_licence_of_the_data() -> None:
    config = {"trainer": {"precision": "bf16-mixed"}, "student": {"layers": "half"}}
    metadata = {**RECORD["metadata"], "data_license": ["cc-by-sa-4.0", "gfdl"], "energy": "1.5 kWh"}
    known = {"training_seconds": 9000.0, "machine": "NVIDIA H100"}
    made = card({"config": config, "metadata": metadata}, summary=known, positions=512)
    for fact in (
        "| training time | 2.50 hours |\n| hardware | NVIDIA H100, precision bf16-mixed |\n| energy | 1.5 kWh |",
        "| data licence | cc-by-sa-4.0, gfdl |",
        "| chosen by | `student.layers=half`: at equal distances from the first to the last |",
        "| teacher | `google-bert/bert-base-uncased`, commit `abc` |",
        "It reads at most 512 tokens, and was trained on 64 at a time.",
        "@article{sanh2019distilbert,",
    ):
        assert fact in made.text
    assert not {"data_license", "energy"} & set(head(made.content))
    assert "| data licence | not stated |" in card().text
    assert "@inproceedings{wang2021minilmv2," in card({"objective": {"alpha_rel": 1.0}}).text


@pytest.mark.parametrize(
    ("metadata", "own", "given", "shown"),
    [
        ({"license": "mit"}, None, None, "`mit`, as the card of the teacher says.\nThe student holds"),
        ({"license": "mit"}, None, "gpl-3.0", "`gpl-3.0`.\nThe teacher's own licence is `mit`. The student holds"),
        ({"license": "mit"}, "mit", None, "`mit`.\nThe student holds"),
        ({}, None, None, "None was stated. Ask the authors before you use or share the model.\nThe student holds"),
    ],
)
def test_the_licence_of_the_teacher_is_carried_over(
    metadata: dict[str, Any], own: str | None, given: str | None, shown: str
) -> None:
    made = card({"metadata": metadata, "config": {"card": {"license": own}}}, license=given)
    assert f"## Licence\n\n{shown}" in made.text
    assert made.data.license == (given or metadata.get("license"))


@pytest.mark.parametrize(
    ("files", "fields", "shown"),
    [
        (["model.onnx"], {}, ["InferenceSession(file)", '"path/to/this/folder/onnx/model.onnx"', "both with float32"]),
        (["model.onnx"], {"repo": "me/a"}, ['huggingface_hub.hf_hub_download("me/a", "onnx/model.onnx")']),
        (["model_quantized.onnx"], {}, ["onnx/model_quantized.onnx", "`model_quantized` is the", "both with int8"]),
        (["model.onnx", "model_quantized.onnx"], {}, ["onnx/model.onnx", "head,\n`_quantized` has int8 weights."]),
        (["model.onnx"], {"lm": "clm"}, ["place = -1", 'tokenizer("The capital of France is", ']),
        (["encoder.onnx"], {"record": {"objective": {"alpha_rel": 1.0}}}, ["onnx/encoder.onnx", "outputs.shape"]),
    ],
)
def test_a_folder_of_onnx_files_alone_is_not_said_to_load_in_transformers(
    files: list[str], fields: dict[str, Any], shown: list[str]
) -> None:
    onnx = {"sentences": 12, "difference": 1e-6, "files": dict.fromkeys(files, 1)}
    text = card(onnx={**onnx, "alone": True}, **fields).text
    assert all(each in text for each in shown), text
    assert "pipeline(" not in text and "AutoModel" not in text and "SentenceTransformer" not in text
    assert "import onnxruntime" not in card(onnx={**onnx, "alone": False}, **fields).text


def test_the_hub_reads_the_scores_back() -> None:
    (nll, perplexity, accuracy) = ModelCard(card().content).data.eval_results
    assert [each.metric_value for each in (nll, perplexity, accuracy)] == [4.5, 90.017, 0.25]
    for each in (nll, perplexity, accuracy):
        assert (each.task_type, each.dataset_type) == ("fill-mask", "held-out")
        assert each.metric_name and each.dataset_name


def test_a_causal_student_generates_and_one_without_a_teacher_has_no_base_model() -> None:
    made = card({"teacher": None, "layers": None, "metadata": {}}, lm="clm", summary={})
    metadata = head(made.content)
    assert metadata["pipeline_tag"] == "text-generation"
    assert not {"base_model", "license", "model-index"} & set(metadata)
    assert "trained without a teacher" in made.text
    assert 'pipeline("text-generation", "path/to/this/folder")\nprint(write("The capital of France is"' in made.text
    assert "## Held-out scores" not in made.text and "no scores of these weights" in made.text
    assert "| layers kept | none: random init |" in made.text
    assert "## Citation" not in made.text


def test_a_card_shows_how_the_layers_were_chosen() -> None:
    steps: list[dict[str, Any]] = [
        {"step": 0, "dropped": None, "loss": 2.0},
        {"step": 1, "dropped": 3, "loss": 2.25, "candidates": {3: 2.25, 0: 3.0}},
        {"step": "even", "layers": [0, 2, 4], "loss": 2.125, "taken": True},
    ]
    greedy = {"method": "greedy", "layers": [0, 2, 4], "num_blocks": 256, "evaluations": 57, "table": steps}
    shown = "the teacher 2.0000, without 3 2.2500, layers [0, 2, 4] 2.1250 (taken)"
    text = card({"layer_choice": greedy}).text
    assert (
        f"| layers kept | [0, 2, 4] |\n| chosen by | greedy, 256 blocks of the training text: {shown} |\n| obj" in text
    )
    rows = [{"layer": 0, "influence": 0.5, "kept": True}, {"layer": 1, "influence": 0.125, "kept": False}]
    text = card({"layer_choice": {**greedy, "method": "influence", "table": rows}}).text
    assert (
        "| chosen by | influence, 256 blocks of the training text: layer 0 0.5000, layer 1 0.1250 (dropped) |" in text
    )
    assert "chosen by" not in card({"layer_choice": None}).text and "chosen by" not in card().text


def test_the_mask_token_of_the_example_is_the_tokenizers() -> None:
    assert "The capital of France is <mask>." in card(mask_token="<mask>").text


def test_a_student_inherits_licence_and_language_from_a_card_of_its_teacher(tmp_path: Path) -> None:
    assert teacher_metadata(str(tmp_path)) == {}
    (tmp_path / "README.md").write_text("---\nlicense: mit\nlanguage: [de, fr]\ntags: [x]\n---\n# Teacher\n", "utf-8")
    assert teacher_metadata(str(tmp_path)) == {"license": "mit", "language": ["de", "fr"]}
    assert teacher_metadata("nobody/nothing") == {}  # the hub cannot be reached
    (tmp_path / "README.md").write_text("---\nlanguage: [en, no]\nlicense: 2024-01-01\n---\n", "utf-8")
    assert teacher_metadata(str(tmp_path)) == {"language": ["en", "no"]}  # YAML takes no for false, and makes a date


@pytest.mark.parametrize("header", ["license: mit: x", "license: [mit\n: x", "license: mit\ntags: 3", "- a"])
def test_a_card_with_damaged_metadata_stops_neither_training_nor_evaluation(
    header: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "README.md").write_text(f"---\n{header}\n---\n# Someone\n", "utf-8")
    assert teacher_metadata(str(tmp_path)) == {}
    assert not add_scores(tmp_path, "| task | 60.0 |\n", {"rte": {"accuracy": 0.6}})


def test_a_run_without_a_name_has_a_card() -> None:
    assert head(card({"name": None}).content)["model-index"][0]["name"] == "DistilBertForMaskedLM"


def test_a_bar_in_the_data_does_not_break_the_table() -> None:
    assert "| data | a \\| b c |" in card({"data": "a | b\nc"}).text


@pytest.mark.parametrize(
    "data, shown",
    [
        (
            "text files ['/home/me/a b/c.txt', 'books/d.txt', '~/e/*.jsonl']",
            "text files ['c.txt', 'books/d.txt', '*.jsonl']",
        ),
        ("text files ['/home/me/books/', \"/home/it's/f.txt\"]", "text files ['books', \"f.txt\"]"),
        ("/srv/data/mine de", "mine de"),
        ("~/corpus.txt, /data/x.txt; C:\\\\texts\\\\y.txt", "corpus.txt, x.txt; y.txt"),
        ("https://example.org/a/b and 1/2 of x/y/z (a/b)", "https://example.org/a/b and 1/2 of x/y/z (a/b)"),
    ],
)
def test_a_card_shows_the_names_of_files_and_not_the_folders_of_this_machine(data: str, shown: str) -> None:
    data = data.replace("\\\\", "\\")
    made = card({"data": data})
    assert f"| data | {shown} |" in made.text
    (index,) = head(made.content)["model-index"]
    assert index["results"][0]["dataset"]["name"] == f"held-out documents: {shown}"


def test_the_files_of_a_corpus_are_a_list_of_names() -> None:
    paths = ["/home/me/emma.txt.xz", "books/dracula's.txt"]
    config = {"data": {"corpus": {"paths": paths}}, "trainer": {"precision": "32-true"}}
    made = card({"data": f"text files {paths}", "config": config})
    assert "| data | text files emma.txt.xz, dracula's.txt |" in made.text


@pytest.mark.parametrize(
    "name, known, shown",
    [
        ("/home/me/models/my-teacher/", {}, "my-teacher"),  # also on another machine, where it is no folder
        ("~/my-teacher", {}, "my-teacher"),
        ("outputs/my-teacher", {"folder": True}, "my-teacher"),
        ("outputs/a/student", {}, "student"),
    ],
)
def test_a_teacher_in_a_folder_is_shown_by_its_name_and_is_no_base_model(
    name: str, known: dict[str, Any], shown: str
) -> None:
    made = card({"teacher": {**RECORD["teacher"], "name": name, **known}})
    assert "base_model" not in head(made.content)
    assert f"distilled from `{shown}` (110,000,000 parameters)" in made.text
    assert "/home" not in made.content and "~" not in made.content


@pytest.mark.parametrize("kept", ["Mine to keep.\n", "## Mine\n\n| a | b |\n|---|---|\n| 1 | 2 |\n"])
def test_scores_without_their_end_marker_lose_nothing_that_follows_them(kept: str, tmp_path: Path) -> None:
    card().save(tmp_path / "README.md")
    assert add_scores(tmp_path, "| task | rte |\n|---|---|\n| a | 60.0 |\n", {"rte": {"accuracy": 0.6}})
    written = (tmp_path / "README.md").read_text("utf-8")
    assert written.count("<!-- end of scores -->\n") == 1
    (tmp_path / "README.md").write_text(written.replace("<!-- end of scores -->\n", f"\n{kept}"), "utf-8")
    for score in ("70.0", "80.0"):
        assert add_scores(tmp_path, f"| task | rte |\n|---|---|\n| a | {score} |\n", {"rte": {"accuracy": 0.7}})
        text = (tmp_path / "README.md").read_text("utf-8")
        assert text.count("## Scores") == 1 and score in text and "60.0" not in text
        assert text.count(kept) == 1 and text.index(kept) > text.index("<!-- end of scores -->")


def test_the_datasets_are_the_hub_ids_that_the_corpus_reads() -> None:
    wikipedia = MultilingualWikipedia(languages=["en"], date="20231101", exponent=0.7, seed=1)
    parts = Concatenation(parts=[HubDataset(path="a/b"), HubDataset(path="c/d"), HubDataset(path="a/b"), wikipedia])
    assert _hub_datasets(parts.fingerprint()) == ["a/b", "c/d", "wikimedia/wikipedia"]
    assert _hub_datasets(Docstrings(packages=["yaml"]).fingerprint()) == []


def test_new_scores_replace_the_old_ones_in_the_text_and_in_the_metadata(tmp_path: Path) -> None:
    card().save(tmp_path / "README.md")
    assert add_scores(tmp_path, "| task | 60.0 |\n", {"rte": {"accuracy": 0.6}})
    assert add_scores(tmp_path, "| task | 70.0 |\n", {"rte": {"accuracy": 0.7}})
    found = ModelCard.load(tmp_path / "README.md")
    assert found.text.count("## Scores") == 1
    assert "70.0" in found.text and "60.0" not in found.text
    by_dataset = {(each.dataset_type, each.metric_type): each.metric_value for each in found.data.eval_results}
    assert by_dataset["rte", "accuracy"] == 0.7
    assert by_dataset["held-out", "nll"] == 4.5
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


def test_a_card_that_cannot_be_written_keeps_its_old_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    card().save(tmp_path / "README.md")
    before = (tmp_path / "README.md").read_text("utf-8")

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError("read-only file system")

    monkeypatch.setattr(ModelCard, "save", refuse)
    assert not add_scores(tmp_path, "| task | 60.0 |\n", {"rte": {"accuracy": 0.6}})
    assert "was not updated: read-only file system" in caplog.text
    assert (tmp_path / "README.md").read_text("utf-8") == before


def test_the_cards_own_keys_come_before_those_of_the_teachers_card() -> None:
    given = OmegaConf.create({"card": {"license": "mit", "language": None}})
    assert card_metadata(given.card, teacher={"license": "apache-2.0", "language": "en"}, datasets=["a/b"]) == {
        "license": "mit",
        "language": "en",
        "datasets": ["a/b"],
    }
