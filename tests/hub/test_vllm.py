"""The vLLM plugin against stand-ins with the interfaces of vLLM 0.32; `make test-vllm` runs it in vLLM itself.

The stand-ins repeat what https://github.com/vllm-project/vllm/tree/v0.32.0/vllm/model_executor/layers (linear.py,
quantization/__init__.py and base_config.py) does around a quantization method: how layers are built, how the loader
hands over tensors with the id of their shard, and how the forward calls the method.
"""

from __future__ import annotations

import importlib
import sys
import tomllib
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slimplus.format.affine import QuantizedWeight, group_count, per_column, storable_scale
from slimplus.format.planes import stored_scale_bits
from slimplus.nn import PackedLinear, prepare_inference
from tests.support.processes import ROOT

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


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """`slimplus.hub.vllm`, imported with stand-ins in the place of vLLM."""
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


@pytest.mark.parametrize("scale_bits", [8, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 5, 500])
def test_the_fused_layer_computes_what_the_separate_ones_do(
    plugin: Any, dtype: torch.dtype, rows: int, scale_bits: int
) -> None:
    """Few rows of bfloat16 are multiplied by int4, the others by dequantized weights."""
    separate = attention(scale_bits)
    fused = fused_attention(plugin, separate)
    load_attention(fused, separate)
    prepare_inference(separate)
    inputs = torch.randn(rows, COLUMNS, dtype=dtype)
    expected = outputs(separate, inputs)
    assert torch.equal(fused(inputs), expected)
    fused.bias = nn.Parameter(torch.randn(expected.shape[1], dtype=dtype), requires_grad=False)
    assert torch.equal(fused(inputs), expected + fused.bias)


def test_shards_with_numbers_and_layers_alone(plugin: Any) -> None:
    layers = {
        "mlp.gate_proj": packed_layer(96, (2, 1, 3), 5),
        "mlp.up_proj": packed_layer(96, (2, 2, 2), 6),
        "mlp.down_proj": packed_layer(192, (3, 1), 7, columns=96),
    }
    config = plugin.PackedConfig.from_config(quantization(layers))
    config.packed_modules_mapping["gate_up_proj"] = ["gate_proj", "up_proj"]
    gate_up = LinearBase(config, "mlp.gate_up_proj", COLUMNS, [96, 96])
    down = LinearBase(config, "mlp.down_proj", 96, [192])
    for shard, name in enumerate(["mlp.gate_proj", "mlp.up_proj"]):
        for key, tensor in layers[name].named_buffers():
            gate_up.load(key, tensor, shard)
    for key, tensor in layers["mlp.down_proj"].named_buffers():
        down.load(key, tensor)  # vLLM gives no shard where there is but one
    for layer in (gate_up, down):
        layer.quant_method.process_weights_after_loading(layer)
    inputs = torch.randn(3, COLUMNS)
    assert torch.equal(gate_up(inputs), torch.cat([layers[f"mlp.{n}_proj"](inputs) for n in ("gate", "up")], dim=-1))
    assert torch.equal(down(inputs[:, :96]), layers["mlp.down_proj"](inputs[:, :96]))


def test_nothing_is_held_twice(plugin: Any) -> None:
    separate = attention()
    fused = fused_attention(plugin, separate)
    assert sum(parameter.nbytes for parameter in fused.parameters()) == 0
    load_attention(fused, separate)
    assert not list(fused.parameters())
    assert sum(tensor.nbytes for tensor in fused.buffers()) == sum(tensor.nbytes for tensor in separate.buffers())


