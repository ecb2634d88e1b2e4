"""A model is loaded exactly as its file has it, or refused with the tensor's name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from slimplus.models.exact import finite_problem, key_problem, not_finite
from slimplus.models.loading import ModelSource
from slimplus.utils.errors import InputError
from tests.support.models import ModelMaker

DOWN, EMBEDDING, HEAD = "model.layers.1.mlp.down_proj.weight", "model.embed_tokens.weight", "lm_head.weight"
Tensors = dict[str, torch.Tensor]
Changed = Callable[..., Path]


@pytest.fixture
def changed(make_model: ModelMaker, tmp_path: Path) -> Changed:
    """`changed(change, **config)` → a copy of a tiny model with other tensors and other values in config.json."""

    def copy(change: Callable[[Tensors], object] | None = None, **config: Any) -> Path:
        folder = Path(shutil.copytree(make_model("llama"), tmp_path / "model"))
        tensors = load_file(folder / "model.safetensors")
        if change is not None:
            change(tensors)
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        values = json.loads((folder / "config.json").read_text()) | config
        if "num_hidden_layers" in config:
            values.pop("layer_types", None)
        (folder / "config.json").write_text(json.dumps(values))
        return folder

    return copy


def prefixed(prefix: str) -> Callable[[Tensors], None]:
    def apply(tensors: Tensors) -> None:
        for name in list(tensors):
            tensors[prefix + name] = tensors.pop(name)

    return apply


def float8(tensors: Tensors) -> None:
    tensors[DOWN] = tensors[DOWN].to(torch.float8_e4m3fn)


def poisoned(name: str, value: float) -> Callable[[Tensors], None]:
    def apply(tensors: Tensors) -> None:
        tensors[name].view(-1)[-1] = value

    return apply


@pytest.mark.parametrize(
    ("change", "config", "said"),
    [
        (lambda t: t.pop(DOWN), {}, f"{DOWN} is missing; config.json"),
        (None, {"tie_word_embeddings": False}, "lm_head.weight is missing; if the head is the embedding, set tie_word"),
        (prefixed("_orig_mod."), {}, "the names of the tensors begin with '_orig_mod.', as in _orig_mod.model.emb"),
        (prefixed("base_model.model."), {}, "base_model.model.model.embed_tokens.weight belongs to an adapter (and 19"),
        (None, {"num_hidden_layers": 3}, "model.layers.2.input_layernorm.weight is missing (and 8 more); config.json"),
        (None, {"num_hidden_layers": 1}, "model.layers.1.input_layernorm.weight is in the file, but not in the arch"),
        (
            lambda t: t.update({DOWN.replace("weight", "bias"): torch.ones(64)}),
            {},
            "down_proj.bias is in the file, but",
        ),
        (
            lambda t: t.update({f"{DOWN}_scale": torch.ones(1)}),
            {},
            f"{DOWN}_scale belongs to weights that are quantized",
        ),
        (
            lambda t: t.update({DOWN.replace("weight", "qzeros"): torch.ones(1)}),
            {},
            "down_proj.qzeros belongs to weights",
        ),
        (float8, {}, f"{DOWN} in"),
        (
            lambda t: t.update({EMBEDDING: t[EMBEDDING][:-1]}),
            {},
            f"{EMBEDDING} has the shape [256, 64] in the file and",
        ),
        (
            None,
            {"vocab_size": 10**9},
            f"{EMBEDDING} has the shape [257, 64] in the file and [1000000000, 64] by config",
        ),
    ],
)
def test_tensors_of_another_architecture_are_named(
    changed: Changed, change: Callable[[Tensors], object] | None, config: dict[str, Any], said: str
) -> None:
    source = ModelSource(str(changed(change, **config)))
    with pytest.raises(InputError) as caught:
        source.check_weights()
    assert said in str(caught.value)
    assert str(caught.value).startswith(f"model.path: {source.path}: ")
    assert len(str(caught.value).splitlines()) == 1


def test_harmless_names_are_none_of_it(changed: Changed) -> None:
    """Old checkpoints hold the frequencies of their rotary positions, and others the tied head as well."""

    def add(tensors: Tensors) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
        tensors[HEAD] = tensors[EMBEDDING].clone()

    source = ModelSource(str(changed(add)))
    source.check_weights()
    model = source.model()
    assert model.config.tie_word_embeddings
    assert source.is_tied()
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_the_weights_say_whether_the_head_is_tied(changed: Changed) -> None:
    source = ModelSource(str(changed(lambda tensors: tensors.update({HEAD: tensors[EMBEDDING] * 2}))))
    assert source.config().tie_word_embeddings
    model = source.model()
    assert not model.config.tie_word_embeddings
    assert not source.is_tied()
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight * 2)


@pytest.mark.parametrize("name", [DOWN, EMBEDDING, "model.norm.weight", "model.layers.0.input_layernorm.weight"])
@pytest.mark.parametrize(("value", "held"), [(float("nan"), "NaN"), (float("inf"), "infinity"), (-1e39, "infinity")])
def test_a_tensor_that_is_not_finite_is_named(changed: Changed, name: str, value: float, held: str) -> None:
    with pytest.raises(InputError, match=rf"{name} holds {held}; download the weights again, or take a checkpoint"):
        ModelSource(str(changed(poisoned(name, value)))).model()


def test_weights_beyond_the_dtype_that_is_asked_for_are_named(changed: Changed) -> None:
    folder = str(changed(poisoned(DOWN, 1e6)))
    ModelSource(folder).model()
    with pytest.raises(InputError, match=rf"model.dtype: .*{DOWN} holds infinity as float16; give auto"):
        ModelSource(folder, dtype="float16").model()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_dtype_is_not_blamed_for_the_file(changed: Changed, dtype: str) -> None:
    with pytest.raises(InputError, match=rf"{DOWN} holds NaN; download the weights again"):
        ModelSource(str(changed(poisoned(DOWN, float("nan")))), dtype=dtype).model()


def test_values_of_the_configuration_that_make_no_finite_positions(changed: Changed) -> None:
    rope = {"rope_type": "default", "rope_theta": 0.0}
    with pytest.raises(InputError, match=r"inv_freq holds (NaN|infinity), which follows from config.json"):
        ModelSource(str(changed(rope_parameters=rope))).model()


def test_every_kind_of_tensor_is_looked_at() -> None:
    nan = torch.tensor([1.0, float("nan")])
    assert (
        not_finite([("ids", torch.tensor([1])), ("none", torch.ones(0)), ("meta", torch.ones(1, device="meta"))])
        is None
    )
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        assert not_finite([("a", torch.ones(3)), ("b", nan.to(dtype))]) == "b holds NaN"
    assert finite_problem(torch.nn.Linear(2, 2)) is None


def test_one_odd_name_is_no_prefix() -> None:
    info = {
        "missing_keys": {"a.weight", "b.weight", "c.weight"},
        "unexpected_keys": {"x.a.weight"},
        "mismatched_keys": [],
    }
    assert "a.weight is missing (and 2 more); x.a.weight is in the file" in (key_problem(info) or "")
