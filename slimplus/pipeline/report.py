"""What a run says at its end: the summary, and the model card of the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slimplus.pipeline.job import Job
from slimplus.utils.units import gigabytes

Metrics = Mapping[str, Any]


def results_table(metrics: Metrics) -> list[tuple[str, str]]:
    """Rows of name and value."""
    perplexity, evaluation = metrics["perplexity"], metrics["evaluation"]
    return [
        ("method", metrics["method"]),
        (
            f"perplexity ({evaluation['text']}, {evaluation['windows']} windows of {evaluation['sequence_length']})",
            f"{perplexity['full']:.2f} full precision, {perplexity['quantized']:.2f} quantized",
        ),
        ("average bits", f"{metrics['average_bits']:.3f}"),
        ("bits per weight, all that is stored", f"{metrics['bits_per_weight']:.3f}"),
        *_outer_row(metrics),
        (
            "checkpoint",
            f"{gigabytes(metrics['size_bytes'])}, {metrics['compression']:.2f} times smaller than at 16 bit",
        ),
        ("peak memory", gigabytes(metrics["peak_memory_bytes"])),
        ("time", ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in metrics["seconds"].items())),
    ]


def _outer_row(metrics: Metrics) -> list[tuple[str, str]]:
    bits = ", ".join(f"{name} {bits} bits" for name, bits in metrics["outer_bits"].items())
    return [("packed outside the blocks", f"{bits}: {gigabytes(metrics['outer_bytes'])}")] if bits else []


def summary(metrics: Metrics, packed: str, sentence: str) -> str:
    """Plain text: the results, where they are, and a sample of what the model writes."""
    rows = results_table(metrics)
    width = max(len(name) for name, _ in rows)
    table = "\n".join(f"{name:<{width}}  {value}" for name, value in [*rows, *_events(metrics)])
    return f"{table}\n\nThe packed checkpoint is in {packed}. It writes:\n\n    {sentence}\n"


def _events(metrics: Metrics) -> list[tuple[str, str]]:
    """What went wrong and was put right: in the run, block by block, in training end to end."""
    run = [("note", event) for event in metrics["events"]]
    whole = [("end to end", event) for event in metrics.get("end_to_end", {}).get("events", ())]
    blocks = enumerate(metrics["blocks"])
    return [*run, *[(f"block {index}", event) for index, record in blocks for event in record["events"]], *whole]


FIGURES = "<!-- figures -->"


def model_card(source: str, bits: float, recipe: str) -> str:
    """README.md of a packed checkpoint; `with_figures` completes it once perplexity has been measured."""
    return f"""---
library_name: transformers
tags:
- slimplus
- quantized
---

# {source}, {round(bits, 2):g} bits on average

The weights of the transformer blocks are quantized in groups of mixed precision, with
[SliM-LLM](https://arxiv.org/abs/2405.14917)'s salience-driven allocation where the method below says so, and packed by
slimplus.

```python
import slimplus  # without this import transformers gives random linear layers
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("PATH")
```

{FIGURES}

## Recipe

```yaml
{recipe}```
"""


def with_figures(card: str, metrics: Metrics) -> str:
    """A model card with the table of results in it."""
    rows = "\n".join(f"| {name} | {value} |" for name, value in results_table(metrics))
    return card.replace(FIGURES, f"| | |\n|---|---|\n{rows}")


def finish(job: Job) -> str | None:
    """Write the summary, and the figures into the model card.

    Returns:
        The summary on the first rank, None on the others.
    """
    job.fabric.barrier()  # the end of the first process is the end of all
    if not job.fabric.is_global_zero:
        return None
    text = summary(job.metrics, str(job.run.packed), job.metrics["sentence"])
    job.run.write("summary.txt", text)
    card = (job.run.packed / "README.md").read_text()
    job.run.write("packed/README.md", with_figures(card, job.metrics))
    return text
