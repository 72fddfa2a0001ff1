"""Tasks on texts: metrics against scikit-learn and scipy, encoding, losses, limits."""

import copy
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedTokenizerBase

from distilkit.errors import UserError
from distilkit.evaluate.models import load_task_tokenizer
from distilkit.evaluate.rows import Example
from distilkit.evaluate.texts import TextTask
from distilkit.metrics import measure


def task(**changes: Any) -> TextTask:
    settings: dict[str, Any] = {
        "name": "mine",
        "texts": ["sentence1", "sentence2"],
        "label": "label",
        "labels": ["no", "yes"],
        "aliases": {},
        "metrics": ["accuracy"],
        "max_length": 16,
        "hub": None,
        "files": {"train": {"file": "train.*"}, "scored": {"dev": {"file": "dev.*"}}},
        "data_dir": None,
        "skip_malformed": False,
        "max_train_rows": None,
        "max_scored_rows": None,
        "submission": False,
    }
    return TextTask(**(settings | changes))


NUMBERS = {"labels": None, "metrics": ["pearson", "spearman"]}
THREE = {"labels": ["a", "b", "c"]}


def measured(own: TextTask, logits: Sequence[tuple[torch.Tensor]], targets: Sequence[float]) -> dict[str, float]:
    """Score logits, one for each row, against targets."""
    examples = [Example(texts=("ba", "be"), label=target, row=row) for row, target in enumerate(targets)]
    return measure(own.metrics, own.rows(logits, [{"target": target} for target in targets], examples))


def random_case(num_classes: int) -> tuple[torch.Tensor, list[int]]:
    generator = torch.Generator().manual_seed(num_classes)
    logits = torch.randn(50, num_classes, generator=generator)
    return logits, torch.randint(num_classes, (50,), generator=generator).tolist()


def test_metrics_of_classes_are_scikit_learns() -> None:
    logits, targets = random_case(2)
    said = logits.argmax(dim=-1).numpy()
    found = measured(task(metrics=["accuracy", "f1", "matthews"]), [(row,) for row in logits], targets)
    assert found == pytest.approx(
        {
            "accuracy": sklearn.metrics.accuracy_score(targets, said),
            "f1": sklearn.metrics.f1_score(targets, said),
            "matthews": sklearn.metrics.matthews_corrcoef(targets, said),
        }
    )


def test_accuracy_of_three_classes_is_scikit_learns() -> None:
    logits, targets = random_case(3)
    found = measured(task(**THREE), [(row,) for row in logits], targets)
    assert found == pytest.approx({"accuracy": sklearn.metrics.accuracy_score(targets, logits.argmax(-1).numpy())})


def test_correlations_are_scipys() -> None:
    generator = torch.Generator().manual_seed(0)
    said = torch.randn(50, 1, generator=generator)
    targets = (said[:, 0] + torch.randn(50, generator=generator)).round(decimals=1).tolist()  # with ties
    found = measured(task(**NUMBERS), [(row,) for row in said], targets)
    assert found["pearson"] == pytest.approx(scipy.stats.pearsonr(said[:, 0], targets).statistic, abs=1e-12)
    assert found["spearman"] == pytest.approx(scipy.stats.spearmanr(said[:, 0], targets).statistic, abs=1e-12)


def test_one_number_alone_predicted_is_a_correlation_of_zero() -> None:
    same = [(torch.tensor([0.5]),)] * 5
    assert measured(task(**NUMBERS), same, [float(n) for n in range(5)]) == {
        "pearson": 0.0,
        "spearman": 0.0,
    }


def test_gpt2_gets_a_separator_between_two_texts(causal_tokenizer: PreTrainedTokenizerBase) -> None:
    (feature,) = task().encode([Example(texts=("ba be", "bi"), label=1)], causal_tokenizer)
    assert causal_tokenizer.convert_ids_to_tokens(feature["input_ids"]) == ["ba", "be", "[SEP]", "bi"]


def test_padding_comes_last_whatever_the_tokenizer_was_saved_with(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    own = copy.deepcopy(tokenizer)
    own.save_pretrained(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text("utf-8")), "padding_side": "left"}), "utf-8")
    loaded = load_task_tokenizer(
        str(tmp_path), tokenizer=None, revision="main", trust_remote_code=False, vocabulary=len(own)
    )
    padded = loaded(["ba", "ba be bi"], padding=True)["attention_mask"]
    assert padded == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]


