"""The run directory: what one run has written, and what another start of it may reuse.

| file | content |
|---|---|
| .lock | lock of the job at work |
| recipe.yaml | the resolved recipe |
| progress.json | where the job stands, for `slimplus status`; not in the manifest |
| manifest.json | size and checksum of every complete file |
| fingerprint.json | recipe keys, and hashes of model, tokenizer and text, that all the rest depends on |
| tokens/*.safetensors | calibration and evaluation windows |
| predictions*.safetensors | the full-precision model's likeliest next tokens on the evaluation windows, a file a text |
| sensitivity.safetensors | loss of each group at each width, if it was measured |
| blocks/*.safetensors | one packed block each, with its record |
| end_to_end.safetensors | packed layers and norms after end-to-end training |
| checkpoints/ | Lightning checkpoints of the training in progress |
| logs/ | TensorBoard and CSV logs, the only files that may be incomplete |
| allocation.json | width of each group of each linear layer |
| packed/ | the checkpoint to ship |
| metrics.json | figures of all stages |
| summary.txt | what the run printed at its end |
| report.html | the figures as a page, which `slimplus report` can write again, and so not in the manifest |
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load, save
from torch import Tensor

from slimplus.run_dir.fingerprint import EARLIER_VALUES, differences
from slimplus.run_dir.lock import LOCK
from slimplus.training.checkpoints import CHECKPOINT, END_TO_END, TrainingCheckpoints
from slimplus.utils.errors import InputError
from slimplus.utils.files import clean
from slimplus.utils.json_text import to_json
from slimplus.utils.manifest import Manifest

logger = logging.getLogger(__name__)

Record = dict[str, Any]
"""How a block, or the end-to-end training, went: losses, seconds, events; of a block also `made_from` and `chain`."""

SENSITIVITY = "sensitivity.safetensors"
PREDICTIONS = "predictions.safetensors"
TUNED = f"{END_TO_END}.safetensors"
FORMAT = ("quantization.group_size", "quantization.scale_bits")  # all blocks of a checkpoint must agree in these keys


def numbered(name: str, index: int) -> str:
    """Return the name of one of several files of a kind: `name.ext`, then `name_1.ext`, `name_2.ext`, …."""
    stem, dot, extension = name.partition(".")
    return f"{stem}_{index}{dot}{extension}" if index else name


class RunDirectory:
    """The files of one run.

    Call `open` before any other method. Only the first process of a job writes.

    Args:
        root: the folder, which `locked` creates.

    Attributes:
        manifest: list of the complete files.
        packed: folder of the packed checkpoint.
        checkpoints: folder of the Lightning checkpoints.
        logs: folder of the TensorBoard and CSV logs.
        tokens: folder of the calibration and evaluation windows.
        blocks: folder of the packed blocks.
    """

    manifest: Manifest

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).expanduser()
        self.packed, self.checkpoints, self.logs = (self.root / name for name in ("packed", "checkpoints", "logs"))
        self.tokens, self.blocks = self.root / "tokens", self.root / "blocks"

    def open(self) -> None:
        """Read which files are complete.

        Raises:
            InputError: if manifest.json is damaged.
        """
        self.manifest = Manifest(self.root)

    def repair(self) -> list[str]:
        """Clean up after a killed process, and drop every file that is incomplete or damaged.

        Files that were made from a dropped one stay: a block made again often has the same bytes, see `lineage`.

        Returns:
            A sentence for each file that was dropped.

        Raises:
            InputError: if manifest.json is damaged.
        """
        clean(self.root)
        self.open()
        dropped = dict([*self._unlisted(), *self._damaged()])
        for path, problem in dropped.items():
            logger.warning("%s; it is made again", problem)
            self.manifest.forget(path)
        self.manifest.create()
        return list(dropped.values())

    def _unlisted(self) -> Iterator[tuple[Path, str]]:
        """Yield the files that manifest.json does not list, each with a sentence."""
        for folder in (self.tokens, self.blocks, self.checkpoints):
            for path in sorted(folder.rglob("*")):
                if path.is_file() and not self.manifest.names(path):
                    yield path, f"{path} is incomplete or from elsewhere: manifest.json does not list it"

    def _damaged(self) -> Iterator[tuple[Path, str]]:
        """Yield the damaged files, or the folders that one damaged file spoils, each with a sentence."""
        depths = {"packed": 1, "checkpoints": 2}  # folder at the top → depth of the folder that is spoiled
        for path in self.manifest.named():
            parts = path.relative_to(self.root).parts
            if (path.exists() or parts[0] in depths) and (problem := self.manifest.problem(path)):
                yield self.root.joinpath(*parts[: depths.get(parts[0], len(parts))]), problem

    def check_start(self, resume: str, blocks: int) -> None:
        """Check that the folder holds what the user wants to go on from.

        Args:
            resume: `auto`, `never` (the folder must be empty), or the path of the checkpoint of the block in training.
            blocks: number of blocks in the model.

        Raises:
            InputError: if the folder is not empty but must be, holds files without manifest.json, or does not hold the
                checkpoint.
        """
        if resume == "never" and any(path.name != LOCK for path in self.root.iterdir()):
            raise InputError(
                f"run_dir: {self.root} is not empty; give another run_dir, or resume=auto to go on from what it holds"
            )
        folders = (self.blocks, self.checkpoints, self.packed, self.tokens)
        filled = [folder.name for folder in folders if any(folder.glob("*"))]
        if filled and not self.manifest.file.is_file():  # they may belong to somebody who must not lose them
            raise InputError(
                f"run_dir: {self.root} holds {', '.join(filled)} but no {self.manifest.file.name} to check them by; "
                "restore it, or give another run_dir"
            )
        if resume in ("auto", "never"):
            return
        given = Path(resume).expanduser()
        index = next((index for index in range(blocks) if not self.has_block(index)), blocks)
        folder = self._checkpoint_folder(index) if index < blocks else self.checkpoints / END_TO_END
        expected = folder / CHECKPOINT
        found = f"{self.root} holds {expected}" if expected.exists() else f"{self.root} holds none"
        problem = None
        if given.resolve() != expected.resolve() or not expected.exists():
            problem = f"{given} is not the checkpoint of the training in progress ({found})"
        problem = problem or self.manifest.problem(expected)
        if problem:
            raise InputError(f"resume: {problem}; give that of this run_dir, or resume=auto")

    def check_fingerprint(self, identity: Mapping[str, Any], force: bool) -> list[str]:
        """Check that what the folder holds was made from the same recipe, model and text.

        A sensitivity made from something else is dropped. With `force`, checkpoints of a training in progress are
        dropped as well: their optimizer and their best state belong to the old values.

        Args:
            identity: the fingerprint of this start of the run.
            force: whether to go on although values differ.

        Returns:
            The keys that differ, each with its old and new value; empty unless forced.

        Raises:
            InputError: if values differ, or the old ones are unknown; the message names each key with both values.
        """
        has_blocks = any(self.blocks.glob("*"))
        used = has_blocks or any(self.checkpoints.glob("*")) or self.packed.exists()
        if (problem := self.manifest.problem(self.root / "fingerprint.json")) and used:
            raise InputError(
                f"run_dir: {problem}, so what the blocks were made from is unknown; restore it, or give another run_dir"
            )
        earlier = {key: value for key, value in EARLIER_VALUES.items() if key in identity}
        before = {} if problem else earlier | self.read("fingerprint.json")
        different = differences(before, json.loads(_json(identity)))
        changes = ", ".join(different)
        if has_blocks and any(change.split()[0] in FORMAT for change in different):
            raise InputError(
                f"run_dir: the blocks of {self.root} are in another format than this run's would be: {changes}; "
                "restore the values, or give another run_dir"
            )
        if different and used and not force:
            raise InputError(
                f"run_dir: what {self.root} holds was made with other values: {changes}; restore them, give another "
                "run_dir, or go on regardless with resume.force=true"
            )
        if not all(change.startswith("training.") for change in different):  # which the sensitivity does not depend on
            self.manifest.forget(self.root / SENSITIVITY)
        if not different or not used:
            return []
        logger.warning("resume.force: going on although values differ: %s", changes)
        self.manifest.forget(self.checkpoints)
        return different

    def read(self, name: str) -> dict[str, Any]:
        """Return the content of a JSON file of an earlier start; empty if there is no such file."""
        file = self.root / name
        return json.loads(file.read_text()) if self.manifest.names(file) and file.is_file() else {}

    @property
    def has_checkpoint(self) -> bool:
        """Whether the packed checkpoint and the allocation, which are written together, are complete."""
        written = (self.packed, self.root / "allocation.json")
        return all(self.manifest.names(path) and path.exists() for path in written)

    def has_block(self, index: int) -> bool:
        """Return whether a block is finished."""
        file = self._block_file(index)
        return self.manifest.names(file) and file.is_file()

    def finished_blocks(self, count: int) -> list[bool]:
        """Return for each block whether it is finished, and was made from the block before it if that is finished."""
        records = [
            self._read_record(self._block_file(index)) if self.has_block(index) else None for index in range(count)
        ]
        return [
            record is not None and (before is None or record["made_from"] == before["chain"])
            for before, record in zip([{"chain": ""}, *records], records, strict=False)
        ]

    @staticmethod
    def _read_record(file: Path) -> Record:
        """Return the record in the metadata of a safetensors file."""
        with safe_open(file, framework="pt") as opened:
            record: Record = json.loads(opened.metadata()["record"])
            return record

    def _block_file(self, index: int) -> Path:
        return self.blocks / f"block_{index:03d}.safetensors"

    def save_block(self, index: int, tensors: Mapping[str, Tensor], record: Record) -> None:
        """Write a finished block, and drop the checkpoints of its training."""
        data = save(dict(tensors), metadata={"record": to_json(record)})
        self.manifest.write(self._block_file(index), data)
        self.manifest.forget(self._checkpoint_folder(index))

    def load_block(self, index: int) -> tuple[dict[str, Tensor], Record]:
        """Return the packed tensors of a finished block by their names in it, and its record.

        Raises:
            InputError: if the file is missing or damaged.
        """
        file = self._block_file(index)
        problem = f"{file} is missing"
        if file.is_file():
            problem = f"{file} is damaged"
            data = file.read_bytes()
            if self.manifest.accepts(file, data):
                return load(data), self._read_record(file)
        raise InputError(f"run_dir: {problem}; start the run again, which makes the block again")

    def block_checkpoints(self, index: int, parent_hash: str) -> TrainingCheckpoints:
        """Return the checkpoints of a block's training; `parent_hash` is the lineage of the block before it."""
        return TrainingCheckpoints(self._checkpoint_folder(index), self.manifest, parent_hash)

    def last_lineage(self, blocks: int) -> str:
        """Return the lineage of the last of `blocks` finished blocks."""
        return str(self._read_record(self._block_file(blocks - 1))["chain"])

    def end_to_end_checkpoints(self, parent_hash: str) -> TrainingCheckpoints:
        """Return the checkpoints of the end-to-end training; `parent_hash` is the hash of what it starts from."""
        return TrainingCheckpoints(self.checkpoints / END_TO_END, self.manifest, parent_hash)

    def save_tuned(self, tensors: Mapping[str, Tensor], parent_hash: str, record: Record) -> None:
        """Write the tensors that end-to-end training gave and its record, and drop its checkpoints."""
        self.save_tensors(TUNED, tensors, parent_hash, record)
        self.manifest.forget(self.checkpoints / END_TO_END)

    def load_tuned(self, parent_hash: str) -> tuple[dict[str, Tensor], Record] | None:
        """Return what `save_tuned` wrote, or None if it was made from something else."""
        tensors = self.load_tensors(TUNED, parent_hash)
        return None if tensors is None else (tensors, self._read_record(self.root / TUNED))

    def save_tensors(
        self, name: str, tensors: Mapping[str, Tensor], parent_hash: str, record: Record | None = None
    ) -> None:
        """Write a file of tensors, with the hash of what they were made from and a record of how."""
        metadata = {"made_from": parent_hash, "record": to_json(record or {})}
        self.manifest.write(self.root / name, save(dict(tensors), metadata=metadata))

    def load_tensors(self, name: str, parent_hash: str) -> dict[str, Tensor] | None:
        """Return the tensors of a file, or None if there is no file made from what `parent_hash` stands for."""
        file = self.root / name
        if not (self.manifest.names(file) and file.is_file()):
            return None
        with safe_open(file, framework="pt") as opened:
            if opened.metadata()["made_from"] != parent_hash:
                return None
        return load(file.read_bytes())

    def _checkpoint_folder(self, index: int) -> Path:
        return self.checkpoints / f"block_{index:03d}"

    def write(self, name: str, content: str | Mapping[str, Any]) -> None:
        """Write a text file, or a mapping as JSON."""
        self.manifest.write(self.root / name, content if isinstance(content, str) else _json(content))


def lineage(parent_hash: str, tensors: Mapping[str, Tensor]) -> str:
    """Return the hash of a block's tensors and of the block before it, whose lineage is `parent_hash`.

    A block is made from the outputs of the blocks before it, and stays valid as long as those have the same bytes.
    """
    digest = hashlib.sha256(parent_hash.encode())
    digest.update(save({name: tensors[name].cpu().contiguous() for name in sorted(tensors)}))
    return digest.hexdigest()[:16]


def _json(content: Mapping[str, Any]) -> str:
    return to_json(content, indent=2) + "\n"
