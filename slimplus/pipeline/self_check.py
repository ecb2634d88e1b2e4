"""The self-check: a small random model of an architecture, run block by block, packed, written and loaded back.

What `slimplus.models.architectures` and `slimplus.models.streaming` infer of an architecture is compared with what the
model itself computes, before anything is downloaded or calibrated. It needs a configuration, no weights, and seconds.
"""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from slimplus.format.affine import QuantizedWeight, choose_qparams, quantize, storable_scale, uniform_bits
from slimplus.hub.checkpoint import LOADING_ERRORS, load, write_checkpoint
from slimplus.hub.transformers_quantizer import SlimplusConfig
from slimplus.models.architectures import (
    UnsupportedModelError,
    blocks_path,
    find_blocks,
    find_linears,
    left_out,
    packed_share,
    plain_linears,
    quantized_linears,
)
from slimplus.models.auto_class import auto_class
from slimplus.models.block_arguments import first_output
from slimplus.models.loading import build_on_meta
from slimplus.models.shrink import MOST_BLOCKS, shrink
from slimplus.models.streaming import BlockRunner, StreamedModel
from slimplus.models.towers import carried_over
from slimplus.nn import PackedLinear
from slimplus.utils.errors import InputError, first_line

TOLERANCE = 1e-4  # of the largest value: float32 differs by 1e-6 where windows run apart instead of together
LENGTH, GROUP_SIZE, BITS = 24, 64, 4
MOST_WEIGHTS = 500_000_000  # of a model that is tried: 2 GB in float32
ERRORS = (*LOADING_ERRORS, AssertionError, ImportError, StopIteration)


@dataclass(frozen=True)
class ArchitectureReport:
    """What was found of a model's architecture.

    Attributes:
        model_type: transformers' name of the architecture.
        path: dotted path of the list of blocks.
        blocks: number of blocks.
        kinds: number of kinds of blocks, which differ in their class, in shapes or in `layer_types`.
        layers: number of linear layers in the blocks that get packed.
        share: share of the weights in the blocks that gets packed.
        left_out: why weights of the blocks stay at 16 bit, by their names with a star for the block's number.
        carried_over: number of weights in what belongs to images or sounds, by the names of its modules.
    """

    model_type: str
    path: str
    blocks: int
    kinds: int
    layers: int
    share: float
    left_out: dict[str, str]
    carried_over: dict[str, int]

    def rows(self) -> dict[str, str]:
        """Return the report as rows of name and text."""
        kinds = "" if self.kinds == 1 else f", of {self.kinds} kinds"
        rows = {
            "architecture": self.model_type,
            "blocks": f"{self.blocks:,} in {self.path}{kinds}",
            "packed": f"{self.layers:,} linear layers, {self.share:.1%} of the weights in the blocks",
        }
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.left_out.items():
            by_reason.setdefault(re.sub(r"\[.*?\] ", "", reason), []).append(name)
        named = [f"{', '.join(names)} ({reason})" for reason, names in by_reason.items()]
        rows |= {"left at 16 bit": "; ".join(named)} if named else {}
        whole = [f"{name} ({count:,} weights)" for name, count in self.carried_over.items()]
        return rows | ({"carried over as it is": ", ".join(whole)} if whole else {})


def describe(model: PreTrainedModel) -> ArchitectureReport:
    """Return what is found of a model, which may lie on the meta device."""
    blocks = find_blocks(model)
    reasons = {re.sub(r"\b\d+\b", "*", name): why for block in blocks for name, why in left_out(block).items()}
    return ArchitectureReport(
        model_type=model.config.model_type,
        path=blocks_path(model),
        blocks=len(blocks),
        kinds=len(set(_kinds(model))),
        layers=len(quantized_linears(model)),
        share=packed_share(model),
        left_out=reasons,
        carried_over={
            name: sum(parameter.numel() for parameter in module.parameters())
            for name, module in carried_over(model).items()
        },
    )


