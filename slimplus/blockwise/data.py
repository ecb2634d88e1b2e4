"""A transformer block and its inputs, and which of its layers share a Hessian and belong to which rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial

from torch import Tensor, nn

from slimplus.distributed.ranks import Ranks
from slimplus.models.architectures import find_linears, stack_of_layers
from slimplus.models.block_arguments import BlockArguments
from slimplus.models.streaming import BlockRunner
from slimplus.quantization.salience_allocation import SEARCH_TOKENS

HESSIAN_BYTES = 8 * 2**30
"""Memory of the Hessians of experts that are summed at a time; 256 experts of 7168 columns have 98 GiB of them."""
HESSIAN_ELEMENT = 8  # bytes of float64

InputHook = Callable[[Tensor], None]
"""`(input of a layer) -> None`."""
PairHook = Callable[[Tensor, Tensor], None]
"""`(input of a layer in full precision, its input behind quantized layers) -> None`."""


@dataclass(frozen=True)
class BlockData:
    """A full-precision block and what it is calibrated on.

    Attributes:
        block: the block, float32, on the device; it is not changed.
        hidden: this rank's share of the block's inputs, `[windows, sequence_length, hidden]`; all shares are equal.
        arguments: the block's other arguments.
        runner: the runner of blocks on this process's device.
        ranks: the processes that quantize the block together.
        full_hidden: what the block reads behind full-precision blocks, in the shape of `hidden`, where it is needed.
    """

    block: nn.Module
    hidden: Tensor
    arguments: BlockArguments
    runner: BlockRunner
    ranks: Ranks = Ranks()
    full_hidden: Tensor | None = None

    @cached_property
    def layers(self) -> dict[str, nn.Linear]:
        """The linear layers by name."""
        return find_linears(self.block)

    def capture_inputs(self, hooks: Mapping[str, InputHook], windows: int | None = None) -> None:
        """Run the block, and call `hooks[name]` with each input of the layer of that name.

        Args:
            hooks: layer → what to call with its inputs `[windows, sequence_length, in]`.
            windows: how many of this rank's windows to run, the first ones; None runs all.
        """
        handles = [
            self.layers[name].register_forward_pre_hook(lambda _, inputs, hook=hook: hook(inputs[0]))
            for name, hook in hooks.items()
        ]
        try:
            for _ in self.runner.outputs(self.block, self.hidden[:windows], self.arguments):
                pass  # the hooks have seen what counts
        finally:
            for handle in handles:
                handle.remove()

    @cached_property
    def readers(self) -> list[list[str]]:
        """Layers that read the same tensor (q, k and v; gate and up), in the order in which the block runs them.

        Layers with a number in their name, as an expert's, are left out: whether the first window reaches them differs
        from rank to rank.
        """
        seen: dict[str, Tensor] = {}

        def note(name: str, inputs: Tensor) -> None:
            seen[name] = inputs  # kept alive, so that no other tensor gets its address

        unnumbered = [name for name in self.layers if not any(part.isdigit() for part in name.split("."))]
        self.capture_inputs({name: partial(note, name) for name in unnumbered}, windows=1)
        readers: dict[int, list[str]] = {}
        for name, inputs in seen.items():
            readers.setdefault(id(inputs), []).append(name)
        return list(readers.values())

    @cached_property
    def leader(self) -> dict[str, str]:
        """Layer → the first layer that reads the same tensor: they share one Hessian; others lead themselves."""
        leader = {name: name for name in self.layers}
        return leader | {name: names[0] for names in self.readers for name in names}

    @cached_property
    def stack(self) -> dict[str, str]:
        """Layer of an expert → the name of the stack of layers of one shape that it belongs to."""
        return stack_of_layers(self.block)

    @cached_property
    def chunks(self) -> list[list[str]]:
        """The layers in parts whose Hessians are in memory together.

        The first part holds all layers that are no expert's, each of the others as many experts as `HESSIAN_BYTES`
        take.
        """
        chunks, size = [[name for name in self.layers if name not in self.stack]], 0
        for name in self.layers:
            if name in self.stack:
                own = HESSIAN_ELEMENT * self.layers[name].in_features ** 2
                if size + own > HESSIAN_BYTES and size:
                    chunks.append([])
                    size = 0
                chunks[-1].append(name)
                size += own
        return chunks

    @cached_property
    def owner(self) -> dict[str, int]:
        """Layer → the rank that inverts its Hessian and quantizes it; layers that share a Hessian share a rank."""
        costs = dict.fromkeys(self.leader.values(), 0)
        for name, layer in self.layers.items():  # error compensation takes out · in² operations, an inversion in³
            own = self.leader[name] == name
            costs[self.leader[name]] += (layer.out_features + own * layer.in_features) * layer.in_features**2
        owners = self.ranks.owners(costs)
        return {name: owners[leader] for name, leader in self.leader.items()}

    @property
    def own_layers(self) -> dict[str, nn.Linear]:
        """The layers that this rank quantizes."""
        return {name: layer for name, layer in self.layers.items() if self.owner[name] == self.ranks.rank}

    def capture_pairs(self, full: BlockData, name: str, hook: PairHook) -> None:
        """Run two states of a block side by side, and call `hook` with the inputs of one of their layers.

        Args:
            full: the block in full precision, on what the full-precision blocks before it give.
            name: the layer.
            hook: function that takes the layer's inputs in `full` and here, `[windows, sequence_length, in]`.
        """
        expected: list[Tensor] = []
        handles = [
            full.layers[name].register_forward_pre_hook(lambda _, inputs: expected.append(inputs[0])),
            self.layers[name].register_forward_pre_hook(lambda _, inputs: hook(expected.pop(), inputs[0])),
        ]
        try:
            runs = [data.runner.outputs(data.block, data.hidden, data.arguments) for data in (full, self)]
            for _ in zip(*runs, strict=True):
                pass  # the hooks have seen what counts
        finally:
            for handle in handles:
                handle.remove()


def search_windows(ranks: Ranks, share: Tensor) -> int:
    """Return how many of this rank's windows, `share` `[windows, sequence_length, …]`, a search for widths runs."""
    return min(ranks.windows(max(SEARCH_TOKENS // share.shape[1], 1)), len(share))
