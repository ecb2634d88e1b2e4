"""The parts of a recipe that say what the full-precision and the quantized model are measured on."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from slimplus.recipe.section import Section

PROMPTS = (
    "The history of the city begins",
    "Water boils when",
    "def fibonacci(n):",
    "Three reasons to learn a language are",
)
"""What models answer unless the recipe has prompts of its own."""

Bos = Literal["auto", "never", "window"]


class EvaluationTextSection(Section):
    """The first text that perplexity is measured on."""

    shorthand = "path"
    path: str = Field(
        "offline", min_length=1, description="text for perplexity; the choices of data.calibration.path but self"
    )
    column: str | None = Field(None, min_length=1, description="column that holds the text; as data.calibration.column")
    sequence_length: int = Field(2048, ge=2, description="tokens in an evaluation window (the context length)")
    windows: int = Field(16, ge=1, description="evaluation windows at most, taken from the start of the text")
    stride: int | None = Field(
        None,
        ge=1,
        description="tokens from the start of a window to the next; of all windows but the first only the last so many "
        "tokens count; null puts them side by side",
    )
    bos: Bos = Field(
        "auto",
        description="where the beginning-of-text token stands in evaluation text: at its beginning if the tokenizer "
        "puts it there, nowhere, or at the beginning of each window",
    )


class FurtherTextSection(Section):
    """A further text; a key that is null has the value that it has for the first text."""

    shorthand = "path"
    path: str = Field(min_length=1)
    column: str | None = Field(None, min_length=1)
    sequence_length: int | None = Field(None, ge=2)
    windows: int | None = Field(None, ge=1)
    stride: int | None = Field(None, ge=1)
    bos: Bos | None = None

    def after(self, first: EvaluationTextSection) -> EvaluationTextSection:
        """Return this text with the first one's values for the keys that are null."""
        own = {key: value for key, value in self.model_dump().items() if value is not None}
        return EvaluationTextSection(**(first.model_dump(exclude={"column"}) | own))


class EvaluationSection(Section):
    """What both models are measured on, besides the text of data.evaluation."""

    texts: list[FurtherTextSection] = Field(
        [],
        description="further texts for perplexity and divergence: paths as for data.calibration.path, or mappings such "
        "as {path: code.jsonl, column: content, windows: 8, stride: 512}; what one leaves out is as in data.evaluation",
    )

    tasks: list[str] = Field(
        [],
        description="tasks of lm-eval: paper (piqa, arc_easy, arc_challenge, boolq, hellaswag and winogrande), mmlu, "
        "gsm8k or any other name; .yaml task files, or folders of them",
    )
    num_fewshot: int | None = Field(
        None, ge=0, description="examples in a task's prompt; null is each task's own number"
    )
    limit: int | None = Field(None, ge=1, description="examples of each task at most; null asks all")
    batch_size: int = Field(8, ge=1, description="examples of a task that run at once")
    prompts: list[str] = Field(
        list(PROMPTS), description="what both models answer, to see that they write sense; [] leaves this out"
    )
    new_tokens: int = Field(32, ge=8, description="tokens of an answer at most")

    @field_validator("texts")
    @classmethod
    def _distinct(cls, texts: list[FurtherTextSection]) -> list[FurtherTextSection]:
        if len(set(texts)) < len(texts):
            raise ValueError("a text stands twice in the list; leave one out")
        return texts
