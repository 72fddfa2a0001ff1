"""Forecast what a run would take: ``python -m distilkit.plan teacher=roberta-base student=half_depth``."""

import hydra
from omegaconf import DictConfig
from rich.console import Console

from distilkit.cli import keep_large_buffers, quiet, report_errors
from distilkit.plan.measure import measure, write
from distilkit.plan.page import show


@hydra.main(version_base="1.3", config_path="pkg://distilkit.conf.train", config_name="plan")
@report_errors
def main(cfg: DictConfig) -> None:
    """Measure, print the forecast, and write plan.json."""
    keep_large_buffers()
    with quiet():
        found = measure(cfg)
    file = write(found, cfg.plan.file)
    console = Console()
    show(found, console)
    if file:
        console.print(f"numbers: {file}", soft_wrap=True, highlight=False)
    console.print(found.line, style="bold", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
