"""What a resumed run may set anew, and what is refused by name."""

import copy
import logging
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from omegaconf import DictConfig, OmegaConf

from distilkit.errors import UserError
from distilkit.runs import same_run

FILE = Path("/runs/a/checkpoints/last.ckpt")


@pytest.fixture(scope="module")
def whole() -> DictConfig:
    """The config of a command, as it is composed."""
    given = ["teacher=hf", "teacher.name=/old/teacher", "data=text", "data.corpus.paths=[/old/a.txt,/old/b.txt]"]
    with initialize_config_module("distilkit.conf.train", version_base="1.3"):
        return compose(
            "train", [*given, "trainer=cpu", "trainer.precision=32-true", "trainer.max_steps=10", "output_dir=/runs/a"]
        )


@pytest.fixture
def cfg(whole: DictConfig) -> DictConfig:
    return copy.deepcopy(whole)


def saved(cfg: DictConfig, *, step: int = 6, **record: Any) -> dict[str, Any]:
    """Return what a checkpoint of this config holds about it."""
    own = {"config": OmegaConf.to_container(cfg, resolve=True), "version": version("distilkit"), "layer_choice": None}
    return copy.deepcopy({"global_step": step, "distilkit": {"record": {**own, **record}}})


def change(cfg: DictConfig, changes: dict[str, Any]) -> DictConfig:
    other = copy.deepcopy(cfg)
    for key, value in changes.items():
        OmegaConf.update(other, key, value, force_add=True)
    return other


