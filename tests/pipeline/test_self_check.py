"""Architectures of transformers, tried on small random models; and broken ones, which are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import slimplus
from slimplus.models.architectures import UnsupportedModelError, packed_share, plain_linears
from slimplus.models.loading import build_on_meta
from slimplus.models.shrink import shrink
from slimplus.nn import PackedEmbedding, PackedLinear
from slimplus.pipeline.self_check import describe, self_check
from slimplus.utils.errors import InputError
from tests.support.recipes import Arguments
from tests.support.runs import read_metrics, run

FAST = ("gemma3_text", "gpt2", "mamba2", "mixtral")
SLOW = (
    *("apertus", "bamba", "bloom", "cohere", "cohere2", "deepseek_v3", "ernie4_5", "exaone4", "falcon", "falcon_h1"),
    *("falcon_mamba", "gemma", "gemma2", "gemma4_text", "glm", "glm4", "gpt_bigcode", "gpt_neo", "gpt_neox"),
    *("gpt_oss", "gptj", "granite", "helium", "jamba", "lfm2", "llama4_text", "mamba", "minicpm3", "mpt", "olmo"),
    *("olmo2", "olmo3", "olmoe", "persimmon", "phi", "phi3", "qwen3_5_text", "qwen3_moe", "qwen3_next", "seed_oss"),
    *("smollm3", "stablelm", "starcoder2", "xglm"),
)
BLOCKS = {"jamba": 5, "qwen3_next": 4, "qwen3_5_text": 4}
"""Number of blocks of a whole run where two are none with attention, which transformers needs in order to generate."""
VALUES = {"mamba2": {"hidden_size": 256, "num_heads": 16, "head_dim": 32, "n_groups": 2}}
"""Values of configurations that can be shrunk twice: the self-check shrinks what the test has shrunk."""
UNPACKED = ("falcon_mamba", "mamba")
"""Architectures of which less than 90% can be packed once they are shrunk."""
ALONE = ("bamba", "falcon_h1")
"""Architectures of which only the self-check runs: shrunk twice, they are no model that transformers builds."""
VOCABULARY = 257  # of the byte-level tokenizer


@pytest.mark.parametrize("model_type", [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_architectures_pass(model_type: str) -> None:
    """Streaming block by block equals the model, and a packed checkpoint that is loaded equals it dequantized."""
    config = AutoConfig.for_model(model_type)
    report = describe(build_on_meta(config))
    self_check(config)
    assert report.layers > 0
    assert report.blocks >= 2


@pytest.mark.parametrize(
    "model_type",
    ["gpt2", *(pytest.param(name, marks=pytest.mark.slow) for name in (*FAST, *SLOW) if name not in (*ALONE, "gpt2"))],
)
def test_a_whole_run_of_an_architecture(arguments: Arguments, make_model: Any, tmp_path: Path, model_type: str) -> None:
    """Check, quantize, export, load back through transformers, generate: packed equals calibrated, to the bit."""
    folder = tmp_path / "model"
    tokenizer = AutoTokenizer.from_pretrained(make_model("llama"))
    default = AutoConfig.for_model(model_type, **VALUES.get(model_type, {}))
    config = shrink(default, BLOCKS.get(model_type, 2))
    config.vocab_size = len(tokenizer)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    keys = ["quantization.method=rtn", "quantization.bits=4", "quantization.group_size=64"]
    keys += ["model.allow_unpacked=true"] if model_type in UNPACKED else []
    out = tmp_path / "run"
    run(arguments(out, *keys, model=folder))
    packed: Any = AutoModelForCausalLM.from_pretrained(out / "packed", dtype=torch.float32)
    calibrated = plain_linears(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    layers = {name: layer for name, layer in packed.named_modules() if isinstance(layer, PackedLinear)}
    assert layers
    for name, layer in layers.items():
        calibrated.set_submodule(name, layer.to_linear())
    tokens = torch.randint(1, VOCABULARY, (2, 24))
    with torch.no_grad():
        assert torch.equal(packed(input_ids=tokens).logits, calibrated(input_ids=tokens).logits)
    written = packed.generate(tokens[:1], max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
    assert written.shape == (1, 28)
    metrics = read_metrics(out)
    assert metrics["packed_share"] == packed_share(calibrated)
    assert f"of the {metrics['packed_share']:.1%} of the weights" in (out / "summary.txt").read_text()


def test_experts_are_not_left_out_in_silence(arguments: Arguments, tmp_path: Path, make_model: Any) -> None:
    """Those of LongCat, whose layout is not known."""
    values = json.dumps({"model_type": "longcat_flash"}).replace('"', "")
    dry = arguments(tmp_path / "run", "dry_run=true", "model.config=" + values.replace(":", ": "))
    with pytest.raises(
        InputError, match=r"only 2\.4% of the weights in the blocks of this longcat_flash model can be packed"
    ):
        _dry_run(dry)
    plan = _dry_run([*dry, "model.allow_unpacked=true"])
    assert "average bits               2.000, of the 2.4% of the weights in the blocks that are packed" in plan


def _dry_run(arguments: list[str]) -> str:
    from slimplus.pipeline.plan import dry_run
    from slimplus.recipe.parsing import load_recipe

    return dry_run(load_recipe(arguments))


def _llama(**values: Any) -> Any:
    return AutoConfig.for_model("llama", rope_theta=123.0, **values)  # values that no other test has checked


def test_a_block_that_reads_more_than_its_arguments_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in an architecture whose blocks look at something that depends on the tokens, past their arguments."""
    forward = LlamaDecoderLayer.forward
    seen: list[Tensor] = []

    def forgetful(self: Any, hidden_states: Tensor, **arguments: Any) -> Tensor:
        seen.append(hidden_states)
        return forward(self, hidden_states, **arguments) + 0.1 * seen[-2 if len(seen) > 1 else -1].mean()

    monkeypatch.setattr(LlamaDecoderLayer, "forward", forgetful)
    with pytest.raises(UnsupportedModelError, match="'llama' is not supported: block 1, run by itself, gives"):
        self_check(_llama(hidden_size=512, num_attention_heads=4))


