"""The vLLM plugin against stand-ins with the interfaces of vLLM 0.33, and against vLLM itself where it is installed.

The stand-ins repeat what https://github.com/vllm-project/vllm/tree/v0.33.0/vllm/model_executor/layers (linear.py,
quantization/__init__.py and base_config.py) does around a quantization method: how layers are built, how the loader
hands over tensors with the id of their shard, and how the forward calls the method.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
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
ATTENTION = {"q": ("q_proj", 64, (1, 3, 2)), "k": ("k_proj", 32, (2, 2, 2)), "v": ("v_proj", 24, (4, 2, 1))}
"""Shard id → name, rows and widths of the groups: other planes and another order of groups in each."""


class QuantizationConfig:
    def __init__(self) -> None:
        self.packed_modules_mapping: dict[str, list[str]] = {}


class LinearMethodBase:
    pass


class UnquantizedLinearMethod(LinearMethodBase):
    pass


class LinearBase(nn.Module):
    """A linear layer as vLLM builds it, `output_sizes` one above the other; `tp_size` ranks share them."""

    def __init__(self, config: Any, prefix: str, input_size: int, output_sizes: list[int], tp_size: int = 1) -> None:
        super().__init__()
        self.quant_method = config.get_quant_method(self, prefix=prefix)
        self.quant_method.create_weights(
            layer=self,
            input_size_per_partition=input_size,
            output_partition_sizes=[size // tp_size for size in output_sizes],
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

    context = SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context=layers))
    contents: dict[str, dict[str, Any]] = {
        "vllm": {},
        "vllm.config": {"get_current_vllm_config": lambda: context},
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
    }
    for name, members in contents.items():
        module = ModuleType(name)
        module.__dict__.update(members)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "slimplus.hub.vllm", raising=False)
    module = importlib.import_module("slimplus.hub.vllm")
    names = ("register", "PackedConfig", "PackedLinearMethod")
    yield SimpleNamespace(methods=methods, **{name: getattr(module, name) for name in names})
    sys.modules.pop("slimplus.hub.vllm", None)


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


def fused_attention(plugin: Any, separate: nn.Module, tp_size: int = 1) -> Any:
    """vLLM's layer over all three, not loaded yet."""
    layers = {f"model.layers.0.self_attn.{name}": layer for name, layer in separate.named_children()}
    config = plugin.PackedConfig.from_config(quantization(layers))  # type: ignore[arg-type]
    config.packed_modules_mapping["qkv_proj"] = list(dict(separate.named_children()))
    sizes = [rows for _, rows, _ in ATTENTION.values()]
    return LinearBase(config, "model.layers.0.self_attn.qkv_proj", COLUMNS, sizes, tp_size)


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
    stored = sum(tensor.nbytes for tensor in separate.buffers())
    assert sum(parameter.nbytes for parameter in fused.parameters()) == stored
    load_attention(fused, separate)
    assert not list(fused.parameters())
    assert sum(tensor.nbytes for tensor in fused.buffers()) == stored


