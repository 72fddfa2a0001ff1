"""Keys and passwords in a config reach no file: the command is refused before Hydra makes its folder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

import distilkit.evaluate.__main__
import distilkit.export.__main__
import distilkit.prepare
import distilkit.report.__main__
import distilkit.train
from distilkit.api import distill
from distilkit.errors import UserError
from distilkit.runs.credentials import refuse_credentials
from jobs import QUIET, SMALL, call
from tiny import make_documents

KEY = "0123456789abcdef0123456789abcdef01234567"  # the form of a W&B key, and of a commit
HF = "hf_" + "aBcD" * 8


def holding(folder: Path, secret: str) -> list[Path]:
    """List the files below a folder that hold a text anywhere."""
    return [file for file in folder.rglob("*") if file.is_file() and secret.encode() in file.read_bytes()]


@pytest.mark.parametrize(
    "override",
    [
        f"+logger.wandb.settings={{api_key: {KEY}}}",
        f"+logger.wandb.settings.api_key={KEY}",
        f"+hydra.job.env_set.WANDB_API_KEY={KEY}",
        f"+teacher.token={HF}",
        f"teacher.name={HF}",
        f"+extra.HF_TOKEN={KEY}",
        f"+logger.wandb.settings.api_key='{KEY},{HF}'",
    ],
)
@pytest.mark.parametrize("mode", [(), ("-m",)])
def test_a_key_as_an_override_reaches_no_file(override: str, mode: tuple[str, ...], tmp_path: Path) -> None:
    given = *mode, "teacher=hf", "teacher.name=nobody/nothing", "data=text", "data.corpus.paths=x", "logger=wandb"
    done = call(distilkit.train.main, *given, override, cwd=tmp_path)
    assert done.code == 1
    assert "=*** looks like a key or password" in done.err
    assert "WANDB_API_KEY" in done.err and "wandb login" in done.err
    assert KEY not in done.err + done.out and HF not in done.err + done.out
    assert list(tmp_path.rglob("*")) == []


def test_a_key_that_a_sweep_chooses_reaches_no_file(tmp_path: Path) -> None:
    given = "-m", "teacher=none", "student=new", "data=text", "data.corpus.paths=x"
    done = call(distilkit.train.main, *given, f"+logger.wandb.api_key={KEY},{KEY}", cwd=tmp_path)
    assert done.code == 1
    assert "error: logger.wandb.api_key=*** looks like" in done.err
    assert list(tmp_path.rglob("*")) == []


@pytest.mark.parametrize(
    ("entry", "given"),
    [
        (distilkit.prepare.main, ["data=text", "data.corpus.paths=x"]),
        (distilkit.export.__main__.main, ["ckpt=x", "out=y"]),
        (distilkit.evaluate.__main__.main, ["model=x"]),
        (distilkit.report.__main__.main, ["runs=[x]"]),
    ],
)
def test_each_command_refuses_a_key(entry: Callable[[], Any], given: list[str], tmp_path: Path) -> None:
    done = call(entry, *given, f"+api_key={KEY}", cwd=tmp_path)
    assert done.code == 1
    assert done.err.startswith("error: api_key=*** looks like a key")
    assert list(tmp_path.rglob("*")) == []


def test_distill_refuses_a_key(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"logger.wandb.api_key=\*\*\* looks like a key or password") as raised:
        distill(
            "nobody/nothing",
            text=make_documents(3),
            out=tmp_path / "run",
            overrides=["logger=wandb", f"+logger.wandb.api_key={KEY}", f"cache_dir={tmp_path}"],
        )
    assert KEY not in str(raised.value)
    assert list(tmp_path.rglob("*")) == []


def test_a_key_of_the_environment_reaches_no_file(
    tmp_path: Path, text_file: Path, save_teacher: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("HF_TOKEN", HF)
    given = "teacher=hf", f"teacher.name={save_teacher('bert')}", f"data.corpus.paths={text_file}", *SMALL, *QUIET
    given += f"cache_dir={tmp_path / 'cache'}", "trainer.max_steps=1", "validate_first=false", "hydra.run.dir=run"
    refused = call(distilkit.train.main, *given, "+a.b=${oc.env:HF_TOKEN}", cwd=tmp_path)
    assert "a.b=*** looks like a key" in refused.err
    done = call(distilkit.train.main, *given, "+hydra.job.env_set.MY_TOKEN=${oc.env:HF_TOKEN}", cwd=tmp_path)
    assert done.code == 0, done.err
    assert (tmp_path / "run" / "student" / "model.safetensors").is_file()
    assert holding(tmp_path, "MY_TOKEN")  # Hydra's record has the name of the variable
    assert holding(tmp_path, KEY) == holding(tmp_path, HF) == []


@pytest.mark.parametrize(
    "given",
    [
        {"teacher": {"revision": KEY}, "tokenizer": {"mask_token": "[MASK]", "eos_token": "</s>"}},
        {"student": {"config": {"pad_token_id": 0}}, "use_auth_token": True, "token": None, "max_tokens": "many"},
        {"teacher": {"name": "hf_internal/hf_tiny-random-BertForMaskedLM-with-a-long-name"}},
        {"hydra": {"sweeper": {"storage": "postgresql://${oc.env:NOBODY}:${oc.env:NOTHING}@host/db"}}},
        {
            "hydra": {
                "overrides": {"task": ["tokenizer.mask_token=x", "data.corpus.paths=[a/tokens=3/b]", "token=null"]}
            }
        },
        {"url": "https://host:8080/a@b", "key": "value", "monkey": "donkey"},
        {"paths": ["/data/sk-slovak-wikipedia-dump-2024.txt", "data/sk-learn_documentation_english"]},
    ],
)
def test_what_only_resembles_a_key_is_taken(given: dict[str, Any]) -> None:
    refuse_credentials(OmegaConf.create(given))


@pytest.mark.parametrize(
    "given",
    [
        {"hydra": {"sweeper": {"storage": "postgresql://me:secret@host/db"}}},
        {"hydra": {"overrides": {"task": ["a.b={PASSWORD: x}"]}}},
        {"a": [{"Api-Key".replace("-", "_"): "x"}]},
        {"secret": "x"},
        {"hub_token": "x"},
        {"text": "of wandb_v1_" + "a1B2" * 10},
        {"text": "AKIA" + "A1" * 8},
        {"text": "sk-proj-" + "a1B2" * 10},
        {"text": "github_pat_11ABCDEFG0" + "a1B2" * 10},
        {"text": "glpat-" + "a1B2" * 5},
        {"api-key": "x"},
        {"hydra": {"overrides": {"task": ["+headers.accessToken=x"]}}},
    ],
)
def test_keys_are_found_by_name_and_by_form(given: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"=\*\*\* looks like a key or password"):
        refuse_credentials(OmegaConf.create(given))
