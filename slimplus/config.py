"""The recipe: all that one run does, as frozen and strict pydantic models.

Imports only the standard library, pydantic and PyYAML, as `slimplus.reading` does, which makes a Recipe of a command
line: every error found there comes before PyTorch is loaded.
"""

from __future__ import annotations

import contextlib
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo

from slimplus.errors import InputError


class RecipeError(InputError):
    """A recipe that cannot run: one sentence a line, each naming the key or the file and the remedy."""


def _number(value: object) -> object:
    """YAML 1.1 reads `1e-3`, which has no dot, as text: take it for the number it is."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return float(value)
    return value


Number = Annotated[float, BeforeValidator(_number)]


class Section(BaseModel):
    """Base of every part of a recipe: frozen, no unknown keys, no silent conversions.

    Attributes:
        shorthand: the key that a plain value in the place of the section sets.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
    shorthand: ClassVar[str | None] = None

    @model_validator(mode="before")
    @classmethod
    def _expand(cls, value: object) -> object:
        return value if cls.shorthand is None or isinstance(value, (dict, Section)) else {cls.shorthand: value}


class ModelConfig(Section):
    """The model to quantize."""

    path: str = Field(min_length=1, description="hub id org/name, local folder, or package:NAME for a package's folder")
    gguf_file: str | None = Field(None, min_length=1, description="GGUF file inside that folder or hub repository")
    dtype: Literal["auto", "float16", "bfloat16", "float32"] = Field(
        "auto", description="dtype of the loaded weights; auto is the stored one"
    )
    config: dict[str, Any] | None = Field(
        None,
        description="architecture values over the transformers defaults, with model_type; "
        "used by dry_run so that it needs no network",
    )
    trust_remote_code: bool = Field(False, description="let a hub repository run its own Python code")


class CalibrationText(Section):
    """What the model reads while it is quantized."""

    path: str = Field(
        "offline", min_length=1, description="offline, wikitext2, c4, ptb, or a .txt, .jsonl or .parquet file"
    )


class EvaluationText(Section):
    """What perplexity is measured on."""

    path: str = Field("offline", min_length=1, description="text for perplexity; same choices as data.calibration.path")
    sequence_length: int = Field(2048, ge=2, description="tokens in an evaluation window (the context length)")
    windows: int = Field(16, ge=1, description="evaluation windows at most, taken from the start of the text")


class DataConfig(Section):
    """Texts, cut into windows of tokens."""

    calibration: CalibrationText = CalibrationText()
    evaluation: EvaluationText = EvaluationText()
    samples: int = Field(128, ge=1, description="calibration windows")
    sequence_length: int = Field(2048, ge=2, description="tokens in a calibration window")


class QuantizationConfig(Section):
    """How weights become integers."""

    method: Literal["rtn", "gptq", "slimllm", "slimllm_plus"] = Field(
        description="round to nearest, GPTQ, SliM-LLM (gradient-free), SliM-LLM+ (trained)"
    )
    bits: int = Field(ge=1, le=8, description="average bits per weight, met exactly")
    group_size: Literal[16, 32, 64, 128, 256, 512, 1024] = Field(
        128, description="columns sharing a bit width; the packed format stores 16 a container"
    )
    embedding_bits: int | None = Field(
        None, ge=1, le=8, description="bits of the token embedding, and of a head tied to it; null leaves 16 bits"
    )
    head_bits: int | None = Field(
        None,
        ge=1,
        le=8,
        description="bits of the output head; null leaves 16 bits; "
        "where it is tied to the embedding, needs embedding_bits, and the two are then stored apart",
    )
    percdamp: Number = Field(0.01, gt=0, le=1, description="Hessian damping, as a part of the mean of its diagonal")
    allocation: str | None = Field(
        None,
        min_length=1,
        description="allocation.json of another run, imported instead of searching for bits",
    )

    @field_validator("bits")
    @classmethod
    def _mixed_bits(cls, bits: int, info: ValidationInfo) -> int:
        method = info.data.get("method")
        if method in ("slimllm", "slimllm_plus") and not 2 <= bits <= 7:
            raise ValueError(
                f"expected 2 to 7 with quantization.method={method}, got {bits}, because its groups get "
                "bits-1 to bits+1 and the packed format holds 1 to 8"
            )
        return bits


class TrainingConfig(Section):
    """Block reconstruction; only quantization.method=slimllm_plus trains."""

    epochs: int = Field(8, ge=1, description="passes over the calibration windows for each block")
    batch_size: int = Field(
        1, ge=1, description="windows per step, of all devices together; a multiple of their number"
    )
    learning_rate: Number = Field(
        0.01, gt=0, description="AdamW learning rate of the ends of each grid, in steps of its scale"
    )
    weight_decay: Number = Field(0.0, ge=0, description="AdamW weight decay")
    accumulate_grad_batches: int = Field(
        1, ge=1, description="parts in which a device takes its share of a step, to save memory"
    )


class TrainerConfig(Section):
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
        "auto", description="training precision; auto is bf16-mixed where that is the faster"
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


class ResumeConfig(Section):
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
    """One run, resolved: what `slimplus.pipeline.run` takes."""

    model: ModelConfig
    data: DataConfig = DataConfig()
    quantization: QuantizationConfig
    training: TrainingConfig = TrainingConfig()
    trainer: TrainerConfig = TrainerConfig()
    run_dir: str = Field(
        min_length=1, description="folder for all that the run writes; runs/NAME if the recipe sets none"
    )
    resume: ResumeConfig = ResumeConfig()
    seed: int = Field(0, ge=0, description="seed of the windows and of training")
    dry_run: bool = Field(False, description="print the plan and sizes without loading weights, then stop")


def to_yaml(recipe: Recipe) -> str:
    """The whole recipe as YAML; `recipe=FILE` with that text gives an equal Recipe."""
    return yaml.safe_dump(recipe.model_dump(), sort_keys=False, allow_unicode=True)


def flatten(recipe: Recipe) -> dict[str, Any]:
    """Every key by its dotted path, with its value."""
    flat: dict[str, Any] = {}
    for key in keys():
        value: Any = recipe
        for part in key.split("."):
            value = getattr(value, part)
        flat[key] = value
    return flat


def keys(section: type[BaseModel] = Recipe, prefix: str = "") -> dict[str, FieldInfo]:
    """Every settable key by its dotted path, in the order of the models."""
    found: dict[str, FieldInfo] = {}
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found |= keys(field.annotation, f"{prefix}{name}.")
        else:
            found[prefix + name] = field
    return found
