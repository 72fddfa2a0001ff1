"""Forecast what a run would take: ``python -m distilkit.plan teacher=roberta-base student=half_depth``."""

from pathlib import Path

import hydra
from omegaconf import DictConfig

from distilkit.cli import explain_keys, keep_large_buffers, quiet, report_errors
from distilkit.plan.measure import measure
from distilkit.plan.page import show
from distilkit.records import write_json


@explain_keys
@hydra.main(version_base="1.3", config_path="pkg://distilkit.conf.train", config_name="plan")
@report_errors
def main(cfg: DictConfig) -> None:
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
