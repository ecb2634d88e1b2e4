"""`slimplus push`, against a server that stands in for the hub."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from slimplus.cli.main import main
from slimplus.hub.push import PLACE
from tests.support.processes import CONSOLE, ROOT


class Hub(BaseHTTPRequestHandler):
    """Answers what the hub's client asks while it makes a commit, and keeps what it was told."""

    told: list[tuple[str, bytes]]
    refuses = False

    def do_POST(self) -> None:
        place = f"http://{self.headers['Host']}/org/name"
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        self.told.append((self.path, body))
        if self.refuses:
            return self.answer({"error": "no"}, 403)
        if "/preupload/" in self.path:
            files = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": file, "uploadMode": "regular", "shouldIgnore": False} for file in files]
            return self.answer({"files": modes})
        if "/commit/" in self.path:
            return self.answer({"commitUrl": f"{place}/commit/1234", "commitOid": "1234", "success": True})
        return self.answer({"url": place, "errors": [], "warnings": []})

    def answer(self, content: dict[str, Any], status: int = 200) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def hub() -> Iterator[tuple[type[Hub], str]]:
    """A running stand-in: its class, and its address."""
    handler = type("Told", (Hub,), {"told": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield handler, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def push(address: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {"HF_ENDPOINT": address, "HF_TOKEN": "hf_stand_in", "HF_HUB_OFFLINE": "0", "PYTHONPATH": str(ROOT)}
    environment |= {"HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    return subprocess.run(
        [sys.executable, *CONSOLE, "push", str(folder), "org/name", *arguments],
        env=os.environ | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_a_run_is_pushed_in_one_commit(finished: Path, hub: tuple[type[Hub], str]) -> None:
    handler, address = hub
    done = push(address, finished, "--private", "--revision", "two-bits")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{address}/org/name/commit/1234\n"
    asked = dict(handler.told)
    created = json.loads(asked["/api/repos/create"])
    assert (created["organization"], created["name"]) == ("org", "name")
    assert created.get("private") or created.get("visibility") == "private"
    assert "/api/models/org/name/branch/two-bits" in asked
    (commit,) = [body for path, body in handler.told if "/commit/" in path]
    entries = [json.loads(line)["value"] for line in commit.splitlines() if json.loads(line)["key"] == "file"]
    sent = {entry["path"]: base64.b64decode(entry["content"]) for entry in entries}
    packed = finished / "packed"
    assert sorted(sent) == sorted(file.name for file in packed.iterdir())
    for name in set(sent) - {"README.md"}:
        assert sent[name] == (packed / name).read_bytes()
    card = (packed / "README.md").read_text(encoding="utf-8")
    assert PLACE in card
    assert sent["README.md"].decode() == card.replace(PLACE, "org/name")


def test_a_hub_that_refuses_is_one_sentence(finished: Path, hub: tuple[type[Hub], str]) -> None:
    handler, address = hub
    handler.refuses = True
    done = push(address, finished)
    assert done.returncode == 2
    assert done.stderr.startswith("org/name cannot be uploaded to (")
    assert "log in with `hf auth login`" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_dry_run_lists_files_and_shows_the_card(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["push", str(finished), "org/name", "--dry-run"]) == 0
    said = capsys.readouterr().out
    for file in (finished / "packed").iterdir():
        assert file.name in said
    assert "to org/name" in said
    assert "model-index:" in said
    assert PLACE not in said


@pytest.mark.parametrize(
    ("change", "words", "sentence"),
    [
        (None, ["FOLDER", "name"], "name is no hub id; give your name on the hub and the repository's: org/name"),
        (None, ["FOLDER/none", "org/name"], "none is no folder; give the run_dir of a finished run"),
        ("summary.txt", ["FOLDER", "org/name"], "holds a run that has not come to its end; start it again"),
        ("packed/README.md", ["FOLDER", "org/name"], "README.md is missing; start the run again, which writes it"),
        ("packed/config.json", ["FOLDER", "org/name"], "config.json"),
    ],
)
def test_bad_input_is_one_sentence(
    change: str | None,
    words: list[str],
    sentence: str,
    finished: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = shutil.copytree(finished, tmp_path / "run")
    if change:
        (folder / change).unlink()
    assert main(["push", *(word.replace("FOLDER", str(folder)) for word in words), "--dry-run"]) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert len(said.splitlines()) == 1
