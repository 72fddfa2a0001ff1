"""Export a checkpoint as a Hugging Face folder: config, safetensors, tokenizer and model card."""

import copy
import json
import logging
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import torch
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase, dynamic_module_utils

from distilkit.data.tokenizer import load_tokenizer
from distilkit.errors import UserError
from distilkit.export.card import student_card
from distilkit.export.hub import check_push
from distilkit.export.parity import OnnxFiles
from distilkit.language_model import build_from_config, cast_parameters, lm_of_model, max_positions, num_parameters
from distilkit.runs.checkpoints import read_checkpoint
from distilkit.runs.storage import permit_reading, storage_fault, temporary_folder, whole_folder

log = logging.getLogger(__name__)

Dtype = Literal["float32", "bfloat16", "float16"]


def student_files(student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, str | bytes]:
    """Return all files of a student but its weights, by path: text, or bytes where it is not UTF-8.

    These are its configs, the tokenizer with all templates and vocabularies, and the code of a class that is not one of
    transformers'. Code that the run did not use is left out.
    """
    config, saved = copy.deepcopy(student.config), copy.deepcopy(tokenizer)
    config.dtype = str(student.dtype).removeprefix("torch.")
    for each in (config, saved):
        each._auto_class = None  # type: ignore[misc]  # transformers would put code of any depth side by side
    if names := [name for name in saved.model_input_names if name in signature(student.forward).parameters]:
        saved.model_input_names = saved.init_kwargs["model_input_names"] = names  # DistilBERT takes no token types
    with temporary_folder() as folder:
        config.save_pretrained(folder)
        saved.save_pretrained(folder)
        if student.can_generate() and student.generation_config is not None:
            student.generation_config.to_json_file(folder / "generation_config.json")  # checked by no one, as read
        used_by = {"config.json": (student, student.config), "tokenizer_config.json": (tokenizer,)}
        for file, used in {**used_by, "generation_config.json": ()}.items():
            if (folder / file).is_file():
                said = json.loads((folder / file).read_text("utf-8"))
                auto_map = said.pop("auto_map", None) or {}
                if any(type(each).__module__.startswith("transformers_modules") for each in used):
                    commit = getattr(used[-1], "_commit_hash", None)
                    said["auto_map"] = _write_code(auto_map, folder, name=str(used[-1].name_or_path), revision=commit)
                said = _without_folders({key: said[key] for key in said.keys() - {"is_local", "local_files_only"}})
                text = json.dumps(said, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
                (folder / file).write_text(text, "utf-8")
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): _content(path) for path in paths}


def _without_folders(value: Any) -> Any:
    """Return a value of JSON in which paths of this machine are base names."""
    if isinstance(value, dict):
        return {key: _without_folders(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_without_folders(each) for each in value]
    local = isinstance(value, str) and len(Path(value).parts) > 2 and Path(value).is_absolute()  # a token may be "/"
    return Path(value).name if local else value


def _content(file: Path) -> str | bytes:
    content = file.read_bytes()
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return content


def _write_code(auto_map: Mapping[str, Any], folder: Path, *, name: str, revision: str | None) -> dict[str, Any]:
    """Write the modules that ``auto_map`` names, with all they import, and return the map to them.

    ``name`` is the folder or hub id that holds the code, but for a reference ``repository--module.Class``.
    """
    kept: dict[str, Any] = {}
    for auto, reference in auto_map.items():
        given = [reference] if isinstance(reference, str) else reference  # a tokenizer has two: slow, fast
        local = [each and each.rpartition("--")[2] for each in given]
        for each, module in zip(given, (each and each.rpartition(".")[0] for each in local), strict=True):
            if each is None:
                continue
            where, at = (each.partition("--")[0], None) if "--" in each else (name, revision)
            try:
                cached = dynamic_module_utils.get_cached_module_file(where, f"{module}.py", revision=at)
            except (OSError, ImportError) as error:
                log.warning("%s of %s is not in the student's folder: %s", auto, name, str(error).splitlines()[0])
                break
            source = Path(vars(dynamic_module_utils)["HF_MODULES_CACHE"]) / cached
            for file in (source, *map(Path, dynamic_module_utils.get_relative_import_files(source))):
                target = (folder / f"{module}.py").with_name(file.name)
                if target.is_file() and target.read_bytes() != file.read_bytes():
                    raise UserError(f"{name} has two modules {target.relative_to(folder)}; rename one of them")
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(file.read_bytes())
        else:
            kept[auto] = local[0] if isinstance(reference, str) else local
    return kept


# Files that a student's folder gets from elsewhere, or that transformers would load in place of its weights.
_OTHERS = re.compile(
    r"readme\.md|adapter_.*|.*\.(safetensors|bin|pt|pth|ckpt|h5|msgpack|gguf|pkl)(\.index\.json)?", re.I
)
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.I)  # names of devices on Windows


