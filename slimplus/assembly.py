"""From the recipe to what quantizes blocks: algorithms take small frozen configurations, never the whole recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from lightning.fabric import Fabric

from slimplus.config import Recipe, TrainingConfig
from slimplus.models.streaming import BlockRunner
from slimplus.quantization.linear import QuantizationConfig
from slimplus.signals import Preemption
from slimplus.training.blockwise import BlockQuantizer, QuantizerConfig
from slimplus.training.fit import FitConfig
from slimplus.training.losses import LossConfig
from slimplus.training.optimizers import Name, RateConfig, Schedule
from slimplus.training.reconstruction import ReconstructionConfig


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
    elements = recipe.training.parametrization if quantization.method == "qat" else None
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
        quantizer=QuantizerConfig(elements, recipe.training.width_rates),
        reconstruction=_reconstruction(recipe.training, elements),
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


def _reconstruction(training: TrainingConfig, elements: str | None) -> ReconstructionConfig:
    """The training of a block, `auto` and null resolved."""
    usual_optimizer: Name = "sign_sgd" if elements == "rounding" else "adamw"
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
        elements=rate(training.element_learning_rate, 3e-4, training.element_schedule),
        weight_decay=training.weight_decay,
        patience=training.patience,
        loss=LossConfig(**training.loss.model_dump()),
    )
