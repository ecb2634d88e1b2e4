"""The quantizer of blocks: calibrates a full-precision block, and trains its quantizers if the method does so."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn

from slimplus.blockwise.calibrate import BlockResult, quantize_block
from slimplus.blockwise.data import BlockData
from slimplus.blockwise.sensitivity import allocate_block
from slimplus.blockwise.swap import fake_quantized_block, trained_weights
from slimplus.distributed.preemption import Preemption
from slimplus.distributed.ranks import Ranks
from slimplus.format.affine import QuantizedWeight, grid_positions, lost_to_storage
from slimplus.models.architectures import expert_stacks, find_linears
from slimplus.models.block_arguments import BlockArguments, BlockCall, call_block
from slimplus.models.precision import with_remedy
from slimplus.models.streaming import BlockRunner
from slimplus.nn import (
    FakeQuantizedLinear,
    LearnedRoundingLinear,
    ScaledLinear,
    ScaledRoundingLinear,
    TrainedWeightLinear,
)
from slimplus.quantization.linear import QuantizationConfig
from slimplus.training.checkpoints import TrainingCheckpoints
from slimplus.training.compiled import CompiledCall, can_compile
from slimplus.training.fit import Fit, FitConfig, Report, ignore
from slimplus.training.reconstruction import BlockReconstruction, LossContext, ReconstructionConfig
from slimplus.utils.errors import InputError


@dataclass(frozen=True)
class QuantizerConfig:
    """What the quantizers of a block learn.

    Attributes:
        per_weight: what is learned for each weight besides the grid: its rounding, its value, or nothing.
        width_rates: width → factor on the learning rates.
        start: where a weight's training starts on the calibrated grid: at its `calibrated` integer, as error
            compensation left it, or at its own place, rounded to `nearest`.
    """

    per_weight: Literal["rounding", "weights"] | None
    width_rates: Mapping[int, float]
    start: Literal["calibrated", "nearest"] = "calibrated"

    def __call__(self, weight: QuantizedWeight, layer: nn.Linear, remainder: Tensor) -> FakeQuantizedLinear:
        """Return a linear layer with a learnable quantizer.

        Args:
            weight: the quantized weight `[out, in]`, as it was calibrated.
            layer: the layer in full precision.
            remainder: what rounding left of each weight, `[out, in]`, see `RoundedWeight`.
        """
        integer, bias = weight.integer_zero_points, layer.bias
        if self.per_weight is None:
            return (ScaledLinear if integer else FakeQuantizedLinear)(weight, bias, self.width_rates)
        if self.start == "nearest":
            remainder = grid_positions(layer.weight, weight) - weight.integers
        rounding = ScaledRoundingLinear if integer else LearnedRoundingLinear
        kind = rounding if self.per_weight == "rounding" else TrainedWeightLinear
        return kind(weight, bias, self.width_rates, remainder)


@dataclass(frozen=True)
class BlockTask:
    """One block and what it is quantized on.

    Attributes:
        block: the full-precision block, float32, on the device.
        name: name of the block in logs and messages.
        arguments: the block's arguments besides its input.
        hidden: this rank's inputs of the block, `[windows, sequence_length, hidden]`, given by the quantized blocks
            before it.
        targets: this rank's outputs of the block on what the full-precision blocks before it give, of the same shape.
        auxiliary: this rank's outputs of the full-precision block on `hidden`, if the loss uses them.
        bits: layer → widths of its groups, or None if the quantizer finds them.
        context: what the loss needs to know of the block's place in the model.
        checkpoints: checkpoints of the block's training.
        full_hidden: this rank's inputs of the block that the full-precision blocks before it give, where calibration
            makes up for the difference.
    """

    block: nn.Module
    name: str
    arguments: BlockArguments
    hidden: Tensor
    targets: Tensor
    auxiliary: Tensor | None
    bits: Mapping[str, Tensor] | None
    context: LossContext
    checkpoints: TrainingCheckpoints
    full_hidden: Tensor | None = None


@dataclass(frozen=True)
class BlockQuantizer:
    """Quantizer of one block after the other, in the same way on every rank.

    1. Find the widths, if the task gives none.
    2. Calibrate: scales, zero points and integers.
    3. Train the quantizers, if the method has that; what training made worse is dropped.

    Attributes:
        quantization: how weights are quantized.
        quantizer: what the quantizers of a block learn.
        reconstruction: how a block is trained.
        fit: where and how the trainers of a job run.
        runner: the runner of blocks on this process's device.
        fabric: the processes of the job.
        preemption: the handler of this process's signals.
        report: function that is told of training steps.
        compiled: call of a block as compiled code, for its training, or None to call blocks as they are.
    """

    quantization: QuantizationConfig
    quantizer: QuantizerConfig
    reconstruction: ReconstructionConfig
    fit: FitConfig
    runner: BlockRunner
    fabric: Fabric
    preemption: Preemption
    report: Report = ignore
    compiled: CompiledCall | None = None

    @property
    def trains(self) -> bool:
        """Whether blocks are trained after their calibration."""
        return self.quantization.method in ("slimllm_plus", "qat")

    @property
    def ranks(self) -> Ranks:
        """The collective operations among the processes of the job."""
        return Ranks(self.fabric.global_rank, self.fabric.world_size)

    def __call__(self, task: BlockTask) -> tuple[dict[str, QuantizedWeight], dict[str, Any]]:
        """Return the quantized weights by the layers' names in the block, and a record of how they were made.

        Raises:
            InputError: if a Hessian cannot be inverted, or one window does not fit the device.
            Preempted: if a signal ended the training, once a checkpoint is written.
        """
        start = time.perf_counter()
        result = self._calibrate(task)
        record: dict[str, Any] = {
            "divergence": result.divergence,
            "percdamp": result.percdamp,
            "dead_columns": {name: count for name, count in result.dead_columns.items() if count},
            "seconds": {"calibration": time.perf_counter() - start},
            "events": [
                f"the Hessian of {name} was singular; damping was raised to {percdamp:g}"
                for name, percdamp in result.percdamp.items()
                if percdamp > self.quantization.percdamp
            ],
        }
        if dead := [
            f"{count} of {result.weights[name].integers.shape[1]} of {name}"
            for name, count in record["dead_columns"].items()
        ]:
            record["events"].append(
                f"no calibration token reaches these input columns: {', '.join(dead)}; they are rounded to nearest "
                "(more, or more varied, calibration text may reach them)"
            )
        if result.tokens:
            record["experts"] = expert_tokens(task.block, result.tokens)
            record["events"] += dead_expert_events(record["experts"])
        weights = self._train(task, result, record) if self.trains else result.weights
        layers = find_linears(task.block)
        warning = storage_warning({name: (layers[name].weight, weight) for name, weight in weights.items()})
        record["events"] += [warning] if warning else []
        return weights, record

    def _calibrate(self, task: BlockTask) -> BlockResult:
        """Find the widths if the task gives none, and quantize the block without training."""
        data = BlockData(task.block, task.hidden, task.arguments, self.runner, self.ranks, task.full_hidden)
        bits = task.bits
        try:
            if bits is None and self.quantization.allocation == "block":
                bits = allocate_block(data, self.quantization)
            return quantize_block(data, self.quantization, bits)
        except ValueError as error:  # a Hessian that no damping makes invertible
            said = with_remedy(error, self.runner.precision)
            raise InputError(f"{task.name}: {said}; finished blocks are kept") from error

    def _train(self, task: BlockTask, result: BlockResult, record: dict[str, Any]) -> dict[str, QuantizedWeight]:
        """Train a calibrated block, add the training to `record`, and return the better of both sets of weights."""
        start = time.perf_counter()
        module = BlockReconstruction(
            fake_quantized_block(task.block, result, self.quantizer),
            task.arguments,
            self.reconstruction,
            self.runner.precision,
            task.context,
            self._training_call(task.block),
        )
        batches = (task.hidden, task.targets) + (() if task.auxiliary is None else (task.auxiliary,))
        if task.arguments.by_window:
            batches += (torch.arange(len(task.hidden)),)
        fit = Fit(module, batches, task.name, task.checkpoints, self.fabric, self.fit, self.preemption, self.report)()
        record["loss"], record["calibrated_loss"], record["skipped_steps"] = fit.loss, fit.calibrated_loss, fit.skipped
        record["seconds"]["training"] = time.perf_counter() - start
        record["events"] += fit.events
        if fit.helped:
            return trained_weights(module.to(self.runner.device).block)
        if fit.loss is not None:
            record["events"].append("training ended above the calibrated loss; the calibrated quantizers are kept")
        return result.weights

    def _training_call(self, block: nn.Module) -> BlockCall:
        """Return how the training calls the block: as compiled code, if the settings ask for it and it can be.

        The experts of a token are chosen in Python, and ZeRO 3 gathers parameters there.
        """
        traceable = not expert_stacks(block) and self.fit.strategy != "deepspeed_stage_3"
        if self.compiled is None or not traceable or not can_compile(self.runner.device):
            return call_block
        return self.compiled


def expert_tokens(block: nn.Module, tokens: Mapping[str, int]) -> dict[str, list[int]]:
    """Return the calibration tokens that each expert has seen, by the name of the experts in the block.

    Args:
        block: the block.
        tokens: expert's layer → number of tokens.
    """
    return {
        name: [tokens[f"{name}.{stack.layout.up}.{expert}"] for expert in range(stack.count)]
        for name, stack in expert_stacks(block).items()
    }


def dead_expert_events(experts: Mapping[str, Sequence[int]]) -> list[str]:
    """Return a sentence that names the experts without any token, if there are some; see `expert_tokens`."""
    dead = {name: [str(expert) for expert, count in enumerate(counts) if not count] for name, counts in experts.items()}
    return [
        f"no calibration token is sent to experts {', '.join(numbers)} of {name}; they are quantized for the inputs of "
        "the other experts (more, or more varied, calibration text may reach them)"
        for name, numbers in dead.items()
        if numbers
    ]


def storage_warning(layers: Mapping[str, tuple[Tensor, QuantizedWeight]]) -> str | None:
    """Return a sentence on the layers whose scales the packed format cannot hold, or None if it holds all.

    Args:
        layers: name of each layer → the weight that was quantized, `[out, in]`, and its packed form.
    """
    found, scale_bits = [], 16
    for name, (weight, quantized) in layers.items():
        lost = lost_to_storage(weight, quantized)
        if lost.any():
            found.append(f"{int(lost.sum()):,} of {lost.numel():,} of {name}")
            scale_bits = quantized.scale_bits
    if not found:
        return None
    remedy = (
        "quantization.scale_bits=16 reaches further"
        if scale_bits == 8
        else "multiply such a layer by a power of two, and divide what stands before it"
    )
    return (
        f"these scales lie beyond what {scale_bits} bits reach, and their weights are rounded more coarsely than their "
        f"widths allow: {', '.join(found)}; {remedy}"
    )
