"""The dashboard in Weights & Biases: ``python -m distilkit.dashboard project=... entity=...``."""

import json
import os
from collections.abc import Sequence
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf

from distilkit.cli import check_added, check_type, explain_keys, report_errors
from distilkit.errors import UserError

_TERMS = ("ce", "mlm", "clm", "cos", "mse", "rel")
_AXES = {"tokens": "progress/tokens", "hours": "progress/hours"}


def _panels() -> Any:
    """Import what describes panels and views, which takes seconds."""
    try:
        import wandb_workspaces.reports.v2
        import wandb_workspaces.workspaces
    except ImportError as error:
        raise UserError(
            f"the dashboard needs wandb-workspaces ({error}); pip install 'distilkit[dashboard]'"
        ) from error
    return wandb_workspaces


def _lines(title: str, names: Sequence[str], *, over: str) -> Any:
    plot = _panels().reports.v2.LinePlot
    return plot(title=f"{title}, over {over}", x=_AXES[over], y=list(names), title_x=over)


def run_view(*, project: str, entity: str) -> Any:
    """Build the view of a run: is it learning, on what, how fast, and what both models predict."""
    packages = _panels()
    panels, section = packages.reports.v2, packages.workspaces.Section
    scores = {name: [f"val/{name}", f"val/teacher_{name}"] for name in ("nll", "accuracy")}
    learning = [_lines("held-out cross-entropy", scores["nll"], over=over) for over in _AXES]
    learning.append(_lines("held-out accuracy", scores["accuracy"], over="tokens"))
    learning.append(_lines("agreement with the teacher", ["val/agreement"], over="tokens"))
    terms = {f"terms, {kind}": [f"train/{kind}_{name}" for name in _TERMS] for kind in ("loss", "weighted")}
    norms = ["train/gradient_norm", *(f"train/gradient_norm_{name}" for name in _TERMS)]
    loss = [_lines("loss", ["train/loss"], over="tokens")]
    loss += [_lines(title, names, over="tokens") for title, names in terms.items()]
    loss += [_lines("gradient norm", norms, over="tokens"), _lines("learning rate", ["train/lr"], over="tokens")]
    speed = [_lines("tokens per second", ["throughput/tokens_per_second"], over="hours")]
    speed.append(_lines("MFU", ["throughput/mfu"], over="hours"))
    speed.append(_lines("peak memory (MB)", ["memory/device_peak_mb", "memory/host_peak_mb"], over="hours"))
    table = [panels.WeavePanelSummaryTable(table_name="predictions")]
    sections = {"Held-out text": learning, "Predictions for held-out words": table, "Loss": loss, "Speed": speed}
    made = [section(name=name, panels=each, is_open=True) for name, each in sections.items()]
    return packages.workspaces.Workspace(entity=entity, project=project, name="distilkit run", sections=made)


def sweep_view(*, project: str, entity: str, group: str | None, settings: Sequence[str]) -> Any:
    """Build the view of a sweep: what its ``settings`` led to, the best runs first, and its comparison."""
    from wandb_workspaces import expr

    packages = _panels()
    panels, section = packages.reports.v2, packages.workspaces.Section
    column, reached = panels.ParallelCoordinatesPlotColumn, panels.SummaryMetric("val/nll")
    columns = [column(metric=panels.Config(key), display_name=key.rpartition(".")[2]) for key in settings]
    columns.append(column(metric=reached, display_name="held-out cross-entropy", inverted=True))
    best = [panels.ParallelCoordinatesPlot(title="settings and held-out cross-entropy", columns=columns)]
    best.append(panels.BarPlot(title="best runs: held-out cross-entropy", metrics=[reached], max_bars_to_show=20))
    curves = [_lines("held-out cross-entropy", ["val/nll", "val/teacher_nll"], over=over) for over in _AXES]
    compared = [panels.WeavePanelSummaryTable(table_name="comparison")]
    compared.append(panels.MediaBrowser(title="comparison", media_keys=["comparison_plot"]))
    sections = {"Settings and best runs": best, "Loss": curves, "Comparison": compared}
    parts = [key.split(".") for key in settings]  # the first part of a key names a value, in which the others are
    columns_of_config = [".".join([f"config:{first}", "value", *others]) for first, *others in parts]
    runs = packages.workspaces.RunsetSettings(
        order=[expr.Ordering(expr.Summary("val/nll"), ascending=True)],
        filters=[expr.Metric("Group") == group] if group else [],
        pinned_columns=["summary:val/nll", "summary:verdict", *columns_of_config],
    )
    made = [section(name=name, panels=each, is_open=True) for name, each in sections.items()]
    name = "distilkit sweep" if group is None else f"distilkit sweep {group}"
    return packages.workspaces.Workspace(entity=entity, project=project, name=name, sections=made, runset_settings=runs)


def _check_access() -> None:
    """Refuse to write without a key or a network, before anything is sent."""
    from distilkit.watch.tracking import offline_reason  # imports wandb and Lightning

    mode = os.environ.get("WANDB_MODE")
    reason = f"WANDB_MODE={mode} is set" if mode in ("offline", "disabled", "dryrun") else offline_reason()
    if reason:
        raise UserError(f"the dashboard lies on a server of W&B, but {reason}; dry_run=true prints it instead")


@explain_keys
@hydra.main(version_base="1.3", config_path="pkg://distilkit.conf.train", config_name="dashboard")
@report_errors
def main(cfg: DictConfig) -> None:
    """Write both views into the project, or print them."""
    check_added(cfg, config="train/dashboard.yaml")
    kinds: dict[str, Any] = {"project": str, "entity": str | None, "group": str | None}
    if cfg.project is None:
        raise UserError("project is not set: python -m distilkit.dashboard project=<project> entity=<user or team>")
    for key, kind in (kinds | {"settings": list[str], "dry_run": bool}).items():
        check_type(cfg[key], kind, name=key)
    _panels()
    if not cfg.dry_run:
        _check_access()
    place: dict[str, Any] = {"project": cfg.project, "entity": cfg.entity or ""}
    if not cfg.dry_run and not cfg.entity:
        import wandb

        place["entity"] = wandb.Api().default_entity
    settings: Any = OmegaConf.to_container(cfg.settings)
    views = {"run": run_view(**place), "sweep": sweep_view(**place, group=cfg.group, settings=settings)}
    if cfg.dry_run:
        shown = {name: view._to_model().model_dump(mode="json", by_alias=True) for name, view in views.items()}
        print(json.dumps(shown))
        return
    for name, view in views.items():
        try:
            view.save()
        except Exception as error:  # of the network, of permissions, of the server's schema
            found = (
                f"W&B refuses the {name} view of {place['entity']}/{cfg.project}: {' '.join(str(error).split())[:200]}"
            )
            raise UserError(f"{found}; check project, entity and your key (wandb login --relogin)") from error
    print(json.dumps({name: view.url for name, view in views.items()}))


if __name__ == "__main__":
    main()
