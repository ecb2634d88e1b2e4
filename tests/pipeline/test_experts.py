"""A run on a mixture of experts: every expert is packed, also one without tokens, and the figures tell of it."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import slimplus
from slimplus.hub.contents import read_contents
from slimplus.hub.dense import export_dense
from slimplus.models.architectures import plain_linears
from slimplus.nn import PackedLinear
from slimplus.utils.errors import InputError
from tests.support.models import ModelMaker
from tests.support.recipes import Arguments
from tests.support.runs import read_metrics, run

EXPERTS, DEAD = 5, 2
KEYS = ("quantization.method=slimllm", "quantization.allocation=block", "quantization.widths=[1,2,3]", "data.samples=4")
TOKENS = torch.arange(1, 49).view(2, 24)


@pytest.fixture(scope="module")
def mixture(make_model: ModelMaker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny Mixtral in whose first block no token is sent to one of the experts."""
    folder, changed = make_model("mixtral"), tmp_path_factory.mktemp("mixture")
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    gate = model.model.layers[0].mlp.gate.weight.data
    gate[1], gate[DEAD], gate[4] = -gate[0], 0, -gate[3]  # two of the other four are always positive
    model.save_pretrained(changed)
    AutoTokenizer.from_pretrained(folder).save_pretrained(changed)
    return changed


@pytest.fixture(scope="module")
def quantized(arguments: Arguments, mixture: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a finished run on the mixture."""
    folder = tmp_path_factory.mktemp("run") / "experts"
    run(arguments(folder, *KEYS, model=mixture))
    return folder


@pytest.fixture(scope="module")
def packed(quantized: Path) -> Any:
    """The packed model as transformers loads it."""
    return AutoModelForCausalLM.from_pretrained(quantized / "packed", dtype=torch.float32)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=TOKENS).logits


def test_every_expert_is_packed_with_equal_numbers_of_widths(quantized: Path) -> None:
    contents = read_contents(str(quantized / "packed"))
    stacks: dict[str, list[Counter[int]]] = {}
    for layer in contents.layers:
        if "experts" in layer.name:
            stacks.setdefault(layer.name.rpartition(".")[0], []).append(Counter(layer.widths))
    assert len(stacks) == 4
    assert all(len(counts) == EXPERTS and all(own == counts[0] for own in counts) for counts in stacks.values())
    assert contents.average_bits == 2
    assert contents.packed_share > 0.99


def test_figures_tell_of_coverage_and_routing_and_name_experts_without_tokens(quantized: Path) -> None:
    metrics, summary = read_metrics(quantized), (quantized / "summary.txt").read_text()
    tokens = metrics["blocks"][0]["experts"]["mlp.experts"]
    assert (sum(tokens), tokens[DEAD]) == (2 * 4 * 32, 0)
    assert metrics["experts"]["dead"] == {"block 0, mlp.experts": [DEAD]}
    assert metrics["experts"]["tokens_least"] == 0
    assert 0.5 < metrics["routing_agreement"] <= 1
    assert "experts chosen as at full precision" in summary
    assert f"none for experts {DEAD} of block 0, mlp.experts" in summary
    assert f"no calibration token is sent to experts {DEAD} of mlp.experts" in summary


def test_the_packed_model_equals_the_calibrated_one_and_writes(mixture: Path, packed: Any) -> None:
    calibrated = plain_linears(AutoModelForCausalLM.from_pretrained(mixture, dtype=torch.float32))
    layers = {name: layer for name, layer in packed.named_modules() if isinstance(layer, PackedLinear)}
    assert len(layers) == 2 * (4 + 2 * EXPERTS)
    for name, layer in layers.items():
        calibrated.set_submodule(name, layer.to_linear())
    assert torch.equal(logits(packed), logits(calibrated))
    written = packed.generate(TOKENS[:1], max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
    assert written.shape == (1, 28)


def test_a_dense_export_is_what_transformers_stores(quantized: Path, packed: Any, tmp_path: Path) -> None:
    export_dense(read_contents(str(quantized / "packed")), tmp_path, torch.float32)
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    dense, found = loaded
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    assert type(dense.model.layers[0].mlp.experts).__name__ == "MixtralExperts"
    torch.testing.assert_close(logits(dense), logits(packed), atol=1e-4, rtol=1e-4)


def test_a_saved_model_loads_back_and_a_dequantized_one_is_an_ordinary_one(packed: Any, tmp_path: Path) -> None:
    expected = logits(packed)
    packed.save_pretrained(tmp_path / "packed")
    loaded: Any = slimplus.load(tmp_path / "packed", dtype=torch.float32)
    assert torch.equal(logits(loaded), expected)
    ordinary = slimplus.dequantize(loaded)
    ordinary.save_pretrained(tmp_path / "ordinary")
    stored = AutoModelForCausalLM.from_pretrained(tmp_path / "ordinary", dtype=torch.float32)
    torch.testing.assert_close(logits(stored), expected, atol=1e-4, rtol=1e-4)


def test_a_checkpoint_that_lacks_an_expert_is_refused(quantized: Path, tmp_path: Path) -> None:
    shutil.copytree(quantized / "packed", tmp_path / "packed")
    file = tmp_path / "packed" / "config.json"
    config = json.loads(file.read_text())
    name = "model.layers.1.mlp.experts.down_proj.3"
    for key in ("modules", "shapes"):
        del config["quantization_config"][key][name]
    file.write_text(json.dumps(config))
    with pytest.raises(InputError, match=rf"quantization_config.modules lacks {name}, one of 5 experts"):
        slimplus.load(tmp_path / "packed")
