"""Blocks trained one by one: they get better, whatever is chosen."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from slimplus.utils.errors import InputError
from tests.support.models import ModelMaker
from tests.support.recipes import QAT, TUNED, Arguments
from tests.support.runs import measured_run, packed_weights, run

SLOW = ("training.learning_rate=1e-3", "training.element_learning_rate=1e-5")  # random weights leave little to learn


@pytest.mark.parametrize("parametrization", ["rounding", "weights"])
def test_blocks_get_better_by_training(arguments: Arguments, tmp_path: Path, parametrization: str) -> None:
    rates = SLOW if parametrization == "weights" else ()
    metrics = measured_run(arguments(tmp_path, *QAT, f"training.parametrization={parametrization}", *rates))
    for block in metrics["blocks"]:
        assert block["loss"] < block["calibrated_loss"]
    assert metrics["average_bits"] == 2.0


@pytest.mark.parametrize(
    "keys",
    [
        ("training.optimizer=adamw_8bit", "training.parametrization=weights", "training.patience=1", *SLOW),
        (
            *("training.loss.error=after_norm", "training.loss.leave_out=0.05", "training.loss.auxiliary=0.5"),
            "training.start=nearest",
        ),
        (
            *("training.loss.salient_channels=true", "training.width_rates={1: 0.5, 3: 2.0}"),
            "quantization.error_propagation=0.5",
        ),
    ],
)
def test_choices_of_training_go_together(arguments: Arguments, tmp_path: Path, keys: tuple[str, ...]) -> None:
    if "training.optimizer=adamw_8bit" in keys:
        pytest.importorskip("bitsandbytes")
    metrics = measured_run(arguments(tmp_path, *QAT, *keys))
    for block in metrics["blocks"]:
        kept = [event for event in block["events"] if event.endswith("the calibrated quantizers are kept")]
        assert (block["loss"] <= block["calibrated_loss"]) is not bool(kept)


def test_weights_make_up_for_errors_without_training_too(arguments: Arguments, tmp_path: Path) -> None:
    """The first layers of the first block have none to make up for."""
    gptq = ("quantization.method=gptq", "quantization.bits=3")
    run(arguments(tmp_path / "plain", *gptq))
    run(arguments(tmp_path / "made_up_for", *gptq, "quantization.error_propagation=1"))
    plain, made_up_for = packed_weights(tmp_path / "plain"), packed_weights(tmp_path / "made_up_for")
    changed = {name.rsplit(".", 1)[0] for name, tensor in plain.items() if not torch.equal(tensor, made_up_for[name])}
    layers = {name.rsplit(".", 1)[0] for name in plain if name.endswith("scales")}
    assert layers - changed == {f"model.layers.0.self_attn.{part}_proj" for part in "qkv"}


def test_norms_behind_the_blocks(arguments: Arguments, make_model: ModelMaker, tmp_path: Path) -> None:
    """OPT-350m's layout: only a loss behind the next norm is refused, and before any work."""
    model = make_model("opt", do_layer_norm_before=False)
    after_norm = arguments(tmp_path / "refused", *QAT, "training.loss.error=after_norm", model=model)
    with pytest.raises(InputError, match=r"no normalization follows block 1; give training\.loss\.error="):
        measured_run(after_norm)
    metrics = measured_run(arguments(tmp_path / "run", *TUNED, "quantization.allocation=model", model=model))
    assert metrics["end_to_end"]["loss"] < metrics["end_to_end"]["before"]
    assert {tensor.dtype for name, tensor in packed_weights(tmp_path / "run").items() if name.endswith("bias")} == {
        torch.bfloat16
    }


@pytest.mark.parametrize("architecture", ["mistral", "qwen2", "qwen3", "opt"])
@pytest.mark.slow
def test_other_architectures(arguments: Arguments, make_model: ModelMaker, tmp_path: Path, architecture: str) -> None:
    keys = (*TUNED, "quantization.allocation=model", "training.loss.error=after_norm")
    metrics = measured_run(arguments(tmp_path, *keys, model=make_model(architecture)))
    assert metrics["end_to_end"]["loss"] < metrics["end_to_end"]["before"]
