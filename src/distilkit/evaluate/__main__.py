"""Score a model on a task: ``python -m distilkit.evaluate model=<folder or hub id> task=sst2``."""

import hydra
from omegaconf import DictConfig

from distilkit.cli import check_added, explain_keys, keep_large_buffers, quiet, report_errors
from distilkit.evaluate.job import evaluate


@explain_keys
@hydra.main(version_base="1.3", config_path="pkg://distilkit.conf.evaluate", config_name="evaluate")
@report_errors
def main(cfg: DictConfig) -> float | None:
    """Run one job, and return what sweepers may maximise: the score on held-out rows."""
    check_added(cfg, config="evaluate/evaluate.yaml")
    keep_large_buffers()
    with quiet():
        return evaluate(cfg)


if __name__ == "__main__":
    main()
