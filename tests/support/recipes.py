"""Keys of small runs."""

from __future__ import annotations

from collections.abc import Callable

Arguments = Callable[..., list[str]]
"""The fixture `arguments`: `arguments(run_dir, *overrides)` of a small run."""

SMALL = (
    # The paper's method in place of the demo's.
    "quantization.method=slimllm_plus",
    "quantization.allocation=null",
    "training.learning_rate=2.0e-2",
    "end_to_end.epochs=0",
    "model.gguf_file=null",
    "model.dtype=auto",
    "data.samples=8",
    "data.sequence_length=32",
    "data.evaluation.sequence_length=64",
    "data.evaluation.windows=2",
    "evaluation.prompts=[]",
    "quantization.group_size=16",
    "training.epochs=2",
    "trainer.precision=32-true",
)
QAT = ("quantization.method=qat", "training.epochs=12")
TUNED = (*QAT, "end_to_end.epochs=3", "end_to_end.batch_size=2")
