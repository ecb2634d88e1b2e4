"""What a run needs of main memory, of the disk and of a GPU, from shapes alone, and whether the machine has it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from slimplus.distributed.strategies import STAGES
from slimplus.format.affine import group_count
from slimplus.models.architectures import find_blocks, find_linears, quantized_linears
from slimplus.models.towers import towers
from slimplus.pipeline.model_checks import planned_widths
from slimplus.quantization.salience_allocation import SEARCH_TOKENS
from slimplus.recipe.schema import Recipe
from slimplus.utils.errors import InputError
from slimplus.utils.machine import available_bytes
from slimplus.utils.units import GIGABYTE, format_bytes

FLOAT32 = 4
LIBRARIES = 600_000_000  # bytes of PyTorch, transformers and Lightning, loaded
# While a block is trained: full-precision and fake-quantized weights, what autograd keeps of them, and two gradients.
BLOCK_COPIES = 5
LOGITS_COPIES = 4  # float32 tensors of a window's logits: the model's, and the probabilities in the metric
# Sets of hidden states at once: the inputs of the block in full precision and of the quantized one, and their outputs.
STATES, UNTRAINED_STATES = 4, 3
TAUGHT_STATES = 3  # the same, while the full-precision model's states are made for the end-to-end training
# End-to-end training, in bytes for each group of each row: scale, zero point and two shifts; what autograd keeps of
# them; for each shift that is trained its gradient and its first value, and the optimizer's moments.
GRID, AUTOGRAD, TRAINED = 4 * FLOAT32, 8 * FLOAT32, 2 * FLOAT32
MOMENTS = {"adamw": 2 * FLOAT32, "adamw_8bit": 2, "sign_sgd": 0}
LAYER = 5 * FLOAT32  # bytes for each weight of the layer in use: integers, levels, their gradient, and products
HIDDEN_COPIES = 14  # float32 tensors of a block's hidden states that autograd keeps, ...
OUTPUT_COPIES = 2  # ... and of the outputs of its linear layers
SMALL_PART = 0.1  # of the free memory, which may be spent to save time
ROOM = 1.2  # bytes that a whole model takes on a device over those of its weights, with short prompts
TEACHER = {"cached": 0.0, "int8": 1.0, "nf4": 0.55}  # bytes for each weight


@dataclass(frozen=True)
class Needs:
    """Bytes that a run needs at its peaks.

    Attributes:
        host: main memory of a process that runs on the CPU, without the end-to-end training.
        device: memory of a GPU, without the end-to-end training.
        states: hidden states of the windows of a machine, all that are kept at once.
        states_in_memory: those of them that are kept in main memory; the others lie in files.
        end_to_end_host: main memory of a machine in the end-to-end training on GPUs; 0 without that training.
        end_to_end_device: memory of a device in the end-to-end training; 0 without that training.
    """

    host: int
    device: int
    states: int
    states_in_memory: int
    end_to_end_host: int
    end_to_end_device: int


def memory_needs(model: PreTrainedModel, recipe: Recipe, precision: str) -> Needs:
    """Return what a run needs.

    Args:
        model: the model; it may lie on the meta device.
        recipe: the resolved recipe.
        precision: Lightning's name of the job's precision; `auto` counts as float32.
    """
    blocks = find_blocks(model)
    config, data = model.config.get_text_config(), recipe.data
    token_logits = LOGITS_COPIES * config.vocab_size * FLOAT32
    largest = max(sum(parameter.numel() for parameter in block.parameters()) for block in blocks)
    total, still = sum(parameter.numel() for parameter in model.parameters()), [blocks, *towers(model).values()]
    outside = FLOAT32 * (total - sum(parameter.numel() for part in still for parameter in part.parameters()))
    longest = max(text.sequence_length for text in recipe.evaluation_texts.values())
    working = max(BLOCK_COPIES * FLOAT32 * largest, longest * token_logits)
    width = 2 if precision == "bf16-mixed" else FLOAT32
    windows = _windows_kept(recipe, len(blocks)) // recipe.trainer.num_nodes
    states = windows * data.sequence_length * config.hidden_size * width
    limit = data.cache_gigabytes
    in_memory = states if limit is None else min(states, int(limit * GIGABYTE))
    device = host = 0
    if recipe.end_to_end.epochs:
        device = outside + _end_to_end_device(model, recipe, token_logits)
        best = 2 * FLOAT32 * _grid_values(model, recipe.quantization.group_size)
        each = LIBRARIES + outside + 2 * FLOAT32 * largest + best
        host = recipe.trainer.devices * each + in_memory
    return Needs(LIBRARIES + outside + working + in_memory, outside + working, states, in_memory, host, device)


def _windows_kept(recipe: Recipe, blocks: int) -> int:
    """Return of how many windows hidden states are kept at once, those of different blocks counted apart."""
    quantization, data = recipe.quantization, recipe.data
    needs_targets = quantization.trains or quantization.error_propagation
    kept = (STATES if needs_targets else UNTRAINED_STATES) * data.samples
    if recipe.end_to_end.reads_states:
        kept = max(kept, TAUGHT_STATES * recipe.end_to_end_windows)
    searched = min(max(SEARCH_TOKENS // data.sequence_length, 1), data.samples)
    return max(kept, (blocks + 1) * searched) if recipe.measures_sensitivity else kept


def _grid_values(model: PreTrainedModel, group_size: int) -> int:
    """Return the number of groups of all rows, each of which has a scale and a zero point."""
    layers = quantized_linears(model).values()
    return sum(layer.out_features * group_count(layer.in_features, group_size) for layer in layers)


def _end_to_end_device(model: PreTrainedModel, recipe: Recipe, token_logits: int) -> int:
    """Return the bytes that end-to-end training takes on a device, without what lies outside the blocks."""
    settings, quantization = recipe.end_to_end, recipe.quantization
    processes, stage = recipe.trainer.devices * recipe.trainer.num_nodes, STAGES.get(recipe.trainer.strategy, 0)
    weights = [layer.weight.numel() for layer in quantized_linears(model).values()]
    values, (_, packed) = _grid_values(model, quantization.group_size), planned_widths(model, recipe)
    integers = (packed - values * (quantization.scale_bits // 8 + 1)) // (processes if stage == 3 else 1)
    moments = MOMENTS[settings.optimizer] // (processes if stage else 1)
    kept = 0 if settings.activation_checkpointing else AUTOGRAD
    grids = values * (GRID + kept + (1 + settings.zero_points) * (TRAINED + moments))
    windows = max(settings.batch_size // processes // settings.accumulate_grad_batches, 1)
    tokens = windows * recipe.data.sequence_length
    teacher = TEACHER[settings.teacher] * sum(weights) if settings.learns_from_model else 0
    activations = _activations(model, tokens, settings.activation_checkpointing) + tokens * token_logits
    return integers + grids + LAYER * max(weights) + activations + int(teacher)


def _activations(model: PreTrainedModel, tokens: int, checkpointing: bool) -> int:
    """Return the bytes that autograd keeps of the blocks for so many tokens."""
    blocks, hidden = find_blocks(model), model.config.get_text_config().hidden_size
    rows = max(sum(layer.out_features for layer in find_linears(block).values()) for block in blocks)
    of_block = HIDDEN_COPIES * hidden + OUTPUT_COPIES * rows
    values = of_block + hidden * len(blocks) if checkpointing else of_block * len(blocks)
    return tokens * values * FLOAT32


def memory_rows(needs: Needs, recipe: Recipe) -> dict[str, str]:
    """Return the rows of the plan on memory."""
    in_files = needs.states - needs.states_in_memory
    files = f", {format_bytes(in_files)} in files in {cache_folder(recipe)}" if in_files else ""
    rows = {"inputs of the blocks": f"{format_bytes(needs.states_in_memory)} main memory{files}"}
    if needs.end_to_end_device:
        processes = recipe.trainer.devices
        rows["end-to-end training"] = (
            f"{format_bytes(needs.end_to_end_device)} on each device, and {format_bytes(needs.end_to_end_host)} main "
            f"memory for {processes} process{'es' if processes > 1 else ''} with a GPU each"
        )
    rows["peak memory estimate"] = (
        f"{format_bytes(max(needs.host, needs.end_to_end_device + needs.states_in_memory))} main memory; on a GPU, if "
        f"there is one, {format_bytes(max(needs.device, needs.end_to_end_device))}"
    )
    return rows


def cache_folder(recipe: Recipe) -> Path:
    """Return the folder of the files of hidden states."""
    return Path(recipe.data.cache_dir or recipe.run_dir).expanduser()


def check_needs(needs: Needs, recipe: Recipe, device: torch.device) -> None:
    """Check that this machine has what a run needs, as far as that can be told from shapes.

    Raises:
        InputError: naming what is short, and the key that helps.
    """
    asked = "data.samples" if recipe.end_to_end.tokens is None else "data.samples, end_to_end.tokens"
    most = max(recipe.data.samples, recipe.end_to_end_windows)
    windows = f"the blocks' inputs of {most:,} windows ({asked}, data.sequence_length)"
    available = available_bytes()
    if available is not None and needs.states_in_memory > available:
        part = "" if recipe.data.cache_gigabytes is None else " of the main memory that data.cache_gigabytes gives them"
        raise InputError(
            f"data.cache_gigabytes: {windows} take {format_bytes(needs.states_in_memory)}{part}, and "
            f"{format_bytes(available)} are available; give data.cache_gigabytes={int(available / 2 / GIGABYTE)}, so "
            "that the rest lies in files in data.cache_dir, or fewer or shorter windows"
        )
    in_files, folder = needs.states - needs.states_in_memory, cache_folder(recipe)
    existing = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(existing).free
    if in_files > free:
        raise InputError(
            f"data.cache_dir: {windows} take {format_bytes(in_files)} in files, and {existing} has "
            f"{format_bytes(free)}; give a folder on a larger disk, more data.cache_gigabytes, or fewer or shorter "
            "windows"
        )
    memory = torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else available
    if memory is not None and needs.end_to_end_device > memory:
        remedies = _end_to_end_remedies(recipe)
        raise InputError(
            f"end_to_end: the training of the whole model takes about {format_bytes(needs.end_to_end_device)} on a "
            f"device, and this one has {format_bytes(memory)}; give {remedies}, or end_to_end.epochs=0"
        )


def has_room(weights: int, device: torch.device) -> bool:
    """Return whether a whole model can be used on this machine: on the device, or in main memory.

    Args:
        weights: bytes of the model's weights.
        device: the job's device.
    """
    available = available_bytes()
    return fits_on_device(weights, device) or available is None or ROOM * weights < available


def has_plenty(size: int, device: torch.device) -> bool:
    """Return whether so many bytes are a small part of the memory that is free where a model is trained."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_bytes()
    return free is not None and size < SMALL_PART * free


