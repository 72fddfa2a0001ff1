import errno
import io
import platform
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from distilkit import cli
from distilkit.cli import ExpandHome, check_added, check_keys, keep_large_buffers, report_errors
from distilkit.errors import UserError

# The resident memory after freeing 200 MB, with and without the raised thresholds.
PROBE = """
import resource, sys
from distilkit.cli import keep_large_buffers
if sys.argv[1] == "keep":
    assert keep_large_buffers()
block = bytearray(200_000_000)
del block
pages = int(open("/proc/self/statm").read().split()[1])
print(pages * resource.getpagesize())
"""


def resident_after_freeing(mode: str) -> int:
    output = subprocess.run([sys.executable, "-c", PROBE, mode], capture_output=True, text=True, check=True).stdout
    return int(output)


def test_freed_buffers_stay_with_the_process_where_the_library_is_glibc() -> None:
    if platform.libc_ver()[0] == "glibc":
        assert resident_after_freeing("keep") - resident_after_freeing("give back") > 150_000_000
    else:
        assert not keep_large_buffers()


def test_a_class_without_a_signature_is_not_checked() -> None:
    check_keys(OmegaConf.create({"interval": {"_target_": "datetime.timedelta", "minutes": 15}}))
    check_keys(OmegaConf.create({"layers": {0: {1: 2}}}))  # a number is a key of YAML, too


def test_a_home_folder_may_stand_in_any_key_of_any_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    seen: list[DictConfig] = []
    cfg = OmegaConf.create(
        {
            **{"student": {"name": "~/s", "config": None}, "tokenizer": {"name": "${student.name}"}, "layers": [1, 2]},
            **{"task": {"against": ["~/a", "${student.name}", "b~/c"]}, "about": "~30 MB"},
            **{"cache_dir": "${oc.env:NOT_SET,'~/.cache'}", "wanted": "???", "any": None, "all": "~"},
        }
    )
    OmegaConf.set_readonly(cfg, True)
    cli.report_errors(seen.append)(cfg)
    home = str(tmp_path)
    assert cfg.student.name == cfg.tokenizer.name == f"{home}/s"
    assert list(cfg.task.against) == [f"{home}/a", f"{home}/s", "b~/c"]
    assert (cfg.about, cfg.all) == ("~30 MB", home)
    assert cfg.cache_dir == "~/.cache"  # each machine of a run has its own, where it is used
    assert OmegaConf.is_missing(cfg, "wanted")


@pytest.mark.parametrize(
    ("config", "known"),
    [
        ("train/train.yaml", "teacher, student"),
        ("evaluate/evaluate.yaml", "task, trainer, logger, grid, model"),
        ("evaluate/report.yaml", "runs, out, teacher"),
        ("train/export.yaml", "ckpt, out"),
    ],
)
def test_each_command_names_its_keys(config: str, known: str) -> None:
    with pytest.raises(UserError, match=f"nope is unknown, and no other key reads it; the config takes .*{known}"):
        check_added(OmegaConf.create({"nope": 1}), config=config, overrides=["+nope=1"])


def test_a_command_prints_a_replacement_for_what_its_output_cannot_encode(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="latin-1", write_through=True))
    report_errors(print)("é 나는 \udcff")
    assert written.getvalue() == b"\xe9 ?? ?\n"


@pytest.mark.parametrize(
    ("folder", "expanded"), [("~/a", "{home}/a"), ("{home}/~", "{home}/~"), ("~/it's", "{home}/it's")]
)
def test_the_folder_of_a_sweep_may_begin_with_the_home_folder(
    folder: str, expanded: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder, expanded = folder.format(home=tmp_path), expanded.format(home=tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    config = OmegaConf.create({"hydra": {"sweep": {"dir": folder}, "overrides": {"hydra": []}}})
    OmegaConf.set_readonly(config.hydra, True)
    ExpandHome().on_multirun_start(config)
    assert config.hydra.sweep.dir == expanded
    parsed = OverridesParser.create().parse_overrides(list(config.hydra.overrides.hydra))  # as Hydra does for each job
    assert [each.value() for each in parsed] == ([] if folder == expanded else [expanded])


def test_the_folder_of_a_run_that_cannot_be_made_or_written_is_said_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    config = OmegaConf.create({"hydra": {"run": {"dir": f"{tmp_path}/file/run"}}})
    with pytest.raises(SystemExit, match="1"):
        ExpandHome().on_run_start(config)
    cure = "; set hydra.run.dir to another folder\n"
    assert capsys.readouterr().err == f"error: {tmp_path}/file/run cannot be written (Not a directory){cure}"
    config.hydra.run.dir = f"{tmp_path}/{'a' * 300}"
    with pytest.raises(SystemExit, match="1"):
        ExpandHome().on_run_start(config)
    assert capsys.readouterr().err == f"error: {tmp_path}/{'a' * 300} cannot be written (File name too long){cure}"
    config.hydra.run.dir = str(tmp_path)
    ExpandHome().on_run_start(config)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))  # as a disk with a few KB left
    with pytest.raises(SystemExit, match="1"):
        ExpandHome().on_run_start(config)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert capsys.readouterr().err == f"error: {tmp_path} cannot be written (File too large){cure}"
    refuse = PermissionError(errno.EACCES, "Permission denied", str(tmp_path))  # as to another user
    monkeypatch.setattr("tempfile.TemporaryFile", lambda **_: (_ for _ in ()).throw(refuse))
    with pytest.raises(SystemExit, match="1"):
        ExpandHome().on_run_start(config)
    assert capsys.readouterr().err == f"error: {tmp_path} cannot be written (Permission denied){cure}"


def test_what_lightning_refuses_is_one_message_with_a_cure() -> None:
    with pytest.raises(InstantiationException) as refused:
        instantiate({"trainer": {"_target_": "pytorch_lightning.Trainer", "gradient_clip_algorithm": "abacus"}})
    assert str(cli.user_cause(refused.value)).startswith(
        "Lightning refuses the settings of trainer: `gradient_clip_alg"
    )
    refused.value.__cause__ = MisconfigurationException("No supported gpu backend found!")
    assert str(cli.user_cause(refused.value)).endswith("found! Without a GPU, set trainer=cpu")