def test_token_types_are_there_for_a_teacher_that_needs_them(tokenizer: PreTrainedTokenizerBase) -> None:
    own = copy.deepcopy(tokenizer)
    own.model_input_names = ["input_ids", "attention_mask"]  # as a DistilBERT's
    (feature,) = task().encode([Example(texts=("ba be", "bi"), label=1)], own)
    assert feature["token_type_ids"].tolist() == [0, 0, 0, 0, 1, 1]


def test_special_tokens_that_a_text_spells_are_text(tokenizer: PreTrainedTokenizerBase) -> None:
    (feature,) = task().encode([Example(texts=("ba [SEP]", "bi"), label=1)], tokenizer)
    assert feature["input_ids"].tolist().count(tokenizer.sep_token_id) == 2


def test_one_class_alone_predicted_is_a_matthews_of_zero() -> None:
    logits = [(torch.tensor([1.0, 0.0]),)] * 6
    for num_positive in (3, 1, 6, 0):
        targets = [int(index < num_positive) for index in range(6)]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            scores = measured(task(metrics=["matthews", "f1"]), logits, targets)
        assert scores == {"matthews": 0.0, "f1": 0.0}


def test_a_correlation_of_large_numbers_keeps_its_digits() -> None:
    rng = np.random.default_rng(0)
    targets = 1e7 + rng.normal(size=200)
    said = [(torch.tensor([value]),) for value in (targets - 1e7) + rng.normal(size=200)]
    found = measured(task(**NUMBERS), said, [float(target) for target in targets])
    values = torch.cat([each for (each,) in said]).double().numpy()
    assert found["pearson"] == pytest.approx(np.corrcoef(targets, values)[0, 1], abs=1e-9)


def test_the_longest_text_is_cut_first(tokenizer: PreTrainedTokenizerBase) -> None:
    short, long = "ba be bi", " ".join(["da"] * 40)
    for texts in ((short, long), (long, short)):
        (feature,) = task().encode([Example(texts=texts, label=1)], tokenizer)
        said = tokenizer.convert_ids_to_tokens(feature["input_ids"])
        assert len(said) == 16
        assert [said.count(token) for token in ("[CLS]", "[SEP]")] == [1, 2]
        assert tokenizer(short)["input_ids"][1:-1] == [
            token for token in feature["input_ids"] if token in tokenizer(short)["input_ids"][1:-1]
        ]


def test_a_target_is_an_id_or_a_number(tokenizer: PreTrainedTokenizerBase) -> None:
    example = Example(texts=("ba", "be"), label=1.0)
    classes, numbers = (each.encode([example], tokenizer)[0] for each in (task(), task(**NUMBERS)))
    assert (type(classes["target"]), type(numbers["target"])) == (int, float)


def test_losses_are_means_of_the_plain_formulas() -> None:
    logits, targets = random_case(3)
    teacher = torch.randn(50, 3, generator=torch.Generator().manual_seed(9))
    hard = task(**THREE).hard_loss((logits,), torch.tensor(targets))
    torch.testing.assert_close(hard, F.cross_entropy(logits, torch.tensor(targets)))
    soft = task(**THREE).soft_loss((logits,), (teacher,), temperature=2.0)
    p, q = (teacher / 2).softmax(-1), (logits / 2).softmax(-1)
    torch.testing.assert_close(soft, 4 * (p * (p.log() - q.log())).sum(-1).mean())
    values, wanted = torch.randn(50, 1), torch.randn(50)
    torch.testing.assert_close(task(**NUMBERS).hard_loss((values,), wanted), F.mse_loss(values[:, 0], wanted))
    torch.testing.assert_close(
        task(**NUMBERS).soft_loss((values,), (wanted[:, None],), temperature=2.0), F.mse_loss(values[:, 0], wanted)
    )


def test_a_limit_takes_the_same_rows_each_time(tmp_path: Path) -> None:
    rows = "".join(f"text {n}\tother\t{n % 2}\n" for n in range(100))
    for name in ("train", "dev"):
        (tmp_path / f"{name}.tsv").write_text(f"sentence1\tsentence2\tlabel\n{rows}", "utf-8")
    first, second = (task(data_dir=str(tmp_path), max_train_rows=10, max_scored_rows=5) for _ in range(2))
    taken = first.train_examples()
    assert taken == second.train_examples()
    assert len({example.texts for example in taken}) == 10
    assert taken != task(data_dir=str(tmp_path)).train_examples()[:10]  # not the first: files may be sorted
    assert len(first.scored_examples()["dev"]) == 5