def _is_inside(name: Any) -> bool:
    """Return whether a name of a checkpoint is that of a file inside a folder, on any system."""
    if not isinstance(name, str) or not name.isprintable() or len(name) > 200 or re.search(r'[\\:*?"<>|]', name):
        return False
    parts = name.split("/")
    odd = any(part != part.strip(" ") or part.endswith(".") or _RESERVED.fullmatch(part) for part in parts)
    return all(parts) and not odd and not _OTHERS.fullmatch(parts[-1])


def _write_files(files: Mapping[str, str | bytes], folder: Path, *, source: Path) -> None:
    """Write the files of a checkpoint below a folder; a name that leads elsewhere raises a ``UserError``."""
    folders = {str(above) for name in files if _is_inside(name) for above in PurePosixPath(name).parents}
    for name, content in files.items():
        twice = sum(str(each).casefold() == str(name).casefold() for each in files) > 1 or name in folders
        if not _is_inside(name) or twice or not isinstance(content, str | bytes):
            found = f"{source} names a file {name!r}, which is no file inside the exported folder"
            raise UserError(f"{found}; give a checkpoint of distilkit.train that nobody changed")
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))


def _code(files: Mapping[str, str | bytes]) -> list[str]:
    """Return the files that are code, or else the JSON files that map to code, which may also lie on the hub."""
    texts = {name: text if isinstance(text, str) else text.decode("utf-8", "replace") for name, text in files.items()}
    maps = [name for name, text in texts.items() if name.endswith(".json") and '"auto_map"' in text]
    return sorted(name for name in texts if name.endswith(".py")) or maps


def export_checkpoint(
    ckpt: str | Path,
    out: str | Path,
    *,
    summary: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
    dtype: Dtype = "float32",
    weights: bool = True,
    onnx: OnnxFiles | None = None,
    license: str | None = None,
    repo: str | None = None,
) -> PreTrainedModel:
    """Export a checkpoint of a distilkit run as a folder that ``from_pretrained`` loads, and return the model.

    The folder is written completely or not at all. Without ``weights`` it has no safetensors, and with ``onnx`` it has
    ONNX files. The model card shows what the run's ``summary`` knows, by default that of a summary.json which tells of
    these weights, under ``license`` and with examples that load ``repo``, to which a push must be possible.
    A student with code of its own needs ``trust_remote_code``, which runs that code.
    """
    file, folder = Path(ckpt).expanduser(), Path(out).expanduser()
    if not file.is_file():
        raise UserError(f"ckpt={str(ckpt)!r} is no file; give the path of a .ckpt below outputs/.../checkpoints")
    checkpoint = read_checkpoint(file)
    saved = checkpoint["distilkit"]
    if os.path.lexists(folder):  # a link that leads nowhere, too
        holds_it = folder.resolve() in (file.resolve(), *file.resolve().parents)  # which nobody should delete
        raise UserError(f"{folder} exists; choose another folder{'' if holds_it else ', or delete it'}")
    if repo:
        check_push(repo, license=license, metadata=saved["record"].get("metadata", {}))
    with whole_folder(folder, cure="choose another folder") as temporary:
        _write_files(saved["files"], temporary, source=file)
        own_code = bool(code := _code(saved["files"]))
        if own_code and not trust_remote_code:
            found = f"{file} holds code of its own ({', '.join(code)})"
            raise UserError(f"{found}; read it, and set trust_remote_code=true to run it")
        with _sound(file, folder):
            config = AutoConfig.from_pretrained(temporary, trust_remote_code=trust_remote_code)
            model = build_from_config(config, trust_remote_code=trust_remote_code)
            state = {name.removeprefix("student."): tensor for name, tensor in checkpoint["state_dict"].items()}
            model.eval().load_state_dict(state, strict=True)
            lm = lm_of_model(model)
        measured = None
        if onnx:
            tokenizer = load_tokenizer(name=str(temporary), trust_remote_code=trust_remote_code)
            measured = onnx.write(model, tokenizer, temporary, config=saved["record"].get("config", {}))
        with _sound(file, folder):
            if weights:
                _write_weights(model, temporary, dtype=dtype)
                if lm == "mlm" and hasattr(model.config, "hidden_size"):
                    _write_pooling(model, temporary)
            mask_token = json.loads(saved["files"].get("tokenizer_config.json", "{}")).get("mask_token")
            card = student_card(
                saved["record"],
                summary=_summary_of(file, tokens_seen=saved["tokens_seen"]) if summary is None else summary,
                tokens_seen=saved["tokens_seen"],
                num_params=num_parameters(model),
                lm=lm,
                mask_token=mask_token["content"] if isinstance(mask_token, dict) else mask_token or "[MASK]",
                own_code=own_code,
                positions=_positions(model),
                onnx=measured and measured | {"alone": not weights},
                license=license,
                repo=repo,
            )
        card.save(temporary / "README.md")
    return model


