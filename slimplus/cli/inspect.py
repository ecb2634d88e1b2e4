"""Show what a packed checkpoint holds: average bits, sizes against 16 bit, a table of its layers. Reads no weights."""

from __future__ import annotations

import argparse
from typing import Any

from slimplus.cli.console import write
from slimplus.hub.contents import CheckpointContents, read_contents
from slimplus.utils.json_text import to_json
from slimplus.utils.units import format_bytes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `slimplus inspect`."""
    parser.add_argument("path", help="folder of a packed checkpoint, or a hub id")
    parser.add_argument("--json", action="store_true", help="write JSON instead of tables; sizes in bytes")


def run(arguments: argparse.Namespace) -> None:
    """Run `slimplus inspect`: write the figures as tables or as JSON.

    Raises:
        InputError: if there is no packed checkpoint, or it is damaged.
    """
    contents = read_contents(arguments.path)
    write(to_json(figures(contents), indent=2) if arguments.json else f"{overview(contents)}\n\n{table(contents)}")


def figures(contents: CheckpointContents) -> dict[str, Any]:
    """Return all figures of a checkpoint, under the names that metrics.json gives them; sizes are in bytes."""
    quantization = contents.config["quantization_config"]
    return {
        "model_type": contents.config.get("model_type"),
        "method": quantization.get("method"),
        "group_size": quantization["group_size"],
        "average_bits": contents.average_bits,
        "packed_share": contents.packed_share,
        "bits_per_weight": contents.bits_per_weight,
        "quantized_weights": contents.weights,
        "block_bytes": contents.block_bytes,
        "outer_bytes": contents.embedding_and_head_bytes,
        "other_bytes": contents.other_bytes,
        "size_bytes": contents.size_bytes,
        "full_size_bytes": contents.full_size_bytes,
        "compression": contents.compression,
        "layers": [
            {
                "name": layer.name,
                "shape": [layer.rows, layer.columns],
                "groups": layer.groups,
                "bits_per_weight": layer.bits_per_weight,
                "bytes": layer.nbytes,
            }
            for layer in contents.layers
        ],
    }


def overview(contents: CheckpointContents) -> str:
    """Return the figures of the whole checkpoint as text, a line each."""
    quantization = contents.config["quantization_config"]
    extra = contents.embedding_and_head_bytes
    rows = {
        "checkpoint": str(contents.folder),
        "model": f"{contents.config.get('model_type')}, {len(contents.layers)} packed layers, "
        f"quantized by {quantization.get('method')} in groups of {quantization['group_size']}",
        "average bits": f"{contents.average_bits:.3f}, of the {contents.packed_share:.1%} of the weights in the blocks "
        "that are packed",
        "bits per weight, all that is stored": f"{contents.bits_per_weight:.3f}",
        "blocks": f"{format_bytes(contents.block_bytes)} for {contents.weights:,} weights",
        **({"embedding and head": f"{format_bytes(extra)}, packed"} if extra else {}),
        "everything else": f"{format_bytes(contents.other_bytes)} in {len(contents.others)} tensors",
        "size": f"{format_bytes(contents.size_bytes)}, {contents.compression:.2f} times smaller than at 16 bit "
        f"({format_bytes(contents.full_size_bytes)})",
    }
    return "\n".join(f"{name:<{max(map(len, rows))}}  {value}" for name, value in rows.items())


def table(contents: CheckpointContents) -> str:
    """Return a table with a line for each packed layer."""
    widths = sorted({width for layer in contents.layers for width in layer.groups})
    head = ["layer", "rows × columns", *(f"{width}-bit groups" for width in widths), "bits per weight", "size"]
    lines = [
        head,
        *(
            [
                layer.name,
                f"{layer.rows} × {layer.columns}",
                *(str(layer.groups.get(width, 0)) for width in widths),
                f"{layer.bits_per_weight:.3f}",
                format_bytes(layer.nbytes),
            ]
            for layer in contents.layers
        ),
    ]
    sizes = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        f"{name:<{sizes[0]}}  " + "  ".join(f"{cell:>{size}}" for cell, size in zip(cells, sizes[1:], strict=True))
        for name, *cells in lines
    )
