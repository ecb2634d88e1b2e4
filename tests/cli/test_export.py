"""slimplus export: what other tools read back is what the packed checkpoint computes."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedTokenizerFast

import slimplus
from slimplus.cli.main import main
from tests.support.models import ModelMaker
from tests.support.packed import save_packed

LARGEST_DIVERGENCE = 1e-4  # offsets of blocks are float16
PLAIN = """
import sys, torch
sys.modules["slimplus"] = None
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
tokens = torch.tensor([[int(token) for token in sys.argv[2].split(",")]])
torch.save(model(tokens).logits.detach(), sys.argv[3])
"""


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(1, 250, (4, 24), generator=torch.Generator().manual_seed(0))


def logits_of(packed: Path, tokens: Tensor) -> Tensor:
    model: Any = slimplus.load(packed, dtype=torch.float32)
    logits: Tensor = model(tokens).logits.detach()
    return logits


def divergence(first: Tensor, second: Tensor) -> float:
    """Mean Kullback-Leibler divergence of a token's distribution, in nats."""
    one, two = (logits.double().log_softmax(-1) for logits in (first, second))
    return (one.exp() * (one - two)).sum(-1).mean().item()


def test_a_dense_export_loads_without_slimplus(packed: Path, tokens: Tensor, tmp_path: Path) -> None:
    dense, logits = tmp_path / "dense", tmp_path / "logits.pt"
    assert main(["export", str(packed.parent), "--to", "dense", str(dense), "--dtype", "float32"]) == 0  # of a run
    given = ",".join(map(str, tokens[0].tolist()))
    subprocess.run([sys.executable, "-c", PLAIN, dense, given, logits], cwd=tmp_path, capture_output=True, check=True)
    expected = logits_of(packed, tokens[:1])
    torch.testing.assert_close(torch.load(logits, weights_only=True), expected, atol=1e-5, rtol=1e-5)
    assert AutoTokenizer.from_pretrained(dense)("x = 1") == AutoTokenizer.from_pretrained(packed)("x = 1")
    assert "quantization_config" not in json.loads((dense / "config.json").read_text())


@pytest.mark.parametrize(
    ("model_type", "outer"), [("llama", ["model.embed_tokens"]), ("opt", ["model.decoder.embed_tokens"])]
)
def test_a_packed_embedding_becomes_an_ordinary_one(
    make_model: ModelMaker, tokens: Tensor, tmp_path: Path, model_type: str, outer: list[str]
) -> None:
    packed = save_packed(make_model(model_type), tmp_path / "packed", outer=outer)
    assert main(["export", str(packed), "--to", "dense", str(tmp_path / "dense"), "--dtype", "bfloat16"]) == 0
    dense: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    model: Any = slimplus.dequantize(slimplus.load(packed, dtype=torch.float32), torch.bfloat16).float()
    torch.testing.assert_close(dense(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize(
    ("model_type", "widths", "sizes", "kind"),
    [
        ("llama", (1, 2, 3, 4), {}, "Q4_1"),
        ("mistral", (2,), {"sliding_window": None}, "Q4_1"),
        ("llama", (3, 5), {}, "Q5_1"),
        ("qwen3", (2, 4), {"head_dim": 128}, "Q4_1"),  # transformers' reader takes 128 for granted
    ],
)
def test_a_gguf_export_is_read_back(
    make_model: ModelMaker,
    tokens: Tensor,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    model_type: str,
    widths: tuple[int, ...],
    sizes: dict[str, Any],
    kind: str,
) -> None:
    packed = save_packed(make_model(model_type, **sizes), tmp_path / "packed", widths)
    file = tmp_path / "model.gguf"
    assert main(["export", str(packed), "--to", "gguf", str(file)]) == 0
    assert f"{kind}       integers and scales; offsets rounded once" in capsys.readouterr().out
    config = GgufConfig(dequantize=True)
    read: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=file.name, dtype=torch.float32, quantization_config=config
    )
    expected = logits_of(packed, tokens)
    assert divergence(expected, read(tokens).logits) < LARGEST_DIVERGENCE
    same = read(tokens).logits.argmax(-1) == expected.argmax(-1)
    assert same.double().mean() > 0.95  # logits of a random model have near ties
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(("kind", "largest"), [("q8_0", 0.0045), ("q4_0", 0.13)])
def test_a_smaller_type_rounds_embedding_and_head_alone(
    make_model: ModelMaker, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, largest: float
) -> None:
    """The largest value of a block is 127 or 8 steps from 0; at the other end of 4 bits there are but 7."""
    packed = save_packed(make_model("mistral", sliding_window=None), tmp_path / "packed")
    for name, options in (("plain", []), ("small", ["--gguf-type", kind])):
        assert main(["export", str(packed), "--to", "gguf", str(tmp_path / f"{name}.gguf"), *options]) == 0
    assert f"2       {kind.upper()}       rounded to {kind[1]} bits" in capsys.readouterr().out
    plain, small = (gguf.GGUFReader(tmp_path / f"{name}.gguf").tensors for name in ("plain", "small"))
    for one, other in zip(plain, small, strict=True):
        if one.name not in ("token_embd.weight", "output.weight"):
            assert np.array_equal(one.data, other.data)
            continue
        assert other.tensor_type.name == kind.upper()
        before = one.data.astype(np.float32)
        error = np.abs(before - gguf.quants.dequantize(other.data, other.tensor_type)).reshape(len(before), -1, 32)
        values = np.abs(before).reshape(error.shape).max(-1)
        assert 0 < (error.max(-1) / values.clip(min=1e-9)).max() <= largest  # the row of the padding is 0


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        (["--to", "gguf", "--dtype", "bfloat16"], "--dtype: GGUF has types of its own; give --gguf-type"),
        (["--to", "dense", "--gguf-type", "q8_0"], "--gguf-type is for --to gguf; give --dtype"),
    ],
)
def test_an_option_of_another_format_is_refused(
    packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], remedy: str
) -> None:
    assert main(["export", str(packed), str(tmp_path / "out"), *options]) == 2
    assert remedy in capsys.readouterr().err


