"""Runs that pack the embedding and the head: what they write, and what loads back."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import slimplus
from slimplus.format.planes import packed_size
from slimplus.models.loading import ModelSource
from slimplus.models.streaming import BlockRunner, StreamedModel
from slimplus.nn import PackedEmbedding, PackedLinear, TiedHead
from slimplus.pipeline import run as pipeline
from slimplus.pipeline.plan import dry_run
from slimplus.quantization.least_squares import output_error
from slimplus.quantization.linear import QuantizationConfig, quantize_embedding_or_head
from slimplus.quantization.salience import HessianAccumulator
from slimplus.recipe.parsing import load_recipe
from slimplus.utils.errors import InputError
from slimplus.utils.units import format_bytes
from tests.support.models import ModelMaker
from tests.support.processes import ROOT
from tests.support.recipes import SMALL
from tests.support.runs import read_metrics, run

GPTQ = (*SMALL, "quantization.method=gptq", "quantization.bits=4")
BOTH = ("quantization.embedding_bits=8", "quantization.head_bits=4")
Arguments = Callable[..., list[str]]


@pytest.fixture(scope="module")
def arguments(make_model: ModelMaker, text_file: Path) -> Arguments:
    """`arguments(model_type, run_dir, *overrides)` of a small run; llama and opt are tied, qwen2 is not."""

    def build(model_type: str, run_dir: Path, *overrides: str) -> list[str]:
        return [
            "recipe=smollm2_135m_2bit",
            f"model.path={make_model(model_type)}",
            f"data.calibration.path={text_file}",
            f"data.evaluation.path={text_file}",
            *GPTQ,
            f"run_dir={run_dir}",
            *overrides,
        ]

    return build


def _dense(model: PreTrainedModel) -> PreTrainedModel:
    """A copy with ordinary layers in place of every packed one."""
    dense = deepcopy(model)
    for name, layer in list(dense.named_modules()):
        if isinstance(layer, PackedLinear):
            dense.set_submodule(name, layer.to_linear())
        elif isinstance(layer, PackedEmbedding):
            dense.set_submodule(name, nn.Embedding.from_pretrained(layer.dequantize()))
    return dense


def test_packed_tensors_keep_their_dtypes_in_a_streamed_model(packed_tied: Path) -> None:
    model = slimplus.load(packed_tied / "packed", dtype=torch.float32)
    before = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    StreamedModel(model, BlockRunner(torch.device("cpu"), "32-true"))
    assert {name: tensor.dtype for name, tensor in model.state_dict().items()} == before


@pytest.fixture(scope="module")
def packed_tied(arguments: Arguments, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a tied model that stores embedding and head apart."""
    folder = tmp_path_factory.mktemp("apart") / "run"
    pipeline.run(load_recipe(arguments("llama", folder, *BOTH)))
    return folder


CASES = {
    "tied, stored apart": ("llama", BOTH),
    "tied, shared": ("opt", ("quantization.embedding_bits=8",)),
    "untied, both": ("qwen2", BOTH),
    "untied, embedding": ("qwen2", ("quantization.embedding_bits=6",)),
    "untied, head": ("qwen2", ("quantization.head_bits=8",)),
}


