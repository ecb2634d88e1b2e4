"""The recipe's sections of training: of one block after the other, and of the whole model."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from slimplus.recipe.section import Number, Section

ENOUGH_STEPS = 256
"""Steps that make up for the error compensation which training from the nearest levels gives up; 64 do not."""


class LossSection(Section):
    """What a block is trained on; the choices go together in any way."""

    error: Literal["mse", "normalized", "after_norm"] = Field(
        "normalized",
        description="squared error of a block's output: as it is, divided by each token's energy, or measured behind "
        "the normalization that follows the block",
    )
    leave_out: Number = Field(
        0.0, ge=0, lt=1, description="share of a window's tokens to leave out, those with the largest error"
    )
    salient_channels: bool = Field(
        False, description="weight channels by the squared gradient of the model's loss, which is measured first"
    )
    auxiliary: Number = Field(
        0.0, ge=0, description="weight of the error against the full-precision block on the quantized input"
    )


class TrainingSection(Section):
    """Block reconstruction, with quantization.method=slimllm_plus or qat."""

    epochs: int = Field(8, ge=1, description="passes over the calibration windows for each block")
    batch_size: int = Field(
        1, ge=1, description="windows per step, of all devices together; a multiple of their number"
    )
    parametrization: Literal["rounding", "weights"] = Field(
        "rounding", description="what method=qat trains besides the grid: the rounding of each weight, or the weights"
    )
    start: Literal["auto", "calibrated", "nearest"] = Field(
        "auto",
        description="where method=qat starts: at the calibrated integers, or at those nearest to the weights on the "
        f"calibrated grid; auto is nearest for parametrization=rounding with {ENOUGH_STEPS} steps or more",
    )
    optimizer: Literal["auto", "sign_sgd", "adamw", "adamw_8bit"] = Field(
        "auto",
        description="auto is sign_sgd for parametrization=rounding, else adamw; adamw_8bit is bitsandbytes'",
    )
    learning_rate: Number | None = Field(
        None,
        gt=0,
        description="peak learning rate of the ends of each grid, in steps of its scale; "
        "null is 2 / training steps for sign_sgd, else 0.01",
    )
    schedule: Literal["auto", "constant", "linear", "cosine"] = Field(
        "auto", description="how learning_rate falls to zero; auto is linear for sign_sgd, else cosine"
    )
    element_learning_rate: Number | None = Field(
        None,
        ge=0,
        description="peak learning rate of each weight's rounding offset, in steps of its scale, or of the weight; "
        "null is 2 / training steps for sign_sgd, else 3e-4; 0 freezes them",
    )
    element_schedule: Literal["auto", "constant", "linear", "cosine"] = Field(
        "auto", description="how element_learning_rate falls to zero; auto is linear for sign_sgd, else cosine"
    )
    width_rates: dict[int, Number] = Field(
        {},
        description="width → factor on both learning rates of its groups, and on the largest rounding offset of half a "
        "step, such as {1: 0.5, 3: 2}",
    )
    weight_decay: Number = Field(0.0, ge=0, description="AdamW weight decay")
    accumulate_grad_batches: int = Field(
        1, ge=1, description="parts that a device splits its share of a step into, to save memory"
    )
    compile: Literal["auto", "always", "never"] = Field(
        "auto",
        description="whether blocks are trained as compiled code (torch.compile); auto: on a CPU, where it saves more "
        "time than it takes",
    )
    patience: int | None = Field(
        None, ge=1, description="epochs without a lower loss after which a block's training ends early"
    )
    loss: LossSection = LossSection()

    @field_validator("width_rates")
    @classmethod
    def _factors_of_widths(cls, rates: dict[int, float]) -> dict[int, float]:
        if not all(1 <= width <= 8 and rate >= 0 for width, rate in rates.items()):
            raise ValueError(f"expected factors of at least 0 for widths from 1 to 8, got {rates}")
        return rates


class EndToEndSection(Section):
    """Training of grids and norms through the whole model, after the blocks, whose integers stay as they are."""

    epochs: int = Field(0, ge=0, description="passes over the stage's windows; 0 leaves this stage out")
    tokens: int | None = Field(
        None,
        ge=1,
        description="calibration text to train on, in tokens, of which whole steps are taken; null takes the windows "
        "of the blocks",
    )
    batch_size: int = Field(4, ge=1, description="windows per step, of all devices together")
    accumulate_grad_batches: int = Field(
        1, ge=1, description="parts that a device splits its share of a step into, to save memory"
    )
    optimizer: Literal["adamw", "adamw_8bit", "sign_sgd"] = Field("adamw", description="adamw_8bit is bitsandbytes'")
    learning_rate: Number = Field(
        0.003, gt=0, description="peak learning rate of the ends of each grid, in steps of its scale"
    )
    norm_learning_rate: Number = Field(
        1e-3, ge=0, description="peak learning rate of a norm's gains, as a part of their mean; 0 freezes them"
    )
    zero_points: bool = Field(
        True, description="train zero points besides scales; with quantization.zero_points=integer they stay"
    )
    next_token: Number = Field(0.0, ge=0, description="weight of the cross-entropy with the text's next token")
    distillation: Number = Field(1.0, ge=0, description="weight of the KL to the full-precision model's predictions")
    hidden_states: Number = Field(0.0, ge=0, description="weight of the error of the last hidden states")
    teacher: Literal["cached", "int8", "nf4"] = Field(
        "cached",
        description="what stands for the full-precision model: its last hidden states, cached in main memory, or the "
        "model quantized by bitsandbytes",
    )
    activation_checkpointing: bool = Field(
        False, description="keep only the blocks' inputs and compute the rest twice, to save memory"
    )

    @property
    def learns_from_model(self) -> bool:
        """Whether the loss asks the full-precision model."""
        return self.distillation > 0 or self.hidden_states > 0

    @property
    def reads_states(self) -> bool:
        """Whether the stage keeps the states of the full-precision model that it learns from."""
        return self.epochs > 0 and self.learns_from_model and self.teacher == "cached"

    @model_validator(mode="after")
    def _something_to_learn(self) -> EndToEndSection:
        if self.epochs and not (self.next_token or self.distillation or self.hidden_states):
            raise ValueError(
                "end_to_end.distillation: nothing is left to learn from when it, end_to_end.next_token and "
                "end_to_end.hidden_states are all 0; give one of them a weight, or end_to_end.epochs=0"
            )
        if self.tokens is not None and not self.epochs:
            raise ValueError(
                f"end_to_end.tokens: {self.tokens} tokens are asked for, and no pass over them; "
                "give end_to_end.epochs=1"
            )
        return self
