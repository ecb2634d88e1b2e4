"""What a run directory holds may be damaged, stale or from elsewhere: it is named, and made again to the same bytes."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from slimplus.utils.errors import InputError
from slimplus.utils.manifest import Manifest
from tests.support.damage import flip, truncate
from tests.support.recipes import Arguments
from tests.support.runs import read_metrics, run

PACKED = "packed/model.safetensors"


def test_a_damaged_manifest_is_refused(copy: Path, arguments: Arguments) -> None:
    (copy / "manifest.json").write_text("{")
    with pytest.raises(InputError, match=r"manifest\.json is damaged .*; restore it, or give another run_dir"):
        run(arguments(copy))


def test_blocks_without_a_manifest_are_left_alone(copy: Path, arguments: Arguments) -> None:
    (copy / "manifest.json").unlink()
    with pytest.raises(
        InputError, match=r"holds blocks, packed, tokens but no manifest\.json to check them by; restore"
    ):
        run(arguments(copy))
    assert (copy / "blocks/block_000.safetensors").is_file()


@pytest.mark.parametrize("folder", ["tokens", "checkpoints", "packed"])
def test_files_of_somebody_else_are_left_alone(tmp_path: Path, arguments: Arguments, folder: str) -> None:
    theirs = tmp_path / folder / "theirs.safetensors"
    theirs.parent.mkdir()
    theirs.write_text("of another program")
    with pytest.raises(InputError, match=rf"holds {folder} but no manifest\.json"):
        run(arguments(tmp_path))
    assert theirs.is_file()


@pytest.mark.parametrize(
    ("name", "damage", "problem"),
    [
        ("blocks/block_000.safetensors", flip, "differs from its checksum"),
        ("blocks/block_001.safetensors", truncate, "has 1,000 bytes instead of"),
        ("tokens/calibration.safetensors", flip, "differs from its checksum"),
        ("packed/model.safetensors", flip, "differs from its checksum"),
        ("packed/config.json", Path.unlink, "is missing"),
        ("metrics.json", truncate, "has 1,000 bytes instead of"),
        ("allocation.json", flip, "differs from its checksum"),
    ],
)
def test_a_damaged_file_is_named_and_made_again(
    finished: Path,
    copy: Path,
    arguments: Arguments,
    caplog: pytest.LogCaptureFixture,
    name: str,
    damage: Any,
    problem: str,
) -> None:
    kept = {path: path.stat().st_ino for path in (copy / "blocks").iterdir() if path != copy / name}
    damage(copy / name)
    run(arguments(copy))
    assert f"{copy / name} {problem}" in caplog.text
    assert any(str(copy / name) in event for event in read_metrics(copy)["events"])
    assert Manifest(copy).problem(copy / name) is None
    assert (copy / PACKED).read_bytes() == (finished / PACKED).read_bytes()
    assert (copy / "allocation.json").read_bytes() == (finished / "allocation.json").read_bytes()
    assert {path: path.stat().st_ino for path in kept} == kept, "a sound block was made again"


def test_a_foreign_block_is_named_and_what_was_made_from_others_is_made_again(
    finished: Path, copy: Path, arguments: Arguments, caplog: pytest.LogCaptureFixture
) -> None:
    foreign = copy / "blocks/block_000.safetensors"
    save_file({"x": torch.zeros(1)}, copy / "blocks/block_007.safetensors")
    manifest = Manifest(copy)
    other = {name: tensor.clone() for name, tensor in load_file(foreign).items()}
    other["mlp.up_proj.scales"] += 1
    save_file(other, foreign, metadata={"record": json.dumps({"made_from": "", "chain": "another", "events": []})})
    manifest.add(foreign)  # as if it had been made by another version of a library
    run(arguments(copy))
    assert "block_007.safetensors is incomplete or from elsewhere" in caplog.text
    assert not (copy / "blocks/block_007.safetensors").exists()
    assert "block 1 was made from other blocks than those that precede it; it is made again" in caplog.text
    assert (copy / PACKED).read_bytes() != (finished / PACKED).read_bytes()


def test_a_deleted_allocation_is_written_again(copy: Path, arguments: Arguments) -> None:
    before = (copy / "allocation.json").read_bytes()
    (copy / "allocation.json").unlink()
    run(arguments(copy))
    assert (copy / "allocation.json").read_bytes() == before


def test_resume_from_what_is_no_checkpoint_of_this_run(copy: Path, arguments: Arguments, tmp_path: Path) -> None:
    foreign = tmp_path / "last.ckpt"
    foreign.write_bytes(b"x")
    message = rf"resume: {foreign} is not the checkpoint of the training in progress \({copy} holds none\); give that"
    with pytest.raises(InputError, match=message):
        run(arguments(copy, f"resume={foreign}"))


def test_the_log_says_what_was_found(copy: Path, arguments: Arguments, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "slimplus")
    run(arguments(copy))
    assert caplog.text.count("skipped") == 4
    assert read_metrics(copy)["events"] == []
