"""slimplus inspect gives the figures of the run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from slimplus.cli.main import main
from slimplus.hub.contents import read_contents


def test_inspect_gives_the_figures_of_the_run(finished: Path, packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(packed), "--json"]) == 0
    seen = json.loads(capsys.readouterr().out)
    metrics = json.loads((finished / "metrics.json").read_text())
    for figure in ("average_bits", "bits_per_weight", "outer_bytes", "size_bytes", "full_size_bytes", "compression"):
        assert seen[figure] == metrics[figure], figure
    allocation = json.loads((finished / "allocation.json").read_text())["bits"]
    layers = {layer["name"]: layer for layer in seen["layers"]}
    assert layers.keys() - allocation.keys() == metrics["outer_bits"].keys()
    for name, widths in allocation.items():
        assert layers[name]["groups"] == {str(width): widths.count(width) for width in sorted(set(widths))}
    assert layers["model.layers.1.mlp.down_proj"]["shape"] == [64, 160]
    assert sum(layer["bytes"] for layer in seen["layers"]) == seen["block_bytes"] + seen["outer_bytes"]
    assert all(list(layer.widths) == allocation[layer.name] for layer in read_contents(str(packed)).block_layers)


def test_inspect_reads_as_a_table(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(packed)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(
        re.fullmatch(r"average bits +2\.000, of the 99\.\d% of the weights in the blocks that are packed", line)
        for line in lines
    )
    assert any(
        re.fullmatch(r"size +71\.4 kB, 2\.88 times smaller than at 16 bit \(205\.6 kB\)", line) for line in lines
    )
    assert sum(line.startswith("model.layers.") for line in lines) == 14
    assert any(
        re.fullmatch(r"model\.layers\.0\.mlp\.down_proj +64 × 160( +\d+){3} +3\.523 +4\.5 kB", line) for line in lines
    )
