"""Decoding in which a token is one replay of a CUDA graph.

transformers compiles the forward of a decoding step, and its loop chooses the token, prepares the next inputs and looks
for the end of the sequences between two steps, with some dozen launches of their own. Here all of that happens on the
device, inside the captured graph; the host replays it, and reads the tokens some replays later. The preparation of
`generate`, the static cache, the masks and the processors of logits are those of transformers.
"""

from __future__ import annotations

import logging
import operator
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StaticCache, StoppingCriteriaList
from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer
from transformers.generation import (
    BaseStreamer,
    EosTokenCriteria,
    MaxLengthCriteria,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.configuration_utils import GenerationMode

from slimplus.nn import PackedLinear
from slimplus.nn.expert_stack import ExpertStack

logger = logging.getLogger(__name__)

LENGTH_STEP = 256  # a cache holds a multiple of so many tokens, so that texts of about the same length share a graph
REPLAYS = 16  # tokens of which a GPU is given the next ones before the host reads them
PROCESSORS = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper)
"""Processors of logits that do not ask which tokens came before."""
CRITERIA = (MaxLengthCriteria, EosTokenCriteria)
GROWING_ROPE = ("dynamic", "longrope")  # rotary positions whose frequencies depend on the length of the text


class GraphDecoder:
    """Text of a model with a static cache; on a GPU each token is one replay of a CUDA graph.

    ```python
    decoder = GraphDecoder(model)
    decoder.generate(**inputs, max_new_tokens=100)
    ```

    Cache and graph are kept for later calls, and made again where batch, length, sampling or weights are others. On a
    CPU the same loop runs without a graph. What the loop does not know, `model.generate` does: repetition penalties and
    other processors that read the text, criteria other than length and end-of-sequence tokens, scores among the
    results, mixtures of packed experts, models on several devices. One thread may use a decoder at a time.

    Args:
        model: a causal language model, packed or not.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._steps: _Steps | None = None

    @property
    def captured(self) -> bool:
        """Whether the last call decoded with a CUDA graph."""
        return self._steps is not None and self._steps.graph is not None

    def generate(self, *arguments: Any, streamer: BaseStreamer | None = None, **options: Any) -> Any:
        """Return what `model.generate` returns for the same arguments.

        Raises:
            ValueError: for beams, and other ways to choose among several texts.
        """
        loop = partial(self._decode, streamer=streamer)  # `generate` gives the streamer to its own loops only
        model: Any = self.model
        return model.generate(*arguments, streamer=streamer, custom_generate=loop, **options)

    def _decode(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        streamer: BaseStreamer | None = None,
        **inputs: Any,
    ) -> Any:
        """Take the place of `generate`'s loop; transformers describes the arguments."""
        if generation_config.get_generation_mode() not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
            raise ValueError("a GraphDecoder decodes greedily or by sampling; call model.generate for anything else")
        choice = _Choice.of(generation_config, logits_processor, stopping_criteria)
        most = generation_config.max_length - input_ids.shape[1]
        if choice is None or not _is_static(model, inputs) or generation_config.return_dict_in_generate:
            self._steps = None
            processed = {"logits_processor": logits_processor, "stopping_criteria": stopping_criteria}
            others = {"generation_config": generation_config, "streamer": streamer}
            return model._sample(input_ids, **processed, **others, **inputs)
        with torch.cuda.device_of(input_ids):
            steps = self._begin(input_ids, inputs, generation_config.max_length, choice)
            arrivals = _Arrivals(steps.written, choice.ends, streamer)
            chosen = 1
            arrivals.ask(chosen)
            while chosen < most and arrivals.unfinished:
                count = min(REPLAYS, most - chosen) if arrivals.ahead else 1
                for _ in range(count):
                    steps.advance()
                chosen += count
                arrivals.ask(chosen)
            arrivals.receive()
        if streamer is not None:
            streamer.end()
        return torch.cat([input_ids, steps.written[:, : arrivals.length]], dim=1)

    def _begin(self, input_ids: Tensor, inputs: dict[str, Any], longest: int, choice: _Choice) -> _Steps:
        """Read the prompt, choose the first token, and return the steps that write the others."""
        length = -(-longest // LENGTH_STEP) * LENGTH_STEP
        cache = _static_cache(self.model, length)
        kept = self._steps
        given = {name: value for name, value in inputs.items() if name not in ("past_key_values", "position_ids")}
        masked = given.pop("attention_mask", None)
        key = (len(input_ids), length, masked is None, inputs["position_ids"].dim(), choice, _circumstances(self.model))
        if kept is not None and kept.key == key and not kept.is_stale():
            cache = kept.cache
            cache.reset()
        else:
            self._steps = kept = None  # frees the memory of the former graph before another one takes some
        model: Any = self.model
        prepared = model.prepare_inputs_for_generation(
            input_ids,
            **inputs | {"past_key_values": cache},
            is_first_iteration=True,
        )
        logits = model(**prepared, return_dict=True).logits
        if kept is None:
            kept = self._steps = _Steps(model, cache, given, choice, key)
            kept.allocate(input_ids, masked, inputs["position_ids"], length)
        kept.begin(logits, masked, inputs["position_ids"])
        return kept


@dataclass(frozen=True)
class _Choice:
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
    ) -> _Choice | None:
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