def test_the_compiler_does_not_see_how_many_rows_go_which_way(plugin: Any) -> None:
    separate = attention()
    fused = fused_attention(plugin, separate)
    load_attention(fused, separate)
    compiled = torch.compile(fused, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (2, 7, 500):
        inputs = torch.randn(rows, COLUMNS, dtype=torch.bfloat16)
        with torch.inference_mode(), torch.compiler.set_stance("fail_on_recompile" if rows > 2 else "default"):
            assert torch.equal(compiled(inputs), fused(inputs))
    torch.library.opcheck(torch.ops.slimplus.vllm_linear, (inputs, "model.layers.0.self_attn.qkv_proj", 120))


def test_tensor_parallelism_is_refused(plugin: Any) -> None:
    with pytest.raises(ValueError, match=r"qkv_proj: packed layers are not split .* --tensor-parallel-size 1"):
        fused_attention(plugin, attention(), tp_size=2)


def test_a_tensor_that_does_not_fit_is_named(plugin: Any) -> None:
    separate = attention()
    fused = fused_attention(plugin, separate)
    scales = separate.get_submodule("k_proj").get_buffer("scales")
    with pytest.raises(ValueError, match=r"self_attn\.k_proj\.scales: config.json asks for \(3, 32\), .* \(2, 32\)"):
        fused.load("scales", scales[:2], "k")
    with pytest.raises(ValueError, match=r"self_attn\.k_proj\.qplane1: config.json asks for None"):
        fused.load("qplane1", torch.zeros(4, 32, dtype=torch.int16), "k")  # it has groups of 2 bits alone


def test_only_what_the_checkpoint_packs_is_taken(plugin: Any) -> None:
    layers = {f"a.{name}": packed_layer(16, (2, 2, 2), 0) for name in ("q_proj", "k_proj")} | {
        "model.embed_tokens": packed_layer(256, (4, 4, 4), 1)
    }
    config = plugin.PackedConfig.from_config(quantization(layers))
    config.packed_modules_mapping["qkv_proj"] = ["q_proj", "k_proj", "v_proj"]
    linear = LinearBase.__new__(LinearBase)
    assert isinstance(config.get_quant_method(linear, "a.q_proj"), plugin.PackedLinearMethod)
    assert isinstance(config.get_quant_method(linear, "other.o_proj"), UnquantizedLinearMethod)
    assert config.get_quant_method(nn.Module(), "a.attn") is None
    with pytest.raises(ValueError, match=r"of a\.q_proj, a\.k_proj, a\.v_proj only a\.q_proj, a\.k_proj is packed"):
        config.get_quant_method(linear, "a.qkv_proj")
    with pytest.raises(ValueError, match=r"model\.embed_tokens: vLLM takes no packed embedding"):
        config.get_quant_method(nn.Embedding(4, 4), "model.embed_tokens")


def test_a_model_may_name_its_layers_otherwise(plugin: Any) -> None:
    config = plugin.PackedConfig.from_config(quantization({"model.q_proj": packed_layer(16, (2, 2, 2), 0)}))
    config.apply_vllm_mapper(SimpleNamespace(apply_dict=lambda d: {f"language_{name}": v for name, v in d.items()}))
    assert list(config.modules) == ["language_model.q_proj"]


def test_the_entry_point_registers_once(plugin: Any) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    target = project["entry-points"]["vllm.general_plugins"]["slimplus"]
    assert target == f"{plugin.register.__module__}:{plugin.register.__name__}"
    plugin.register()
    plugin.register()  # vLLM calls it in each process, and sometimes twice
    assert plugin.methods == {"slimplus": plugin.PackedConfig}
    config = plugin.PackedConfig(64, {})
    assert config.get_name() == "slimplus"
    assert torch.bfloat16 in config.get_supported_act_dtypes()


REAL = """
import sys, torch, vllm.platforms
from vllm.platforms.cpu import CpuPlatform
vllm.platforms.current_platform = CpuPlatform()  # its own choice where its compiled parts or a GPU are missing
import slimplus
from slimplus.hub.vllm import register
register()
from safetensors.torch import load_file
from vllm.config import ModelConfig, VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.forward_context import set_forward_context
from vllm.model_executor.model_loader.utils import initialize_model

path, store = sys.argv[1:]
model_config = ModelConfig(model=path, tokenizer=path, dtype="bfloat16", enforce_eager=True)
assert model_config.quantization == "slimplus", model_config.quantization
config = VllmConfig(model_config=model_config)
with set_current_vllm_config(config):
    init_distributed_environment(1, 0, f"file://{store}", 0, "gloo")
    initialize_model_parallel(1)
    torch.set_default_dtype(torch.bfloat16)
    model = initialize_model(vllm_config=config)
    loaded = model.load_weights(load_file(f"{path}/model.safetensors").items())
    missing = dict(model.named_parameters()).keys() - loaded - {"lm_head.weight"}
    assert not missing, missing
    for _, module in list(model.named_modules()):
        if type(getattr(module, "quant_method", None)).__name__ == "PackedLinearMethod":
            module.quant_method.process_weights_after_loading(module)
    torch.set_default_dtype(torch.float32)
    ours = dict(slimplus.load(path, dtype=torch.bfloat16).named_modules())
    seen = 0
    with set_forward_context(None, config), torch.no_grad():
        for name, layer in model.named_modules():
            method = getattr(layer, "quant_method", None)
            if type(method).__name__ == "PackedLinearMethod":
                separate = [ours[own] for own in method.names]
                inputs = torch.randn(5, separate[0].in_features, dtype=torch.bfloat16)
                found, _ = layer(inputs)
                assert torch.equal(found, torch.cat([each(inputs) for each in separate], dim=-1)), name
                seen += len(separate)
    packed = [name for name, module in ours.items() if type(module).__name__ == "PackedLinear"]
    assert seen == len(packed), (seen, packed)
sys.stdout.write("equal")
"""


@pytest.mark.slow
def test_vllm_itself_loads_the_checkpoint(finished: Path, tmp_path: Path) -> None:
    """vLLM's own models, loader and layers on the CPU; needs `pip install vllm`, and no compiled part of it."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    command = [sys.executable, "-c", REAL, str(finished / "packed"), str(tmp_path / "store")]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert process.stdout.endswith("equal"), process.stdout + process.stderr
