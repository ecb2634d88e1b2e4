"""The recipe: everything that one run does, as frozen and strict pydantic models.

Like `slimplus.recipe.parsing`, this module imports only the standard library, pydantic and PyYAML, so that every error
of a command line is reported before PyTorch is loaded.
"""

from __future__ import annotations

from typing import Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationInfo, field_validator, model_validator
from pydantic.fields import FieldInfo

from slimplus.recipe.evaluation import EvaluationSection, EvaluationTextSection
from slimplus.recipe.inputs import DataSection, ModelSection
from slimplus.recipe.section import Number, Section


class QuantizationSection(Section):
    """How weights become integers."""

    method: Literal["rtn", "gptq", "slimllm", "slimllm_plus", "qat"] = Field(
        description="round to nearest, GPTQ, SliM-LLM (gradient-free), SliM-LLM+ (the grid is trained), "
        "qat (the grid and the rounding are trained)"
    )
    bits: int = Field(
        ge=1, le=8, description="average bits per weight, met exactly; an imported allocation has its own average"
    )
    group_size: Literal[16, 32, 64, 128, 256, 512, 1024] = Field(
        128, description="columns that share a bit width, and in each row a scale and a zero point"
    )
    zero_points: Literal["fractional", "integer"] = Field(
        "fractional",
        description="integer keeps zero points among 0 to 2^bits - 1, as compressed-tensors and GPTQ need them for "
        "`slimplus export`; perplexity is higher",
    )
    scale_bits: Literal[8, 16] = Field(16, description="bits of a scale; with 8, each row also stores an exponent")
    embedding_bits: int | None = Field(
        None, ge=1, le=8, description="bits of the token embedding, and of a head tied to it; null leaves 16 bits"
    )
    head_bits: int | None = Field(
        None,
        ge=1,
        le=8,
        description="bits of the output head; null leaves 16 bits; "
        "a head tied to the embedding needs embedding_bits as well, and the two are then stored apart",
    )
    percdamp: Number = Field(0.01, gt=0, le=1, description="Hessian damping, as a part of the mean of its diagonal")
    error_propagation: Number = Field(
        0.0,
        ge=0,
        le=1,
        description="share of the error in a layer's inputs, left by the quantized layers before it, that its weights "
        "make up for (QEP)",
    )
    allocation: str | None = Field(
        None,
        min_length=1,
        description="how groups get their widths: slimllm (bits-1 to bits+1, layer by layer), uniform, block or model "
        "(any of quantization.widths by measured sensitivity, under one average for a block or the model), or a FILE: "
        "allocation.json of another run, or the authors' .pt; null is uniform for rtn and gptq, else slimllm",
    )
    per_layer: bool = Field(
        False,
        description="with allocation=block or model, one width for all groups of a layer, as compressed-tensors and "
        "GPTQ need it for `slimplus export`; the average is then met as nearly as whole layers allow",
    )
    widths: list[int] = Field([1, 2, 3, 4], description="widths that the allocations block and model choose from")
    size_bytes: int | None = Field(
        None,
        ge=1,
        description="with allocation=model, bytes for all packed linear layers, scales and zero points included, "
        "instead of an average of quantization.bits",
    )

    @property
    def allocates_by(self) -> Literal["slimllm", "uniform", "block", "model", "file"]:
        """How widths are found; `file` reads them from `allocation`."""
        match self.allocation:
            case None:
                return "uniform" if self.method in ("rtn", "gptq") else "slimllm"
            case "slimllm" | "uniform" | "block" | "model":
                return self.allocation
        return "file"

    @property
    def trains(self) -> bool:
        """Whether blocks are trained after their calibration."""
        return self.method in ("slimllm_plus", "qat")

    @model_validator(mode="after")
    def _consistent(self) -> QuantizationSection:
        if self.allocates_by == "slimllm" and not 2 <= self.bits <= 7:
            raise ValueError(
                f"quantization.bits: expected 2 to 7 with quantization.allocation=slimllm, got {self.bits}, because "
                "groups get bits-1 to bits+1 and the packed format holds 1 to 8"
            )
        if self.error_propagation and self.method == "rtn":
            raise ValueError("quantization.error_propagation: rounding to nearest reads no inputs; give another method")
        rising = sorted(set(self.widths)) == self.widths and len(self.widths) > 1
        if not rising or not all(1 <= width <= 8 for width in self.widths):
            raise ValueError(f"quantization.widths: expected two or more rising widths from 1 to 8, got {self.widths}")
        by_sensitivity = self.allocates_by in ("block", "model")
        if by_sensitivity and self.size_bytes is None and not self.widths[0] <= self.bits <= self.widths[-1]:
            raise ValueError(
                f"quantization.bits: no average of {self.bits} can be made of quantization.widths={self.widths}; "
                f"give {self.widths[0]} to {self.widths[-1]}, or other widths"
            )
        if self.per_layer and self.allocates_by in ("slimllm", "file"):
            raise ValueError(
                "quantization.per_layer: needs quantization.allocation=model, block or uniform; "
                f"{'a file' if self.allocates_by == 'file' else 'slimllm'} gives each group a width"
            )
        if self.size_bytes is not None and self.allocates_by != "model":
            raise ValueError("quantization.size_bytes: needs quantization.allocation=model")
        if not by_sensitivity and self.widths != type(self).model_fields["widths"].default:
            raise ValueError(
                f"quantization.widths: only quantization.allocation=block and model choose from them, not "
                f"{self.allocation or self.allocates_by}; leave them out, or set quantization.allocation"
            )
        return self


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
    start: Literal["calibrated", "nearest"] = Field(
        "calibrated",
        description="where method=qat starts: at the calibrated integers, or at those nearest to the weights on the "
        "calibrated grid",
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

    epochs: int = Field(0, ge=0, description="passes over the calibration windows; 0 leaves this stage out")
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

    @model_validator(mode="after")
    def _something_to_learn(self) -> EndToEndSection:
        if self.epochs and not (self.next_token or self.distillation or self.hidden_states):
            raise ValueError(
                "end_to_end.distillation: nothing is left to learn from when it, end_to_end.next_token and "
                "end_to_end.hidden_states are all 0; give one of them a weight, or end_to_end.epochs=0"
            )
        return self


class TrainerSection(Section):
    """Where and how Lightning's Trainer runs."""

    accelerator: Literal["auto", "cpu", "cuda", "gpu"] = Field(
        "auto", description="processor to run on; gpu means cuda"
    )
    devices: int = Field(1, ge=1, description="processes (one per GPU) on each node")
    num_nodes: int = Field(1, ge=1, description="machines")
    strategy: Literal["auto", "ddp", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3"] = Field(
        "auto", description="how several devices share the training"
    )
    offload: Literal["none", "optimizer", "parameters"] = Field(
        "none",
        description="what DeepSpeed keeps in main memory instead of on the GPU: nothing, the optimizer (any stage), or "
        "the optimizer and the parameters (stage 3)",
    )
    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed"] = Field(
        "auto",
        description="precision of arithmetic; auto is bf16-mixed on devices that are faster in bfloat16, else 16-mixed "
        "on a GPU and 32-true on a CPU",
    )
    logger: list[Literal["tensorboard", "csv", "wandb", "mlflow"]] = Field(
        ["tensorboard", "csv"],
        min_length=1,
        description="where losses and learning rates of the trainings go; report.html draws its curves from csv",
    )
    checkpoint_seconds: int = Field(
        120, ge=0, description="training time between two checkpoints of a block; there is also one each epoch"
    )

    @field_validator("offload")
    @classmethod
    def _stage_that_offloads(cls, offload: str, info: ValidationInfo) -> str:
        able = [f"deepspeed_stage_{stage}" for stage in (1, 2, 3)][2 if offload == "parameters" else 0 :]
        strategy = info.data.get("strategy")
        if offload != "none" and strategy is not None and strategy not in able:
            raise ValueError(f"{offload} needs trainer.strategy={' or '.join(able)}, got {strategy}")
        return offload


