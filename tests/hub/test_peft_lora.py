"""LoRA by PEFT on packed layers: trained, saved, loaded, kept beside the packed layers or merged into ordinary ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import slimplus
from slimplus.hub.peft_lora import PackedLora

TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture
def windows() -> Tensor:
    return torch.randint(1, 250, (2, 12), generator=torch.Generator().manual_seed(0))


def adapted(packed: Path, **config: Any) -> Any:
    torch.manual_seed(0)
    model: Any = slimplus.load(packed, dtype=torch.float32)
    settings: dict[str, Any] = {"r": 4, "target_modules": TARGETS} | config
    return get_peft_model(model, LoraConfig(**settings))


def trained(packed: Path, windows: Tensor) -> tuple[Any, list[float]]:
    model, losses = adapted(packed), []
    optimizer = torch.optim.Adam([each for each in model.parameters() if each.requires_grad], lr=5e-3)
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(windows, labels=windows).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model.eval(), losses


def test_training_lowers_the_loss_and_the_adapter_is_saved_loaded_and_merged(
    packed: Path, windows: Tensor, tmp_path: Path
) -> None:
    model, losses = trained(packed, windows)
    assert losses[-1] < 0.8 * losses[0]
    assert type(model.base_model.model.model.layers[0].self_attn.q_proj) is PackedLora
    expected = model(windows).logits
    model.save_pretrained(tmp_path)
    loaded: Any = PeftModel.from_pretrained(slimplus.load(packed, dtype=torch.float32), str(tmp_path)).eval()
    assert torch.equal(loaded(windows).logits, expected)
    with pytest.raises(ValueError, match="cannot take an adapter in; slimplus.dequantize"):
        loaded.merge_and_unload()
    merged = slimplus.dequantize(loaded).merge_and_unload()
    assert type(merged.model.layers[0].self_attn.q_proj) is nn.Linear
    torch.testing.assert_close(merged(windows).logits, expected, atol=1e-4, rtol=1e-4)


def test_an_adapter_trains_as_on_ordinary_layers(packed: Path, windows: Tensor) -> None:
    model = adapted(packed)
    torch.manual_seed(0)
    dense: Any = slimplus.dequantize(slimplus.load(packed, dtype=torch.float32))
    other: Any = get_peft_model(dense, LoraConfig(r=4, target_modules=TARGETS))
    other.load_state_dict({key: value for key, value in model.state_dict().items() if "lora_" in key}, strict=False)
    for each in (model, other):
        each(windows, labels=windows).loss.backward()
    gradients = {name: each.grad for name, each in other.named_parameters() if "lora_B" in name}
    assert gradients
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"use_dora": True}, "plain LoRA, no variant"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' changes the weight"),
    ],
)
def test_what_would_change_the_packed_weight_is_refused(packed: Path, config: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=f"{reason}.*slimplus.dequantize"):
        adapted(packed, **config)
