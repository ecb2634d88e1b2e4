"""Packed checkpoints loaded by their hub id, from a server that stands in for the hub."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from json import dumps
from pathlib import Path
from typing import Any

import pytest
import torch

import slimplus
from tests.support.processes import CONSOLE, ROOT

COMMIT, OTHER = "1" * 40, "2" * 40
PROMPT = [[5, 6, 7]]
LOAD = f"""
import sys, torch, slimplus
model = slimplus.load("org/name", revision=sys.argv[1], dtype=torch.float32)
tokens = model.generate(inputs=torch.tensor({PROMPT}), max_new_tokens=6, do_sample=False, pad_token_id=0)
sys.stdout.write(str(tokens.tolist()))
"""


@dataclass(frozen=True)
class Hub:
    """A running stand-in.

    Attributes:
        address: its address.
        asked: the paths it was asked for.
    """

    address: str
    asked: list[str]


class Handler(BaseHTTPRequestHandler):
    """Answers what the hub's client asks while it downloads; the branch `main` stands at `COMMIT`."""

    folder: Path
    asked: list[str]

    def do_GET(self) -> None:
        path, _, _ = self.path.partition("?")
        self.asked.append(path)
        files = [file.name for file in sorted(self.folder.iterdir())]
        commit = OTHER if OTHER in path else COMMIT
        if commit == OTHER:
            return self.answer(b'{"error": "Revision Not Found"}', 404, {"X-Error-Code": "RevisionNotFound"})
        if "/tree/" in path:
            sizes = {name: (self.folder / name).stat().st_size for name in files}
            return self.answer(
                dumps([{"type": "file", "path": n, "size": s, "oid": n} for n, s in sizes.items()]).encode()
            )
        if path.startswith("/api/models/org/name"):
            siblings = [{"rfilename": name} for name in files]
            return self.answer(dumps({"id": "org/name", "sha": commit, "siblings": siblings}).encode())
        name = path.rpartition("/")[2]
        if not path.startswith("/org/name/resolve/") or name not in files:
            return self.answer(b"", 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        content = (self.folder / name).read_bytes()
        return self.answer(content, 200, {"X-Repo-Commit": commit, "ETag": f'"{sha256(content).hexdigest()}"'})

    do_HEAD = do_GET

    def answer(self, content: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def hub(packed: Path) -> Iterator[Hub]:
    """A stand-in that holds a packed checkpoint as `org/name`."""
    handler: Any = type("Holding", (Handler,), {"folder": packed, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield Hub(f"http://127.0.0.1:{server.server_port}", handler.asked)
    server.shutdown()


def python(hub: Hub, home: Path, *arguments: str, offline: bool = False) -> subprocess.CompletedProcess[str]:
    environment = {"HF_ENDPOINT": hub.address, "HF_HOME": str(home), "HF_HUB_OFFLINE": str(int(offline))}
    environment |= {
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, env=os.environ | environment, cwd=home, capture_output=True, text=True, timeout=120, check=False
    )


def test_a_commit_is_loaded_and_found_again_without_a_network(hub: Hub, packed: Path, tmp_path: Path) -> None:
    model: Any = slimplus.load(packed, dtype=torch.float32)
    expected = model.generate(inputs=torch.tensor(PROMPT), max_new_tokens=6, do_sample=False, pad_token_id=0).tolist()
    loaded = python(hub, tmp_path, "-c", LOAD, COMMIT)
    assert loaded.stdout == str(expected), loaded.stderr
    assert f"/org/name/resolve/{COMMIT}/model.safetensors" in hub.asked
    hub.asked.clear()
    assert python(hub, tmp_path, "-c", LOAD, COMMIT, offline=True).stdout == str(expected)
    assert hub.asked == []


@pytest.mark.slow
def test_a_commit_that_the_hub_lacks_is_told(hub: Hub, tmp_path: Path) -> None:
    loaded = python(hub, tmp_path, "-c", LOAD, OTHER)
    assert "InputError: org/name cannot be loaded" in loaded.stderr
    assert OTHER in loaded.stderr


@pytest.mark.slow
def test_commands_take_a_hub_id(hub: Hub, packed: Path, tmp_path: Path) -> None:
    local = python(hub, tmp_path, *CONSOLE, "inspect", str(packed))
    done = python(hub, tmp_path, *CONSOLE, "inspect", "org/name")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[2:] == local.stdout.splitlines()[2:]
    assert "/org/name/resolve/main/config.json" in hub.asked
