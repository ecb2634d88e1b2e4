"""The run directory: what one job has written, and what another start of it may reuse.

recipe.yaml            the resolved recipe
.lock                  held by the job at work
manifest.json          size and checksum of every complete file
fingerprint.json       the recipe's keys and hashes of model, tokenizer and text that the rest depends on
tokens/*.safetensors   calibration and evaluation windows
blocks/*.safetensors   one packed block each, with its record
sensitivity.safetensors  loss of each group at each width, where bits were allocated by it
end_to_end.safetensors  packed layers and norms after the training of the whole model
checkpoints/           Lightning checkpoints of the training in progress
logs/                  TensorBoard and CSV; the only files that may be incomplete
allocation.json        bits per group per linear layer
metrics.json           figures
packed/                the checkpoint to ship
summary.txt
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

from slimplus.run_dir.fingerprint import differences
from slimplus.run_dir.lock import LOCK
from slimplus.training.checkpoints import CHECKPOINT, END_TO_END, TrainingCheckpoints
from slimplus.utils.errors import InputError
from slimplus.utils.files import clean
from slimplus.utils.manifest import Manifest

logger = logging.getLogger(__name__)

Record = dict[str, Any]

SENSITIVITY = "sensitivity.safetensors"
TUNED = f"{END_TO_END}.safetensors"
FORMAT = ("quantization.group_size", "quantization.scale_bits")  # which all blocks of a checkpoint share


class RunDirectory:
    """Reads and writes one run directory.

    `open` it before anything else. Only the first process of a job writes.

    Args:
        root: the folder; created by `locked`.
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
        """Mend what a killed process left, and drop every file that is not as it was written.

        Returns:
            What was dropped, each in a sentence. What was made from it stays: see `load_block`.

        Raises:
            InputError: if manifest.json is damaged.
        """
        clean(self.root)
        self.open()
        dropped = dict([*self._unnamed(), *self._damaged()])
        for path, problem in dropped.items():
            logger.warning("%s; it is made again", problem)
            self.manifest.forget(path)
        self.manifest.create()
        return list(dropped.values())

    def _unnamed(self) -> Iterator[tuple[Path, str]]:
        for folder in (self.tokens, self.blocks, self.checkpoints):
            for path in sorted(folder.rglob("*")):
                if path.is_file() and not self.manifest.names(path):
                    yield path, f"{path} is incomplete or from elsewhere: manifest.json does not name it"

    def _damaged(self) -> Iterator[tuple[Path, str]]:
        whole = {"packed": 1, "checkpoints": 2}  # one bad file spoils all below that depth
        for path in self.manifest.named():
            inside = path.relative_to(self.root).parts
            if (path.exists() or inside[0] in whole) and (problem := self.manifest.problem(path)):
                yield self.root.joinpath(*inside[: whole.get(inside[0], len(inside))]), problem

    def check_start(self, resume: str, blocks: int) -> None:
        """Check whether what the folder holds is what the user wants to go on from.

        Args:
            resume: `auto`, `never` (the folder must be empty), or the path of the checkpoint of the block in training.
            blocks: how many the model has.

        Raises:
            InputError: if not.
        """
        if resume == "never" and any(path.name != LOCK for path in self.root.iterdir()):
            raise InputError(
                f"run_dir: {self.root} is not empty; give another run_dir, or resume=auto to go on from what it holds"
            )
        folders = (self.blocks, self.checkpoints, self.packed, self.tokens)
        filled = [folder.name for folder in folders if any(folder.glob("*"))]
        if filled and not self.manifest.file.is_file():  # somebody else's, perhaps, who is not to lose them
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
        held = f"{self.root} holds {expected}" if expected.exists() else f"{self.root} holds none"
        problem = None
        if given.resolve() != expected.resolve() or not expected.exists():
            problem = f"{given} is not the checkpoint of the training in progress ({held})"
        problem = problem or self.manifest.problem(expected)
        if problem:
            raise InputError(f"resume: {problem}; give that of this run_dir, or resume=auto")

    def check_fingerprint(self, now: Mapping[str, Any], force: bool) -> list[str]:
        """Refuse to go on from what was made from something else; drop a sensitivity that was.

        Returns:
            What differs, with `force`; what was in training then, whose optimizer and best state are of the old
            values, begins anew.

        Raises:
            InputError: naming every key that differs, with its old and new value; if they cannot be known.
        """
        blocks = any(self.blocks.glob("*"))
        used = blocks or any(self.checkpoints.glob("*")) or self.packed.exists()
        if (problem := self.manifest.problem(self.root / "fingerprint.json")) and used:
            raise InputError(
                f"run_dir: {problem}, and tells what the blocks were made from; restore it, or give another run_dir"
            )
        before = {} if problem else self.read("fingerprint.json")
        different = differences(before, json.loads(_json(now)))
        changes = ", ".join(different)
        if blocks and any(change.split()[0] in FORMAT for change in different):
            raise InputError(
                f"run_dir: the blocks of {self.root} are in another format than this run's would be: {changes}; "
                "restore the values, or give another run_dir"
            )
        if different and used and not force:
            raise InputError(
                f"run_dir: what {self.root} holds was made with other values: {changes}; restore them, give another "
                "run_dir, or go on regardless with resume.force=true"
            )
        if not all(change.startswith("training.") for change in different):  # of which it is not made
            self.manifest.forget(self.root / SENSITIVITY)
        if not different or not used:
            return []
        logger.warning("resume.force: going on although values differ: %s", changes)
        self.manifest.forget(self.checkpoints)
        return different

    def read(self, name: str) -> dict[str, Any]:
        """A JSON file of an earlier start; empty if it is not there."""
        file = self.root / name
        return json.loads(file.read_text()) if self.manifest.names(file) and file.is_file() else {}

    @property
    def has_checkpoint(self) -> bool:
        """Whether the packed checkpoint and the allocation, which are written together, are complete."""
        written = (self.packed, self.root / "allocation.json")
        return all(self.manifest.names(path) and path.exists() for path in written)

    def has_block(self, index: int) -> bool:
        """Whether a block is finished."""
        file = self._block_file(index)
        return self.manifest.names(file) and file.is_file()

    def finished_blocks(self, count: int) -> list[bool]:
        """Of each block, whether it is finished and, where the one before it is too, was made from that."""
        records = [
            self._read_record(self._block_file(index)) if self.has_block(index) else None for index in range(count)
        ]
        return [
            record is not None and (before is None or record["made_from"] == before["chain"])
            for before, record in zip([{"chain": ""}, *records], records, strict=False)
        ]

    @staticmethod
    def _read_record(file: Path) -> Record:
        with safe_open(file, framework="pt") as opened:
            record: Record = json.loads(opened.metadata()["record"])
            return record

    def _block_file(self, index: int) -> Path:
        return self.blocks / f"block_{index:03d}.safetensors"

    def save_block(self, index: int, tensors: Mapping[str, Tensor], record: Record) -> None:
        """Keep a finished block; its training checkpoints are no longer needed."""
        data = save(dict(tensors), metadata={"record": json.dumps(record)})
        self.manifest.write(self._block_file(index), data)
        self.manifest.forget(self._checkpoint_folder(index))

    def load_block(self, index: int) -> tuple[dict[str, Tensor], Record]:
        """A finished block and its record.

        Raises:
            InputError: if the file is gone or damaged.
        """
        file = self._block_file(index)
        problem = f"{file} is gone"
        if file.is_file():
            problem = f"{file} is damaged"
            data = file.read_bytes()
            if self.manifest.accepts(file, data):
                return load(data), self._read_record(file)
        raise InputError(f"run_dir: {problem}; start again to have the block made again")

    def block_checkpoints(self, index: int, made_from: str) -> TrainingCheckpoints:
        """Where the training of a block keeps its Lightning checkpoints; `made_from` is the chain of those before."""
        return TrainingCheckpoints(self._checkpoint_folder(index), self.manifest, made_from)

    def last_lineage(self, blocks: int) -> str:
        """`chain` of the last of the finished blocks."""
        return str(self._read_record(self._block_file(blocks - 1))["chain"])

    def end_to_end_checkpoints(self, made_from: str) -> TrainingCheckpoints:
        """Where the training of the whole model keeps its checkpoints."""
        return TrainingCheckpoints(self.checkpoints / END_TO_END, self.manifest, made_from)

    def save_tuned(self, tensors: Mapping[str, Tensor], made_from: str, record: Record) -> None:
        """Keep what the training of the whole model made, and how it went; its checkpoints are no longer needed."""
        self.save_tensors(TUNED, tensors, made_from, record)
        self.manifest.forget(self.checkpoints / END_TO_END)

    def load_tuned(self, made_from: str) -> tuple[dict[str, Tensor], Record] | None:
        """What `save_tuned` kept, if it was made from the same."""
        tensors = self.load_tensors(TUNED, made_from)
        return None if tensors is None else (tensors, self._read_record(self.root / TUNED))

    def save_tensors(
        self, name: str, tensors: Mapping[str, Tensor], made_from: str, record: Record | None = None
    ) -> None:
        """Write a file of tensors, with a hash of what they were made from, and a record of how."""
        metadata = {"made_from": made_from, "record": json.dumps(record or {})}
        self.manifest.write(self.root / name, save(dict(tensors), metadata=metadata))

    def load_tensors(self, name: str, made_from: str) -> dict[str, Tensor] | None:
        """The tensors of a file, or None where there is none made from the same."""
        file = self.root / name
        if not (self.manifest.names(file) and file.is_file()):
            return None
        with safe_open(file, framework="pt") as opened:
            if opened.metadata()["made_from"] != made_from:
                return None
        return load(file.read_bytes())

    def _checkpoint_folder(self, index: int) -> Path:
        return self.checkpoints / f"block_{index:03d}"

    def write(self, name: str, content: str | Mapping[str, Any]) -> None:
        """Write a text file, or a mapping as JSON."""
        self.manifest.write(self.root / name, content if isinstance(content, str) else _json(content))


def lineage(parent_hash: str, tensors: Mapping[str, Tensor]) -> str:
    """Return the hash of a block's tensors and of those of the blocks before it, whose lineage is `parent_hash`.

    A block is made from the outputs of the ones before it: it stays valid as long as they have the same bytes.
    """
    digest = hashlib.sha256(parent_hash.encode())
    digest.update(save({name: tensors[name].cpu().contiguous() for name in sorted(tensors)}))
    return digest.hexdigest()[:16]


def _json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2) + "\n"
