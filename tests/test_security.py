"""Checkpoints from strangers: whatever is in their files, loading gives a clear error or a model, and nothing else.

Run as a script, this file is the campaign: damaged checkpoints loaded one after the other within bounds of memory and
time.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ModelMaker
from fuzzing import Bomb, damaged, fuzz, refusal
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig

import slimplus
from slimplus.format.affine import QuantizedWeight, choose_qparams, quantize, storable_scale, storable_zero_point
from slimplus.format.checks import check_packed
from slimplus.format.planes import pack, unpack
from slimplus.hub.checks import check_architecture, check_packed_tensors, check_quantization, read_headers
from slimplus.hub.contents import read_contents
from slimplus.hub.transformers_quantizer import SlimplusConfig
from slimplus.pipeline import run as pipeline
from slimplus.recipe.parsing import load_recipe
from slimplus.utils.errors import InputError

ROOT = Path(__file__).resolve().parent.parent
GROUP_SIZE, SHAPE = 16, (20, 72)
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="session")
def checkpoint(make_model: ModelMaker, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small packed checkpoint."""
    folder = tmp_path_factory.mktemp("security")
    arguments = [
        "recipe=smollm2_135m_2bit",
        f"model.path={make_model('llama')}",
        *("model.gguf_file=null", "model.dtype=auto", "trainer.precision=32-true", "trainer.accelerator=cpu"),
        *(f"data.{kind}.path={text_file}" for kind in ("calibration", "evaluation")),
        *("data.samples=2", "data.sequence_length=16", "data.evaluation.sequence_length=16"),
        *("data.evaluation.windows=1", "quantization.group_size=16", "quantization.method=slimllm"),
        *("quantization.allocation=null", "end_to_end.epochs=0"),
        f"run_dir={folder}",
    ]
    pipeline.run(load_recipe(arguments))
    return folder / "packed"


def header_size(content: bytes | bytearray) -> int:
    """Of a safetensors file, its length included."""
    return 8 + int.from_bytes(content[:8], "little")


# The config


@fuzz(2000)
@given(data=st.data())
def test_a_damaged_config_is_refused_or_describes_layers_of_bounded_size(checkpoint: Path, data: st.DataObject) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    for _ in range(data.draw(st.integers(1, 3))):
        config = damaged(config, lambda options: data.draw(st.sampled_from(options)))

    def check() -> None:
        check_quantization(config.get("quantization_config"))
        check_architecture(config, config["quantization_config"]["modules"])

    if (said := refusal(check)) is not None:
        assert "quantization_config" in said or "config.json" in said
        assert len(said) < 400
        return
    quantization = SlimplusConfig.from_dict(config["quantization_config"])
    assert config["num_hidden_layers"] <= len(quantization.modules)
    for name, (rows, columns) in quantization.shapes.items():
        assert 1 <= rows < 2**31
        assert sum(quantization.modules[name].values()) == -(-columns // quantization.group_size) < 2**15


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("hidden_size", 10**12, r"config\.json: hidden_size: 1000000000000 is no size"),
        ("num_hidden_layers", 10**9, r"config\.json: num_hidden_layers: 1000000000 does not fit the 14 packed layers"),
        ("vocab_size", 2**31 - 1, "cannot be loaded"),
        ("hidden_size", 2**31 - 1, "cannot be loaded"),
        (
            "vocab_size",
            10**8,
            r"embed_tokens\.weight is \[\d+, 64\] in the files, and \[100000000, 64\] by config.json",
        ),
        ("tie_word_embeddings", False, r"the checkpoint lacks the tensor lm_head\.weight"),
        ("head_dim", 2**31 - 1, "cannot be loaded"),
        ("max_position_embeddings", -1, "max_position_embeddings: -1 is no size"),
        ("num_attention_heads", 0, "num_attention_heads: 0 is no size"),
        ("quantization_config", [], "is not a packed slimplus checkpoint"),
        ("quantization_config.group_size", 0, "group_size: 0 is no size"),
        ("quantization_config.group_size", 48, "group_size is 48, not one of 16, 32"),
        ("quantization_config.scale_bits", 4, "scale_bits: 4 is neither 8 nor 16"),
        ("quantization_config.scale_bits", 8, "is F16 .* in the files, and U8 .* by config.json"),
        ("quantization_config.bits", 2.5, r"bits: 2\.5 is no whole number from 1 to 8"),
        ("quantization_config.modules", {}, "is in one of modules and shapes, not in both"),
        ("quantization_config.shapes", {}, "is in one of modules and shapes, not in both"),
        ("model_type", "no_such_model", "cannot be loaded"),
        (
            "model_type",
            "gemma3n_text",
            r"config\.json: model_type: 'gemma3n_text' is not supported; supported are llama",
        ),
    ],
)
def test_claims_that_are_refused(checkpoint: Path, tmp_path: Path, key: str, value: Any, message: str) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    *path, last = key.split(".")
    parent = config
    for part in path:
        parent = parent[part]
    parent[last] = value
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=message):
        slimplus.load(copy)


