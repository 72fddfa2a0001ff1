"""Which keys a command takes, and which ones it names where one is misspelt."""

from importlib import import_module
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from hydra.errors import ConfigCompositionException

import distilkit.evaluate.__main__
import distilkit.export.__main__
import distilkit.prepare
import distilkit.report.__main__
import distilkit.train
from distilkit.cli import check_keys
from distilkit.errors import UserError
from distilkit.overrides import near, unknown_key
from jobs import call


@pytest.mark.parametrize(
    ("key", "known", "meant"),
    [
        ("a.temprature", ["a.temperature", "a.alpha_ce"], "; did you mean a.temperature?"),
        ("temperature", ["objective.temperature", "objective"], "; did you mean objective.temperature?"),
        ("max_step", ["trainer.max_steps", "trainer.max_epochs"], "; did you mean trainer.max_steps?"),
        ("a.lr", ["a.lr", "b.lr"], "; did you mean a.lr or b.lr?"),
        ("nonsense", ["objective.temperature", "seed"], ""),
    ],
)
def test_near_keys_are_alike_as_a_whole_or_in_their_last_part(key: str, known: list[str], meant: str) -> None:
    assert near(key, known) == meant


@pytest.mark.parametrize("room", ["train", "evaluate"])
def test_each_argument_of_lightnings_trainer_is_a_key_without_a_plus(room: str) -> None:
    given = ["trainer=cpu", "trainer.accumulate_grad_batches=3", "trainer.profiler=simple"]
    with initialize_config_module(f"distilkit.conf.{room}", version_base="1.3"):
        cfg = compose(room, given)
        wrong = compose(room, ["trainer.max_step=3"])
        with pytest.raises(ConfigCompositionException):  # all other groups are closed
            compose(room, ["logger.nope=3"])
    assert (cfg.trainer.accumulate_grad_batches, cfg.trainer.profiler) == (3, "simple")
    check_keys(cfg.trainer, path="trainer")
    with pytest.raises(UserError, match=r"trainer.max_step is unknown; trainer takes .*; did you mean trainer.max_ste"):
        check_keys(wrong.trainer, path="trainer")


@pytest.mark.parametrize(
    ("command", "override", "message"),
    [
        (
            distilkit.train,
            "objective.temprature=2",
            "objective.temprature is not in the config; did you mean objective.te",
        ),
        (distilkit.train, "temperature=2", "temperature is not in the config; did you mean objective.temperature?"),
        (distilkit.train, "accumulate_grad_batches=2", "did you mean trainer.accumulate_grad_batches?"),
        (distilkit.train, "teachr=gpt2", "did you mean teacher?"),
        (distilkit.train, "experment=demo", "did you mean experiment?"),
        (distilkit.prepare, "data.corpus.path=x", "did you mean data.corpus.paths"),
        (distilkit.evaluate.__main__, "finetune.epoch=2", "did you mean finetune.epochs?"),
        (distilkit.export.__main__, "chkpt=2", "did you mean ckpt?"),
        (distilkit.report.__main__, "run=2", "did you mean runs?"),
        (import_module("distilkit.plan.__main__"), "objective.temprature=2", "did you mean objective.temperature?"),
        (import_module("distilkit.dashboard"), "projct=2", "did you mean project?"),
        (
            distilkit.train,
            "nonsense=2",
            "nonsense is not in the config; --help lists its keys, and +nonsense=... adds one",
        ),
    ],
)
def test_a_misspelt_key_is_one_message_with_the_near_ones(
    command: object, override: str, message: str, tmp_path: Path
) -> None:
    extra = ["data=text"] if command is distilkit.prepare else []
    done = call(command.main, *extra, override, cwd=tmp_path)  # type: ignore[attr-defined]
    assert done.code == 1
    assert done.err.startswith("error: ")
    assert message in done.err
    assert done.err.count("\n") == 1, done.err
    assert not list(tmp_path.iterdir())


def test_other_errors_of_hydra_stay_as_they_are(tmp_path: Path) -> None:
    done = call(distilkit.train.main, "objective=distillbert", cwd=tmp_path)
    assert "Could not find 'objective/distillbert'" in done.err
    assert unknown_key(ValueError("no")) is None
