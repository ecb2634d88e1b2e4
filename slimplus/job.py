"""What a running job holds: its directory, processes, texts, model, and figures."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric import Fabric
from torch import Tensor
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from slimplus.allocation_file import average_bits
from slimplus.assembly import block_quantizer
from slimplus.config import Recipe, to_yaml
from slimplus.data.text import load_text
from slimplus.data.windows import Windows, calibration_windows, evaluation_windows
from slimplus.errors import InputError, first_line
from slimplus.fingerprint import differences, fingerprint, library_versions
from slimplus.layout import PackedLayout
from slimplus.machine import peak_resident_bytes
from slimplus.models.architectures import (
    blocks_path,
    find_blocks,
    find_linears,
    following_norm,
    outer_bits,
    quantized_linears,
)
from slimplus.models.loading import ModelSource, build_on_meta
from slimplus.models.precision import resolve_precision
from slimplus.models.streaming import BlockRunner, StreamedModel
from slimplus.preflight import check_shares
from slimplus.reading import resolve_model_folder
from slimplus.run import Record, RunDirectory, chain
from slimplus.shapes import check_shapes, given_allocation
from slimplus.signals import Preemption
from slimplus.training.block import layer_tensors
from slimplus.training.blockwise import BlockQuantizer
from slimplus.training.reconstruction import Surroundings
from slimplus.training.strategies import launch

logger = logging.getLogger(__name__)


def model_source(recipe: Recipe) -> ModelSource:
    """Where the recipe's model comes from."""
    model = recipe.model
    path = resolve_model_folder(model.path)
    return ModelSource(path, model.gguf_file, model.dtype, model.trust_remote_code, model.revision)


