"""slimplus generate says what the model says."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import slimplus
from slimplus.cli.main import main
from slimplus.evaluation.generation import LoadedModel, Sampling, stream
from slimplus.models.loading import ModelSource
from slimplus.utils.errors import InputError
from tests.support.models import ModelMaker, expected_text
from tests.support.processes import ROOT, run_console

PROMPT = "Functions are"


def test_a_checkpoint_without_a_tokenizer(packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = shutil.copytree(packed, tmp_path / "packed", ignore=shutil.ignore_patterns("tokenizer*"))
    assert main(["generate", str(copy), "x"]) == 2
    assert "has no tokenizer that can be read" in capsys.readouterr().err
    whole = (packed / "tokenizer.json").read_bytes()
    shutil.copy(packed / "tokenizer_config.json", copy)
    (copy / "tokenizer.json").write_bytes(whole[: len(whole) // 2])
    assert main(["generate", str(copy), "x"]) == 2
    assert "tokenizer.json is damaged" in capsys.readouterr().err
    (copy / "tokenizer_config.json").write_text("{")
    assert main(["generate", str(copy), "x", "--chat"]) == 2
    assert "tokenizer_config.json cannot be read" in capsys.readouterr().err


class Recorder:
    """Stands in for the standard output, and keeps every write apart."""

    def __init__(self) -> None:
        self.writes: list[str] = []

    def write(self, text: str) -> None:
        self.writes.append(text)

    def flush(self) -> None:
        pass


def test_generate_streams_what_the_model_says(copy: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (space,) = tokenizer(" ")["input_ids"]
    settings = copy / "generation_config.json"  # the text comes word by word: let there be words
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"sequence_bias": [[[space], 10.0]]}))
    recorder = Recorder()
    monkeypatch.setattr(sys, "stdout", recorder)
    options = ["--max-new-tokens", "80", "--temperature", "1.5", "--top-p", "0.9", "--seed", "7", "--dtype", "float32"]
    assert main(["generate", str(copy), PROMPT, *options]) == 0
    monkeypatch.undo()
    model = slimplus.load(copy, dtype=torch.float32)
    torch.manual_seed(7)
    sampling = {"max_new_tokens": 80, "do_sample": True, "temperature": 1.5, "top_p": 0.9, "top_k": 0}
    assert "".join(recorder.writes) == expected_text(model, tokenizer, PROMPT, **sampling) + "\n"
    assert sum(map(bool, recorder.writes)) > 10, "the text must not come all at once"


@pytest.mark.slow
def test_generate_in_a_process_of_its_own(packed: Path, model: Any, tokenizer: Any) -> None:
    process = run_console("generate", str(packed), PROMPT, "--max-new-tokens", "12", "--dtype", "float32")
    assert process.returncode == 0, process.stderr
    greedy = expected_text(model, tokenizer, PROMPT, max_new_tokens=12, do_sample=False)
    assert process.stdout == f"{greedy}\n"


def test_chat_uses_the_template(copy: Path, model: Any, tokenizer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / "chat_template.jinja").write_text(
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<me>{% endif %}"
    )
    assert main(["generate", str(copy), "Hi", "--chat", "--max-new-tokens", "8", "--dtype", "float32"]) == 0
    expected = expected_text(model, tokenizer, "<user>Hi<me>", max_new_tokens=8, do_sample=False)
    assert capsys.readouterr().out == f"{expected}\n"


def test_a_model_with_a_table_of_positions_is_not_asked_for_more(
    make_model: ModelMaker, capsys: pytest.CaptureFixture[str]
) -> None:
    """OPT looks positions up; LLaMA computes them."""
    sampling = Sampling(200)
    for kind in ("opt", "llama"):
        source = ModelSource(str(make_model(kind)), dtype="float32")
        loaded = LoadedModel(source.model(), source.tokenizer())
        if kind == "llama":
            stream(loaded, "a" * 57, sampling)
            continue
        with pytest.raises(
            InputError, match="57 tokens of prompt and 200 new ones are more than the 256 positions of the"
        ):
            stream(loaded, "a" * 57, sampling)
        with pytest.raises(InputError, match="300 tokens of prompt and 200 new ones .*; shorten the prompt"):
            stream(loaded, "a" * 300, sampling)
        stream(loaded, "a" * 56, sampling)


def test_a_prompt_with_a_token_beyond_the_embedding(make_model: ModelMaker) -> None:
    source = ModelSource(str(make_model("llama")))
    tokenizer = source.tokenizer()
    tokenizer.add_tokens(["<|sys|>"])
    said = r"the prompt: the tokenizer makes token 257 \('<|sys|>'\) of it, and the model's embedding has 257 rows"
    with pytest.raises(InputError, match=said.replace("|", r"\|")):
        stream(LoadedModel(source.model(), tokenizer), "<|sys|> x", Sampling(1))


def test_a_terminal_in_ascii_and_a_prompt_in_no_encoding(packed: Path) -> None:
    script = "import sys; from slimplus.cli.main import main; sys.exit(main())"
    command = [sys.executable, "-c", script, "generate", str(packed)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([*command, "é", "--max-new-tokens", "3"], env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii()
    done = subprocess.run([*command, b"caf\xff"], env=environment, capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr == b"the prompt is not valid UTF-8; convert it, with iconv for example\n"
