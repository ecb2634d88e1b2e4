"""The parts of a recipe that say what goes in: the model and the texts."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from slimplus.data.text import SELF, share_samples
from slimplus.recipe.evaluation import EvaluationTextSection
from slimplus.recipe.section import Number, Section


class ModelSection(Section):
    """The model to quantize."""

    path: str = Field(min_length=1, description="hub id org/name, local folder, or package:NAME for a package's folder")
    gguf_file: str | None = Field(None, min_length=1, description="GGUF file inside that folder or hub repository")
    revision: str | None = Field(
        None, min_length=1, description="branch, tag or commit of a hub repository; its main branch if not given"
    )
    dtype: Literal["auto", "float16", "bfloat16", "float32"] = Field(
        "auto", description="dtype of the loaded weights; auto is the stored one"
    )
    config: dict[str, Any] | None = Field(
        None,
        description="architecture values over the transformers defaults, with model_type; "
        "used by dry_run so that it needs no network",
    )
    trust_remote_code: bool = Field(False, description="let a hub repository run its own Python code")
    allow_unpacked: bool = Field(
        False, description="go on where less than 90% of the weights in the blocks can be packed, as with experts"
    )


class TextSource(Section):
    """One text of a mix."""

    shorthand = "path"
    path: str = Field(min_length=1, description="same choices as data.calibration.path")
    weight: Number = Field(1.0, gt=0, le=1e6, description="share of the windows, in relation to the other weights")
    column: str | None = Field(None, min_length=1, description="column that holds the text; null is that of the mix")


class CalibrationSection(Section):
    """What the model reads while it is quantized."""

    shorthand = "path"
    path: Annotated[str, Field(min_length=1)] | Annotated[list[TextSource], Field(min_length=1)] = Field(
        "offline",
        description="offline; wikitext2, c4, ptb, pile, fineweb, redpajama, slimpajama, the-stack-smol or ultrachat; a "
        ".txt, .jsonl, .json, .csv or .parquet file, or a folder of them; self, text that the model writes, see "
        "data.generation; or a list that shares the windows, such as [{path: c4, weight: 3}, {path: code.jsonl, "
        "column: content}]; data.calibration=VALUE for short",
    )
    column: str | None = Field(
        None,
        min_length=1,
        description="column that holds the text; null is text, messages or conversations",
    )

    @property
    def sources(self) -> list[TextSource]:
        """The texts of the mix, each with its column; a single text is a mix of one."""
        given = [TextSource(path=self.path)] if isinstance(self.path, str) else self.path
        return [source.model_copy(update={"column": source.column or self.column}) for source in given]

    @model_validator(mode="after")
    def _one_self(self) -> CalibrationSection:
        if [source.path for source in self.sources].count(SELF) > 1:
            raise ValueError(f"data.calibration: {SELF} stands twice in the list; give it once, with the summed weight")
        return self


class GenerationSection(Section):
    """How the model writes calibration text, with data.calibration=self: windows of data.sequence_length tokens."""

    prompts: str | None = Field(
        None,
        min_length=1,
        description="beginnings of the windows: a text as in data.calibration.path, of which each row, or each line of "
        "a .txt, is one; null is the beginning-of-text token alone",
    )
    prefix_tokens: int | None = Field(
        None, ge=1, description="continue so many tokens from anywhere in the text of prompts, instead of its rows"
    )
    chat: bool = Field(
        False,
        description="put each prompt into the tokenizer's chat template as the user's message; without prompts the "
        "model writes that message too",
    )
    temperature: Number = Field(1.0, gt=0, description="temperature of the draws")
    seed: int = Field(0, ge=0, lt=2**32, description="seed of the draws")
    batch_size: int = Field(8, ge=1, description="windows written at once; another number draws other text")

    @model_validator(mode="after")
    def _prefixes_of_a_text(self) -> GenerationSection:
        if self.prefix_tokens is not None and (self.prompts is None or self.chat):
            need = "data.generation.chat=false" if self.chat else "a text to continue in data.generation.prompts"
            raise ValueError(f"data.generation.prefix_tokens: needs {need}")
        if self.prompts == SELF:
            raise ValueError(
                f"data.generation.prompts: {SELF} is the text that begins with them; give another text, or leave it out"
            )
        return self


class DataSection(Section):
    """Texts, cut into windows of tokens."""

    calibration: CalibrationSection = CalibrationSection()
    generation: GenerationSection = GenerationSection()
    evaluation: EvaluationTextSection = EvaluationTextSection()
    samples: int = Field(128, ge=1, description="calibration windows")
    sequence_length: int = Field(2048, ge=2, description="tokens in a calibration window")
    bos: Literal["auto", "never", "document", "window"] = Field(
        "auto",
        description="where the beginning-of-text token stands in calibration text: at its beginning if the tokenizer "
        "puts it there, nowhere, before each document, or at the beginning of each window",
    )
    separator: str | None = Field(
        None,
        description="text between calibration documents; eos is the tokenizer's end-of-text token; null is the text's "
        "own: an empty line, a space for c4 and ptb, nothing between chats",
    )
    cache_gigabytes: Number | None = Field(
        None,
        ge=0,
        description="gigabytes of a machine's main memory for the blocks' inputs of all windows; what goes beyond lies "
        "in files, which end with the run; null keeps all in main memory",
    )
    cache_dir: str | None = Field(
        None, min_length=1, description="folder of these files, best on a local disk; null is run_dir"
    )

    @property
    def shares(self) -> list[tuple[TextSource, int]]:
        """Each calibration text, and the number of its windows."""
        sources = self.calibration.sources
        return list(zip(sources, share_samples(self.samples, [each.weight for each in sources]), strict=True))

    @model_validator(mode="after")
    def _text_to_generate(self) -> DataSection:
        generation = self.generation
        if generation != GenerationSection() and all(source.path != SELF for source in self.calibration.sources):
            raise ValueError(f"data.generation: only data.calibration={SELF} reads it; leave it out")
        if generation.prefix_tokens is not None and generation.prefix_tokens >= self.sequence_length:
            raise ValueError(
                f"data.generation.prefix_tokens: {generation.prefix_tokens} tokens leave none to write of "
                f"data.sequence_length={self.sequence_length}; give fewer"
            )
        return self
