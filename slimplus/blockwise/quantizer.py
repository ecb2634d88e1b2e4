"""From a full-precision block to its quantized linear weights, trained if the method says so."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lightning.fabric import Fabric
from torch import Tensor, nn

from slimplus.blockwise.calibrate import quantize_block
from slimplus.blockwise.data import BlockData
from slimplus.blockwise.sensitivity import allocate_block
from slimplus.blockwise.swap import fake_quantized_block, trained_weights
from slimplus.distributed.preemption import Preemption
from slimplus.distributed.ranks import Ranks
from slimplus.format.affine import QuantizedWeight
from slimplus.models.streaming import BlockArguments, BlockRunner
from slimplus.nn import FakeQuantizedLinear, LearnedRoundingLinear, TrainedWeightLinear
from slimplus.quantization.linear import QuantizationConfig
from slimplus.training.checkpoints import TrainingCheckpoints
from slimplus.training.fit import Fit, FitConfig
from slimplus.training.reconstruction import BlockReconstruction, LossContext, ReconstructionConfig
from slimplus.utils.errors import InputError


@dataclass(frozen=True)
class QuantizerConfig:
    """What a block's quantizers learn.

    Attributes:
        per_weight: what each weight has of its own beside the grid: its rounding, itself, or nothing.
        width_rates: width → factor on the learning rates.
    """

    per_weight: Literal["rounding", "weights"] | None
    width_rates: Mapping[int, float]

    def __call__(self, weight: QuantizedWeight, bias: Tensor | None, remainder: Tensor) -> FakeQuantizedLinear:
        """A layer with such a quantizer."""
        if self.per_weight is None:
            return FakeQuantizedLinear(weight, bias, self.width_rates)
        layer = LearnedRoundingLinear if self.per_weight == "rounding" else TrainedWeightLinear
        return layer(weight, bias, self.width_rates, remainder)


@dataclass(frozen=True)
class BlockTask:
    """One block and what it is quantized on.

    Attributes:
        block: full precision, float32, on the device.
        name: in logs.
        arguments: the block's arguments besides its input.
        hidden: this rank's inputs of the block, from the quantized blocks before it, `[windows, length, hidden]`.
        targets: this rank's outputs of the block along the full-precision chain, the same shape.
        auxiliary: this rank's outputs of the full-precision block for `hidden`, if the loss asks for them.
        bits: widths of each layer's groups, if they are given rather than searched.
        context: what the loss needs to know.
        checkpoints: of its training.
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


@dataclass(frozen=True)
class BlockQuantizer:
    """Quantizes one block after the other, the same way on every rank."""

    quantization: QuantizationConfig
    quantizer: QuantizerConfig
    reconstruction: ReconstructionConfig
    fit: FitConfig
    runner: BlockRunner
    fabric: Fabric
    preemption: Preemption

    @property
    def trains(self) -> bool:
        """Whether blocks are trained after their calibration."""
        return self.quantization.method in ("slimllm_plus", "qat")

    @property
    def ranks(self) -> Ranks:
        """The processes of the job."""
        return Ranks(self.fabric.global_rank, self.fabric.world_size)

    def __call__(self, task: BlockTask) -> tuple[dict[str, QuantizedWeight], dict[str, Any]]:
        """The quantized weights by the layers' names in the block, and a record of how they came about.

        Raises:
            InputError: if a Hessian cannot be inverted, or a window does not fit the device.
            Preempted: in training, after a checkpoint.
        """
        start = time.perf_counter()
        data = BlockData(task.block, task.hidden, task.arguments, self.runner, self.ranks)
        bits = task.bits
        try:
            if bits is None and self.quantization.allocation == "block":
                bits = allocate_block(data, self.quantization)
            result = quantize_block(data, self.quantization, bits)
        except ValueError as error:  # a Hessian beyond repair
            raise InputError(f"{task.name}: {error}; finished blocks are kept") from error
        record: dict[str, Any] = {
            "divergence": result.divergence,
            "percdamp": result.percdamp,
            "seconds": {"calibration": time.perf_counter() - start},
            "events": [
                f"the Hessian of {name} was singular; damping was raised to {percdamp:g}"
                for name, percdamp in result.percdamp.items()
                if percdamp > self.quantization.percdamp
            ],
        }
        if not self.trains:
            return result.weights, record
        start = time.perf_counter()
        module = BlockReconstruction(
            fake_quantized_block(task.block, result, self.quantizer),
            task.arguments,
            self.reconstruction,
            self.runner.precision,
            task.context,
        )
        batches = (task.hidden, task.targets) + (() if task.auxiliary is None else (task.auxiliary,))
        fit = Fit(module, batches, task.name, task.checkpoints, self.fabric, self.fit, self.preemption)()
        record["loss"], record["calibrated_loss"], record["skipped_steps"] = fit.loss, fit.calibrated_loss, fit.skipped
        record["seconds"]["training"] = time.perf_counter() - start
        record["events"] += fit.events
        if fit.helped:
            return trained_weights(module.to(self.runner.device).block), record
        if fit.loss is not None:
            record["events"].append("training ended above the calibrated loss; the calibrated quantizers are kept")
        return result.weights, record
