"""The steps of a `GraphDecoder`: how a token is chosen, what a CUDA graph captures, and how tokens reach the host."""

from __future__ import annotations

import logging
import operator
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessorList, StaticCache, StoppingCriteriaList
from transformers.generation import (
    BaseStreamer,
    EosTokenCriteria,
    MaxLengthCriteria,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from slimplus.nn import PackedLinear

logger = logging.getLogger(__name__)

PROCESSORS = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper)
"""Processors of logits that do not ask which tokens came before."""
CRITERIA = (MaxLengthCriteria, EosTokenCriteria)


@dataclass(frozen=True)
class Choice:
    """How a token is chosen by the logits.

    Attributes:
        described: types and values of the processors of logits.
        sampled: whether tokens are drawn.
        ends: end-of-sequence tokens.
        padding: token that follows the end of a sequence.
        processors: the processors themselves.
    """

    described: tuple[Any, ...]
    sampled: bool
    ends: frozenset[int]
    padding: int
    processors: LogitsProcessorList = field(compare=False)

    @classmethod
    def of(
        cls, config: GenerationConfig, processors: LogitsProcessorList, criteria: StoppingCriteriaList
    ) -> Choice | None:
        """Return the choice that the arguments of `generate` describe, or None if it depends on more than logits."""
        if any(type(each) not in PROCESSORS for each in processors):
            return None
        if any(type(each) not in CRITERIA for each in criteria):
            return None
        described = tuple((type(each), tuple(sorted(vars(each).items()))) for each in processors)
        ends = [each.eos_token_id.flatten().tolist() for each in criteria if isinstance(each, EosTokenCriteria)]
        padding = config._pad_token_tensor
        end_tokens = frozenset(end for found in ends for end in found)
        return cls(described, bool(config.do_sample), end_tokens, 0 if padding is None else int(padding), processors)

    def tokens(self, last: Tensor, logits: Tensor) -> Tensor:
        """Return a token for each row of logits `[batch, vocabulary]`, as `generate` chooses it.

        The processors get the last tokens `[batch, 1]` in the place of the texts, which they do not read.
        """
        scores = self.processors(last, logits)  # type: ignore[arg-type]
        if not self.sampled:
            return scores.argmax(-1)
        # What `torch.multinomial` does for one token, but for its check of the probabilities, which would make the host
        # wait for the device.
        probabilities = scores.softmax(-1)
        return (probabilities / torch.empty_like(probabilities).exponential_()).argmax(-1)


