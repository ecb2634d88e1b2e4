"""Stand-ins with the interfaces of vLLM 0.32, and packed layers to load into them.

They repeat what https://github.com/vllm-project/vllm/tree/v0.32.0/vllm/model_executor/layers (linear.py,
quantization/__init__.py and base_config.py) does around a quantization method: how layers are built, how the loader
hands over tensors with the id of their shard, and how the forward calls the method.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slimplus.format.affine import QuantizedWeight, group_count, per_column, storable_scale
from slimplus.format.planes import stored_scale_bits
from slimplus.nn import PackedLinear

COLUMNS, GROUP_SIZE = 192, 64
OWN_MODULES = ("slimplus.hub.vllm", "slimplus.hub.vllm_layers")
ATTENTION = {"q": ("q_proj", 64, (1, 3, 2)), "k": ("k_proj", 32, (2, 2, 2)), "v": ("v_proj", 24, (4, 2, 1))}
"""Shard id → name, rows and widths of the groups: other planes and another order of groups in each."""


class QuantizationConfig:
    def __init__(self) -> None:
        self.packed_modules_mapping: dict[str, list[str]] = {}

    @staticmethod
    def get_checkpoint_weight_mapper() -> str:
        return "the mapper"


class LinearMethodBase:
    pass


class UnquantizedLinearMethod(LinearMethodBase):
    pass


class LinearBase(nn.Module):
    """A linear layer as vLLM builds it, `output_sizes` one above the other; `ranks` share its rows or its columns."""

    def __init__(
        self,
        config: Any,
        prefix: str,
        input_size: int,
        output_sizes: list[int],
        ranks: int = 1,
        rank: int = 0,
        by_columns: bool = False,
        replicas: int = 1,
    ) -> None:
        super().__init__()
        self.tp_size, self.tp_rank, self.num_kv_head_replicas = ranks, rank, replicas
        rows = [size if by_columns else size // ranks for size in output_sizes]
        if replicas > 1:
            rows[1:] = [size * replicas // ranks for size in output_sizes[1:]]
        self.quant_method = config.get_quant_method(self, prefix=prefix)
        self.quant_method.create_weights(
            layer=self,
            input_size_per_partition=input_size // ranks if by_columns else input_size,
            output_partition_sizes=rows,
            input_size=input_size,
            output_size=sum(output_sizes),
            params_dtype=torch.bfloat16,
            weight_loader=None,
        )
        self.bias: nn.Parameter | None = None  # vLLM loads it by itself

    def load(self, name: str, loaded: Tensor, *shard: int | str) -> None:
        parameter = getattr(self, name)
        parameter.weight_loader(parameter, loaded, *shard)

    def forward(self, x: Tensor) -> Tensor:
        return self.quant_method.apply(self, x, self.bias)


class VocabParallelEmbedding(nn.Module):
    """An embedding as vLLM builds it, padded to a multiple of 64 rows."""

    def __init__(self, config: Any, prefix: str, rows: int, columns: int, ranks: int = 1, rank: int = 0) -> None:
        super().__init__()
        self.org_vocab_size, self.embedding_dim, self.tp_size, self.tp_rank = rows, columns, ranks, rank
        self.num_embeddings_per_partition = own = -(-rows // 64) * 64 // ranks
        self.shard_indices = SimpleNamespace(
            org_vocab_start_index=min(rank * own, rows), org_vocab_end_index=min((rank + 1) * own, rows)
        )
        self.quant_method = config.get_quant_method(self, prefix=prefix)
        if self.quant_method is not None:
            self.quant_method.create_weights(self, columns, [own], columns, rows, params_dtype=torch.float32)

    load = LinearBase.load


class ParallelLMHead(VocabParallelEmbedding):
    bias: nn.Parameter | None = None


def import_plugin(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """`slimplus.hub.vllm`, imported with stand-ins in the place of vLLM; afterwards it is forgotten again."""
    layers: dict[str, nn.Module] = {}
    methods: dict[str, type] = {}
    known = ["awq", "gptq"]

    def register_quantization_config(name: str) -> Any:
        def wrap(config: type) -> type:
            assert name not in known, "registered twice"
            assert issubclass(config, QuantizationConfig)
            known.append(name)
            methods[name] = config
            return config

        return wrap

    described = SimpleNamespace(model_type="llama", tie_word_embeddings=False)
    context = SimpleNamespace(
        compilation_config=SimpleNamespace(static_forward_context=layers),
        model_config=SimpleNamespace(hf_text_config=described),
    )
    contents: dict[str, dict[str, Any]] = {
        "vllm": {},
        "vllm.config": {"get_current_vllm_config": lambda: context},
        "vllm.distributed": {"get_pp_group": lambda: SimpleNamespace(world_size=1)},
        "vllm.forward_context": {"get_forward_context": lambda: SimpleNamespace(no_compile_layers=layers)},
        "vllm.model_executor": {},
        "vllm.model_executor.layers": {},
        "vllm.model_executor.layers.linear": {
            "LinearBase": LinearBase,
            "LinearMethodBase": LinearMethodBase,
            "UnquantizedLinearMethod": UnquantizedLinearMethod,
        },
        "vllm.model_executor.layers.quantization": {
            "QUANTIZATION_METHODS": known,
            "register_quantization_config": register_quantization_config,
        },
        "vllm.model_executor.layers.quantization.base_config": {"QuantizationConfig": QuantizationConfig},
        "vllm.model_executor.layers.vocab_parallel_embedding": {
            "ParallelLMHead": ParallelLMHead,
            "VocabParallelEmbedding": VocabParallelEmbedding,
        },
    }
    for name, members in contents.items():
        module = ModuleType(name)
        module.__dict__.update(members)
        monkeypatch.setitem(sys.modules, name, module)
    for name in OWN_MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    module = importlib.import_module(OWN_MODULES[0])
    names = ("register", "PackedConfig", "PackedLinearMethod", "TiedHeadMethod")
    members = {name: getattr(module, name) for name in names}
    yield SimpleNamespace(methods=methods, described=described, **members)
    for name in OWN_MODULES:
        sys.modules.pop(name, None)


def packed_layer(
    rows: int, widths: tuple[int, ...], seed: int, columns: int = COLUMNS, scale_bits: int = 16
) -> PackedLinear:
    generator = torch.Generator().manual_seed(seed)
    bits = torch.tensor(widths, dtype=torch.int32)
    assert len(bits) == group_count(columns, GROUP_SIZE)
    levels = per_column(2**bits, GROUP_SIZE, columns)
    integers = (torch.rand(rows, columns, generator=generator) * levels).to(torch.uint8)
    scale = storable_scale(torch.rand(rows, len(bits), generator=generator) * 0.1 + 0.01, scale_bits)
    zero_point = (2.0**bits / 2).floor().expand(rows, -1)
    weight = QuantizedWeight(integers, scale, zero_point, bits, GROUP_SIZE, scale_bits)
    return PackedLinear.from_quantized(weight, None)


def attention(scale_bits: int = 16) -> nn.Module:
    """The separate layers, in their container."""
    container = nn.Module()
    for seed, (name, rows, widths) in enumerate(ATTENTION.values()):
        container.add_module(name, packed_layer(rows, widths, seed, scale_bits=scale_bits))
    return container


def quantization(layers: dict[str, PackedLinear]) -> dict[str, Any]:
    """As config.json holds it: JSON makes text of the widths, and older files say nothing of 16-bit scales."""
    counts = {name: {str(width): n for width, n in layer.bit_counts.items()} for name, layer in layers.items()}
    shapes = {name: [layer.out_features, layer.in_features] for name, layer in layers.items()}
    settings = {"quant_method": "slimplus", "method": "slimllm", "bits": 2, "group_size": GROUP_SIZE}
    if stored_scale_bits(next(iter(layers.values())).packed_tensors()) == 8:
        settings["scale_bits"] = 8
    return settings | {"full_size_bytes": 1, "modules": counts, "shapes": shapes}


def fused_attention(plugin: Any, separate: nn.Module, ranks: int = 1, rank: int = 0, replicas: int = 1) -> Any:
    """vLLM's layer over all three, not loaded yet."""
    layers = {f"model.layers.0.self_attn.{name}": layer for name, layer in separate.named_children()}
    config = plugin.PackedConfig.from_config(quantization(layers))  # type: ignore[arg-type]
    config.packed_modules_mapping["qkv_proj"] = list(dict(separate.named_children()))
    sizes = [rows for _, rows, _ in ATTENTION.values()]
    return LinearBase(config, "model.layers.0.self_attn.qkv_proj", COLUMNS, sizes, ranks, rank, replicas=replicas)


def load_attention(fused: Any, separate: nn.Module) -> None:
    for shard in ("v", "q", "k"):  # files hold tensors in any order
        for name, tensor in separate.get_submodule(ATTENTION[shard][0]).named_buffers():
            fused.load(name, tensor, shard)
    fused.quant_method.process_weights_after_loading(fused)


def outputs(separate: nn.Module, inputs: Tensor) -> Tensor:
    return torch.cat([layer(inputs) for layer in separate.children()], dim=-1)
