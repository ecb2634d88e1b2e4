"""Models opened to be run block by block: mapped from their files, or converted one block at a time."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from slimplus.models.architectures import find_blocks
from slimplus.models.block_loading import open_model
from slimplus.models.loading import ModelSource
from slimplus.utils.errors import InputError
from tests.support.gguf_files import write_gguf
from tests.support.models import ModelMaker


def mapped_files(block: nn.Module) -> set[str]:
    """The files that the memory of a block's parameters belongs to; "" is memory of the process itself."""
    found = set()
    ranges = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
    for parameter in block.parameters():
        for span, *_rest in ranges:
            start, stop = (int(address, 16) for address in span.split("-"))
            if start <= parameter.data_ptr() < stop:
                found.add(_rest[4].strip() if len(_rest) == 5 and _rest[4].startswith("/") else "")
    return found


def equal_models(source: ModelSource) -> bool:
    """Whether a model that is opened, its blocks loaded one by one, holds what the model holds that is loaded whole."""
    whole, (model, load_block) = source.model(), open_model(source)
    assert load_block is not None
    blocks = find_blocks(whole)
    assert all(parameter.is_meta for parameter in find_blocks(model).parameters())
    pairs = [(block.state_dict(), load_block(index).state_dict()) for index, block in enumerate(blocks)]
    outside = {name: tensor for name, tensor in model.state_dict().items() if not tensor.is_meta}
    pairs.append(({name: whole.state_dict()[name] for name in outside}, outside))
    assert len(outside) + sum(len(block.state_dict()) for block in blocks) == len(whole.state_dict())
    loaded = nn.ModuleList(map(load_block, range(len(blocks))))
    for one, other in zip(blocks.named_buffers(), loaded.named_buffers(), strict=True):
        assert one[0] == other[0]
        assert torch.equal(one[1], other[1])
    return all(
        one.keys() == other.keys()
        and all(torch.equal(one[name], other[name]) for name in one)
        and all(one[name].dtype == other[name].dtype for name in one)
        for one, other in pairs
    )


def test_stored_weights_are_mapped(make_model: ModelMaker) -> None:
    model, load_block = open_model(ModelSource(str(make_model("llama"))))
    assert load_block is None
    assert mapped_files(find_blocks(model)) == {str(make_model("llama") / "model.safetensors")}


@pytest.mark.parametrize("model_type", ["llama", "opt"])
def test_another_dtype_is_converted_block_by_block(make_model: ModelMaker, model_type: str) -> None:
    assert equal_models(ModelSource(str(make_model(model_type, 12)), dtype="float32"))


@pytest.mark.parametrize(("model_type", "sizes"), [("llama", {}), ("qwen3", {"head_dim": 128})])
def test_a_gguf_file_is_converted_block_by_block(
    make_model: ModelMaker, tmp_path: Path, model_type: str, sizes: dict[str, int]
) -> None:
    write_gguf(make_model(model_type, 3, **sizes), tmp_path / "model.gguf")
    for dtype in ("auto", "float32"):
        assert equal_models(ModelSource(str(tmp_path), "model.gguf", dtype))
    assert not list(Path(tmp_path).glob("*excerpt*"))


def test_tensors_under_other_names_are_converted_block_by_block(make_model: ModelMaker, tmp_path: Path) -> None:
    """Transformers takes the base model's names as well."""
    folder = Path(shutil.copytree(make_model("llama"), tmp_path / "model"))
    tensors = {name.removeprefix("model."): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert equal_models(ModelSource(str(folder)))


def test_a_block_that_is_not_finite_is_named_when_it_is_loaded(make_model: ModelMaker, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(make_model("llama"), tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] = 1e6
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _, load_block = open_model(ModelSource(str(folder), dtype="float16"))
    assert load_block is not None
    load_block(0)
    with pytest.raises(InputError, match=r"model.dtype: .*layers.1.mlp.down_proj.weight holds infinity as float16; gi"):
        load_block(1)


def test_a_gguf_file_that_lacks_a_tensor_is_refused(make_model: ModelMaker, tmp_path: Path) -> None:
    write_gguf(make_model("llama"), tmp_path / "model.gguf", without="blk.1.ffn_down.weight")
    _, load_block = open_model(ModelSource(str(tmp_path), "model.gguf"))
    assert load_block is not None
    load_block(0)
    with pytest.raises(InputError, match=r"model.layers.1.mlp.down_proj.weight is missing; config.json"):
        load_block(1)
