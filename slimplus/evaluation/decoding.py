"""Decoding in which a token is one replay of a CUDA graph.

transformers compiles the forward of a decoding step, and its loop chooses the token, prepares the next inputs and looks
for the end of the sequences between two steps, with some dozen launches of their own. Here all of that happens on the
device, inside the captured graph; the host replays it, and reads the tokens some replays later. The preparation of
`generate`, the static cache, the masks and the processors of logits are those of transformers.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StaticCache, StoppingCriteriaList
from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer
from transformers.generation import BaseStreamer
from transformers.generation.configuration_utils import GenerationMode

from slimplus.evaluation.graph_steps import Arrivals, Choice, Steps
from slimplus.nn.expert_stack import ExpertStack

LENGTH_STEP = 256  # a cache holds a multiple of so many tokens, so that texts of about the same length share a graph
REPLAYS = 16  # tokens of which a GPU is given the next ones before the host reads them
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
        self._steps: Steps | None = None

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
        inputs.pop("synced_gpus", None)  # of processes that share the model's weights
        choice = Choice.of(generation_config, logits_processor, stopping_criteria)
        most = generation_config.max_length - input_ids.shape[1]
        if choice is None or not _is_static(model, inputs) or generation_config.return_dict_in_generate:
            self._steps = None
            processed = {"logits_processor": logits_processor, "stopping_criteria": stopping_criteria}
            others = {"generation_config": generation_config, "streamer": streamer}
            return model._sample(input_ids, **processed, **others, **inputs)
        with torch.cuda.device_of(input_ids):
            steps = self._begin(input_ids, inputs, generation_config.max_length, choice)
            arrivals = Arrivals(steps.written, choice.ends, streamer)
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

    def _begin(self, input_ids: Tensor, inputs: dict[str, Any], longest: int, choice: Choice) -> Steps:
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
            kept = self._steps = Steps(model, cache, given, choice, key)
            kept.allocate(input_ids, masked, inputs["position_ids"], length)
        kept.begin(logits, masked, inputs["position_ids"])
        return kept


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
    given = inputs.get("past_key_values")
    if getattr(given, "_is_user_defined", False) or (given is not None and given.get_seq_length()):
        return False  # the caller goes on with a text, or wants to
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
