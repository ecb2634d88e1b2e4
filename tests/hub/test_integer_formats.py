"""compressed-tensors and GPTQ: what their layouts hold is the packed weight, and what they cannot hold is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import slimplus
from slimplus.cli.main import main
from slimplus.hub.integer_formats import COMPRESSED_TENSORS, GPTQ, pack_words
from slimplus.nn import PackedLinear
from tests.support.models import ModelMaker
from tests.support.packed import save_packed


def unpacked(words: Tensor, bits: int, count: int) -> Tensor:
    """Values `[rows, count]` of words `[rows, …]`, a bit at a time as the formats define them."""
    values = np.zeros((len(words), count), np.int64)
    for value in range(count):
        for bit in range(bits):
            word, place = divmod(value * bits + bit, 32)
            values[:, value] |= ((words[:, word].numpy().astype(np.int64) >> place) & 1) << bit
    return torch.from_numpy(values)


def read(format_: str, tensors: dict[str, Tensor], name: str, bits: int, group_size: int) -> Tensor:
    """The weight `[out, in]` of a layer, by the definition of the format, in float32."""
    if format_ == "compressed-tensors":
        rows, columns = tensors[f"{name}.weight_shape"].tolist()
        integers = unpacked(tensors[f"{name}.weight_packed"], bits, columns)
        zeros = unpacked(tensors[f"{name}.weight_zero_point"].T, bits, rows).T
        scales, groups = tensors[f"{name}.weight_scale"], torch.arange(columns) // group_size
    else:
        scales, groups = tensors[f"{name}.scales"].T, tensors[f"{name}.g_idx"].long()
        integers = unpacked(tensors[f"{name}.qweight"].T, bits, len(groups))
        zeros = unpacked(tensors[f"{name}.qzeros"], bits, len(scales)).T
    return (integers - zeros[:, groups]).float() * scales.float()[:, groups]


@given(st.integers(1, 8), st.integers(1, 3), st.integers(1, 70), st.integers(0, 99))
@settings(max_examples=40)
def test_words_hold_values_bit_after_bit(bits: int, rows: int, count: int, seed: int) -> None:
    values = torch.randint(2**bits, (rows, count), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    words = pack_words(values, bits)
    assert words.shape == (rows, -(-count * bits // 32))
    assert torch.equal(unpacked(words, bits, count), values.long())


@pytest.mark.parametrize(
    ("format_", "bits"), [*(("compressed-tensors", bits) for bits in range(2, 9)), *(("gptq", b) for b in (2, 3, 4, 8))]
)
def test_every_weight_is_that_of_the_packed_checkpoint(
    make_model: ModelMaker, tmp_path: Path, format_: str, bits: int
) -> None:
    packed = save_packed(make_model("llama"), tmp_path / "packed", (bits,))
    assert main(["export", str(packed), "--to", format_, str(tmp_path / "out")]) == 0
    tensors = load_file(tmp_path / "out/model.safetensors")
    model = slimplus.load(packed, dtype=torch.float32)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, PackedLinear)}
    assert len(layers) == 14
    for name, layer in list(layers.items())[:7]:
        assert torch.equal(read(format_, tensors, name, bits, 32), layer.dequantize()), name
    others = {name: tensor for name, tensor in model.state_dict().items() if name.endswith("norm.weight")}
    assert all(torch.equal(tensors[name], tensor.half()) for name, tensor in others.items())
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("x = 1") == AutoTokenizer.from_pretrained(packed)("x = 1")


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_transformers_loads_compressed_tensors(
    make_model: ModelMaker, tokens: Tensor, tmp_path: Path, bits: int
) -> None:
    """With nothing but compressed-tensors: its product rounds each weight to float16 once."""
    pytest.importorskip("compressed_tensors")
    packed = save_packed(make_model("llama"), tmp_path / "packed", (bits,), outer=["model.embed_tokens"])
    assert main(["export", str(packed), "--to", "compressed-tensors", str(tmp_path / "out")]) == 0
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    expected: Any = slimplus.dequantize(slimplus.load(packed, dtype=torch.float32), torch.float16).float()
    torch.testing.assert_close(loaded(tokens).logits, expected(tokens).logits, rtol=1e-5, atol=1e-5)


def test_layers_of_several_widths_are_read_by_compressed_tensors_and_never_wrongly_by_transformers(
    make_model: ModelMaker, tmp_path: Path
) -> None:
    compressors = pytest.importorskip("compressed_tensors.compressors")
    from compressed_tensors.quantization import QuantizationConfig

    widths = {"q_proj": (4,), "down_proj": (3,), "": (2,)}
    packed = save_packed(make_model("llama"), tmp_path / "packed", by_layer=widths)
    assert main(["export", str(packed), "--to", "compressed-tensors", str(tmp_path / "out")]) == 0
    tensors = load_file(tmp_path / "out/model.safetensors")
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    del config["dequantize"]
    groups = QuantizationConfig.model_validate(config).config_groups.values()
    assert [group.weights.num_bits for group in groups] == [4, 3, 2]
    model = slimplus.load(packed, dtype=torch.float32)
    compressor = compressors.BaseCompressor.get_value_from_registry("pack-quantized")
    for group in groups:
        for name in group.targets:
            own = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
            layer: Any = model.get_submodule(name)
            assert torch.equal(compressor.decompress(own, group)["weight"], layer.dequantize().half()), name
    with pytest.raises(RuntimeError, match="issues during automatic conversion"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_gptq_names_layers_of_another_width_and_those_that_stay(make_model: ModelMaker, tmp_path: Path) -> None:
    packed = save_packed(make_model("llama"), tmp_path / "packed", by_layer={"down_proj": (4,), "": (2,)})
    assert main(["export", str(packed), "--to", "gptq", str(tmp_path / "out")]) == 0
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert (config["bits"], config["checkpoint_format"]) == (2, "gptq_v2")
    names = [f"model.layers.{index}.mlp.down_proj" for index in range(2)]
    matched = {name: own for pattern, own in config["dynamic"].items() for name in names if re.match(pattern[2:], name)}
    assert matched == dict.fromkeys(names, {"bits": 4})
    tensors = load_file(tmp_path / "out/model.safetensors")
    layer: Any = slimplus.load(packed, dtype=torch.float32).get_submodule(names[0])
    assert torch.equal(read("gptq", tensors, names[0], 4, 32), layer.dequantize())


@pytest.mark.parametrize("format_", ["compressed-tensors", "gptq"])
@pytest.mark.parametrize(
    ("widths", "reason"),
    [
        ((2, 3), r"mixes groups of .* bits, and the format has one width a layer: .*quantization\.per_layer=true"),
        (
            (1,),
            r"has fractional zero points, .*quantization\.zero_points=integer|has 1 bits, and the format holds 2, 3",
        ),
    ],
)
def test_what_a_format_cannot_hold_names_the_key_and_the_formats_that_can(
    make_model: ModelMaker,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    format_: str,
    widths: tuple[int, ...],
    reason: str,
) -> None:
    packed = save_packed(make_model("llama"), tmp_path / "packed", widths)
    capsys.readouterr()
    assert main(["export", str(packed), "--to", format_, str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(f"{reason}.*; `--to gguf` and `--to dense` hold it", error)
    assert list(tmp_path.iterdir()) == [packed]


def test_shapes_that_do_not_come_out_even_are_refused() -> None:
    from slimplus.hub.contents import PackedLayer

    layer = PackedLayer("q", 48, 100, (3, 3), 64, 0)
    assert COMPRESSED_TENSORS.uneven(layer) == "100 columns, no multiple of its group size of 64"
    assert GPTQ.uneven(layer) == "48 rows and 100 columns of 3 bits, which do not fill words of 32 bits"
    assert GPTQ.uneven(PackedLayer("q", 64, 96, (3, 3), 64, 0)) is None
