"""Publish a student's folder on the Hugging Face hub; what would fail is refused before anything is written."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from distilkit.errors import UserError


def check_push(repo: str, *, license: str | None, metadata: Mapping[str, Any]) -> None:
    """Check name, licence and key of a push, and ask the hub whose key it is."""
    name = f"push_to_hub={repo}"
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"{name} is no name of a repository: {error}") from error
    if repo.count("/") != 1:
        raise UserError(f"{name} has no owner; give push_to_hub=<user or organization>/<name>")
    if not (license or metadata.get("license")):
        raise UserError(f"{name}, but the card has no licence; set license=apache-2.0, mit or another one of the hub")
    if get_token() is None:
        raise UserError(f"{name} needs a key of the hub; set HF_TOKEN, or call hf auth login")
    if constants.is_offline_mode():
        raise UserError(f"{name}, but HF_HUB_OFFLINE=1 forbids the network; unset it")
    try:
        HfApi().whoami()
    except Exception as error:
        raise UserError(f"{name}, but {_said(error)}; check HF_TOKEN and the network") from error


def push(folder: Path, *, repo: str, private: bool, revision: str, commit_message: str) -> str:
    """Upload all files of a folder in one commit, and return its address; the repository is made if it is not there."""
    api, again = HfApi(), f"hf upload {repo} {shlex.quote(str(folder))}"
    again += " --private" * private + f" --revision {revision}" * (revision != constants.DEFAULT_REVISION)
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        if revision != constants.DEFAULT_REVISION:
            api.create_branch(repo, branch=revision, exist_ok=True)
        done = api.upload_folder(repo_id=repo, folder_path=folder, revision=revision, commit_message=commit_message)
    except Exception as error:
        raise UserError(f"{folder} is written, but {_said(error)}; then: {again}") from error
    return str(done.commit_url)


def _said(error: Exception) -> str:
    return f"the hub {constants.ENDPOINT} says: {' '.join(str(error).split())[:300] or type(error).__name__}"
