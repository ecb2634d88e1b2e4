"""Translation of a recipe into the small frozen configurations that the algorithms take."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from lightning.fabric import Fabric

from slimplus.blockwise.quantizer import BlockQuantizer, QuantizerConfig
from slimplus.data.text import SELF
from slimplus.distributed.preemption import Preemption
from slimplus.evaluation.tasks import TaskConfig
from slimplus.evaluation.texts import TextConfig
from slimplus.models.streaming import BlockRunner
from slimplus.quantization.linear import QuantizationConfig
from slimplus.recipe.evaluation import EvaluationSection, EvaluationTextSection
from slimplus.recipe.schema import Recipe
from slimplus.recipe.training import EndToEndSection, LossSection, TrainingSection
from slimplus.training.compiled import CompiledCall
from slimplus.training.end_to_end import EndToEndConfig
from slimplus.training.fit import FitConfig, Report
from slimplus.training.losses import LossConfig
from slimplus.training.optimizers import Name, RateConfig, Schedule
from slimplus.training.reconstruction import ReconstructionConfig

# Weights times steps of their training from which compiled code pays on a CPU: it saves a thread about 8 ns for each,
# and the compiler takes half a minute, or a few seconds where its cache holds the code.
COMPILED_FROM = 1e10
ASK_FULL_PRECISION, ASK_PACKED = "full_precision_answers", "packed_answers"  # stages
TEACH = "full_precision_states"  # stage
WRITTEN = 20.0  # tokens that are read at once in the time that one token is written in
WARMUP = 4  # steps over which the rates rise, since Adam's first moments come from a few batches


def block_quantizer(
    recipe: Recipe,
    fabric: Fabric,
    runner: BlockRunner,
    weights: int,
    logs: Path,
    preemption: Preemption,
    report: Report,
) -> BlockQuantizer:
    """Return the quantizer of blocks that a recipe asks for.

    Args:
        recipe: the resolved recipe.
        fabric: the processes of the job.
        runner: the runner of blocks on this process's device.
        weights: number of weights that are quantized in all blocks.
        logs: folder of the TensorBoard and CSV logs.
        preemption: the handler of this process's signals.
        report: function that is told of training steps.
    """
    quantization, trainer = recipe.quantization, recipe.trainer
    allocation = quantization.allocates_by
    per_weight = recipe.training.parametrization if quantization.method == "qat" else None
    return BlockQuantizer(
        quantization=QuantizationConfig(
            quantization.method,
            quantization.bits,
            quantization.group_size,
            quantization.percdamp,
            allocation if allocation in ("slimllm", "block") else "uniform",  # the others give a block its widths
            tuple(quantization.widths),
            quantization.scale_bits,
            quantization.zero_points == "integer",
            quantization.per_layer,
            quantization.error_propagation,
        ),
        quantizer=QuantizerConfig(per_weight, recipe.training.width_rates, recipe.training_start),
        reconstruction=_reconstruction(recipe.training, per_weight),
        fit=FitConfig(
            trainer.devices,
            trainer.num_nodes,
            trainer.strategy,
            trainer.offload,
            logs,
            recipe.seed,
            trainer.checkpoint_seconds,
            tuple(trainer.logger),
        ),
        runner=runner,
        fabric=fabric,
        preemption=preemption,
        report=report,
        compiled=CompiledCall() if _compiles(recipe, weights, fabric.device) else None,
    )


def _reconstruction(training: TrainingSection, per_weight: str | None) -> ReconstructionConfig:
    """Return the configuration of a block's training, with `auto` and null resolved."""
    default_optimizer: Name = "sign_sgd" if per_weight == "rounding" else "adamw"
    optimizer = default_optimizer if training.optimizer == "auto" else training.optimizer
    is_sign_sgd = optimizer == "sign_sgd"

    def rate(peak: float | None, default: float, schedule: Schedule | Literal["auto"]) -> RateConfig:
        if schedule == "auto":
            schedule = "linear" if is_sign_sgd else "cosine"
        if peak is None and not is_sign_sgd:  # the default of sign_sgd depends on the number of steps
            peak = default
        return RateConfig(peak, schedule)

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


def _compiles(recipe: Recipe, weights: int, device: torch.device) -> bool:
    """Return whether blocks are trained as compiled code."""
    training = recipe.training
    steps = training.epochs * recipe.data.samples // training.batch_size
    pays = device.type == "cpu" and weights * steps >= COMPILED_FROM
    return {"auto": pays, "always": True, "never": False}[training.compile]


def _loss(loss: LossSection) -> LossConfig:
    """Return the configuration of a block's loss."""
    return LossConfig(
        error=loss.error,
        trim_fraction=loss.leave_out,
        salient_channels=loss.salient_channels,
        auxiliary=loss.auxiliary,
    )


def text_config(section: EvaluationTextSection) -> TextConfig:
    """Return the configuration of a text that perplexity is measured on."""
    return TextConfig(
        section.path, section.windows, section.sequence_length, section.column, section.stride, section.bos
    )


def task_config(section: EvaluationSection) -> TaskConfig:
    """Return the configuration of the tasks that a recipe asks for."""
    return TaskConfig(section.tasks, section.num_fewshot, section.limit, section.batch_size)


def end_to_end_config(section: EndToEndSection) -> EndToEndConfig:
    """Return the configuration of the end-to-end training that a recipe asks for."""
    return EndToEndConfig(
        epochs=section.epochs,
        batch_size=section.batch_size,
        accumulate_grad_batches=section.accumulate_grad_batches,
        optimizer=section.optimizer,
        grid=RateConfig(section.learning_rate, "cosine"),
        norms=RateConfig(section.norm_learning_rate, "cosine"),
        warmup=WARMUP,
        next_token=section.next_token,
        distillation=section.distillation,
        hidden_states=section.hidden_states,
        activation_checkpointing=section.activation_checkpointing,
    )


def expected_work(recipe: Recipe, task_tokens: float) -> dict[str, float]:
    """Return the stages of a run in their order, each with the work that it is expected to be.

    The unit is one token through all blocks, forwards; a token that a model writes counts as `WRITTEN`. The factors are
    those of SmolLM2-135M on one core, for which benchmarks/results/quality.json has the seconds of each stage; they
    make an estimate, and decide nothing.

    Args:
        recipe: the recipe.
        task_tokens: tokens that a model reads for `evaluation.tasks`.
    """
    data, quantization = recipe.data, recipe.quantization
    calibration = data.samples * data.sequence_length
    trained = recipe.end_to_end_windows * data.sequence_length
    evaluation = sum(text.windows * text.sequence_length for text in recipe.evaluation_texts.values())
    own = sum(source.weight for source in data.calibration.sources if source.path == SELF)
    share = own / sum(source.weight for source in data.calibration.sources)
    questions = 1.5 * task_tokens + WRITTEN * len(recipe.evaluation.prompts) * recipe.evaluation.new_tokens
    training = 3 * recipe.training.epochs if quantization.trains else 0
    return {
        "calibration_text": 3.0 * share * (calibration + (trained if recipe.end_to_end.tokens else 0)),
        "full_precision": 1.5 * evaluation,
        ASK_FULL_PRECISION: questions,
        "sensitivity": 5.0 * calibration if recipe.measures_sensitivity else 0.0,
        "blocks": (10.0 + training) * calibration,
        TEACH: 1.0 * trained if recipe.end_to_end.reads_states else 0.0,
        "end_to_end": 5.0 * recipe.end_to_end.epochs * trained,
        "export": 0.0,
        "packed": 1.5 * evaluation,
        ASK_PACKED: questions,
    }
