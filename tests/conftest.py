"""Tiny random models and a text, so that the whole job runs in seconds."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

settings.register_profile("slimplus", deadline=None)  # timings decide no test
settings.load_profile("slimplus")

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the suite needs no network, and must not wait for one

TINY = {
    "llama": {
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
    },
    "mistral": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "sliding_window": 8,
    },
    "qwen2": {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2},
    "qwen3": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
    },
    "opt": {
        "hidden_size": 64,
        "ffn_dim": 128,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 64,
        "max_position_embeddings": 256,
    },
}
"""`model_type` → sizes. LLaMA's 160 columns leave a ragged last group of 64."""

ModelMaker = Callable[..., Path]


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> ModelMaker:
    """`make_model(model_type, blocks=2)` → folder with a random model and a byte-level tokenizer, made once."""
    made: dict[tuple[str, int, tuple[tuple[str, int], ...]], Path] = {}

    def make(model_type: str, blocks: int = 2, **sizes: int) -> Path:
        key = (model_type, blocks, tuple(sorted(sizes.items())))
        if key not in made:
            made[key] = _make_model(tmp_path_factory.mktemp(f"tiny-{model_type}"), model_type, blocks, sizes)
        return made[key]

    return make


def _make_model(folder: Path, model_type: str, blocks: int, sizes: dict[str, int]) -> Path:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(["</s>", *alphabet])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", bos_token="</s>")
    values = TINY[model_type] | sizes | {"num_hidden_layers": blocks, "vocab_size": len(tokenizer)}
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **values, pad_token_id=0, bos_token_id=0, eos_token_id=0)
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            # Larger than usual, or the logits say nothing; columns of different size, or mixing bits never pays.
            parameter.data *= 4 * torch.exp(torch.randn(parameter.shape[1]))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of about 60 KB, from Python's own documentation."""
    from pydoc_data.topics import topics

    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("\n".join(topics[name] for name in sorted(topics))[:60_000])
    return file


SMALL = (
    # The paper's method in place of the demo's.
    "quantization.method=slimllm_plus",
    "quantization.allocation=null",
    "training.learning_rate=2.0e-2",
    "end_to_end.epochs=0",
    "model.gguf_file=null",
    "model.dtype=auto",
    "data.samples=8",
    "data.sequence_length=32",
    "data.evaluation.sequence_length=64",
    "data.evaluation.windows=2",
    "quantization.group_size=16",
    "training.epochs=2",
    "trainer.precision=32-true",
)

Arguments = Callable[..., list[str]]


@pytest.fixture(scope="session")
def arguments(make_model: ModelMaker, text_file: Path) -> Arguments:
    """`arguments(run_dir, *overrides)` of a small run."""

    def build(run_dir: Path, *overrides: str, model: Path | None = None) -> list[str]:
        return [
            "recipe=smollm2_135m_2bit",
            f"model.path={model or make_model('llama')}",
            f"data.calibration.path={text_file}",
            f"data.evaluation.path={text_file}",
            *SMALL,
            f"run_dir={run_dir}",
            *overrides,
        ]

    return build


@pytest.fixture(scope="session")
def finished(arguments: Arguments, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a finished `slimllm_plus` run; tests copy it before they change anything."""
    from slimplus.pipeline import run as pipeline
    from slimplus.recipe.parsing import load_recipe

    folder = tmp_path_factory.mktemp("run") / "plus"
    pipeline.run(load_recipe(arguments(folder)))
    return folder


@pytest.fixture(scope="module")
def packed(finished: Path) -> Path:
    """Its packed checkpoint."""
    return finished / "packed"


@pytest.fixture(scope="module")
def model(packed: Path) -> Any:
    """The model it holds."""
    import torch

    import slimplus

    return slimplus.load(packed, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer(packed: Path) -> Any:
    """The tokenizer beside it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(packed)


def expected_text(model: Any, tokenizer: Any, prompt: str, **arguments: Any) -> str:
    """What the model writes after a prompt, by `generate` itself."""
    inputs = tokenizer(prompt, return_tensors="pt")
    written = model.generate(**inputs, pad_token_id=0, **arguments)[0, inputs["input_ids"].shape[1] :]
    return str(tokenizer.decode(written, skip_special_tokens=True))