class Steps:
    """Steps that each write one token of every text, on tensors whose addresses stay the same.

    Args:
        model: the model.
        cache: its static cache.
        inputs: further inputs of the model.
        choice: how tokens are chosen.
        key: what another call must have in common to go on with these steps.

    Attributes:
        written: new tokens, `[batch, length of the cache]`.
        graph: the captured step, or None.
        capturable: whether there is a GPU, and no capture has failed.
    """

    token: Tensor  # [batch, 1], the last one
    positions: Tensor  # [..., batch, 1], of the next one
    mask: Tensor | None  # [batch, length of the cache], ones for all tokens to come
    written: Tensor
    place: Tensor  # [1], number of tokens written
    finished: Tensor  # [batch]
    ends: Tensor

    def __init__(
        self, model: Any, cache: StaticCache, inputs: dict[str, Any], choice: Choice, key: tuple[Any, ...]
    ) -> None:
        self.model, self.cache, self.inputs, self.choice, self.key = model, cache, inputs, choice, key
        self.graph: torch.cuda.CUDAGraph | None = None
        self.capturable = model.device.type == "cuda"
        self._read: list[int] = []
        self._weights: list[object] = []

    def is_stale(self) -> bool:
        """Return whether the graph reads tensors that are the model's no more."""
        weights = list(_weights(self.model))
        same = len(weights) == len(self._weights) and all(map(operator.is_, weights, self._weights))
        return self.graph is not None and not (same and _addresses(self.model) == self._read)

    def allocate(self, input_ids: Tensor, mask: Tensor | None, positions: Tensor, length: int) -> None:
        """Make the tensors that the steps change."""
        batch = len(input_ids)
        self.token = input_ids.new_empty(batch, 1)
        self.positions = torch.empty_like(positions[..., -1:])
        self.mask = None if mask is None else mask.new_ones(batch, length)
        self.written = input_ids.new_empty(batch, length)
        self.place = input_ids.new_empty(1)
        self.finished = torch.empty(batch, dtype=torch.bool, device=input_ids.device)
        self.ends = torch.tensor(sorted(self.choice.ends), dtype=input_ids.dtype, device=input_ids.device)

    def begin(self, logits: Tensor, mask: Tensor | None, positions: Tensor) -> None:
        """Choose the first token, by the logits of the prompt."""
        self.place.zero_()
        self.finished.zero_()
        self.positions.copy_(positions[..., -1:] + 1)
        if self.mask is not None and mask is not None:
            self.mask.fill_(1)
            self.mask[:, : mask.shape[1]] = mask
        self._choose(logits)

    def advance(self) -> None:
        """Write the next token; the first call on a GPU captures the step that later ones replay."""
        if self.graph is not None:
            self.graph.replay()
            return
        if self.capturable:
            self._capture()
        else:
            self._step()

    def _capture(self) -> None:
        """Write the next token, and capture the step for those after it."""
        from slimplus.kernels.measure import without_collection

        current, other = torch.cuda.current_stream(), torch.cuda.Stream()
        other.wait_stream(current)
        with torch.cuda.stream(other):  # what a graph cannot capture, such as compiling a kernel, happens here
            self._step()
        current.wait_stream(other)
        graph = torch.cuda.CUDAGraph()
        try:
            # A capture that fails leaves its own stream as the current one.
            with torch.cuda.stream(current), without_collection(), torch.cuda.graph(graph):
                self._step()
        except RuntimeError as error:
            self.capturable = False
            logger.warning("This model cannot be captured in a CUDA graph (%s); its steps are launched", error)
            return
        self.graph, self._read = graph, _addresses(self.model)
        self._weights = list(_weights(self.model))  # held as long as the graph reads them

    def _step(self) -> None:
        prepared = self.model.prepare_inputs_for_generation(
            self.token,
            next_sequence_length=1,
            past_key_values=self.cache,
            attention_mask=self.mask,
            position_ids=self.positions,
            **self.inputs,
        )
        logits = self.model(**prepared, return_dict=True).logits
        self.positions.add_(1)
        self._choose(logits)

    def _choose(self, logits: Tensor) -> None:
        tokens = self.choice.tokens(self.token, logits[:, -1].float())
        tokens = tokens.masked_fill(self.finished, self.choice.padding)
        self.token.copy_(tokens[:, None])
        self.written.index_copy_(1, self.place, self.token)
        self.place.add_(1)
        if self.choice.ends:
            self.finished.logical_or_((tokens[:, None] == self.ends).any(1))


class Arrivals:
    """Tokens on their way from the device to the host, which reads them one request late on a GPU.

    Args:
        written: the tokens on the device, `[batch, most]`.
        ends: end-of-sequence tokens.
        streamer: gets every column of tokens until all texts have ended.

    Attributes:
        ahead: requests that are on their way while the device goes on.
        unfinished: texts that have not ended, as far as the host knows.
        length: number of columns until the last text ended.
    """

    def __init__(self, written: Tensor, ends: frozenset[int], streamer: BaseStreamer | None) -> None:
        self.written, self.ends, self.streamer = written, ends, streamer
        self.ahead = 1 if written.is_cuda else 0
        self.unfinished = set(range(len(written)))
        self.length = self._asked = 0
        self._requests: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()

    def ask(self, chosen: int) -> None:
        """Ask for the columns up to `chosen`, and receive what was asked for before."""
        part = self.written[:, self._asked : chosen]
        self._asked = chosen
        if part.is_cuda:
            host = torch.empty(part.shape, dtype=part.dtype, pin_memory=True).copy_(part, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self._requests.append((host, event))
        else:
            self._requests.append((part.clone(), None))
        self.receive(self.ahead)

    def receive(self, left: int = 0) -> None:
        """Receive all columns but those of the last `left` requests."""
        while len(self._requests) > left:
            columns, event = self._requests.popleft()
            if event is not None:
                event.synchronize()
            for column in columns.T:
                if not self.unfinished:
                    break
                self.length += 1
                if self.streamer is not None:
                    self.streamer.put(column)
                self.unfinished -= {row for row, token in enumerate(column.tolist()) if token in self.ends}


def _addresses(model: nn.Module) -> list[int]:
    """Return the addresses of a model's tensors."""
    return [tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())]


def _weights(model: nn.Module) -> Iterable[object]:
    """Yield the weights by which the packed layers of a model multiply."""
    return (layer.fused.weight for layer in model.modules() if isinstance(layer, PackedLinear) and layer.fused)
