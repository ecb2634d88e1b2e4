"""Beyond SliM-LLM+ on tiny models: trained rounding and weights, allocation by sensitivity, training end to end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import pytest
import torch
from conftest import Arguments, ModelMaker
from safetensors.torch import load_file
from torch.utils.checkpoint import checkpoint

import slimplus
from slimplus.distributed.preemption import Preemption
from slimplus.nn import PackedLinear
from slimplus.pipeline import run as pipeline
from slimplus.pipeline.prepare import prepare, start
from slimplus.pipeline.stages import end_to_end, sensitivity
from slimplus.recipe.parsing import load_recipe
from slimplus.utils.errors import InputError

QAT = ("quantization.method=qat", "training.epochs=12")
SLOW = ("training.learning_rate=1e-3", "training.element_learning_rate=1e-5")  # random weights leave little to learn
TUNED = (*QAT, "end_to_end.epochs=3", "end_to_end.batch_size=2")


def _run(arguments: list[str]) -> dict[str, Any]:
    recipe = load_recipe(arguments)
    assert pipeline.run(recipe) is not None
    metrics: dict[str, Any] = json.loads((Path(recipe.run_dir) / "metrics.json").read_text())
    return metrics


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "packed" / "model.safetensors")


@pytest.fixture(scope="module")
def tuned(arguments: Arguments, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a finished run with every stage; tests copy it before they change anything."""
    folder = tmp_path_factory.mktemp("tuned")
    _run(arguments(folder, *TUNED, "quantization.allocation=model"))
    return folder


@pytest.mark.parametrize("parametrization", ["rounding", "weights"])
def test_blocks_get_better_by_training(arguments: Arguments, tmp_path: Path, parametrization: str) -> None:
    rates = SLOW if parametrization == "weights" else ()
    metrics = _run(arguments(tmp_path, *QAT, f"training.parametrization={parametrization}", *rates))
    for block in metrics["blocks"]:
        assert block["loss"] < block["calibrated_loss"]
    assert metrics["average_bits"] == 2.0


@pytest.mark.parametrize("allocation", ["uniform", "block", "model"])
def test_every_allocation_meets_the_average(arguments: Arguments, tmp_path: Path, allocation: str) -> None:
    metrics = _run(arguments(tmp_path, "quantization.method=slimllm", f"quantization.allocation={allocation}"))
    assert metrics["average_bits"] == 2.0
    widths = json.loads((tmp_path / "allocation.json").read_text())["bits"]
    mixed = {width for layer in widths.values() for width in layer} != {2}
    assert mixed == (allocation != "uniform")


def test_the_models_allocation_differs_between_blocks(tuned: Path) -> None:
    widths = json.loads((tuned / "allocation.json").read_text())["bits"]
    per_block = [[sum(w) for name, w in widths.items() if f"layers.{index}." in name] for index in (0, 1)]
    assert per_block[0] != per_block[1]


def test_a_budget_in_bytes_is_kept(arguments: Arguments, tmp_path: Path) -> None:
    keys = ("quantization.method=rtn", "quantization.allocation=model")
    metrics = _run(arguments(tmp_path, *keys, "quantization.size_bytes=44000"))
    packed = [t.nbytes for name, t in _weights(tmp_path).items() if "proj" in name]
    assert 0.97 * 44000 < sum(packed) <= 44000
    assert metrics["allocation_gap"] >= 0
    with pytest.raises(InputError, match="quantization.size_bytes: .* the budget is 4,400 bytes; give more"):
        _run(arguments(tmp_path / "small", *keys, "quantization.size_bytes=4400"))


def test_sensitivity_falls_with_the_width_in_every_layer(arguments: Arguments, tmp_path: Path) -> None:
    recipe = load_recipe(
        arguments(tmp_path, "quantization.allocation=model", "quantization.widths=[1,2,6]", "data.samples=64")
    )
    preemption = Preemption()
    job = prepare(recipe, start(recipe), preemption)
    tables = sensitivity._measure(job)
    assert tables["channels"].shape == (2, 64)
    layers = {name: table for name, table in tables.items() if name != "channels"}
    assert len(layers) == 14
    for table in layers.values():
        assert (table[0] > table[2]).all()
        assert (table >= 0).all()


