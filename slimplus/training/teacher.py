"""The full-precision model as a teacher, its weights stored by bitsandbytes in 8 or 4 bits to save memory."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from slimplus.models.architectures import find_blocks, find_linears
from slimplus.models.block_loading import LoadBlock
from slimplus.models.precision import autocast
from slimplus.models.predictions import stopped_at_head

Storage = Literal["int8", "nf4"]


class Teacher:
    """Full-precision model that gives the hidden states its head reads.

    Args:
        model: the model; the linear layers of its blocks are replaced.
        load_block: function that loads a block, where the model holds its blocks on the meta device.
        storage: `int8` (vector-wise, arXiv 2208.07339), which is more exact, or `nf4` (of QLoRA, arXiv 2305.14314).
        device: device that the teacher runs on.
        precision: Lightning's name of the precision to autocast to.

    Raises:
        ModuleNotFoundError: if bitsandbytes is not installed.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        load_block: LoadBlock | None,
        storage: Storage,
        device: torch.device,
        precision: str,
    ) -> None:
        blocks = find_blocks(model)
        for index in range(len(blocks)):
            if load_block is not None:
                blocks[index] = load_block(index)
            for name, layer in find_linears(blocks[index]).items():
                blocks[index].set_submodule(name, _stored(layer, storage, device))
            blocks[index].to(device)
        model.requires_grad_(False).to(device)  # type: ignore[arg-type]
        self.model, self.device, self.precision = model, device, precision

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Tensor:
        """Return the states that the head reads, `[windows, sequence_length, hidden]`, of tokens `[windows, …]`."""
        with autocast(self.device, self.precision):
            states: list[Tensor] = []
            with stopped_at_head(self.model, states.append):
                self.model(input_ids=tokens, use_cache=False)
        return states[0]


def _stored(layer: nn.Linear, storage: Storage, device: torch.device) -> nn.Module:
    """Return a linear layer of bitsandbytes with the weight of `layer`, on the device."""
    import bitsandbytes as bnb  # an import of a second

    sizes, weight, biased = (layer.in_features, layer.out_features), layer.weight.data, layer.bias is not None
    quantized: nn.Module
    if storage == "nf4":
        quantized = bnb.nn.Linear4bit(*sizes, bias=biased, compute_dtype=torch.bfloat16, quant_type="nf4")
        quantized.weight = bnb.nn.Params4bit(weight.to(torch.bfloat16), requires_grad=False, quant_type="nf4")
    else:
        quantized = bnb.nn.Linear8bitLt(*sizes, bias=biased, has_fp16_weights=False)
        quantized.weight = bnb.nn.Int8Params(weight.to(torch.float16), requires_grad=False, has_fp16_weights=False)
    if biased:
        quantized.bias = layer.bias
    return quantized.to(device)