@contextmanager
def _sound(file: Path, folder: Path) -> Iterator[None]:
    """Turn errors of a config, weights or a record that were changed, or of a student's own code, into a ``UserError``."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or storage_fault(error, folder, cure=""):
            raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise UserError(f"{file} holds no student that can be built ({reason}); give another checkpoint") from error


def _write_weights(model: PreTrainedModel, folder: Path, *, dtype: Dtype) -> None:
    """Write the weights in a type of 16 or 32 bits, which config.json names; buffers stay as they are."""
    if dtype != "float32":
        to = getattr(torch, dtype)
        large = max(float(weight.detach().abs().max()) for weight in model.parameters() if weight.numel())
        if large > torch.finfo(to).max:
            raise UserError(f"dtype={dtype} cannot hold a weight of {large:.3g}; set dtype=bfloat16 or float32")
        cast_parameters(model, to)
        said = json.loads((folder / "config.json").read_text("utf-8")) | {"dtype": dtype}
        text = json.dumps(said, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        (folder / "config.json").write_text(text, "utf-8")
    with tempfile.TemporaryDirectory(dir=folder) as weights:
        model.save_pretrained(weights)
        permit_reading(Path(weights))
        for path in Path(weights).iterdir():
            if not (folder / path.name).exists() and path.suffix != ".py":  # code is there, with its folders
                path.rename(folder / path.name)


def _positions(model: PreTrainedModel) -> int | None:
    """Return the maximum number of tokens of a sequence, if the config limits it."""
    return max_positions(model) if (getattr(model.config, "max_position_embeddings", None) or 0) > 0 else None


def _write_pooling(model: PreTrainedModel, folder: Path) -> None:
    """Write what ``sentence_transformers.SentenceTransformer`` reads: the mean of the last states over real tokens.

    The names of modules and keys are those that all its versions since 2.0 read.
    """
    parts, width = {"": "Transformer", "1_Pooling": "Pooling"}, int(model.config.hidden_size)
    files: dict[str, Any] = {
        "modules.json": [
            {"idx": idx, "name": str(idx), "path": path, "type": f"sentence_transformers.models.{parts[path]}"}
            for idx, path in enumerate(parts)
        ],
        "1_Pooling/config.json": {"word_embedding_dimension": width, "pooling_mode_mean_tokens": True},
        "sentence_bert_config.json": {"max_seq_length": _positions(model), "do_lower_case": False},
    }
    (folder / "1_Pooling").mkdir()
    for file, content in files.items():
        (folder / file).write_text(json.dumps(content, indent=2) + "\n", "utf-8")


def _summary_of(ckpt: Path, *, tokens_seen: int) -> dict[str, Any]:
    """Read summary.json of a checkpoint's run, or nothing where it does not tell of these weights."""
    try:
        found: Any = json.loads((ckpt.resolve().parents[1] / "summary.json").read_text("utf-8"))
    except (OSError, ValueError, IndexError):
        return {}
    return found if isinstance(found, dict) and found.get("tokens_seen") == tokens_seen else {}
