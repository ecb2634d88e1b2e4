"""The packed embedding: its lookups, and the head tied to it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slimplus.nn import PackedEmbedding, TiedHead, prepare_inference
from slimplus.nn.backends.cpu_int4 import Int4Weight
from slimplus.nn.backends.cpu_int8 import Int8Weight
from slimplus.quantization.linear import QuantizationConfig, quantize_embedding_or_head
from tests.support.layers import TOLERANCE, inputs_of, random_weight, relative_error


class Tied(nn.Module):
    """An embedding and the head tied to it."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.embedding = PackedEmbedding.from_quantized(random_weight(40, 200, 64, (bits,)), torch.bfloat16)
        self.head = TiedHead(self.embedding)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_tied_head_multiplies_like_any_packed_layer(bits: int) -> None:
    module, inputs = Tied(bits), inputs_of(3)
    exact = inputs.double() @ module.embedding.dequantize().double().T
    (projections,) = prepare_inference(module)
    assert relative_error(module.head(inputs), exact) < TOLERANCE
    assert isinstance(projections._backend, Int4Weight if bits == 4 else Int8Weight)
    assert not any(name.startswith("head") for name in module.state_dict())
    other = copy.deepcopy(module)
    assert other.head._embedding[0] is other.embedding
    other.embedding.scales.mul_(2)
    assert torch.equal(module.head(inputs.float()), inputs.float() @ module.embedding.dequantize().T)
    assert torch.equal(other.head(inputs.float()), inputs.float() @ other.embedding.dequantize().T)


def test_a_tied_head_whose_tensors_are_moved_moves_those_of_the_embedding() -> None:
    module = Tied(8)
    tokens = torch.arange(5)
    before = module.embedding(tokens)
    moved = {name: tensor.clone() for name, tensor in module.head.packed_tensors().items()}
    module.head.replace_tensors(moved)
    assert module.embedding.scales is moved["scales"]
    assert module.head.scales is moved["scales"]
    assert torch.equal(module.embedding(tokens), before)


def test_embedding_and_tied_head_compile_as_one_graph() -> None:
    module, tokens = Tied(8), torch.arange(6).view(2, 3)
    prepare_inference(module)

    def forward(asked: torch.Tensor) -> torch.Tensor:
        return module.head(module.embedding(asked))

    with torch.no_grad():
        expected = forward(tokens)
        compiled = torch.compile(forward, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(tokens), expected)


def _embedding(rows: int, columns: int, bits: int, group_size: int = 16) -> PackedEmbedding:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    weight[1] = 0  # as a padding row often is
    return PackedEmbedding.from_quantized(quantize_embedding_or_head(weight, None, _config(bits, group_size)))


def _config(bits: int, group_size: int = 16) -> QuantizationConfig:
    return QuantizationConfig("slimllm", bits, group_size)


@pytest.mark.parametrize(("rows", "columns"), [(40, 48), (33, 40), (16, 16)])
@pytest.mark.parametrize("bits", [1, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_lookup_gives_the_rows_of_the_whole(rows: int, columns: int, bits: int, dtype: torch.dtype) -> None:
    embedding = _embedding(rows, columns, bits).to(dtype)
    generator = torch.Generator().manual_seed(1)
    for shape in ((1,), (1, 1), (2, 7), (3, 16), (2, 1, 5)):
        tokens = torch.randint(0, rows, shape, generator=generator)
        found = embedding(tokens)
        assert found.shape == (*shape, columns)
        assert found.dtype == dtype
        assert torch.equal(found, embedding.dequantize(dtype)[tokens])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_lookup_on_a_gpu_is_the_same(dtype: torch.dtype) -> None:
    for bits in (1, 4, 8):
        embedding = _embedding(500, 192, bits, 64).to(dtype)
        tokens = torch.randint(0, 500, (3, 11), generator=torch.Generator().manual_seed(0))
        expected = embedding(tokens)
        assert torch.equal(embedding.cuda()(tokens.cuda()).cpu(), expected)


def test_a_cast_keeps_the_packed_tensors() -> None:
    embedding = _embedding(40, 48, 8)
    before = embedding.packed_tensors()
    tokens = torch.arange(7)
    for dtype in (torch.float16, torch.float64, torch.bfloat16):
        assert embedding.to(dtype)(tokens).dtype == dtype
        for name, tensor in embedding.packed_tensors().items():
            assert tensor.dtype == before[name].dtype
            assert torch.equal(tensor, before[name])
    assert embedding.to("meta").scales.is_meta


def test_a_row_of_zeros_stays_zero() -> None:
    for bits in (2, 4, 8):
        assert not _embedding(40, 48, bits)(torch.tensor([1])).any()


def test_a_token_outside_the_vocabulary_is_refused() -> None:
    """Not a padding row that happens to be stored behind the last one."""
    for token in (40, 48, -1):
        with pytest.raises((IndexError, RuntimeError), match=r"out of (range|DATA bounds)"):
            _embedding(40, 48, 8)(torch.tensor([token]))


def test_a_lookup_dequantizes_only_what_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    from slimplus.nn import packed_embedding

    shapes = []
    whole = packed_embedding.dequantize_packed

    def note(packed: dict[str, Tensor], counts: Any, shape: tuple[int, int], *rest: Any) -> Tensor:
        shapes.append((shape, packed["scales"].shape[1]))
        return whole(packed, counts, shape, *rest)

    embedding = _embedding(400, 48, 8)
    monkeypatch.setattr(packed_embedding, "dequantize_packed", note)
    embedding(torch.tensor([[3, 5, 300]]))
    assert shapes == [((3, 48), 16)]
