"""Score a model on the held-out blocks of a corpus: ``python -m benchmarks.quality.held_out OUT NAME MODEL <overrides>``.

The overrides are those of ``distilkit.train``: teacher and data, which give the same blocks and masks for all models.
Each block's sums are kept, so that the report can draw intervals and paired differences.
"""

import sys
from pathlib import Path

from hydra import compose, initialize_config_module

from distilkit.cli import keep_large_buffers, quiet
from distilkit.errors import UserError
from distilkit.evaluate.models import described, weights_id
from distilkit.metrics import measure
from distilkit.records import Result, Rows, write_results, write_rows
from distilkit.train import Job, build

METRICS = ("perplexity", "masked_cross_entropy", "masked_accuracy")  # of the labelled tokens: all, for a causal model
TASK = "held_out"
_SUMS = {"nll": "nll", "correct": "accuracy", "tokens": "tokens"}  # of a block, as the metrics and the module call them


def held_out_job(*, out: Path, model: str, overrides: list[str]) -> Job:
    """Build a job of ``distilkit.train`` whose student is the model, without callbacks and loggers."""
    with initialize_config_module("distilkit.conf.train", version_base="1.3"):
        own = ["student=hf", f"student.name={model}", f"output_dir={out}", "logger=none"]
        cfg = compose("train", [*overrides, *own])
    cfg.callbacks = {}
    return build(cfg)


def score(*, out: Path, name: str, model: str, overrides: list[str]) -> Result:
    """Score a model and write its results and rows into ``out``."""
    keep_large_buffers()
    with quiet():
        job = held_out_job(out=out, model=model, overrides=overrides)
        job.trainer.validate(job.module, datamodule=job.data, verbose=False)
    blocks = {name: sums.numpy() for name, sums in job.module.after_blocks.items()}  # (blocks,) each
    sums = {f"masked_{name}": blocks[key] for name, key in _SUMS.items()}
    sums |= {name: blocks[name] for name in ("nll", "tokens")}  # of the perplexity
    rows = Rows(ids=blocks["ids"], sums=sums)
    scores = measure(METRICS, rows) | {"agreement": job.module.after["val/agreement"]}
    result = Result(
        name=name,
        model=model,
        sha256=weights_id(model, revision="main"),
        **described(job.module.student),
        task=TASK,
        kind="language_model",
        seed=None,  # the masks are the same for all
        settings={"packing": job.cfg.data.packing, "block_size": job.cfg.data.block_size, "blocks": len(rows)},
        scores=scores,
        score=scores[METRICS[0]],
        higher_is_better=False,
        details={"rows": {"text": len(rows)}, "tokens": int(blocks["tokens"].sum())},
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
