"""What a run directory holds may be damaged, stale or from elsewhere: it is named, and made again to the same bytes."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from conftest import Arguments
from safetensors.torch import load_file, save_file

from slimplus.blockwise import swap
from slimplus.pipeline import run as pipeline
from slimplus.pipeline.prepare import _pinned_source
from slimplus.recipe.parsing import load_recipe
from slimplus.run_dir import fingerprint
from slimplus.run_dir.directory import SENSITIVITY, RunDirectory
from slimplus.training.supervisor import Supervisor
from slimplus.utils import files
from slimplus.utils.errors import InputError
from slimplus.utils.files import clean, replace_folder, staging_folder
from slimplus.utils.manifest import Manifest

PACKED = "packed/model.safetensors"


def run(arguments: list[str]) -> None:
    pipeline.run(load_recipe(arguments))


def metrics(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text())


@pytest.fixture(scope="module")
def finished(arguments: Arguments, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    run(arguments(folder))
    return folder


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


# The manifest


def test_every_complete_file_is_named(finished: Path) -> None:
    manifest = Manifest(finished)
    named = {str(path.relative_to(finished)) for path in manifest.named()}
    found = {str(p.relative_to(finished)) for p in finished.rglob("*") if p.is_file() and "logs" not in p.parts}
    assert named == found - {"manifest.json", ".lock"}
    assert all(manifest.problem(path) is None for path in manifest.named())


@pytest.mark.parametrize("moment", range(4))
@pytest.mark.parametrize("folder", [False, True])
def test_a_kill_at_any_moment_leaves_the_old_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int, folder: bool
) -> None:
    """Every step that changes a name is a rename: stop before each of them in turn."""
    manifest, path = Manifest(tmp_path), tmp_path / "thing"

    def put(content: str) -> None:
        if folder:
            staging = staging_folder(path)
            staging.mkdir(exist_ok=True)
            (staging / "file").write_text(content)
            manifest.replace_folder(path)
        else:
            manifest.write(path, content)

    put("old")
    renames = 0

    class Killed(RuntimeError):
        pass

    def counted(name: str) -> None:
        original = getattr(Path, name)

        def rename(self: Path, target: Path) -> Path:
            nonlocal renames
            if renames == moment:
                raise Killed
            renames += 1
            return original(self, target)

        monkeypatch.setattr(Path, name, rename)

    counted("rename")
    counted("replace")
    try:
        put("new")
    except Killed:
        pass
    else:
        assert moment >= 3
    monkeypatch.undo()
    clean(tmp_path)
    assert Manifest(tmp_path).problem(path) is None
    assert (path / "file" if folder else path).read_text() in ("old", "new")
    assert not list(tmp_path.rglob(".*"))


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


def test_a_checkpoint_to_ship_is_not_lost_to_another_recipe(copy: Path, arguments: Arguments) -> None:
    """Though its blocks, as large as itself, have been removed."""
    shutil.rmtree(copy / "blocks")
    with pytest.raises(InputError, match=r"made with other values: training\.epochs 2 -> 1"):
        run(arguments(copy, "training.epochs=1"))
    assert (copy / PACKED).is_file()


def test_bytes_are_on_the_disk_before_a_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(files.os, "fsync", lambda descriptor: calls.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    (staging := staging_folder(tmp_path / "thing")).mkdir()
    (staging / "file").write_text("x")
    replace_folder(tmp_path / "thing")
    assert [Path(call).name for call in calls] == ["file", staging.name, tmp_path.name]


# Damage


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:1000])


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
    assert any(str(copy / name) in event for event in metrics(copy)["events"])
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
    assert "block 1 was made from other blocks than those before it now; it is made again" in caplog.text
    assert (copy / PACKED).read_bytes() != (finished / PACKED).read_bytes()


def test_two_jobs_in_one_folder_are_kept_apart(copy: Path, arguments: Arguments) -> None:
    with (copy / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InputError, match=f"run_dir: another job is at work in {copy}; wait for it, or end it"):
            run(arguments(copy))
    run(arguments(copy))


# Changes


def test_a_changed_recipe_goes_on_with_force(
    copy: Path, arguments: Arguments, caplog: pytest.LogCaptureFixture
) -> None:
    (copy / "blocks/block_001.safetensors").unlink()
    changed = arguments(copy, "training.epochs=1", "resume.force=true")
    run(changed)
    assert "resume.force: training.epochs 2 -> 1" in metrics(copy)["events"]
    before = len(metrics(copy)["events"])
    run(changed[:-1])  # once forced, this is what the run is made with
    assert len(metrics(copy)["events"]) == before


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("quantization.bits=2", "training.epochs=1"),  # fewer than have been trained
        ("quantization.bits=2", "training.optimizer=sign_sgd"),  # which has another state
        ("quantization.bits=3", "quantization.bits=2"),  # at which no loss is as small as the one that was reached
    ],
)
def test_what_is_in_training_begins_anew_with_force(
    tmp_path: Path, arguments: Arguments, monkeypatch: pytest.MonkeyPatch, before: str, after: str
) -> None:
    begin = Supervisor.on_train_epoch_start

    def interrupted(self: Supervisor, trainer: Any, module: Any) -> None:
        if trainer.current_epoch == 2:
            raise KeyboardInterrupt
        begin(self, trainer, module)

    with monkeypatch.context() as patched:
        patched.setattr(Supervisor, "on_train_epoch_start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(arguments(tmp_path / "forced", "training.epochs=3", before))
    assert (tmp_path / "forced/checkpoints/block_000/last.ckpt").is_file()
    run(arguments(tmp_path / "forced", "training.epochs=3", after, "resume.force=true"))
    run(arguments(tmp_path / "fresh", "training.epochs=3", after))
    assert (tmp_path / "forced" / PACKED).read_bytes() == (tmp_path / "fresh" / PACKED).read_bytes()


@pytest.mark.parametrize("key", ["quantization.group_size=32", "quantization.scale_bits=8"])
def test_blocks_of_two_formats_are_not_joined(copy: Path, arguments: Arguments, key: str) -> None:
    (copy / "blocks/block_001.safetensors").unlink()
    with pytest.raises(
        InputError, match=rf"run_dir: the blocks of .* another format .*: {key.partition('=')[0]} \d+ ->"
    ):
        run(arguments(copy, key, "resume.force=true"))


@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink])
def test_without_a_fingerprint_blocks_are_not_gone_on_from(
    copy: Path, arguments: Arguments, damage: Callable[[Path], None]
) -> None:
    damage(copy / "fingerprint.json")
    with pytest.raises(InputError, match=r"fingerprint.json .*, and tells what the blocks were made from; restore it"):
        run(arguments(copy))


def test_a_deleted_allocation_is_written_again(copy: Path, arguments: Arguments) -> None:
    before = (copy / "allocation.json").read_bytes()
    (copy / "allocation.json").unlink()
    run(arguments(copy))
    assert (copy / "allocation.json").read_bytes() == before


def test_an_interrupted_stage_counts_its_seconds(
    copy: Path, monkeypatch: pytest.MonkeyPatch, arguments: Arguments
) -> None:
    """One that is killed gets to write nothing at its end: those of finished blocks are on disk by then."""

    def seconds() -> float:
        return float(metrics(copy)["seconds"]["blocks"])

    def packed_block(*given: Any) -> Any:
        on_disk.append(seconds())
        if len(on_disk) == 2:
            raise KeyboardInterrupt
        return swap.packed_block(*given)

    on_disk, before = list[float](), seconds()
    for index in range(2):
        (copy / f"blocks/block_{index:03d}.safetensors").unlink()
    with monkeypatch.context() as patched:
        patched.setattr("slimplus.pipeline.stages.blocks.packed_block", packed_block)
        with pytest.raises(KeyboardInterrupt):
            run(arguments(copy))
    first, second = on_disk
    interrupted = seconds()
    assert before == first < second < interrupted
    run(arguments(copy))
    assert seconds() > interrupted


def test_a_device_that_is_too_small_is_said_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: Arguments
) -> None:
    full = Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."))
    monkeypatch.setattr("slimplus.pipeline.stages.evaluate.perplexity", full)
    with pytest.raises(InputError, match=r"^full_precision: out of device memory \(CUDA out of memory.*is kept$"):
        run(arguments(tmp_path))


@pytest.mark.parametrize(("key", "stays"), [("quantization.widths", False), ("training.epochs", True), (None, True)])
def test_a_sensitivity_of_other_values_is_measured_again(tmp_path: Path, key: str | None, stays: bool) -> None:
    """Before the first block there is nothing else to go on from, and a changed recipe is not refused."""
    folder = RunDirectory(tmp_path)
    folder.open()
    made_from = {"quantization.widths": [1, 2], "training.epochs": 8, "training.width_rates": {1: 0.5}}
    folder.write("fingerprint.json", made_from)
    folder.save_tensors(SENSITIVITY, {"channels": torch.ones(2)}, "")
    if key is None:
        folder.save_block(0, {}, {})  # now a difference would be refused
    assert folder.check_fingerprint(made_from | ({key: 3} if key else {}), force=False) == []
    assert (folder.load_tensors(SENSITIVITY, "") is not None) == stays


def test_other_weights_under_the_same_name_are_refused(copy: Path, arguments: Arguments, tmp_path: Path) -> None:
    recipe = load_recipe(arguments(copy))
    model = Path(shutil.copytree(recipe.model.path, tmp_path / "model"))
    flip(model / "model.safetensors")
    with pytest.raises(InputError, match=r"made with other values: model\.path \w{16} -> \w{16}; restore"):
        run(arguments(copy, model=model))
    shutil.copy(Path(recipe.model.path) / "model.safetensors", model)
    run(arguments(copy, model=model))  # another folder with the same weights is the same model


def test_an_upgraded_library_is_a_warning(
    copy: Path, arguments: Arguments, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fingerprint, "version", lambda name: "99" if name == "torch" else "1")
    monkeypatch.setattr("transformers.configuration_utils.__version__", "99")  # which it writes into configurations
    run(arguments(copy))
    assert "torch 2" in caplog.text
    assert any("libraries changed" in event and "-> 99" in event for event in metrics(copy)["events"])


def test_a_run_stays_at_the_commit_it_began_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slimplus.models.loading.ModelSource.pinned", lambda source: source)
    folder = RunDirectory(tmp_path)
    folder.open()
    recipe = ("recipe=llama7b_2bit", "model.path=org/name")
    assert _pinned_source(load_recipe(recipe), folder).revision is None
    folder.write("fingerprint.json", {"model.path": "org/name@a1"})
    assert _pinned_source(load_recipe(recipe), folder).revision == "a1"
    assert _pinned_source(load_recipe([*recipe, "model.revision=v2"]), folder).revision == "v2"
    assert _pinned_source(load_recipe([recipe[0], "model.path=org/other"]), folder).revision is None


def test_large_weights_are_sampled_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from slimplus.models.loading import ModelSource

    monkeypatch.setattr(fingerprint, "WHOLE", 1000)
    monkeypatch.setattr(fingerprint, "SAMPLE", 10)
    monkeypatch.setattr(fingerprint, "SAMPLES", 5)
    file = tmp_path / "model.safetensors"
    file.write_bytes(bytes(5000))
    digests = {fingerprint.weights_digest(ModelSource(str(tmp_path)))}
    for position in (0, 1250, 4999):
        content = bytearray(5000)
        content[position] = 1
        file.write_bytes(content)
        digests.add(fingerprint.weights_digest(ModelSource(str(tmp_path))))
    assert len(digests) == 4


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
    assert metrics(copy)["events"] == []