def test_end_to_end_helps_and_is_what_is_shipped(tuned: Path, arguments: Arguments, tmp_path: Path) -> None:
    metrics = json.loads((tuned / "metrics.json").read_text())
    assert metrics["end_to_end"]["loss"] < metrics["end_to_end"]["before"]
    shutil.copytree(tuned, tmp_path, dirs_exist_ok=True)
    without = _run(arguments(tmp_path, *QAT, "quantization.allocation=model"))  # the same blocks, exported as they are
    assert metrics["perplexity"]["quantized"] != without["perplexity"]["quantized"]
    before, after = _weights(tmp_path), _weights(tuned)
    changed = {name.rpartition(".")[2] for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert "scales" in changed
    assert "weight" in changed  # of norms
    assert not any(name.startswith("qplane") for name in changed)  # the integers are frozen
    again = _run(arguments(tmp_path, *TUNED, "quantization.allocation=model"))  # with the tensors that it had kept
    assert again["perplexity"]["quantized"] == metrics["perplexity"]["quantized"]
    assert all(torch.equal(tensor, after[name]) for name, tensor in _weights(tmp_path).items())


def test_the_checkpoint_holds_the_trained_model_bit_for_bit(tuned: Path) -> None:
    kept = load_file(tuned / "end_to_end.safetensors")
    shipped = _weights(tuned)
    assert all(torch.equal(tensor, shipped[name]) for name, tensor in kept.items())
    model = slimplus.load(tuned / "packed", dtype=torch.float32)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    assert {f"{name}.scales" for name in layers} <= kept.keys()


def test_8_bit_scales_are_trained_and_shipped(tuned: Path, arguments: Arguments, tmp_path: Path) -> None:
    """Of as many bytes they leave more for integers; what was trained loads back bit for bit, embedding included."""
    size = sum(tensor.nbytes for name, tensor in _weights(tuned).items() if "proj" in name)
    keys = ("quantization.scale_bits=8", "quantization.embedding_bits=8", f"quantization.size_bytes={size}")
    metrics = _run(arguments(tmp_path, *TUNED, "quantization.allocation=model", *keys))
    assert metrics["average_bits"] > 2.2
    shipped = _weights(tmp_path)
    assert sum(tensor.nbytes for name, tensor in shipped.items() if "proj" in name) <= size
    scales = {name: tensor for name, tensor in shipped.items() if name.endswith(".scales")}
    assert len(scales) == 2 * 7 + 1
    assert {tensor.dtype for tensor in scales.values()} == {torch.uint8}
    kept = load_file(tmp_path / "end_to_end.safetensors")
    assert all(torch.equal(tensor, shipped[name]) for name, tensor in kept.items())
    model = slimplus.load(tmp_path / "packed", dtype=torch.float32)
    again = {name: tensor for name, tensor in model.state_dict().items() if name.endswith(".scales")}
    assert all(torch.equal(tensor, again[name]) for name, tensor in scales.items())


def test_finished_stages_are_skipped(
    tuned: Path, arguments: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tuned, tmp_path, dirs_exist_ok=True)
    for module, stage in ((sensitivity, "_measure"), (end_to_end, "_train")):
        monkeypatch.setattr(module, stage, Mock(side_effect=AssertionError(f"{stage} again")))
    _run(arguments(tmp_path, *TUNED, "quantization.allocation=model"))


def test_a_changed_training_of_the_model_keeps_the_blocks(tuned: Path, arguments: Arguments, tmp_path: Path) -> None:
    shutil.copytree(tuned, tmp_path, dirs_exist_ok=True)
    blocks = {file: file.read_bytes() for file in (tmp_path / "blocks").iterdir()}
    keys = ("end_to_end.zero_points=false", "end_to_end.norm_learning_rate=0", "end_to_end.next_token=0.5")
    _run(arguments(tmp_path, *TUNED, "quantization.allocation=model", *keys))
    assert {file: file.read_bytes() for file in (tmp_path / "blocks").iterdir()} == blocks
    old, new = _weights(tuned), _weights(tmp_path)
    names = [name for name in old if name.endswith("zeros")]
    blocks_zeros = {n: t for file in blocks for n, t in load_file(file).items() if n.endswith("zeros")}
    assert sum(not torch.equal(old[name], new[name]) for name in names) > 0
    original = load_file(Path(load_recipe(arguments(tmp_path)).model.path) / "model.safetensors")
    norms = [name for name in new if name.endswith("norm.weight")]
    assert len(norms) == 2 * 2 + 1
    assert all(torch.equal(new[name], original[name]) for name in norms)
    assert blocks_zeros  # scales alone were trained: zero points are those of the blocks
    for name in names:
        index, rest = name.split("layers.")[1].split(".", 1)
        stored = load_file(tmp_path / "blocks" / f"block_{int(index):03d}.safetensors")[rest]
        assert torch.equal(new[name], stored)


def test_what_is_said_is_of_the_training_that_is_shipped(tuned: Path, arguments: Arguments, tmp_path: Path) -> None:
    shutil.copytree(tuned, tmp_path, dirs_exist_ok=True)
    keys = (*TUNED, "quantization.allocation=model")
    failed = _run(arguments(tmp_path, *keys, "end_to_end.learning_rate=50"))
    assert "the blocks stay as they were" in (tmp_path / "summary.txt").read_text()
    helped = _run(arguments(tmp_path, *keys))
    assert helped["end_to_end"]["loss"] < failed["end_to_end"]["before"] == helped["end_to_end"]["before"]
    assert "the blocks stay as they were" not in (tmp_path / "summary.txt").read_text()
    assert "end_to_end" not in _run(arguments(tmp_path, *keys, "end_to_end.epochs=0"))
    assert _run(arguments(tmp_path, *keys))["end_to_end"] == helped["end_to_end"]


@pytest.mark.parametrize("teacher", ["int8", "nf4"])
def test_the_teacher_may_be_held_in_few_bits(arguments: Arguments, tmp_path: Path, teacher: str) -> None:
    pytest.importorskip("bitsandbytes")
    metrics = _run(arguments(tmp_path, *TUNED, f"end_to_end.teacher={teacher}", "end_to_end.hidden_states=0.1"))
    assert metrics["end_to_end"]["loss"] < metrics["end_to_end"]["before"]


def test_activation_checkpointing_changes_nothing(arguments: Arguments, tmp_path: Path) -> None:
    _run(arguments(tmp_path / "plain", *TUNED))
    with patch("slimplus.training.end_to_end.checkpoint", wraps=checkpoint) as used:
        _run(arguments(tmp_path / "checkpointed", *TUNED, "end_to_end.activation_checkpointing=true"))
    assert used.called
    plain, checkpointed = _weights(tmp_path / "plain"), _weights(tmp_path / "checkpointed")
    assert all(torch.equal(tensor, checkpointed[name]) for name, tensor in plain.items())


@pytest.mark.parametrize(
    "keys",
    [
        ("training.optimizer=adamw_8bit", "training.parametrization=weights", "training.patience=1", *SLOW),
        ("training.loss.error=after_norm", "training.loss.leave_out=0.05", "training.loss.auxiliary=0.5"),
        ("training.loss.salient_channels=true", "training.width_rates={1: 0.5, 3: 2.0}"),
    ],
)
def test_choices_of_training_go_together(arguments: Arguments, tmp_path: Path, keys: tuple[str, ...]) -> None:
    if "training.optimizer=adamw_8bit" in keys:
        pytest.importorskip("bitsandbytes")
    metrics = _run(arguments(tmp_path, *QAT, *keys))
    assert all(block["loss"] <= block["calibrated_loss"] for block in metrics["blocks"])


def test_norms_behind_the_blocks(arguments: Arguments, make_model: ModelMaker, tmp_path: Path) -> None:
    """OPT-350m's layout: only a loss behind the next norm is refused, and before any work."""
    model = make_model("opt", do_layer_norm_before=False)
    after_norm = arguments(tmp_path / "refused", *QAT, "training.loss.error=after_norm", model=model)
    with pytest.raises(InputError, match=r"no normalization follows block 1; give another training\.loss\.error"):
        _run(after_norm)
    metrics = _run(arguments(tmp_path / "run", *TUNED, "quantization.allocation=model", model=model))
    assert metrics["end_to_end"]["loss"] < metrics["end_to_end"]["before"]
    assert {tensor.dtype for name, tensor in _weights(tmp_path / "run").items() if name.endswith("bias")} == {
        torch.bfloat16
    }


@pytest.mark.parametrize("architecture", ["mistral", "qwen2", "qwen3", "opt"])
@pytest.mark.slow
def test_other_architectures(arguments: Arguments, make_model: ModelMaker, tmp_path: Path, architecture: str) -> None:
    keys = (*TUNED, "quantization.allocation=model", "training.loss.error=after_norm")
    metrics = _run(arguments(tmp_path, *keys, model=make_model(architecture)))
    assert metrics["end_to_end"]["loss"] < metrics["end_to_end"]["before"]
