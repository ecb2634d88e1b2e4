"""The charts of a report, as plotly figures without colours of text and lines: the page gives them its own."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import log10

import plotly.graph_objects as go
import yaml
from plotly.colors import sample_colorscale

from slimplus.hub.contents import CheckpointContents, PackedLayer
from slimplus.report.run_files import Curve, RunFigures
from slimplus.utils.units import format_bytes

SERIES = ("#2a78d6", "#eb6834", "#1baf7a", "#eda100", "#e87ba4", "#008300", "#4a3aa7", "#e34948")
"""Colours of runs and parts, in this order: apart from each other for colour-blind readers as well."""
RAMP = [[0.0, "#e3eefc"], [0.35, "#9dc4f3"], [0.65, "#2f74c8"], [1.0, "#0d366b"]]
"""Colours from low to high, of one hue."""
DEPTHS = [[0.0, "#1baf7a"], [0.5, "#2a78d6"], [1.0, "#8a63d2"]]
"""Colours of blocks from the first to the last, which can be seen on a light and on a dark page."""
COLORBAR = {
    **{"orientation": "h", "thickness": 8, "len": 0.6, "x": 0, "xanchor": "left", "y": 1.0, "yanchor": "bottom"},
    **{"outlinewidth": 0, "ypad": 4, "ticklabelposition": "outside top"},
}
"""Scale of colours, above a map."""
ROW, MARGIN = 24, 90  # pixels of a row of a chart, and of all that is around the rows
UNITS = {"GB": 1e9, "MB": 1e6, "kB": 1e3}
MOST_LABELS = 12  # columns of a map whose cells still have room for a number


@dataclass(frozen=True)
class Chart:
    """One chart of the page.

    Attributes:
        section: id of the section that it stands in.
        title: what it shows.
        caption: how to read it.
        figure: the plotly figure.
    """

    section: str
    title: str
    caption: str
    figure: go.Figure


def charts(runs: Sequence[RunFigures]) -> list[Chart]:
    """Return the charts of a report on `runs`, without those that no run has figures for."""
    found = [
        *_size_and_perplexity(runs),
        *_bits(runs),
        *(chart for run in runs for chart in _sensitivity(run, len(runs) > 1)),
        *_bytes(runs),
        *_block_errors(runs),
        *(chart for run in runs for chart in _curves(run, len(runs) > 1)),
        *_bars(
            runs, "seconds", "Time by stage", "seconds", "Seconds that each stage took, all starts of the run added."
        ),
        *_memory(runs),
    ]
    for chart in found:
        layout = {"template": None, "paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)"}
        chart.figure.update_layout(layout, font_size=12, margin={"l": 8, "r": 8, "t": 36, "b": 8})
        chart.figure.update_layout(legend={"orientation": "h", "yanchor": "bottom", "y": 1.01, "x": 0})
        chart.figure.update_xaxes(automargin=True, zeroline=False)
        chart.figure.update_yaxes(automargin=True, zeroline=False)
    return found


def _of(run: RunFigures, named: bool) -> str:
    """Return the end of a title: the name of the run where several share the page."""
    return f": {run.name}" if named else ""


def _size_and_perplexity(runs: Sequence[RunFigures]) -> Iterator[Chart]:
    """Yield size against perplexity, where there are several runs to compare."""
    done = [run for run in runs if "size_bytes" in run.metrics and "quantized" in run.metrics["perplexity"]]
    if len(done) < 2:
        return
    figure = go.Figure(layout={"height": 320, "showlegend": False})
    figure.update_xaxes(title="size of the checkpoint (MB)", rangemode="tozero")
    figure.update_yaxes(title="perplexity")
    for number, run in enumerate(done):
        figure.add_scatter(
            x=[run.metrics["size_bytes"] / 1e6],
            y=[run.metrics["perplexity"]["quantized"]],
            name=run.name,
            text=[run.name],
            mode="markers+text",
            textposition="top center",
            cliponaxis=False,
            marker={"size": 12, "color": SERIES[number % len(SERIES)]},
            hovertemplate="%{text}<br>%{x:.4~g} MB<br>perplexity %{y:.5~g}<extra></extra>",
        )
    yield Chart("headline", "Size and perplexity", "Lower left is better.", figure)


def layer_kind(name: str) -> str:
    """Return a layer's name in its block without numbers: experts of a block share `mlp.experts.*.up_proj`."""
    _, _, inside = re.split(r"\.(\d+)\.", name, maxsplit=1)
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", inside)