@pytest.mark.parametrize("case", CASES)
def test_what_loads_back_computes_what_dense_weights_would(arguments: Arguments, tmp_path: Path, case: str) -> None:
    model_type, keys = CASES[case]
    summary = pipeline.run(load_recipe(arguments(model_type, tmp_path, *keys)))
    model = slimplus.load(tmp_path / "packed", dtype=torch.float32)
    tokens = torch.randint(1, 250, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, _dense(model)(tokens).logits)
        again = deepcopy(model)
        assert torch.equal(model(tokens).logits, again(tokens).logits)
    metrics = read_metrics(tmp_path)
    stored = load_file(tmp_path / "packed/model.safetensors")
    assert metrics["size_bytes"] == sum(tensor.nbytes for tensor in stored.values())
    assert metrics["perplexity"]["quantized"] == pytest.approx(metrics["perplexity"]["full"], rel=0.3)
    allocation = json.loads((tmp_path / "allocation.json").read_text())
    assert allocation["outer_bits"] == metrics["outer_bits"] != {}
    assert metrics["outer_bytes"] == sum(
        tensor.nbytes for name, tensor in stored.items() if name.rpartition(".")[0] in metrics["outer_bits"]
    )
    assert summary is not None
    quantization = json.loads((tmp_path / "packed/config.json").read_text())["quantization_config"]
    for name in metrics["outer_bits"]:
        assert quantization["shapes"][name] == [257, 64]
        assert quantization["modules"][name] == {str(metrics["outer_bits"][name]): 4}
    for name, bits in metrics["outer_bits"].items():
        assert f"{name} {bits} bits" in summary
        assert f"{name} {bits} bits" in (tmp_path / "packed/README.md").read_text()