class _Steps:
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
        self, model: Any, cache: StaticCache, inputs: dict[str, Any], choice: _Choice, key: tuple[Any, ...]
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

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # what a graph cannot capture, such as compiling a kernel, happens here
            self._step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with without_collection(), torch.cuda.graph(graph):
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


class _Arrivals:
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


def _static_cache(model: Any, length: int) -> StaticCache:
    """Return a cache of `length` tokens; layers that attend to a window keep all tokens, too.

    The static layer of transformers for a window counts tokens on the host, and a graph would go on with the count at
    its capture. With all tokens kept, the mask alone makes the window.
    """
    cache = StaticCache(config=model.config, max_cache_len=length)
    windowed = (isinstance(layer, StaticSlidingWindowLayer) for layer in cache.layers)
    layers = zip(cache.layers, windowed, strict=True)
    cache.layers = [StaticLayer(max_cache_len=length) if sliding else layer for layer, sliding in layers]
    return cache


def _is_static(model: Any, inputs: dict[str, Any]) -> bool:
    """Return whether a step of a model with these inputs has no shape or branch that its values decide."""
    if not getattr(model, "_can_compile_fullgraph", False) or inputs.get("position_ids") is None:
        return False
    if not inputs.get("use_cache", True) or any(isinstance(module, ExpertStack) for module in model.modules()):
        return False
    if len({tensor.device for tensor in (*model.parameters(), *model.buffers())}) > 1:
        return False
    if any(kind in str(getattr(module, "rope_type", "")) for module in model.modules() for kind in GROWING_ROPE):
        return False
    tensors = {name for name, value in inputs.items() if isinstance(value, Tensor)}
    flash = "flash" in str(model.config.get_text_config()._attn_implementation)
    prompts = tensors <= {"attention_mask", "position_ids"}  # and no images
    return prompts and not flash and all(type(layer) is StaticLayer for layer in _static_cache(model, 1).layers)


def _circumstances(model: Any) -> tuple[Any, ...]:
    """Return what a graph fixes besides addresses: the modes in which PyTorch was when it was captured."""
    kind = model.device.type
    return torch.is_inference_mode_enabled(), torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)


def _addresses(model: nn.Module) -> list[int]:
    """Return the addresses of a model's tensors."""
    return [tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())]


def _weights(model: nn.Module) -> Iterable[object]:
    """Yield the weights by which the packed layers of a model multiply."""
    return (layer.fused.weight for layer in model.modules() if isinstance(layer, PackedLinear) and layer.fused)