def test_an_argument_that_depends_on_the_tokens_is_kept_for_each_window(monkeypatch: pytest.MonkeyPatch) -> None:
    _with_token_arguments(monkeypatch)
    self_check(_llama(hidden_size=1024, num_attention_heads=8))


def test_ignoring_what_depends_on_the_tokens_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    _with_token_arguments(monkeypatch)
    monkeypatch.setattr("slimplus.models.block_arguments._equal_trees", lambda one, other: True)
    with pytest.raises(UnsupportedModelError, match="'llama' is not supported: block 0, run by itself, gives"):
        self_check(_llama(hidden_size=2048, num_attention_heads=16))


def _with_token_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has each block of LLaMA add a vector that follows from the tokens, which its caller hands over."""
    from transformers.models.llama.modeling_llama import LlamaModel

    forward, model_forward = LlamaDecoderLayer.forward, LlamaModel.forward

    def block(self: Any, hidden_states: Tensor, shift: Any = None, **arguments: Any) -> Tensor:
        output: Tensor = forward(self, hidden_states, **arguments)
        return output if shift is None else output + shift

    def model(self: Any, input_ids: Any = None, **arguments: Any) -> Any:
        return model_forward(self, input_ids=input_ids, shift=input_ids[..., None] / 100, **arguments)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", block)
    monkeypatch.setattr(LlamaModel, "forward", model)


def test_an_output_that_is_dropped_is_refused() -> None:
    """Blocks of this architecture hand a state on, beside the hidden states."""
    with pytest.raises(UnsupportedModelError, match="'zaya' is not supported: "):
        self_check(AutoConfig.for_model("zaya"))


def test_blocks_that_share_a_weight_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="'zamba2' is not supported: .* share one weight"):
        self_check(AutoConfig.for_model("zamba2"))


def test_packed_embeddings_of_gemma_scale_their_rows(arguments: Arguments, tmp_path: Path, make_model: Any) -> None:
    keys = ["quantization.embedding_bits=8"]
    packed, full = _packed_and_full("gemma3_text", {}, keys, arguments, make_model, tmp_path)
    tokens = torch.randint(1, VOCABULARY, (2, 8))
    found, expected = packed.get_input_embeddings()(tokens), full.get_input_embeddings()(tokens)
    assert float((found - expected).norm() / expected.norm()) < 0.01
    logits = packed(input_ids=tokens).logits
    dense = slimplus.dequantize(packed)  # an ordinary embedding, which scales its rows as well
    assert torch.equal(dense.get_input_embeddings()(tokens), found)
    torch.testing.assert_close(dense(input_ids=tokens).logits, logits)


@pytest.mark.slow
def test_embeddings_that_gemma_4_adds_in_each_block_are_packed(
    arguments: Arguments, tmp_path: Path, make_model: Any
) -> None:
    """They are the larger part of its small models."""
    values = {"hidden_size_per_layer_input": 32, "vocab_size_per_layer_input": VOCABULARY}
    keys = ["quantization.embedding_bits=4"]
    packed, full = _packed_and_full("gemma4_text", values, keys, arguments, make_model, tmp_path)
    found, expected = packed.model.embed_tokens_per_layer, full.model.embed_tokens_per_layer
    assert isinstance(found, PackedEmbedding)
    assert isinstance(packed.model.embed_tokens, PackedEmbedding)
    tokens = torch.arange(1, 200)
    assert float((found(tokens) - expected(tokens)).norm() / expected(tokens).norm()) < 0.2
    assert read_metrics(tmp_path / "run")["outer_bits"] == {
        "model.embed_tokens": 4,
        "model.embed_tokens_per_layer": 4,
    }


def _packed_and_full(
    model_type: str, values: dict[str, Any], keys: list[str], arguments: Arguments, make_model: Any, folder: Path
) -> tuple[Any, Any]:
    """A small model in float32, packed at 4 bits as well as `keys` say, and as it was."""
    tokenizer = AutoTokenizer.from_pretrained(make_model("llama"))
    config = shrink(AutoConfig.for_model(model_type, **values), 2)
    config.vocab_size = len(tokenizer)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rounded = ["quantization.method=rtn", "quantization.bits=4", "quantization.group_size=64"]
    run(arguments(folder / "run", *rounded, *keys, model=folder / "model"))
    packed = slimplus.load(folder / "run" / "packed", dtype=torch.float32).requires_grad_(False)
    full = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    return packed, full.requires_grad_(False)
