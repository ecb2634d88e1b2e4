"""slimplus serve: an OpenAI-compatible server in one command."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

import slimplus
from slimplus.cli import serve
from slimplus.cli.main import main
from tests.support.models import expected_text
from tests.support.processes import CONSOLE, ROOT
from tests.support.servers import free_port, wait_until_ready

PROMPT = "Functions are"
TEMPLATE = "{% for message in messages %}<{{ message.content }}>{% endfor %}"
NEW_TOKENS = 12


@pytest.fixture(scope="module")
def served(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a chat template."""
    copy = shutil.copytree(packed, tmp_path_factory.mktemp("served") / "packed")
    file = copy / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": TEMPLATE}))
    return copy


@pytest.fixture(scope="module")
def client(served: Path) -> Iterator[OpenAI]:
    """A client of the server, which serves through transformers, since the suite has no vLLM."""
    port = free_port()
    arguments = ["serve", str(served), "--port", str(port), "--engine", "transformers", "--dtype", "float32"]
    command = [sys.executable, *CONSOLE, *arguments, "--device", "cpu"]
    environment = os.environ | {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as server:
        wait_until_ready(server, port, seconds=120)
        yield OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
        server.terminate()
        server.wait(30)  # the command has become the server, so a signal ends that
        assert server.stdout is not None
        assert server.stdout.readline() == (
            f'transformers serves {served} at http://127.0.0.1:{port}/v1, model "{served}"\n'
        )


def text_after(served: Path, tokenizer: Any, prompt: str) -> str:
    model = slimplus.load(served, dtype="float32")
    return expected_text(model, tokenizer, prompt, max_new_tokens=NEW_TOKENS, do_sample=False)


def test_what_is_served_is_what_the_model_says(client: OpenAI, served: Path, tokenizer: Any) -> None:
    settings: Any = {"model": str(served), "max_tokens": NEW_TOKENS, "temperature": 0}
    completion = client.completions.create(prompt=PROMPT, **settings).choices[0].text
    assert completion == text_after(served, tokenizer, PROMPT)
    messages: Any = [{"role": "user", "content": PROMPT}]
    answer = client.chat.completions.create(messages=messages, **settings).choices[0].message.content
    assert answer == text_after(served, tokenizer, f"<{PROMPT}>")
    stream = client.chat.completions.create(messages=messages, stream=True, **settings)
    assert "".join(part.choices[0].delta.content or "" for part in stream if part.choices) == answer


def test_an_engine_that_is_not_installed_is_named(
    packed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(serve, "_is_installed", lambda module: False)
    assert main(["serve", str(packed)]) == 2
    assert "needs vLLM or transformers' server, and neither is installed" in capsys.readouterr().err
    assert main(["serve", str(packed), "--engine", "transformers"]) == 2
    assert "--engine transformers: it is not installed: pip install 'transformers[serving]'" in capsys.readouterr().err


def test_vllm_serves_where_it_is_installed(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "_is_installed", lambda module: True)
    commands: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda program, command: commands.append(command))
    assert main(["serve", str(packed), "--port", "81", "--tensor-parallel-size", "2"]) == 0
    (command,) = commands
    assert command[1:5] == ["-m", "vllm.entrypoints.cli.main", "serve", str(packed)]
    assert command[5:] == [*["--host", "127.0.0.1", "--port", "81", "--served-model-name"], str(packed), *command[-2:]]
    assert command[-2:] == ["--tensor-parallel-size", "2"]


def test_no_checkpoint_no_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", str(tmp_path / "missing")]) == 2
    assert "missing does not exist" in capsys.readouterr().err
