"""Whether Weights & Biases can be reached."""

import http.server
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from distilkit.watch import tracking


@pytest.fixture
def proxy() -> Iterator[str]:
    """A proxy that answers for every host."""

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    for name in ("WANDB_MODE", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    found = SimpleNamespace(base_url="http://wandb.invalid", api_key="key", http_proxy=None, https_proxy=None)
    monkeypatch.setattr(tracking.wandb, "setup", lambda: SimpleNamespace(settings=found))
    return found


def test_a_host_that_cannot_be_reached_is_named(settings: SimpleNamespace) -> None:
    reason = tracking.offline_reason()
    assert reason is not None
    assert reason.startswith("http://wandb.invalid cannot be reached (")


def test_a_host_behind_a_proxy_of_the_environment_is_reached(
    settings: SimpleNamespace, proxy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", proxy)
    assert tracking.offline_reason() is None


def test_a_host_behind_a_proxy_of_wandbs_settings_is_reached(settings: SimpleNamespace, proxy: str) -> None:
    settings.http_proxy = proxy
    assert tracking.offline_reason() is None


def test_a_run_warns_of_no_setting_that_its_user_did_not_give(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_SILENT", raising=False)
    tracking.wandb_logger(save_dir=str(tmp_path), project="tests", name="run", group=None).experiment.finish()
    said = capfd.readouterr().err
    assert "offline" in said and "WARNING" not in said
