"""Batches of windows on their way to a GPU: the next one is copied while the last one is computed with."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from slimplus.models.block_arguments import batches


def prefetched(hidden: Tensor, size: int, device: torch.device) -> Iterator[tuple[range, Tensor]]:
    """Yield the numbers of at most `size` windows, and their states on the device.

    Args:
        hidden: states of all windows on the CPU, `[windows, sequence_length, hidden]`.
        size: number of windows in a batch.
        device: where the states are needed.
    """
    spans = list(batches(len(hidden), size))
    if device.type != "cuda":
        yield from ((span, hidden[span.start : span.stop].to(device)) for span in spans)
        return
    copies = torch.cuda.Stream(device)
    last: tuple[range, Tensor, torch.cuda.Event] | None = None
    for span in [*spans, None]:
        following = None if span is None else (span, *_copied(hidden[span.start : span.stop], copies))
        if last is not None:
            windows, states, copied = last
            current = torch.cuda.current_stream(device)
            current.wait_event(copied)
            states.record_stream(current)  # or its memory could be given away while it is still read
            yield windows, states
        last = following


def _copied(states: Tensor, stream: torch.cuda.Stream) -> tuple[Tensor, torch.cuda.Event]:
    """Begin the copy of states from pinned memory to the stream's device; return the copy and the event of its end."""
    pinned = states.pin_memory()
    with torch.cuda.stream(stream):
        moved = pinned.to(stream.device, non_blocking=True)
        return moved, stream.record_event()
