"""The code in the documentation: Python blocks run, command lines parse, quoted messages and names are real."""

from __future__ import annotations

import ast
import re
import shlex
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from slimplus.cli.main import parser
from slimplus.format.affine import QuantizedWeight, storable_scale, storable_zero_point
from slimplus.format.planes import pack
from slimplus.nn import PackedEmbedding, PackedLinear
from slimplus.recipe.parsing import load_recipe
from slimplus.recipe.schema import keys

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md"]
FENCE = re.compile(r"^( *)```(\w+)([^\n]*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
NEWLINE = "\n"
CONTROL = {"&&", "||", ";", "|"}
# Programs that are none of ours: their arguments are theirs to check.
FOREIGN = {"cd", "curl", "git", "hf", "llama-cli", "lm_eval", "source", "vllm"}
STARTERS = {"srun", "torchrun"}  # what follows `train.py` after them are a recipe's keys


@dataclass(frozen=True)
class Block:
    """A fenced block: where it stands, its language, the rest of the info string, its text."""

    where: str
    language: str
    info: str
    text: str

    def __str__(self) -> str:
        return self.where

    @property
    def runs_here(self) -> bool:
        """Whether its title does not say what else it needs."""
        return "needs" not in self.info


def blocks(page: Path, language: str) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(f"{page.name}:{text.count(NEWLINE, 0, found.start()) + 1}", found[2], found[3], found[4])
        for found in FENCE.finditer(text)
        if found[2] == language
    ]


def all_blocks(language: str) -> list[Block]:
    return [block for page in PAGES for block in blocks(page, language)]


def name(page: Path) -> str:
    return page.name


# Python


@pytest.mark.parametrize("block", all_blocks("python"), ids=str)
def test_python_blocks_compile(block: Block) -> None:
    compile(block.text, block.where, "exec")


@pytest.fixture
def in_a_checkout(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The current directory is one in which the demo has run, on a tiny model."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "smollm2_135m_2bit").symlink_to(finished)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(block.runs_here for block in blocks(page, "python"))], ids=name
)
@pytest.mark.usefixtures("in_a_checkout")
def test_python_blocks_run(page: Path) -> None:
    """One after the other, as a reader would type them."""
    namespace: dict[str, Any] = {}
    for block in blocks(page, "python"):
        if block.runs_here:
            exec(compile(block.text, block.where, "exec"), namespace)


# Command lines


def commands(block: Block) -> Iterator[list[str]]:
    """The words of each command, without comments."""
    for line in block.text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if word not in CONTROL:
                words.append(word)
            elif words:
                yield words
                words = []


COMMANDS = [pytest.param(words, id=f"{block}-{words[0]}") for block in all_blocks("bash") for words in commands(block)]


