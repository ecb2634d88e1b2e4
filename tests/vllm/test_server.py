"""`slimplus serve` through vLLM: completions, chat and streaming, over HTTP."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from openai import OpenAI
from transformers import AutoTokenizer

import slimplus
from tests.support.models import TINY, expected_text, save_tiny_model
from tests.support.packed import save_packed
from tests.support.processes import CONSOLE
from tests.support.servers import free_port, wait_until_ready
from tests.vllm.architectures import ARCHITECTURES

PROMPT = "The history of the city"
TEMPLATE = "{% for message in messages %}<{{ message.content }}>{% endfor %}"
OPTIONS = ["--dtype", "float32", "--max-model-len", "128", "--enforce-eager", "--max-num-seqs", "4"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    TINY["llama"] = ARCHITECTURES["llama"]
    packed = save_packed(save_tiny_model(folder / "source", "llama", 2, {}), folder / "packed")
    file = packed / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": TEMPLATE}))
    return packed


@pytest.fixture(scope="module")
def client(checkpoint: Path, vllm_python: Path, environment: dict[str, str]) -> Iterator[OpenAI]:
    port = free_port()
    command = [str(vllm_python), *CONSOLE, "serve", str(checkpoint), "--port", str(port), *OPTIONS]
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        wait_until_ready(server, port, seconds=240)
        yield OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
        server.terminate()


def expected(checkpoint: Path, text: str) -> str:
    model = slimplus.load(checkpoint, dtype=torch.float32, keep_dense=True)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    return whole(expected_text(model, tokenizer, text, max_new_tokens=12, do_sample=False))


def whole(text: str) -> str:
    """The text without the first bytes of a character at its end, which vLLM waits for."""
    return text.rstrip("\N{REPLACEMENT CHARACTER}")


def test_completions_and_their_stream(client: OpenAI, checkpoint: Path) -> None:
    wanted = expected(checkpoint, PROMPT)
    settings = {"model": str(checkpoint), "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
    assert whole(client.completions.create(**settings).choices[0].text) == wanted  # type: ignore[call-overload]
    parts = [part.choices[0].text for part in client.completions.create(**settings, stream=True)]  # type: ignore[call-overload]
    assert whole("".join(parts)) == wanted
    assert len(parts) > 3


def test_chat_and_its_stream(client: OpenAI, checkpoint: Path) -> None:
    wanted = expected(checkpoint, f"<{PROMPT}>")
    messages = [{"role": "user", "content": PROMPT}]
    settings = {"model": str(checkpoint), "messages": messages, "max_tokens": 12, "temperature": 0}
    answer = client.chat.completions.create(**settings)  # type: ignore[call-overload]
    assert whole(answer.choices[0].message.content) == wanted
    stream = client.chat.completions.create(**settings, stream=True)  # type: ignore[call-overload]
    assert whole("".join(part.choices[0].delta.content or "" for part in stream)) == wanted