def test_the_same_settings_go_on_without_a_word(cfg: DictConfig, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    same_run.check(saved(cfg), cfg, file=FILE)
    elsewhere = {
        "output_dir": "/runs/b",
        "cache_dir": "/new/cache",
        "ckpt_path": str(FILE),
        "name": "again",
        "logger.csv.flush_logs_every_n_steps": 1,
        "callbacks.validation.optimizer_steps": 5,
        "data.num_workers": 2,
        "data.corpus.paths": ["/new/a.txt", "/new/b.txt"],
        "trainer.default_root_dir": "/runs/b",
    }
    same_run.check(saved(cfg), change(cfg, elsewhere), file=FILE)
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ({"optimizer.lr": 1e-5}, ["optimizer.lr=0.0005, this run has 1e-05"]),
        ({"optimizer.betas": [0.9, 0.999]}, ["optimizer.betas=[0.9, 0.98], this run has [0.9, 0.999]"]),
        ({"optimizer.weight_decay": 0.1, "optimizer.eps": 1e-8}, ["optimizer.weight_decay=0.0", "optimizer.eps=1e-06"]),
        ({"trainer.gradient_clip_val": 1.0, "trainer.precision": "bf16-mixed"}, ["gradient_clip_val", "32-true"]),
        ({"trainer.devices": 2}, ["trainer.devices=1, this run has 2"]),
        ({"data.micro_batch_size": 4}, ["data.micro_batch_size=32, this run has 4"]),
        ({"teacher.name": "/new/teacher"}, ["teacher.name=/old/teacher", "tokenizer.name=/old/teacher"]),
        (
            {"trainer.max_steps": 20},
            ["trainer.max_steps=10, this run has 20", "scheduler.name=linear goes on over the new"],
        ),
        ({"trainer.max_steps": -1, "budget": "3h"}, ["budget=null, this run has 3h", "over the new length"]),
    ],
)
def test_what_may_change_is_applied_and_named_in_one_line(
    changes: dict[str, Any], facts: list[str], cfg: DictConfig, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    same_run.check(saved(cfg), change(cfg, changes), file=FILE)
    (line,) = caplog.messages
    assert line.startswith("the checkpoint was trained with ")
    assert "which is applied" in line
    assert [fact for fact in facts if fact not in line] == []
    assert ("over the new length" in line) == ("over the new length" in facts[-1] or "max_steps" in str(changes))


@pytest.mark.parametrize(
    ("changes", "fact"),
    [
        ({"objective.temperature": 8}, "objective.temperature=2.0, this run has 8"),
        ({"objective.alpha_ce": [[0, 5], [1, 0]]}, "objective.alpha_ce=5.0, this run has [[0, 5], [1, 0]]"),
        ({"student.layers": [0, 1]}, "student.layers=half, this run has [0, 1]"),
        ({"student.init": "random"}, "student.init=teacher"),
        ({"seed": 7}, "seed=42, this run has 7"),
        ({"data.block_size": 64}, "data.block_size=128"),
        ({"data.global_batch_size": 64}, "data.global_batch_size=256"),
        ({"data.packing": "documents"}, "data.packing=blocks"),
        ({"data.val_share": 0.1}, "data.val_share=0.01"),
        ({"data.masking.whole_word": True}, "data.masking.whole_word=False"),
        ({"data.corpus.paths": "/old/c.txt"}, "data.corpus.paths="),
        ({"data.corpus.column": "body"}, "data.corpus.column=text"),
        ({"tokenizer.tokenizer_type": "bert"}, "tokenizer.tokenizer_type=null, this run has bert"),
        (
            {"optimizer._target_": "torch.optim.SGD"},
            "optimizer._target_=torch.optim.AdamW, this run has torch.optim.SGD",
        ),
        ({"optimizer.amsgrad": True}, "optimizer.amsgrad=null, this run has True"),
        ({"optimizer.fused": None}, "optimizer.fused=True, this run has null"),
        ({"scheduler.name": "cosine"}, "scheduler.name=linear, this run has cosine"),
        ({"scheduler.kwargs.power": 2}, "scheduler.kwargs.power=null, this run has 2"),
    ],
)
def test_what_may_not_change_is_refused_unless_it_is_meant(changes: dict[str, Any], fact: str, cfg: DictConfig) -> None:
    other = change(cfg, changes)
    with pytest.raises(UserError) as refused:
        same_run.check(saved(cfg), other, file=FILE)
    assert f"{FILE} was trained with {fact}" in str(refused.value)
    assert "resume with the same settings" in str(refused.value)
    found = same_run.differences(saved(cfg)["distilkit"]["record"], other)
    assert [line for line in found if fact not in line] == []
    assert same_run.differences(saved(cfg)["distilkit"]["record"], cfg) == []
    (key,) = changes
    assert f"may_change=[{key.partition('.')[0]}]" in str(refused.value)
    for allowed in (key, key.partition(".")[0]):
        same_run.check(saved(cfg), change(other, {"may_change": [allowed]}), file=FILE)
    with pytest.raises(UserError, match="was trained with"):
        same_run.check(saved(cfg), change(other, {"may_change": [key[:-1]]}), file=FILE)


def test_all_differences_are_in_one_message(cfg: DictConfig) -> None:
    other = change(cfg, {"seed": 7, "scheduler.name": "cosine", "objective.alpha_cos": 0.5, "optimizer.lr": 1.0})
    with pytest.raises(UserError) as refused:
        same_run.check(saved(cfg), other, file=FILE)
    assert (
        "was trained with objective.alpha_cos=1.0, this run has 0.5; scheduler.name=linear, this run has cosine; "
        "seed=42, this run has 7: resume with"
    ) in str(refused.value)
    assert "optimizer.lr" not in str(refused.value)
    assert "may_change=[objective,scheduler,seed] lets them change on purpose" in str(refused.value)


def test_another_class_is_named_without_the_keys_of_both(cfg: DictConfig) -> None:
    other = copy.deepcopy(cfg)
    other.data.description = "docstrings"
    other.data.corpus = {"_target_": "distilkit.data.docstrings.Docstrings", "packages": ["stdlib"]}
    assert same_run.differences(saved(cfg)["distilkit"]["record"], other) == [
        "data.corpus._target_=distilkit.data.text_files.TextFiles, this run has distilkit.data.docstrings.Docstrings"
    ]


def test_layers_that_were_measured_are_asked_for_by_the_method_or_as_they_are(cfg: DictConfig) -> None:
    measured = change(cfg, {"student.layers": [0, 3, 5]})
    record = saved(measured, layer_choice={"method": "greedy"})["distilkit"]["record"]
    assert same_run.differences(record, measured) == []
    assert same_run.differences(record, change(cfg, {"student.layers": "greedy"})) == []
    assert same_run.differences(record, change(cfg, {"student.layers": "influence"})) == [
        "student.layers=greedy, this run has influence"
    ]
    assert same_run.differences(record, cfg) == ["student.layers=greedy, this run has half"]


def test_a_key_that_the_checkpoints_version_lacks_had_its_default(cfg: DictConfig) -> None:
    old = saved(cfg, version="0.0.9")
    del old["distilkit"]["record"]["config"]["objective"]["temperature"]
    same_run.check(old, cfg, file=FILE)
    old["distilkit"]["record"]["version"] = version("distilkit")
    with pytest.raises(UserError, match=r"objective\.temperature=null, this run has 2"):
        same_run.check(old, cfg, file=FILE)


def test_fewer_steps_than_the_checkpoint_has_done_are_refused(cfg: DictConfig) -> None:
    with pytest.raises(
        UserError, match=r"trainer\.max_steps=5, but .*last\.ckpt has done 6 steps; set more, or export it: python -m"
    ):
        same_run.check(saved(cfg), change(cfg, {"trainer.max_steps": 5}), file=FILE)
    for steps in (6, -1):
        same_run.check(saved(cfg), change(cfg, {"trainer.max_steps": steps}), file=FILE)
