"""Export a checkpoint: ``python -m distilkit.export ckpt=outputs/.../best.ckpt out=my-student``."""

import json
from pathlib import Path

import hydra
import transformers
from omegaconf import DictConfig

from distilkit.cli import check_added, explain_keys, report_errors
from distilkit.errors import UserError
from distilkit.export.folder import export_checkpoint
from distilkit.language_model import num_parameters


@explain_keys
@hydra.main(version_base="1.3", config_path="pkg://distilkit.conf.train", config_name="export")
@report_errors
def main(cfg: DictConfig) -> None:
    """Export ``ckpt`` to the folder ``out``."""
    check_added(cfg, config="train/export.yaml")
    transformers.utils.logging.disable_progress_bar()
    for name in ("ckpt", "out"):
        if cfg[name] is None:
            raise UserError(f"{name} is not set: python -m distilkit.export ckpt=<file> out=<folder>")
    model = export_checkpoint(cfg.ckpt, cfg.out, trust_remote_code=cfg.trust_remote_code)
    print(json.dumps({"out": str(Path(cfg.out).resolve()), "parameters": num_parameters(model)}))


if __name__ == "__main__":
    main()
