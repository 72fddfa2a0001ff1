"""Write the ONNX files of a student, and hold them against torch and against each other on real sentences."""

import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distilkit.data.cache import cache_key, open_cache, separator_id
from distilkit.data.text_files import TextFiles
from distilkit.errors import UserError
from distilkit.export.onnx import export_onnx, open_session, quantize_int8
from distilkit.language_model import LM, lm_of_model, max_positions, num_parameters
from distilkit.metrics import ratio_of_sums

_TOLERANCE = 1e-4  # of the largest output, or of 1; float32 sums in another order differ by less
_SENTENCES, _TOKENS, _BATCH = 64, 128, 8
_EVERY = 7  # each so many-th token is masked at once, close to BERT's 15 %
_CURE = "give texts=<a .txt file with one sentence a line>"

Inputs = dict[str, Tensor]  # (batch, length) each


class Loss(NamedTuple):
    """Shares of ``tokens`` masked or next tokens predicted right; half of the difference's 95 % interval over sentences."""

    float32: float
    int8: float
    margin: float | None
    tokens: int


@dataclass(frozen=True, kw_only=True)
class OnnxFiles:
    """Which ONNX files to write: ``formats`` holds onnx, onnx_int8 or both; how they are checked, and the limit of int8.

    ``texts`` are sentences, or a file of them; None takes the held-out text of the run. More than ``max_loss`` of
    accuracy lost by int8, as a share, is refused.
    """

    formats: Sequence[str]
    texts: str | Sequence[str] | None
    max_loss: float
    measured: dict[str, Any] = field(default_factory=dict, init=False)  # by write

    def write(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, *, config: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Write ``onnx/`` into a folder, and return what was measured; ``config`` is that of the run.

        A difference from torch, too large a loss and too little space are refused.
        """
        sentences = read_sentences(self.texts, config=config, tokenizer=tokenizer)
        batches = list(encode(sentences, tokenizer, model))
        _check_space(model, folder)
        model.config.use_cache = False
        found: dict[str, Any] = {"sentences": len(sentences), "difference": 0.0, "files": {}}
        for name, part in {"model": model, "encoder": model.base_model}.items():
            file, int8 = folder / "onnx" / f"{name}.onnx", folder / "onnx" / f"{name}_quantized.onnx"
            cure = "leave onnx and onnx_int8 out of formats"
            export_onnx(part, file, example=batches[0], name="the student", cure=cure)  # type: ignore[arg-type]
            session = open_session(file, threads=torch.get_num_threads())
            difference = largest_difference(session, part, batches)
            if not difference <= _TOLERANCE:  # nor NaN
                how = f"by {difference:.1e} of its largest output on {len(sentences)} sentences"
                raise UserError(f"onnx/{file.name} differs from torch {how}, more than {_TOLERANCE:.0e}; {cure}")
            found["difference"] = max(found["difference"], difference)
            if "onnx_int8" in self.formats:
                quantize_int8(file, int8)
                if name == "model":
                    quantized = open_session(int8, threads=torch.get_num_threads())
                    loss = measure_loss(session, quantized, batches, tokenizer, lm=lm_of_model(model))
                    self._check_loss(loss)
                    found["int8"] = loss._asdict()
            for written in file.parent.glob(f"{file.name}*") if "onnx" not in self.formats else ():
                written.unlink()
        found["files"] |= {file.name: file.stat().st_size for file in sorted((folder / "onnx").iterdir())}
        self.measured.update(found)
        return found

    def _check_loss(self, loss: Loss) -> None:
        if (lost := loss.float32 - loss.int8) > self.max_loss:
            measured = f"{loss.float32:.4f} to {loss.int8:.4f} on {loss.tokens:,} tokens"
            found = f"int8 loses {lost:.4f} of the student's accuracy ({measured}), more than max_loss={self.max_loss}"
            raise UserError(f"{found}; leave onnx_int8 out of formats, or set a larger max_loss")


def _check_space(model: PreTrainedModel, folder: Path) -> None:
    needed, free = 10 * num_parameters(model), shutil.disk_usage(folder).free  # float32 and int8, twice
    if needed > free:
        found = f"the ONNX files take up to {needed / 1e6:,.0f} MB, but {folder.parent} has {free / 1e6:,.0f} MB free"
        raise UserError(f"{found}; free some, choose another folder, or leave onnx and onnx_int8 out of formats")


def read_sentences(
    texts: str | Sequence[str] | None, *, config: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase
) -> list[str]:
    """Return at most 64 sentences: those given, the lines of a file, or held-out documents of the run of ``config``."""
    if isinstance(texts, str):
        try:
            found = list(islice(TextFiles(paths=texts, document="line").documents(), _SENTENCES))
        except UserError as error:
            raise UserError(str(error).replace("data.corpus.paths", "texts")) from error
    else:
        found = _held_out(config, tokenizer) if texts is None else list(texts)
    found = [text for text in found[:_SENTENCES] if text.strip()]
    if not found:
        raise UserError(f"texts={texts} holds no sentence; {_CURE}")
    return found


def _held_out(config: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Decode the first held-out documents in the token cache of a run, which is not made again where it is gone."""
    data: Any = config.get("data") or {"corpus": {}}
    corpus = data["corpus"]
    try:
        targets = re.findall(r'"_target_": "([^"]*)', json.dumps(corpus))
        if not targets or not all(each.startswith("distilkit.data.") for each in targets):  # it may name anything
            raise UserError("its corpus is no class of distilkit.data")
        key = cache_key(instantiate(OmegaConf.create(corpus)), tokenizer, val_share=data["val_share"])
        folder = Path(data["cache_dir"]).expanduser() / key
        if not folder.is_dir():
            raise UserError(f"{folder} is not there")
        tokens = open_cache(folder, tokenizer).tokens["val"][: 8 * _SENTENCES * _TOKENS]
    except Exception as error:  # of a corpus that has moved, of a config that was changed
        raise UserError(f"the held-out text of this run is not cached here ({error}); {_CURE}") from error
    ends = np.flatnonzero(tokens == separator_id(tokenizer))[:_SENTENCES]
    documents = np.split(tokens, ends)[: len(ends)] or [tokens]
    return [str(tokenizer.decode(ids[:_TOKENS].tolist(), skip_special_tokens=True)) for ids in documents]


def encode(sentences: Sequence[str], tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> Iterator[Inputs]:
    """Tokenize sentences into batches that all have padding, and take the inputs of the model."""
    longest = max_positions(model) if hasattr(model.config, "max_position_embeddings") else _TOKENS
    segments = int(getattr(model.config, "type_vocab_size", 0) or 0) > 1
    names = ("input_ids", "attention_mask", *(["token_type_ids"] if segments else []))
    if tokenizer.pad_token_id is None:  # GPT-2; padding is never attended to, so any token serves
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    tokenizer.padding_side = "right"
    for start in range(0, len(sentences), _BATCH):
        some, room = list(sentences[start : start + _BATCH]), max(4, min(_TOKENS, longest - 2))
        encoded: Any = tokenizer(some, truncation=True, max_length=room, padding=True, return_tensors="pt")
        fill = {"input_ids": tokenizer.pad_token_id}
        yield {name: pad(encoded[name], (0, 2), value=fill.get(name, 0)) for name in names if name in encoded}


def _alone(batch: Inputs) -> Iterator[Inputs]:
    """Yield each sentence of a batch without padding, as a batch of one."""
    for row, length in enumerate(batch["attention_mask"].sum(dim=1).tolist()):
        if length:
            yield {name: tensor[row : row + 1, :length] for name, tensor in batch.items()}


@torch.inference_mode()
def largest_difference(session: Any, model: Any, batches: Sequence[Inputs]) -> float:
    """Return the largest difference from torch at real tokens, in batches and alone, by the largest output, or by 1."""
    name, worst = session.get_outputs()[0].name, 0.0
    for batch in batches:
        for inputs in (batch, *_alone(batch)):
            real = inputs["attention_mask"].numpy() == 1
            expected = model(**inputs)[name].numpy()[real]
            given = session.run([name], {key: tensor.numpy() for key, tensor in inputs.items()})[0][real]
            share = np.abs(given - expected).max() / max(1.0, np.abs(expected).max())
            worst = float(np.maximum(worst, share))  # which keeps a NaN
    return worst


def measure_loss(
    session: Any, quantized: Any, batches: Sequence[Inputs], tokenizer: PreTrainedTokenizerBase, *, lm: LM
) -> Loss:
    """Compare the predictions of two sessions: of each token once, one in seven masked at a time, or of the next token."""
    counts: list[Any] = []  # (sentences, 3) each: right of float32, right of int8, tokens
    for batch in batches:
        arrays = {name: tensor.numpy() for name, tensor in batch.items()}
        ids, real = arrays["input_ids"], arrays["attention_mask"] == 1
        count = np.zeros((len(ids), 3))
        for turn in range(_EVERY if lm == "mlm" else 1):
            if lm == "mlm":
                chosen = real & ~np.isin(ids, tokenizer.all_special_ids) & (np.arange(ids.shape[1]) % _EVERY == turn)
                targets, inputs = ids, {**arrays, "input_ids": np.where(chosen, tokenizer.mask_token_id, ids)}
            else:  # the last two tokens of each row are padding
                chosen, targets, inputs = real & np.roll(real, -1, axis=1), np.roll(ids, -1, axis=1), arrays
            right = [(each.run(None, inputs)[0].argmax(axis=-1) == targets) & chosen for each in (session, quantized)]
            count += np.stack([part.sum(axis=1) for part in (*right, chosen)], axis=1)
        counts.append(count)
    float32, int8, tokens = np.concatenate(counts).T
    if not tokens.sum():
        raise UserError(f"the tokenizer knows no token of the sentences; {_CURE}")
    shares = float(float32.sum() / tokens.sum()), float(int8.sum() / tokens.sum())
    return Loss(*shares, ratio_of_sums(float32 - int8, tokens)[1], int(tokens.sum()))