def fits_on_device(weights: int, device: torch.device) -> bool:
    """Return whether a whole model has room on a GPU."""
    return device.type == "cuda" and ROOM * weights < torch.cuda.mem_get_info(device)[0]


def check_tasks(weights: int, recipe: Recipe, device: torch.device) -> None:
    """Check that the full-precision model can do the tasks of a recipe on the job's device.

    Raises:
        InputError: if it is too large.
    """
    is_gpu = device.type == "cuda"
    fits = fits_on_device(weights, device) if is_gpu else has_room(weights, device)
    if recipe.evaluation.tasks and not fits:
        where = "device" if is_gpu else "machine"
        raise InputError(
            f"evaluation.tasks: the full-precision model takes {format_bytes(weights)}, more than this {where} has "
            f"free; leave them out, and run `slimplus evaluate` on a larger {where}"
        )


def _end_to_end_remedies(recipe: Recipe) -> str:
    """Return the keys that make the end-to-end training smaller, of those that are not set yet."""
    settings, trainer = recipe.end_to_end, recipe.trainer
    processes = trainer.devices * trainer.num_nodes
    parts = settings.batch_size // processes
    remedies = [
        ("end_to_end.activation_checkpointing=true", not settings.activation_checkpointing),
        (f"end_to_end.accumulate_grad_batches={parts}", settings.accumulate_grad_batches < parts),
        ("trainer.strategy=deepspeed_stage_3", processes > 1 and trainer.strategy != "deepspeed_stage_3"),
    ]
    return " and ".join(key for key, helps in remedies if helps) or "a larger device"
