"""Checkpoints of a training: tensors and plain values, and nothing that is run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lightning.fabric import Fabric

from slimplus.training.checkpoints import ATTEMPT, Attempt, TrainingCheckpoints
from slimplus.utils.errors import InputError
from slimplus.utils.manifest import Manifest
from tests.support.fuzzing import Bomb


@pytest.mark.parametrize("damage", ["pickle", "cut", "empty"])
def test_training_checkpoints_hold_tensors_and_plain_values_only(tmp_path: Path, damage: str) -> None:
    checkpoints = TrainingCheckpoints(tmp_path, Manifest(tmp_path), "")
    torch.save({"state_dict": {"weight": torch.ones(100)}}, checkpoints.path)
    assert checkpoints.load_checkpoint(checkpoints.path)["state_dict"]["weight"].sum() == 100
    if damage == "pickle":
        torch.save({"state_dict": {}, "loops": Bomb(tmp_path / "exploded")}, checkpoints.path)
    else:
        checkpoints.path.write_bytes(checkpoints.path.read_bytes()[: 500 if damage == "cut" else 0])
    with pytest.raises(InputError, match=r"last\.ckpt is not a checkpoint of tensors and plain values; delete"):
        checkpoints.load_checkpoint(checkpoints.path)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(("share", "kept"), [(4, True), (8, True), (2, False)])
def test_a_split_that_more_devices_cannot_take_is_given_up(tmp_path: Path, share: int, kept: bool) -> None:
    checkpoints, fabric = (
        TrainingCheckpoints(tmp_path, Manifest(tmp_path), "before"),
        Fabric(accelerator="cpu", devices=1),
    )
    first = Attempt("before", parts=1)
    checkpoints.renew(replace(first, split=4, events=("out of memory",)))
    attempt, found = checkpoints.begin(first, fabric, share)
    assert attempt.split == (4 if kept else 1)
    assert not found


def test_attempts_of_earlier_versions_are_continued(tmp_path: Path) -> None:
    content = '{\n "made_from": "5f3a",\n "parts": 2,\n "split": 4,\n "restarts": 1,\n "events": [\n  "slow"\n ]\n}\n'
    kept = Attempt("5f3a", parts=2, split=4, restarts=1, events=("slow",))
    manifest = Manifest(tmp_path)
    checkpoints, fabric = TrainingCheckpoints(tmp_path, manifest, "5f3a"), Fabric(accelerator="cpu", devices=1)
    manifest.write(tmp_path / ATTEMPT, content)
    assert checkpoints.begin(Attempt("5f3a", parts=2), fabric, share=8) == (kept, False)
    checkpoints.renew(kept)
    assert (tmp_path / ATTEMPT).read_text() == content
    assert checkpoints.begin(Attempt("other", parts=2), fabric, share=8) == (Attempt("other", parts=2), False)
