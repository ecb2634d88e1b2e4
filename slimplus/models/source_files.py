"""The files of a model on this machine: which of them are read, and what is wrong with them, said without PyTorch."""

from __future__ import annotations

import fnmatch
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from slimplus.models.location import resolve_model_folder
from slimplus.utils.errors import InputError, first_line, named_first_line

if TYPE_CHECKING:
    from torch import Tensor

CONFIG, ADAPTER = "config.json", "adapter_config.json"
BLOCKS = "num_hidden_layers"  # key of config.json
INDEX = "model.safetensors.index.json"
WEIGHTS = ("model.safetensors", INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json")
"""Names that transformers looks for, in its order; it reads the first one that there is."""
TOKENIZERS = (
    *("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt"),
    *("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "*.tiktoken"),
)
"""Patterns of files of which any tokenizer has at least one."""
BESIDE = ("generation_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt", "chat_template.*")
"""Patterns of files that are read if there are any."""
PROCESSOR = (
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
    "chat_template.json",  # of processors of earlier versions
)
"""Files that tell how images, sounds and videos become tensors, of which a model has some or none."""
POINTER = b"version https://git-lfs.github.com/spec/"  # first bytes of what git leaves for a file it has not fetched
AGAIN = "download or copy it again"
HUB_ID = r"[\w-][\w.-]*/[\w.-]+"


class SourceFileError(InputError):
    """Error of a file that a model cannot be read from."""


@dataclass(frozen=True)
class StoredWeight:
    """A tensor of a model's safetensors file.

    Attributes:
        file: the file that holds it.
        dtype: dtype as the file's header calls it, such as `BF16`.
        shape: sizes of all dimensions.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]

    def read(self, name: str) -> Tensor:
        """Return the tensor, whose name in the file is `name`."""
        with safe_open(self.file, framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(name)
            return tensor


def weight_files(folder: Path, gguf_file: str | None) -> list[Path]:
    """Return the files that the weights are read from, an index before its shards.

    Args:
        folder: folder of the model.
        gguf_file: name of the GGUF file that holds the weights, if one does.

    Raises:
        SourceFileError: if there are no weights, or the index is damaged or names a file that is missing.
    """
    if gguf_file:
        return [folder / gguf_file]
    first = next((folder / name for name in WEIGHTS if os.path.lexists(folder / name)), None)
    if first is None:
        raise SourceFileError(f"{folder} holds no weights: {_instead(folder)}")
    if first.suffix != ".json" or _file_problem(first):
        return [first]
    shards = _shards(first)
    if missing := [shard for shard in shards if not os.path.lexists(shard)]:
        raise SourceFileError(
            f"{missing[0]} is missing, and {first.name} names it; {AGAIN} ({len(missing)} of {len(shards)} shards)"
        )
    return [first, *shards]


def _instead(folder: Path) -> str:
    """Return what a folder without weights holds instead, and a remedy."""
    if ggufs := sorted(file.name for file in folder.glob("*.gguf")):
        return f"give model.gguf_file={ggufs[0]}"
    if (folder / ADAPTER).is_file():
        return "it is an adapter; merge it into its model with PEFT's merge_and_unload, and give that model's folder"
    found = sorted(file.name for pattern in ("*.safetensors", "*.bin", "*.pth") for file in folder.glob(pattern))
    if found:
        return f"{found[0]} has another name than {' or '.join(WEIGHTS[:2])}; give a folder that save_pretrained wrote"
    return f"neither {WEIGHTS[0]} nor {WEIGHTS[1]} is there; {AGAIN}"


def _shards(index: Path) -> list[Path]:
    """Return the files that an index names.

    Raises:
        SourceFileError: if the index is damaged, or names what is no file of its folder.
    """
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SourceFileError(f"{index} is no index of shards ({named_first_line(error)}); {AGAIN}") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not name:
            raise SourceFileError(f"{index} names {str(name)!r:.80}, which is no file beside it; {AGAIN}")
    if not names:
        raise SourceFileError(f"{index} names no shards; {AGAIN}")
    return [index.parent / name for name in names]


def stored_weights(files: list[Path]) -> dict[str, StoredWeight]:
    """Return the tensors of the safetensors files among `files`, by name; no tensor is read.

    Raises:
        SourceFileError: if a file is damaged, or two of them hold a tensor of the same name.
    """
    found: dict[str, StoredWeight] = {}
    for file in (file for file in files if file.suffix == ".safetensors"):
        try:
            with safe_open(file, framework="numpy") as opened:
                for name in opened.keys():  # noqa: SIM118, not a mapping
                    if name in found:
                        raise SourceFileError(f"{name} is both in {found[name].file} and in {file.name}; {AGAIN}")
                    view = opened.get_slice(name)
                    found[name] = StoredWeight(file, view.get_dtype(), tuple(view.get_shape()))
        except (OSError, SafetensorError) as error:
            raise SourceFileError(f"{file} is damaged or cut short ({first_line(error)}); {AGAIN}") from error
    return found


def code_problem(stored: Mapping[str, StoredWeight]) -> str | None:
    """Return a sentence if weights are stored as codes of a quantization, whose scales nobody would read."""
    codes = [
        name
        for name, tensor in stored.items()
        if name.endswith(("weight", "bias")) and not re.fullmatch(r"BF16|F(16|32|64)", tensor.dtype)
    ]
    if not codes:
        return None
    first = stored[codes[0]]
    return (
        f"{codes[0]} in {first.file} is stored as {first.dtype}: the model is quantized already; give the "
        "full-precision model, at 16 or 32 bit"
    )


def _matching(folder: Path, patterns: Iterable[str]) -> list[Path]:
    """Return the files whose names match a pattern, links to nothing included, which glob may leave out."""
    names = sorted(os.listdir(folder))
    return [folder / name for pattern in patterns for name in fnmatch.filter(names, pattern)]


def files_read(folder: Path, gguf_file: str | None) -> Iterator[Path]:
    """Yield the files of a model's folder that are read, its configuration first.

    Raises:
        SourceFileError: if there are no weights, or their index is damaged or names a file that is missing.
    """
    if not gguf_file:
        yield folder / CONFIG
        yield from _matching(folder, (*TOKENIZERS, *BESIDE, *PROCESSOR))
    yield from weight_files(folder, gguf_file)


def _file_problem(file: Path) -> str | None:
    """Return a sentence if a file cannot be read, or is not what its name says."""
    if file.is_symlink() and not file.exists():
        return f"{file} is a link to {os.readlink(file)}, which does not exist; {AGAIN}"
    if not file.is_file():
        return f"{file} is no file; {AGAIN}"
    if not os.access(file, os.R_OK):
        return f"{file} cannot be read; change its permissions"
    with file.open("rb") as stream:
        start = stream.read(len(POINTER))
    if start == POINTER:
        return f"{file} is a pointer of Git LFS, not the file itself; run `git lfs pull` in its folder"
    if not start:
        return f"{file} is empty; {AGAIN}"
    if file.suffix == ".gguf" and not start.startswith(b"GGUF"):
        return f"{file} is no GGUF file; {AGAIN}"
    return _json_problem(file) if file.suffix == ".json" else None


def _json_problem(file: Path) -> str | None:
    """Return a sentence if a file holds no JSON object."""
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        return f"{file} is damaged: {first_line(error)}; {AGAIN}"
    return None if isinstance(content, dict) else f"{file} is damaged: it holds no JSON object; {AGAIN}"


def _blocks_problem(config: Path, stored: Mapping[str, StoredWeight]) -> str | None:
    """Return a sentence if config.json asks for more blocks than there can be; building them could take forever."""
    blocks = json.loads(config.read_bytes()).get(BLOCKS) if stored else None
    if blocks is None or (isinstance(blocks, int) and 1 <= blocks <= len(stored)):
        return None
    return f"{config}: {BLOCKS}: {blocks!r:.40} does not fit the {len(stored)} tensors of the weights; correct it"


def folder_problem(folder: Path, gguf_file: str | None = None) -> str | None:
    """Return a sentence on the first thing that is wrong with the files of a model; other files are not looked at.

    Args:
        folder: folder of the model.
        gguf_file: name of the GGUF file that holds the weights, if one does.
    """
    try:
        files = list(dict.fromkeys(files_read(folder, gguf_file)))
        problems = (_file_problem(file) for file in files)
        if problem := next(filter(None, problems), None):
            return problem
        stored = stored_weights(files)
        if problem := code_problem(stored) or _blocks_problem(folder / CONFIG, stored):
            return problem
    except SourceFileError as error:
        return str(error)
    if gguf_file:
        return None
    if not _matching(folder, TOKENIZERS):
        return f"{folder} has no tokenizer; copy tokenizer.json and tokenizer_config.json of the model into it"
    if (folder / ADAPTER).is_file():
        return (
            f"{folder / ADAPTER} belongs to an adapter, and the weights beside it may lack what it learned; merge it "
            "with PEFT's merge_and_unload, or remove the file"
        )
    return None


def location_problem(path: str, gguf_file: str | None, revision: str | None, weights: bool = True) -> str | None:
    """Return a sentence if a model is not where a recipe says, or its files cannot be read.

    Args:
        path: `model.path` of the recipe.
        gguf_file: `model.gguf_file` of the recipe.
        revision: `model.revision` of the recipe.
        weights: whether weights and tokenizer are looked at as well as the configuration.
    """
    try:
        folder = Path(resolve_model_folder(path))
    except InputError as error:
        return str(error)
    if not folder.exists():
        if re.fullmatch(HUB_ID, path):
            return _hub_problem(path, revision)
        return f"model.path: {path} does not exist; give a folder, a hub id org/name or package:NAME"
    if folder.is_file():
        return f"model.path: {folder} is a file; give its folder, and a GGUF file's name as model.gguf_file"
    ggufs = sorted(file.name for file in folder.glob("*.gguf"))
    if gguf_file and not os.path.lexists(folder / gguf_file):
        found = f"its GGUF files are {', '.join(ggufs)}" if ggufs else "it holds no GGUF file"
        return f"model.gguf_file: {gguf_file} is not in {folder}; {found}"
    if not gguf_file and not os.path.lexists(folder / CONFIG):
        remedy = f"give model.gguf_file={ggufs[0]}" if ggufs else "give a folder that save_pretrained wrote"
        return f"model.path: {folder} has no config.json; {remedy}"
    config = folder / (gguf_file or CONFIG)
    problem = folder_problem(folder, gguf_file) if weights else _file_problem(config)
    return f"model.path: {problem}" if problem else None


def _hub_problem(repository: str, revision: str | None) -> str | None:
    """Return a sentence if neither the local cache nor the hub has the model; the request takes a second."""
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError, HTTPError

    try:
        if isinstance(try_to_load_from_cache(repository, CONFIG, revision=revision), str):
            return None
        HfApi().model_info(repository, revision=revision, timeout=10)
    except (OSError, HTTPError, HFValidationError) as error:
        reason = named_first_line(error)
        return (
            f"model.path: {repository} is no local folder and cannot be had from the hub ({reason}); "
            "check the id, the network and your login, or download the model and give its folder"
        )
    return None