def layer_block(name: str) -> int:
    """Return the number of the block that a layer is in."""
    return int(re.split(r"\.(\d+)\.", name, maxsplit=1)[1])


def _average(layers: Sequence[PackedLayer]) -> float:
    """Return the average width of the weights of `layers`."""
    return sum(layer.weight_bits for layer in layers) / sum(layer.weights for layer in layers)


def _groups(layers: Sequence[PackedLayer]) -> str:
    """Return how many groups have each width, a line each."""
    counts: dict[int, int] = defaultdict(int)
    for layer in layers:
        for width, count in layer.groups.items():
            counts[width] += count
    return "<br>".join(f"{count} groups of {width} bits" for width, count in sorted(counts.items()))


def _bits(runs: Sequence[RunFigures]) -> Iterator[Chart]:
    """Yield the map of bits, blocks × layers, of each run; the maps share one scale of colours."""
    done = [(run, run.contents) for run in runs if run.contents is not None]
    widths = {width for _, contents in done for layer in contents.block_layers for width in layer.widths}
    for run, contents in done:
        yield _bit_map(run, contents, (min(widths), max(widths)), named=len(runs) > 1)


def _bit_map(run: RunFigures, contents: CheckpointContents, scale: tuple[int, int], named: bool) -> Chart:
    """Return the map of bits of one run, with colours from the first width of `scale` to the second."""
    cells: dict[tuple[int, str], list[PackedLayer]] = defaultdict(list)
    for layer in contents.block_layers:
        cells[layer_block(layer.name), layer_kind(layer.name)].append(layer)
    places = {layer_kind(name): place for place, name in reversed(list(enumerate(run.layers)))}
    blocks = sorted({block for block, _ in cells})
    kinds = sorted({kind for _, kind in cells}, key=lambda kind: places.get(kind, len(places)))
    bits = [[_average(cells[block, kind]) if (block, kind) in cells else None for kind in kinds] for block in blocks]
    figure = go.Figure(
        go.Heatmap(
            z=bits,
            x=[kind.rpartition(".")[2] for kind in kinds] if _distinct(kinds) else kinds,
            y=[str(block) for block in blocks],
            customdata=[
                [[kind, _groups(cells[block, kind])] if (block, kind) in cells else [kind, ""] for kind in kinds]
                for block in blocks
            ],
            hovertemplate="block %{y}, %{customdata[0]}<br>%{z:.3f} bits<br>%{customdata[1]}<extra></extra>",
            texttemplate="%{z:.2f}" if len(kinds) <= MOST_LABELS else None,
            textfont={"size": 10},
            colorscale=RAMP,
            zmin=scale[0],
            zmax=scale[1],
            xgap=2,
            ygap=2,
            colorbar=COLORBAR,
        ),
        layout={"height": ROW * len(blocks) + MARGIN + 40},
    )
    figure.update_yaxes(title="block", autorange="reversed", type="category", showgrid=False)
    figure.update_xaxes(showgrid=False, tickangle=-40)
    caption = "Average width of the weights of each layer. Point at a cell for its groups."
    return Chart("bits", f"Bits of each layer{_of(run, named)}", caption, figure)


def _sensitivity(run: RunFigures, named: bool) -> Iterator[Chart]:
    """Yield the map of sensitivities, blocks × layers, if they were measured."""
    if not run.sensitivity:
        return
    bits = yaml.safe_load(run.recipe)["quantization"]["bits"]
    place = min(range(len(run.widths)), key=lambda index: abs(run.widths[index] - bits))
    cells: dict[tuple[int, str], list[tuple[float, ...]]] = defaultdict(list)
    for name, losses in run.sensitivity.items():
        cells[layer_block(name), layer_kind(name)].append(losses)
    sums = {cell: [sum(column) for column in zip(*rows, strict=True)] for cell, rows in cells.items()}
    order = {layer_kind(name): place for place, name in reversed(list(enumerate(run.layers)))}
    blocks = sorted({block for block, _ in sums})
    kinds = sorted({kind for _, kind in sums}, key=lambda kind: (order.get(kind, len(order)), kind))
    found = [[sums.get((block, kind)) for kind in kinds] for block in blocks]
    figure = go.Figure(
        go.Heatmap(
            z=[[log10(losses[place]) if losses and losses[place] > 0 else None for losses in row] for row in found],
            x=[kind.rpartition(".")[2] for kind in kinds] if _distinct(kinds) else kinds,
            y=[str(block) for block in blocks],
            customdata=[
                [[kind, _losses(run.widths, losses)] for kind, losses in zip(kinds, row, strict=True)] for row in found
            ],
            hovertemplate="block %{y}, %{customdata[0]}<br>%{customdata[1]}<extra></extra>",
            colorscale=RAMP,
            xgap=2,
            ygap=2,
            colorbar=COLORBAR | {"tickprefix": "10<sup>", "ticksuffix": "</sup>"},
        ),
        layout={"height": ROW * len(blocks) + MARGIN + 40},
    )
    figure.update_yaxes(title="block", autorange="reversed", type="category", showgrid=False)
    figure.update_xaxes(showgrid=False, tickangle=-40)
    title = f"Growth of the loss with a layer at {run.widths[place]} bits{_of(run, named)}"
    caption = "As measured before the bits were chosen, on a logarithmic scale. Point at a cell for other widths."
    yield Chart("sensitivity", title, caption, figure)


