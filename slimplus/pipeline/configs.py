"""From the recipe to what quantizes blocks: algorithms take small frozen configurations, never the whole recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from lightning.fabric import Fabric

from slimplus.blockwise.quantizer import BlockQuantizer, QuantizerConfig
from slimplus.distributed.preemption import Preemption
from slimplus.models.streaming import BlockRunner
from slimplus.quantization.linear import QuantizationConfig
from slimplus.recipe.schema import EndToEndSection, LossSection, Recipe, TrainingSection
from slimplus.training.end_to_end import EndToEndConfig
from slimplus.training.fit import FitConfig
from slimplus.training.losses import LossConfig
from slimplus.training.optimizers import Name, RateConfig, Schedule
from slimplus.training.reconstruction import ReconstructionConfig

WARMUP = 4  # steps: Adam's first moments are those of single batches


def block_quantizer(
    recipe: Recipe, fabric: Fabric, runner: BlockRunner, logs: Path, preemption: Preemption
) -> BlockQuantizer:
    """The quantizer of blocks that `recipe` asks for.

    Args:
        recipe: the whole recipe.
        fabric: the processes of the job.
        runner: runs blocks on this process's device.
        logs: folder of the TensorBoard and CSV logs.
        preemption: the signals of this process.
    """
    quantization, trainer = recipe.quantization, recipe.trainer
    search = quantization.allocates_by
    per_weight = recipe.training.parametrization if quantization.method == "qat" else None
    return BlockQuantizer(
        quantization=QuantizationConfig(
            quantization.method,
            quantization.bits,
            quantization.group_size,
            quantization.percdamp,
            search if search in ("slimllm", "block") else "uniform",  # the others' widths are given
            tuple(quantization.widths),
            quantization.scale_bits,
        ),
        quantizer=QuantizerConfig(per_weight, recipe.training.width_rates),
        reconstruction=_reconstruction(recipe.training, per_weight),
        fit=FitConfig(
            trainer.devices,
            trainer.num_nodes,
            trainer.strategy,
            trainer.offload,
            logs,
            recipe.seed,
            trainer.checkpoint_seconds,
        ),
        runner=runner,
        fabric=fabric,
        preemption=preemption,
    )


def _reconstruction(training: TrainingSection, per_weight: str | None) -> ReconstructionConfig:
    """The training of a block, `auto` and null resolved."""
    usual_optimizer: Name = "sign_sgd" if per_weight == "rounding" else "adamw"
    optimizer = usual_optimizer if training.optimizer == "auto" else training.optimizer
    signs = optimizer == "sign_sgd"

    def rate(peak: float | None, usual: float, schedule: Schedule | Literal["auto"]) -> RateConfig:
        falls = ("linear" if signs else "cosine") if schedule == "auto" else schedule
        return RateConfig(usual if peak is None and not signs else peak, falls)

    return ReconstructionConfig(
        epochs=training.epochs,
        batch_size=training.batch_size,
        accumulate_grad_batches=training.accumulate_grad_batches,
        optimizer=optimizer,
        grid=rate(training.learning_rate, 0.01, training.schedule),
        per_weight=rate(training.element_learning_rate, 3e-4, training.element_schedule),
        weight_decay=training.weight_decay,
        patience=training.patience,
        loss=_loss(training.loss),
    )


def _loss(loss: LossSection) -> LossConfig:
    return LossConfig(
        error=loss.error,
        trim_fraction=loss.leave_out,
        salient_channels=loss.salient_channels,
        auxiliary=loss.auxiliary,
    )


def end_to_end_config(recipe: EndToEndSection) -> EndToEndConfig:
    """Return the training of the whole model that the recipe asks for."""
    return EndToEndConfig(
        epochs=recipe.epochs,
        batch_size=recipe.batch_size,
        accumulate_grad_batches=recipe.accumulate_grad_batches,
        optimizer=recipe.optimizer,
        grid=RateConfig(recipe.learning_rate, "cosine"),
        norms=RateConfig(recipe.norm_learning_rate, "cosine"),
        warmup=WARMUP,
        next_token=recipe.next_token,
        distillation=recipe.distillation,
        hidden_states=recipe.hidden_states,
        activation_checkpointing=recipe.activation_checkpointing,
    )
