"""Training end to end: it helps, and what it gave is what is shipped."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from unittest.mock import Mock, patch

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.checkpoint import checkpoint

import slimplus
from slimplus.nn import PackedLinear
from slimplus.pipeline.stages import end_to_end, sensitivity
from slimplus.recipe.parsing import load_recipe
from slimplus.utils.errors import InputError
from tests.support.recipes import QAT, TUNED, Arguments
from tests.support.runs import measured_run, packed_weights, run


def test_end_to_end_helps_and_is_what_is_shipped(tuned: Path, arguments: Arguments, tmp_path: Path) -> None:
    metrics = json.loads((tuned / "metrics.json").read_text())
    assert metrics["end_to_end"]["loss"] < metrics["end_to_end"]["before"]
    shutil.copytree(tuned, tmp_path, dirs_exist_ok=True)
    # The same blocks, exported as they are.
    without = measured_run(arguments(tmp_path, *QAT, "quantization.allocation=model"))
    assert metrics["perplexity"]["quantized"] != without["perplexity"]["quantized"]
    before, after = packed_weights(tmp_path), packed_weights(tuned)
    changed = {name.rpartition(".")[2] for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert "scales" in changed
    assert "weight" in changed  # of norms
    assert not any(name.startswith("qplane") for name in changed)  # the integers are frozen
    # With the tensors that it had kept.
    again = measured_run(arguments(tmp_path, *TUNED, "quantization.allocation=model"))
    assert again["perplexity"]["quantized"] == metrics["perplexity"]["quantized"]
    assert all(torch.equal(tensor, after[name]) for name, tensor in packed_weights(tmp_path).items())


def test_the_checkpoint_holds_the_trained_model_bit_for_bit(tuned: Path) -> None:
    kept = load_file(tuned / "end_to_end.safetensors")
    shipped = packed_weights(tuned)
    assert all(torch.equal(tensor, shipped[name]) for name, tensor in kept.items())
    model = slimplus.load(tuned / "packed", dtype=torch.float32)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    assert {f"{name}.scales" for name in layers} <= kept.keys()


def test_8_bit_scales_are_trained_and_shipped(tuned: Path, arguments: Arguments, tmp_path: Path) -> None:
    """Of as many bytes they leave more for integers; what was trained loads back bit for bit, embedding included."""
    size = sum(tensor.nbytes for name, tensor in packed_weights(tuned).items() if "proj" in name)
    keys = ("quantization.scale_bits=8", "quantization.embedding_bits=8", f"quantization.size_bytes={size}")
    metrics = measured_run(arguments(tmp_path, *TUNED, "quantization.allocation=model", *keys))
    assert metrics["average_bits"] > 2.2
    shipped = packed_weights(tmp_path)
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
    measured_run(arguments(tmp_path, *TUNED, "quantization.allocation=model"))


def test_a_changed_training_of_the_model_keeps_the_blocks(tuned: Path, arguments: Arguments, tmp_path: Path) -> None:
    shutil.copytree(tuned, tmp_path, dirs_exist_ok=True)
    blocks = {file: file.read_bytes() for file in (tmp_path / "blocks").iterdir()}
    keys = ("end_to_end.zero_points=false", "end_to_end.norm_learning_rate=0", "end_to_end.next_token=0.5")
    measured_run(arguments(tmp_path, *TUNED, "quantization.allocation=model", *keys))
    assert {file: file.read_bytes() for file in (tmp_path / "blocks").iterdir()} == blocks
    old, new = packed_weights(tuned), packed_weights(tmp_path)
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
    failed = measured_run(arguments(tmp_path, *keys, "end_to_end.learning_rate=50"))
    assert "the blocks stay as they were" in (tmp_path / "summary.txt").read_text()
    helped = measured_run(arguments(tmp_path, *keys))
    assert helped["end_to_end"]["loss"] < failed["end_to_end"]["before"] == helped["end_to_end"]["before"]
    assert "the blocks stay as they were" not in (tmp_path / "summary.txt").read_text()
    assert "end_to_end" not in measured_run(arguments(tmp_path, *keys, "end_to_end.epochs=0"))
    assert measured_run(arguments(tmp_path, *keys))["end_to_end"] == helped["end_to_end"]


def test_the_stage_may_read_more_tokens_than_the_blocks(tuned: Path, arguments: Arguments, tmp_path: Path) -> None:
    shutil.copytree(tuned, tmp_path, dirs_exist_ok=True)
    blocks = {file: file.read_bytes() for file in (tmp_path / "blocks").iterdir()}
    # 12 windows of 32 tokens; the last 20 tokens are no whole step of 2 windows.
    keys = (*TUNED, "quantization.allocation=model", "end_to_end.batch_size=2", "end_to_end.tokens=404")
    metrics = measured_run(arguments(tmp_path, *keys))
    assert {file: file.read_bytes() for file in (tmp_path / "blocks").iterdir()} == blocks
    windows = load_file(tmp_path / "tokens/end_to_end.safetensors")["tokens"]
    assert windows.shape == (12, 32)
    ours = load_file(tmp_path / "tokens/calibration.safetensors")["tokens"]
    assert ours.shape == (8, 32)
    assert torch.equal(windows[:8], ours)
    assert len(windows.unique(dim=0)) == 12
    assert metrics["end_to_end"]["loss"] < metrics["end_to_end"]["before"]
    assert metrics["seconds"]["full_precision_states"] > 0
    assert len((tmp_path / "logs/csv/end_to_end/metrics.csv").read_text().splitlines()) > 1
    # What was trained on other tokens is not what a run without them ships.
    again = measured_run(arguments(tmp_path, *TUNED, "quantization.allocation=model"))
    assert again["end_to_end"]["before"] != metrics["end_to_end"]["before"]


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (("end_to_end.epochs=0", "end_to_end.tokens=64"), "end_to_end.tokens: 64 tokens are asked for, and no pass"),
        (
            ("end_to_end.tokens=63", "end_to_end.batch_size=2"),
            "end_to_end.tokens: 63 tokens are less than a step of 64",
        ),
        (("end_to_end.tokens=320000",), "fewer than end_to_end.tokens=320000; lower end_to_end.tokens or data.seq"),
    ],
)
def test_tokens_that_cannot_be_had_are_refused_before_the_work(
    arguments: Arguments, tmp_path: Path, keys: tuple[str, ...], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        run(arguments(tmp_path, *TUNED, *keys))
    assert not list(tmp_path.glob("blocks/*"))


@pytest.mark.parametrize("teacher", ["int8", "nf4"])
def test_the_teacher_may_be_held_in_few_bits(arguments: Arguments, tmp_path: Path, teacher: str) -> None:
    pytest.importorskip("bitsandbytes")
    metrics = measured_run(arguments(tmp_path, *TUNED, f"end_to_end.teacher={teacher}", "end_to_end.hidden_states=0.1"))
    assert metrics["end_to_end"]["loss"] < metrics["end_to_end"]["before"]


def test_activation_checkpointing_changes_nothing(arguments: Arguments, tmp_path: Path) -> None:
    measured_run(arguments(tmp_path / "plain", *TUNED))
    with patch("slimplus.training.end_to_end.checkpoint", wraps=checkpoint) as used:
        measured_run(arguments(tmp_path / "checkpointed", *TUNED, "end_to_end.activation_checkpointing=true"))
    assert used.called
    plain, checkpointed = packed_weights(tmp_path / "plain"), packed_weights(tmp_path / "checkpointed")
    assert all(torch.equal(tensor, checkpointed[name]) for name, tensor in plain.items())


@pytest.mark.parametrize("parametrization", ["rounding", pytest.param("weights", marks=pytest.mark.slow)])
def test_integer_zero_points_and_widths_of_layers_outlast_all_stages(
    arguments: Arguments, tmp_path: Path, parametrization: str
) -> None:
    keys = [
        *("quantization.zero_points=integer", "quantization.per_layer=true", "quantization.embedding_bits=4"),
        *("quantization.allocation=model", f"training.parametrization={parametrization}"),
        *("quantization.method=qat", "training.epochs=2", "end_to_end.epochs=1", "end_to_end.batch_size=2"),
    ]
    metrics = measured_run(arguments(tmp_path, *keys))
    assert metrics["average_bits"] == 2.0  # q and k of one block are as large as those of the other
    assert metrics["end_to_end"]["loss"] < metrics["end_to_end"]["before"]
    shipped = packed_weights(tmp_path)
    widths = {}
    for name, tensor in shipped.items():
        if name.endswith(".zeros"):
            bits = shipped[name.replace("zeros", "group_bits")].long()
            steps = 2 ** (8 - bits[:, None])
            assert not (tensor.long() % steps).any(), name
            assert (tensor.long() <= (2 ** bits[:, None] - 1) * steps).all(), name
            widths[name] = set(bits.tolist())
    assert {len(own) for own in widths.values()} == {1}
    assert len(set.union(*widths.values())) > 2  # with the embedding's
    with pytest.raises(InputError, match="quantization.zero_points integer ->"):
        measured_run(arguments(tmp_path, *keys, "quantization.zero_points=fractional"))