def test_where_a_checkpoint_lies_on_the_hub_is_asked_in_the_same_words(
    monkeypatch: pytest.MonkeyPatch, checkpoint: Path
) -> None:
    """The check of config.json looks where `from_pretrained` is going to look."""
    asked: list[dict[str, Any]] = []
    read = PretrainedConfig.get_config_dict

    def noted(path: Any, **arguments: Any) -> Any:
        asked.append(arguments)
        return read(checkpoint)

    monkeypatch.setattr(PretrainedConfig, "get_config_dict", noted)
    where = {"revision": "packed", "token": "secret", "subfolder": "inner"}
    with pytest.raises(InputError):  # there is no such repository
        slimplus.load("org/name", dtype=torch.float32, **where)
    assert asked[0] == where


# The tensors


@pytest.fixture(scope="module")
def packed() -> dict[str, Tensor]:
    """A packed weight with groups of every width that are not in the order of the columns."""
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    bits = torch.tensor([3, 1, 8, 2, 4], dtype=torch.int32)
    scale, zero_point = choose_qparams(weight, bits, GROUP_SIZE)
    scale, zero_point = storable_scale(scale), storable_zero_point(zero_point, bits)
    integers = quantize(weight, scale, zero_point, bits, GROUP_SIZE)
    return pack(QuantizedWeight(integers, scale, zero_point, bits, GROUP_SIZE))


def test_what_pack_gives_passes(packed: dict[str, Tensor]) -> None:
    check_packed(packed, SHAPE, GROUP_SIZE)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("group_index", lambda t: t.fill_(1), "group_index is no permutation of 5 groups"),
        ("group_index", lambda t: t.add_(1), "group_index is no permutation of 5 groups"),
        ("group_index", lambda t: t.sub_(1), "group_index is no permutation of 5 groups"),
        ("group_bits", lambda t: t.zero_(), "group_bits: widths outside 1 to 8"),
        ("group_bits", lambda t: t.fill_(255), "group_bits: widths outside 1 to 8"),
        ("group_bits", lambda t: t.copy_(t.flip(0)), "group_bits does not hold the widths .* in rising order"),
        ("group_bits", lambda t: t[0].fill_(2), "qplane1 is torch.int16"),
        ("scales", lambda t: t[0, 0].fill_(torch.nan), "scales holds values that are negative or not finite"),
        ("scales", lambda t: t[4, 3].fill_(torch.inf), "scales holds values that are negative or not finite"),
        ("scales", lambda t: t[2, 1].fill_(-1), "scales holds values that are negative or not finite"),
        ("scales", lambda t: t.resize_(5, 16), "scales is torch.float16 .5, 16. instead of torch.float16 .5, 32."),
        ("qplane2", lambda t: t.resize_(1, 32), "qplane2 is torch.int32 .1, 32."),
        ("qplane4", lambda t: t.set_(), "qplane4 is torch.int32 .0. instead"),
    ],
)
def test_tensors_that_are_refused(
    packed: dict[str, Tensor], name: str, change: Callable[[Tensor], Tensor], message: str
) -> None:
    tensors = {key: tensor.clone() for key, tensor in packed.items()}
    change(tensors[name])
    with pytest.raises(ValueError, match=message):
        check_packed(tensors, SHAPE, GROUP_SIZE)


