"""What the stages of a running job share."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from lightning.fabric import Fabric
from torch import Tensor
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from slimplus.blockwise.quantizer import BlockQuantizer
from slimplus.data.windows import Windows
from slimplus.distributed.preemption import Preemption
from slimplus.distributed.ranks import Ranks
from slimplus.evaluation.tasks import LoadedTasks
from slimplus.evaluation.texts import EvaluationText
from slimplus.models.block_loading import open_model
from slimplus.models.loading import ModelSource
from slimplus.models.streaming import BlockRunner, StreamedModel
from slimplus.quantization.linear import QuantizationConfig
from slimplus.recipe.schema import Recipe
from slimplus.run_dir.directory import Record, RunDirectory
from slimplus.run_dir.metrics import Metrics
from slimplus.utils.progress import Progress


@dataclass
class Job:
    """One start of a run, made by `prepare`.

    Attributes:
        recipe: the resolved recipe.
        run: the run directory.
        fabric: the processes of the job.
        ranks: the collective operations among these processes.
        preemption: the handler of this process's signals.
        runner: the runner of blocks on this process's device.
        source: where the full-precision model comes from.
        tokenizer: the model's tokenizer.
        calibration: windows that blocks are calibrated and trained on.
        end_to_end: windows that the whole model is trained on.
        evaluation_texts: texts that perplexity is measured on; the first is that of data.evaluation.
        tasks: tasks of lm-eval on the first process, if the recipe has any.
        settings: how weights are quantized.
        quantizer: the quantizer of one block after the other.
        block_names: names of the blocks in the model.
        embedding_and_head_bits: name → bits of the layers outside the blocks that get packed.
        metrics: the content of metrics.json.
        progress: what is shown of the work while it runs.
        allocation: layer → widths of its groups, imported or found for the whole model; None if each block finds them.
        channels: salience of each block's output channels, `[blocks, hidden]`, if it was measured.
        tuned: tensors that the end-to-end stage trained, by their names in the packed model, if it ran.
    """

    recipe: Recipe
    run: RunDirectory
    fabric: Fabric
    ranks: Ranks
    preemption: Preemption
    runner: BlockRunner
    source: ModelSource
    tokenizer: PreTrainedTokenizerBase
    calibration: Windows
    end_to_end: Windows
    evaluation_texts: list[EvaluationText]
    tasks: LoadedTasks | None
    settings: QuantizationConfig
    quantizer: BlockQuantizer
    block_names: list[str]
    embedding_and_head_bits: dict[str, int]
    metrics: Metrics
    progress: Progress
    allocation: dict[str, list[int]] | None = None
    channels: Tensor | None = None
    tuned: dict[str, Tensor] | None = None

    @cached_property
    def model(self) -> StreamedModel:
        """The full-precision model, loaded when a stage first asks for it."""
        model, load_block = open_model(self.source)
        return StreamedModel(model, self.runner, load_block)

    def release_model(self) -> None:
        """Free the full-precision model."""
        self.__dict__.pop("model", None)

    def shard(self, tokens: Tensor) -> Tensor:
        """Return this rank's share of windows `[windows, sequence_length]`."""
        return tokens[self.ranks.rank :: self.ranks.count]

    def finished_block(self, index: int) -> tuple[dict[str, Tensor], Record]:
        """Return the packed tensors of a finished block as they are exported, and its record."""
        tensors, record = self.run.load_block(index)
        prefix = f"{self.block_names[index]}."
        tuned = self.tuned or {}
        return tensors | {key: tuned[prefix + key] for key in tensors if prefix + key in tuned}, record

    def forget_checkpoint(self) -> None:
        """Drop the packed checkpoint and its figures, because what it was made from is about to change."""
        for key in ("size_bytes", "sentence"):
            self.metrics.pop(key, None)
        for figures in (self.metrics, *self.metrics["texts"]):
            figures["perplexity"].pop("quantized", None)
            figures.pop("divergence", None)
        for asked in (self.metrics.get("generation", {}), self.metrics.get("tasks", {"scores": {}})["scores"]):
            asked.pop("quantized", None)
        self.metrics.save()
        if self.fabric.is_global_zero:
            self.run.manifest.forget(self.run.packed)