def _losses(widths: Sequence[int], losses: Sequence[float] | None) -> str:
    """Return the growth of the loss at each width, a line each."""
    return "<br>".join(f"{width} bits: {loss:.3g}" for width, loss in zip(widths, losses or (), strict=False))


def _distinct(kinds: Sequence[str]) -> bool:
    """Return whether the last parts of the names tell the layers apart."""
    return len({kind.rpartition(".")[2] for kind in kinds}) == len(kinds)


def _parts(contents: CheckpointContents) -> dict[str, tuple[float, float]]:
    """Return, of each part of a checkpoint, the bytes of its integers and of all else, the largest part last."""
    parts: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for layer in contents.layers:
        part = parts[layer_kind(layer.name) if layer.in_block else layer.name]
        part[0] += layer.weight_bits / 8
        part[1] += layer.nbytes - layer.weight_bits / 8
    for name, tensor in contents.others.items():
        kind = layer_kind(name) if re.search(r"\.\d+\.", name) else name
        parts[f"{kind.removesuffix('.weight')}, {tensor.dtype}"][1] += tensor.nbytes
    return {name: (part[0], part[1]) for name, part in sorted(parts.items(), key=lambda item: sum(item[1]))}


def _bytes(runs: Sequence[RunFigures]) -> Iterator[Chart]:
    """Yield where the bytes of each checkpoint go."""
    for run in runs:
        if run.contents is not None:
            title = f"Where the bytes go{_of(run, len(runs) > 1)}"
            caption = f"{format_bytes(run.contents.size_bytes)} in all, summed over the blocks."
            yield Chart("bytes", title, caption, _stacked(_parts(run.contents)))


def _stacked(parts: Mapping[str, tuple[float, float]]) -> go.Figure:
    """Return a bar for each part of a checkpoint, divided into integers and all else."""
    figure = go.Figure(layout={"barmode": "stack", "height": ROW * len(parts) + MARGIN})
    unit, size = next(
        (unit, size) for unit, size in UNITS.items() if size == 1e3 or max(map(sum, parts.values())) > size
    )
    for place, name in enumerate(("integers", "scales, zero points, and what is not packed")):
        values = [part[place] for part in parts.values()]
        figure.add_bar(
            x=[value / size for value in values],
            y=list(parts),
            orientation="h",
            name=name,
            marker={"color": SERIES[place]},
            customdata=[format_bytes(value) for value in values],
            hovertemplate=f"%{{y}}<br>{name}: %{{customdata}}<extra></extra>",
        )
    figure.update_layout(legend_traceorder="normal")
    figure.update_xaxes(title=unit)
    figure.update_yaxes(showgrid=False)
    return figure