def test_exponents_beyond_float16_are_refused(packed: dict[str, Tensor]) -> None:
    weight = replace(unpack(packed, *SHAPE, GROUP_SIZE), scale_bits=8)
    tensors = pack(weight)
    check_packed(tensors, SHAPE, GROUP_SIZE)
    tensors["scales"][:-1] = 255
    tensors["scales"][-1] = 23
    check_packed(tensors, SHAPE, GROUP_SIZE)
    assert unpack(tensors, *SHAPE, GROUP_SIZE).dequantize().isfinite().all()
    tensors["scales"][-1, 0] = 24
    with pytest.raises(ValueError, match="scales holds exponents above 23"):
        check_packed(tensors, SHAPE, GROUP_SIZE)


@fuzz(2000)
@given(data=st.data())
def test_damaged_tensors_are_refused_or_can_be_unpacked(packed: dict[str, Tensor], data: st.DataObject) -> None:
    tensors = {key: tensor.clone() for key, tensor in packed.items()}
    name = data.draw(st.sampled_from(sorted(tensors)))
    tensor = tensors[name]
    match data.draw(st.sampled_from(("bit", "bit", "dtype", "shape", "cut", "swap", "remove"))):
        case "bit":
            raw = tensor.view(torch.uint8).view(-1)
            raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        case "dtype":
            dtypes = (torch.float32, torch.int64, torch.int8, torch.uint8, torch.bool, torch.float16, torch.bfloat16)
            tensors[name] = tensor.to(data.draw(st.sampled_from(dtypes)))
        case "shape":
            tensors[name] = tensor.t() if tensor.dim() == 2 and data.draw(st.booleans()) else tensor[None]
        case "cut":
            tensors[name] = tensor[: data.draw(st.integers(0, len(tensor) - 1))]
        case "swap":
            other = data.draw(st.sampled_from(sorted(tensors)))
            tensors[name], tensors[other] = tensors[other], tensors[name]
        case "remove":
            del tensors[name]
    if (said := refusal(lambda: check_packed(tensors, SHAPE, GROUP_SIZE))) is not None:
        assert any(key in said for key in packed)
        return
    assert torch.isfinite(unpack(tensors, *SHAPE, GROUP_SIZE).dequantize()).all()


# The files


@fuzz(1000)
@given(data=st.data())
def test_damaged_bytes_are_refused_or_leave_all_tensors_as_they_should_be(
    checkpoint: Path, tmp_path: Path, data: st.DataObject
) -> None:
    content = bytearray((checkpoint / WEIGHTS).read_bytes())
    header = header_size(content)
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content))) :]
    else:
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(st.integers(0, header - 1))] ^= 1 << data.draw(st.integers(0, 7))
    file = tmp_path / WEIGHTS
    file.write_bytes(content)
    quantization = SlimplusConfig.from_dict(json.loads((checkpoint / "config.json").read_text())["quantization_config"])
    layers = (quantization.group_size, quantization.modules, quantization.shapes)
    if (said := refusal(lambda: check_packed_tensors(read_headers([str(file)]), *layers))) is not None:
        assert str(file) in said or "model." in said


def test_pickled_weights_are_never_opened(checkpoint: Path, tmp_path: Path) -> None:
    for name in ("pytorch_model.bin", "model.safetensors"):
        copy = shutil.copytree(checkpoint, tmp_path / name.split(".")[0])
        (copy / WEIGHTS).unlink()
        (copy / name).write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
        with pytest.raises(InputError):
            slimplus.load(copy)
        with pytest.raises((ValueError, OSError)):
            AutoModelForCausalLM.from_pretrained(copy)
    assert not (tmp_path / "exploded").exists()


def test_code_of_a_checkpoint_is_not_run(checkpoint: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}}
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "mine.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'exploded')!r})\n")
    with pytest.raises(InputError, match="cannot be loaded"):
        slimplus.load(copy)
    assert not (tmp_path / "exploded").exists()


