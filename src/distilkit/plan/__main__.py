"""Forecast what a run would take: ``python -m distilkit.plan teacher=roberta-base student=half_depth``."""

import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig

from distilkit.cli import explain_keys, keep_large_buffers, quiet, report_errors
from distilkit.plan.measure import measure
from distilkit.plan.page import show
from distilkit.records import write_json

_SEVERAL = {"experiment=demo", "sweep=versus", "sweep=ablation", "sweep=optuna"}  # runs that read earlier ones


def main() -> None:
    """Forecast the run of the command line."""
    if several := _SEVERAL & {override.lstrip("+") for override in sys.argv[1:]}:
        found = f"{several.pop()} makes several runs, which read what earlier ones have left"
        cure = "plan one of them: leave it out, and set teacher and student (of the demo: experiment=demo_student)"
        sys.exit(f"error: {found}; {cure}")
    _main()


@explain_keys
@hydra.main(version_base="1.3", config_path="pkg://distilkit.conf.train", config_name="plan")
@report_errors
def _main(cfg: DictConfig) -> None:
    """Measure, print the forecast, and write plan.json."""
    keep_large_buffers()
    with quiet():
        found = measure(cfg)
    show(found.numbers, found.examples)  # first: the disk may have become full
    print(found.line)
    if cfg.plan.file:
        write_json(Path(cfg.plan.file), found.numbers)


if __name__ == "__main__":
    main()