def _block_errors(runs: Sequence[RunFigures]) -> Iterator[Chart]:
    """Yield the error of each block before and after training, where blocks were trained."""
    figure = go.Figure(layout={"height": 320})
    for number, run in enumerate(runs):
        colour, prefix = SERIES[number % len(SERIES)], f"{run.name}, " if len(runs) > 1 else ""
        for key, name, dash in (("calibrated_loss", "before training", "dot"), ("loss", "after training", "solid")):
            points = [(index, block.get(key)) for index, block in enumerate(run.metrics.get("blocks", ()))]
            points = [(index, loss) for index, loss in points if loss is not None]
            if points:
                figure.add_scatter(
                    x=[index for index, _ in points],
                    y=[loss for _, loss in points],
                    name=f"{prefix}{name}",
                    mode="lines+markers",
                    line={"color": colour, "width": 2, "dash": dash},
                    hovertemplate=f"block %{{x}}<br>%{{y:.4~g}}<extra>{prefix}{name}</extra>",
                )
    figure.update_xaxes(title="block", tickformat="d", dtick=1 if _blocks(runs) <= 12 else None)
    figure.update_yaxes(rangemode="tozero")
    if figure.data:
        caption = "The loss that training lowers: the error of a block's outputs, given the quantized blocks before it."
        yield Chart("errors", "Error of each block", caption, figure)


def _blocks(runs: Sequence[RunFigures]) -> int:
    """Return the largest number of blocks."""
    return max(len(run.metrics.get("blocks", ())) for run in runs)


def _curves(run: RunFigures, named: bool) -> Iterator[Chart]:
    """Yield the loss curves of the blocks, and that of the end-to-end training."""
    curves = [curve for curve in run.curves if curve.epochs]
    blocks = [curve for curve in curves if curve.name.startswith("block_")]
    others = [curve for curve in curves if curve not in blocks]
    if blocks:
        colours = sample_colorscale(DEPTHS, [index / max(len(blocks) - 1, 1) for index in range(len(blocks))])
        caption = "Mean loss of each epoch, a line for each block: from green at the input to violet at the output."
        figure = _lines(blocks, colours)
        figure.update_layout(showlegend=False)
        yield Chart("curves", f"Training of the blocks{_of(run, named)}", caption, figure)
    if others:
        caption = "Mean loss of each epoch."
        yield Chart("curves", f"Training end to end{_of(run, named)}", caption, _lines(others, SERIES))


def _lines(curves: Sequence[Curve], colours: Sequence[str]) -> go.Figure:
    """Return a line for each loss curve."""
    figure = go.Figure(layout={"height": 320, "showlegend": False})
    for curve, colour in zip(curves, colours, strict=False):
        name = curve.name.replace("_", " ")
        figure.add_scatter(
            x=curve.epochs,
            y=curve.losses,
            name=name,
            mode="lines+markers" if len(curve.epochs) < 20 else "lines",
            line={"color": colour, "width": 2},
            hovertemplate=f"{name}<br>epoch %{{x}}<br>%{{y:.4~g}}<extra></extra>",
        )
    figure.update_xaxes(title="epoch", tickformat="d", dtick=1 if max(map(_length, curves)) <= 12 else None)
    figure.update_yaxes(title="loss")
    return figure


def _length(curve: Curve) -> int:
    return len(curve.epochs)


def _bars(
    runs: Sequence[RunFigures], key: str, title: str, unit: str, caption: str, scale: float = 1.0
) -> Iterator[Chart]:
    """Yield a bar for each stage of each run, from the mapping of stages in metrics.json under `key`."""
    found = [(number, run, run.metrics[key]) for number, run in enumerate(runs) if run.metrics.get(key)]
    if not found:
        return
    stages = list(dict.fromkeys(stage for _, _, values in found for stage in values))
    figure = go.Figure(layout={"barmode": "group", "height": ROW * len(stages) * len(found) + MARGIN})
    for number, run, values in found:
        figure.add_bar(
            x=[values.get(stage, 0) / scale for stage in stages],
            y=[stage.replace("_", " ") for stage in stages],
            orientation="h",
            name=run.name,
            marker={"color": SERIES[number % len(SERIES)]},
            hovertemplate=f"%{{y}}<br>%{{x:.4~g}} {unit}<extra>{run.name if len(runs) > 1 else ''}</extra>",
        )
    figure.update_layout(showlegend=len(runs) > 1)
    figure.update_xaxes(title=unit)
    figure.update_yaxes(autorange="reversed", showgrid=False)
    yield Chart("resources", title, caption, figure)


def _memory(runs: Sequence[RunFigures]) -> Iterator[Chart]:
    """Yield the memory of each stage, in main memory and on the device."""
    for key, where in (("stage_memory_bytes", "Main memory"), ("stage_device_memory_bytes", "Device memory")):
        caption = "The most that the process had occupied when the stage ended; the stage that raises it needs it."
        yield from _bars(runs, key, f"{where} by stage", "GB", caption, 1e9)
