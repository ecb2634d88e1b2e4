"""The calibration text that the model of a run writes: when, where, and in how much memory."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from math import ceil
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from slimplus.data.self_text import Beginnings, write_windows
from slimplus.data.text import SELF, check_share
from slimplus.data.windows import WrittenText, tokenizer_identity
from slimplus.distributed.ranks import Ranks
from slimplus.models.loading import ModelSource
from slimplus.models.precision import AUTOCAST_DTYPES, overflow_remedy
from slimplus.recipe.schema import Recipe
from slimplus.run_dir.directory import RunDirectory
from slimplus.run_dir.fingerprint import digest, weights_digest
from slimplus.utils.errors import InputError
from slimplus.utils.machine import available_bytes
from slimplus.utils.progress import Progress
from slimplus.utils.units import format_bytes

logger = logging.getLogger(__name__)

LOGITS_COPIES = 4  # float32 tensors of a step's logits: the model's, scaled, and the probabilities to draw from


@dataclass(frozen=True, eq=False)
class SelfText:
    """Task of a model to write calibration text.

    Attributes:
        text: the text, and the file that keeps it.
        beginnings: the tokens that each window begins with.
        length: tokens in a window.
        temperature: temperature of the draws.
        seed: seed of the draws.
        batch_size: windows that are written at once.
        precision: Lightning's name of the job's precision.
    """

    text: WrittenText
    beginnings: list[list[int]]
    length: int
    temperature: float
    seed: int
    batch_size: int
    precision: str

    @property
    def dtype(self) -> torch.dtype:
        """Dtype that the model computes in."""
        return AUTOCAST_DTYPES[self.precision] or torch.float32

    @property
    def is_complete(self) -> bool:
        """Whether all windows have been written."""
        return len(self._found()) == len(self.beginnings)

    def _found(self) -> Tensor:
        """Return the windows that have been written, `[windows, length]`, int32."""
        tokens = self.text.tokens()
        return torch.empty(0, self.length, dtype=torch.int32) if tokens is None else tokens

    def write(
        self, source: ModelSource, run: RunDirectory, device: torch.device, ranks: Ranks, progress: Progress
    ) -> None:
        """Have the model write the windows that are missing, and keep each batch once it is there.

        The ranks write one batch each at a time. A batch draws with a seed of its own, so that neither their number nor
        an interruption changes the text. Every rank calls this.

        Raises:
            InputError: if the device's memory does not suffice, or the model predicts NaN or infinity.
        """
        tokens, count = self._found(), len(self.beginnings)
        if len(tokens):
            logger.info("calibration text: %d of %d windows found in %s", len(tokens), count, self.text.file)
        batches = range(len(tokens) // self.batch_size, ceil(count / self.batch_size))
        model = source.model().to(device, self.dtype)  # type: ignore[arg-type]
        for first in progress.track(batches[:: ranks.count], "batch"):
            batch = self._batch(model, min(first + ranks.rank, batches[-1]))  # with nothing left, the last one again
            gathered = ranks.gather(batch[None].to(device), ranks.count).flatten(0, 1)
            tokens = torch.cat([tokens, gathered.cpu().int()])[:count]
            if ranks.rank == 0:
                run.manifest.write(self.text.file, self.text.content(tokens))

    def batch_seed(self, index: int) -> int:
        """Return the seed of a batch: 32 bits, since PyTorch's generator on a CPU takes no others into account."""
        return int(digest(f"{self.seed} {index}")[:8], 16)

    def _batch(self, model: PreTrainedModel, index: int) -> Tensor:
        """Return the windows of a batch, `[batch_size, length]`; the last batch may hold more than are needed."""
        places = [
            number % len(self.beginnings) for number in range(index * self.batch_size, (index + 1) * self.batch_size)
        ]
        beginnings = [self.beginnings[place] for place in places]
        try:
            return write_windows(model, beginnings, self.length, self.temperature, self.batch_seed(index))
        except torch.OutOfMemoryError as error:
            raise InputError(
                f"data.generation.batch_size: out of device memory while writing {self.batch_size} windows at once; "
                "give fewer, with which the text is written anew"
            ) from error
        except ValueError as error:
            raise InputError(f"data.calibration={SELF}: {error}; {overflow_remedy(self.precision)}") from error


def self_text(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, source: ModelSource, precision: str, file: Path, limit: int
) -> SelfText | None:
    """Return the task of writing the calibration text of a recipe, or None if the recipe does not ask for it.

    Args:
        recipe: the resolved recipe.
        tokenizer: the model's tokenizer.
        source: where the full-precision model comes from.
        precision: the resolved precision of the job.
        file: file that keeps the windows.
        limit: characters after which no further prompt is read.

    Raises:
        InputError: if there is nothing to begin with, or a prompt is as long as a window.
    """
    data = recipe.data
    own = next(((each, share) for each, share in data.shares if each.path == SELF), None)
    if own is None:
        return None
    check_share(SELF, own[1], f"data.samples={data.samples} windows")
    settings, length = data.generation, data.sequence_length
    begin = Beginnings(settings.prompts, settings.prefix_tokens, settings.chat, settings.seed)
    beginnings = begin.tokens(tokenizer, own[1], limit)
    if len(longest := max(beginnings, key=len)) >= length:
        raise InputError(
            f"data.generation.prompts: a prompt of {len(longest)} tokens ({tokenizer.decode(longest[:16])!r} …) leaves "
            f"none to write of data.sequence_length={length}; shorten it, or take the beginnings of "
            "data.generation.prefix_tokens tokens"
        )
    identity = {
        "beginnings": beginnings,
        "model": [weights_digest(source), source.dtype, source.gguf_file, precision],
        "settings": [length, settings.temperature, settings.seed, settings.batch_size],
        "tokenizer": tokenizer_identity(tokenizer),
    }
    fingerprint = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    text = WrittenText(file, fingerprint, weight=own[0].weight)
    batch_size = min(settings.batch_size, own[1])
    return SelfText(text, beginnings, length, settings.temperature, settings.seed, batch_size, precision)


def check_memory(task: SelfText, model: PreTrainedModel, device: torch.device, processes: int) -> None:
    """Check that the whole model fits where it writes its text: elsewhere one block at a time is on the device.

    Args:
        task: the task.
        model: the model, on the meta device.
        device: where the model is to write.
        processes: number of processes that share a machine's main memory.

    Raises:
        InputError: if it does not.
    """
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_bytes()
    needed = memory_bytes(task, model) * (1 if device.type == "cuda" else processes)
    if free is not None and needed > free:
        raise InputError(
            f"data.calibration: to write text, the whole model has to be in memory at once, about "
            f"{format_bytes(needed)} with {task.batch_size} windows, of which {format_bytes(free)} are free; give a "
            "lower data.generation.batch_size, a larger machine, or another text"
        )


def memory_bytes(task: SelfText, model: PreTrainedModel) -> int:
    """Return roughly the bytes that a process needs to write a batch: weights, keys and values, and logits."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    states = 2 * config.num_hidden_layers * (getattr(config, "num_key_value_heads", None) or heads) * head_dim
    numbers = sum(parameter.numel() for parameter in model.parameters()) + task.batch_size * task.length * states
    return numbers * task.dtype.itemsize + LOGITS_COPIES * 4 * task.batch_size * config.vocab_size
