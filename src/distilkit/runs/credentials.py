"""Refuse API keys and passwords in a config, before Hydra and the run write it to files."""

import os
import re
from collections.abc import Iterator
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from distilkit.errors import UserError, ends_command

_TOKENS = "auth|hf|hub|huggingface|access|api|bearer|wandb|refresh|session|security|github"
_WORDS = r"\w*(?:(?:api|access|private|secret|account)[_-]?key|secret|password|passwd|passphrase)"
_SECRET = rf"(?:{_WORDS}|(?:\w*_)?(?:{_TOKENS})[_-]?token|token)"
_NAME = re.compile(_SECRET, re.IGNORECASE)
_NAMED = re.compile(rf"(?<!\w){_SECRET}['\"]?\s*[:=]\s*['\"]?(?!null|true|false|\$\{{)[^\s'\",\]}}]", re.IGNORECASE)
_VALUE = re.compile(  # of Hugging Face, W&B, GitHub, GitLab, AWS and others, and the password of a URL
    r"(?<!\w)(?:hf_[A-Za-z0-9]{30,}|wandb_v\d_\w{20,}|gh[pousr]_\w{30,}|github_pat_\w{30,}|glpat-[\w-]{20,}|A[KS]IA[0-9A-Z]{16}"
    r"|sk-(?:[\w-]*-)?(?=\w*\d)(?=\w*[A-Z])\w{20,})|://[^/\s:@]+:[^/\s@]+@"
)
_OF_ENVIRONMENT = re.compile(r"\$\{oc\.env:\s*(\w+)[^}]*\}")


def _texts(node: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield the path and the text of each value; Hydra keeps a variable's name, the run's files have its value."""
    if isinstance(node, dict):
        for name, child in node.items():
            yield from _texts(child, f"{path}.{name}".lstrip("."))
    elif isinstance(node, list):
        for child in node:
            yield from _texts(child, f"{path}[]")
    elif isinstance(node, str):
        read = {} if path.startswith("hydra.") else os.environ
        yield path, _OF_ENVIRONMENT.sub(lambda name: read.get(name[1], ""), node)


def refuse_credentials(cfg: DictConfig) -> None:
    """Check that no value of a config is a key or a password by its name or form; the message does not show it."""
    for path, text in _texts(OmegaConf.to_container(cfg, resolve=False)):
        if path.startswith("hydra.job.override_dirname") or text in ("", "???"):
            continue
        listed = path.endswith("overrides[]") or (path.startswith("hydra.") and path.endswith("[]"))
        named = _NAMED.search(text) if listed else _NAME.fullmatch(path.rpartition(".")[2])
        if named or _VALUE.search(text):
            key = text.partition("=")[0].lstrip("+") if path.startswith("hydra.overrides") else path.removesuffix("[]")
            raise UserError(
                f"{key}=*** looks like a key or password, which the run's folder, its checkpoints and W&B would show; "
                "set a variable (WANDB_API_KEY, HF_TOKEN), call wandb login or hf auth login, or write ~/.netrc; "
                "a key below hydra. takes '${oc.env:NAME}'"
            )


class RefuseCredentials(Callback):
    """Hydra callback: end a command whose config holds a key or a password, before its folder is made."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Check the config."""
        with ends_command():
            refuse_credentials(config)

    on_multirun_start = on_run_start
