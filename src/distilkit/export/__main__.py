"""Export a checkpoint: ``python -m distilkit.export ckpt=outputs/.../best.ckpt out=my-student``."""

import json
from pathlib import Path
from typing import Any, get_args

import hydra
from omegaconf import DictConfig, OmegaConf

from distilkit.cli import check_added, check_type, explain_keys, quiet_downloads, report_errors
from distilkit.errors import UserError
from distilkit.export.folder import Dtype, export_checkpoint
from distilkit.export.hub import push
from distilkit.export.onnx import PACKAGES, missing_packages
from distilkit.export.parity import OnnxFiles
from distilkit.language_model import num_parameters

FORMATS = ("hf", "onnx", "onnx_int8")
_TYPES: dict[str, Any] = {
    **dict.fromkeys(("ckpt", "out", "license", "push_to_hub"), str | None),
    **dict.fromkeys(("revision", "commit_message"), str),
    **dict.fromkeys(("trust_remote_code", "private"), bool),
    **{"formats": list[str], "texts": str | list[str] | None, "max_loss": float | int},
}


def export(cfg: DictConfig) -> dict[str, Any]:
    """Export ``ckpt`` to the folder ``out``, push it if asked to, and return what was made."""
    check_added(cfg, config="train/export.yaml")
    for name, kind in _TYPES.items():
        check_type(cfg[name], kind, name=name)
    for name in ("ckpt", "out"):
        if cfg[name] is None:
            raise UserError(f"{name} is not set: python -m distilkit.export ckpt=<file> out=<folder>")
    given: Any = OmegaConf.to_container(cfg, resolve=True)
    _check(given)
    formats, texts = given["formats"], given["texts"]
    onnx = None if formats == ["hf"] else OnnxFiles(formats=formats, texts=texts, max_loss=cfg.max_loss)
    model = export_checkpoint(
        cfg.ckpt,
        cfg.out,
        trust_remote_code=cfg.trust_remote_code,
        dtype=cfg.dtype,
        weights="hf" in formats,
        onnx=onnx,
        license=cfg.license,
        repo=cfg.push_to_hub,
    )
    made: dict[str, Any] = {"out": str(Path(cfg.out).expanduser().resolve()), "parameters": num_parameters(model)}
    if onnx:
        made["onnx"] = onnx.measured
    if cfg.push_to_hub:
        how = {name: given[name] for name in ("private", "revision", "commit_message")}
        made["pushed"] = push(Path(made["out"]), repo=cfg.push_to_hub, **how)
    return made


def _check(given: dict[str, Any]) -> None:
    """Check formats, types and limits before anything is read."""
    formats = given["formats"]
    if not formats or set(formats) - set(FORMATS) or len(set(formats)) < len(formats):
        raise UserError(f"formats={formats}, but it takes a list of {', '.join(FORMATS)}, each once: formats=[hf,onnx]")
    if (absent := missing_packages()) and set(formats) != {"hf"}:
        found = f"{', '.join(absent)} cannot be imported: pip install 'distilkit[onnx]'"
        raise UserError(f"formats={formats} needs {', '.join(PACKAGES)}, but {found}")
    if given["dtype"] not in get_args(Dtype):
        raise UserError(f"dtype={given['dtype']}, but it takes {', '.join(get_args(Dtype))}")
    if not 0 <= given["max_loss"] <= 1:
        raise UserError(f"max_loss={given['max_loss']}, but it must be between 0 and 1, as a share of the tokens")


@explain_keys
@hydra.main(version_base="1.3", config_path="pkg://distilkit.conf.train", config_name="export")
@report_errors
def main(cfg: DictConfig) -> None:
    """Export ``ckpt`` to the folder ``out``."""
    quiet_downloads()
    print(json.dumps(export(cfg)))


if __name__ == "__main__":
    main()