def test_the_folder_of_all_tasks_and_that_of_one_are_both_found(tmp_path: Path) -> None:
    (tmp_path / "MINE").mkdir()
    for name in ("train", "dev"):
        (tmp_path / "MINE" / f"{name}.tsv").write_text("sentence1\tsentence2\tlabel\na\tb\tyes\n", "utf-8")
    files = {"folder": "MINE", "train": {"file": "train.*"}, "scored": {"dev": {"file": "dev.*"}, "off": None}}
    for data_dir in (tmp_path, tmp_path / "MINE"):
        assert list(task(files=files, data_dir=str(data_dir)).scored_examples()) == ["dev"]


@pytest.mark.parametrize("name", ["../x", "a/b", "held_out"])
def test_a_split_whose_name_is_no_name_of_a_file_of_its_own_is_refused(name: str, tmp_path: Path) -> None:
    for file in ("train", "dev"):
        (tmp_path / f"{file}.tsv").write_text("sentence1\tsentence2\tlabel\na\tb\tyes\n", "utf-8")
    files = {"train": {"file": "train.*"}, "scored": {name: {"file": "dev.*"}}}
    with pytest.raises(UserError, match=f"has a split '{name}'; name it without / and not held_out"):
        task(files=files, data_dir=str(tmp_path)).check_data()


def test_a_teacher_must_predict_the_same_classes() -> None:
    def teacher(**fields: Any) -> Any:
        config = AutoConfig.for_model("distilbert", dim=8, n_heads=1, hidden_dim=8, n_layers=1, vocab_size=20, **fields)
        return AutoModelForSequenceClassification.from_config(config)

    same = {"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}}
    turned = {"id2label": {0: "yes", 1: "no"}, "label2id": {"no": 1, "yes": 0}}
    task().check_head(teacher(**same), name="t")
    task(labels=["No", "YES"]).check_head(teacher(**same), name="t")  # as distilbert's NEGATIVE and POSITIVE
    task().check_head(teacher(), name="t")  # LABEL_0, LABEL_1: it does not say
    task(**NUMBERS).check_head(teacher(num_labels=1), name="t")
    with pytest.raises(
        UserError,
        match="'t' predicts yes, no, but task mine has no, yes; fine-tune it on this task first, or set task.labels",
    ):
        task().check_head(teacher(**turned), name="t")
    with pytest.raises(UserError, match="predicts LABEL_0, LABEL_1, LABEL_2, but task mine has no, yes"):
        task().check_head(teacher(num_labels=3), name="t")
    with pytest.raises(UserError, match="but task mine has one number; fine-tune it"):
        task(**NUMBERS).check_head(teacher(), name="t")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metrics": ["bleu"]}, "'bleu' is no metric. It takes accuracy, f1, matthews, pearson, spearman and scikit-"),
        ({"metrics": ["macro_f1"]}, "'macro_f1' is no metric; near it are f1_macro"),
        ({"metrics": []}, "task.metrics is empty; it takes one or more of"),
        ({"metrics": ["roc_auc"], "labels": ["a", "b", "c"]}, "roc_auc cannot be taken from 3 classes: multi_class"),
        ({"metrics": ["roc_auc"], "labels": None}, "roc_auc cannot be taken from numbers \\(task.labels=null\\): "),
        ({"metrics": ["silhouette"]}, "silhouette cannot be taken from 2 classes: "),
        ({"labels": ["one"]}, "task.labels=\\['one'\\], but it takes two or more names, each once"),
        ({"labels": ["a", "a"]}, "it takes two or more names, each once"),
        ({"metrics": ["pearson"]}, "does not match task.labels=\\['no', 'yes'\\]"),
        ({"labels": None}, "does not match task.labels=None"),
        (
            {"metrics": ["f1"], "labels": ["a", "b", "c"]},
            "f1, which is for two classes, but task.labels has 3; take f1_macro",
        ),
        ({"texts": ["a", "b", "c"]}, "it takes one column or two"),
        ({"max_train_rows": 0}, "task.max_train_rows=0, but it must be at least 1"),
        ({"max_length": 4}, "task.max_length=4, but it must be at least 8"),
    ],
)
def test_wrong_settings_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        task(**changes)


def test_where_the_rows_are_must_be_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="task 'mine' has no data set on the hub; set task.data_dir"):
        task().train_examples()
    with pytest.raises(UserError, match="is no folder; give the folder of the task's files"):
        task(data_dir=str(tmp_path / "nothing")).check_data()
