"""A mixture's experts as ordinary linear layers, in the place of a module that holds all of them in one 3-D tensor.

transformers stores the experts of a block as tensors `[experts, out, in]` and multiplies them together. Everything else
here, from salience to packed kernels, works on linear layers; so each expert's projections become such layers, by names
like `mlp.experts.gate_up_proj.3`.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class ExpertLayout:
    """How a module stores the weights of its experts.

    Attributes:
        up: name of the projection that reads the hidden states; the other one is `down_proj`.
        transposed: whether weights are `[experts, in, out]` instead of `[experts, out, in]`.
        bias: whether there are biases `[experts, out]`, by the names `…_bias`.
        by_expert: whether the module is called with the inputs of all experts end to end, `[experts · tokens, hidden]`,
            already weighted, in which the inputs of an expert that a token is not sent to are zero.
    """

    up: str = "gate_up_proj"
    transposed: bool = False
    bias: bool = False
    by_expert: bool = False

    @property
    def projections(self) -> tuple[str, str]:
        """Names of the projections, in the order in which they are applied."""
        return self.up, "down_proj"


UNMARKED = {
    "Llama4TextExperts": ExpertLayout(transposed=True, by_expert=True),
    "Step3p7Experts": ExpertLayout(),
}
"""Layouts of the classes of transformers that `use_experts_implementation` does not mark."""


def expert_layout(module: nn.Module) -> ExpertLayout | None:
    """Return how a module stores its experts, or None if it is no module of experts of a known layout.

    `transformers.integrations.moe.use_experts_implementation` puts the layout on the modules of the classes it marks.
    """
    layout = UNMARKED.get(type(module).__name__)
    if layout is None:
        marks = [getattr(module, name, None) for name in ("has_gate", "is_transposed", "has_bias")]
        if None in marks:
            return None
        layout = ExpertLayout("gate_up_proj" if marks[0] else "up_proj", bool(marks[1]), bool(marks[2]))
    dimensions = dict.fromkeys(layout.projections, 3)
    if layout.bias:
        dimensions |= {f"{name}_bias": 2 for name in layout.projections}
    found = {name: parameter.dim() for name, parameter in module.named_parameters(recurse=False)}
    return layout if found == dimensions and not list(module.buffers(recurse=False)) else None


class ExpertStack(nn.Module):
    """Experts as linear layers: a list of them for each projection, by the names that the 3-D tensors had.

    The module is called as the one that it replaces, whose gate, activation and norms it applies. Experts that no token
    is sent to are not computed, unless their parameters are trained: then every process must run the same layers.

    Args:
        experts: a module of experts of a known layout. It loses its 3-D tensors, of which the linear layers' weights
            are views `[out, in]`.

    Attributes:
        layout: how the replaced module stored the weights.

    Raises:
        ValueError: if the module has no known layout.
    """

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        layout = expert_layout(experts)
        if layout is None:
            raise ValueError(f"a {type(experts).__name__} is no module of experts of a known layout")
        self.layout = layout
        for name in layout.projections:
            weight, bias = getattr(experts, name), getattr(experts, f"{name}_bias", None)
            self.add_module(name, nn.ModuleList(_linears(weight, bias, layout.transposed)))
            for key in (name, f"{name}_bias") if layout.bias else (name,):
                delattr(experts, key)
        for name, child in experts.named_children():  # activations and norms
            self.add_module(name, child)
        self.__dict__["_experts"] = experts  # not a part of this module: it holds no tensors of its own
        self.train(experts.training)

    @property
    def count(self) -> int:
        """Number of experts."""
        return len(self.projection(self.layout.up))

    def projection(self, name: str) -> nn.ModuleList:
        """Return the linear layers of a projection, one for each expert."""
        layers = getattr(self, name)
        assert isinstance(layers, nn.ModuleList)
        return layers

    @property
    def is_ordinary(self) -> bool:
        """Whether all the layers are ordinary linear layers, which `fused` needs."""
        return all(type(layer) is nn.Linear for name in self.layout.projections for layer in self.projection(name))

    def forward(self, hidden: Tensor, indices: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        """Return the weighted sum of the outputs of each token's experts, in the shape of `hidden`.

        Args:
            hidden: inputs `[tokens, hidden]`, or `[experts · tokens, hidden]` for the layout `by_expert`.
            indices: the experts of each token, `[tokens, chosen]`; numbers beyond the last expert stand for none.
            weights: their weights, `[tokens, chosen]`.
        """
        output = torch.zeros_like(hidden)
        for expert, rows, places in self._sent(hidden, indices):
            result = self._expert(expert, hidden[rows])
            if weights is not None:
                result = result * weights[rows, places, None]
            output.index_add_(0, rows, result.to(output.dtype))
        return output

    def _sent(self, hidden: Tensor, indices: Tensor | None) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield each expert to compute, the rows of `hidden` that it reads, and their places in `indices`."""
        trained = any(parameter.requires_grad for parameter in self.parameters())
        if indices is None:
            indices = _owners(hidden, self.count)
        for expert in range(self.count) if trained else indices.unique().tolist():
            if 0 <= expert < self.count:
                rows, places = torch.where(indices == expert)
                yield expert, rows, places

    def _expert(self, expert: int, hidden: Tensor) -> Tensor:
        """Return the output of one expert for `hidden` `[tokens, hidden]`."""
        module: Any = self.__dict__["_experts"]
        inner = self.projection(self.layout.up)[expert](hidden)
        if hasattr(module, "_apply_gate") and getattr(module, "has_gate", True):
            inner = module._apply_gate(inner)
        elif self.layout.up == "gate_up_proj":
            gate, up = inner.chunk(2, dim=-1)
            inner = module.act_fn(gate) * up
        else:
            inner = module.act_fn(inner)
        output: Tensor = self.projection("down_proj")[expert](inner)
        return module.post_expert_norm(output) if getattr(module, "has_post_expert_norm", False) else output

    def choices(self, hidden: Tensor, indices: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        """Return the experts of each token, `[tokens, chosen]`, for the arguments of a call."""
        if indices is not None:
            return indices
        owners = _owners(hidden, self.count).view(self.count, -1)
        chosen = int((owners < self.count).sum(0).max())
        return owners.sort(dim=0).values[:chosen].T

    def fused(self) -> nn.Module:
        """Return a module as the one that was replaced, with the present weights of the layers, which are ordinary."""
        experts = deepcopy(self.__dict__["_experts"])
        for name in self.layout.projections:
            layers: list[Any] = list(self.projection(name))
            weight = torch.stack([layer.weight.data for layer in layers])
            weight = weight.transpose(1, 2).contiguous() if self.layout.transposed else weight
            experts.register_parameter(name, nn.Parameter(weight, requires_grad=False))
            if self.layout.bias:
                bias = torch.stack([layer.bias.data for layer in layers])
                experts.register_parameter(f"{name}_bias", nn.Parameter(bias, requires_grad=False))
        return experts


def _owners(hidden: Tensor, count: int) -> Tensor:
    """Return the expert that each row of inputs `[experts · tokens, hidden]` is for, `[rows, 1]`; `count` for none."""
    owners = torch.arange(count, device=hidden.device).repeat_interleave(len(hidden) // count)
    return owners.masked_fill(~hidden.any(dim=-1), count)[:, None]


def _linears(weight: nn.Parameter, bias: nn.Parameter | None, transposed: bool) -> Iterator[nn.Linear]:
    """Yield a linear layer for each expert, whose tensors are views of `weight` and `bias`."""
    for expert, matrix in enumerate((weight.data.transpose(1, 2) if transposed else weight.data).unbind()):
        linear = nn.Linear.__new__(nn.Linear)  # its own initialization takes long for thousands of experts
        nn.Module.__init__(linear)
        linear.out_features, linear.in_features = matrix.shape
        linear.weight = nn.Parameter(matrix, requires_grad=weight.requires_grad)
        linear.register_parameter(
            "bias", None if bias is None else nn.Parameter(bias.data[expert], requires_grad=bias.requires_grad)
        )
        yield linear
