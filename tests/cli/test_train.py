"""The command line as a user meets it, in processes of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from slimplus.cli.main import main
from slimplus.cli.train import train
from slimplus.recipe.parsing import recipe_names
from slimplus.recipe.schema import Recipe, keys
from slimplus.utils.errors import InputError
from tests.support.processes import ROOT

SCRIPT = [str(ROOT / "train.py")]
CONSOLE = ["-c", "import sys; from slimplus.cli.main import main; sys.exit(main())"]
ENTRIES = pytest.mark.parametrize("entry", [SCRIPT, [*CONSOLE, "train"]], ids=["train.py", "slimplus train"])
INPUT = ["recipe=llama7b_2bit", "dry_run=true"]  # passes every check with no model and no text


def run(*arguments: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )


@ENTRIES
@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["recipe=nope"],
        ["recipe=smollm2_135m_2bit", "quantization.bit=2"],
        ["recipe=smollm2_135m_2bit", "quantization.group_size=48"],
        ["recipe=smollm2_135m_2bit", "model.path=./no/such/model"],
        ["recipe=smollm2_135m_2bit", "model.path=org/name"],
        ["recipe=smollm2_135m_2bit", "data.calibration.path=no.txt"],
    ],
)
def test_bad_input_is_one_sentence_and_status_2(entry: list[str], arguments: list[str]) -> None:
    process = run(*entry, *arguments)
    assert process.returncode == 2
    assert process.stdout == ""
    assert len(process.stderr.splitlines()) == 1
    assert "Traceback" not in process.stderr


@pytest.mark.parametrize("arguments", [["seed=x"], ["model.path=/nowhere"], ["model.path=a/b"], ["--help"]])
def test_nothing_heavy_is_imported_before_every_check_has_passed(arguments: list[str]) -> None:
    heavy = {"torch", "transformers", "lightning", "datasets", "numpy", "deepspeed", "triton"}
    code = (
        "import sys; from slimplus.cli.main import main; "
        f"status = main({['train', 'recipe=smollm2_135m_2bit', *arguments]!r}); "
        f"sys.stdout.write(str([status, *sorted({heavy!r} & set(sys.modules))]))"
    )
    assert run("-c", code).stdout.splitlines()[-1] == ("[0]" if arguments == ["--help"] else "[2]")


@pytest.mark.parametrize("entry", [[*SCRIPT, "--help"], [*CONSOLE, "train", "--help"], [*CONSOLE, "train", "-h"]])
def test_help_names_every_recipe_and_key_with_type_and_default(entry: list[str]) -> None:
    process = run(*entry)
    assert process.returncode == 0
    assert process.stderr == ""
    lines = process.stdout.splitlines()
    assert max(map(len, lines)) <= 110
    for name in [*recipe_names(), *keys()]:
        assert sum(line.startswith(f"  {name} ") for line in lines) == 1
    assert "[rtn | gptq | slimllm | slimllm_plus | qat; default: set by the recipe]" in process.stdout
    assert "[integer >= 1; default: 128]" in process.stdout
    assert "[[integer, ...]; default: [1, 2, 3, 4]]" in process.stdout
    assert all(field.description for field in keys().values())


def test_the_script_runs_from_any_folder(tmp_path: Path) -> None:
    process = run(*SCRIPT, "recipe=nope", folder=tmp_path)
    assert process.returncode == 2
    assert "smollm2_135m_2bit" in process.stderr


# What the command line does with the pipeline, without running one.


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts stand-ins in the place of the pipeline's functions."""

    def put(**functions: Callable[[Recipe], None]) -> None:
        for name, function in functions.items():
            module = {"run": "run", "dry_run": "plan"}[name]
            monkeypatch.setitem(sys.modules, f"slimplus.pipeline.{module}", SimpleNamespace(**{name: function}))

    return put


def test_a_recipe_that_passes_reaches_the_pipeline(install: Callable[..., None]) -> None:
    ran: list[Recipe] = []
    planned: list[Recipe] = []
    install(run=ran.append, dry_run=planned.append)
    assert train([*INPUT, "seed=5"]) == 0
    assert main(["train", "recipe=smollm2_135m_2bit", "seed=6"]) == 0
    assert [recipe.seed for recipe in planned] == [5]
    assert [recipe.seed for recipe in ran] == [6]


def test_bad_input_found_by_the_pipeline_is_status_2(
    install: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(recipe: Recipe) -> None:
        raise InputError("model.path: not a language model")

    install(dry_run=refuse)
    assert train(INPUT) == 2
    assert capsys.readouterr().err == "model.path: not a language model\n"


@pytest.mark.parametrize(("resume", "command"), [("auto", "the same command"), ("never", "with resume=auto")])
def test_an_interrupt_says_how_to_go_on(
    install: Callable[..., None], capsys: pytest.CaptureFixture[str], resume: str, command: str
) -> None:
    def interrupt(recipe: Recipe) -> None:
        raise KeyboardInterrupt

    install(dry_run=interrupt)
    assert train([*INPUT, f"resume={resume}", "run_dir=here"]) == 130
    said = capsys.readouterr().err
    assert f"{command} goes on from what here holds." in said
    assert len(said.splitlines()) == 1


def test_a_defect_is_not_dressed_up_as_bad_input(install: Callable[..., None]) -> None:
    def fail(recipe: Recipe) -> None:
        raise ZeroDivisionError

    install(dry_run=fail)
    with pytest.raises(ZeroDivisionError):
        train(INPUT)
