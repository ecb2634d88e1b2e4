"""Allocations written, read back and imported, whatever is in their files."""

from __future__ import annotations

import json
import struct
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slimplus.run_dir.allocation_file import read_allocation
from slimplus.utils.errors import InputError
from tests.support.fuzzing import Bomb, damaged, fuzz, refusal
from tests.support.models import ModelMaker
from tests.support.recipes import Arguments
from tests.support.runs import read_metrics, run


@fuzz(1000)
@given(data=st.data())
def test_a_damaged_allocation_is_refused_or_holds_widths(tmp_path: Path, data: st.DataObject) -> None:
    allocation: Any = {"target_bits": 2, "group_size": 16, "bits": {"a": [1, 2, 3], "b": [2, 2]}}
    for _ in range(data.draw(st.integers(1, 2))):
        allocation = damaged(allocation, lambda options: data.draw(st.sampled_from(options)))
    text = json.dumps(allocation)
    file = tmp_path / "allocation.json"
    file.write_text(text[: data.draw(st.integers(0, len(text)))] if data.draw(st.booleans()) else text)
    if (said := refusal(lambda: read_allocation(file, 16, "model.layers"))) is not None:
        assert "quantization.allocation" in said
        return
    bits = read_allocation(file, 16, "model.layers")
    assert all(type(width) is int and 1 <= width <= 8 for widths in bits.values() for width in widths)


@fuzz(300)
@given(data=st.data())
def test_a_damaged_published_allocation_is_refused_or_holds_widths(tmp_path: Path, data: st.DataObject) -> None:
    file = tmp_path / "Llama.pt"
    torch.save({0: {"self_attn.q_proj": [1, 2, 3], "mlp.up_proj": [2, 2, 2]}}, file)
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content)
    if (said := refusal(lambda: read_allocation(file, 16, "model.layers"))) is not None:
        assert "quantization.allocation" in said
        return
    bits = read_allocation(file, 16, "model.layers")
    assert all(name.startswith("model.layers.") for name in bits)
    assert all(type(width) is int and 1 <= width <= 8 for widths in bits.values() for width in widths)


@pytest.mark.parametrize("content", [[1, 2], {"a": {"b": [2]}}, {0: [2]}, {0: {"q": [9]}}, {0: {"q": torch.ones(2)}}])
def test_a_file_of_torch_that_is_no_allocation(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "widths.pt")
    with pytest.raises(InputError, match=r"^quantization\.allocation: .*widths\.pt .*; give"):
        read_allocation(tmp_path / "widths.pt", 16, "model.layers")


def test_a_zip_file_that_spans_disks_is_no_allocation(tmp_path: Path) -> None:
    locator, end = struct.pack("<4sLQL", b"PK\x06\x07", 1, 0, 2), b"PK\x05\x06" + bytes(18)
    (tmp_path / "widths.pt").write_bytes(locator + end)
    with pytest.raises(InputError, match=r"^quantization\.allocation: .*multiple disks.*; give"):
        read_allocation(tmp_path / "widths.pt", 16, "model.layers")


def test_code_in_a_published_allocation_is_not_run(tmp_path: Path) -> None:
    torch.save({0: Bomb(tmp_path / "exploded")}, tmp_path / "widths.pt")
    with pytest.raises(InputError, match="holds more than plain widths"):
        read_allocation(tmp_path / "widths.pt", 16, "model.layers")
    assert not (tmp_path / "exploded").exists()


def test_allocation_is_readable_and_exact(finished: Path) -> None:
    allocation = json.loads((finished / "allocation.json").read_text())
    assert len(allocation["bits"]) == 14
    for widths in allocation["bits"].values():
        assert sum(widths) == 2 * len(widths)
    assert any(width != 2 for widths in allocation["bits"].values() for width in widths)
    quantization = json.loads((finished / "packed/config.json").read_text())["quantization_config"]
    for name, widths in allocation["bits"].items():
        assert quantization["modules"][name] == {str(width): widths.count(width) for width in set(widths)}
    assert quantization["shapes"].keys() == allocation["bits"].keys()
    assert quantization["shapes"]["model.layers.0.mlp.down_proj"] == [64, 160]


def test_an_allocation_can_be_imported(finished: Path, arguments: Arguments, tmp_path: Path) -> None:
    file = finished / "allocation.json"
    run(arguments(tmp_path / "gptq", f"quantization.allocation={file}", "quantization.method=gptq"))
    assert json.loads((tmp_path / "gptq/allocation.json").read_text()) == json.loads(file.read_text())
    assert read_metrics(tmp_path / "gptq")["events"] == []


def test_an_imported_allocation_of_another_average_is_noted(
    finished: Path, arguments: Arguments, tmp_path: Path
) -> None:
    allocation = f"quantization.allocation={finished / 'allocation.json'}"
    run(arguments(tmp_path, allocation, "quantization.bits=3", "quantization.method=rtn"))
    assert read_metrics(tmp_path)["average_bits"] == 2
    (event,) = read_metrics(tmp_path)["events"]
    assert event == "quantization.allocation gives 2.000 bits on average, not quantization.bits=3"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("quantization.group_size=64",), r"is for group_size 16, not 64; set quantization\.group_size=16"),
        (("model",), r"quantization\.allocation: model\.layers\.\d.* groups in the file"),
    ],
)
def test_an_allocation_that_does_not_fit(
    finished: Path,
    arguments: Arguments,
    make_model: ModelMaker,
    tmp_path: Path,
    overrides: tuple[str, ...],
    message: str,
) -> None:
    model = make_model("llama", blocks=3) if overrides == ("model",) else None
    keys = [key for key in overrides if "=" in key]
    with pytest.raises(InputError, match=message):
        run(arguments(tmp_path, f"quantization.allocation={finished / 'allocation.json'}", *keys, model=model))


def test_a_published_allocation_is_that_of_our_own_file(finished: Path, arguments: Arguments, tmp_path: Path) -> None:
    own = json.loads((finished / "allocation.json").read_text())["bits"]
    published: dict[int, dict[str, list[int]]] = defaultdict(dict)
    for name, widths in own.items():
        _, _, index, layer = name.split(".", 3)
        published[int(index)][layer] = widths
    file = tmp_path / "Llama.pt"
    torch.save(dict(published), file)
    for name, allocation in {"own": finished / "allocation.json", "published": file}.items():
        run(arguments(tmp_path / name, "quantization.method=slimllm", f"quantization.allocation={allocation}"))
    first, second = (tmp_path / name / "packed/model.safetensors" for name in ("own", "published"))
    assert first.read_bytes() == second.read_bytes()
    torch.save({index: {name: widths[1:] for name, widths in published[index].items()} for index in published}, file)
    with pytest.raises(InputError, match=r"q_proj has 3 groups in the file and 4 in the model"):
        run(arguments(tmp_path / "other", f"quantization.allocation={file}"))