class ResumeSection(Section):
    """What to do with a run_dir that already holds something; `resume=VALUE` sets `resume.start`."""

    shorthand = "start"
    start: str = Field(
        "auto",
        min_length=1,
        description="auto goes on from the newest intact state in run_dir; never refuses a used run_dir; "
        "or the last.ckpt of the block in training; resume=VALUE for short",
    )
    force: bool = Field(False, description="go on although run_dir was made with another recipe, model or text")


class Recipe(Section):
    """All keys of one run, each with a value."""

    model: ModelSection
    data: DataSection = DataSection()
    quantization: QuantizationSection
    training: TrainingSection = TrainingSection()
    end_to_end: EndToEndSection = EndToEndSection()
    evaluation: EvaluationSection = EvaluationSection()
    trainer: TrainerSection = TrainerSection()
    run_dir: str = Field(
        min_length=1, description="folder for all that the run writes; runs/NAME if the recipe sets none"
    )
    resume: ResumeSection = ResumeSection()
    seed: int = Field(0, ge=0, lt=2**32, description="seed of the windows and of training")
    dry_run: bool = Field(False, description="print the plan and sizes without loading weights, then stop")

    @property
    def measures_sensitivity(self) -> bool:
        """Whether the whole model is run backwards, for the widths of all blocks or the salience of their outputs."""
        salient_channels = self.quantization.trains and self.training.loss.salient_channels
        return salient_channels or self.quantization.allocates_by == "model"

    @property
    def evaluation_texts(self) -> dict[str, EvaluationTextSection]:
        """Key of the recipe → text that perplexity is measured on; the first is that of data.evaluation."""
        first = self.data.evaluation
        further = {f"evaluation.texts.{index}": text.after(first) for index, text in enumerate(self.evaluation.texts)}
        return {"data.evaluation": first} | further

    @model_validator(mode="after")
    def _windows_without_gaps(self) -> Recipe:
        for key, text in self.evaluation_texts.items():
            if text.stride is not None and text.stride > text.sequence_length:
                raise ValueError(
                    f"{key}.stride: {text.stride} leaves gaps between windows of {text.sequence_length} tokens; "
                    f"give at most {text.sequence_length}"
                )
        return self

    @model_validator(mode="after")
    def _optimizer_that_can_be_sharded(self) -> Recipe:
        sharded = self.trainer.strategy.startswith("deepspeed")
        for key, training in (("training", self.training), ("end_to_end", self.end_to_end)):
            if sharded and training.optimizer == "adamw_8bit":
                raise ValueError(
                    f"{key}.optimizer: DeepSpeed cannot shard the moments of adamw_8bit; give adamw, whose moments it "
                    "shards, or trainer.strategy=ddp"
                )
        return self


def to_yaml(recipe: Recipe) -> str:
    """Return the whole recipe as YAML, from which `recipe=FILE` makes an equal recipe."""
    return yaml.safe_dump(recipe.model_dump(), sort_keys=False, allow_unicode=True)


def flatten(recipe: Recipe) -> dict[str, Any]:
    """Return the value of every key by the key's dotted path."""
    flat: dict[str, Any] = {}
    for key in keys():
        value: Any = recipe
        for part in key.split("."):
            value = getattr(value, part)
        flat[key] = value
    return flat


def keys(section: type[BaseModel] = Recipe, prefix: str = "") -> dict[str, FieldInfo]:
    """Return the field of every key by the key's dotted path, in the order of the models.

    Args:
        section: the model to list.
        prefix: start of the dotted paths.
    """
    found: dict[str, FieldInfo] = {}
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found |= keys(field.annotation, f"{prefix}{name}.")
        else:
            found[prefix + name] = field
    return found