def self_check(config: PretrainedConfig) -> None:
    """Check on a small random model that streaming, packing and loading give what the model itself gives.

    1. Shrink the configuration to the first blocks, so many that every kind is among them, and to few heads.
    2. Run two different windows block by block, apart and together, and compare each block's output and the logits
       with those of the model.
    3. Pack the linear layers, write a checkpoint, load it, and compare its logits with those of the model in which the
       layers are dequantized.

    Raises:
        UnsupportedModelError: naming what differs, or why the architecture cannot be tried.
    """
    _self_check(_Configuration(config.to_json_string(use_diff=False), config))


@dataclass(frozen=True)
class _Configuration:
    """A configuration that is known by its values, `text`."""

    text: str
    config: PretrainedConfig = field(compare=False)


@lru_cache(maxsize=64)
def _self_check(given: _Configuration) -> None:
    """Check a configuration; one that has passed is not checked again by this process."""
    config = given.config
    name = config.model_type
    try:
        with _quiet(), torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            whole = build_on_meta(config)
            _check_weights(whole)
            model = _small_model(config, _kinds(whole))
            tokens = torch.randint(model.config.get_text_config().vocab_size, (2, LENGTH))
            _check_streaming(model, tokens)
            _check_packing(plain_linears(model), tokens)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"model.path: architecture '{name}' is not supported: {error}") from error
    except ERRORS as error:
        raise UnsupportedModelError(
            f"model.path: architecture '{name}' is not supported: a small model of it cannot be tried "
            f"({type(error).__name__}: {first_line(error)})"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Within this context transformers writes errors only: what it says of a random model concerns nobody."""
    before, shows = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)
        if shows:
            transformers.logging.enable_progress_bar()


def _kinds(model: PreTrainedModel) -> list[tuple[object, ...]]:
    """Return what tells each block's kind: its class, the shapes of its parameters, and its entry in `layer_types`."""
    blocks = find_blocks(model)
    config = model.config.get_text_config()
    types = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or [None] * len(blocks)
    return [
        (type(block), kind, tuple((name, tuple(parameter.shape)) for name, parameter in block.named_parameters()))
        for block, kind in zip(blocks, types, strict=False)
    ]


def _small_model(config: PretrainedConfig, kinds: list[tuple[object, ...]]) -> PreTrainedModel:
    """Return a random float32 model with the first blocks of every kind, of which `kinds` names each block's.

    Raises:
        UnsupportedModelError: if no model of the architecture is small enough.
    """
    count = min(max(max(kinds.index(kind) for kind in kinds) + 1, 2), len(kinds), MOST_BLOCKS)
    small = shrink(config, count)
    weights = sum(parameter.numel() for parameter in build_on_meta(small).parameters())
    if weights > MOST_WEIGHTS:
        raise UnsupportedModelError(f"the smallest model of it that can be tried has {weights:,} weights")
    kind = auto_class(small.to_dict())
    model = kind.from_config(small, dtype=torch.float32).eval().requires_grad_(False)
    for parameter in model.parameters():  # gains of one and biases of zero would hide what is not applied
        if parameter.is_floating_point():
            parameter += 0.02 * torch.randn(parameter.shape)
    return model


def _check_weights(model: PreTrainedModel) -> None:
    """Check that there are layers to pack, and that no two of them share a weight, which two blocks would change."""
    layers = quantized_linears(model)
    if not layers:
        raise UnsupportedModelError("its blocks hold no linear layer that could be packed")
    (name, count), *_ = Counter(id(layer.weight) for layer in layers.values()).most_common(1)
    if count > 1:
        shared = [layer for layer, module in layers.items() if id(module.weight) == name]
        raise UnsupportedModelError(f"{shared[0]} and {shared[1]} share one weight")


def _check_streaming(model: PreTrainedModel, tokens: Tensor) -> None:
    """Compare what blocks give one by one with what they give within the model, windows apart and together.

    The blocks that are run one by one have linear layers in the place of other layers and of experts.
    """
    expected, logits = _outputs_of_blocks(model, tokens)
    for windows in (1, 2):
        streamed = StreamedModel(plain_linears(deepcopy(model)), BlockRunner(torch.device("cpu"), "32-true", windows))
        inputs = streamed.block_inputs(tokens)
        hidden = inputs.hidden
        for index, hidden in enumerate(streamed.forward_blocks(inputs)):  # noqa: B007, the last one is used below
            if not _agree(hidden, expected[index]):
                together = "" if windows == 1 else ", with two windows at once"
                raise UnsupportedModelError(
                    f"block {index}, run by itself, gives something else than within the model{together}"
                )
        if not _agree(streamed.logits(tokens, hidden), logits):
            raise UnsupportedModelError("the head behind the blocks, run by itself, gives other logits than the model")


def _outputs_of_blocks(model: PreTrainedModel, tokens: Tensor) -> tuple[list[Tensor], Tensor]:
    """Return the hidden states that each block gives within the model, and the logits."""
    outputs: list[Tensor] = []
    hooks = [
        block.register_forward_hook(lambda _, __, output: outputs.append(first_output(output).clone()))
        for block in find_blocks(model)
    ]
    try:
        logits = model(input_ids=tokens, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    if len(outputs) != len(hooks):
        raise UnsupportedModelError(f"the model runs {len(outputs)} blocks, but holds {len(hooks)}")
    return outputs, logits


def _agree(found: Tensor, expected: Tensor) -> bool:
    """Return whether two tensors are equal but for rounding."""
    if found.shape != expected.shape or not expected.isfinite().all():
        return False
    return bool((found - expected).abs().max() <= TOLERANCE * expected.abs().max())


def _check_packing(model: PreTrainedModel, tokens: Tensor) -> None:
    """Compare a packed model, written and loaded back, with the model in which the same weights are dequantized."""
    packed = {
        name: PackedLinear.from_quantized(_rounded(layer.weight), layer.bias)
        for name, layer in quantized_linears(model).items()
    }
    untouched = deepcopy(model)
    for name, layer in packed.items():
        model.set_submodule(name, layer.to_linear())
    expected = model(input_ids=tokens, use_cache=False).logits
    with tempfile.TemporaryDirectory() as folder:
        _write(Path(folder, "packed"), untouched, packed)
        try:
            loaded = load(Path(folder, "packed"), dtype=torch.float32)
        except InputError as error:
            raise UnsupportedModelError(
                "a packed model does not load back: " + first_line(error).replace(folder, "")
            ) from error
        if not _agree(loaded(input_ids=tokens, use_cache=False).logits, expected):
            raise UnsupportedModelError("a packed model gives other logits than the same weights unpacked")
        for name, part in carried_over(untouched).items():
            found = loaded.get_submodule(name).state_dict()
            if not all(torch.equal(found[key], tensor) for key, tensor in part.state_dict().items()):
                raise UnsupportedModelError(f"{name} does not come back as it was from a packed checkpoint")


def _rounded(weight: Tensor) -> QuantizedWeight:
    """Return a weight `[out, in]` rounded to nearest."""
    bits = uniform_bits(weight.shape[1], GROUP_SIZE, BITS)
    scale, zero_point = choose_qparams(weight, bits, GROUP_SIZE)
    scale = storable_scale(scale)
    integers = quantize(weight, scale, zero_point, bits, GROUP_SIZE)
    return QuantizedWeight(integers, scale, zero_point, bits, GROUP_SIZE)


def _write(folder: Path, model: PreTrainedModel, packed: dict[str, PackedLinear]) -> None:
    """Write a checkpoint of a model with packed layers."""
    streamed = StreamedModel(model, BlockRunner(torch.device("cpu"), "32-true"))

    def tensors() -> Iterator[tuple[str, Tensor]]:
        yield from streamed.outer_tensors()
        for index, block in enumerate(streamed.blocks):
            linears = find_linears(block)
            for key, tensor in block.state_dict().items():
                if key.rpartition(".")[0] not in linears:
                    yield f"{blocks_path(model)}.{index}.{key}", tensor
        for name, layer in packed.items():
            for key, tensor in layer.state_dict().items():
                yield f"{name}.{key}", tensor

    write_checkpoint(
        folder,
        tensors(),
        model.config,
        SlimplusConfig(
            BITS,
            GROUP_SIZE,
            {name: layer.bit_counts for name, layer in packed.items()},
            "rtn",
            {name: layer.shape for name, layer in packed.items()},
            streamed.full_bytes,
        ),
        None,
        None,
        "",
    )