def test_the_compiler_does_not_see_how_many_rows_go_which_way(plugin: Any) -> None:
    separate = attention()
    fused = fused_attention(plugin, separate)
    load_attention(fused, separate)
    compiled = torch.compile(fused, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (2, 7, 500):
        inputs = torch.randn(rows, COLUMNS, dtype=torch.bfloat16)
        with torch.inference_mode(), torch.compiler.set_stance("fail_on_recompile" if rows > 2 else "default"):
            assert torch.equal(compiled(inputs), fused(inputs))
    torch.library.opcheck(torch.ops.slimplus.vllm_linear, (inputs, "slimplus:model.layers.0.self_attn.q_proj", 120))


@pytest.mark.parametrize("scale_bits", [8, 16])
def test_ranks_share_the_rows_of_q_k_and_v(plugin: Any, scale_bits: int) -> None:
    """Two ranks for each of the heads of k and v: both keep the same rows of these."""
    separate = attention(scale_bits)
    whole = [layer.dequantize() for layer in separate.children()]  # type: ignore[operator] # a packed layer
    inputs = torch.randn(3, COLUMNS)
    for rank in range(4):
        fused = fused_attention(plugin, separate, ranks=4, rank=rank, replicas=2)
        load_attention(fused, separate)
        q, k, v = (len(weight) // shards for weight, shards in zip(whole, (4, 2, 2), strict=True))
        pair = rank // 2
        own = [whole[0][rank * q :][:q], whole[1][pair * k :][:k], whole[2][pair * v :][:v]]
        assert torch.equal(fused(inputs), torch.cat([inputs @ weight.T for weight in own], dim=-1))


def test_ranks_share_the_rows_of_a_layer_that_the_checkpoint_has_fused(plugin: Any) -> None:
    fused = packed_layer(64 + 32 + 32, (2, 1, 3), 0)
    config = plugin.PackedConfig.from_config(quantization({"attn.qkv_proj": fused}))
    for rank in range(4):
        own: Any = LinearBase(config, "attn.qkv_proj", COLUMNS, [64, 32, 32], 4, rank, replicas=2)
        for name, tensor in fused.named_buffers():
            own.load(name, tensor)
        own.quant_method.process_weights_after_loading(own)
        q, k, v = fused.dequantize().split([64, 32, 32])
        weight = torch.cat([q[rank * 16 :][:16], k[rank // 2 * 16 :][:16], v[rank // 2 * 16 :][:16]])
        assert torch.equal(own.packed.layers[0].dequantize(), weight)


@pytest.mark.parametrize("scale_bits", [8, 16])
def test_ranks_share_columns_and_cut_groups(plugin: Any, scale_bits: int) -> None:
    layer = packed_layer(40, (2, 1, 3), 0, scale_bits=scale_bits)
    config = plugin.PackedConfig.from_config(quantization({"mlp.down_proj": layer}))
    inputs = torch.randn(3, COLUMNS)
    for rank in range(2):
        own = LinearBase(config, "mlp.down_proj", COLUMNS, [40], 2, rank, by_columns=True)
        for name, tensor in layer.named_buffers():
            own.load(name, tensor)
        own.quant_method.process_weights_after_loading(own)
        columns = slice(rank * 96, (rank + 1) * 96)  # groups have 64
        assert torch.equal(own(inputs[:, columns]), inputs[:, columns] @ layer.dequantize()[:, columns].T)


def test_ranks_that_cannot_share_a_layer_are_told(plugin: Any) -> None:
    layer = packed_layer(40, (2, 1, 3), 0)
    config = plugin.PackedConfig.from_config(quantization({"mlp.down_proj": layer}))
    own = LinearBase(config, "mlp.down_proj", COLUMNS, [40], 8, 0, by_columns=True)
    *others, (name, last) = layer.named_buffers()
    for other, tensor in others:
        own.load(other, tensor)
    with pytest.raises(ValueError, match=r"mlp\.down_proj: columns 0 to 23 cut .* another --tensor-parallel-size"):
        own.load(name, last)
    with pytest.raises(ValueError, match=r"vLLM wants \[15\] rows on each of 2 ranks, which the checkpoint's \[40\]"):
        LinearBase(config, "mlp.down_proj", COLUMNS, [30], 2)


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_embedding_with_an_empty_prefix_looks_up_and_multiplies(plugin: Any, ranks: int) -> None:
    plugin.described.tie_word_embeddings = True
    packed = packed_layer(100, (4, 8, 4), 0)
    block = packed_layer(16, (2, 2, 2), 1)
    config = plugin.PackedConfig.from_config(
        quantization({"model.embed_tokens": packed, "model.layers.0.mlp.up_proj": block})
    )
    inputs, weight = torch.randn(3, COLUMNS), packed.dequantize()
    logits, rows = [], []
    for rank in range(ranks):
        LinearBase(config, "model.layers.0.mlp.up_proj", COLUMNS, [16])
        embedding = VocabParallelEmbedding(config, "", 100, COLUMNS, ranks, rank)
        head = ParallelLMHead(config, ".lm_head", 100, COLUMNS, ranks, rank)
        assert isinstance(head.quant_method, plugin.TiedHeadMethod)
        assert head.quant_method.tie_weights(head, embedding) is embedding
        assert embedding.bias is None
        for name, tensor in packed.named_buffers():
            embedding.load(name, tensor)
        method = embedding.quant_method
        method.process_weights_after_loading(embedding)
        indices = embedding.shard_indices
        own = torch.arange(indices.org_vocab_end_index - indices.org_vocab_start_index)
        rows.append(method.embedding(embedding, own))
        logits.append(method.apply(embedding, inputs))
        assert logits[-1].shape[-1] == 128 // ranks
    assert torch.equal(torch.cat(rows), weight)
    assert torch.equal(torch.cat(logits, dim=-1)[:, :100], inputs @ weight.T)
    assert config.get_checkpoint_weight_mapper() == "the mapper"


def test_a_packed_embedding_that_vllm_does_not_ask_for_is_named(plugin: Any) -> None:
    layers = {
        "model.embed_tokens": packed_layer(100, (4, 8, 4), 0),
        "model.layers.0.up": packed_layer(16, (2, 2, 2), 1),
    }
    config = plugin.PackedConfig.from_config(quantization(layers))
    with pytest.raises(ValueError, match=r"model\.embed_tokens: vLLM's model .* not take it packed; quantize with"):
        config.get_checkpoint_weight_mapper()


def test_what_vllm_cannot_serve_is_named(plugin: Any) -> None:
    with pytest.raises(ValueError, match=r"mlp\.experts\.up_proj\.0: vLLM takes no packed experts; serve what"):
        plugin.PackedConfig.from_config(quantization({"mlp.experts.up_proj.0": packed_layer(16, (2, 2, 2), 0)}))
    plugin.described.model_type = "bloom"
    config = plugin.PackedConfig.from_config(quantization({"h.0.query_key_value": packed_layer(48, (2, 2, 2), 0)}))
    with pytest.raises(ValueError, match=r"h\.0\.query_key_value: vLLM's bloom reorders rows"):
        LinearBase(config, "h.0.query_key_value", COLUMNS, [48])


def test_a_tensor_that_does_not_fit_is_named(plugin: Any) -> None:
    separate = attention()
    fused = fused_attention(plugin, separate)
    scales = separate.get_submodule("k_proj").get_buffer("scales")
    with pytest.raises(ValueError, match=r"self_attn\.k_proj\.scales: config.json asks for \(3, 32\), .* \(2, 32\)"):
        fused.load("scales", scales[:2], "k")
    with pytest.raises(ValueError, match=r"self_attn\.k_proj\.qplane1: config.json asks for None"):
        fused.load("qplane1", torch.zeros(4, 32, dtype=torch.int16), "k")  # it has groups of 2 bits alone


def test_a_tensor_that_the_checkpoint_lacks_is_named(plugin: Any) -> None:
    fused = fused_attention(plugin, attention())
    with pytest.raises(ValueError, match=r"the checkpoint lacks model\.layers\.0\.self_attn\.q_proj\.qplane1"):
        fused.quant_method.process_weights_after_loading(fused)


def test_only_what_the_checkpoint_packs_is_taken(plugin: Any) -> None:
    layers = {f"a.{name}": packed_layer(16, (2, 2, 2), 0) for name in ("q_proj", "k_proj")}
    config = plugin.PackedConfig.from_config(quantization(layers))
    config.packed_modules_mapping["qkv_proj"] = ["q_proj", "k_proj", "v_proj"]
    linear = LinearBase.__new__(LinearBase)
    assert isinstance(config.get_quant_method(linear, "a.q_proj"), plugin.PackedLinearMethod)
    assert isinstance(config.get_quant_method(linear, "other.o_proj"), UnquantizedLinearMethod)
    assert config.get_quant_method(nn.Module(), "a.attn") is None
    assert VocabParallelEmbedding(config, "", 100, COLUMNS).quant_method is None
    with pytest.raises(ValueError, match=r"of a\.q_proj, a\.k_proj, a\.v_proj only a\.q_proj, a\.k_proj is packed"):
        config.get_quant_method(linear, "a.qkv_proj")


def test_a_model_may_name_its_layers_otherwise(plugin: Any) -> None:
    config = plugin.PackedConfig.from_config(quantization({"model.q_proj": packed_layer(16, (2, 2, 2), 0)}))
    config.apply_vllm_mapper(SimpleNamespace(apply_dict=lambda d: {f"language_{name}": v for name, v in d.items()}))
    assert list(config.layers) == ["language_model.q_proj"]


def test_the_entry_point_registers_once(plugin: Any) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    target = project["entry-points"]["vllm.general_plugins"]["slimplus"]
    assert target == f"{plugin.register.__module__}:{plugin.register.__name__}"
    plugin.register()
    plugin.register()  # vLLM calls it in each process, and sometimes twice
    assert plugin.methods == {"slimplus": plugin.PackedConfig}
    config = plugin.PackedConfig({})
    assert config.get_name() == "slimplus"
    assert torch.bfloat16 in config.get_supported_act_dtypes()
