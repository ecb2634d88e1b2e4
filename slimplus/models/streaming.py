"""Running a causal language model one block at a time, so that only one block need be on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from slimplus.models.architectures import blocks_path, find_blocks, runs_batches
from slimplus.models.block_arguments import ArgumentRecorder, BlockArguments, bind, run_block
from slimplus.models.block_loading import LoadBlock
from slimplus.models.precision import autocast
from slimplus.models.predictions import stopped_at_head
from slimplus.models.prefetch import prefetched
from slimplus.models.state_cache import IN_MEMORY, StateCache
from slimplus.models.towers import towers
from slimplus.nn import PackedLinear
from slimplus.nn.packed_linear import PackedModule
from slimplus.quantization.salience import NotFiniteError
from slimplus.utils.paging import Advice, advise
from slimplus.utils.progress import Track, untracked

ReplaceBlock = Callable[[int, nn.Module], nn.Module]
"""Function from a block's index and the block to the block that runs in its place."""

GPU_TOKENS = 8192  # tokens at a time: with fewer, a GPU waits for its next kernel most of the time


@dataclass(frozen=True)
class BlockInputs:
    """Inputs of a model's blocks.

    Attributes:
        hidden: hidden states that the first block reads, `[windows, sequence_length, hidden]`.
        arguments: other arguments of each block: mask, position embeddings, ….
    """

    hidden: Tensor
    arguments: list[BlockArguments]


class _Captured(Exception):
    """Signal that ends a model's forward once what it is run for has been captured."""


