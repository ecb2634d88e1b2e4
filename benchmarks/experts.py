"""Widths of experts by sensitivity against uniform ones, on a tiny Mixtral that is trained on text first.

    python -m benchmarks.experts [WORK_FOLDER]

1. A Mixtral of 6 experts a block is trained on Python's documentation, byte by byte, so that its routing means
   something.
2. It is quantized to 2 bits on average: with all widths by sensitivity; with those of the experts uniform and the
   others by the same sensitivity; with all uniform.
3. Perplexities on text that it has not seen go to benchmarks/results/experts.json.

What WORK_FOLDER holds is not made again.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, MixtralConfig, PretrainedConfig, PreTrainedTokenizerFast

from slimplus.models.architectures import quantized_linears, stack_of_layers
from slimplus.models.loading import ModelSource
from slimplus.pipeline.run import run
from slimplus.quantization.knapsack import allocate, costs_and_budget
from slimplus.recipe.parsing import load_recipe
from slimplus.run_dir.directory import SENSITIVITY
from slimplus.utils.files import write_atomic
from slimplus.utils.machine import commit, describe_machine

RESULTS = Path(__file__).resolve().parent / "results" / "experts.json"
SIZES: dict[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
}
STEPS, BATCH, LENGTH = 300, 8, 96
BITS, GROUP_SIZE, WIDTHS = 2, 16, (1, 2, 3, 4)
KEYS = (
    "recipe=smollm2_135m_2bit",
    "model.gguf_file=null",
    "model.dtype=auto",
    "quantization.method=slimllm",
    f"quantization.bits={BITS}",
    f"quantization.group_size={GROUP_SIZE}",
    f"quantization.widths={list(WIDTHS)}",
    "data.samples=24",
    f"data.sequence_length={LENGTH}",
    "data.evaluation.windows=48",
    f"data.evaluation.sequence_length={LENGTH}",
    "end_to_end.epochs=0",
    "trainer.precision=32-true",
)


def main(work: Path) -> None:
    """Train, quantize in each way, and write the results."""
    work.mkdir(parents=True, exist_ok=True)
    text = "\n".join(topics[name] for name in sorted(topics))
    cut = int(0.9 * len(text))
    (work / "train.txt").write_text(text[:cut])
    (work / "held_out.txt").write_text(text[cut:])
    if not (work / "model" / "config.json").is_file():
        config = MixtralConfig(output_router_logits=True, router_aux_loss_coef=0.02, **SIZES)
        train(work / "model", text[:cut], config)
    rows = {"widths by sensitivity": quantize(work, "sensitivity", "model")}
    (work / "experts_uniform.json").write_text(json.dumps(experts_uniform(work)))
    rows["experts uniform, others by sensitivity"] = quantize(work, "experts", str(work / "experts_uniform.json"))
    rows["uniform"] = quantize(work, "uniform", "uniform")
    result = {"machine": describe_machine(), "commit": commit(), "sizes": SIZES, "steps": STEPS, "rows": rows}
    write_atomic(RESULTS, json.dumps(result, indent=2) + "\n")


def train(folder: Path, text: str, config: PretrainedConfig) -> None:
    """Train a model on the bytes of a text, and save it with a tokenizer that makes a token of each byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(["</s>", *alphabet])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", bos_token="</s>")
    tokens = torch.tensor(tokenizer(text)["input_ids"])
    torch.manual_seed(0)
    config.vocab_size, config.bos_token_id, config.eos_token_id, config.pad_token_id = len(tokenizer), 0, 0, 0
    model = AutoModelForCausalLM.from_config(config)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, STEPS)
    start = time.perf_counter()
    for step in range(STEPS):
        starts = torch.randint(len(tokens) - LENGTH, (BATCH,))
        batch = torch.stack([tokens[first : first + LENGTH] for first in starts])
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            sys.stderr.write(f"step {step}, loss {loss.item():.3f}, {time.perf_counter() - start:.0f} s\n")
    if hasattr(model.config, "output_router_logits"):
        model.config.output_router_logits = False
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def quantize(work: Path, name: str, allocation: str) -> dict[str, Any]:
    """Return the figures of a run with an allocation."""
    texts = [f"data.calibration.path={work / 'train.txt'}", f"data.evaluation.path={work / 'held_out.txt'}"]
    places = [f"model.path={work / 'model'}", f"run_dir={work / name}", f"quantization.allocation={allocation}"]
    run(load_recipe([*KEYS, *texts, *places]))
    metrics = json.loads((work / name / "metrics.json").read_text())
    keys = ("perplexity", "divergence", "average_bits", "packed_share", "experts", "routing_agreement")
    return {key: metrics[key] for key in keys}


def experts_uniform(work: Path) -> dict[str, Any]:
    """Return an allocation, as a file has it, with experts at `BITS`, and others by the measured sensitivity."""
    model = ModelSource(str(work / "model")).model()
    layers, stack = quantized_linears(model), stack_of_layers(model)
    tables = load_file(work / "sensitivity" / SENSITIVITY)
    shapes = {name: (layer.out_features, layer.in_features) for name, layer in layers.items()}
    others = {name: shape for name, shape in shapes.items() if name not in stack}
    costs, budget = costs_and_budget(others, BITS, GROUP_SIZE, WIDTHS)
    found = allocate({name: tables[name] for name in others}, costs, WIDTHS, budget, exact=True).bits
    uniform = {name: [BITS] * (columns // GROUP_SIZE) for name, (_, columns) in shapes.items()}
    widths = uniform | {name: bits.tolist() for name, bits in found.items()}
    return json.loads((work / "sensitivity" / "allocation.json").read_text()) | {"bits": widths}


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/experts"))