def test_a_checkpoint_that_lacks_a_tensor(checkpoint: Path, tmp_path: Path) -> None:
    """Transformers would give it random values."""
    for name in ("model.norm.weight", "model.layers.0.mlp.up_proj.scales"):
        copy = shutil.copytree(checkpoint, tmp_path / name)
        tensors = load_file(copy / WEIGHTS)
        del tensors[name]
        save_file(tensors, copy / WEIGHTS, metadata={"format": "pt"})
        with pytest.raises(InputError, match=f"lacks .*{name}"):
            slimplus.load(copy)


def test_values_are_checked_after_loading(checkpoint: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    tensors = load_file(copy / WEIGHTS)
    tensors["model.layers.1.mlp.up_proj.group_index"][0] = 999
    save_file(tensors, copy / WEIGHTS, metadata={"format": "pt"})
    for load in (slimplus.load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj: group_index is no permutation"):
            load(copy)


# The campaign

LOADS, MEMORY, SECONDS = 400, 12 * 2**30, 20


@pytest.mark.slow
def test_a_campaign_of_damaged_checkpoints(checkpoint: Path, tmp_path: Path) -> None:
    """Whole loads, in a process that may take no more memory than a load takes, and no more time."""
    done = subprocess.run(
        [sys.executable, __file__, str(checkpoint), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    outcomes = json.loads(done.stdout.splitlines()[-1])
    assert outcomes["refused"] > LOADS // 2
    assert outcomes["loaded"] > LOADS // 10


def damage_quantization(folder: Path, generator: random.Random) -> None:
    """One value of the `quantization_config`."""
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = damaged(config["quantization_config"], generator.choice)
    (folder / "config.json").write_text(json.dumps(config))


def damage_architecture(folder: Path, generator: random.Random) -> None:
    """One value of config.json besides."""
    config = json.loads((folder / "config.json").read_text())
    quantization = {"quantization_config": config.pop("quantization_config")}
    (folder / "config.json").write_text(json.dumps(damaged(config, generator.choice) | quantization))


def damage_header(folder: Path, generator: random.Random) -> None:
    """One bit of the header, or the end of the file."""
    content = bytearray((folder / WEIGHTS).read_bytes())
    if generator.random() < 0.3:
        del content[generator.randrange(len(content)) :]
    else:
        content[generator.randrange(header_size(content))] ^= 1 << generator.randrange(8)
    (folder / WEIGHTS).write_bytes(content)


def damage_tensors(folder: Path, generator: random.Random) -> None:
    """A few bits behind the header."""
    content = bytearray((folder / WEIGHTS).read_bytes())
    for _ in range(5):
        content[generator.randrange(header_size(content), len(content))] ^= 1 << generator.randrange(8)
    (folder / WEIGHTS).write_bytes(content)


DAMAGE = (damage_quantization, damage_architecture, damage_header, damage_tensors)


def test_what_lists_a_damaged_checkpoint_refuses_it_or_gives_figures(checkpoint: Path, tmp_path: Path) -> None:
    generator = random.Random(1)
    for number in range(600):
        copy = shutil.copytree(checkpoint, tmp_path / "copy")
        DAMAGE[number % len(DAMAGE)](copy, generator)
        said = refusal(lambda: read_contents(str(tmp_path / "copy")), InputError)
        if said is None:
            contents = read_contents(str(copy))
            assert contents.compression > 0
            assert 1 <= contents.average_bits <= 8
        shutil.rmtree(copy)


def load_and_run(folder: Path) -> None:
    slimplus.load(folder)(torch.ones(1, 4, dtype=torch.int64))


def campaign(checkpoint: Path, folder: Path) -> dict[str, int]:
    """Any error but a clear one ends it."""
    slimplus.load(checkpoint)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    generator = random.Random(0)
    outcomes = {"loaded": 0, "refused": 0}
    for number in range(LOADS):
        copy = shutil.copytree(checkpoint, folder / str(number))
        DAMAGE[number % len(DAMAGE)](copy, generator)
        signal.alarm(SECONDS)
        said = refusal(partial(load_and_run, copy))
        signal.alarm(0)
        outcomes["loaded" if said is None else "refused"] += 1
        shutil.rmtree(copy)
    return outcomes


if __name__ == "__main__":
    sys.stdout.write(json.dumps(campaign(Path(sys.argv[1]), Path(sys.argv[2]))) + "\n")
