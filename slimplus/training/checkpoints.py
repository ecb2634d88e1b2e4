"""Lightning checkpoints of the training in progress: whole or absent, and continued only by an equal training."""

from __future__ import annotations

import io
import json
import logging
import pickle
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins import TorchCheckpointIO

from slimplus.utils.errors import InputError
from slimplus.utils.manifest import Manifest

logger = logging.getLogger(__name__)

CHECKPOINT, ATTEMPT = "last.ckpt", "attempt.json"
END_TO_END = "end_to_end"  # name of the training of the whole model, beside those of the blocks


@dataclass(frozen=True)
class Attempt:
    """One attempt at a training; a checkpoint is continued only by an equal attempt.

    Attributes:
        parent_hash: hash of what the training starts from, such as the blocks before this one.
        parts: number of parts in which a device takes its share of a step, from the recipe.
        split: number of smaller parts that each of these parts is divided into, for lack of memory.
        restarts: number of times that the training has started over at a lower learning rate.
        events: sentences on what has happened so far.
    """

    parent_hash: str
    parts: int
    split: int = 1
    restarts: int = 0
    events: tuple[str, ...] = ()

    def to_json(self) -> str:
        """Return the content of attempt.json, in which `parent_hash` is called `made_from`."""
        fields = {
            "made_from": self.parent_hash,
            "parts": self.parts,
            "split": self.split,
            "restarts": self.restarts,
            "events": self.events,
        }
        return json.dumps(fields, indent=1) + "\n"

    @classmethod
    def from_json(cls, content: str) -> Attempt:
        """Return the attempt that `to_json` has written."""
        fields = json.loads(content)
        events = tuple(fields["events"])
        return cls(fields["made_from"], fields["parts"], fields["split"], fields["restarts"], events)


class TrainingCheckpoints(TorchCheckpointIO):
    """Checkpoint and attempt of one training, and the CheckpointIO by which Lightning writes through the manifest.

    Args:
        folder: folder of this training.
        manifest: list of the run's complete files; only the first rank writes.
        parent_hash: hash of what the training starts from.

    Attributes:
        path: file of the checkpoint.
    """

    def __init__(self, folder: Path, manifest: Manifest, parent_hash: str) -> None:
        super().__init__()
        self.folder, self.manifest, self.parent_hash = folder, manifest, parent_hash
        self.path = folder / CHECKPOINT

    def begin(self, first: Attempt, fabric: Fabric, share: int) -> tuple[Attempt, bool]:
        """Find the attempt to go on with; collective.

        A stored attempt with the same parent hash and parts is continued. If its parts do not divide `share`, it was
        made with fewer devices, and the training starts over.

        Args:
            first: the attempt that begins a training.
            fabric: the processes of the job.
            share: number of windows of a step on each device.

        Returns:
            The attempt, and whether it has a checkpoint.
        """
        attempt, found = first, False
        if fabric.is_global_zero:
            stored = self._read()
            same = stored is not None and replace(stored, split=1, restarts=0, events=()) == first
            if stored is not None and same and share % (stored.parts * stored.split) == 0:
                attempt, found = stored, self.manifest.names(self.path)
            else:
                if stored is not None:
                    logger.warning("%s belongs to another training; this training starts over", self.path)
                self.renew(first)
        answer: tuple[Attempt, bool] = fabric.broadcast((attempt, found))
        return answer

    def goes_on(self) -> bool:
        """Return whether a training that was interrupted began from the same values."""
        stored = self._read()
        return stored is not None and stored.parent_hash == self.parent_hash

    def renew(self, attempt: Attempt) -> None:
        """Remove the checkpoint and write attempt.json; only the first rank calls this."""
        self.manifest.forget(self.path)
        self.manifest.write(self.folder / ATTEMPT, attempt.to_json())

    def _read(self) -> Attempt | None:
        """Return the stored attempt, or None if there is none."""
        file = self.folder / ATTEMPT
        if not (self.manifest.names(file) and file.is_file()):
            return None
        return Attempt.from_json(file.read_text())

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint atomically, and list it in the manifest."""
        content = io.BytesIO()
        torch.save(checkpoint, content)
        self.manifest.write(Path(path), content.getvalue())

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint of tensors and plain values, the tensors on the CPU.

        Raises:
            InputError: if the file holds anything else, or is damaged.
        """
        try:
            content: dict[str, Any] = super().load_checkpoint(path, weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise InputError(
                f"run_dir: {path} is not a checkpoint of tensors and plain values; delete {self.folder} to repeat this "
                "training from its start"
            ) from error
        return content
