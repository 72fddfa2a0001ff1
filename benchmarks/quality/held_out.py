"""Score a model on the held-out blocks of a corpus: ``python -m benchmarks.quality.held_out OUT NAME MODEL <overrides>``.

The overrides are those of ``distilkit.train``: teacher and data, which give the same blocks and masks for all models.
Each block's sums are kept, so that the report can draw intervals and paired differences.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
from hydra import compose, initialize_config_module
from pytorch_lightning import Callback, LightningModule, Trainer

from distilkit import losses
from distilkit.cli import keep_large_buffers, quiet
from distilkit.errors import UserError
from distilkit.evaluate.models import described, weights_id
from distilkit.language_model import lm_head, token_states
from distilkit.metrics import measure
from distilkit.objective import labelled_rows
from distilkit.records import Result, Rows, write_results, write_rows
from distilkit.train import build

METRICS = ("perplexity", "masked_cross_entropy", "masked_accuracy")  # of the labelled tokens: all, for a causal model
TASK = "held_out"


class BlockSums(Callback):
    """Sum cross-entropy, hits and number of the labelled tokens of each held-out block."""

    def __init__(self) -> None:
        """Start without blocks."""
        self.parts: dict[str, list[Any]] = {f"masked_{name}": [] for name in ("nll", "correct", "tokens")}

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *more: Any
    ) -> None:
        """Score the student once more, block by block."""
        student: Any = pl_module.student
        rows, (blocks, length) = labelled_rows(batch), batch["input_ids"].shape
        targets = batch["labels"].flatten()[rows]
        nll, said = losses.score(lm_head(student, token_states(student, batch)[rows]), targets)
        block = (rows // length).cpu().numpy()
        for part, values in zip(self.parts.values(), (nll, said == targets, targets >= 0), strict=True):
            part.append(np.bincount(block, values.double().cpu().numpy(), minlength=blocks))

    def rows(self) -> Rows:
        """Return all blocks."""
        sums = {name: np.concatenate(part) for name, part in self.parts.items()}
        sums |= {name: sums[f"masked_{name}"] for name in ("nll", "tokens")}  # of the perplexity
        return Rows(ids=np.arange(len(sums["masked_tokens"])), sums=sums)


def score(*, out: Path, name: str, model: str, overrides: list[str]) -> Result:
    """Score a model and write its results and rows into ``out``."""
    with initialize_config_module("distilkit.conf.train", version_base="1.3"):
        own = ["student=hf", f"student.name={model}", f"output_dir={out}", "logger=none"]
        cfg = compose("train", [*overrides, *own])
    cfg.callbacks = {}
    keep_large_buffers()
    with quiet():
        job = build(cfg)
        sums = BlockSums()
        job.trainer.callbacks.append(sums)  # type: ignore[attr-defined]  # set by one of its connectors
        job.trainer.validate(job.module, datamodule=job.data, verbose=False)
    module, rows = job.module, sums.rows()
    scores = measure(METRICS, rows) | {"agreement": module.after["val/agreement"]}
    result = Result(
        name=name,
        model=model,
        sha256=weights_id(model, revision="main"),
        **described(module.student),
        task=TASK,
        kind="language_model",
        seed=None,  # the masks are the same for all
        settings={"packing": cfg.data.packing, "block_size": cfg.data.block_size, "masked": len(rows)},
        scores=scores,
        score=scores[METRICS[0]],
        higher_is_better=False,
        details={"rows": {"text": len(rows)}, "tokens": int(rows.sums["masked_tokens"].sum())},
    )
    write_rows(out, "text", rows)
    write_results(out, [result])
    return result


def main() -> None:
    """Score one model from the command line."""
    out, name, model, *overrides = sys.argv[1:]
    try:
        result = score(out=Path(out), name=name, model=model, overrides=overrides)
    except UserError as error:
        sys.exit(f"error: {error}")
    print(name, *(f"{key}={value:.4f}" for key, value in result.scores.items()))


if __name__ == "__main__":
    main()