@pytest.mark.parametrize("words", COMMANDS)
def test_command_lines_parse(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where nothing lies that a command names
    check_command(words)


def check_command(words: list[str]) -> None:
    program, *arguments = words
    name = Path(program).name
    if name in STARTERS:
        check_recipe(arguments[arguments.index("train.py") + 1 :])
    elif name == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert all(argument in targets or "=" in argument for argument in arguments)
    elif name == "pip":
        check_extras(arguments)
    elif name == "pytest":
        assert all((ROOT / path).exists() for path in arguments if not path.startswith("-"))
    elif name == "slimplus" and arguments[0] == "train":
        check_recipe(arguments[1:])
    elif name == "slimplus":
        parser().parse_args(arguments)
    elif name == "python":
        check_python(arguments)
    else:
        assert name in FOREIGN, f"{name} is no program that this test knows"


def check_recipe(arguments: list[str]) -> None:
    if arguments != ["--help"]:
        load_recipe(arguments)


def check_python(arguments: list[str]) -> None:
    match arguments:
        case ["train.py", *rest]:
            check_recipe(rest)
        case ["-c", code, *_]:
            compile(code, "-c", "exec")
        case ["-m", "pip", *rest]:
            check_extras(rest)
        case ["-m", module, *rest]:
            found = find_spec(module)
            assert found is not None
            assert found.origin is not None
            if module.startswith("slimplus"):
                check_options(Path(found.origin), rest)
        case [script, *rest]:
            check_options(ROOT / script, rest)


def check_options(script: Path, arguments: list[str]) -> None:
    """Each option is one that a file beside the script names."""
    source = "".join(file.read_text(encoding="utf-8") for file in {script, *script.parent.glob("*.py")})
    for option in (argument.partition("=")[0] for argument in arguments if argument.startswith("--")):
        assert f'"{option}"' in source, f"{script.name} takes no {option}"


def check_extras(arguments: list[str]) -> None:
    """`.[extra]` is one of the package's."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for named in re.findall(r"^\.\[([\w,]+)\]$", "\n".join(arguments), re.MULTILINE):
        assert set(named.split(",")) <= extras.keys()


@pytest.mark.parametrize(
    "command",
    [
        "python train.py recipe=smollm2_135m_2bit quantisation.bits=3",
        "slimplus train recipe=nothing",
        "torchrun --nproc-per-node=2 train.py recipe=smollm2_135m_2bit trainer.devices=two",
        "slimplus inspect PATH --jason",
        "python benchmarks/packing.py --blcoks 2",
        "python benchmarks/unpacking.py",
        "python -m slimplus.tune",
        "make coffee",
        "pip install '.[everything]'",
        "pytest tests/nowhere",
        "slimminus",
    ],
)
def test_wrong_command_lines_do_not(command: str) -> None:
    with pytest.raises((AssertionError, ValueError, SystemExit, OSError)):
        check_command(shlex.split(command))


# Names


def inline_code(page: Path) -> set[str]:
    return set(re.findall(r"`([^`\n]+)`", FENCE.sub("", page.read_text(encoding="utf-8"))))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_files_and_modules_that_are_named_are_there(page: Path) -> None:
    for code in inline_code(page):
        if re.fullmatch(r"(slimplus|kernels|benchmarks|recipes|tests|docs)/[\w./]+", code):
            assert (ROOT / code).exists(), code
        if re.fullmatch(r"slimplus(\.[A-Za-z_0-9]+)+", code):
            assert is_there(code), code


def is_there(dotted: str) -> bool:
    """Whether it is a module of the package, or something in one."""
    module, _, name = dotted.rpartition(".")
    try:
        if find_spec(dotted) is not None:
            return True
    except ModuleNotFoundError:  # its parent is none: a class, perhaps
        return is_there(module)
    return hasattr(__import__(module, fromlist=[name]), name)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_keys_that_are_named_are_keys(page: Path) -> None:
    known = [*keys(), "resume", "recipe"]
    sections = {key.partition(".")[0] for key in known if "." in key}
    for code in inline_code(page):
        for key, value in re.findall(r"^([a-z_]+(?:\.[a-z_]+)+)(=|$)", code):
            section = key.partition(".")[0]
            of_a_model = section == "model" and not value  # `model.generate` is one of PyTorch's names
            if section in sections and not of_a_model and not key.endswith((".py", ".md", ".json", ".yaml")):
                assert key in known or any(one.startswith(f"{key}.") for one in known), key


def texts_of_the_source() -> str:
    """Every text of the source, a line each, with `…` for what is filled in."""
    texts = []
    for file in [*(ROOT / "slimplus").rglob("*.py"), *(ROOT / "kernels").glob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
                texts.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return "\n".join(texts)


def test_troubleshooting_quotes_what_the_source_says() -> None:
    said = texts_of_the_source()
    rows = re.findall(r"^\| (`.*?) \| ", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)
    assert rows
    messages = [message for row in rows for message in re.findall(r"`([^`]+)`", row)]
    unsaid = [text for text in messages if max(re.split(r"…|: ", text), key=len).strip(" ;'(") not in said]
    assert unsaid == []


# The reader of the checkpoint format


@pytest.fixture(scope="module")
def reader() -> dict[str, Any]:
    """The functions of the reader, without its last line, which reads a file."""
    (block,) = blocks(ROOT / "docs" / "checkpoint_format.md", "python")
    tree = ast.parse(block.text)
    tree.body = tree.body[:-1]
    namespace: dict[str, Any] = {}
    exec(compile(tree, block.where, "exec"), namespace)
    return namespace


@pytest.mark.parametrize("scale_bits", [8, 16])
@pytest.mark.parametrize("group_size", [16, 64])
def test_the_reader_gives_the_bits_of_slimplus(reader: dict[str, Any], group_size: int, scale_bits: int) -> None:
    """All widths, rows that are no multiple of 16, a shorter last group, scales over many octaves."""
    generator = torch.Generator().manual_seed(0)
    groups, rows = 12, 37
    columns = groups * group_size - 5
    bits = torch.cat([torch.arange(1, 9), torch.tensor([3, 1, 6, 2])]).int()
    levels = torch.exp2(bits.float())
    integers = torch.rand(rows, columns, generator=generator) * levels.repeat_interleave(group_size)[:columns]
    scale = storable_scale(torch.exp2(4 * torch.randn(rows, groups, generator=generator)), scale_bits)
    zero_point = storable_zero_point(torch.rand(rows, groups, generator=generator) * levels, bits)
    weight = QuantizedWeight(integers.to(torch.uint8), scale, zero_point, bits, group_size, scale_bits)
    tensors = {name: tensor.numpy() for name, tensor in pack(weight).items()}
    read = reader["unpack"](tensors, rows, columns, group_size)
    assert torch.equal(torch.from_numpy(read.copy()), weight.dequantize())


def test_the_reader_reads_a_checkpoint(reader: dict[str, Any], packed: Path, model: Any) -> None:
    layers = {name: layer for name, layer in model.named_modules() if type(layer) in (PackedLinear, PackedEmbedding)}
    assert layers
    for name, layer in layers.items():
        assert torch.equal(torch.from_numpy(reader["read_weight"](packed, name).copy()), layer.dequantize())