def test_a_tied_weight_is_stored_once_unless_the_head_has_bits(
    arguments: Arguments, packed_tied: Path, tmp_path: Path
) -> None:
    config = json.loads((packed_tied / "packed/config.json").read_text())
    assert config["tie_word_embeddings"] is False
    apart: Any = slimplus.load(packed_tied / "packed")
    assert isinstance(apart.get_output_embeddings(), PackedLinear)
    assert read_metrics(packed_tied)["outer_bits"] == {"model.embed_tokens": 8, "lm_head": 4}

    pipeline.run(load_recipe(arguments("llama", tmp_path, BOTH[0])))
    shared: Any = slimplus.load(tmp_path / "packed")
    assert isinstance(shared.get_output_embeddings(), TiedHead)
    assert json.loads((tmp_path / "packed/config.json").read_text())["tie_word_embeddings"] is True
    assert not any(name.startswith("lm_head") for name in shared.state_dict())
    rows, columns = 257, 64
    assert read_metrics(tmp_path)["outer_bytes"] == packed_size(rows, {8: columns // 16}, 16)
    # The same quantizer either way.
    assert torch.equal(shared.get_input_embeddings().dequantize(), apart.get_input_embeddings().dequantize())

    shared.save_pretrained(tmp_path / "saved")
    again = slimplus.load(tmp_path / "saved")
    assert isinstance(again.get_output_embeddings(), TiedHead)
    for (name, tensor), (other, value) in zip(shared.state_dict().items(), again.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(tensor, value)


def test_the_head_of_a_run_minds_what_the_packed_blocks_feed_it(
    packed_tied: Path, make_model: ModelMaker, text_file: Path
) -> None:
    model = slimplus.load(packed_tied / "packed", dtype=torch.float32)
    head = model.get_output_embeddings()
    accumulator = HessianAccumulator(head.in_features, torch.device("cpu"))
    head.register_forward_pre_hook(lambda _, inputs: accumulator.add(inputs[0]))
    windows = load_file(packed_tied / "tokens/calibration.safetensors")["tokens"]
    with torch.no_grad():
        model(windows)
    weight = AutoModelForCausalLM.from_pretrained(make_model("llama"), dtype=torch.float32).lm_head.weight.detach()
    config = QuantizationConfig("gptq", 4, 16)
    deaf = quantize_embedding_or_head(weight, None, config).dequantize()
    same = quantize_embedding_or_head(weight, accumulator.hessian, config).dequantize()
    ours, others, again = (
        float(output_error(found - weight, accumulator.hessian).sum()) for found in (head.dequantize(), deaf, same)
    )
    assert ours < 0.9 * others
    assert ours == pytest.approx(again, rel=0.02)  # the embedding was not packed yet when the inputs were gathered


def test_other_outer_bits_reuse_the_blocks(arguments: Arguments, packed_tied: Path, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "run"
    shutil.copytree(packed_tied, folder)
    blocks = {path.name: path.read_bytes() for path in (folder / "blocks").iterdir()}
    pipeline.run(load_recipe(arguments("llama", folder)))
    assert read_metrics(folder)["outer_bits"] == {}
    assert read_metrics(folder)["size_bytes"] > read_metrics(packed_tied)["size_bytes"]
    assert read_metrics(folder)["perplexity"]["quantized"] != read_metrics(packed_tied)["perplexity"]["quantized"]
    assert "outside the blocks" not in (folder / "summary.txt").read_text()
    assert isinstance(slimplus.load(folder / "packed").get_input_embeddings(), nn.Embedding)
    pipeline.run(load_recipe(arguments("llama", folder, *BOTH)))
    assert read_metrics(folder)["perplexity"] == read_metrics(packed_tied)["perplexity"]
    assert blocks == {path.name: path.read_bytes() for path in (folder / "blocks").iterdir()}


def test_head_bits_alone_on_a_tied_model(arguments: Arguments, tmp_path: Path) -> None:
    for extra in ((), ("dry_run=true",)):
        recipe = load_recipe(arguments("llama", tmp_path / "run", BOTH[1], *extra))
        with pytest.raises(InputError, match=r"quantization\.head_bits: .* set quantization\.embedding_bits"):
            (dry_run if extra else pipeline.run)(recipe)
    assert not (tmp_path / "run" / "blocks").exists()


@pytest.mark.parametrize("keys", [BOTH, BOTH[:1]])
def test_the_plan_knows_the_size(arguments: Arguments, tmp_path: Path, keys: tuple[str, ...]) -> None:
    plan = dry_run(load_recipe(arguments("llama", tmp_path, "dry_run=true", *keys)))
    pipeline.run(load_recipe(arguments("llama", tmp_path, "quantization.method=rtn", *keys)))
    assert f"-> {format_bytes(read_metrics(tmp_path)['size_bytes'])} packed" in plan


@pytest.mark.slow
def test_the_command_packs_embedding_and_head_on_two_processes(
    arguments: Arguments, packed_tied: Path, tmp_path: Path
) -> None:
    command = [sys.executable, str(ROOT / "train.py"), *arguments("llama", tmp_path, *BOTH)]
    devices = ("trainer.accelerator=cpu", "trainer.devices=2", "trainer.strategy=ddp")
    done = subprocess.run([*command, *devices], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert "model.embed_tokens 8 bits, lm_head 4 bits" in done.stdout
    assert "It writes:" in done.stdout
    ours, theirs = (load_file(folder / "packed/model.safetensors") for folder in (tmp_path, packed_tied))
    for name in ("lm_head.qplane4", "lm_head.scales", "model.embed_tokens.qplane8"):
        assert torch.equal(ours[name], theirs[name]), name


@pytest.mark.parametrize("bits", [("quantization.embedding_bits=8",), ("quantization.head_bits=8",), BOTH])
def test_a_head_of_its_own_is_kept_though_the_configuration_denies_it(
    make_model: ModelMaker, arguments: Arguments, tmp_path: Path, tokens: torch.Tensor, bits: tuple[str, ...]
) -> None:
    folder = Path(shutil.copytree(make_model("llama"), tmp_path / "model"))
    held = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    held["lm_head.weight"] = torch.randn(held["model.embed_tokens.weight"].shape, generator=generator).bfloat16()
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    keys = (f"model.path={folder}", "quantization.method=rtn", "quantization.bits=8", *bits)
    run(arguments("llama", tmp_path / "run", *keys))
    packed = slimplus.load(tmp_path / "run/packed", dtype=torch.float32)
    assert not packed.config.tie_word_embeddings
    with torch.no_grad():
        expected = ModelSource(str(folder), dtype="float32").model()(input_ids=tokens).logits
        assert (packed(input_ids=tokens).logits - expected).abs().mean() < 0.1 * expected.abs().mean()
