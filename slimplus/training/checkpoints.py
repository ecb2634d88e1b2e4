"""Lightning's checkpoints of the block in training: whole or absent, and bound to what they continue."""

from __future__ import annotations

import io
import json
import logging
import pickle
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins import TorchCheckpointIO

from slimplus.utils.errors import InputError
from slimplus.utils.manifest import Manifest

logger = logging.getLogger(__name__)

CHECKPOINT, ATTEMPT = "last.ckpt", "attempt.json"
END_TO_END = "end_to_end"  # the training of the whole model, beside those of the blocks


@dataclass(frozen=True)
class Attempt:
    """What a block is trained with; a checkpoint continues only an equal attempt.

    Attributes:
        made_from: hash of the blocks before it.
        parts: in which a device takes its share of a step, as the recipe has it.
        split: in how many each of these is divided, for lack of memory.
        restarts: how often the training has begun anew at a lower learning rate.
        events: what happened, in sentences.
    """

    made_from: str
    parts: int
    split: int = 1
    restarts: int = 0
    events: tuple[str, ...] = ()


class TrainingCheckpoints(TorchCheckpointIO):
    """Where one block keeps its checkpoint and its attempt. As Lightning's CheckpointIO it writes through the manifest.

    Args:
        folder: of this block.
        manifest: names them; only the first rank writes.
        made_from: hash of the blocks before this one.
    """

    def __init__(self, folder: Path, manifest: Manifest, made_from: str) -> None:
        super().__init__()
        self.folder, self.manifest, self.made_from = folder, manifest, made_from
        self.path = folder / CHECKPOINT

    def begin(self, first: Attempt, fabric: Fabric, share: int) -> tuple[Attempt, bool]:
        """The attempt to go on with, which is `first` unless a later one is kept, and whether it has a checkpoint.

        A kept one whose parts do not divide `share`, a device's windows of a step, was made with fewer devices.
        """
        attempt, found = first, False
        if fabric.is_global_zero:
            kept = self._read()
            same = kept is not None and replace(kept, split=1, restarts=0, events=()) == first
            if kept is not None and same and share % (kept.parts * kept.split) == 0:
                attempt, found = kept, self.manifest.names(self.path)
            else:
                if kept is not None:
                    logger.warning("%s does not continue this training; it begins anew", self.path)
                self.renew(first)
        answer: tuple[Attempt, bool] = fabric.broadcast((attempt, found))
        return answer

    def renew(self, attempt: Attempt) -> None:
        """Drop the checkpoint and keep `attempt`, from the first rank."""
        self.manifest.forget(self.path)
        self.manifest.write(self.folder / ATTEMPT, json.dumps(asdict(attempt), indent=1) + "\n")

    def _read(self) -> Attempt | None:
        file = self.folder / ATTEMPT
        if not (self.manifest.names(file) and file.is_file()):
            return None
        content = json.loads(file.read_text())
        return Attempt(**content | {"events": tuple(content["events"])})

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        content = io.BytesIO()
        torch.save(checkpoint, content)
        self.manifest.write(Path(path), content.getvalue())

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Tensors and plain values, and nothing else; tensors lie on the CPU.

        Raises:
            InputError: if there is anything else in the file, or it is damaged.
        """
        try:
            content: dict[str, Any] = super().load_checkpoint(path, weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise InputError(
                f"run_dir: {path} is no checkpoint of tensors and plain values; delete {self.folder} to have the block "
                "trained anew"
            ) from error
        return content
