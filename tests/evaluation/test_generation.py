"""Text that a model writes, with tokenizers of every kind."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import BatchEncoding, LlamaConfig

from slimplus.evaluation.decoding import GraphDecoder
from slimplus.evaluation.generation import LoadedModel, Sampling, continue_text, generate_function, stream


class ByteTokenizer:
    """Gives token types besides ids and mask, and decodes its bytes strictly."""

    eos_token_id = pad_token_id = 0

    def __call__(self, text: str, **_: Any) -> BatchEncoding:
        ids = torch.tensor([list(text.encode())])
        values = {"input_ids": ids, "token_type_ids": torch.zeros_like(ids), "attention_mask": torch.ones_like(ids)}
        return BatchEncoding(values)

    def decode(self, tokens: torch.Tensor, **_: Any) -> str:
        return bytes(torch.as_tensor(tokens).flatten().tolist()).decode()


def strict_model(written: bytes) -> Any:
    """A model that takes ids and mask alone, and writes these bytes."""

    def generate(input_ids: torch.Tensor, attention_mask: torch.Tensor, streamer: Any = None, **_: Any) -> torch.Tensor:
        assert input_ids.shape == attention_mask.shape
        new = torch.tensor([list(written)])
        if streamer is not None:
            for tokens in (input_ids, *new[0].split(1)):
                streamer.put(tokens)
            streamer.end()
        return torch.cat([input_ids, new], dim=1)

    model = torch.nn.Embedding(256, 1)
    places: dict[str, Any] = {
        "get_input_embeddings": lambda: model,
        "get_output_embeddings": lambda: None,
        "modules": model.modules,
    }
    places |= {"named_modules": model.named_modules, "get_submodule": model.get_submodule, "config": LlamaConfig()}
    return SimpleNamespace(device=torch.device("cpu"), generate=generate, **places)


def test_a_sentence_takes_ids_and_mask_alone_and_survives_bytes_that_are_no_text() -> None:
    tokenizer: Any = ByteTokenizer()
    assert continue_text(strict_model(b" there"), tokenizer, "Hello") == "Hello there"
    assert continue_text(strict_model(b" \xff there"), tokenizer, "Hello") == "Hello � there"


def test_a_stream_takes_ids_and_mask_alone_and_survives_bytes_that_are_no_text(
    capsys: pytest.CaptureFixture[str],
) -> None:
    tokenizer: Any = ByteTokenizer()
    stream(LoadedModel(strict_model(b" a\xff b "), tokenizer), "Hello", Sampling(8))
    assert capsys.readouterr().out == " a� b \n"


def test_a_gpu_replays_a_graph_for_each_token() -> None:
    model = strict_model(b"")
    assert generate_function(model) is model.generate
    model.device = torch.device("cuda", 0)
    decoder = getattr(generate_function(model), "__self__", None)
    assert isinstance(decoder, GraphDecoder)
    assert decoder.model is model
