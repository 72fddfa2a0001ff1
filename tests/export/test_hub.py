"""Push a student to a stand-in for the hub's HTTP API, which remembers what it was asked for."""

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard, constants
from transformers import PreTrainedTokenizerBase

import distilkit.export.__main__
from jobs import Outcome, call
from tiny import RECORD, save_student


class Hub:
    """The routes that a push asks for: who it is, create a repository and a branch, preupload, commit."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Any]] = []
        self.refuses: dict[str, int] = {}
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                """Print nothing."""

            def do_GET(self) -> None:
                hub.answer(self)

            def do_POST(self) -> None:
                hub.answer(self)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        raw = request.rfile.read(int(request.headers.get("Content-Length") or 0)).decode()
        lines = [json.loads(line) for line in raw.splitlines()]
        path = request.path
        self.asked.append((path, lines if path.rpartition("/")[0].endswith("commit") else lines[0] if lines else None))
        assert request.headers["Authorization"] == "Bearer hf_key"
        status = next((code for part, code in self.refuses.items() if part in path), 200)
        said: Any = {"error": "not yours"} if status > 299 else {}
        if status < 299 and "whoami" in path:
            said = {"name": "me", "type": "user", "auth": {}}
        elif status < 299 and "repos/create" in path:
            said = {"url": f"{self.url}/me/student", "name": "me/student", "id": "1"}
        elif status < 299 and "preupload" in path:
            files = [
                {"path": each["path"], "uploadMode": "regular", "shouldIgnore": False} for each in lines[0]["files"]
            ]
            said = {"files": files}
        elif status < 299 and "/commit/" in path:
            said = {"commitUrl": f"{self.url}/me/student/commit/1f", "commitOid": "1f", "success": True}
        content = json.dumps(said).encode()
        request.send_response(status)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        request.wfile.write(content)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    hub = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_key")
    yield hub
    hub.server.shutdown()
    hub.server.server_close()
    hub.thread.join()


@pytest.fixture
def folder(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> Path:
    save_student(tmp_path / "last.ckpt", tokenizer)
    return tmp_path


def push(folder: Path, *arguments: str) -> Outcome:
    given = "ckpt=last.ckpt", "out=made", "push_to_hub=me/student", *arguments
    return call(distilkit.export.__main__.main, *given, cwd=folder)


def test_a_folder_is_pushed_in_one_commit_to_a_private_repository(hub: Hub, folder: Path) -> None:
    done = push(folder, "commit_message='A student, at last'")
    assert done.code == 0, done.err
    (line,) = done.out.splitlines()  # and none for each request
    assert json.loads(line)["pushed"] == f"{hub.url}/me/student/commit/1f"
    asked = dict(hub.asked)
    assert asked["/api/repos/create"]["name"] == "student"
    assert asked["/api/repos/create"]["visibility"] == "private"
    (header, *files) = asked["/api/models/me/student/commit/main"]
    assert header["value"]["summary"] == "A student, at last"
    sent = {each["value"]["path"]: base64.b64decode(each["value"]["content"]) for each in files}
    made = folder / "made"
    assert sent == {path.relative_to(made).as_posix(): path.read_bytes() for path in made.rglob("*") if path.is_file()}
    assert 'pipeline("fill-mask", "me/student")' in sent["README.md"].decode()
    assert not [path for path, _ in hub.asked if "branch" in path]


def test_a_branch_is_made_for_another_revision_and_a_public_repository_is_asked_for(hub: Hub, folder: Path) -> None:
    assert push(folder, "revision=v1", "private=false", "license=mit").code == 0
    asked = dict(hub.asked)
    assert asked["/api/repos/create"]["visibility"] == "public"
    assert "/api/models/me/student/branch/v1" in asked
    assert "/api/models/me/student/commit/v1" in asked
    assert ModelCard.load(folder / "made" / "README.md").data.license == "mit"


def test_a_push_without_a_key_is_refused_before_anything_is_done(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distilkit.export.hub.get_token", lambda: None)
    done = push(folder)
    assert "push_to_hub=me/student needs a key of the hub; set HF_TOKEN, or call hf auth login" in done.err
    assert (done.code, hub.asked, (folder / "made").exists()) == (1, [], False)


def test_a_wrong_key_is_refused_before_anything_is_done(hub: Hub, folder: Path) -> None:
    hub.refuses = {"whoami": 401}
    done = push(folder)
    assert f"push_to_hub=me/student, but the hub {hub.url} says: " in done.err
    assert "check HF_TOKEN and the network" in done.err
    assert (done.code, len(hub.asked), (folder / "made").exists()) == (1, 1, False)


def test_offline_is_named(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "push_to_hub=me/student, but HF_HUB_OFFLINE=1 forbids the network; unset it" in push(folder).err


@pytest.mark.parametrize(
    ("name", "message"),
    [("student", "has no owner; give push_to_hub=<user or organization>/<name>"), ("me/a/b", "is no name of a repos")],
)
def test_a_wrong_name_is_refused(name: str, message: str, hub: Hub, folder: Path) -> None:
    done = push(folder, f"push_to_hub={name}")
    assert (done.code, message in done.err, hub.asked) == (1, True, [])


def test_a_card_without_a_licence_asks_for_one(hub: Hub, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    save_student(tmp_path / "last.ckpt", tokenizer, metadata={**RECORD["metadata"], "license": None})
    done = push(tmp_path)
    assert "the card has no licence; set license=apache-2.0, mit" in done.err
    assert (done.code, hub.asked, (tmp_path / "made").exists()) == (1, [], False)


def test_a_push_that_the_hub_refuses_leaves_the_folder_and_says_how_to_go_on(hub: Hub, folder: Path) -> None:
    hub.refuses = {"repos/create": 403, "/api/models": 404}
    done = push(folder)
    assert done.code == 1
    assert f"{folder / 'made'} is written, but the hub {hub.url} says: 403 Forbidden" in done.err
    assert f"then: hf upload me/student {folder / 'made'} --private\n" in done.err  # else it would be public
    assert (folder / "made" / "model.safetensors").is_file()


def test_what_goes_on_with_a_push_has_its_branch_and_its_visibility(hub: Hub, folder: Path) -> None:
    hub.refuses = {"/commit/": 500}
    done = push(folder, "out='a b'", "revision=v1", "private=false")
    assert f"then: hf upload me/student '{folder / 'a b'}' --revision v1\n" in done.err
