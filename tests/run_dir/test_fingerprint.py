"""What a run was made from: a change is refused, or taken with resume.force."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from slimplus.models.loading import ModelSource
from slimplus.recipe.parsing import load_recipe
from slimplus.run_dir import fingerprint
from slimplus.run_dir.directory import SENSITIVITY, RunDirectory
from slimplus.training.supervisor import Supervisor
from slimplus.utils.errors import InputError
from tests.support.damage import flip, truncate
from tests.support.models import ModelMaker
from tests.support.recipes import QAT, Arguments
from tests.support.runs import read_metrics, run

PACKED = "packed/model.safetensors"


def test_a_checkpoint_to_ship_is_not_lost_to_another_recipe(copy: Path, arguments: Arguments) -> None:
    """Though its blocks, as large as itself, have been removed."""
    shutil.rmtree(copy / "blocks")
    with pytest.raises(InputError, match=r"made with other values: training\.epochs 2 -> 1"):
        run(arguments(copy, "training.epochs=1"))
    assert (copy / PACKED).is_file()


def test_a_changed_recipe_goes_on_with_force(
    copy: Path, arguments: Arguments, caplog: pytest.LogCaptureFixture
) -> None:
    (copy / "blocks/block_001.safetensors").unlink()
    changed = arguments(copy, "training.epochs=1", "resume.force=true")
    run(changed)
    assert "resume.force: training.epochs 2 -> 1" in read_metrics(copy)["events"]
    before = len(read_metrics(copy)["events"])
    run(changed[:-1])  # once forced, this is what the run is made with
    assert len(read_metrics(copy)["events"]) == before


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
    with pytest.raises(
        InputError, match=r"fingerprint.json .*, so what the blocks were made from is unknown; restore it"
    ):
        run(arguments(copy))


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
    assert any("libraries changed" in event and "-> 99" in event for event in read_metrics(copy)["events"])


def test_a_file_that_is_not_read_changes_no_fingerprint(make_model: ModelMaker, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(make_model("llama"), tmp_path / "model"))
    source = ModelSource(str(folder))
    before = fingerprint.weights_digest(source)
    for name in ("training_args.bin", "consolidated.safetensors", "m.gguf", "pytorch_model.bin"):
        (folder / name).write_bytes(b"GGUF")
    assert fingerprint.weights_digest(source) == before
    assert fingerprint.weights_digest(replace(source, gguf_file="m.gguf")) != before


def test_every_shard_counts(make_model: ModelMaker, tmp_path: Path) -> None:
    tensors = load_file(make_model("llama") / "model.safetensors")
    digests = set()
    for changed in (None, *sorted(tensors)[:2]):
        places = {name: f"{number % 2}.safetensors" for number, name in enumerate(sorted(tensors))}
        for file in set(places.values()):
            held = {name: tensors[name] + (name == changed) for name in tensors if places[name] == file}
            save_file(held, tmp_path / file)
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
        digests.add(fingerprint.weights_digest(ModelSource(str(tmp_path))))
    assert len(digests) == 3


def test_large_weights_are_sampled_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "LARGEST_WHOLE", 1000)
    monkeypatch.setattr(fingerprint, "SAMPLE_BYTES", 10)
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


def test_a_run_of_a_version_without_the_later_keys_goes_on(copy: Path, arguments: Arguments, text_file: Path) -> None:
    """Keys that came later are in no fingerprint at their defaults, and the text counts by its content."""
    before = json.loads((copy / "fingerprint.json").read_text())
    assert not set(before) & set(fingerprint.LATER_KEYS)
    assert before["data.calibration.path"] == hashlib.sha256(text_file.read_bytes()).hexdigest()[:16]
    for key, value in (("data.bos", "never"), ("data.separator", "eos"), ("data.calibration.column", "body")):
        with pytest.raises(InputError, match=rf"made with other values: .*{key} None -> {value}"):
            run(arguments(copy, f"{key}={value}"))


def test_a_default_that_has_changed_is_told_to_earlier_runs(arguments: Arguments, tmp_path: Path) -> None:
    qat = (*QAT, "training.epochs=32")  # 256 steps, from which on they start at the nearest levels
    summary = run(arguments(tmp_path, *qat, "training.start=calibrated"))
    folder = RunDirectory(tmp_path)
    folder.open()
    file = tmp_path / "fingerprint.json"
    before = json.loads(file.read_text())
    assert before.pop("training.start") == "calibrated"
    folder.manifest.write(file, json.dumps(before).encode())  # as earlier versions wrote it
    with pytest.raises(InputError, match=r"made with other values: training\.start calibrated -> nearest;"):
        run(arguments(tmp_path, *qat))
    assert run(arguments(tmp_path, *qat, "training.start=calibrated")) == summary


def test_a_mix_is_part_of_the_fingerprint(copy: Path, arguments: Arguments, text_file: Path, tmp_path: Path) -> None:
    twice = f"data.calibration=[{{path: {text_file}, weight: 3}}, {{path: {text_file}}}]"
    with pytest.raises(InputError, match=r"made with other values: data\.calibration\.path \w{16} -> \w{16};"):
        run(arguments(copy, twice))
    folder = tmp_path / "mix"
    summary = run(arguments(folder, twice, "data.bos=window", "data.samples=8"))
    tokens = load_file(folder / "tokens/calibration.safetensors")["tokens"]
    assert tokens.shape == (8, 32)
    assert (tokens[:, 0] == 0).all()
    assert run([f"recipe={folder / 'recipe.yaml'}"]) == summary
