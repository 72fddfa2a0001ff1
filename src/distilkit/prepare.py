"""Tokenize a corpus into the cache, without training: ``python -m distilkit.prepare data=wikitext103``."""

import json

import hydra
from hydra.utils import instantiate
from omegaconf import DictConfig

from distilkit.cli import check_added, check_keys, check_type, explain_keys, report_errors


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
    cache = data.open(verify=cfg.verify)
    print(
        json.dumps({"cache": str(cache.folder), "documents": cache.meta["documents"], "tokens": cache.meta["tokens"]})
    )


if __name__ == "__main__":
    main()
