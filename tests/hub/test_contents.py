"""What the commands say of a packed checkpoint's files, sound and damaged."""

from __future__ import annotations

import errno
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import slimplus
from slimplus.cli.main import main
from slimplus.hub.contents import read_contents
from tests.support.models import ModelMaker

PROMPT = "Functions are"


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def spoil_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"not safetensors at all")


def edit_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))


def drop_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.group_bits"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def shuffle_groups(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.group_index"].fill_(1)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_counts(folder: Path) -> None:
    edit_config(folder, lambda c: c["quantization_config"]["modules"]["model.layers.0.mlp.up_proj"].update({"2": 9}))


def leave_the_head_alone(folder: Path) -> None:
    name = "model.layers.0.mlp.up_proj"
    tensors = load_file(folder / "model.safetensors")
    kept = {key.replace(name, "lm_head"): tensor for key, tensor in tensors.items() if key.startswith(name)}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})

    def change(config: dict[str, Any]) -> None:
        quantization = config["quantization_config"]
        quantization |= {key: {"lm_head": quantization[key][name]} for key in ("modules", "shapes")}

    edit_config(folder, change)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut": (cut, r"model\.safetensors is damaged \(.*\); export or download the checkpoint again"),
    "header": (spoil_header, r"model\.safetensors is damaged"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), r"model\.safetensors is missing"),
    "config": (lambda folder: (folder / "config.json").write_text("{"), r"config\.json cannot be read"),
    "nested config": (lambda folder: (folder / "config.json").write_text("[" * 10**5), r"config\.json cannot be read"),
    "head alone": (leave_the_head_alone, "do not fit together .*no packed layer lies in a transformer block"),
    "no config": (lambda folder: (folder / "config.json").unlink(), r"config\.json is missing"),
    "index": (
        lambda folder: (folder / "model.safetensors.index.json").write_text("[]"),
        r"index\.json cannot be read",
    ),
    "unpacked": (lambda folder: edit_config(folder, lambda c: c.pop("quantization_config")), "not a packed slimplus"),
    "another method": (
        lambda folder: edit_config(folder, lambda c: c["quantization_config"].update(quant_method="gptq")),
        "not a packed slimplus",
    ),
    "no group size": (
        lambda folder: edit_config(folder, lambda c: c["quantization_config"].update(group_size=0)),
        "do not fit together .*group_size is 0",
    ),
    "counts": (change_counts, r"do not fit together .*model\.layers\.0\.mlp\.up_proj has groups"),
    "tensor": (drop_tensor, r"do not fit together .*model\.layers\.0\.mlp\.up_proj\.group_bits"),
    "order": (shuffle_groups, r"do not fit together .*group_index does not order the groups"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_in_one_sentence(damage: str, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    harm, sentence = DAMAGE[damage]
    harm(copy)
    for command in (["inspect", str(copy)], ["generate", str(copy), PROMPT], ["benchmark", str(copy)]):
        assert main(command) == 2
        said = capsys.readouterr()
        assert re.search(sentence, said.err), said.err
        assert len(said.err.splitlines()) == 1
        assert said.out == ""


def test_a_path_that_leads_nowhere(finished: Path, make_model: ModelMaker, capsys: pytest.CaptureFixture[str]) -> None:
    sentences = {
        "./nowhere": "./nowhere does not exist; give the folder of a packed checkpoint, or a hub id org/name",
        "org/name": "org/name is not a folder on this machine and cannot be downloaded from the hub",
        str(finished / "metrics.json"): "is a file; give the folder of a packed checkpoint",
        str(finished): f"give {finished / 'packed'}",
        str(make_model("llama")): "is not a packed slimplus checkpoint; load it with transformers",
    }
    for path, sentence in sentences.items():
        assert main(["inspect", path]) == 2
        said = capsys.readouterr().err
        assert sentence in said
        assert len(said.splitlines()) == 1


def test_a_dense_model_on_the_hub_is_not_downloaded_to_be_refused(
    monkeypatch: pytest.MonkeyPatch, make_model: ModelMaker, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: None)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda _, name: str(make_model("llama") / name))
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("downloads all of it"))
    assert main(["inspect", "org/dense-70b"]) == 2
    assert "is not a packed slimplus checkpoint; load it with transformers" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("code", "sentence"),
    [(errno.ENOSPC, "no space is left to download it"), (errno.EACCES, "cannot be downloaded from the hub")],
)
def test_a_disk_that_is_full_is_not_a_wrong_id(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], code: int, sentence: str
) -> None:
    def fail(*_: Any) -> str:
        raise OSError(code, "as the system says")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: None)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    assert main(["inspect", "org/name"]) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("name", [1, "../../etc/passwd", "weights.bin", ".safetensors"])
def test_an_index_names_safetensors_files_beside_it(
    packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: Any
) -> None:
    copy = shutil.copytree(packed, tmp_path / "packed")
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    assert main(["inspect", str(copy)]) == 2
    assert f"names {name!r}, which is not a safetensors file" in capsys.readouterr().err


def test_blocks_are_listed_by_number(copy: Path) -> None:
    """transformers sorts the keys of a config as text, and puts block 10 before block 9."""
    tensors = load_file(copy / "model.safetensors")
    renamed = {
        name.replace("layers.1.", "layers.10.").replace("layers.0.", "layers.9."): t for name, t in tensors.items()
    }
    save_file(renamed, copy / "model.safetensors", metadata={"format": "pt"})
    text = (copy / "config.json").read_text()
    (copy / "config.json").write_text(text.replace("layers.1.", "layers.10.").replace("layers.0.", "layers.9."))
    names = [layer.name for layer in read_contents(str(copy)).layers]
    assert names[0].startswith("model.layers.9.")
    assert names[-1].startswith("model.layers.10.")


def test_shards_are_read_through_their_index(packed: Path, model: Any, tmp_path: Path) -> None:
    slimplus.load(packed).save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    whole, parts = read_contents(str(packed)), read_contents(str(tmp_path))
    assert parts.layers == whole.layers
    assert parts.size_bytes == whole.size_bytes