def windows_at_a_time(device: torch.device, sequence_length: int) -> int:
    """Return how many windows to run at once without gradients; a CPU gains nothing from more than one."""
    return max(GPU_TOKENS // sequence_length, 1) if device.type == "cuda" else 1


@dataclass(frozen=True)
class BlockRunner:
    """Runner of blocks over windows that stay on the CPU, in the precision of the job.

    Attributes:
        device: where blocks run.
        precision: Lightning's name of the precision to autocast to.
        windows: windows that run at once; None for as many as keep the device busy.
        cache: what gives the hidden states their memory.
    """

    device: torch.device
    precision: str
    windows: int | None = None
    cache: StateCache = IN_MEMORY

    @property
    def hidden_dtype(self) -> torch.dtype:
        """Dtype of the hidden states kept on the CPU; float16 could not hold massive activations."""
        return torch.bfloat16 if self.precision == "bf16-mixed" else torch.float32

    def load(self, block: nn.Module) -> nn.Module:
        """Return a float32 copy of a block on the device, its packed layers dequantized."""
        copy = deepcopy(block)
        for name, layer in list(copy.named_modules()):
            if isinstance(layer, PackedLinear):
                copy.set_submodule(name, layer.to_linear())
        return copy.to(self.device, torch.float32)

    def run(self, block: nn.Module, hidden: Tensor, arguments: BlockArguments) -> Tensor:
        """Run a loaded block over windows, a few at a time.

        Args:
            block: the block, as `load` gives it.
            hidden: the block's inputs on the CPU, `[windows, sequence_length, hidden]`.
            arguments: the block's other arguments.

        Returns:
            The outputs on the CPU, in the shape and dtype of `hidden`.
        """
        outputs = self.cache.empty(hidden.shape, hidden.dtype)
        for windows, output in self.outputs(block, hidden, arguments):
            outputs[windows.start : windows.stop] = output
        return outputs

    @torch.no_grad()
    def outputs(self, block: nn.Module, hidden: Tensor, arguments: BlockArguments) -> Iterator[tuple[range, Tensor]]:
        """Run a loaded block as `run` does, and yield the numbers of a few windows and their outputs on the device."""
        size = self.windows or windows_at_a_time(self.device, hidden.shape[1])
        for windows, source in prefetched(hidden, size, self.device):
            with autocast(self.device, self.precision):
                output = run_block(block, source.float(), arguments, windows)
            yield windows, output


def _float32(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on the device, as float32 if it holds floating-point numbers."""
    return tensor.data.to(device, torch.float32 if tensor.is_floating_point() else tensor.dtype)


class StreamedModel:
    """A model whose forward is split into embedding, blocks and head, whatever the architecture.

    The blocks' forward is replaced while the model's own forward runs around them, so that the model's own code makes
    masks and positions. All parts but the blocks become float32 on the runner's device, where autocast applies the
    precision; packed tensors keep their dtypes. The blocks stay on the CPU in their stored dtype, and so do towers for
    images or sounds.

    Args:
        model: a causal language model on the CPU; it is changed.
        runner: runs the blocks, and holds device and precision.
        load_block: function that loads one block, where the model holds its blocks on the meta device.

    Attributes:
        dtype: dtype that the model is stored in.
        blocks: the transformer blocks, in order; `block` gives one with its weights.
    """

    def __init__(self, model: PreTrainedModel, runner: BlockRunner, load_block: LoadBlock | None = None) -> None:
        self._load_block = load_block
        self.model, self.dtype, self.runner, device = model, model.dtype, runner, runner.device
        self.blocks = find_blocks(model)
        self._outputs: dict[type[nn.Module], Any] = {}  # what a block of each class returned in a real pass
        self._dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
        still = [self.blocks, *towers(model).values()]
        inside = {id(module) for part in still for module in part.modules()}
        for module in model.modules():
            if id(module) not in inside:
                packed = isinstance(module, PackedModule)
                for tensor in module._buffers.values():
                    if tensor is not None:
                        tensor.data = tensor.data.to(device) if packed else _float32(tensor, device)
                for parameter in module._parameters.values():
                    if parameter is not None:
                        parameter.data = _float32(parameter, device)

    def block(self, index: int) -> nn.Module:
        """Return a block with its weights on the CPU, in their stored dtype."""
        return self.blocks[index] if self._load_block is None else self._load_block(index)

    def stream(self, track: Track = untracked, backwards: bool = False) -> Iterator[tuple[int, nn.Module]]:
        """Yield the number of each block, and the block with its weights; the system reads the next one meanwhile.

        Args:
            track: iterates over the blocks.
            backwards: whether the last block comes first.
        """
        order = list(range(len(self.blocks)))[:: -1 if backwards else 1]
        steps = list(zip(order, [*order[1:], None], strict=True))
        for index, following in track(steps):
            if following is not None:
                advise(self.blocks[following], Advice.WILL_NEED)
            yield index, self.block(index)
            advise(self.blocks[index], Advice.COLD)

    @contextmanager
    def _replaced(self, forward: Callable[[int, Tensor, dict[str, Any]], Tensor]) -> Iterator[None]:
        """Have every block call `forward(index, hidden, other arguments)` instead of its own forward.

        What it returns takes the place of the hidden states among the outputs of the block's own forward.
        """
        for index, block in enumerate(self.blocks):

            def call(*positional: Any, index: int = index, block: nn.Module = block, **keywords: Any) -> Any:
                hidden, others = bind(block, positional, keywords)
                outputs = self._real_outputs(index, hidden, others)
                replaced = forward(index, hidden, others)
                if not isinstance(outputs, tuple | list):
                    return replaced
                return type(outputs)([replaced, *outputs[1:]])

            block.forward = call
        try:
            yield
        finally:
            for block in self.blocks:
                del block.forward

    def _real_outputs(self, index: int, hidden: Tensor, arguments: dict[str, Any]) -> Any:
        """Return what a block of this class returned in one real pass over a window, run when it is first needed.

        Some architectures return a tensor, others a tuple that holds the hidden states first.
        """
        block = self.blocks[index]
        kind = type(block)
        if kind not in self._outputs:
            with self._unreplaced(block), torch.no_grad():
                self._outputs[kind] = self.runner.load(self.block(index))(hidden[:1].float(), **arguments)
        return self._outputs[kind]

    @contextmanager
    def _unreplaced(self, block: nn.Module) -> Iterator[None]:
        """Within this context a block has its own forward."""
        replaced = block.__dict__.pop("forward")
        try:
            yield
        finally:
            block.forward = replaced

    def outer_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield names and values of the tensors outside the blocks, in their stored dtype; tied tensors come once."""
        prefix, seen = f"{blocks_path(self.model)}.", set()
        for name, tensor in self.model.state_dict().items():
            if not name.startswith(prefix) and tensor.data_ptr() not in seen:
                seen.add(tensor.data_ptr())
                yield name, tensor.to("cpu", self._dtypes[name])

    @property
    def head(self) -> nn.Linear:
        """The output head, from hidden states to logits."""
        head = self.model.get_output_embeddings()
        assert isinstance(head, nn.Linear)
        return head

    @property
    def full_bytes(self) -> int:
        """Bytes that the model takes at 16 bit, tied weights counted once."""
        return 2 * sum(parameter.numel() for parameter in self.model.parameters())

    @torch.no_grad()
    def block_inputs(self, tokens: Tensor) -> BlockInputs:
        """Return the blocks' inputs for tokens `[windows, sequence_length]`, the hidden states on the CPU."""
        runner, first = self.runner, list[Tensor]()  # the states of one window at a time
        hidden: Tensor | None = None
        recorder = ArgumentRecorder()

        def record(index: int, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
            if index == 0:
                first.append(hidden.to("cpu", runner.hidden_dtype))
                recorder.start_window()
            recorder.add(index, arguments)
            if index == len(self.blocks) - 1:
                raise _Captured
            return hidden

        with self._replaced(record), autocast(runner.device, runner.precision):
            # A rank without windows runs any one, so that it knows the shapes.
            for number, window in enumerate((tokens if len(tokens) else tokens.new_ones(1, tokens.shape[1])).split(1)):
                with suppress(_Captured):
                    self.model(input_ids=window.to(runner.device), use_cache=False)
                states = first.pop()
                if hidden is None:
                    hidden = runner.cache.empty((len(tokens), *states.shape[1:]), states.dtype)
                hidden[number : number + 1] = states[: len(tokens)]
        assert hidden is not None
        return BlockInputs(hidden, recorder.arguments(runs_batches(self.model)))

    def forward_blocks(
        self, inputs: BlockInputs, track: Track = untracked, replace: ReplaceBlock | None = None
    ) -> Iterator[Tensor]:
        """Run the blocks in order, and yield the outputs of each, `[windows, sequence_length, hidden]`, on the CPU.

        Args:
            inputs: inputs of the blocks, as `block_inputs` gives them.
            track: iterates over the blocks.
            replace: returns the block to run in the place of each block.
        """
        hidden = inputs.hidden
        for index, block in self.stream(track):
            loaded = self.runner.load(replace(index, block) if replace else block)
            hidden = self.runner.run(loaded, hidden, inputs.arguments[index])
            yield hidden

    def last_hidden(self, inputs: BlockInputs, track: Track = untracked, replace: ReplaceBlock | None = None) -> Tensor:
        """Return the last block's outputs, keeping no other block's; the arguments are those of `forward_blocks`."""
        hidden = inputs.hidden
        for outputs in self.forward_blocks(inputs, track, replace):
            hidden = outputs
        return hidden

    @torch.no_grad()
    def logits(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        """Return the logits for the last block's outputs.

        Args:
            tokens: `[windows, sequence_length]`, from which masks and positions follow.
            hidden: the last block's outputs, `[windows, sequence_length, hidden]`.

        Returns:
            `[windows, sequence_length, vocabulary]` on the device.
        """
        return self._logits(tokens, hidden)

    def sampled_gradient(self, tokens: Tensor, hidden: Tensor, seed: int) -> Tensor:
        """Return the gradient of `-log p(y)`, summed over the tokens, with respect to the last block's outputs.

        Each `y` is drawn from the model's own prediction `p`, so that the mean of the gradient's square is the Fisher
        information.

        Args:
            tokens: `[windows, sequence_length]`.
            hidden: the last block's outputs, `[windows, sequence_length, hidden]`.
            seed: seed of the draw.

        Returns:
            The gradient on the device, in the shape of `hidden`, float32.

        Raises:
            NotFiniteError: if the prediction holds NaN or infinity.
        """
        hidden = hidden.to(self.runner.device, torch.float32).requires_grad_()
        with torch.enable_grad():
            predicted = self._logits(tokens, hidden).float().log_softmax(-1)
            if not torch.isfinite(predicted).all():
                raise NotFiniteError("the model predicts NaN or infinity: its activations overflowed")
            generator = torch.Generator(predicted.device).manual_seed(seed)
            drawn = torch.multinomial(predicted.detach().exp().flatten(0, -2), 1, generator=generator)
            (gradient,) = torch.autograd.grad(-predicted.flatten(0, -2).gather(1, drawn).sum(), hidden)
        return gradient

    def _logits(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        """Return the logits, with a gradient if one is recorded: every block passes on the last block's outputs."""
        runner = self.runner

        def replay(index: int, passed: Tensor, _: dict[str, Any]) -> Tensor:
            return hidden.to(passed.device, passed.dtype)

        with self._replaced(replay), autocast(runner.device, runner.precision):
            return self.model(input_ids=tokens.to(runner.device), use_cache=False).logits

    def capture_head_inputs(self, tokens: Tensor, hidden: Tensor, hook: Callable[[Tensor], None]) -> None:
        """Call a function with the head's inputs, `[1, sequence_length, hidden]`, for one window after the other.

        Args:
            tokens: `[windows, sequence_length]`.
            hidden: the last block's outputs, `[windows, sequence_length, hidden]`.
            hook: function to call.
        """
        for window, output in zip(tokens.split(1), hidden.split(1), strict=True):
            with stopped_at_head(self.model, hook):
                self.logits(window, output)
