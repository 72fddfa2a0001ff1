"""The dashboard in Weights & Biases, as JSON."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

import distilkit.dashboard
from jobs import call


def panels(view: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the panels of a view by type and title."""
    sections = view["spec"]["section"]["panelBankConfig"]["sections"]
    found = [panel for section in sections for panel in section["panels"]]
    return {f"{each['viewType']}: {each['config'].get('chartTitle')}": each["config"] for each in found}


def test_a_dry_run_prints_both_views_without_a_network(tmp_path: Path) -> None:
    done = call(distilkit.dashboard.main, "project=p", "entity=me", "group=now", "dry_run=true", cwd=tmp_path)
    assert done.code == 0, done.err
    views = json.loads(done.out)
    assert [(view["entity"], view["project"], view["displayName"]) for view in views.values()] == [
        ("me", "p", "distilkit run"),
        ("me", "p", "distilkit sweep now"),
    ]
    run, sweep = map(panels, views.values())
    curve = "Run History Line Plot: held-out cross-entropy, over "
    for view in (run, sweep):
        assert {name: view[curve + name]["xAxis"] for name in ("tokens", "hours")} == {
            "tokens": "progress/tokens",
            "hours": "progress/hours",
        }
        assert view[curve + "hours"]["metrics"] == ["val/nll", "val/teacher_nll"]
    shown = {name for config in run.values() for name in config.get("metrics") or ()}
    assert shown >= {"val/agreement", "train/loss_ce", "train/weighted_ce", "train/gradient_norm_cos", "train/lr"}
    assert shown >= {"throughput/tokens_per_second", "throughput/mfu", "memory/device_peak_mb", "memory/host_peak_mb"}
    assert "predictions" in json.dumps(views["run"])
    axes = sweep["Parallel Coordinates Plot: settings and held-out cross-entropy"]["columns"]
    settings = [f"config:objective.value.{name}" for name in ("temperature", "alpha_ce", "alpha_mlm", "alpha_cos")]
    assert [axis["accessor"] for axis in axes] == [*settings, "summary:val/nll"]
    (runs,) = views["sweep"]["spec"]["section"]["runSets"]
    assert runs["sort"]["keys"] == [{"key": {"section": "summary", "name": "val/nll"}, "ascending": True}]
    assert runs["runFeed"]["columnOrder"][1:] == ["summary:val/nll", "summary:verdict", *settings]
    (only,) = runs["filters"]["filters"]
    assert (only["key"]["name"], only["op"], only["value"]) == ("group", "=", "now")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "project is not set: python -m distilkit.dashboard project=<project> entity=<user or team>"),
        (["project=p"], "the dashboard lies on a server of W&B, but WANDB_MODE=offline is set; dry_run=true prints"),
        (["project=p", "settings=3"], r"settings=3, but it takes list[str]"),
    ],
)
def test_what_is_missing_is_said_in_one_line(arguments: list[str], said: str, tmp_path: Path) -> None:
    done = call(distilkit.dashboard.main, *arguments, cwd=tmp_path)
    assert (done.code, len(done.err.splitlines())) == (1, 1)
    assert said in done.err


def test_no_key_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setattr("distilkit.watch.tracking.offline_reason", lambda: "no API key is set (wandb login)")
    done = call(distilkit.dashboard.main, "project=p", cwd=tmp_path)
    assert (done.code, len(done.err.splitlines())) == (1, 1)
    assert "but no API key is set (wandb login); dry_run=true prints it instead" in done.err


def test_without_the_package_one_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    done = call(distilkit.dashboard.main, "project=p", "dry_run=true", cwd=tmp_path)
    assert (done.code, len(done.err.splitlines())) == (1, 1)
    assert "pip install 'distilkit[dashboard]'" in done.err
