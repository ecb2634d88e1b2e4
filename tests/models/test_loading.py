"""Loading configurations, tokenizers and weights, and what is said where they cannot be had."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from transformers import AutoConfig

from slimplus.models.loading import ModelSource
from slimplus.run_dir.fingerprint import weights_digest
from slimplus.utils.errors import InputError, TemporaryFailure
from tests.support.models import ModelMaker


def test_values_that_an_architecture_does_not_take_are_named() -> None:
    with pytest.raises(InputError, match=r"model\.config: no llama has such values \(.*hidden_size"):
        ModelSource.config_of({"model_type": "llama", "hidden_size": "x"})


def test_weights_cut_short_are_named(make_model: ModelMaker, tmp_path: Path) -> None:
    folder = shutil.copytree(make_model("llama"), tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"model\.path: cannot load .*model \(.*; check config.json, or download the"):
        ModelSource(str(folder)).model()


def test_a_full_disk_is_no_wrong_path(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/cache/blob")

    monkeypatch.setattr(AutoConfig, "from_pretrained", fail)
    with pytest.raises(TemporaryFailure, match="no space is left to download org/name; free some, or set HF_HOME"):
        ModelSource("org/name").config()


@pytest.mark.parametrize("method", ["fp8", "awq", "bitsandbytes", "slimplus"])
def test_a_quantized_model_is_refused(make_model: ModelMaker, tmp_path: Path, method: str) -> None:
    """Its codes would be taken for weights."""
    folder = shutil.copytree(make_model("llama"), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": method}}))
    with pytest.raises(InputError, match=rf"model' is quantized already \({method}\); give the full-precision model"):
        ModelSource(str(folder)).config()


def test_a_hub_id_is_pinned_to_its_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Or a job that goes on after a push would join blocks of two models."""
    asked = Mock(
        side_effect=[f"/cache/models--org--name/snapshots/{commit}/snapshots/model.gguf" for commit in ("a1", "b2")]
    )
    monkeypatch.setattr("slimplus.models.loading.hf_hub_download", asked)
    source = ModelSource("org/name", gguf_file="snapshots/model.gguf", revision="v2")
    before, after = source.pinned(), source.pinned()
    assert (before.revision, after.revision) == ("a1", "b2")
    assert weights_digest(before) != weights_digest(after)
    assert asked.call_args.args == ("org/name", "snapshots/model.gguf")
    assert asked.call_args.kwargs == {"revision": "v2"}
    read = Mock(side_effect=OSError("no network"))
    for kind in ("AutoConfig", "AutoTokenizer"):  # the configuration says which class loads the model
        monkeypatch.setattr(f"slimplus.models.loading.{kind}.from_pretrained", read)
    for load in (before.config, before.tokenizer, before.model):
        with pytest.raises(InputError):
            load()
    assert [call.kwargs["revision"] for call in read.call_args_list] == ["a1"] * 3
    local = ModelSource(str(tmp_path))
    assert local.pinned() is local


def test_a_model_that_cannot_be_had_is_named() -> None:
    source = ModelSource("nobody/no-such-model")
    for load in (source.pinned, source.config, source.tokenizer, source.model):
        with pytest.raises(InputError, match=r"model\.path: cannot load 'nobody/no-such-model'"):
            load()


def test_half_a_tokenizer_is_named(make_model: ModelMaker, tmp_path: Path) -> None:
    folder = shutil.copytree(make_model("llama"), tmp_path / "model")
    file = folder / "tokenizer.json"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(
        InputError, match=r"cannot load .*model \(.*; check tokenizer.json and tokenizer_config.json, or download the"
    ):
        ModelSource(str(folder)).tokenizer()


def test_values_that_no_text_can_be_tokenized_with_are_named(make_model: ModelMaker, tmp_path: Path) -> None:
    folder = shutil.copytree(make_model("llama"), tmp_path / "model")
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": ""}))
    with pytest.raises(InputError, match=r"TypeError: .*; check tokenizer.json and tokenizer_config.json"):
        ModelSource(str(folder)).tokenizer()


def test_stored_dtype_is_kept(make_model: ModelMaker) -> None:
    assert ModelSource(str(make_model("llama"))).model().dtype == torch.bfloat16