def test_the_scaling_of_llama_3_1_becomes_factors_of_frequencies(make_model: ModelMaker, tmp_path: Path) -> None:
    """By its definition: long wavelengths are scaled, short ones stay, and those between are interpolated."""
    packed = save_packed(make_model("llama"), tmp_path / "packed", (2,))
    rope = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "original_max_position_embeddings": 64}
    rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = json.loads((packed / "config.json").read_text())
    (packed / "config.json").write_text(json.dumps(config | {"rope_parameters": rope}))
    assert main(["export", str(packed), "--to", "gguf", str(tmp_path / "model.gguf")]) == 0
    read = gguf.GGUFReader(tmp_path / "model.gguf")
    (factors,) = (tensor.data for tensor in read.tensors if tensor.name == "rope_freqs.weight")
    half = config["hidden_size"] // config["num_attention_heads"] // 2
    assert factors.shape == (half,)
    expected = []
    for index in range(half):
        wavelength = 2 * math.pi * 500.0 ** (index / half)
        smooth = min(max((64 / wavelength - 1) / 3, 0), 1)
        expected.append(1 / ((1 - smooth) / 8 + smooth))
    torch.testing.assert_close(torch.tensor(factors), torch.tensor(expected), rtol=1e-5, atol=1e-5)
    assert expected[0] == 1 < expected[-1]


def test_integers_and_scales_of_blocks_are_exact() -> None:
    from slimplus.format.affine import QuantizedWeight
    from slimplus.hub.gguf import affine_blocks
    from tests.support.layers import random_weight

    for widths, kind in (((1, 2, 3, 4), "Q4_1"), ((5,), "Q5_1")):
        weight = random_weight(48, 160, 64, widths)
        whole = QuantizedWeight(
            weight.integers, weight.scale.half().float(), torch.zeros_like(weight.scale), weight.bits, 64
        )
        blocks = affine_blocks(whole, wide=kind == "Q5_1")
        read = gguf.quants.dequantize(blocks.reshape(48, -1), gguf.GGMLQuantizationType[kind])
        assert torch.equal(torch.from_numpy(read), whole.dequantize())


def test_the_tokenizer_of_a_gguf_file_splits_as_the_saved_one(make_model: ModelMaker, tmp_path: Path) -> None:
    packed = save_packed(make_model("llama"), tmp_path / "packed")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=257, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator(["the theory of the thing", "then there is 2024"], trainer)
    saved = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="!")
    saved.save_pretrained(packed)
    config = json.loads((packed / "config.json").read_text())
    (packed / "config.json").write_text(json.dumps(config | {"eos_token_id": None, "bos_token_id": None}))
    assert main(["export", str(packed), "--to", "gguf", str(tmp_path / "model.gguf")]) == 0
    read: Any = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    text = "the theory is naïve — 東京 2024\n\n  then"
    assert read(text)["input_ids"] == saved(text)["input_ids"]
    assert read.decode(read(text)["input_ids"]) == text


@pytest.mark.parametrize(
    ("model_type", "group_size", "change", "reason"),
    [
        ("opt", 32, {}, "GGUF: model_type opt is not written, only llama, mistral, qwen2, qwen3"),
        ("llama", 16, {}, "in groups of 16, and blocks of 32 cannot hold it"),
        ("mistral", 32, {}, "GGUF: sliding_window=8 has no place in the format"),
        ("llama", 32, {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "scaled positions .* not written"),
    ],
)
def test_what_gguf_cannot_hold_is_said_with_what_can(
    make_model: ModelMaker,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    model_type: str,
    group_size: int,
    change: dict[str, Any],
    reason: str,
) -> None:
    packed = save_packed(make_model(model_type), tmp_path / "packed", (2,), group_size)
    config = json.loads((packed / "config.json").read_text())
    (packed / "config.json").write_text(json.dumps(config | change))
    capsys.readouterr()
    assert main(["export", str(packed), "--to", "gguf", str(tmp_path / "model.gguf")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(f"{reason}.*; `--to dense` holds it", error)
    assert list(tmp_path.iterdir()) == [packed]


def test_a_target_that_exists_and_one_that_cannot_be_written(
    packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(packed), "--to", "dense", str(tmp_path)]) == 2
    assert f"{tmp_path} exists; give a name that is free" in capsys.readouterr().err
    assert main(["export", str(packed), "--to", "dense", str(tmp_path / "no/dense")]) == 2
    assert f"{tmp_path / 'no'} is not a folder" in capsys.readouterr().err
