"""Tokenize a corpus into the cache, without training: ``python -m distilkit.prepare data=wikitext103``."""

import functools
import json
from collections.abc import Callable

import hydra
from hydra.utils import instantiate
from omegaconf import DictConfig

from distilkit.cli import check_added, check_keys, check_type, explain_keys, report_errors
from distilkit.data import DistillationDataModule
from distilkit.data.teacher_states import TeacherStates
from distilkit.errors import UserError


@explain_keys
@hydra.main(version_base="1.3", config_path="pkg://distilkit.conf.train", config_name="prepare")
@report_errors
def main(cfg: DictConfig) -> None:
    """Prepare the cache that ``distilkit.train`` uses with the same overrides, or a shard of it, and print its size."""
    check_added(cfg, config="train/train.yaml")
    check_keys(cfg)
    check_type(cfg.verify, bool, name="verify")
    tokenizer = instantiate(cfg.tokenizer)
    data = instantiate(cfg.data, tokenizer=tokenizer, lm="clm" if tokenizer.mask_token_id is None else "mlm")
    if data.shard is not None and (missing := data.prepare_shard(data.shard)):
        print(json.dumps({"shard": data.shard, "num_shards": data.num_shards, "missing": len(missing)}))
        return
    fill = _filler(cfg, data) if cfg.teacher_cache.epochs else None  # first: what is refused is refused at once
    cache = data.open(verify=cfg.verify)
    found = {"cache": str(cache.folder), "documents": cache.meta["documents"], "tokens": cache.meta["tokens"]}
    print(json.dumps(found | ({} if fill is None else {"teacher_states": str(fill().folder)})))


def _filler(cfg: DictConfig, data: DistillationDataModule) -> Callable[[], TeacherStates]:
    """Load the teacher, and return the function that fills the cache of its states."""
    from distilkit.teacher_cache import at_labelled_tokens, fill_states  # imports the models
    from distilkit.train import build_trainer, choose_precision_of
    from distilkit.trim.model import trim_teacher

    choose_precision_of(cfg, None)
    place = build_trainer(cfg)
    teacher = trim_teacher(instantiate(cfg.teacher, needs_head=False), data.tokenizer)
    if teacher is None:
        raise UserError("teacher_cache.epochs needs a teacher, but teacher=none; choose one, or set it to 0")
    at_labelled_tokens(instantiate(cfg.objective), masking=data.masking, lm=teacher.lm)
    bf16 = str(place.precision).startswith("bf16")
    return functools.partial(fill_states, data, teacher, device=place.strategy.root_device, bf16=bf16)


if __name__ == "__main__":
    main()
