"""Score a model on a task: ``python -m distilkit.evaluate model=<folder or hub id> task=sst2``."""

import warnings

import hydra
import transformers
from omegaconf import DictConfig

from distilkit.cli import report_errors
from distilkit.evaluate.job import evaluate
from distilkit.malloc import keep_large_buffers


@hydra.main(version_base="1.3", config_path="pkg://distilkit.conf.evaluate", config_name="evaluate")
@report_errors
def main(cfg: DictConfig) -> float | None:
    """Run one job, and return what sweepers may maximise: the score on held-out rows."""
    keep_large_buffers()
    transformers.utils.logging.disable_progress_bar()
    for message in (".*does not have many workers", ".*LeafSpec", "Checkpoint directory .* exists", ".*eval mode"):
        warnings.filterwarnings("ignore", message=message)
    return evaluate(cfg)


if __name__ == "__main__":
    main()