@dataclass
class Job:
    """One start of a run; see `prepare`.

    Attributes:
        metrics: the content of metrics.json, written after every stage and block.
        allocation: widths by layer, imported or found for the whole model, or None.
        channels: `[blocks, hidden]`, salience of each block's output channels, if it was measured.
        outer_bits: name → bits of the layers outside the blocks that get packed.
        counted: the stage at work, and the time up to which its seconds are in the metrics.
    """

    recipe: Recipe
    run: RunDirectory
    fabric: Fabric
    runner: BlockRunner
    source: ModelSource
    tokenizer: PreTrainedTokenizerBase
    calibration: Windows
    evaluation: Windows
    quantizer: BlockQuantizer
    block_names: list[str]
    allocation: dict[str, list[int]] | None
    outer_bits: dict[str, int]
    metrics: dict[str, Any]
    channels: Tensor | None = None
    tuned: dict[str, Tensor] | None = None
    counted: tuple[str, float] = ("", 0.0)

    @cached_property
    def model(self) -> StreamedModel:
        """The full-precision model; loaded when a stage first asks for it."""
        return StreamedModel(self.source.model(), self.runner.device)

    def release_model(self) -> None:
        """Free the full-precision model."""
        self.__dict__.pop("model", None)

    @property
    def needs_auxiliary(self) -> bool:
        """Whether the loss has a second target."""
        return self.quantizer.trains and self.quantizer.reconstruction.loss.auxiliary > 0

    @property
    def measures_sensitivity(self) -> bool:
        """Whether the whole model's sensitivity is asked for."""
        salient = self.quantizer.trains and self.quantizer.reconstruction.loss.salient_channels
        return salient or self.recipe.quantization.allocates_by == "model"

    @property
    def block_count(self) -> int:
        return len(self.block_names)

    def shard(self, tokens: Tensor) -> Tensor:
        """This rank's windows."""
        return tokens[self.fabric.global_rank :: self.fabric.world_size]

    def given_bits(self, index: int) -> dict[str, Tensor] | None:
        """Widths of one block's layers, if they were not left to be found with the block."""
        if self.allocation is None:
            return None
        prefix = f"{self.block_names[index]}."
        return {
            name.removeprefix(prefix): torch.tensor(widths, dtype=torch.int32)
            for name, widths in self.allocation.items()
            if name.startswith(prefix)
        }

    def surroundings(self, index: int) -> Surroundings:
        """What a loss needs to know of the place of a block."""
        norm = None
        if self.quantizer.trains and self.quantizer.reconstruction.loss.error == "after_norm":
            norm = deepcopy(following_norm(self.model.model, index)).to(self.runner.device, torch.float32)
        return Surroundings(norm, None if self.channels is None else self.channels[index].to(self.runner.device))

    def stored_block(self, index: int, made_from: str) -> dict[str, Tensor] | None:
        """The tensors of a finished block, if it was made from the blocks before it, whose `chain` is `made_from`."""
        if not self.run.has_block(index):
            return None
        tensors, record = self.run.load_block(index)
        if record["made_from"] == made_from:
            return tensors
        self.note(f"block {index} was made from other blocks than those before it now; it is made again")
        return None

    def save_block(self, index: int, tensors: dict[str, Tensor], record: Record, made_from: str) -> str:
        """Keep a finished block, from the first rank: all ranks hold the same. Returns its `chain`."""
        link = chain(made_from, tensors)
        if self.fabric.is_global_zero:
            self.run.save_block(index, tensors, record | {"made_from": made_from, "chain": link})
        self._keep_figures()  # a job that is killed cannot do so at its end
        self.fabric.barrier()
        return link

    def finished_block(self, index: int) -> tuple[dict[str, Tensor], Record]:
        """The packed tensors of a finished block as they are to be saved, and its record."""
        tensors, record = self.run.load_block(index)
        prefix = f"{self.block_names[index]}."
        tuned = self.tuned or {}
        return tensors | {key: tuned[prefix + key] for key in tensors if prefix + key in tuned}, record

    def note(self, event: str) -> None:
        """Warn of something that a reader of the results should know, and keep it in metrics.json, once."""
        logger.warning("%s", event)
        if event not in self.metrics["events"]:
            self.metrics["events"].append(event)

    def save_metrics(self) -> None:
        """Write metrics.json, from the first rank."""
        if self.fabric.is_global_zero:
            self.run.write("metrics.json", self.metrics)

    def forget_checkpoint(self) -> None:
        """Drop the checkpoint and its figures: its blocks are about to change."""
        for key in ("size_bytes", "sentence"):
            self.metrics.pop(key, None)
        self.metrics["perplexity"].pop("quantized", None)
        self.save_metrics()
        if self.fabric.is_global_zero:
            self.run.manifest.forget(self.run.packed)

    def packed_layout(self) -> PackedLayout:
        """Widths and sizes of all the packed layers, from the block files; one block in memory at a time."""
        layout, group_size = PackedLayout(), self.quantizer.quantization.group_size
        unreported = ("divergence", "made_from", "chain")  # of a record: too long, or of no interest to a reader
        for index, (block_name, block) in enumerate(zip(self.block_names, self.model.blocks, strict=True)):
            tensors, record = self.finished_block(index)
            layout.records.append({key: value for key, value in record.items() if key not in unreported})
            for name, linear in find_linears(block).items():
                layout.add(f"{block_name}.{name}", layer_tensors(tensors, name), linear.weight.shape, group_size)
        return layout

    def checkpoint_tensors(self, outer: Mapping[str, Mapping[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the packed model by its name, block by block; `outer` are those packed outside the blocks."""
        tuned = self.tuned or {}
        for name, tensor in self.model.outer_tensors():
            if name.removesuffix(".weight") not in outer:
                yield name, tuned.get(name, tensor)
        for name, tensors in outer.items():
            for key, tensor in tensors.items():
                yield f"{name}.{key}", tensor
        for index, (name, block) in enumerate(zip(self.block_names, self.model.blocks, strict=True)):
            packed, _ = self.finished_block(index)
            linears = find_linears(block)
            for key, tensor in block.state_dict().items():
                if key.rpartition(".")[0] not in linears:
                    yield f"{name}.{key}", tuned.get(f"{name}.{key}", tensor)
            for key, tensor in packed.items():
                yield f"{name}.{key}", tensor

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage, and keep the figures at its end, be that an interruption.

        Raises:
            InputError: where the device's memory does not suffice.
        """
        self.counted = name, time.perf_counter()
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise InputError(
                f"{name}: out of device memory ({first_line(error)}); give a larger device, a lower "
                "data.sequence_length or data.evaluation.sequence_length, or trainer.accelerator=cpu; what is finished "
                "is kept"
            ) from error
        finally:
            self._keep_figures()

    def _keep_figures(self) -> None:
        (name, since), now = self.counted, time.perf_counter()
        self.counted = name, now
        self.metrics["seconds"][name] = self.metrics["seconds"].get(name, 0) + now - since
        self.metrics["peak_memory_bytes"] = max(self.metrics.get("peak_memory_bytes", 0), peak_resident_bytes())
        if self.runner.device.type == "cuda":
            held = torch.cuda.max_memory_allocated(self.runner.device)
            self.metrics["peak_device_memory_bytes"] = max(self.metrics.get("peak_device_memory_bytes", 0), held)
        self.save_metrics()


def start(recipe: Recipe) -> Fabric:
    """Start the processes of the job."""
    trainer = recipe.trainer
    return launch(trainer.accelerator, trainer.devices, trainer.num_nodes, trainer.strategy)


def prepare(recipe: Recipe, fabric: Fabric, preemption: Preemption) -> Job:
    """Read the texts and check all that can be checked before the long work.

    Raises:
        InputError: for input the user can put right.
    """
    logging.getLogger("slimplus").setLevel(logging.INFO if fabric.is_global_zero else logging.WARNING)
    L.seed_everything(recipe.seed, verbose=False)
    check_shares(recipe, fabric.world_size)
    runner = BlockRunner(fabric.device, resolve_precision(recipe.trainer.precision, fabric.device))
    run = RunDirectory(recipe.run_dir)
    run.open()
    source = _pinned_source(recipe, run)
    source = replace(source, revision=fabric.broadcast(source.revision))  # the hub may have moved on between two asks
    config = source.config()
    skeleton = build_on_meta(config)
    block_names, allocation = _check_model(skeleton, recipe)
    outer = outer_bits(skeleton, recipe.quantization.embedding_bits, recipe.quantization.head_bits)
    tokenizer = source.tokenizer()
    text = load_text(recipe.data.calibration.path, "calibration")
    made_from = fingerprint(recipe, text, tokenizer, source, config, runner.precision)
    events = _look_into(run, recipe, made_from, len(block_names)) if fabric.is_global_zero else []
    fabric.barrier()
    run.open()
    with fabric.rank_zero_first():
        calibration, evaluation = _windows(recipe, text, tokenizer, run.tokens)
    metrics = _metrics(recipe, run, evaluation, runner.precision, made_from)
    metrics["events"] += events
    fabric.barrier()
    if fabric.is_global_zero:
        run.manifest.add(run.tokens)
        run.write("fingerprint.json", made_from)
        run.write("recipe.yaml", to_yaml(recipe))
        run.write("metrics.json", metrics)
    job = Job(
        recipe=recipe,
        run=run,
        fabric=fabric,
        runner=runner,
        source=source,
        tokenizer=tokenizer,
        calibration=calibration,
        evaluation=evaluation,
        quantizer=block_quantizer(recipe, fabric, runner, run.logs, preemption),
        block_names=block_names,
        allocation=allocation,
        outer_bits=outer,
        metrics=metrics,
    )
    if allocation is not None:
        settings = recipe.quantization
        average = average_bits(allocation, quantized_linears(skeleton), settings.group_size)
        if average != settings.bits:
            job.note(
                f"quantization.allocation gives {average:.3f} bits on average, not quantization.bits={settings.bits}"
            )
    return job


def _pinned_source(recipe: Recipe, run: RunDirectory) -> ModelSource:
    """Where the model comes from; of a hub's repository, at the commit that this run began with."""
    source = model_source(recipe)
    damaged = run.manifest.problem(run.root / "fingerprint.json")  # which `check_fingerprint` is going to say
    before = {} if damaged else run.read("fingerprint.json")
    path, _, commit = before.get("model.path", "").rpartition("@")
    if source.revision is None and path == source.path:
        source = replace(source, revision=commit)
    return source.pinned()


def _look_into(run: RunDirectory, recipe: Recipe, made_from: dict[str, Any], blocks: int) -> list[str]:
    """Check and repair what an earlier start left in `run`; returns what it had to do, for metrics.json."""
    run.check_start(recipe.resume.start, blocks)
    changes = run.check_fingerprint(made_from, recipe.resume.force)
    events = [f"resume.force: {change}" for change in changes] + run.repair()
    upgrades = differences(run.read("metrics.json").get("libraries", {}), library_versions())
    if upgrades and any(run.blocks.glob("*")):
        # Whether an upgrade changes a byte cannot be known, and a machine's image is not always the user's choice.
        events.append(f"libraries changed during the run: {', '.join(upgrades)}")
        logger.warning("%s; the checkpoint may differ from that of an undisturbed run", events[-1])
    return events


def _check_model(model: PreTrainedModel, recipe: Recipe) -> tuple[list[str], dict[str, list[int]] | None]:
    """Names of the blocks, and the imported allocation if there is one, checked against the model's layers."""
    check_shapes(model, recipe)
    names = [f"{blocks_path(model.config)}.{index}" for index in range(len(find_blocks(model)))]
    return names, given_allocation(model, recipe)


def _windows(recipe: Recipe, text: str, tokenizer: PreTrainedTokenizerBase, folder: Path) -> tuple[Windows, Windows]:
    data = recipe.data
    calibration = calibration_windows(
        text, tokenizer, data.samples, data.sequence_length, recipe.seed, cache=folder / "calibration.safetensors"
    )
    evaluation = evaluation_windows(
        load_text(data.evaluation.path, "evaluation"),
        tokenizer,
        data.evaluation.windows,
        data.evaluation.sequence_length,
        cache=folder / "evaluation.safetensors",
    )
    return calibration, evaluation


def _metrics(
    recipe: Recipe, run: RunDirectory, evaluation: Windows, precision: str, made_from: dict[str, Any]
) -> dict[str, Any]:
    """The figures so far; perplexities only if they were measured on the same windows and model."""
    fresh: dict[str, Any] = {
        "method": recipe.quantization.method,
        "model": recipe.model.path,
        "precision": precision,
        "libraries": library_versions(),
        "evaluation": {
            "text": recipe.data.evaluation.path,
            "windows": len(evaluation.tokens),
            "sequence_length": evaluation.tokens.shape[1],
            "fingerprint": evaluation.fingerprint,
        },
    }
    before, made_before = run.read("metrics.json"), run.read("fingerprint.json")
    measured = ("perplexity", "sentence")
    decisive = ("model.path", "model.gguf_file", "model.dtype", "model configuration", "trainer.precision")
    same = all(made_before.get(key) == made_from[key] for key in decisive)
    if not same or before.get("evaluation", {}).get("fingerprint") != evaluation.fingerprint:
        before = {key: value for key, value in before.items() if key not in measured}
    return {"perplexity": {}, "seconds": {}, "events": []} | before | fresh
