"""The run directory: what one job has written, and what another start of it may reuse.

recipe.yaml            the resolved recipe
inputs.json            fingerprints of the texts, tokenizer and settings that finished blocks depend on
tokens/*.safetensors   calibration and evaluation windows
blocks/*.safetensors   one packed block each, with its record
checkpoints/           Lightning checkpoints of the block in training
logs/                  TensorBoard and CSV
allocation.json        bits per group per linear layer
metrics.json           figures
packed/                the checkpoint to ship
summary.txt
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from slimplus.errors import InputError
from slimplus.files import TEMPORARY_SUFFIX, write_atomic

Record = dict[str, Any]


class RunDirectory:
    """Reads and writes one run directory.

    Args:
        root: the folder; created if absent.
        resume: `never` refuses a folder that already holds something.

    Raises:
        InputError: for a folder that is not empty, with `never`.
    """

    def __init__(self, root: str | Path, resume: str) -> None:
        self.root = Path(root).expanduser()
        if resume == "never" and self.root.is_dir() and any(self.root.iterdir()):
            raise InputError(
                f"run_dir: {self.root} is not empty; give another run_dir, or resume=auto to go on from what it holds"
            )
        self.packed, self.checkpoints, self.logs = (self.root / name for name in ("packed", "checkpoints", "logs"))
        self.tokens, self.blocks = self.root / "tokens", self.root / "blocks"

    def create(self) -> None:
        """Make the folder and clear what a killed run left half-written."""
        self.root.mkdir(parents=True, exist_ok=True)
        for leftover in self.root.rglob(f".*{TEMPORARY_SUFFIX}"):
            leftover.unlink()

    def check_inputs(self, inputs: Mapping[str, Any]) -> None:
        """Refuse to go on from blocks that were made from something else.

        Raises:
            InputError: naming every input that differs.
        """
        file = self.root / "inputs.json"
        if file.is_file() and any(self.blocks.glob("*.safetensors")):
            before = json.loads(file.read_text())
            different = sorted(key for key in before.keys() | inputs.keys() if before.get(key) != inputs.get(key))
            if different:
                raise InputError(
                    f"run_dir: the blocks in {self.root} were made with other values of {', '.join(different)}; "
                    "restore them, or give another run_dir"
                )

    def read_metrics(self) -> dict[str, Any]:
        """The figures of an earlier start, or none."""
        file = self.root / "metrics.json"
        return json.loads(file.read_text()) if file.is_file() else {}

    def has_block(self, index: int) -> bool:
        """Whether a block is finished."""
        return self._block_file(index).is_file()

    def _block_file(self, index: int) -> Path:
        return self.blocks / f"block_{index:03d}.safetensors"

    def save_block(self, index: int, tensors: Mapping[str, Tensor], record: Record) -> None:
        """Keep a finished block; its training checkpoints are no longer needed."""
        write_atomic(self._block_file(index), save(dict(tensors), metadata={"record": json.dumps(record)}))
        shutil.rmtree(self.checkpoints / f"block_{index:03d}", ignore_errors=True)

    def load_block(self, index: int) -> tuple[dict[str, Tensor], Record] | None:
        """A finished block and its record, or None if it is not there.

        Raises:
            InputError: if the file is damaged.
        """
        file = self._block_file(index)
        if not file.is_file():
            return None
        try:
            with safe_open(file, framework="pt") as stored:
                record = json.loads((stored.metadata() or {})["record"])
                return {name: stored.get_tensor(name) for name in stored.keys()}, record  # noqa: SIM118
        except (SafetensorError, KeyError, json.JSONDecodeError) as error:
            raise InputError(f"run_dir: {file} is damaged ({error}); delete it to have the block made again") from error

    def require_block(self, index: int) -> tuple[dict[str, Tensor], Record]:
        """A finished block and its record.

        Raises:
            InputError: if the file is damaged or gone.
        """
        block = self.load_block(index)
        if block is None:
            raise InputError(f"run_dir: {self._block_file(index)} is gone; start again to have the block made again")
        return block

    def checkpoint_folder(self, index: int) -> Path:
        """Where the training of a block keeps its Lightning checkpoints."""
        return self.checkpoints / f"block_{index:03d}"

    def write(self, name: str, content: str | Mapping[str, Any]) -> None:
        """Write a text file, or a mapping as JSON."""
        write_atomic(self.root / name, content if isinstance(content, str) else _json(content))


def _json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2) + "\n"


def write_allocation(run: RunDirectory, bits: Mapping[str, list[int]], target_bits: int, group_size: int) -> None:
    """Write `allocation.json`: bits per group, in column order, of each linear layer."""
    lines = ",\n".join(f"    {json.dumps(name)}: {json.dumps(widths)}" for name, widths in bits.items())
    run.write(
        "allocation.json",
        f'{{\n  "target_bits": {target_bits},\n  "group_size": {group_size},\n  "bits": {{\n{lines}\n  }}\n}}\n',
    )


def read_allocation(path: str | Path, group_size: int) -> dict[str, list[int]]:
    """Bits per group of each linear layer from an `allocation.json`.

    Raises:
        InputError: if the file is no allocation, or one for another group size.
    """
    key = "quantization.allocation"
    try:
        content = json.loads(Path(path).expanduser().read_text())
        bits = {str(name): [int(width) for width in widths] for name, widths in content["bits"].items()}
        found_group_size = content["group_size"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{key}: {path} is not an allocation ({error!r}); give the allocation.json of a run"
        ) from error
    if found_group_size != group_size:
        raise InputError(
            f"{key}: {path} is for group_size {found_group_size}, not {group_size}; "
            f"set quantization.group_size={found_group_size}"
        )
    if not all(1 <= width <= 8 for widths in bits.values() for width in widths):
        raise InputError(f"{key}: {path} holds widths outside 1 to 8; give the allocation.json of a run")
    return bits
