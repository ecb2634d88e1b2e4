"""The `slimplus` quantization method of SGLang, by which SGLang serves packed checkpoints.

SGLang calls `register` in each of its processes, through the entry point group `sglang.srt.plugins`. The interfaces are
those of SGLang 0.5.23: https://github.com/sgl-project/sglang/tree/main/python/sglang/srt/plugins. Linear layers are
served packed; embeddings, heads and experts are not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from sglang.srt.distributed.utils import get_group_rank_size
from sglang.srt.layers.linear import LinearBase
from sglang.srt.layers.quantization import CPU_QUANTIZATION_METHODS, QUANTIZATION_METHODS
from sglang.srt.layers.quantization.base_config import LinearMethodBase, QuantizationConfig
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
from torch import Tensor, nn

from slimplus.hub.contents import METHOD
from slimplus.hub.engine_layers import (
    LoadedPart,
    PackedLinears,
    PartLoader,
    StoredLayer,
    is_outside,
    names_in,
    rows_of_rank,
    stored_layers,
    unshared_rows,
)


class PackedConfig(QuantizationConfig):
    """SGLang's view of a checkpoint's `quantization_config`.

    Args:
        layers: the packed layers of the checkpoint by name.
        fused: names of the layers that a layer of SGLang's model holds, by its name.
    """

    def __init__(self, layers: Mapping[str, StoredLayer], fused: Mapping[str, list[str]]) -> None:
        super().__init__()
        self.layers = dict(layers)
        self.packed_modules_mapping = dict(fused)

    def get_name(self) -> str:
        """Return the name of the method."""
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Return the dtypes of activations: kernels multiply two of them, float32 is multiplied by dense weights."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Return the compute capability of Ampere, the first with bfloat16."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Return the files to read beside config.json: none."""
        return []

    def get_scaled_act_names(self) -> list[str]:
        """Return the activations whose outputs are scaled: none."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> PackedConfig:
        """Return the configuration that the `quantization_config` of config.json describes.

        Raises:
            ValueError: naming the key that is missing or wrong, or a layer that SGLang does not take packed: an expert,
                or one outside the blocks, which is an embedding or a head.
        """
        layers = stored_layers(config, "SGLang")
        if outside := next(filter(is_outside, layers), None):
            raise ValueError(
                f"{outside}: SGLang takes no packed embedding or head; quantize with quantization.embedding_bits=null "
                "quantization.head_bits=null"
            )
        return cls(layers, config.get("packed_modules_mapping") or {})

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """Return the method for the layer called `prefix`, or None for a layer that SGLang is to treat as its own.

        Raises:
            ValueError: naming the layer, if only some of what SGLang multiplies in one layer is packed.
        """
        if not isinstance(layer, LinearBase):
            return None
        names = names_in(prefix, self.layers, self.packed_modules_mapping, "SGLang")
        return PackedLinearMethod([self.layers[name] for name in names]) if names else UnquantizedLinearMethod()


class PackedLinearMethod(LinearMethodBase):
    """The method of SGLang's linear layers, which hold one or more packed layers.

    Args:
        stored: layers of the checkpoint that SGLang's layer holds, in SGLang's order.
    """

    def __init__(self, stored: list[StoredLayer]) -> None:
        self.stored = tuple(stored)
        self.loader = PartLoader(stored)
        self._dtype = torch.bfloat16

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **_: Any,
    ) -> None:
        """Give `layer` an empty parameter for each name of a tensor, by whose loader SGLang hands the tensors over.

        Args:
            layer: SGLang's layer.
            input_size_per_partition: columns of the weight on this rank.
            output_partition_sizes: rows on this rank, of each of the layers that SGLang's layer holds.
            input_size: columns of the weight.
            output_size: rows of all these layers.
            params_dtype: dtype of the activations.
            **_: further arguments of SGLang, which have no meaning here.

        Raises:
            ValueError: naming the layer, if the rows of the checkpoint cannot be shared out so.
        """
        rank, ranks = get_group_rank_size(getattr(layer, "tp_group", None))  # a replicated layer has no group
        same_group = get_group_rank_size(getattr(layer, "kv_tp_group", None)) in [(rank, ranks), (0, 1)]
        stored_rows = [one.shape[0] for one in self.stored]
        replicas = getattr(layer, "num_kv_head_replicas", 1)
        rows = rows_of_rank(stored_rows, output_partition_sizes, rank, ranks, replicas) if same_group else None
        if rows is None:
            raise unshared_rows(self.stored, output_partition_sizes, ranks, "SGLang")
        first = rank * input_size_per_partition if input_size_per_partition != input_size else 0
        columns = range(first, first + input_size_per_partition)
        parts = [LoadedPart(one, own, columns) for one, own in zip(self.stored, rows, strict=True)]
        self.loader.expect(layer, parts)
        self._dtype = params_dtype

    def process_weights_after_loading(self, layer: Any) -> None:
        """Make packed layers of the tensors that were loaded, and remove the empty parameters."""
        layer.packed = PackedLinears(self.loader.take(layer), self._dtype)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Multiply `x` `[..., in]` by the packed layers, `[..., sum of out]`."""
        outputs: Tensor = layer.packed(x)
        return outputs if bias is None else outputs + bias


def register() -> None:
    """Register the method with SGLang; a second call changes nothing."""
    QUANTIZATION_METHODS[METHOD] = PackedConfig
    CPU_QUANTIZATION_METHODS[METHOD] = PackedConfig  # the methods that SGLang takes on a CPU with AMX
