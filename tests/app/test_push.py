"""`fewstep export --push`, against a hub of its own on 127.0.0.1."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.app.conftest import Answer

Command = Callable[..., Answer]


@dataclass
class Hub:
    """What was asked of it; `refuses` is the status that it answers everything with."""

    made: list[dict[str, Any]] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    tokens: set[str | None] = field(default_factory=set)
    refuses: int | None = None
    address: str = ""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Takes whole files in a commit, as the hub does of small ones."""
    state = Hub()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

        def answer(self, value: Any, status: int = 200) -> None:
            body = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            self.answer({"id": "me/fruit", "sha": "0" * 40, "siblings": []})

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            state.tokens.add(self.headers["Authorization"])
            if state.refuses is not None:
                return self.answer({"error": "no"}, state.refuses)
            if self.path == "/api/repos/create":
                state.made.append(json.loads(body))
                return self.answer({"url": f"{state.address}/me/fruit", "id": "me/fruit"})
            if self.path == "/api/validate-yaml":  # of the card
                return self.answer({"errors": [], "warnings": []})
            if "/preupload/" in self.path:
                names = [file["path"] for file in json.loads(body)["files"]]
                return self.answer(
                    {"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]}
                )
            assert "/commit/main" in self.path, self.path
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    state.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return self.answer({"commitUrl": f"{state.address}/me/fruit/commit/1", "commitOid": "1" * 40})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    state.address = f"http://127.0.0.1:{server.server_address[1]}"
    point_at(state.address, monkeypatch)
    yield state
    server.shutdown()
    server.server_close()


def point_at(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library reads its environment when it is first imported, which may be long ago."""
    from huggingface_hub import constants, hf_api

    for key, value in {"HF_ENDPOINT": address, "HF_TOKEN": "hf_test"}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hf_api.constants, "ENDPOINT", address)


def test_the_hub_has_what_the_folder_has(fewstep: Command, trained: Path, tmp_path: Path, hub: Hub):
    """Every byte of student, scheduler and card, under the token, in a repository that is made first."""
    out = tmp_path / "out"
    answer = fewstep("export", trained, out, "--push", "me/fruit", "--private")
    assert answer.code == 0, answer.err
    assert answer.out.splitlines()[-1] == f"sent to {hub.address}/me/fruit"
    files = {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    assert {"README.md", "fewstep.json", "pytorch_lora_weights.safetensors"} <= files.keys()
    assert hub.files == files
    (made,) = hub.made
    assert (made["name"], made["organization"]) == ("fruit", "me")
    assert made.get("private") is True or made.get("visibility") == "private"
    assert hub.tokens == {"Bearer hf_test"}


def test_what_a_hub_may_answer(
    fewstep: Command, trained: Path, tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
):
    """One line and exit code 2; what was exported is there. A name without an owner is refused before that."""
    answer = fewstep("export", trained, tmp_path / "none", "--push", "fruit")
    assert (answer.code, answer.err) == (2, "--push fruit: must have the form ORG/NAME\n")
    assert not (tmp_path / "none").exists()
    for i, (status, line) in enumerate(
        [(403, "needs a token that may write there"), (500, "500 Internal Server Error")]
    ):
        hub.refuses = status
        answer = fewstep("export", trained, tmp_path / str(i), "--push", "me/fruit")
        assert answer.code == 2
        assert len(answer.err.splitlines()) == 1
        assert line in answer.err
        assert "what was exported stays" in answer.err
        assert (tmp_path / str(i) / "fewstep.json").is_file()
    point_at("http://127.0.0.1:9", monkeypatch)
    answer = fewstep("export", trained, tmp_path / "away", "--push", "me/fruit")
    assert (answer.code, answer.err) == (
        2, "--push me/fruit: the hub cannot be reached; what was exported stays: "
        f"hf upload me/fruit {tmp_path / 'away'} sends it\n"
    )  # fmt: skip
