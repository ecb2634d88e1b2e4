"""The model card of a packed checkpoint, with its figures in the hub's `model-index` form."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from slimplus.data.hub import HUB_SOURCES
from slimplus.evaluation.tables import describe_windows
from slimplus.hub.push import PLACE
from slimplus.recipe.schema import Recipe, to_yaml

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
TEXT_METRICS = {
    "perplexity": ("perplexity", "Perplexity"),
    "kl_mean": ("kl_divergence", "KL divergence from the full-precision model, mean"),
    "top_token_agreement": ("accuracy", "Same top token as the full-precision model"),
}
"""Figure of a text → type and name of the metric on the hub."""


def model_card(
    recipe: Recipe, loader: str, bits: float, share: float, metrics: Mapping[str, Any], results: str = ""
) -> str:
    """Return README.md of a packed checkpoint.

    Args:
        recipe: the resolved recipe.
        loader: name of the auto class that loads the model.
        bits: average width of a packed weight in the blocks.
        share: share of the weights in the blocks that is packed.
        metrics: the content of metrics.json; what is measured so far goes into the card's metadata.
        results: the results as Markdown, once they are measured.
    """
    source = recipe.model.path
    model = Path(recipe.model.gguf_file).stem if recipe.model.gguf_file else Path(source).name
    name = f"{model}, {round(bits, 2):g} bits on average"
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=source if HUB_ID.fullmatch(source) and not Path(source).exists() else None,
        tags=["slimplus", "quantized"],
        model_name=name,
        eval_results=list(evaluation_results(metrics)) or None,
    )
    return f"""---
{data.to_yaml()}
---

# {name}

{share:.1%} of the weights of the transformer blocks are quantized in groups of columns by the method
`{recipe.quantization.method}`, with widths by `{recipe.quantization.allocates_by}`, and packed by slimplus, which
builds on [SliM-LLM](https://arxiv.org/abs/2405.14917).

## Use

slimplus has to be installed: transformers does not know the format by itself. It would warn that some weights are newly
initialized, and answer with random linear layers.

```python
from transformers import {loader}, AutoTokenizer

model = {loader}.from_pretrained("{PLACE}", device_map="auto")
tokenizer = AutoTokenizer.from_pretrained("{PLACE}")
```

```bash
slimplus generate {PLACE} "Once upon a time"     # slimplus's own command
vllm serve {PLACE}                               # vLLM, with slimplus installed beside it
slimplus export {PLACE} --to gguf model.gguf     # for llama.cpp and Ollama
llama-cli -m model.gguf -p "Once upon a time"
```

## Results

{results}

## Recipe

```yaml
{to_yaml(recipe)}```
"""


def evaluation_results(metrics: Mapping[str, Any]) -> Iterator[EvalResult]:
    """Yield the figures of the quantized model that are measured, as the hub's metadata takes them.

    Args:
        metrics: the content of metrics.json.
    """
    for row in metrics.get("texts", ()):
        values = {"perplexity": row["perplexity"].get("quantized"), **row.get("divergence", {})}
        for key, (metric, name) in TEXT_METRICS.items():
            if (value := values.get(key)) is not None and math.isfinite(value):
                dataset = f"{_name(row['text'])}, {describe_windows(row)}"
                yield _result(dataset_type(row["text"]), dataset, metric, name, value)
    for row in metrics.get("tasks", {"scores": {}})["scores"].get("quantized", ()):
        if row["part_of"] is None and math.isfinite(row["value"]):
            shots = "" if row["num_fewshot"] is None else f", {row['num_fewshot']}-shot"
            name = f"{row['metric']} (lm-eval)"
            yield _result(row["task"], row["task"] + shots, row["metric"], name, row["value"])


def _result(dataset_type: str, dataset: str, metric: str, name: str, value: float) -> EvalResult:
    """Return one figure in the hub's form."""
    return EvalResult(
        task_type="text-generation",
        dataset_type=dataset_type,
        dataset_name=dataset,
        metric_type=metric,
        metric_name=name,
        metric_value=value,
    )


def dataset_type(text: str) -> str:
    """Return the hub's repository of a text, or the name of a local one: its folder is nobody's business."""
    return HUB_SOURCES[text].repository if text in HUB_SOURCES else _name(text)


def _name(text: str) -> str:
    return text if text in HUB_SOURCES else Path(text).name
