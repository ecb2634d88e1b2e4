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
from slimplus.recipe.training import ENOUGH_STEPS, EndToEndSection, TrainingSection


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
    def training_start(self) -> Literal["calibrated", "nearest"]:
        """Where the training of a block starts, see `training.start`."""
        training = self.training
        if training.start != "auto":
            return training.start
        steps = training.epochs * self.data.samples // training.batch_size
        return "nearest" if training.parametrization == "rounding" and steps >= ENOUGH_STEPS else "calibrated"

    @property
    def end_to_end_windows(self) -> int:
        """Number of windows that the end-to-end stage trains on."""
        if self.end_to_end.tokens is None:
            return self.data.samples
        step = self.end_to_end.batch_size
        return self.end_to_end.tokens // (self.data.sequence_length * step) * step

    @property
    def of_end_to_end(self) -> Recipe | None:
        """The recipe with the end-to-end stage's windows as `data.samples`; None if they are those of the blocks."""
        if self.end_to_end.tokens is None:
            return None
        return self.model_copy(update={"data": self.data.model_copy(update={"samples": self.end_to_end_windows})})

    @property
    def evaluation_texts(self) -> dict[str, EvaluationTextSection]:
        """Key of the recipe → text that perplexity is measured on; the first is that of data.evaluation."""
        first = self.data.evaluation
        further = {f"evaluation.texts.{index}": text.after(first) for index, text in enumerate(self.evaluation.texts)}
        return {"data.evaluation": first} | further

    @model_validator(mode="after")
    def _windows_without_gaps(self) -> Recipe:
        for key, text in self.evaluation_texts.items():
            longest = text.sequence_length - (text.bos == "window")
            if text.stride is not None and text.stride > longest:
                raise ValueError(
                    f"{key}.stride: {text.stride} leaves gaps between windows of {longest} tokens of the text; give at "
                    f"most {longest}"
                )
        return self

    @model_validator(mode="after")
    def _tokens_for_a_step(self) -> Recipe:
        step = self.end_to_end.batch_size * self.data.sequence_length
        if not self.end_to_end_windows:
            raise ValueError(
                f"end_to_end.tokens: {self.end_to_end.tokens} tokens are less than a step of {step} "
                f"(end_to_end.batch_size windows of data.sequence_length tokens); give at least {step}"
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
