"""The small training that is broken, and how its results are compared with those of an unbroken one."""

import csv
import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from jobs import SMALL
from tiny import VOCABULARY, build_model, make_documents

STEPS = 24
SAME = "optimizer_steps", "tokens_seen", "before", "after"  # of summary.json
LOGGED = "train/loss", "train/lr", "val/nll", "val/loss"  # of metrics.csv


def prepare_place(folder: Path) -> tuple[str, ...]:
    """Write a teacher and a text; return the overrides of a training of 24 steps in epochs of about ten."""
    ids = {token: index for index, token in enumerate(VOCABULARY)}
    backend = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.BertProcessing(("[SEP]", ids["[SEP]"]), ("[CLS]", ids["[CLS]"]))
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(folder / "teacher")
    build_model("bert", num_layers=2).save_pretrained(folder / "teacher")
    (folder / "corpus.txt").write_text("\n\n".join(make_documents(160)), "utf-8")
    return (
        *("teacher=hf", f"teacher.name={folder}/teacher", *SMALL, f"data.corpus.paths={folder}/corpus.txt"),
        *("data.max_val_blocks=20", "data.val_share=0.15", f"cache_dir={folder}/cache", "name=torture"),
        *("callbacks.progress=null", "+trainer.enable_progress_bar=false"),
        *(f"trainer.max_steps={STEPS}", "trainer.max_epochs=-1", "optimizer.lr=1e-3"),
        *("callbacks.validation.optimizer_steps=6", "callbacks.checkpoint.every_n_train_steps=4"),
    )


def finished(folder: Path) -> list[Path]:
    """Return the finished runs below a folder."""
    return sorted(file.parent for file in folder.rglob("summary.json") if (file.parent / "student").is_dir())


def load(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    return content


def _equal(one: Any, two: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(two, torch.Tensor) and one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, dict):
        return isinstance(two, dict) and one.keys() == two.keys() and all(_equal(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(_equal, one, two))
    return bool(one == two) or (one != one and two != two)


def logged(run: Path) -> dict[tuple[int, str], str]:
    """Return what a run has logged, by step and name."""
    with (run / "metrics.csv").open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    return {(int(row["step"]), name): row[name] for row in rows for name in LOGGED if row.get(name)}


def differences(run: Path, whole: Path) -> list[str]:
    """Name what differs, bit for bit, between a run that was broken and an unbroken one."""
    found = []
    one, two = (each / "student" / "model.safetensors" for each in (run, whole))
    if one.read_bytes() != two.read_bytes():
        found.append("the student")
    last, wanted = (load(each / "checkpoints" / "last.ckpt") for each in (run, whole))
    found += [
        name
        for name in ("global_step", "state_dict", "optimizer_states", "lr_schedulers")
        if not _equal(last[name], wanted[name])
    ]
    said, expected = (json.loads((each / "summary.json").read_text("utf-8")) for each in (run, whole))
    found += [name for name in SAME if not _equal(said[name], expected[name])]
    rows, all_rows = logged(run), logged(whole)
    if rows != all_rows:
        wrong = sorted(key for key in rows.keys() | all_rows.keys() if rows.get(key) != all_rows.get(key))
        found.append(f"metrics.csv ({len(wrong)} values, the first of step {wrong[0][0]})")
    return found
