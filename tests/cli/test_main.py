"""The commands for using a packed checkpoint, as a user meets them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from slimplus.cli.main import main
from tests.support.processes import ROOT, run_console


def test_help_lists_every_command() -> None:
    process = run_console("--help")
    assert process.returncode == 0
    for command in ("train", "check", "generate", "inspect", "benchmark", "report", "evaluate"):
        assert re.search(rf"^ +{command}\b", process.stdout, re.MULTILINE), command
    assert run_console().stdout == process.stdout


@pytest.mark.parametrize("command", ["check", "generate", "inspect", "benchmark", "report", "evaluate"])
def test_each_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    assert f"usage: slimplus {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["quantize"], "invalid choice: 'quantize'"),
        (["generate"], "the following arguments are required: path, prompt"),
        (["generate", "x", "y", "--max-new-tokens", "0"], "expected an integer of at least 1, got '0'"),
        (["generate", "x", "y", "--temperature", "nan"], "expected a number of at least 0, got 'nan'"),
        (["benchmark", "x", "--dtype", "int8"], "invalid choice: 'int8'"),
    ],
)
def test_wrong_arguments_are_one_line(words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["generate", "PATH", ""], "the prompt is empty"),
        (["generate", "PATH", "x", "--top-p", "1.5"], "--top-p: expected a number above 0 and at most 1, got 1.5"),
        (["generate", "PATH", "x", "--chat"], "has no chat template; leave --chat out"),
        (["generate", "PATH", "x", "--device", "gpu"], "--device: gpu cannot be used"),
        (["benchmark", "PATH", "--new-tokens", "1"], "--new-tokens: give at least 2"),
        (["benchmark", "PATH", "--gguf-file", "x.gguf"], "--gguf-file: names a file of --dense MODEL"),
        (["benchmark", "PATH", "--prompt-tokens", "250"], "314 tokens are more than the model takes; give at most 256"),
        (["benchmark", "PATH", "--prompt-tokens", "9", "--json", "/"], "--json: / is a folder; give a file"),
        (["benchmark", "PATH", "--prompt-tokens", "9", "--dense", "./nowhere"], "--dense: ./nowhere does not exist"),
        (["benchmark", "PATH", "--prompt-tokens", "9", "--dense", "PATH", "--gguf-file", "x"], "--gguf-file: x is not"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(
    words: list[str], sentence: str, packed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([argument.replace("PATH", str(packed)) for argument in words]) == 2
    said = capsys.readouterr()
    assert sentence in said.err
    assert said.out == ""


def test_nothing_heavy_is_imported_before_every_check_has_passed(packed: Path) -> None:
    heavy = {"torch", "transformers", "lightning", "datasets", "triton"}
    commands = [
        ["inspect", str(packed)],
        ["check", "./nowhere"],
        ["generate", str(packed), "x", "--chat"],
        ["benchmark", str(packed), "--dense", "./nowhere", "--prompt-tokens", "9"],
    ]
    code = (
        f"import sys; from slimplus.cli.main import main; statuses = [main(command) for command in {commands!r}]; "
        f"sys.stdout.write(str([*statuses, *sorted({heavy!r} & set(sys.modules))]))"
    )
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert process.stdout.splitlines()[-1] == "[0, 2, 2, 2]"
