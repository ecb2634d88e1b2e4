"""Which parameters end-to-end training moves, and how far."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from slimplus.distributed.deepspeed import _replace_parameters
from slimplus.models.architectures import is_norm
from slimplus.training.end_to_end import EndToEnd, EndToEndConfig
from slimplus.training.optimizers import RateConfig, build_optimizer


def test_a_norm_learns_in_parts_of_its_mean_gain() -> None:
    """Or a step of Adam is 5% of the gains in the first block of SmolLM2, and 0.05% in its last norm."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_attention_heads=2, num_hidden_layers=3
    )
    model = LlamaForCausalLM(config).eval()
    norms = {name: norm for name, norm in model.named_modules() if is_norm(norm)}
    for norm, gain in zip(norms.values(), (0.02, 0.3, 0.02, 0.3, 1.0, 1.0, 2.0), strict=True):
        torch.nn.init.constant_(norm.weight, gain)
    training = EndToEndConfig(1, 1, norms=RateConfig(0.01, "constant"), next_token=1, distillation=0)
    module = EndToEnd(model, None, training, "32-true")
    optimizer = build_optimizer("adamw", module.kinds(), 10, 0.0)["optimizer"]
    before = {name: norm.weight.detach().clone() for name, norm in norms.items()}
    module.loss((torch.randint(64, (1, 16)),)).backward()
    optimizer.step()
    assert len(optimizer.param_groups) == 4  # of about the same gains
    for name, norm in norms.items():
        moved = (norm.weight.detach() - before[name]).abs() / before[name].mean()
        assert 0.007 < float(moved.median()) < 0.0145


def test_the_gains_alone_tell_the_rate_of_a_norm_with_biases() -> None:
    """And what is trained are the norms' parameters of the moment: ZeRO replaces them after every attempt."""
    config = OPTConfig(vocab_size=64, hidden_size=32, ffn_dim=64, num_attention_heads=2, num_hidden_layers=2)
    module = EndToEnd(OPTForCausalLM(config).eval(), None, EndToEndConfig(1, 1, next_token=1), "32-true")
    _, norms = module.kinds()
    assert norms.unit == 1
    _replace_parameters(module)
    _, norms = module.kinds()
    assert len(norms.parameters) == 2 * (2 * 2 + 1)
    assert {id(parameter) for parameter in norms.parameters} <= {id(parameter) for parameter in module.parameters()}
