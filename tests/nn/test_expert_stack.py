"""Experts as linear layers: the same outputs as the modules of transformers, whatever their layout."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.muse_spark.modeling_muse_spark import MuseSparkExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

from slimplus.nn.expert_stack import ExpertStack, expert_layout

HIDDEN, INNER, EXPERTS, TOKENS, CHOSEN = 32, 48, 4, 10, 2
SIZES = {
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_local_experts": EXPERTS,
    "n_routed_experts": EXPERTS,
    "moe_intermediate_size": INNER,
    "moe_hidden_size": HIDDEN,
    "moe_latent_size": None,
}
KINDS = {
    "mixtral": MixtralExperts,
    "gpt_oss": GptOssExperts,  # transposed, interleaved, with biases and clamps
    "nemotron_h": NemotronHExperts,  # without a gate
    "muse_spark_text": MuseSparkExperts,  # with a norm after each expert
}


def build(kind: type[nn.Module], model_type: str) -> nn.Module:
    """A random module of experts."""
    config: PretrainedConfig = AutoConfig.for_model(model_type)
    for key, value in SIZES.items():
        if hasattr(config, key):
            setattr(config, key, value)
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    module = kind(config)
    for parameter in module.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape)
    return module.requires_grad_(False)


def routed() -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, the experts of each token, of which the last has none, and their weights."""
    generator = torch.Generator().manual_seed(1)
    indices = torch.stack([torch.randperm(EXPERTS - 1, generator=generator)[:CHOSEN] for _ in range(TOKENS)])
    return torch.randn(TOKENS, HIDDEN, generator=generator), indices, torch.rand(TOKENS, CHOSEN, generator=generator)


@pytest.mark.parametrize("model_type", KINDS)
def test_the_outputs_are_those_of_the_module(model_type: str) -> None:
    module = build(KINDS[model_type], model_type)
    inputs = routed()
    expected, tensors = module(*inputs), {name: tensor.clone() for name, tensor in module.named_parameters()}
    stack = ExpertStack(module)
    torch.testing.assert_close(stack(*inputs), expected, atol=1e-5, rtol=1e-5)
    fused: Any = deepcopy(stack).fused()
    assert {name: tensor.shape for name, tensor in fused.named_parameters()} == {
        name: tensor.shape for name, tensor in tensors.items()
    }
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in fused.named_parameters())
    torch.testing.assert_close(fused(*inputs), expected, atol=0, rtol=0)


def test_experts_that_are_called_with_the_inputs_of_each_end_to_end() -> None:
    """As in Llama 4: the inputs of an expert that a token is not sent to are zero."""
    module = build(Llama4TextExperts, "llama4_text")
    hidden = (
        torch.randn(EXPERTS, TOKENS, HIDDEN) * (torch.arange(TOKENS) % 3 == torch.arange(EXPERTS)[:, None])[..., None]
    )
    flat = hidden.view(-1, HIDDEN)
    expected = module(flat)
    stack = ExpertStack(module)
    torch.testing.assert_close(stack(flat), expected, atol=1e-5, rtol=1e-5)
    assert stack.choices(flat).tolist() == [[token % 3] for token in range(TOKENS)]


def test_weights_are_views_of_the_module_and_experts_without_tokens_are_not_run() -> None:
    module: Any = build(MixtralExperts, "mixtral")
    whole = module.gate_up_proj.data_ptr()
    stack = ExpertStack(module)
    layers: Any = stack.projection("gate_up_proj")
    assert layers[0].weight.data_ptr() == whole
    assert layers[3].weight.shape == (2 * INNER, HIDDEN)
    called: list[int] = []
    for expert, layer in enumerate(layers):
        layer.register_forward_hook(lambda *_, expert=expert: called.append(expert))
    stack(*routed())
    assert called == [0, 1, 2]


def test_every_trained_expert_gets_a_gradient() -> None:
    """Processes that train together must run the same layers, also those without tokens."""
    stack = ExpertStack(build(MixtralExperts, "mixtral")).requires_grad_()
    stack(*routed()).sum().backward()
    assert all(parameter.grad is not None for parameter in stack.parameters())


def test_a_module_of_another_layout_is_refused() -> None:
    module = build(MixtralExperts, "mixtral")
    module.register_parameter("scale", nn.Parameter(torch.ones(EXPERTS)))
    assert expert_layout(module) is None
    assert expert_layout(nn.Linear(4, 4)) is None
    with pytest.raises(ValueError, match="a MixtralExperts is no module of experts of a known layout"):
        ExpertStack(module)
