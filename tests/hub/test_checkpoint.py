"""What a run ships loads back, in this process and in a fresh one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import slimplus
from slimplus.nn import PackedLinear
from slimplus.utils.errors import InputError
from tests.support.models import TINY, ModelMaker
from tests.support.recipes import Arguments
from tests.support.runs import read_metrics, run


def _packed_layers(model: torch.nn.Module) -> dict[str, PackedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}


def test_loaded_weights_are_those_of_the_blocks(finished: Path) -> None:
    model = slimplus.load(finished / "packed")
    layers = _packed_layers(model)
    assert len(layers) == 14
    for name, layer in layers.items():
        _, _, index, inner = name.split(".", 3)
        stored = load_file(finished / "blocks" / f"block_{int(index):03d}.safetensors")
        own = {key.removeprefix(f"{inner}."): t for key, t in stored.items() if key.startswith(f"{inner}.")}
        original = PackedLinear.from_tensors(own, layer.in_features, layer.out_features, layer.group_size)
        assert torch.equal(layer.dequantize(), original.dequantize())
        assert layer.scales.dtype == torch.float16


def test_loaded_model_computes_what_dense_weights_would(finished: Path) -> None:
    packed, dense = (slimplus.load(finished / "packed", dtype=torch.float32) for _ in range(2))
    for name, layer in _packed_layers(dense).items():
        dense.set_submodule(name, layer.to_linear())
    tokens = torch.randint(1, 250, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(packed(tokens).logits, dense(tokens).logits)
        half = slimplus.load(finished / "packed", dtype=torch.bfloat16)(tokens).logits.float()
        torch.testing.assert_close(half, dense(tokens).logits, rtol=0.05, atol=0.3)


def test_save_pretrained_round_trips(finished: Path, tmp_path: Path) -> None:
    model = slimplus.load(finished / "packed")
    model.save_pretrained(tmp_path)
    again = slimplus.load(tmp_path)
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert torch.equal(tensor, after[name]), name


def test_from_pretrained_in_a_fresh_process(finished: Path, tmp_path: Path) -> None:
    code = f"""
import slimplus
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained({str(finished / "packed")!r})
tokenizer = AutoTokenizer.from_pretrained({str(finished / "packed")!r})
written = model.generate(**tokenizer("Once", return_tensors="pt"), max_new_tokens=4, do_sample=False)
assert written.shape == (1, 8), written.shape
assert type(model.model.layers[0].mlp.up_proj).__name__ == "PackedLinear"
"""
    # Transformers first, then this package, must work as well.
    for order in (code, f"import transformers.quantizers\n{code}"):
        subprocess.run([sys.executable, "-c", order], cwd=tmp_path, check=True, timeout=120)


def test_load_refuses_what_is_not_packed(make_model: ModelMaker) -> None:
    with pytest.raises(InputError, match="not a packed slimplus checkpoint"):
        slimplus.load(make_model("llama"))


@pytest.mark.parametrize("path", ["/no/such/folder", "./packed", "runs/no/packed"])
def test_a_missing_folder_is_told_as_such(path: str) -> None:
    with pytest.raises(InputError, match=f"^{path} does not exist; give the folder of a packed checkpoint"):
        slimplus.load(path)


def test_the_checkpoint_is_as_readable_as_the_other_files(finished: Path) -> None:
    modes = {file.name: file.stat().st_mode for file in (finished / "packed").iterdir()}
    assert len(set(modes.values())) == 1, modes


@pytest.mark.parametrize("model_type", sorted(set(TINY) - {"llama"}))
def test_every_architecture_loads_back(
    arguments: Arguments, make_model: ModelMaker, tmp_path: Path, model_type: str
) -> None:
    run(arguments(tmp_path / "run", "quantization.method=gptq", "quantization.bits=8", model=make_model(model_type)))
    perplexity = read_metrics(tmp_path / "run")["perplexity"]
    assert perplexity["quantized"] == pytest.approx(perplexity["full"], rel=0.05)


def test_shards(arguments: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from slimplus.hub import checkpoint

    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 20_000)
    run(arguments(tmp_path / "run", "quantization.method=rtn"))
    packed = tmp_path / "run" / "packed"
    shards = sorted(file.name for file in packed.glob("*.safetensors"))
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert len(shards) > 2
    assert len(_packed_layers(slimplus.load(packed))) == 14


def test_a_checkpoint_of_version_0_1_0_loads() -> None:
    golden = Path(__file__).parents[1] / "golden" / "packed_0_1_0"
    model = slimplus.load(golden / "checkpoint", dtype=torch.float32)
    with torch.inference_mode():
        logits = model(torch.arange(1, 33).view(1, 32)).logits[:, :8]
    torch.testing.assert_close(logits, load_file(golden / "logits.safetensors")["logits"], rtol=1e-4, atol=1e-4)


def test_a_packed_checkpoint_is_loaded_exactly(copy: Path) -> None:
    file = copy / "model.safetensors"
    held = load_file(file)
    save_file(
        held | {"lm_head.weight": held["model.embed_tokens.weight"] * 2, "x.bias": torch.ones(1)},
        file,
        {"format": "pt"},
    )
    with pytest.raises(
        InputError, match=r"holds x\.bias, which is no tensor of the model that its config.json describes"
    ):
        slimplus.load(copy)
    held["model.norm.weight"][3] = float("nan")
    save_file(held, file, {"format": "pt"})
    with pytest.raises(InputError, match=r"model\.norm\.weight holds NaN; export or download the checkpoint again"):
        slimplus.load(copy)
